"""What a model gets right on a data set, and what another gets right beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from dynamicvit.core.macs import count_gmacs, in_eval_mode
from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.data import check_labels
from dynamicvit.evaluation.setup import input_size, token_counts
from dynamicvit.evaluation.timing import time_call
from dynamicvit.evaluation.unreadable import DataError

POINTS_LOST = (
    "points lost: percentage points of top-1 below dense, negative where pruned is better; in "
    "brackets the 95% confidence interval for other images of this kind"
)


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
    """Run a model over a loader of normalised images and class indices, in eval mode.

    The mode of each module is restored.

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
    model = model.to(accelerator.device)
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

    with in_eval_mode(model):
        for logits, *level, targets in run_batches(loader, timed, accelerator):
            levels += level
            check_labels(targets, logits.shape[-1])
            best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
            top5 += int((best == targets.unsqueeze(-1)).sum())
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            pairs.append(torch.stack([targets, best[:, 0]]).cpu())
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

    Every class has the same weight, whatever its number of images. Classes without images and
    answers are left out.
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

    Only images on which the answers differ in correctness count, so the difference is known better
    than each accuracy. The interval has a width even if no answer changed, and few images make it
    wide.

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
