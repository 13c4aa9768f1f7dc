"""Accuracy, loss, cost and speed of dense and sparse models on a data set."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from timm.data import resolve_input_data_config
from torch import nn
from torch.utils.data import DataLoader

from dynamicvit.checkpoint import load_model
from dynamicvit.core.backbone import Backbone
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT
from dynamicvit.files import write_text
from dynamicvit.training.data import DataError, check_labels, create_image_loader, open_data
from dynamicvit.training.processes import start_processes


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
    for inputs, targets in loader:
        inputs, targets = inputs.to(accelerator.device), targets.to(accelerator.device)
        _wait(accelerator.device)
        start = time.perf_counter()
        with accelerator.autocast():
            logits = model(inputs)
        _wait(accelerator.device)
        seconds += time.perf_counter() - start
        # gather_for_metrics leaves out the images that padded the last batch.
        logits, targets = accelerator.gather_for_metrics((logits.float(), targets))
        check_labels(targets, logits.shape[-1])
        logits, targets = logits[targets >= 0], targets[targets >= 0]  # -1: could not be read
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        hits = best == targets.unsqueeze(-1)
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        images += len(targets)
    model.train(training)
    if images == 0:
        raise DataError("the evaluation data gave no images")
    return Evaluation(
        top1=100.0 * top1 / images,
        top5=100.0 * top5 / images,
        loss=loss / images,
        images=images,
        tokens=token_counts(model),
        gmacs=count_gmacs(model, input_size(model)),
        images_per_second=images / seconds,
    )


def evaluate(
    models: list[str],
    data: str,
    data_dir: str | None = None,
    split: str = "val",
    batch_size: int = 64,
    workers: int = 2,
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
    check_precision(precision)
    accelerator = start_processes(precision)
    results: dict[str, Any] = {}
    for name in models:
        model = load_model(name)
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
        check_classes(images.class_names, model, name)
        loader = accelerator.prepare(
            create_image_loader(
                images,
                batch_size,
                resolve_input_data_config(backbone_of(model)),
                training=False,
                workers=workers,
                device=accelerator.device,
            )
        )
        results[name] = asdict(evaluate_model(model, loader, accelerator))
        if images.unreadable is not None:
            results[name]["unreadable"] = images.unreadable
    if accelerator.is_main_process:
        print_evaluations(results)
        if output:
            write_text(Path(output), json.dumps(results, indent=2) + "\n")
    return results


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
