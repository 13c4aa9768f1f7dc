"""What `search` measures: budgets of a sparse model, and rules without training for a dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import permutations
from typing import cast

import torch
from torch import Tensor, nn

from dynamicvit.core.backbones import Backbone, UnsupportedBackbone, adapter_of
from dynamicvit.core.budget import Budget
from dynamicvit.core.levels import KEEP_RATIOS as LEVELS
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.selectors import SELECTORS
from dynamicvit.deploy.engines import TORCH_ENGINES
from dynamicvit.deploy.search_result import Point, build_form, is_near
from dynamicvit.evaluation.console import track
from dynamicvit.evaluation.setup import input_size
from dynamicvit.io.images import pick_evenly

KEEP_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
# For a dense model: the share that each of three stages keeps; and, where some tokens leave before
# every block, the share that reaches the end.
_STAGES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
_ENDS = (0.85, 0.7, 0.5, 0.35, 0.2)
# Selectors that need no training, and whether what leaves is squeezed into what stays.
_RULES = {
    "class_attention": True,
    "class_attention_merging": False,
    "similarity_merging": False,
    "pooling": False,
}
_CHOOSING = 512  # images that choose candidates, at most: fewer than those that judge them
READ = 64  # images a batch, where nothing is timed
_STARTS = 3  # schedules whose stages are refined


def list_schedules(
    model: SparseViT,
    keep_ratios: Sequence[float] | None = None,
    blocks: Sequence[Sequence[int]] | None = None,
    ratios: Sequence[Sequence[float]] | None = None,
) -> list[KeepSchedule]:
    """The model's own schedule, then every combination of blocks and ratios, once each.

    Arguments and errors as for `search`.
    """
    num_tokens = count_tokens(model)
    choices = [model.schedule.blocks] if blocks is None else [tuple(item) for item in blocks]
    for ratio in keep_ratios or ():
        if not 0 < ratio <= 1:
            raise ValueError(f"keep_ratios must lie in (0, 1], got {ratio}")
    if keep_ratios is None:
        stages = max(map(len, choices), default=0)
        usual = KEEP_RATIOS if ratios is None else ()
        # A default ratio that would leave no token is left out. Only a given one is an error.
        keep_ratios = [ratio for ratio in usual if ratio**stages * num_tokens >= 1]
    for shares in ratios or ():
        if all(len(shares) != len(chosen) for chosen in choices):
            raise ValueError(f"ratios must be one a stage for blocks {choices}, got {shares}")
    found = {_key(model.schedule, num_tokens): model.schedule}
    for chosen in choices:
        for shares in (
            *([ratio**stage for stage in range(1, len(chosen) + 1)] for ratio in keep_ratios),
            *(shares for shares in ratios or () if len(shares) == len(chosen)),
        ):
            schedule = KeepSchedule(chosen, tuple(shares))
            model.at(schedule=schedule)  # refuses what does not fit
            found.setdefault(_key(schedule, num_tokens), schedule)
    return list(found.values())


def _key(schedule: KeepSchedule, num_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a schedule does: those of the same key prune alike."""
    return schedule.blocks, schedule.counts(num_tokens)


def count_tokens(model: SparseViT) -> int:
    """Patch tokens of an image."""
    _, height, width = input_size(model)
    rows, columns = model.backbone.patch_embed.dynamic_feat_size((height, width))
    return int(rows * columns)


def name_schedule(schedule: KeepSchedule, others: Sequence[KeepSchedule] = ()) -> str:
    """0.7, or where stages differ 0.9, 0.6, 0.3; with the blocks too, if they tell them apart."""
    ratios = schedule.ratios
    powers = [ratios[0] ** stage for stage in range(1, len(ratios) + 1)]
    shares = ratios[:1] if all(map(math.isclose, ratios, powers)) else ratios
    text = ", ".join(f"{share:.3g}" for share in shares)
    if any(other.blocks != schedule.blocks for other in others):
        text += f" before {', '.join(map(str, schedule.blocks))}"
    return text


def calibrate_some(model: SparseViT, pixels: Tensor) -> Tensor:
    """Calibrate, if the scorers tell images apart. Gives the images that served."""
    used = pick_indices(len(pixels), min(len(pixels) // 4, _CHOOSING))
    stages, tokens = len(model.schedule.blocks), count_tokens(model)
    levels = [ratio for ratio in LEVELS if ratio**stages * tokens >= 1]
    try:
        model.calibrate(split_batches(model, pixels[used]), levels)
    except (TypeError, ValueError):  # such as merging, or images of any size
        return used[:0]
    return used


def per_image_points(model: SparseViT, keep_ratios: Sequence[float]) -> list[Point]:
    """Budgets for each image, as far as the levels of the model's calibration go."""
    found = []
    for ratio in keep_ratios:
        try:
            schedule = model.at(keep_ratio=ratio, per_image=True).schedule
        except ValueError:
            continue
        found.append(Point(f"{ratio:g} per image", schedule, per_image=True))
    return found


def choose_rules(
    model: nn.Module, pixels: Tensor, limit: float, engine: str, quiet: bool
) -> list[Point]:
    """Forms of a dense model that are worth judging: those near the frontier.

    Args:
        limit: share of answers that may change. Forms that change many more are not looked for.
    """
    expected = run_logits(model, pixels)
    dense = count_gmacs(model, input_size(model))
    found: dict[Point, float] = {}

    def measure(point: Point) -> tuple[Point, float] | None:
        """The point with its cost and agreement, and how far its answers are from the dense ones.
        None if it does not fit the model, or saves nothing."""
        try:
            sparse = build_form(model, point)
            gmacs = sparse.budget().cost(point.schedule)
        except (UnsupportedBackbone, ValueError):
            return None
        if gmacs >= dense:
            return None
        logits = run_logits(sparse, pixels)
        agreement = share_of(logits.argmax(1) == expected.argmax(1))
        return replace(point, gmacs=gmacs, agreement=agreement), _distance(logits, expected)

    rules = [
        (rule, spread)
        for rule in _RULES
        if engine in TORCH_ENGINES or not SELECTORS[rule].merges  # merging is not exported
        for spread in (False, True)
    ]
    with suppress(KeyboardInterrupt):
        for rule, spread in track(rules, "choosing", quiet, "families"):
            for point in _family(model, rule, spread):
                measured = measure(point)
                if measured is not None:
                    found[measured[0]] = measured[1]
                    if 1 - measured[0].agreement > max(4 * limit, 0.05):
                        break  # the next ones keep less
        staged = [point for point in found if len(point.schedule.blocks) <= 3]
        staged.sort(key=lambda point: point.gmacs)
        starts = [point for point in staged if 1 - point.agreement <= 2 * limit] or staged[-1:]
        for start in track(starts[:_STARTS], "refining", quiet, "schedules"):
            end, distance = _refine(start, found[start], build_form(model, start).budget(), measure)
            found[end] = distance
    return [point for point in found if is_near(point, list(found))]


def _family(model: nn.Module, rule: str, spread: bool) -> Iterator[Point]:
    """A selector in three stages, or in every block from the second on, the dearest first."""
    depth = adapter_of(model).depth(cast(Backbone, model))
    stages = min(3, depth - 1)
    title = f"{rule} with squeeze" if _RULES[rule] else rule
    if not spread:
        for ratio in _STAGES:
            schedule = KeepSchedule.from_keep_ratio(ratio, depth, stages)
            yield Point(f"{title}, {stages} stages of {ratio:g}", schedule, rule, _RULES[rule])
        return
    for end in _ENDS:
        shares = tuple(1 - (1 - end) * step / (depth - 1) for step in range(1, depth))
        name = f"{title}, every block, {end:g} at the end"
        yield Point(name, KeepSchedule(tuple(range(1, depth)), shares), rule, _RULES[rule])


def _refine(
    point: Point,
    distance: float,
    budget: Budget,
    measure: Callable[[Point], tuple[Point, float] | None],
) -> tuple[Point, float]:
    """Move tokens from one stage to another, as long as answers come nearer to the dense model's
    at no greater cost."""
    title, tokens, allowed = point.name.partition(",")[0], budget.num_patches, point.gmacs
    for step in (max(1, tokens // 10), max(1, tokens // 20)):
        before = None
        while before != point:
            before = point
            for up, down in permutations(range(len(point.schedule.blocks)), 2):
                schedule = _exchange(point.schedule, up, down, step, allowed, budget)
                if schedule is None:
                    continue
                name = f"{title}, stages of {name_schedule(schedule)}"
                found = measure(replace(point, name=name, schedule=schedule))
                if found is not None and found[1] < distance:
                    point, distance = found
    return point, distance


def _exchange(
    schedule: KeepSchedule, up: int, down: int, step: int, allowed: float, budget: Budget
) -> KeepSchedule | None:
    """More tokens in stage `up`, and as few less in stage `down` as the allowed cost takes."""
    tokens = budget.num_patches
    counts = list(schedule.counts(tokens))
    counts[up] += step
    for count in range(counts[down] - 1, 0, -1):
        counts[down] = count
        if tokens >= counts[0] and counts == sorted(counts, reverse=True):
            moved = KeepSchedule(schedule.blocks, tuple(count / tokens for count in counts))
            if budget.cost(moved) <= allowed:
                return moved
    return None


def pick_indices(count: int, most: int | None = None) -> Tensor:
    """Indices of so many of `count` items, spread evenly; by default of those that choose."""
    most = min(count // 2, _CHOOSING) if most is None else most
    return torch.tensor(pick_evenly(range(count), most), dtype=torch.long)


def split_batches(model: nn.Module, pixels: Tensor) -> Iterator[Tensor]:
    """Batches of images on the model's device."""
    device = next(model.parameters()).device
    return (batch.to(device) for batch in pixels.split(READ))


def run_logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """[M, num_classes] on the CPU."""
    return torch.cat([model(batch).float().cpu() for batch in split_batches(model, pixels)])


def _distance(logits: Tensor, expected: Tensor) -> float:
    """Mean KL divergence in nats: a finer measure of agreement than the share of equal answers."""
    target = expected.log_softmax(1)
    return float((target.exp() * (target - logits.log_softmax(1))).sum(1).mean())


def share_of(which: Tensor) -> float:
    """The share of a bool tensor that is true."""
    return int(which.sum()) / len(which)
