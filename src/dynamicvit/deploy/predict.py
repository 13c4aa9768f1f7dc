"""predict_files(): the command `dynamicvit predict`."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.console import cell, make_table, plain, track
from dynamicvit.evaluation.launch import find_device
from dynamicvit.evaluation.timing import compare_times, interleave
from dynamicvit.io.arguments import check_types
from dynamicvit.io.files import check_file, write_text
from dynamicvit.io.images import find_images
from dynamicvit.io.load import at_budget, load_model
from dynamicvit.io.predictions import (
    Prediction,
    as_predictions,
    check_top_k,
    class_names,
    preprocessing,
    read_image,
    run,
)

_SUFFIXES = (".json", ".jsonl", ".csv")
_BATCH = 32  # images in memory at a time
_TIMED = 8  # images a call, where the dense model is timed beside the sparse one
_SLOWER = 0.95  # of the dense model's speed: what is nearer is noise
_PRINTED = 50  # images in the table


@check_types
def predict_files(
    images: list[str],
    model: str,
    top_k: int = 5,
    output: str | None = None,
    skip_unreadable: bool = False,
    keep_ratio: float | None = None,
    per_image: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Classify image files: a table, and JSON or CSV.

    This is the command `dynamicvit predict`. In Python, `SparseViT.predict` gives objects. At the
    end a sparse model is timed against its dense one, and a line says so if the dense one is
    faster.

    Args:
        images: image files, folders and patterns such as "photos/*.jpg".
        model: model folder, hub id or name of a pretrained timm model.
        top_k: how many classes to give for an image; all, if the model has fewer.
        output: file to write: .json (an object, image → predictions), .jsonl (an object a line) or
            .csv (a row a prediction).
        skip_unreadable: leave out and count images that cannot be read, instead of stopping.
        keep_ratio: share of tokens that each stage of a sparse model keeps; by default its own.
        per_image: each image its own budget; the mean is that of `keep_ratio`. `dynamicvit
            calibrate` prepares a model for it.
        device: such as cpu or cuda:1; by default cpu.
        quiet: print nothing, neither table nor progress.

    Returns:
        For each image its classes with name, index and probability, best first.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an image, the model or an option.
    """
    check_top_k(top_k)
    if output:
        check_file("output", output)
        if Path(output).suffix.lower() not in _SUFFIXES:
            raise ValueError(f"output must end in {', '.join(_SUFFIXES)}, got {output}")
    target = find_device(device or "cpu")
    files = find_images(images)
    loaded = at_budget(load_model(model), model, keep_ratio, per_image).to(target)
    found, unreadable, first = _predict_files(loaded, files, top_k, skip_unreadable, quiet)
    results = {
        name: [asdict(prediction) for prediction in predictions]
        for name, predictions in found.items()
    }
    if output:
        write_text(Path(output), _as_text(results, Path(output).suffix.lower()))
    if not quiet:
        print_predictions(found)
        if unreadable:
            print(f"unreadable images: {len(unreadable)}: {', '.join(map(plain, unreadable))}")
        if isinstance(loaded, SparseViT):
            _warn_of_dense(loaded, first)
        if output:
            print(f"the predictions are in {plain(output)}")
    return results


def _predict_files(
    model: Any, files: list[str], top_k: int, skip_unreadable: bool, quiet: bool
) -> tuple[dict[str, list[Prediction]], list[str], torch.Tensor]:
    """Predictions for each file, the files that cannot be read, and the first batch."""
    names = class_names(model)
    mode, transform = preprocessing(model)
    found: dict[str, list[Prediction]] = {}
    unreadable: list[str] = []
    batch: dict[str, torch.Tensor] = {}
    first = None
    for position, file in enumerate(track(files, "predicting", quiet, "images"), start=1):
        try:
            batch[file] = transform(read_image(file, mode, "image"))
        except (ValueError, FileNotFoundError) as error:
            if not skip_unreadable:
                raise ValueError(f"{error} (skip_unreadable goes on without it)") from error
            unreadable.append(file)
        if batch and (len(batch) == _BATCH or position == len(files)):
            images = torch.stack(list(batch.values()))
            first = images if first is None else first
            logits = run(model, images)
            found |= zip(batch, as_predictions(logits, names, top_k), strict=True)
            batch = {}
    if first is None:
        raise ValueError(f"none of the {len(unreadable)} images can be read: {unreadable[0]}, …")
    return found, unreadable, first


def _warn_of_dense(model: SparseViT, images: torch.Tensor) -> None:
    """Say so, if on this machine the dense model is surely faster on these images."""
    calls = [partial(run, each) for each in (model.backbone, model)]
    images = images[:_TIMED]
    ratio, (_, upper) = compare_times(interleave(calls, [images], seconds=0.5, rounds=3))
    if upper < 1 and ratio < _SLOWER:
        print(f"the dense model is {1 / ratio:.2f} times as fast here, in batches of {len(images)}")
        print("dynamicvit benchmark tells where pruning pays")


def _as_text(results: dict[str, list[dict[str, Any]]], suffix: str) -> str:
    if suffix == ".json":
        return json.dumps(results, indent=2) + "\n"
    if suffix == ".jsonl":
        return "".join(
            json.dumps({"image": image, "predictions": predictions}) + "\n"
            for image, predictions in results.items()
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, ["image", "rank", "name", "index", "probability"])
    writer.writeheader()
    for image, predictions in results.items():
        for rank, prediction in enumerate(predictions, start=1):
            writer.writerow({"image": image, "rank": rank, **prediction})
    return text.getvalue()


def print_predictions(found: dict[str, list[Prediction]]) -> None:
    """Print a table of predictions, one row an image."""
    table = make_table("image")
    table.add_column("class", overflow="fold")
    table.add_column("%", justify="right", no_wrap=True)
    table.add_column("others", overflow="fold")
    for name, (best, *others) in list(found.items())[:_PRINTED]:
        table.add_row(
            cell(name),
            cell(best.name),
            f"{100 * best.probability:.1f}",
            ", ".join(f"{cell(other.name)} {100 * other.probability:.1f}" for other in others),
        )
    console = Console()
    console.print(table)
    if len(found) > _PRINTED:
        console.print(f"{len(found) - _PRINTED} more images: --output writes all")
