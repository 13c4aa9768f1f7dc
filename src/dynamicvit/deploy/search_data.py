"""The command `dynamicvit search`: `search` on images of a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from dynamicvit.core.model import SparseViT
from dynamicvit.deploy.candidates import READ, pick_indices
from dynamicvit.deploy.search import check_measurement, search
from dynamicvit.deploy.search_result import Search, check_constraint
from dynamicvit.evaluation.console import plain, track
from dynamicvit.evaluation.data import ImageData, check_labels
from dynamicvit.evaluation.launch import start_processes
from dynamicvit.evaluation.setup import (
    check_loading,
    count_unreadable,
    load_pair,
    open_images,
    print_unreadable,
)
from dynamicvit.io.arguments import check_types
from dynamicvit.io.files import check_file, check_folder
from dynamicvit.io.load import check_backbone, load_model


@check_types
def search_data(
    model: str,
    /,
    data: str,
    data_dir: str | None = None,
    split: str = "val",
    images: int = 2000,
    max_loss: float | None = None,
    min_agreement: float | None = None,
    sure: bool = False,
    objective: str = "latency",
    engine: str = "eager",
    precision: str = "float32",
    batch_size: int = 1,
    seconds: float = 10.0,
    dense: str | None = None,
    keep_ratios: list[float] | None = None,
    blocks: list[list[int]] | None = None,
    ratios: list[list[float]] | None = None,
    workers: int = 2,
    crop_pct: float | None = None,
    skip_unreadable: bool = False,
    output: str | None = None,
    save: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Find the fastest form of a model within a limit on lost accuracy or changed answers.

    This is the command `dynamicvit search`. In Python, `dynamicvit.search` takes tensors.

    Args:
        model: model folder, hub id or timm name, of a sparse model or a dense one. Nothing is
            trained. A sparse model is tried at other budgets. A dense one is tried with selectors
            that need no training.
        data: image folder with split sub-folders, or a timm data set name such as torch/cifar10.
        data_dir: where a named data set lies.
        split: which split to use; one that was not used for training or for choosing. Another name
            than "train" and "val" is taken as it is.
        images: how many images of the split, spread evenly over it. They are held in memory.
        max_loss: percentage points of top-1 that may be lost; by default 0.5, unless min_agreement
            is given.
        min_agreement: share of the images that must have the dense model's answer.
        sure: accept a form only if the upper end of its 95% interval is within max_loss.
        objective: latency (the fastest is recommended) or gmacs (the cheapest; nothing is timed).
        engine: what to time in: eager, packed, compile, onnx or openvino.
        precision: what to time in: float32, bfloat16 or float16. Accuracy is measured in float32.
        batch_size: images a call that is timed.
        seconds: spent on timing, at least.
        dense: the dense model to compare a sparse one with: model folder, hub id or timm name. By
            default its own backbone with all tokens, which after fine-tuning is not the dense model
            that it came from.
        keep_ratios: for a sparse model: shares of the tokens that each stage keeps; by default 0.9,
            0.8, 0.7, 0.6 and 0.5, unless ratios are given.
        blocks: for a sparse model: where tokens leave, each a list of blocks, with each of the
            ratios: some of the blocks that the model prunes before, or as many others. By default
            its own.
        ratios: for a sparse model: shares of the original tokens kept after each stage, each a
            list, one a stage.
        workers: data loading processes.
        crop_pct: the share of the image's side that is kept; by default the model's own.
        skip_unreadable: leave out and count images that cannot be read, instead of stopping.
        output: JSON file to write.
        save: folder to write the recommended model to, ready for use. It must not be the
            folder of model or dense.
        device: such as cpu or cuda:1; by default a GPU if there is one.
        quiet: print nothing, neither tables nor progress.

    Returns:
        What the JSON file holds: dense, points, and the recommended one, or None.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an option, the model or the data,
            or if there is nothing to save.
    """
    if output:
        check_file("output", output)
    if save:
        _check_save(save, model, dense)
    check_loading(batch_size, workers, crop_pct)
    if images < 4:
        raise ValueError(f"images must be 4 or more, got {images}")
    check_constraint(max_loss, min_agreement, sure, True)
    accelerator = start_processes("float32", device)
    check_measurement(objective, engine, precision, batch_size, seconds, accelerator.device)
    if accelerator.num_processes > 1:
        raise ValueError(f"search runs in one process, got {accelerator.num_processes}")
    loaded, reference = _load(model, dense, accelerator.device)
    reading = (data, data_dir, split, READ, workers, crop_pct, skip_unreadable)
    found, loader = open_images(loaded, model, accelerator, *reading)
    pixels, labels = _read(found, loader, images, workers, quiet)
    print_unreadable(found, "reading images", quiet)
    check_labels(labels, cast(Any, loaded).num_classes)  # names the data
    result = search(
        loaded,
        pixels,
        labels,
        max_loss=max_loss,
        min_agreement=min_agreement,
        sure=sure,
        objective=objective,
        engine=engine,
        precision=precision,
        batch_size=batch_size,
        seconds=seconds,
        dense=reference,
        keep_ratios=keep_ratios,
        blocks=blocks,
        ratios=ratios,
        quiet=quiet,
    )
    source = {"data": data, "split": split, "crop_pct": crop_pct, **count_unreadable(found)}
    result = replace(
        result,
        dense=result.dense | {"model": dense},
        source={"model": model, **source, **result.source},
    )
    _hand_over(result, output, save, quiet)
    return result.as_dict()


def _hand_over(result: Search, output: str | None, save: str | None, quiet: bool) -> None:
    """Write and print what was found."""
    if output:
        result.to_json(output)
    if not quiet:
        print(result)
        if output:
            print(f"the results are in {plain(output)}")
    if save:
        result.save(save)
        if not quiet:
            print(f"the recommended model is in {plain(save)}")


def _check_save(save: str, model: str, dense: str | None) -> None:
    """Raise ValueError if the folder cannot be made, or is one that is read."""
    check_folder("save", save)
    for name, read in (("model", model), ("dense", dense)):
        if read and Path(read).exists() and Path(read).resolve() == Path(save).resolve():
            raise ValueError(f"save must not be the folder of {name}, got {save}")


def _load(
    model: str, dense: str | None, device: torch.device
) -> tuple[nn.Module, nn.Module | None]:
    """The model to search, and the one that a sparse model is compared with; on the device."""
    check_backbone(model)
    loaded = load_model(model)
    reference = None
    if isinstance(loaded, SparseViT):
        loaded, reference = load_pair(model, dense)
        reference.to(device)
    elif dense is not None:
        raise ValueError(f"dense goes with a sparse model, got {dense} with the dense {model}")
    return loaded.to(device), reference


def _read(
    images: ImageData, loader: DataLoader, most: int, workers: int, quiet: bool
) -> tuple[Tensor, Tensor]:
    """So many images of a split, spread evenly; of a stream, its first."""
    if not isinstance(images.dataset, IterableDataset):
        chosen = pick_indices(len(images.dataset), most)
        loader = DataLoader(Subset(images.dataset, chosen.tolist()), READ, num_workers=workers)
    pixels, labels = [], []
    for batch, targets in track(loader, "reading images", quiet, "batches"):
        pixels.append(batch[targets >= 0])  # -1: could not be read
        labels.append(targets[targets >= 0])
        if sum(map(len, labels)) >= most:
            break
    return torch.cat(pixels)[:most], torch.cat(labels)[:most]
