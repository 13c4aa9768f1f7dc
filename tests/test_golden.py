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
from dynamicvit.backbones.lvvit import RESIDUAL_SCALE, from_official
from dynamicvit.core.backbone import masked_head
from dynamicvit.training.losses import LossWeights, distillation_loss, token_kl, token_mse

GOLDEN = Path(__file__).parent / "golden"
STAGES = range(3)


@pytest.fixture(scope="module", params=["deit", "lvvit"])
def folder(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / request.param


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder / "expected.safetensors")
    return tensors


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "plain"])
def fused(request: pytest.FixtureRequest) -> Iterator[bool]:
    """timm's attention with and without torch's fused kernel; models are to be built inside."""
    before = use_fused_attn()
    set_fused_attn(request.param)
    yield request.param
    set_fused_attn(bool(before))


@pytest.fixture(scope="module")
def sparse(fused: bool, folder: Path, config: dict[str, Any]) -> SparseViT:
    model = from_released(folder / "student.safetensors", num_heads=config["num_heads"])
    attention: list[Any] = [block.attn for block in model.backbone.blocks]
    assert all(bool(module.fused_attn) == fused for module in attention)
    return model


@pytest.fixture(scope="module")
def teacher(fused: bool, folder: Path, config: dict[str, Any]) -> nn.Module:
    architecture = {"deit": "deit_small_patch16_224", "lvvit": "lvvit_small"}[folder.name]
    model: nn.Module = timm.create_model(
        architecture, **{key: config[key] for key in ("embed_dim", "num_heads", "num_classes")}
    ).eval()
    model.load_state_dict(from_official(load_file(folder / "teacher.safetensors")))
    return model


def _assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual.detach().float(), expected, atol=tolerance, rtol=0)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def test_sizes_and_schedule_are_read_from_the_weights(
    sparse: SparseViT, config: dict[str, Any]
) -> None:
    assert sparse.schedule == KeepSchedule(config["prune_at"], config["stage_ratios"])
    assert sparse.backbone.embed_dim == config["embed_dim"]
    assert len(sparse.backbone.blocks) == config["depth"]
    assert sparse.num_classes == config["num_classes"]
    assert not sparse.training


@torch.no_grad()
def test_dense_and_pruned_logits(sparse: SparseViT, expected: dict[str, Tensor]) -> None:
    images = expected["images"].float()
    _assert_near(sparse.backbone(images), expected["dense.logits"])
    _assert_near(sparse(images), expected["eval.logits"])


def test_masked_outputs_losses_and_gradients(
    sparse: SparseViT,
    teacher: nn.Module,
    expected: dict[str, Tensor],
    config: dict[str, Any],
    folder: Path,
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
        teacher_logits, teacher_tokens = masked_head(teacher, features)  # type: ignore[arg-type]
    losses = distillation_loss(
        output,
        teacher_logits,
        teacher_tokens,
        expected["labels"],
        sparse.schedule.ratios,
        LossWeights(**config["loss_weights"]),
        token_loss={"mse": token_mse, "kl": token_kl}[config["token_loss"]],
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
    assert len(names) >= 3
    parameters = dict(sparse.backbone.named_parameters())
    for name in names:
        gradient = parameters[name].grad
        assert gradient is not None, name
        if folder.name == "lvvit" and name.endswith("mlp.fc2.weight"):
            # The golden gradient is that of the weight before the residual scale was folded in.
            gradient = gradient / RESIDUAL_SCALE[config["depth"]]
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
