"""sweep(): what each keep ratio costs in accuracy, and which to use."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.evaluation.console import make_table, plain, track
from dynamicvit.evaluation.data import check_labels
from dynamicvit.evaluation.evaluate import (
    POINTS_LOST,
    Change,
    Source,
    compare_answers,
    run_batches,
)
from dynamicvit.evaluation.setup import input_size, load_pair
from dynamicvit.evaluation.timing import Speed, compare_speed
from dynamicvit.io.arguments import check_types
from dynamicvit.io.files import check_file, check_folder, write_text
from dynamicvit.io.folder import save_folder

KEEP_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Point:
    """One schedule of a model, on some images.

    Attributes:
        schedule: where tokens leave and how many stay.
        tokens: patch tokens at the start, then after each stage.
        gmacs: billions of multiply-adds an image.
        top1: percent of images classified rightly.
        change: against the dense model, on the same images.
        trained: whether the model came with this schedule.
        frontier: whether no other schedule is as accurate for less, or better for as much.
        speed: against the dense model, timed in turn; None where it was not timed.
    """

    schedule: KeepSchedule
    tokens: tuple[int, ...]
    gmacs: float
    top1: float
    change: Change
    trained: bool = False
    frontier: bool = False
    speed: Speed | None = None


@check_types
def sweep(
    model: str,
    /,
    data: str,
    data_dir: str | None = None,
    split: str = "val",
    dense: str | None = None,
    keep_ratios: list[float] | None = None,
    blocks: list[list[int]] | None = None,
    ratios: list[list[float]] | None = None,
    max_loss: float | None = None,
    max_gmacs: float | None = None,
    sure: bool = False,
    seconds: float = 0.0,
    batch_size: int = 64,
    workers: int = 2,
    crop_pct: float | None = None,
    precision: str = "float32",
    skip_unreadable: bool = False,
    output: str | None = None,
    save: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Find the keep ratio to use: accuracy and cost of a trained sparse model at several.

    Nothing is trained: the weights stay, the schedule changes. Each accuracy is compared with the
    dense model's on the same images, and how sure the difference is stands beside it.

    Args:
        model: model folder or hub id of a sparse model, trained; its own schedule is always among
            those tried.
        data: image folder with split sub-folders, or a timm data set name such as torch/cifar10.
        data_dir: where a named data set lies.
        split: which split to use; best one that has served for nothing yet. Another name than
            "train" and "val" is taken as it is.
        dense: the dense model to compare with: model folder, hub id or timm name. By default the
            sparse model's own backbone with all tokens, which after fine-tuning is not the dense
            model that it came from.
        keep_ratios: shares of the tokens that each stage keeps; by default 0.9, 0.8, 0.7, 0.6 and
            0.5, unless ratios are given.
        blocks: where tokens leave, each a list of blocks, with each of the ratios: some of the
            blocks that the model prunes before, or as many others. By default its own.
        ratios: shares of the original tokens kept after each stage, each a list, one a stage.
        max_loss: recommend the cheapest schedule that loses at most so many percentage points of
            top-1; by default 0.5, unless max_gmacs is given.
        max_gmacs: recommend the most accurate schedule of at most so many billions of
            multiply-adds an image.
        sure: with max_loss, count a loss as held only if it is so with confidence: if the upper end
            of its 95% interval is within it.
        seconds: spent on timing each schedule against the dense model, in turn, both in PyTorch at
            batch_size; 0 leaves it out.
        batch_size: images a batch.
        workers: data loading processes.
        crop_pct: the share of the image's side that is kept; by default the model's own.
        precision: float32 or bfloat16.
        skip_unreadable: leave out and count images that cannot be read, instead of stopping.
        output: JSON file to write.
        save: folder to write the recommended model to, ready for use.
        device: such as cpu or cuda:1; by default a GPU if there is one.
        quiet: print nothing, neither tables nor progress.

    Returns:
        What the JSON file holds: dense, points (one a schedule), the recommended one, or None.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an option, the model or the data,
            or if there is nothing to save because no schedule is within the budget.
    """
    budget = _budget(max_loss, max_gmacs, sure)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be 0 or more, got {seconds}")
    if output:
        check_file("output", output)
    if save:
        check_folder("save", save)
    source = Source(
        data, data_dir, split, batch_size, workers, crop_pct, precision, skip_unreadable, device
    )
    sparse, reference = load_pair(model, dense)
    schedules = list_schedules(sparse, keep_ratios, blocks, ratios)
    what = f"evaluating {len(schedules)} schedules"
    with source.batches(sparse, model, what, quiet) as (images, batches):
        found = evaluate_schedules(sparse, reference, schedules, batches, source.accelerator)
    count, top1, points = found
    if seconds and source.main:
        points = _time(sparse, reference, points, batch_size, seconds, precision, quiet)
    chosen = choose(points, **budget)
    gmacs = count_gmacs(reference, input_size(reference))
    result = {
        "model": model,
        "images": count,
        **source.describe(images),
        # The model is None for the sparse model's backbone.
        "dense": {"model": dense, "top1": top1, "gmacs": gmacs},
        "budget": budget,
        "recommended": None if chosen is None else asdict(chosen),
        "points": [asdict(point) for point in points],
    }
    if source.main:
        if output:
            write_text(Path(output), json.dumps(result, indent=2) + "\n")
        if save and chosen is not None:
            save_folder(sparse.at(schedule=chosen.schedule), save)
        if not quiet:
            _print(result, points, chosen, output, save)
    if save and chosen is None:
        raise ValueError(f"save needs a schedule within the budget, and none is, got {save!r}")
    return result


def _budget(max_loss: float | None, max_gmacs: float | None, sure: bool) -> dict[str, Any]:
    """What `choose` takes. Arguments and errors as for `sweep`."""
    if max_loss is not None and max_gmacs is not None:
        raise ValueError(f"give max_loss or max_gmacs, not both, got {max_loss} and {max_gmacs}")
    if max_gmacs is None:
        max_loss = 0.5 if max_loss is None else max_loss
        if not 0 <= max_loss < math.inf:
            raise ValueError(f"max_loss must be 0 or more, got {max_loss}")
    elif sure:
        raise ValueError(f"sure goes with max_loss, got it with max_gmacs={max_gmacs}")
    elif not max_gmacs > 0:
        raise ValueError(f"max_gmacs must be above 0, got {max_gmacs}")
    return {"max_loss": max_loss, "max_gmacs": max_gmacs, "sure": sure}


def list_schedules(
    model: SparseViT,
    keep_ratios: Sequence[float] | None = None,
    blocks: Sequence[Sequence[int]] | None = None,
    ratios: Sequence[Sequence[float]] | None = None,
) -> list[KeepSchedule]:
    """The model's own schedule, then every combination of blocks and ratios, once each.

    Arguments and errors as for `sweep`.
    """
    num_tokens = _num_tokens(model)
    places = [model.schedule.blocks] if blocks is None else [tuple(item) for item in blocks]
    for ratio in keep_ratios or ():
        if not 0 < ratio <= 1:
            raise ValueError(f"keep_ratios must lie in (0, 1], got {ratio}")
    if keep_ratios is None:
        stages = max(map(len, places), default=0)
        usual = KEEP_RATIOS if ratios is None else ()
        # Of few tokens a small share is none: not what was asked for, then, so not an error.
        keep_ratios = [ratio for ratio in usual if ratio**stages * num_tokens >= 1]
    for shares in ratios or ():
        if all(len(shares) != len(place) for place in places):
            raise ValueError(f"ratios must be one a stage for blocks {places}, got {shares}")
    found = {_key(model.schedule, num_tokens): model.schedule}
    for place in places:
        for shares in (
            *([ratio**stage for stage in range(1, len(place) + 1)] for ratio in keep_ratios),
            *(shares for shares in ratios or () if len(shares) == len(place)),
        ):
            schedule = KeepSchedule(place, tuple(shares))
            model.at(schedule=schedule)  # refuses what does not fit
            found.setdefault(_key(schedule, num_tokens), schedule)
    return list(found.values())


@torch.no_grad()
def evaluate_schedules(
    model: SparseViT,
    dense: nn.Module,
    schedules: Sequence[KeepSchedule],
    loader: Iterable[Any],
    accelerator: Accelerator | None = None,
) -> tuple[int, float, list[Point]]:
    """Run a dense model and schedules of a sparse one over the same images, read once.

    Args:
        model, dense: moved to the accelerator's device, in eval mode.
        schedules: each as `SparseViT.at` takes it.
        loader: of normalised images and class indices.
        accelerator: device, precision and processes; by default accelerate's choice of device.

    Returns:
        Number of images, the dense model's top-1 in percent, and a point for each schedule,
        dearest first.

    Raises:
        ValueError: if the data gives no image, or classes that the model does not have.
    """
    accelerator = accelerator or Accelerator()
    model = model.to(accelerator.device).eval()
    dense = dense.to(accelerator.device).eval()
    candidates = [dense, *(model.at(schedule=schedule) for schedule in schedules)]

    def classify(inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch.stack([item(inputs).argmax(dim=-1) for item in candidates], dim=1),)

    right = []
    for classes, targets in run_batches(loader, classify, accelerator):
        check_labels(targets, model.num_classes)
        right.append((classes == targets.unsqueeze(1)).cpu())
    first, *others = torch.cat(right).unbind(dim=1)
    num_tokens, size = _num_tokens(model), input_size(model)
    points = [
        Point(
            schedule=schedule,
            tokens=(num_tokens, *schedule.counts(num_tokens)),
            gmacs=count_gmacs(candidate, size),
            top1=_percent(answers),
            change=compare_answers(first, answers),
            trained=schedule == model.schedule,
        )
        for schedule, candidate, answers in zip(schedules, candidates[1:], others, strict=True)
    ]
    points = [replace(point, frontier=_best(point, points)) for point in points]
    return len(first), _percent(first), sorted(points, key=lambda point: -point.gmacs)


def choose(
    points: Sequence[Point],
    max_loss: float | None = None,
    max_gmacs: float | None = None,
    sure: bool = False,
) -> Point | None:
    """The point to use, or None if none is within the budget. Arguments as for `sweep`."""
    if max_gmacs is not None:
        affordable = [point for point in points if point.gmacs <= max_gmacs]
        return max(affordable, key=lambda point: (point.top1, -point.gmacs), default=None)
    if max_loss is None:
        raise ValueError("give max_loss or max_gmacs, got neither")
    holding = [point for point in points if _loss(point, sure) <= max_loss]
    return min(holding, key=lambda point: (point.gmacs, -point.top1), default=None)


def _loss(point: Point, sure: bool) -> float:
    return point.change.interval[1] if sure else point.change.points_lost


def _best(point: Point, points: Sequence[Point]) -> bool:
    """Whether none of the points is better in one respect and as good in the other."""
    return not any(
        other.gmacs <= point.gmacs
        and other.top1 >= point.top1
        and (other.gmacs, other.top1) != (point.gmacs, point.top1)
        for other in points
    )


def _time(
    model: SparseViT,
    dense: nn.Module,
    points: Sequence[Point],
    batch_size: int,
    seconds: float,
    precision: str,
    quiet: bool,
) -> list[Point]:
    fused = model.fuse()
    timed = []
    for point in track(points, "timing", quiet, "schedules"):
        pruned = fused.at(schedule=point.schedule)
        [speed] = compare_speed(dense, pruned, input_size(model), (batch_size,), seconds, precision)
        timed.append(replace(point, speed=speed))
    return timed


def _num_tokens(model: SparseViT) -> int:
    _, height, width = input_size(model)
    rows, columns = model.backbone.patch_embed.dynamic_feat_size((height, width))
    return rows * columns


def _key(schedule: KeepSchedule, num_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a schedule does: those of the same key prune alike."""
    return schedule.blocks, schedule.counts(num_tokens)


def _percent(right: Tensor) -> float:
    return 100.0 * int(right.sum()) / len(right)


def _name(point: Point, points: Sequence[Point]) -> str:
    """0.7, or where stages differ 0.9, 0.6, 0.3; with the blocks too, if they tell points apart."""
    ratios, blocks = point.schedule.ratios, point.schedule.blocks
    powers = [ratios[0] ** stage for stage in range(1, len(ratios) + 1)]
    shares = ratios[:1] if all(map(math.isclose, ratios, powers)) else ratios
    text = ", ".join(f"{share:g}" for share in shares)
    if any(other.schedule.blocks != blocks for other in points):
        text += f" before {', '.join(map(str, blocks))}"
    return text


def _print(
    result: dict[str, Any],
    points: Sequence[Point],
    chosen: Point | None,
    output: str | None,
    save: str | None,
) -> None:
    timed = ["speed-up"] if points[0].speed is not None else []
    table = make_table("keep", "top-1 %", "points lost (95%)", "GMACs", "fewer", *timed)
    for point in points:
        low, high = point.change.interval
        name = _name(point, points) + (" (trained)" if point.trained else "")
        row = [
            ("• " if point.frontier else "  ") + name,
            f"{point.top1:.2f}",
            f"{point.change.points_lost:.2f} ({low:.1f} to {high:.1f})",
            f"{point.gmacs:#.4g}",
            f"{_fewer(point, result):.1f}%",
        ]
        if point.speed is not None:
            row.append(f"{point.speed.speed_up:.2f}×")
        table.add_row(*row, style="bold" if point == chosen else None)
    console = Console()
    console.print(table)
    dense = result["dense"]
    of = "" if dense["model"] else " (the model's own backbone with all tokens; --dense: another)"
    console.print(
        f"dense{of}: top-1 {dense['top1']:.2f}% of {result['images']} images, "
        f"{dense['gmacs']:.4g} GMACs\n{POINTS_LOST}\n"
        "•: no other is as accurate for less\n"
        "trained: the model's own schedule, which is always among those tried"
    )
    console.print(_recommendation(result, points, chosen), style="bold")
    if output:
        print(f"the results are in {plain(output)}")
    if save and chosen is not None:
        print(f"the recommended model is in {plain(save)}")


def _recommendation(result: dict[str, Any], points: Sequence[Point], chosen: Point | None) -> str:
    """In words what to use, and how sure that is."""
    max_loss, max_gmacs, sure = result["budget"].values()
    if max_gmacs is not None:
        goal = f"at most {max_gmacs:g} GMACs"
    else:
        goal = f"at most {max_loss:g} points lost{' with 95% confidence' if sure else ''}"
    if chosen is None:
        return f"none of these is within the budget, {goal}"
    text = (
        f"{goal}: keep {_name(chosen, points)}, {chosen.change.points_lost:.2f} points lost, "
        f"{_fewer(chosen, result):.1f}% fewer GMACs"
    )
    most = chosen.change.interval[1]
    if max_loss is None or sure or most <= max_loss:
        return text
    safe = choose(points, max_loss, sure=True)
    return (
        f"{text}. {result['images']} images are too few to be sure: it may lose {most:.2f}. "
        + ("None of these" if safe is None else f"Keep {_name(safe, points)}")
        + " holds it with 95% confidence (--sure)"
    )


def _fewer(point: Point, result: dict[str, Any]) -> float:
    """Percent of the dense model's multiply-adds that are saved."""
    return 100.0 * (1.0 - point.gmacs / float(result["dense"]["gmacs"]))
