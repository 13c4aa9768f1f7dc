"""Budgets: what a schedule costs, and the schedule that costs what is asked for.

The cost is an estimate, within 1% of what `dynamicvit.core.macs.count_gmacs` counts, for a search
among schedules: to count takes a run of the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise, product
from numbers import Integral, Real

from dynamicvit.core.backbones import Adapter, Backbone
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.selectors import Selector

_STEPS = 10_000  # into which a keep ratio is divided


class Budget:
    """What schedules of one model cost, in GMACs (billions of multiply-adds) an image.

    Args:
        adapter, model: the backbone.
        selectors: one a stage.
        squeeze: tokens that leave are merged into others.

    Raises:
        ValueError: if the model takes images of any size.
    """

    def __init__(
        self,
        adapter: Adapter,
        model: Backbone,
        selectors: Sequence[Selector],
        squeeze: bool = False,
    ) -> None:
        num_patches = adapter.num_patches(model)
        if num_patches is None:
            raise ValueError(
                "gmacs and align need a model of a fixed input size, got a "
                f"{type(model).__name__} of any size"
            )
        self.adapter, self.model, self.selectors = adapter, model, selectors
        self.num_patches, self.squeeze = num_patches, squeeze
        self.per_token, self.per_pair = adapter.block_macs(model)
        size = (model.in_chans, *model.patch_embed.img_size)
        self.embed = count_gmacs(copy.deepcopy(model.patch_embed).to("meta"), size)

    def cost(self, schedule: KeepSchedule) -> float:
        """GMACs of an image.

        Raises:
            TypeError: if `schedule` is not a KeepSchedule.
        """
        if not isinstance(schedule, KeepSchedule):
            raise TypeError(f"schedule must be a KeepSchedule, got {schedule!r}")
        counts = schedule.counts(self.num_patches)
        present = (self.num_patches, *counts)
        edges = (0, *schedule.blocks, self.adapter.depth(self.model))
        prefix = self.model.num_prefix_tokens
        macs = self.adapter.head_macs(self.model, present[-1] + prefix)
        for (start, end), count in zip(pairwise(edges), present, strict=True):
            tokens = count + prefix
            macs += (end - start) * (self.per_token * tokens + self.per_pair * tokens**2)
        for selector, before, after in zip(self.selectors, present, counts, strict=False):
            if after < before:  # a stage that keeps all asks no selector
                macs += selector.macs(self.model, before)
                if self.squeeze:  # each token that leaves meets each that stays, twice
                    macs += 2 * (before - after) * after * self.model.embed_dim
        return self.embed + macs / 1e9

    def within(self, gmacs: float, schedule: KeepSchedule) -> KeepSchedule:
        """The same stages, each with the largest keep ratio with which all cost at most `gmacs`.

        Raises:
            TypeError, ValueError: if `gmacs` is not a number, or not one that the stages can reach.
        """
        if not isinstance(gmacs, Real) or isinstance(gmacs, bool):
            raise TypeError(f"gmacs must be a number, got {gmacs!r}")
        # The least ratio is the one with which the last stage keeps one token.
        low = math.ceil(_STEPS * self.num_patches ** (-1 / len(schedule.blocks)))
        high = _STEPS
        least, most = (self.cost(schedule.with_keep_ratio(end / _STEPS)) for end in (low, high))
        if not least <= gmacs <= 1.005 * most:  # the dense model's figure may have been rounded up
            raise ValueError(
                f"gmacs must lie between {least:.3g} (one token is left) and {most:.3g} (all stay),"
                f" got {gmacs}"
            )
        if gmacs >= most:  # cheaper than a ratio just below 1, where selectors are asked
            return schedule.with_keep_ratio(1.0)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.cost(schedule.with_keep_ratio(middle / _STEPS)) <= gmacs
            low, high = (middle, high) if fits else (low, middle - 1)
        return schedule.with_keep_ratio(low / _STEPS)

    def aligned(self, schedule: KeepSchedule, multiple: int) -> KeepSchedule:
        """The nearest schedule whose tensors hold a multiple of `multiple` tokens.

        Matrix engines work on tiles: 144 tokens may take no longer than 138. Each stage's count,
        prefix tokens included, is rounded up or down: to the nearest, as far as the cost stays
        within 2%. A stage that keeps all tokens goes on doing so.

        Raises:
            TypeError, ValueError: if `multiple` is not an integer of 1 or more, or is so large that
                the cost would change by more than 2%.
        """
        if not isinstance(multiple, Integral) or isinstance(multiple, bool):
            raise TypeError(f"align must be an integer, got {multiple!r}")
        if multiple < 1:
            raise ValueError(f"align must be 1 or more, got {multiple}")
        counts = schedule.counts(self.num_patches)
        prefix = self.model.num_prefix_tokens
        choices = []
        for count in counts:
            down = (count + prefix) // multiple * multiple - prefix
            up = -(-(count + prefix) // multiple) * multiple - prefix
            fitting = {rounded for rounded in (down, up) if 1 <= rounded <= self.num_patches}
            choices.append({count} if count == self.num_patches else fitting)

        def change(rounded: KeepSchedule) -> int:
            pairs = zip(rounded.counts(self.num_patches), counts, strict=True)
            return sum(abs(after - before) for after, before in pairs)

        asked = self.cost(schedule)
        possible = [
            KeepSchedule(schedule.blocks, tuple(count / self.num_patches for count in rounded))
            for rounded in product(*choices)
            if all(before >= after for before, after in pairwise(rounded))
        ]
        possible = [found for found in possible if abs(self.cost(found) - asked) <= 0.02 * asked]
        if not possible:
            raise ValueError(
                f"align must leave the cost within 2%, which no rounding of {counts} tokens and "
                f"{prefix} prefix tokens does, got {multiple}"
            )
        return min(possible, key=change)
