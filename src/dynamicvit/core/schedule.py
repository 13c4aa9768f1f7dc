"""KeepSchedule: which blocks prune, and how many tokens stay. Plain Python, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, cast


@dataclass(frozen=True)
class KeepSchedule:
    """Where tokens leave, and what share of them stays.

    Args:
        blocks: 0-based indices of the blocks before which a stage prunes, strictly increasing.
        ratios: for each stage, the share of the *original* patch tokens that is kept after it,
            each in (0, 1], never growing. Prefix tokens are always kept and are not counted.

    Raises:
        TypeError, ValueError: naming the argument and what was got.

    Source: DynamicViT, arXiv 2106.02034.

    >>> KeepSchedule(blocks=(3, 6, 9), ratios=(0.7, 0.49, 0.343)).counts(196)
    (137, 96, 67)
    """

    blocks: tuple[int, ...]
    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        blocks = _as_tuple("blocks", self.blocks, Integral, "an integer")
        ratios = _as_tuple("ratios", self.ratios, Real, "a number")
        if not blocks:
            raise ValueError("blocks must name at least one block, got none")
        if len(blocks) != len(ratios):
            raise ValueError(
                f"blocks and ratios must have the same length, got {len(blocks)} and {len(ratios)}"
            )
        if blocks[0] < 0:
            raise ValueError(f"blocks must be 0 or greater, got {blocks}")
        if any(a >= b for a, b in pairwise(blocks)):
            raise ValueError(f"blocks must be strictly increasing, got {blocks}")
        for ratio in ratios:
            _check_ratio("ratios", ratio)
        if any(a < b for a, b in pairwise(ratios)):
            raise ValueError(
                f"ratios must not grow, since a token that left never comes back, got {ratios}"
            )
        object.__setattr__(self, "blocks", tuple(int(block) for block in blocks))
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in ratios))

    @classmethod
    def from_keep_ratio(cls, keep_ratio: float, depth: int, stages: int = 3) -> KeepSchedule:
        """The paper's schedule: `stages` evenly spaced stages, stage s keeping `keep_ratio ** s`.

        Args:
            keep_ratio: share of the remaining tokens that each stage keeps, in (0, 1].
            depth: number of blocks of the backbone.
            stages: number of pruning stages.

        >>> KeepSchedule.from_keep_ratio(0.5, depth=12)
        KeepSchedule(blocks=(3, 6, 9), ratios=(0.5, 0.25, 0.125))
        """
        _check_ratio("keep_ratio", keep_ratio)
        for name, value in (("depth", depth), ("stages", stages)):
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if not 1 <= stages < depth:
            raise ValueError(f"stages must be between 1 and depth - 1 = {depth - 1}, got {stages}")
        blocks = tuple(depth * step // (stages + 1) for step in range(1, stages + 1))
        return cls(blocks, (1.0,) * stages).with_keep_ratio(keep_ratio)

    def with_keep_ratio(self, keep_ratio: float) -> KeepSchedule:
        """The same stages, each keeping this share of the tokens that reach it, in (0, 1].

        >>> KeepSchedule((3, 6), (0.7, 0.49)).with_keep_ratio(0.5)
        KeepSchedule(blocks=(3, 6), ratios=(0.5, 0.25))
        """
        _check_ratio("keep_ratio", keep_ratio)
        steps = range(1, len(self.blocks) + 1)
        return KeepSchedule(self.blocks, tuple(keep_ratio**step for step in steps))

    def counts(self, num_tokens: int) -> tuple[int, ...]:
        """Patch tokens kept after each stage, `floor(ratio * num_tokens)`.

        Raises:
            TypeError, ValueError: if `num_tokens` is no count, or a stage would keep no token.
        """
        if not isinstance(num_tokens, Integral) or isinstance(num_tokens, bool):
            raise TypeError(f"num_tokens must be an integer, got {num_tokens!r}")
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be 1 or more, got {num_tokens}")
        # 0.7 ** 2 * 100 is 48.999… in floating point; the small term makes it the 49 it stands for.
        counts = tuple(math.floor(ratio * num_tokens + 1e-6) for ratio in self.ratios)
        if counts[-1] < 1:
            raise ValueError(
                f"ratios must leave at least one of the {num_tokens} patch tokens, "
                f"got ratios {self.ratios} which keep {counts}"
            )
        return counts

    def step_ratios(self) -> tuple[float, ...]:
        """For each stage, the share of the tokens *that reach it* which it keeps."""
        before = (1.0, *self.ratios[:-1])
        return tuple(ratio / prior for ratio, prior in zip(self.ratios, before, strict=True))

    def check_depth(self, depth: int) -> None:
        """Raise ValueError unless every stage lies inside a backbone of `depth` blocks."""
        if self.blocks[-1] >= depth:
            raise ValueError(
                f"blocks must be below the backbone's depth of {depth}, got {self.blocks}"
            )


def _as_tuple(name: str, values: object, kind: type, what: str) -> tuple:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence, got {values!r}")
    result = tuple(values)
    for value in result:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"each of {name} must be {what}, got {value!r}")
    return result


def _check_ratio(name: str, ratio: Any) -> None:
    if not isinstance(ratio, Real) or isinstance(ratio, bool):
        raise TypeError(f"{name} must be a number in (0, 1], got {ratio!r}")
    if not 0 < cast(float, ratio) <= 1:  # also refuses NaN
        raise ValueError(f"{name} must lie in (0, 1], got {ratio!r}")
