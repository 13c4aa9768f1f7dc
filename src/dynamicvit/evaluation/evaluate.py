"""Accuracy, loss, cost and speed of dense and sparse models on a data set."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.console import cell, make_table, plain, track
from dynamicvit.evaluation.data import ImageData, check_labels
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.launch import start_processes
from dynamicvit.evaluation.setup import (
    check_loading,
    input_size,
    names_of_classes,
    open_images,
    seeded,
    token_counts,
)
from dynamicvit.evaluation.timing import time_call
from dynamicvit.evaluation.unreadable import DataError
from dynamicvit.io.arguments import check_types
from dynamicvit.io.files import check_file, write_text
from dynamicvit.io.load import at_budget, is_timm_name, load_model

POINTS_LOST = (
    "points lost: percentage points of top-1 below dense, negative where pruned is better; in "
    "brackets the 95% confidence interval for other images of this kind"
)
_CLASSES_PRINTED = 12  # a larger confusion matrix does not fit into 80 columns
_CLASSES_WRITTEN = 1000  # a larger one makes the file too big


@dataclass(frozen=True)
class Evaluation:
    """What one model did on one data set.

    Attributes:
        top1, top5: percent of images whose class is the first, or among the first five (all, where
            there are fewer classes).
        loss: mean cross-entropy.
        images: how many were counted.
        tokens: patch tokens present at the start, then after each stage.
        gmacs: billions of multiply-adds an image; their mean, where each image has its own budget.
        images_per_second: of the model alone, data loading left out.
        tokens_mean, tokens_std: as `tokens`, mean and standard deviation over the images.
        levels: of a model with a budget for each image, the cheapest first: the tokens of each,
            its images, and what percent of them are classified rightly (None without an image).
    """

    top1: float
    top5: float
    loss: float
    images: int
    tokens: tuple[int, ...]
    gmacs: float
    images_per_second: float
    tokens_mean: tuple[float, ...] = ()
    tokens_std: tuple[float, ...] = ()
    levels: tuple[dict[str, Any], ...] = ()


def evaluate_model(
    model: nn.Module, loader: Iterable[Any], accelerator: Accelerator | None = None
) -> Evaluation:
    """Run a model over a loader of normalised images and class indices; its mode is restored.

    Args:
        model: dense or sparse. Moved to the accelerator's device.
        loader: prepared by the accelerator, if several processes share it.
        accelerator: device, precision and processes; by default accelerate's choice of device.

    Raises:
        DataError: if the loader gives no image.
    """
    return evaluate_answers(model, loader, accelerator)[0]


@torch.no_grad()
def evaluate_answers(
    model: nn.Module, loader: Iterable[Any], accelerator: Accelerator | None = None
) -> tuple[Evaluation, Tensor, Tensor]:
    """`evaluate_model`, and for each image its class and the model's answer: [n] int64 each."""
    accelerator = accelerator or Accelerator()
    training = model.training
    model = model.to(accelerator.device).eval()
    loss = seconds = 0.0
    top5 = 0
    pairs: list[Tensor] = []
    levels: list[Tensor] = []
    each = isinstance(model, SparseViT) and model.levels is not None
    call: Any = model.forward_levels if each else model

    def timed(inputs: Tensor) -> tuple[Tensor, ...]:
        nonlocal seconds
        took, result = time_call(call, inputs)
        seconds += took
        logits, *level = result if each else (result,)
        return (logits.float(), *level)

    try:
        for logits, *level, targets in run_batches(loader, timed, accelerator):
            levels += level
            check_labels(targets, logits.shape[-1])
            best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
            top5 += int((best == targets.unsqueeze(-1)).sum())
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            pairs.append(torch.stack([targets, best[:, 0]]).cpu())
    finally:
        model.train(training)
    targets, answers = torch.cat(pairs, dim=1)
    images = len(targets)
    tokens = token_counts(model)
    kept: dict[str, Any] = {"tokens_mean": tokens, "tokens_std": (0.0,) * len(tokens)}
    if each:
        kept = _by_level(model, torch.cat(levels).cpu(), targets == answers)
    else:
        kept["gmacs"] = count_gmacs(model, input_size(model))
    evaluation = Evaluation(
        top1=100.0 * int((targets == answers).sum()) / images,
        top5=100.0 * top5 / images,
        loss=loss / images,
        images=images,
        tokens=tokens,
        images_per_second=images / seconds,
        **kept,
    )
    return evaluation, targets, answers


def _by_level(model: Any, level: Tensor, right: Tensor) -> dict[str, Any]:
    """What `Evaluation` says of levels, from the level of each image."""
    budget, rows, counts, gmacs = model.budget(), [], [], []
    for number, schedule in enumerate(model.levels.schedules):
        mine = right[level == number]
        counts.append((budget.num_patches, *schedule.counts(budget.num_patches)))
        gmacs.append(budget.cost(schedule))
        top1 = 100.0 * float(mine.float().mean()) if len(mine) else None
        rows.append({"tokens": counts[-1], "images": len(mine), "top1": top1})
    each = torch.tensor(counts, dtype=torch.float64)[level]  # [images, 1 + S]
    return {
        "tokens_mean": tuple(each.mean(0).tolist()),
        "tokens_std": tuple(each.std(0, correction=0).tolist()),
        "gmacs": float(torch.tensor(gmacs, dtype=torch.float64)[level].mean()),
        "levels": tuple(rows),
    }


def count_confusion(targets: Tensor, answers: Tensor, num_classes: int) -> Tensor:
    """[C, C] int64: how many images of each class (row) are taken for each class (column)."""
    pairs = torch.bincount(targets * num_classes + answers, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes)


def macro_f1(targets: Tensor, answers: Tensor, num_classes: int) -> float:
    """The mean over classes of 2 · right / (images of the class + answers of the class), percent.

    Every class counts alike, however few images it has. Classes that neither occur nor are
    answered are left out.
    """
    right = torch.bincount(targets[targets == answers], minlength=num_classes)
    both = sum(torch.bincount(found, minlength=num_classes) for found in (targets, answers))
    there = torch.as_tensor(both) > 0
    return 100.0 * float((2 * right.double() / both)[there].mean())


def run_batches(
    loader: Iterable[Any],
    call: Callable[[Tensor], tuple[Tensor, ...]],
    accelerator: Accelerator,
) -> Iterator[tuple[Tensor, ...]]:
    """What a function gives for each batch of images, of all processes together.

    Args:
        loader: of normalised images and class indices; prepared by the accelerator, if several
            processes share it.
        call: images [B, C, H, W] on the accelerator's device → tensors [B, …].
        accelerator: device, precision and processes.

    Yields:
        The tensors, then the class indices [B]; without images that could not be read.

    Raises:
        DataError: if there is no image.
    """
    images = 0
    for inputs, targets in loader:
        with accelerator.autocast():
            results = call(inputs.to(accelerator.device))
        # gather_for_metrics leaves out the images that padded the last batch.
        *results, targets = accelerator.gather_for_metrics(
            (*results, targets.to(accelerator.device))
        )
        read = targets >= 0  # -1: could not be read
        images += int(read.sum())
        yield (*(result[read] for result in results), targets[read])
    if images == 0:
        raise DataError("the evaluation data gave no images")


@dataclass(frozen=True)
class Change:
    """How often another model is right where one was wrong, and the reverse, on the same images.

    Attributes:
        points_lost: percentage points of top-1 by which the other model is worse.
        interval: where, with 95% confidence, that lies for all images of this kind.
        right_to_wrong, wrong_to_right: images that the one, or the other, alone gets right.
    """

    points_lost: float
    interval: tuple[float, float]
    right_to_wrong: int
    wrong_to_right: int


def compare_answers(one: Tensor, other: Tensor) -> Change:
    """What is gained and lost from one model to another, and how sure that is.

    Images that both get right, or wrong, say nothing about the difference, so it is known better
    than either accuracy. Where no answer changed, the interval still has a width: with few images
    that says little.

    Args:
        one, other: [n] bool, whether each image was classified rightly; n ≥ 1.

    Source of the interval: Bonett and Price, Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data, 2012.
    """
    images = len(one)
    lost, gained = int((one & ~other).sum()), int((other & ~one).sum())
    share_lost, share_gained = (lost + 1) / (images + 2), (gained + 1) / (images + 2)
    middle = share_lost - share_gained
    variance = (share_lost + share_gained - middle**2) / (images + 2)
    half = statistics.NormalDist().inv_cdf(0.975) * math.sqrt(variance)
    return Change(
        points_lost=100.0 * (lost - gained) / images,
        interval=(100.0 * max(-1.0, middle - half), 100.0 * min(1.0, middle + half)),
        right_to_wrong=lost,
        wrong_to_right=gained,
    )


class Source:
    """What evaluate and compare begin with: a device, and images to run models on.

    Arguments and errors as for `evaluate`.
    """

    def __init__(
        self,
        data: str,
        data_dir: str | None,
        split: str,
        batch_size: int,
        workers: int,
        crop_pct: float | None,
        precision: str,
        skip_unreadable: bool,
        device: str | None,
    ) -> None:
        check_loading(batch_size, workers, crop_pct)
        self.accelerator = start_processes(precision, device)
        self.main = self.accelerator.is_main_process
        self._options = (data, data_dir, split, batch_size, workers, crop_pct, skip_unreadable)
        self._settings = {
            "data": data,
            "split": split,
            "crop_pct": crop_pct,  # None: the model's own
            "precision": precision,
        }

    @contextmanager
    def batches(
        self, model: nn.Module, name: str, what: str, quiet: bool
    ) -> Iterator[tuple[ImageData, Iterable[Any]]]:
        """The images, and batches of them as the model takes them. Progress is shown as `what`.
        Random selection draws the same each time."""
        images, loader = open_images(model, name, self.accelerator, *self._options)
        with seeded(self.accelerator):
            yield images, track(loader, what, quiet or not self.main, "batches")

    def describe(self, images: ImageData) -> dict[str, Any]:
        """What stands beside figures of these images, in a JSON file."""
        return {**self._settings, "environment": environment(), **count_unreadable(images)}


def count_unreadable(images: ImageData) -> dict[str, int]:
    """How many images could not be read, where such are skipped."""
    return {} if images.unreadable is None else {"unreadable": images.unreadable}


@check_types
def evaluate(
    models: list[str],
    data: str,
    data_dir: str | None = None,
    split: str = "val",
    batch_size: int = 64,
    workers: int = 2,
    crop_pct: float | None = None,
    precision: str = "float32",
    skip_unreadable: bool = False,
    output: str | None = None,
    weights: str | None = None,
    keep_ratio: float | None = None,
    per_image: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate dense and sparse models on a data set: a table, and JSON.

    Args:
        models: model folders, hub ids or names of pretrained timm models.
        data: image folder with split sub-folders, or a timm data set name such as torch/cifar10.
        data_dir: where a named data set lies.
        split: which split to use.
        batch_size: images a batch.
        workers: data loading processes.
        crop_pct: the share of the image's side that is kept; by default each model's own.
        precision: float32 or bfloat16.
        skip_unreadable: leave out and count images that cannot be read, instead of stopping.
        output: JSON file to write.
        weights: file with a state dict of your own, for the timm names among the models:
            safetensors or torch, also of Lightning.
        keep_ratio: share of tokens that each stage of a sparse model keeps; by default its own.
        per_image: each image its own budget; the mean is that of `keep_ratio`. `dynamicvit
            calibrate` prepares a model for it.
        device: such as cpu or cuda:1; by default a GPU if there is one.
        quiet: print nothing, neither tables nor progress.

    Returns:
        For each model its figures, macro_f1 (percent), classes (their names), confusion (a row a
        class: how many of its images are taken for each class; None for more than 1,000 classes),
        and the images skipped.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with models or data.
    """
    if isinstance(models, str) or not models:
        raise ValueError(f"models must be a list of at least one model, got {models!r}")
    takers = [name for name in models if weights is not None and is_timm_name(name)]
    if weights is not None and not takers:
        raise ValueError(f"weights go with a timm name among the models, got {', '.join(models)}")
    if output:
        check_file("output", output)
    source = Source(
        data, data_dir, split, batch_size, workers, crop_pct, precision, skip_unreadable, device
    )
    results: dict[str, Any] = {}
    for name in models:
        model = load_model(name, weights=weights if name in takers else None)
        model = at_budget(model, name, keep_ratio, per_image)
        with source.batches(model, name, f"evaluating {name}", quiet) as (images, batches):
            evaluation, targets, answers = evaluate_answers(model, batches, source.accelerator)
        results[name] = {
            **asdict(evaluation),
            **_describe_classes(targets, answers, names_of_classes(images, model)),
            **count_unreadable(images),
        }
    if output and source.main:
        write_text(Path(output), _as_json(results))
    if source.main and not quiet:
        print_evaluations(results)
        _print_levels(results)
        _print_confusions(results)
        if output:
            print(f"the results are in {plain(output)}")
    return results


def _describe_classes(targets: Tensor, answers: Tensor, names: list[str]) -> dict[str, Any]:
    count = len(names)
    small = count <= _CLASSES_WRITTEN
    return {
        "macro_f1": macro_f1(targets, answers, count),
        "classes": names,
        "confusion": count_confusion(targets, answers, count).tolist() if small else None,
    }


def _as_json(results: dict[str, Any]) -> str:
    """A confusion matrix has a line a row, not a line a number."""
    rows = re.compile(r"\[\s+([\d\s,]+?)\s+\]")
    text = json.dumps(results, indent=2)
    return rows.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def print_evaluations(results: dict[str, dict[str, Any]]) -> None:
    """Print a table of evaluations, one row a model."""
    titles = {"top1": "top-1 %", "top5": "top-5 %", "macro_f1": "macro F1", "loss": "loss"}
    given = [key for key in titles if all(key in row for row in results.values())]
    table = make_table("model, tokens", *(titles[key] for key in given), "GMACs", "images/s")
    for name, row in results.items():
        tokens = " → ".join(_tokens(row))
        table.add_row(
            cell(name) + (f"\n[dim]{tokens}[/]" if tokens else ""),
            *(f"{row[key]:.{4 if key == 'loss' else 2}f}" for key in given),
            f"{row['gmacs']:#.4g}",
            f"{row['images_per_second']:.0f}",
        )
    Console().print(table)


def _tokens(row: dict[str, Any]) -> list[str]:
    """Tokens at the start and after each stage; where images differ, mean±standard deviation."""
    if not row.get("levels"):
        return list(map(str, row["tokens"]))
    # No spaces: lines break there.
    pairs = zip(row["tokens_mean"], row["tokens_std"], strict=True)
    return [f"{mean:.0f}±{std:.0f}" if std else f"{mean:.0f}" for mean, std in pairs]


def _print_levels(results: dict[str, Any]) -> None:
    for name, found in results.items():
        if not found["levels"]:
            continue
        table = make_table("tokens", "images", "share %", "top-1 %")
        for level in found["levels"]:
            top1 = "" if level["top1"] is None else f"{level['top1']:.2f}"
            share = f"{100 * level['images'] / found['images']:.1f}"
            table.add_row(" → ".join(map(str, level["tokens"])), str(level["images"]), share, top1)
        console = Console()
        console.print(f"{plain(name)}: images by level, the easiest first", markup=False)
        console.print(table)


def _print_confusions(results: dict[str, dict[str, Any]]) -> None:
    console = Console()
    for name, found in results.items():
        if len(found["classes"]) > _CLASSES_PRINTED:
            continue
        table = make_table("class", *map(str, range(1, len(found["classes"]) + 1)))
        for index, label in enumerate(found["classes"]):
            row = list(map(str, found["confusion"][index]))
            row[index] = f"[bold]{row[index]}[/]"  # what is right
            table.add_row(f"{index + 1} {cell(label)}", *row)
        console.print(
            f"{plain(name)}: images of each class (row), by the model's answer (column)",
            markup=False,
        )
        console.print(table)
