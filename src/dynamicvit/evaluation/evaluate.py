"""evaluate(): the command, and its tables."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from dynamicvit.evaluation.accuracy import count_confusion, evaluate_answers, macro_f1
from dynamicvit.evaluation.class_names import names_of_classes
from dynamicvit.evaluation.console import cell, make_table, plain
from dynamicvit.evaluation.setup import Source, count_unreadable
from dynamicvit.io.arguments import check_types
from dynamicvit.io.files import check_file, write_text
from dynamicvit.io.load import at_budget, is_timm_name, load_model

_CLASSES_PRINTED = 12  # a larger confusion matrix does not fit into 80 columns
_CLASSES_WRITTEN = 1000  # a larger one makes the file too big


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
