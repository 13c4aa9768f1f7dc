"""The published models' own outputs, computed in double precision: here the same is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from timm.layers import set_fused_attn, use_fused_attn

from dynamicvit import KeepSchedule
from dynamicvit.core.paths import Masked
from dynamicvit.training.kept_gradients import KeptMasked
from tests import parity
from tests.parity import Error, Golden


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "plain"])
def fused(request: pytest.FixtureRequest) -> Iterator[bool]:
    """timm's attention with and without torch's fused kernel; models are to be built inside."""
    before = use_fused_attn()
    set_fused_attn(request.param)
    yield request.param
    set_fused_attn(bool(before))


@pytest.fixture(scope="module", params=parity.NAMES)
def golden(fused: bool, request: pytest.FixtureRequest) -> Golden:
    loaded = parity.load_golden(request.param)
    attention: list[Any] = [block.attn for block in loaded.student.backbone.blocks]
    assert all(bool(module.fused_attn) == fused for module in attention)
    return loaded


def _wrong(errors: dict[str, Error]) -> dict[str, Error]:
    return {name: error for name, error in errors.items() if not error.fits}


def test_sizes_and_schedule_are_read_from_the_weights(golden: Golden) -> None:
    student, config = golden.student, golden.config
    assert student.schedule == KeepSchedule(config["prune_at"], config["stage_ratios"])
    assert student.backbone.embed_dim == config["embed_dim"]
    assert len(student.backbone.blocks) == config["depth"]
    assert student.num_classes == config["num_classes"]
    assert not student.training


def test_dense_and_pruned_logits(golden: Golden) -> None:
    assert _wrong(parity.inference_errors(golden)) == {}


@pytest.mark.parametrize("kept", [False, True], ids=["all", "kept"])
def test_masked_outputs_losses_and_gradients(golden: Golden, kept: bool) -> None:
    errors = parity.training_errors(golden, KeptMasked if kept else Masked)
    assert _wrong(errors) == {}
    assert sum("gradient of" in name for name in errors) >= 6  # decisions, and parameters


def test_bfloat16_is_near(golden: Golden) -> None:
    assert _wrong(parity.bfloat16_errors(golden)) == {}


def test_what_is_not_a_number_does_not_fit() -> None:
    assert not Error(float("nan"), 1.0).fits
    assert not Error(1.1, 1.0).fits
    assert Error(1.0, 1.0).fits
