"""Accuracy, loss, cost and speed of dense and sparse models on a data set."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from timm.data import resolve_input_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynamicvit.core.backbones import Backbone
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.data import (
    DataError,
    ImageData,
    check_labels,
    create_image_loader,
    open_data,
)
from dynamicvit.evaluation.launch import start_processes
from dynamicvit.io.files import check_file, write_text
from dynamicvit.io.load import load_model


@dataclass(frozen=True)
class Evaluation:
    """What one model did on one data set.

    Attributes:
        top1, top5: percent of images whose class is the first, or among the first five (all, where
            there are fewer classes).
        loss: mean cross-entropy.
        images: how many were counted.
        tokens: patch tokens present at the start, then after each stage.
        gmacs: billions of multiply-adds an image.
        images_per_second: of the model alone, data loading left out.
    """

    top1: float
    top5: float
    loss: float
    images: int
    tokens: tuple[int, ...]
    gmacs: float
    images_per_second: float


@torch.no_grad()
def evaluate_model(
    model: nn.Module, loader: DataLoader, accelerator: Accelerator | None = None
) -> Evaluation:
    """Run a model over a loader of normalised images and class indices; its mode is restored.

    Args:
        model: dense or sparse. Moved to the accelerator's device.
        loader: prepared by the accelerator, if several processes share it.
        accelerator: device, precision and processes; by default accelerate's choice of device.

    Raises:
        DataError: if the loader gives no image.
    """
    accelerator = accelerator or Accelerator()
    training = model.training
    model = model.to(accelerator.device).eval()
    top1 = top5 = images = 0
    loss = seconds = 0.0

    def timed(inputs: Tensor) -> tuple[Tensor, ...]:
        nonlocal seconds
        _wait(inputs.device)
        start = time.perf_counter()
        logits = model(inputs)
        _wait(inputs.device)
        seconds += time.perf_counter() - start
        return (logits.float(),)

    try:
        for logits, targets in run_batches(loader, timed, accelerator):
            check_labels(targets, logits.shape[-1])
            best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
            hits = best == targets.unsqueeze(-1)
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            images += len(targets)
    finally:
        model.train(training)
    return Evaluation(
        top1=100.0 * top1 / images,
        top5=100.0 * top5 / images,
        loss=loss / images,
        images=images,
        tokens=token_counts(model),
        gmacs=count_gmacs(model, input_size(model)),
        images_per_second=images / seconds,
    )


def run_batches(
    loader: DataLoader,
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


def evaluate(
    models: list[str],
    data: str,
    data_dir: str | None = None,
    split: str = "val",
    batch_size: int = 64,
    workers: int = 2,
    crop_pct: float | None = None,
    precision: str = "no",
    skip_unreadable: bool = False,
    output: str | None = None,
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
        precision: "no" for float32, or "bf16".
        skip_unreadable: leave out and count images that cannot be read, instead of stopping.
        output: JSON file to write.

    Returns:
        For each model its figures, and the images skipped.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with models or data.
    """
    if not models:
        raise ValueError("models must name at least one model, got none")
    check_loading(batch_size, workers, crop_pct)
    if output:
        check_file("output", output)
    accelerator = start_evaluation(precision)
    results: dict[str, Any] = {}
    for name in models:
        model = load_model(name)
        images, loader = open_images(
            model,
            name,
            accelerator,
            data,
            data_dir,
            split,
            batch_size,
            workers,
            crop_pct,
            skip_unreadable,
        )
        with seeded(accelerator):
            results[name] = asdict(evaluate_model(model, loader, accelerator))
        if images.unreadable is not None:
            results[name]["unreadable"] = images.unreadable
    if accelerator.is_main_process:
        print_evaluations(results)
        if output:
            write_text(Path(output), json.dumps(results, indent=2) + "\n")
    return results


def start_evaluation(precision: str) -> Accelerator:
    """accelerate's Accelerator, for whatever launched this process.

    Raises:
        ValueError: if the precision, or what the launcher asks for, is not supported.
    """
    check_precision(precision)
    return start_processes(precision)


@contextmanager
def seeded(accelerator: Accelerator) -> Iterator[None]:
    """The same random numbers each time, since random selection draws; the generators' states are
    restored."""
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def open_images(
    model: nn.Module,
    model_name: str,
    accelerator: Accelerator,
    data: str,
    data_dir: str | None,
    split: str,
    batch_size: int,
    workers: int,
    crop_pct: float | None,
    skip_unreadable: bool,
) -> tuple[ImageData, DataLoader]:
    """A split as a model takes it: opened, checked against its classes, and a loader of it.

    Arguments and errors as for `evaluate`, which has `check_loading` look at them first.
    """
    options: dict[str, Any] = {
        "data_dir": data_dir,
        "in_chans": input_size(model)[0],
        "skip_unreadable": skip_unreadable,
        "batch_size": batch_size,
    }
    images = open_data(data, split, **options)
    known = cast(Any, backbone_of(model)).pretrained_cfg.get("label_names") or ()
    if images.class_names is not None and set(images.class_names) < set(known):
        images = open_data(data, split, class_names=known, **options)
    check_classes(images.class_names, model, model_name)
    config = resolve_input_data_config(backbone_of(model))
    loader = create_image_loader(
        images,
        batch_size,
        config if crop_pct is None else config | {"crop_pct": crop_pct},
        training=False,
        workers=workers,
        device=accelerator.device,
    )
    return images, accelerator.prepare(loader)


def load_pair(model: str, dense: str | None = None) -> tuple[SparseViT, nn.Module]:
    """A sparse model, and the dense one that it is compared with.

    Args:
        model: model folder or hub id of a sparse model.
        dense: that of a dense model, or a timm name. By default the sparse model's own backbone,
            all tokens present.

    Raises:
        ValueError, FileNotFoundError: if there is no such model, it is not sparse (dense), or the
            two do not take the same images or do not have the same classes.
    """
    sparse = load_model(model)
    if not isinstance(sparse, SparseViT):
        raise ValueError(f"model must be sparse, got the dense model {model}")
    if dense is None:
        return sparse, cast(nn.Module, sparse.backbone)
    other = load_model(dense)
    if isinstance(other, SparseViT):
        raise ValueError(f"dense must be a dense model, got the sparse model {dense}")
    configs = [resolve_input_data_config(backbone_of(item)) for item in (sparse, other)]
    for key in ("input_size", "mean", "std"):
        ours, theirs = (config[key] for config in configs)
        if tuple(ours) != tuple(theirs):
            raise ValueError(f"dense must have the {key} of {model}, {ours}, got {theirs}")
    if sparse.num_classes != other.num_classes:
        raise ValueError(
            f"dense must have the {sparse.num_classes} classes of {model}, got {other.num_classes}"
        )
    ours, theirs = (
        cast(Any, backbone_of(item)).pretrained_cfg.get("label_names") for item in (sparse, other)
    )
    if ours and theirs and list(ours) != list(theirs) and sorted(ours) == sorted(theirs):
        raise ValueError(f"dense must have its classes in the order {ours}, got {theirs}")
    return sparse, other


def print_evaluations(results: dict[str, dict[str, Any]]) -> None:
    """Print a table of evaluations, one row a model."""
    table = Table("model", "top-1 %", "top-5 %", "loss", "tokens", "GMACs", "images/s")
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
            f"{row['loss']:.4f}",
            " → ".join(str(count) for count in row["tokens"]),
            f"{row['gmacs']:.3f}",
            f"{row['images_per_second']:.0f}",
        )
    Console().print(table)


def check_classes(names: Sequence[str] | None, model: nn.Module, model_name: str) -> None:
    """Raise DataError unless the data has as many classes as the model."""
    if names is not None and len(names) != model.num_classes:
        raise DataError(f"the data has {len(names)} classes, {model_name} has {model.num_classes}")


def check_loading(batch_size: int, workers: int, crop_pct: float | None) -> None:
    """Raise ValueError, which names the argument, unless images can be loaded so."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must lie in (0, 1], got {crop_pct}")


def check_precision(precision: str) -> None:
    """Raise ValueError unless precision is one that is supported."""
    if precision not in ("no", "bf16"):
        raise ValueError(f"precision must be 'no' (float32) or 'bf16', got {precision!r}")


def backbone_of(model: nn.Module) -> Backbone:
    """The timm model inside a SparseViT, or the model itself."""
    return cast(Backbone, model.backbone if isinstance(model, SparseViT) else model)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a model is evaluated at."""
    channels, height, width = resolve_input_data_config(backbone_of(model))["input_size"]
    return channels, height, width


def token_counts(model: nn.Module) -> tuple[int, ...]:
    """Patch tokens present at the start and after each stage; none for a model without patches."""
    patches = getattr(getattr(backbone_of(model), "patch_embed", None), "num_patches", None)
    if patches is None:
        return ()
    return (patches, *(model.schedule.counts(patches) if isinstance(model, SparseViT) else ()))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
