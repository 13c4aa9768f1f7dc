"""A budget for each image: easy images keep few tokens, hard ones many.

A model has a few levels, each a schedule. After the first scorer each image gets its level, by how
difficult it looks there, and images of one level go on together as a plain batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamicvit.core.budget import Budget
from dynamicvit.core.schedule import KeepSchedule

KEEP_RATIOS = (0.35, 0.5, 0.7, 1.0)
_GROUPS = 64  # of calibration images, between which levels change


class Levels(NamedTuple):
    """The schedules among which each image gets its own.

    Attributes:
        schedules: the cheapest first, all with the same blocks.
        bounds: difficulty from which on an image gets the next level; one fewer than schedules,
            never falling.
    """

    schedules: tuple[KeepSchedule, ...]
    bounds: tuple[float, ...]

    def of(self, difficulty_B: Tensor) -> Tensor:
        """[B] int64, the level of each image."""
        bounds = torch.tensor(self.bounds, device=difficulty_B.device)
        return torch.bucketize(difficulty_B.float(), bounds, right=True)


class Calibration(NamedTuple):
    """What levels do to groups of images, the easiest images first.

    Attributes:
        keep_ratios: of the levels, the cheapest first. L of them.
        bounds: difficulty between one group and the next; one fewer than groups.
        shares: of all images, for each group.
        losses: for each group and level, how far answers are from those of the model that keeps
            all: mean KL divergence in nats.
    """

    keep_ratios: tuple[float, ...]
    bounds: tuple[float, ...]
    shares: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

    @classmethod
    def read(cls, values: Any) -> Calibration:
        """A calibration from what JSON gives for one.

        Raises:
            ValueError: if it is not one.
        """
        try:
            found = cls(
                tuple(map(float, values["keep_ratios"])),
                tuple(map(float, values["bounds"])),
                tuple(map(float, values["shares"])),
                tuple(tuple(map(float, row)) for row in values["losses"]),
            )
            check_levels(found.keep_ratios)
            if len(found.shares) > _GROUPS or len(found.bounds) != len(found.shares) - 1:
                raise ValueError("bounds and shares do not fit")
            torch.tensor(found.losses).view(len(found.shares), len(found.keep_ratios))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"calibration is damaged: {error}") from error
        return found

    @classmethod
    def of(
        cls, keep_ratios: Sequence[float], difficulty_M: Tensor, losses_ML: Tensor
    ) -> Calibration:
        """Group M images by difficulty."""
        order = difficulty_M.argsort()
        difficulty, losses = difficulty_M[order].double(), losses_ML[order].double()
        count = len(order)
        edges = torch.linspace(0, count, min(_GROUPS, count) + 1).round().long()
        inner = edges[1:-1]
        sizes = edges.diff()
        sums = F.pad(losses.cumsum(0), (0, 0, 1, 0))[edges].diff(dim=0)
        return cls(
            tuple(keep_ratios),
            tuple(((difficulty[inner - 1] + difficulty[inner]) / 2).tolist()),
            tuple((sizes / count).tolist()),
            tuple(map(tuple, (sums / sizes[:, None]).tolist())),
        )

    def shares_at(self, levels: Levels) -> tuple[float, ...]:
        """The share of the calibration images that gets each level."""
        starts = torch.tensor([torch.finfo(torch.float32).min, *self.bounds])
        shares = torch.tensor(self.shares, dtype=torch.float64)
        count = len(levels.schedules)
        return tuple(shares.new_zeros(count).index_add(0, levels.of(starts), shares).tolist())

    def bounds_for(self, costs: Sequence[float], budget: float) -> tuple[float, ...]:
        """The bounds between levels with the least loss, among those whose mean cost is a budget.

        All ways to give contiguous groups to the levels are tried.

        Args:
            costs: of the levels, growing.
            budget: mean cost of all images, between the least and the largest of `costs`.
        """
        shares = torch.tensor([0.0, *self.shares], dtype=torch.float64).cumsum(0)
        losses = torch.tensor(self.losses, dtype=torch.float64)
        sums = F.pad((losses * shares.diff()[:, None]).cumsum(0), (0, 0, 1, 0))
        groups = len(self.shares)
        # cuts[:, l]: the first group that gets more than level l.
        cuts = torch.combinations(torch.arange(groups + 1), len(costs) - 1, with_replacement=True)
        ends = F.pad(cuts, (0, 1), value=groups)
        starts = F.pad(cuts, (1, 0))
        cost = ((shares[ends] - shares[starts]) * torch.tensor(costs, dtype=torch.float64)).sum(1)
        columns = torch.arange(len(costs))
        loss = (sums[ends, columns] - sums[starts, columns]).sum(1)
        # Among the cuts nearest to the budget, take the one with the least loss.
        near = (cost - budget).abs() <= max(0.005 * budget, float((cost - budget).abs().min()))
        best = int(loss.masked_fill(~near, float("inf")).argmin())
        limit = torch.finfo(torch.float32).max  # JSON knows no infinity
        edges = (-limit, *self.bounds, limit)
        return tuple(edges[cut] for cut in cuts[best].tolist())


def check_levels(keep_ratios: Sequence[float]) -> tuple[float, ...]:
    """The keep ratios of levels. Raises TypeError or ValueError unless they grow, in (0, 1]."""
    if isinstance(keep_ratios, str) or not isinstance(keep_ratios, Sequence):
        raise TypeError(f"keep_ratios must be a sequence of numbers, got {keep_ratios!r}")
    for ratio in keep_ratios:
        KeepSchedule.from_keep_ratio(ratio, depth=4)
    if len(keep_ratios) < 2 or any(a >= b for a, b in pairwise(keep_ratios)):
        raise ValueError(f"keep_ratios must be 2 or more and growing, got {keep_ratios!r}")
    return tuple(map(float, keep_ratios))


def plan(calibration: Calibration, schedule: KeepSchedule, budget: Budget) -> Levels:
    """Levels whose mean cost over the calibration images is that of a schedule.

    Raises:
        ValueError: if the schedule costs less than the least level, or more than the largest.
    """
    schedules = tuple(schedule.with_keep_ratio(ratio) for ratio in calibration.keep_ratios)
    # The first scorer is asked for every image, also for one that keeps all.
    first = budget.selectors[0].macs(budget.model, budget.num_patches) / 1e9
    *costs, asked = (
        budget.cost(each) + first * (each.ratios[0] == 1) for each in (*schedules, schedule)
    )
    if not costs[0] <= asked <= costs[-1]:
        raise ValueError(
            f"keep_ratio must lie between those of the levels, {calibration.keep_ratios[0]} and "
            f"{calibration.keep_ratios[-1]}, got stages that keep {schedule.ratios}"
        )
    return Levels(schedules, calibration.bounds_for(costs, asked))
