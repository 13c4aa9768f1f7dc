"""What schedules cost, and schedules of a given cost."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dynamicvit
from dynamicvit import KeepSchedule, SparseViT, sparsify
from dynamicvit.core.macs import count_gmacs

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("deit_small_patch16_224", {}),
    ("deit_small_distilled_patch16_224", {}),
    ("vit_small_patch16_dinov3", {}),  # rotary, registers
    ("vit_small_patch16_rope_mixed_224", {}),
    ("vit_base_patch32_siglip_256", {"num_classes": 1000}),  # attention pooling
    ("vit_small_r26_s32_224", {}),  # a convolutional stem
    ("vit_medium_patch16_gap_256", {}),
    ("eva02_small_patch14_336", {"img_size": 224}),  # SwiGLU
    ("vit_base_patch16_rope_reg1_gap_256", {}),
    ("lvvit_small", {}),
]


def _meta(name: str, keep_ratio: float = 0.7, scorer: str = "learned", **options: Any) -> SparseViT:
    """A sparse model without weights."""
    with torch.device("meta"):
        dense = timm.create_model(name, **options)
        return sparsify(dense, keep_ratio=keep_ratio, scorer=scorer).eval()


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_the_estimate_is_near_the_count(name: str, options: dict[str, Any]) -> None:
    sparse = _meta(name, **options)
    size = (3, *cast(Any, sparse.patch_embed).img_size)
    for ratio in (1.0, 0.6):
        found = sparse.at(keep_ratio=ratio)
        estimate = found.budget().cost(found.schedule)
        assert estimate == pytest.approx(count_gmacs(found, size), rel=0.01)


@pytest.mark.parametrize("scorer", ["class_attention", "static", "random"])
def test_the_estimate_holds_for_rules(scorer: str) -> None:
    sparse = _meta("deit_small_patch16_224", scorer=scorer)
    counted = count_gmacs(sparse, (3, 224, 224))
    assert sparse.budget().cost(sparse.schedule) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("gmacs", [1.5, 2.3, 2.981, 4.0, 4.6])
def test_at_gmacs_keeps_the_most_within_them(gmacs: float) -> None:
    sparse = _meta("deit_small_patch16_224")
    budget = sparse.budget()
    found = sparse.at(gmacs=gmacs)
    more = found.schedule.with_keep_ratio(min(1.0, found.schedule.ratios[0] + 2e-4))
    assert found.schedule.blocks == sparse.schedule.blocks
    # A few thousandths of the estimate: one token more or less at each stage.
    assert 0.98 * gmacs <= budget.cost(found.schedule) <= gmacs
    assert budget.cost(more) >= budget.cost(found.schedule)
    assert {p.data_ptr() for p in found.parameters()} == {p.data_ptr() for p in sparse.parameters()}


def test_the_cost_is_of_a_schedule() -> None:
    budget = _meta("deit_small_patch16_224").budget()
    with pytest.raises(TypeError, match="schedule must be a KeepSchedule, got 3"):
        budget.cost(cast(Any, 3))


def test_the_dense_cost_keeps_all() -> None:
    sparse = _meta("deit_small_patch16_224")
    assert sparse.at(gmacs=4.62).schedule.ratios == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("gmacs", "error", "message"),
    [
        (0.1, ValueError, r"gmacs must lie between 1\.\d+ .* and 4\.6 .* got 0.1"),
        (9, ValueError, r"gmacs must lie between .* got 9"),
        (float("nan"), ValueError, "gmacs must lie between .* got nan"),
        ("2", TypeError, "gmacs must be a number, got '2'"),
        (True, TypeError, "gmacs must be a number, got True"),
    ],
)
def test_gmacs_out_of_reach_are_refused(gmacs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _meta("deit_small_patch16_224").at(gmacs=gmacs)


def test_gmacs_need_an_input_size() -> None:
    sparse = _meta("vit_tiny_patch16_224", dynamic_img_size=True)
    assert sparse.at(gmacs=1.0).schedule.ratios[0] < 1  # a default size is enough
    naflex = _without_size(sparse)
    with pytest.raises(ValueError, match="gmacs and align need a model of a fixed input size"):
        naflex.at(gmacs=1.0)


def _without_size(sparse: SparseViT) -> SparseViT:
    embed: Any = sparse.patch_embed
    embed.num_patches = embed.img_size = None
    return sparse


def test_aligned_counts_are_the_nearest_in_cost() -> None:
    budget = _meta("deit_small_patch16_224").budget()
    schedule = KeepSchedule.from_keep_ratio(0.7, depth=12)
    aligned = budget.aligned(schedule, 16)
    assert aligned.blocks == schedule.blocks
    assert [count + 1 for count in aligned.counts(196)] == [144, 96, 64]
    assert budget.aligned(schedule, 1).counts(196) == schedule.counts(196)


@settings(deadline=None)
@given(
    st.integers(1, 32),
    st.tuples(st.integers(4, 32), st.integers(4, 32)),
    st.integers(0, 5),
    st.floats(0.5, 1.0),
)
def test_aligned_counts_are_multiples_within_the_cost(
    multiple: int, grid: tuple[int, int], num_prefix: int, keep_ratio: float
) -> None:
    options: dict[str, Any] = {
        "img_size": (grid[0] * 4, grid[1] * 4),
        "patch_size": 4,
        "depth": 4,
        "embed_dim": 16,
        "num_heads": 2,
        "class_token": num_prefix > 0,
        "reg_tokens": max(num_prefix - 1, 0),
        "global_pool": "avg",
    }
    budget = _meta("vit_tiny_patch16_224", **options).budget()
    num_tokens = grid[0] * grid[1]
    schedule = KeepSchedule.from_keep_ratio(keep_ratio, depth=4)
    try:
        aligned = budget.aligned(schedule, multiple)
    except ValueError:  # of a few tokens no multiple may come near: refused
        assert multiple > 1
        return
    assert budget.cost(aligned) == pytest.approx(budget.cost(schedule), rel=0.02)
    for before, after in zip(schedule.counts(num_tokens), aligned.counts(num_tokens), strict=True):
        if before == num_tokens:
            assert after == before, "what keeps everything goes on doing so"
        else:
            assert (after + num_prefix) % multiple == 0
        assert 1 <= after <= num_tokens


@pytest.mark.parametrize(
    ("multiple", "error", "message"),
    [
        (0, ValueError, "align must be 1 or more, got 0"),
        (-16, ValueError, "align must be 1 or more, got -16"),
        (1.5, TypeError, "align must be an integer, got 1.5"),
        (True, TypeError, "align must be an integer, got True"),
        (128, ValueError, "align must leave the cost within 2%.*got 128"),
        (1000, ValueError, "align must leave the cost within 2%.*got 1000"),
    ],
)
def test_an_alignment_that_does_not_fit_is_refused(
    multiple: Any, error: type[Exception], message: str
) -> None:
    dense = timm.create_model("deit_small_patch16_224", device="meta")
    with pytest.raises(error, match=message):
        dynamicvit.sparsify(dense, keep_ratio=0.7, align=multiple)
