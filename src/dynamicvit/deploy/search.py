"""search(): the fastest or cheapest form of a model within a limit on changed answers.

`dynamicvit.deploy.search_data` is the command.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynamicvit.core.backbones import adapter_of
from dynamicvit.core.macs import count_gmacs, in_eval_mode
from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.deploy.candidates import (
    KEEP_RATIOS,
    calibrate_some,
    choose_rules,
    count_tokens,
    list_schedules,
    name_schedule,
    per_image_points,
    pick_indices,
    run_logits,
    share_of,
    split_batches,
)
from dynamicvit.deploy.engines import ENGINES, build, check_engine
from dynamicvit.deploy.search_result import Point, Search, build_form, check_constraint, is_near
from dynamicvit.evaluation.accuracy import compare_answers
from dynamicvit.evaluation.console import track
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.setup import backbone_of, input_size
from dynamicvit.evaluation.timing import Engine, Speed, compare_times, medians, take_turns
from dynamicvit.io.arguments import check_types

_TIMED = 16  # images a round of timing, at least


@check_types
@torch.no_grad()
def search(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    labels: Tensor | Sequence[int] | None = None,
    *,
    max_loss: float | None = None,
    min_agreement: float | None = None,
    sure: bool = False,
    objective: str = "latency",
    engine: str = "eager",
    precision: str = "float32",
    batch_size: int = 1,
    seconds: float = 10.0,
    dense: nn.Module | None = None,
    keep_ratios: list[float] | None = None,
    blocks: list[list[int]] | None = None,
    ratios: list[list[float]] | None = None,
    quiet: bool = False,
) -> Search:
    """Find the fastest form of a model in Python, within a limit on lost or changed answers.

    The command `dynamicvit search` does the same for a data set. Nothing is trained.

    For a sparse model, other budgets with the same weights are tried; also a budget for each image,
    if its scorers tell images apart. For a dense model, selectors that need no training are tried:
    in three stages, in every block from the second on, and in stages whose ratios are refined. Some
    of the images choose the candidates, and the others judge them.

    Ctrl-C ends the refinement, and then the timing. The results so far are kept.

    Args:
        model: a SparseViT, or a dense timm model.
        images: [M, C, H, W] as the model takes them, or batches of such. With more than 1,000, a
            difference of one point is significant.
        labels: [M] class indices. Without them, answers are compared with the dense model's.
        max_loss: percentage points of top-1 that may be lost, with labels. By default 0.5.
        min_agreement: share of the images that must have the dense model's answer, instead. By
            default 0.99 where there are no labels.
        sure: accept a form only if the upper end of its 95% interval is within max_loss.
        objective: "latency" times those on or near the frontier in turn, and recommends the
            fastest. "gmacs" times nothing, and recommends the cheapest.
        engine, precision: what to time in, as in `dynamicvit.deploy.engines`.
        batch_size: images a call that is timed.
        seconds: spent on timing, at least; at least 7 rounds are run.
        dense: what a sparse model is compared with. By default its own backbone with all tokens.
        keep_ratios: for a sparse model: shares of the tokens that each stage keeps. By default 0.9,
            0.8, 0.7, 0.6 and 0.5, unless ratios are given.
        blocks: for a sparse model: where tokens leave, each a list of blocks, with each of the
            ratios: some of the blocks that the model prunes before, or as many others.
        ratios: for a sparse model: shares of the original tokens kept after each stage, each a
            list, one a stage.
        quiet: show no progress.

    Raises:
        UnsupportedBackbone: if a dense model is not understood.
        TypeError, ValueError: naming the argument and what was got.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a SparseViT or a timm model, got {type(model).__name__}")
    constraint = check_constraint(max_loss, min_agreement, sure, labels is not None)
    device = next(model.parameters()).device
    check_measurement(objective, engine, precision, batch_size, seconds, device)
    reference = model
    if isinstance(model, SparseViT):
        model = model.at(schedule=model.schedule)  # the caller's model is not calibrated
        schedules = list_schedules(model, keep_ratios, blocks, ratios)
        reference = cast(nn.Module, model.backbone)
        if dense is not None:
            _check_dense(dense, model)
            reference = dense
    else:
        given = {"dense": dense, "keep_ratios": keep_ratios, "blocks": blocks, "ratios": ratios}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} goes with a sparse model, got it with a dense one")
    adapter = adapter_of(backbone_of(model))  # refuses what is not understood
    pixels, targets = _check_images(images, labels, cast(Any, reference).num_classes)
    adapter.check_images(backbone_of(model), pixels[:1].to(device))
    # Random selection draws the same each time.
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        in_eval_mode(model),
        in_eval_mode(reference),
    ):
        torch.manual_seed(0)
        if isinstance(model, SparseViT):
            points, choosing = _list_budgets(model, schedules, keep_ratios, pixels, engine)
        else:
            points, choosing = _list_rules(model, constraint, pixels, engine, quiet)
        judging = torch.ones(len(pixels), dtype=torch.bool).index_fill(0, choosing, False)
        pixels, targets = pixels[judging], None if targets is None else targets[judging]
        top1, points = _judge(model, reference, points, pixels, targets, quiet)
        if objective == "latency":
            near = [point for point in points if point.own or is_near(point, points)]
            models = [reference, *(build_form(model, point) for point in near)]
            speeds = _time(models, pixels, engine, precision, batch_size, seconds, quiet)
            for point, speed in zip(near, speeds, strict=True):
                points[points.index(point)] = replace(point, speed=speed)
        gmacs = count_gmacs(reference, input_size(reference))
    return Search(
        points=tuple(points),
        dense={"model": None, "top1": top1, "gmacs": gmacs},
        images=len(pixels),
        chosen_on=len(choosing),
        objective=objective,
        engine=engine,
        precision=precision,
        batch_size=batch_size,
        constraint=constraint,
        source={"environment": environment()},
        model=model,
    )


def check_measurement(
    objective: str,
    engine: str,
    precision: str,
    batch_size: int,
    seconds: float,
    device: torch.device,
) -> None:
    """Raise ValueError, which names the argument, unless this machine can measure so. Arguments as
    for `search`."""
    if objective not in ("latency", "gmacs"):
        raise ValueError(f"objective must be latency or gmacs, got {objective!r}")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    check_engine(engine, precision, device.type)
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be 0 or more, got {seconds}")


def _check_dense(dense: nn.Module, model: SparseViT) -> None:
    """Raise TypeError or ValueError unless the two answer the same question."""
    if not isinstance(dense, nn.Module):
        raise TypeError(f"dense must be a timm model, got {dense!r:.200}")
    if isinstance(dense, SparseViT):
        raise TypeError("dense must be a dense model, got a SparseViT")
    ours, theirs = input_size(model), input_size(dense)
    if ours != theirs:
        raise ValueError(f"dense must have the input size of model, {ours}, got {theirs}")
    classes = getattr(dense, "num_classes", None)
    if classes != model.num_classes:
        raise ValueError(f"dense must have the {model.num_classes} classes of model, got {classes}")


def _check_images(images: Any, labels: Any, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """Images [M, C, H, W] and class indices [M]. Arguments and errors as for `search`."""
    if not isinstance(images, Tensor):
        batches = list(images) if isinstance(images, Iterable) else [images]
        if not all(isinstance(batch, Tensor) for batch in batches):
            raise TypeError(f"images must be a tensor or batches of them, got {images!r:.200}")
        kinds = {(batch.shape[1:], batch.device) for batch in batches}
        if len(kinds) > 1 or any(batch.ndim != 4 for batch in batches):
            got = ", ".join(f"{list(batch.shape)} on {batch.device}" for batch in batches)
            raise ValueError(
                f"images must be batches [B, C, H, W] of one size on one device, got {got:.200}"
            )
        images = torch.cat(batches) if batches else torch.empty(0)
    if images.ndim != 4 or len(images) < 4:
        raise ValueError(
            f"images must have shape [M, C, H, W] with M of 4 or more, got {list(images.shape)}"
        )
    if images.is_meta:
        raise ValueError("images must hold values, got meta tensors")
    if not images.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity")
    if num_classes == 0:
        raise ValueError("model must have classes, got num_classes 0")
    if labels is None:
        return images, None
    try:
        targets = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:  # such as strings, or meta tensors
        raise TypeError(f"labels must be class indices, got {labels!r:.200}") from error
    if targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise TypeError(f"labels must be class indices, got {targets.dtype}")
    if targets.shape != images.shape[:1]:
        raise ValueError(f"labels must be one an image, {len(images)}, got {list(targets.shape)}")
    wrong = targets[(targets < 0) | (targets >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"labels must be class indices from 0 to {num_classes - 1}, got {int(wrong[0])}"
        )
    return images, targets


def _list_budgets(
    model: SparseViT,
    schedules: Sequence[KeepSchedule],
    keep_ratios: list[float] | None,
    pixels: Tensor,
    engine: str,
) -> tuple[list[Point], Tensor]:
    """Budgets of a sparse model to judge, and the indices of the images that served to find them.

    The model is calibrated, unless it has been.
    """
    points = [
        Point(name_schedule(each, schedules), each, own=each == model.schedule)
        for each in schedules
    ]
    choosing = torch.tensor([], dtype=torch.long)
    if engine in ("eager", "packed"):  # the others have one program for all images
        if model.calibration is None:
            choosing = calibrate_some(model, pixels)
        points += per_image_points(model, KEEP_RATIOS if keep_ratios is None else keep_ratios)
    return points, choosing


def _list_rules(
    model: nn.Module, constraint: dict[str, Any], pixels: Tensor, engine: str, quiet: bool
) -> tuple[list[Point], Tensor]:
    """Forms of a dense model to judge, and the indices of the images that chose them."""
    choosing = pick_indices(len(pixels))
    # About every second answer that changes was right.
    limit = 2 * (constraint["max_loss"] or 0) / 100
    if constraint["min_agreement"] is not None:
        limit = 1 - constraint["min_agreement"]
    return choose_rules(model, pixels[choosing], limit, engine, quiet), choosing


def _judge(
    model: nn.Module,
    dense: nn.Module,
    points: Sequence[Point],
    pixels: Tensor,
    labels: Tensor | None,
    quiet: bool,
) -> tuple[float | None, list[Point]]:
    """The dense model's top-1, and the points with what they do on these images, the dearest
    first."""
    answers = run_logits(dense, pixels).argmax(1)
    right = None if labels is None else answers == labels
    judged = []
    for point in track(points, "judging", quiet, "candidates"):
        sparse = build_form(model, point)
        found = run_logits(sparse, pixels).argmax(1)
        tokens, gmacs = _cost(sparse, pixels)
        point = replace(point, tokens=tokens, gmacs=gmacs, agreement=share_of(found == answers))
        if labels is not None and right is not None:
            point = replace(
                point,
                top1=100.0 * share_of(found == labels),
                change=compare_answers(right, found == labels),
            )
        judged.append(point)
    judged = [replace(point, frontier=is_near(point, judged, slack=0.0)) for point in judged]
    top1 = None if right is None else 100.0 * share_of(right)
    return top1, sorted(judged, key=lambda point: -point.gmacs)


def _cost(model: SparseViT, pixels: Tensor) -> tuple[tuple[float, ...], float]:
    """Tokens and GMACs of an image; their means where each image has its own budget."""
    start = count_tokens(model)
    if model.levels is None:
        return (start, *model.schedule.counts(start)), count_gmacs(model, input_size(model))
    kept = [
        torch.stack(model.pruned(batch).keep).sum(2).T for batch in split_batches(model, pixels)
    ]
    counts = torch.cat(kept).cpu()
    budget, blocks = model.budget(), model.schedule.blocks
    each, number = counts.unique(dim=0, return_counts=True)
    costs = [
        budget.cost(KeepSchedule(blocks, tuple(count / start for count in row)))
        for row in each.tolist()
    ]
    mean = sum(map(math.prod, zip(costs, number.tolist(), strict=True))) / len(counts)
    return (float(start), *counts.mean(0).tolist()), mean


def _time(
    models: Sequence[nn.Module],
    pixels: Tensor,
    engine: str,
    precision: str,
    batch_size: int,
    seconds: float,
    quiet: bool,
) -> list[Speed]:
    """The speed of each later model against the first, timed in turn on real images.

    Noise will not do: it would not show what budgets for each image cost.
    """
    count = max(1, _TIMED // batch_size) * batch_size
    device = next(models[0].parameters()).device
    chosen = torch.arange(count) * max(1, len(pixels) // count) % len(pixels)
    batches = pixels[chosen].to(device).split(batch_size)

    def on_all(run: Engine) -> Engine:
        return lambda _: [run(batch) for batch in batches]

    building = track(models, f"building for {engine}", quiet, "models")
    turns = take_turns([on_all(build(each, engine, precision)) for each in building], batches[:1])
    times = [next(turns)]
    rounds = max(7, math.ceil(seconds / sum(times[0]))) - 1
    with suppress(KeyboardInterrupt):  # those that were finished stay
        times += track(islice(turns, rounds), "timing", quiet, "rounds")
    first, *others = medians(times)
    return [
        Speed(batch_size, count / first, count / median, *compare_times(times, 0, index + 1))
        for index, median in enumerate(others)
    ]
