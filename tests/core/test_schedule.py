from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamicvit import KeepSchedule

# Published counts for 196 patch tokens.
PUBLISHED = {0.7: (137, 96, 67), 0.8: (156, 125, 100), 0.9: (176, 158, 142)}

# Each grid of ratios and token counts is small enough for exact integer arithmetic.
HUNDREDTHS = st.integers(1, 100)
TOKENS = st.integers(1, 5000)


@pytest.mark.parametrize(("keep_ratio", "counts"), PUBLISHED.items())
def test_counts_are_the_published_ones(keep_ratio: float, counts: tuple[int, ...]) -> None:
    schedule = KeepSchedule.from_keep_ratio(keep_ratio, depth=12)
    assert schedule.blocks == (3, 6, 9)
    assert schedule.counts(196) == counts


@pytest.mark.parametrize(
    ("depth", "stages", "blocks"),
    [
        (12, 3, (3, 6, 9)),
        (16, 3, (4, 8, 12)),
        (20, 3, (5, 10, 15)),
        (4, 3, (1, 2, 3)),
        (12, 1, (6,)),
        (12, 2, (4, 8)),
        (5, 4, (1, 2, 3, 4)),
        (2, 1, (1,)),
    ],
)
def test_stages_are_evenly_spaced(depth: int, stages: int, blocks: tuple[int, ...]) -> None:
    assert KeepSchedule.from_keep_ratio(0.5, depth, stages).blocks == blocks


@given(HUNDREDTHS, TOKENS)
def test_counts_are_the_exact_floor(hundredths: int, num_tokens: int) -> None:
    """However the ratios are written: as powers, in which 0.7 ** 2 is not quite 0.49, or as
    decimal literals."""
    exact = tuple(hundredths**s * num_tokens // 100**s for s in (1, 2, 3))
    powers = KeepSchedule.from_keep_ratio(hundredths / 100, depth=12)
    literals = KeepSchedule((3, 6, 9), tuple(hundredths**s / 100**s for s in (1, 2, 3)))
    for schedule in (powers, literals):
        if exact[-1] == 0:
            with pytest.raises(ValueError, match="at least one of the"):
                schedule.counts(num_tokens)
        else:
            assert schedule.counts(num_tokens) == exact


@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=6), TOKENS)
def test_counts_never_grow_and_never_leave_the_range(ratios: list[float], num_tokens: int) -> None:
    schedule = KeepSchedule(range(len(ratios)), sorted(ratios, reverse=True))  # type: ignore[arg-type]
    try:
        counts = schedule.counts(num_tokens)
    except ValueError:
        assert min(ratios) * num_tokens < 1
        return
    assert all(a >= b for a, b in zip((num_tokens, *counts), (*counts, 1), strict=True))


@given(st.floats(0.01, 1.0), st.integers(1, 6))
def test_every_stage_of_the_papers_schedule_keeps_the_same_share(
    keep_ratio: float, stages: int
) -> None:
    schedule = KeepSchedule.from_keep_ratio(keep_ratio, depth=12, stages=stages)
    assert schedule.step_ratios() == pytest.approx([keep_ratio] * stages)


def test_a_schedule_is_a_plain_value() -> None:
    schedule = KeepSchedule([np.int64(1), 2], [Fraction(1, 2), np.float32(0.25)])  # type: ignore[arg-type]
    assert schedule == KeepSchedule((1, 2), (0.5, 0.25))
    assert hash(schedule) == hash(KeepSchedule((1, 2), (0.5, 0.25)))
    assert [type(value) for value in (*schedule.blocks, *schedule.ratios)] == [
        int,
        int,
        float,
        float,
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.blocks = (3,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("blocks", "ratios", "error", "message"),
    [
        ((), (), ValueError, "blocks must name at least one block, got none"),
        ((3, 6), (0.7,), ValueError, "the same length, got 2 and 1"),
        ((3, 3), (0.7, 0.5), ValueError, r"strictly increasing, got \(3, 3\)"),
        ((6, 3), (0.7, 0.5), ValueError, r"strictly increasing, got \(6, 3\)"),
        ((-1, 3), (0.7, 0.5), ValueError, r"0 or greater, got \(-1, 3\)"),
        ("36", (0.7, 0.5), TypeError, "blocks must be a sequence, got '36'"),
        (3, (0.7,), TypeError, "blocks must be a sequence, got 3"),
        (("3",), (0.7,), TypeError, "each of blocks must be an integer, got '3'"),
        ((3.0,), (0.7,), TypeError, r"each of blocks must be an integer, got 3\.0"),
        ((True,), (0.7,), TypeError, "each of blocks must be an integer, got True"),
        ((3,), "7", TypeError, "ratios must be a sequence, got '7'"),
        ((3,), 0.7, TypeError, r"ratios must be a sequence, got 0\.7"),
        ((3,), ("0.7",), TypeError, r"each of ratios must be a number, got '0\.7'"),
        ((3,), (True,), TypeError, "each of ratios must be a number, got True"),
        ((3,), (None,), TypeError, "each of ratios must be a number, got None"),
        ((3,), (0,), ValueError, r"ratios must lie in \(0, 1\], got 0"),
        ((3,), (-0.5,), ValueError, r"ratios must lie in \(0, 1\], got -0\.5"),
        ((3,), (1.5,), ValueError, r"ratios must lie in \(0, 1\], got 1\.5"),
        ((3,), (float("nan"),), ValueError, r"ratios must lie in \(0, 1\], got nan"),
        ((3, 6), (0.5, 0.7), ValueError, r"ratios must not grow.*got \(0\.5, 0\.7\)"),
    ],
)
def test_a_bad_schedule_is_refused(
    blocks: Any, ratios: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        KeepSchedule(blocks, ratios)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 12), ValueError, r"keep_ratio must lie in \(0, 1\], got 0"),
        ((1.5, 12), ValueError, r"keep_ratio must lie in \(0, 1\], got 1\.5"),
        ((float("nan"), 12), ValueError, r"keep_ratio must lie in \(0, 1\], got nan"),
        (("a", 12), TypeError, "keep_ratio must be a number.*got 'a'"),
        ((True, 12), TypeError, "keep_ratio must be a number.*got True"),
        ((0.7, 12.0), TypeError, r"depth must be an integer, got 12\.0"),
        ((0.7, 12, True), TypeError, "stages must be an integer, got True"),
        ((0.7, 12, 0), ValueError, "stages must be between 1 and depth - 1 = 11, got 0"),
        ((0.7, 3, 3), ValueError, "stages must be between 1 and depth - 1 = 2, got 3"),
    ],
)
def test_a_bad_keep_ratio_is_refused(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        KeepSchedule.from_keep_ratio(*arguments)


def test_a_block_out_of_range_is_refused() -> None:
    schedule = KeepSchedule((3, 6), (0.7, 0.5))
    schedule.check_depth(7)
    with pytest.raises(ValueError, match=r"below the backbone's depth of 6, got \(3, 6\)"):
        schedule.check_depth(6)


def test_a_number_of_tokens_that_is_none_is_refused() -> None:
    schedule = KeepSchedule((3, 6), (0.5, 0.1))
    for value, error in (("3", TypeError), (2.5, TypeError), (None, TypeError), (-3, ValueError)):
        with pytest.raises(error, match=f"num_tokens must be .* got {value!r}"):
            schedule.counts(value)  # type: ignore[arg-type]


def test_a_schedule_that_keeps_no_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one of the 9 patch tokens.*keep \(4, 0\)"):
        KeepSchedule((3, 6), (0.5, 0.1)).counts(9)
