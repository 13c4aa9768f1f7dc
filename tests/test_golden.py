"""The published models' own outputs, computed in double precision: the same function is computed.

Axes: B images, N patch tokens, S stages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn

from dynamicvit import KeepSchedule, SparseViT, from_released
from dynamicvit.training.losses import LossWeights, distillation_loss

FOLDER = Path(__file__).parent / "golden" / "deit"
CONFIG: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
STAGES = range(len(CONFIG["prune_at"]))


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(FOLDER / "expected.safetensors")
    return tensors


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "plain"])
def fused(request: pytest.FixtureRequest) -> Iterator[bool]:
    """timm's attention with and without torch's fused kernel; models are to be built inside."""
    before = use_fused_attn()
    set_fused_attn(request.param)
    yield request.param
    set_fused_attn(bool(before))


@pytest.fixture(scope="module")
def sparse(fused: bool) -> SparseViT:
    model = from_released(FOLDER / "student.safetensors", num_heads=CONFIG["num_heads"])
    attention: list[Any] = [block.attn for block in model.backbone.blocks]
    assert all(bool(module.fused_attn) == fused for module in attention)
    return model


@pytest.fixture(scope="module")
def teacher(fused: bool) -> nn.Module:
    model: nn.Module = timm.create_model(
        "deit_small_patch16_224",
        **{key: CONFIG[key] for key in ("embed_dim", "num_heads", "num_classes")},
    ).eval()
    model.load_state_dict(load_file(FOLDER / "teacher.safetensors"))
    return model


def _assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual.detach().float(), expected, atol=tolerance, rtol=0)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def test_sizes_and_schedule_are_read_from_the_weights(sparse: SparseViT) -> None:
    assert sparse.schedule == KeepSchedule(CONFIG["prune_at"], CONFIG["stage_ratios"])
    assert sparse.backbone.embed_dim == CONFIG["embed_dim"]
    assert len(sparse.backbone.blocks) == CONFIG["depth"]
    assert sparse.num_classes == CONFIG["num_classes"]
    assert not sparse.training


@torch.no_grad()
def test_dense_and_pruned_logits(sparse: SparseViT, expected: dict[str, Tensor]) -> None:
    images = expected["images"].float()
    _assert_near(sparse.backbone(images), expected["dense.logits"])
    _assert_near(sparse(images), expected["eval.logits"])


def test_masked_outputs_losses_and_gradients(
    sparse: SparseViT, teacher: nn.Module, expected: dict[str, Tensor]
) -> None:
    images = expected["images"].float()
    decisions = [expected[f"train.decision.{s}"].clone().requires_grad_() for s in STAGES]
    output = sparse.masked(images, decisions=decisions)
    _assert_near(output.logits, expected["train.logits"])
    _assert_near(output.tokens, expected["train.tokens"])
    for stage in STAGES:
        assert torch.equal(output.keep[stage], expected[f"train.policy.{stage}"])
    assert torch.equal(output.keep[-1], expected["train.mask"])

    with torch.no_grad():
        features = teacher.forward_features(images)  # type: ignore[operator]
        teacher_logits = teacher.forward_head(features)  # type: ignore[operator]
    losses = distillation_loss(
        output,
        teacher_logits,
        features[:, 1:],
        expected["labels"],
        sparse.schedule.ratios,
        LossWeights(**CONFIG["loss_weights"]),
    )
    _assert_near(losses["ratio"], expected["loss.ratio"], tolerance=1e-6)
    for name in ("cross_entropy", "logit_kl", "token"):
        _assert_near(losses[name], expected[f"loss.{name}"])
    _assert_near(losses["loss"], expected["loss.total"])

    sparse.zero_grad()
    losses["loss"].backward()
    for stage in STAGES:
        gradient = decisions[stage].grad
        assert gradient is not None
        assert _relative_error(gradient, expected[f"train.grad.decision.{stage}"]) < 1e-4
    prefix = "train.grad.param."
    names = [key.removeprefix(prefix) for key in expected if key.startswith(prefix)]
    assert len(names) == 4
    parameters = dict(sparse.backbone.named_parameters())
    for name in names:
        gradient = parameters[name].grad
        assert gradient is not None, name
        assert _relative_error(gradient, expected[prefix + name]) < 1e-4, name
    sparse.zero_grad(set_to_none=True)


def test_bfloat16_is_near(sparse: SparseViT, expected: dict[str, Tensor]) -> None:
    """Under autocast, to 3% relative norm (bfloat16 has 8 significant bits).

    Decisions are given: rounded scores may pick other tokens near the cut.
    """
    images = expected["images"].float()
    decisions = [expected[f"train.decision.{s}"].clone().requires_grad_() for s in STAGES]
    with torch.autocast("cpu", torch.bfloat16):
        output = sparse.masked(images, decisions=decisions)
        dense = sparse.backbone(images)
    assert _relative_error(output.logits, expected["train.logits"]) < 0.03
    assert _relative_error(output.tokens, expected["train.tokens"]) < 0.03
    assert _relative_error(dense, expected["dense.logits"]) < 0.03
