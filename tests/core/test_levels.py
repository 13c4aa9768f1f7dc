"""A budget for each image."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynamicvit import KeepSchedule, SparseViT, sparsify
from dynamicvit.core.levels import Calibration, Levels
from tests.conftest import tiny_vit

RATIOS = (0.4, 0.6, 1.0)


def _images(count: int = 40, side: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    contrast = torch.linspace(0.1, 2.0, count).view(-1, 1, 1, 1)
    return contrast * torch.randn(count, 3, side, side, generator=generator)


def _calibrated(scorer: str = "learned", model: Any = None) -> SparseViT:
    sparse = sparsify(model or tiny_vit(img_size=48), keep_ratio=0.7, scorer=scorer).eval()
    sparse.calibrate(_images(), RATIOS)
    return sparse


@pytest.mark.parametrize("scorer", ["learned", "class_attention"])
@torch.no_grad()
def test_images_of_each_level_are_those_of_a_model_at_that_budget(scorer: str) -> None:
    sparse = _calibrated(scorer)
    each = sparse.at(keep_ratio=0.5, per_image=True)
    images = _images()
    assert each.levels is not None
    output = each.pruned(images)
    torch.testing.assert_close(each(images), output.logits, atol=1e-5, rtol=0)
    counts = output.keep[0].sum(dim=1)
    found = {schedule.counts(36)[0]: schedule for schedule in each.levels.schedules}
    assert len(counts.unique()) > 1, "images differ"
    for count in counts.unique().tolist():
        rows = counts == count
        fixed = sparse.at(schedule=found[int(count)]).pruned(images[rows])
        torch.testing.assert_close(output.logits[rows], fixed.logits, atol=1e-5, rtol=0)
        kept = fixed.tokens.shape[1]
        torch.testing.assert_close(output.tokens[rows][:, :kept], fixed.tokens, atol=1e-5, rtol=0)
        assert (output.tokens[rows][:, kept:] == 0).all()
        for stage in range(3):
            assert torch.equal(output.keep[stage][rows], fixed.keep[stage])
    masked = each.masked(images)
    torch.testing.assert_close(masked.logits, output.logits, atol=1e-5, rtol=0)


@given(st.permutations(range(12)), st.integers(1, 12))
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_an_answer_does_not_depend_on_the_batch(order: list[int], size: int) -> None:
    each = _EACH
    images = _images()[::4][:12]
    alone = torch.cat([each(image[None]) for image in images])
    order = [place for place in order if place < len(images)]
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    for batch in batches:
        torch.testing.assert_close(each(images[batch]), alone[batch], atol=1e-5, rtol=0)


_EACH = _calibrated().at(keep_ratio=0.5, per_image=True)


@pytest.mark.parametrize("keep_ratio", [0.4, 0.5, 0.6, 0.8, 1.0])
def test_the_mean_cost_is_the_budget(keep_ratio: float) -> None:
    sparse = _calibrated()
    each = sparse.at(keep_ratio=keep_ratio, per_image=True)
    assert each.levels is not None
    scores = sparse.pruned(_images()).scores[0]
    level = each.levels.of(cast(Any, sparse.scorers[0]).difficulty(scores))
    budget = sparse.budget()
    costs = torch.tensor([budget.cost(schedule) for schedule in each.levels.schedules])
    asked = budget.cost(each.schedule)
    # 40 images: one more or less at the next level changes the mean by that much.
    step = float(costs.diff().max()) / 40
    assert float(costs[level].mean()) == pytest.approx(asked, abs=max(0.02 * asked, step))


def test_gmacs_and_per_image_go_together() -> None:
    sparse = _calibrated()
    gmacs = sparse.budget().cost(KeepSchedule(sparse.schedule.blocks, (0.6, 0.36, 0.216)))
    each = sparse.at(gmacs=gmacs, per_image=True)
    assert each.levels == sparse.at(keep_ratio=0.6, per_image=True).levels
    assert each.at(keep_ratio=0.5).levels is None, "back to one budget"


@given(
    st.lists(st.tuples(*[st.floats(0.0, 1.0)] * 3), min_size=2, max_size=8),
    st.floats(0.0, 1.0),
)
@settings(deadline=None)
def test_bounds_have_the_least_loss_of_all(losses: list[tuple[float, ...]], share: float) -> None:
    table = torch.tensor(losses, dtype=torch.float64)
    difficulty = torch.arange(len(losses)).float()
    calibration = Calibration.of((0.3, 0.6, 1.0), difficulty, table)
    costs = [1.0, 2.0, 4.0]
    budget = 1.0 + 3.0 * share
    level = Levels((), calibration.bounds_for(costs, budget)).of(difficulty)
    chosen = table[torch.arange(len(losses)), level].mean()
    ways = [torch.tensor(way) for way in combinations_with_replacement(range(3), len(losses))]
    mean = [torch.tensor(costs)[way].mean().item() for way in ways]
    nearest = min(abs(cost - budget) for cost in mean)
    best = min(
        table[torch.arange(len(losses)), way].mean().item()
        for way, cost in zip(ways, mean, strict=True)
        if abs(cost - budget) <= max(0.005 * budget, nearest) + 1e-12
    )
    assert chosen.item() == pytest.approx(best, abs=1e-9)


def test_weights_are_shared() -> None:
    sparse = _calibrated()
    each = sparse.at(keep_ratio=0.5, per_image=True)
    for own, other in zip(sparse.parameters(), each.parameters(), strict=True):
        assert own is other


def test_the_model_is_as_it_was_after_calibration() -> None:
    sparse = sparsify(tiny_vit(img_size=48), keep_ratio=0.7).train()
    sparse.backbone.blocks[0].eval()
    sparse.calibrate(_images(4).split(2), RATIOS)
    assert sparse.training
    assert not sparse.backbone.blocks[0].training
    assert sparse.calibration is not None


@torch.no_grad()
def test_other_families() -> None:
    each = _calibrated(model=tiny_vit("lvvit_tiny", img_size=48)).at(keep_ratio=0.6, per_image=True)
    assert each(_images(3)).shape == (3, each.num_classes)
    assert each(_images(1)[:0]).shape == (0, each.num_classes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"keep_ratio": 0.33},
            ValueError,
            r"keep_ratio must lie between .* 0.4 and 1.0, got .*0.33",
        ),
        (
            {"schedule": KeepSchedule((1, 2, 3), (0.5, 0.4, 0.3))},
            ValueError,
            "per_image goes with keep_ratio or gmacs, got schedule",
        ),
        ({}, ValueError, "give one of keep_ratio, schedule and gmacs"),
    ],
)
def test_budgets_that_do_not_fit(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _calibrated().at(**options, per_image=True)


@pytest.mark.parametrize(
    ("scorer", "arguments", "error", "message"),
    [
        ("learned", (_images(1),), ValueError, "images must be 2 or more, got 1"),
        ("learned", ([],), ValueError, "images must be 2 or more, got 0"),
        ("learned", (_images(2), (0.5,)), ValueError, "keep_ratios must be 2 or more and growing"),
        ("learned", (_images(2), (0.5, 0.5)), ValueError, "keep_ratios must be 2 or more and grow"),
        ("learned", (_images(2), 0.5), TypeError, "keep_ratios must be a sequence.*got 0.5"),
        ("learned", (_images(2), (0.5, 2)), ValueError, r"keep_ratio must lie in \(0, 1\], got 2"),
        ("learned", (3,), TypeError, "images must be a tensor or batches of them, got int"),
        ("random", (_images(2),), TypeError, "tell images apart, RandomScorer has none"),
        ("static", (_images(2),), TypeError, "tell images apart, a static mask has none"),
        ("pooling", (_images(2),), TypeError, "per_image needs scores.*PoolingMerger"),
    ],
)
def test_calibrations_that_do_not_fit(
    scorer: str, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    sparse = sparsify(tiny_vit(img_size=48), keep_ratio=0.7, scorer=scorer)
    with pytest.raises(error, match=message):
        sparse.calibrate(*arguments)


def test_per_image_needs_calibration() -> None:
    sparse = sparsify(tiny_vit(img_size=48), keep_ratio=0.7)
    with pytest.raises(ValueError, match="per_image needs a call of calibrate"):
        sparse.at(keep_ratio=0.5, per_image=True)


def test_one_tensor_of_features_is_refused() -> None:
    with pytest.raises(TypeError, match="forward_features needs one budget"):
        _EACH.forward_features(_images(2))
