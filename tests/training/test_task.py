from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from timm.models.vision_transformer import ParallelThingsBlock

from dynamicvit.core.backbones import UnsupportedBackbone
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.core.paths import MOST_GRADIENT
from dynamicvit.core.selectors.learned import TokenScorer
from dynamicvit.models.lvvit import LVViT
from dynamicvit.training.losses import SCORE_WEIGHT, token_kl
from dynamicvit.training.task import DenseTask, SparseTask, WarmStartTask
from tests.conftest import tiny_vit

IMAGES, LABELS = (
    torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)),
    torch.arange(4),
)


def _gradient(task: SparseTask) -> torch.Tensor:
    grad = next(task.student.scorers.parameters()).grad
    assert grad is not None
    return grad.clone()


def _sparse_task() -> SparseTask:
    return SparseTask(sparsify(tiny_vit().train(), 0.7), tiny_vit()).train()


def test_sparse_task_returns_loss_output_and_parts() -> None:
    result = _sparse_task()(IMAGES, LABELS)
    assert result["output"].shape == (4, 5)
    assert result["kept"].shape == (3,)
    parts = {"cross_entropy": 1.0, "ratio": 2.0 / 3, "logit_kl": 0.5, "token": 0.5}
    total = sum(weight * result[name] for name, weight in parts.items())
    torch.testing.assert_close(result["loss"].detach(), total)
    assert [name for name, value in result.items() if value.requires_grad] == ["loss"]


def test_gradients_reach_scorers_and_backbone_but_not_the_teacher() -> None:
    task = _sparse_task()
    task(IMAGES, LABELS)["loss"].backward()
    for name, parameter in task.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in task.teacher.parameters())


def test_the_teacher_stays_frozen_in_eval_mode() -> None:
    task = _sparse_task().train()
    assert task.student.training
    assert not any(module.training for module in task.teacher.modules())
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher must have the student's 5 classes, got 7"):
        SparseTask(sparsify(tiny_vit(), 0.7), tiny_vit(num_classes=7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_finite_under_autocast(dtype: torch.dtype) -> None:
    task = _sparse_task()
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        loss = task(IMAGES, LABELS)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    grads = [p.grad for p in task.student.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("kept_gradients", [False, True])
def test_a_step_follows_the_budget_that_it_is_given(kept_gradients: bool) -> None:
    student = sparsify(tiny_vit(img_size=64).train(), 0.7)
    task = SparseTask(student, tiny_vit(img_size=64), kept_gradients=kept_gradients).train()
    images = torch.randn(16, 3, 64, 64)
    noise = [torch.full((16, 64), 0.5)] * 3  # no noise
    for ratio in (1.0, 0.6, 0.3):
        ratios = torch.tensor([ratio, ratio**2, ratio**3])
        result = task(images, torch.arange(16) % 5, noise=noise, ratios=ratios)
        torch.testing.assert_close(result["kept"], ratios, atol=2e-3, rtol=0)
        assert torch.equal(result["ratios"], ratios)
        weights = {
            "cross_entropy": 1.0,
            "logit_kl": 0.5,
            "token": 0.5,
            "scores": SCORE_WEIGHT,
        }
        total = sum(weight * result[name] for name, weight in weights.items())
        torch.testing.assert_close(result["loss"].detach(), total)
        result["loss"].backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_with_a_threshold_no_decision_drowns_the_others() -> None:
    student = sparsify(tiny_vit().train(), 0.5)
    noise = [torch.full((4, 16), 0.5)] * 3
    largest = []
    for threshold in (lambda *_: torch.zeros(()), None):
        output = student.masked(IMAGES, noise=noise, threshold=threshold)
        output.scores[-1].retain_grad()
        (1e6 * output.logits.sum()).backward()
        largest.append(cast(torch.Tensor, output.scores[-1].grad).abs().max())
    assert 0 < largest[0] <= MOST_GRADIENT / 4 / 4  # images; the steepest slope of a sigmoid
    assert largest[1] > 1


@pytest.mark.parametrize("ratios", [None, torch.tensor([0.6, 0.4, 0.2])])
def test_a_training_step_compiles_whole_and_agrees(ratios: torch.Tensor | None) -> None:
    task = _sparse_task()
    compiled = torch.compile(task, fullgraph=True, backend="aot_eager")
    losses = []
    for run in (task, compiled):
        torch.manual_seed(0)
        task.zero_grad()
        result = run(IMAGES, LABELS, ratios=ratios)
        result["loss"].backward()
        losses.append((result["loss"].item(), _gradient(task)))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    torch.testing.assert_close(losses[0][1], losses[1][1], atol=1e-5, rtol=1e-4)


def test_dense_task_is_cross_entropy() -> None:
    model = tiny_vit()
    result = DenseTask(model, label_smoothing=0.1)(IMAGES, LABELS)
    expected = torch.nn.functional.cross_entropy(model(IMAGES), LABELS, label_smoothing=0.1)
    torch.testing.assert_close(result["loss"], expected)


def test_an_lvvit_s_tokens_are_compared_as_class_distributions() -> None:
    teacher = tiny_vit("lvvit_small", stem_width=8)
    task = SparseTask(sparsify(teacher, 0.5).train(), teacher)
    result = task(IMAGES, LABELS)
    assert task.token_loss is token_kl
    result["loss"].backward()
    student = cast(LVViT, task.student.backbone)
    assert student.aux_head.weight.grad is not None
    # With nothing dropped and the teacher's own weights there is nothing to learn.
    whole = SparseTask(sparsify(teacher, 1.0).eval(), teacher)
    for scorer in whole.student.scorers:
        cast(TokenScorer, scorer).set_keep_prior(1 - 1e-6)
    same = whole(IMAGES, LABELS)
    assert same["token"].item() == pytest.approx(0.0, abs=1e-6)
    assert same["logit_kl"].item() == pytest.approx(0.0, abs=1e-6)


def test_statistics_stay_those_of_the_trained_model() -> None:
    teacher = tiny_vit("lvvit_small", stem_width=8)
    for task_class in (SparseTask, WarmStartTask):
        task = task_class(sparsify(teacher, 0.5), teacher).train()
        before = {k: v.clone() for k, v in task.student.state_dict().items() if "running" in k}
        assert before
        task(IMAGES, LABELS)
        for key, value in before.items():
            assert torch.equal(task.student.state_dict()[key], value)


def test_a_teacher_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="of the student's kind, VisionTransformer, got LVViT"):
        SparseTask(sparsify(tiny_vit(), 0.5), tiny_vit("lvvit_small", stem_width=8))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
        ("eva02_tiny_patch14_224", {}),
        ("vit_small_patch16_rope_224", {}),
    ],
)
def test_warm_start_teaches_scorers_to_keep_what_the_teacher_attends_to(
    name: str, options: dict[str, Any]
) -> None:
    student: SparseViT = sparsify(tiny_vit(name, **options), 0.5)
    student.backbone.requires_grad_(False)
    teacher = tiny_vit(name, **options)
    fused = [module.fused_attn for module in teacher.modules() if hasattr(module, "fused_attn")]
    task = WarmStartTask(student, teacher)
    optimizer = torch.optim.AdamW(student.scorers.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        result = task(IMAGES, LABELS)
        result["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result["loss"].item())
    assert losses[-1] < 0.5 * losses[0]
    assert fused == [m.fused_attn for m in teacher.modules() if hasattr(m, "fused_attn")]
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_warm_start_refuses_blocks_of_two_attentions() -> None:
    model = tiny_vit(block_fn=ParallelThingsBlock)
    with pytest.raises(UnsupportedBackbone, match="warm_start needs one attention a block, Parall"):
        WarmStartTask(sparsify(model, 0.5), model)
