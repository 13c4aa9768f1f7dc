"""compare(): where tokens stay over a whole data set, and which answers change."""

from __future__ import annotations

import importlib.util
import io
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.accuracy import POINTS_LOST, compare_answers, run_batches
from dynamicvit.evaluation.class_names import names_of_classes
from dynamicvit.evaluation.console import cell, make_table, plain
from dynamicvit.evaluation.data import check_labels
from dynamicvit.evaluation.setup import Source, input_size, load_pair
from dynamicvit.io.arguments import check_types
from dynamicvit.io.files import check_folder, write_bytes, write_text

JSON, ARRAYS, PICTURE = "compare.json", "keep_maps.npz", "keep_maps.png"
_CLASSES_DRAWN = 10
_CLASSES_PRINTED = 12
_CONFUSIONS_PRINTED = 5


@dataclass(frozen=True)
class Comparison:
    """What a dense and a sparse model did with the same n images, of C classes.

    Attributes:
        targets, dense, sparse: [n] int64, the classes they have, and are taken for by each model.
        kept: [C, S, h, w] int64, images of each class of which each stage (S) keeps a position of
            the grid of patches.
    """

    targets: Tensor
    dense: Tensor
    sparse: Tensor
    kept: Tensor


@check_types
def compare(
    model: str,
    /,
    data: str,
    data_dir: str | None = None,
    split: str = "val",
    dense: str | None = None,
    batch_size: int = 64,
    workers: int = 2,
    crop_pct: float | None = None,
    precision: str = "float32",
    skip_unreadable: bool = False,
    output: str = "compare",
    keep_ratio: float | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare a sparse model with a dense one over a data set: tokens kept, changed answers.

    Needs the extra "plot".

    Args:
        model: model folder or hub id of a sparse model.
        data: image folder with split sub-folders, or a timm data set name such as torch/cifar10.
        data_dir: where a named data set lies.
        split: which split to use.
        dense: the dense model to compare with: model folder, hub id or timm name. By default the
            sparse model's own backbone with all tokens, which after fine-tuning is not the dense
            model that it came from.
        batch_size: images a batch.
        workers: data loading processes.
        crop_pct: the share of the image's side that is kept; by default the model's own.
        precision: float32 or bfloat16.
        skip_unreadable: leave out and count images that cannot be read, instead of stopping.
        output: folder to write: compare.json (agreement, classes, confusion), keep_maps.npz (how
            often each position is kept at each stage, overall and per class; every image's classes)
            and keep_maps.png. Files of these names in it are replaced.
        keep_ratio: share of tokens that each stage keeps; by default the model's own.
        device: such as cpu or cuda:1; by default a GPU if there is one.
        quiet: print nothing, neither tables nor progress.

    Returns:
        What compare.json holds.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an option, the model or the data,
            or if the model merges tokens, so that none is kept.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("compare needs the extra: pip install 'dynamicvit[plot]'")
    check_folder("output", output)
    source = Source(
        data, data_dir, split, batch_size, workers, crop_pct, precision, skip_unreadable, device
    )
    sparse, reference = load_pair(model, dense, keep_ratio)
    with source.batches(sparse, model, "comparing", quiet) as (images, batches):
        comparison = compare_models(sparse, reference, batches, source.accelerator)
    names = names_of_classes(images, sparse)
    result = {
        "model": model,
        "dense": dense,  # None: the sparse model's backbone
        **source.describe(images),
        **describe(comparison, names),
        "gmacs": {
            "dense": count_gmacs(reference, input_size(reference)),
            "sparse": count_gmacs(sparse, input_size(sparse)),
        },
    }
    if source.main:
        folder = Path(output)
        write_bytes(folder / ARRAYS, _arrays(comparison, names))
        write_bytes(folder / PICTURE, draw_keep_rates(comparison, names))
        write_text(folder / JSON, json.dumps(result, indent=2, allow_nan=False) + "\n")
        if not quiet:
            _print(Console(), result, folder)
    return result


@torch.no_grad()
def compare_models(
    model: SparseViT,
    dense: nn.Module,
    loader: Iterable[Any],
    accelerator: Accelerator | None = None,
) -> Comparison:
    """Run both models over a loader of normalised images, all of one size, and class indices.

    Args:
        model, dense: moved to the accelerator's device, in eval mode.
        loader: prepared by the accelerator, if several processes share it.
        accelerator: device, precision and processes; by default accelerate's choice of device.

    Raises:
        ValueError: if the data gives no image, or classes that the model does not have; or if the
            model merges tokens.
    """
    accelerator = accelerator or Accelerator()
    model = model.to(accelerator.device).eval()
    dense = dense.to(accelerator.device).eval()
    grid = (0, 0)

    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        nonlocal grid
        height, width = inputs.shape[-2:]
        grid = model.backbone.patch_embed.dynamic_feat_size((height, width))
        output = model.pruned(inputs)
        if not output.keep:
            raise ValueError(
                f"model must choose tokens, not merge them, got {type(model.scorers[0]).__name__}"
            )
        classes = (dense(inputs).argmax(dim=-1), output.logits.argmax(dim=-1))
        return (*classes, torch.stack(output.keep, dim=1).long())

    answers = []
    kept: Tensor | None = None
    for before, after, keep, targets in run_batches(loader, run, accelerator):
        check_labels(targets, model.num_classes)
        answers.append(torch.stack([targets, before, after]).cpu())
        if kept is None:
            kept = keep.new_zeros(model.num_classes, *keep.shape[1:])
        kept.index_add_(0, targets, keep)
    targets, before, after = torch.cat(answers, dim=1)
    return Comparison(targets, before, after, cast(Tensor, kept).cpu().unflatten(-1, grid))


def describe(comparison: Comparison, names: Sequence[str]) -> dict[str, Any]:
    """How the answers of both models differ, in words that JSON has.

    Args:
        comparison: what `compare_models` gives.
        names: of the classes.

    Returns:
        images; top1 of both models, points_lost with its interval, right_to_wrong, wrong_to_right;
        agreement, the percent of images that both take for the same; classes, those that lose most
        first; confusion, what images that they do not agree on are taken for, and how many each
        model has right, the most frequent first; static_share, for each stage the percent of what
        is kept that lies in the positions kept most often, as many as it keeps: 100 if all images
        keep the same.
    """
    targets, dense, sparse = comparison.targets, comparison.dense, comparison.sparse
    classes = []
    for index, name in enumerate(names):
        mine = targets == index
        if mine.any():
            row = {"name": name, **_compare(targets[mine], dense[mine], sparse[mine])}
            classes.append(row)
    classes.sort(key=lambda row: (-row["points_lost"], row["sparse_top1"]))
    pairs = torch.stack([dense, sparse, targets], dim=1)[dense != sparse].tolist()
    met = Counter((before, after) for before, after, _ in pairs)
    right = Counter((before, after, target) for before, after, target in pairs)
    confusion = [
        {
            "dense": names[before],
            "sparse": names[after],
            "images": count,
            "dense_right": right[before, after, before],
            "sparse_right": right[before, after, after],
        }
        for (before, after), count in sorted(met.items())
    ]
    confusion.sort(key=lambda row: -row["images"])
    rates = comparison.kept.sum(dim=0).flatten(1) / len(targets)  # [S, N]
    kept = [round(float(total)) for total in rates.sum(dim=1)]
    return {
        **_compare(targets, dense, sparse),
        "tokens": [rates.shape[1], *kept],
        "grid": list(comparison.kept.shape[-2:]),
        "static_share": [
            100.0 * float(rate.topk(count).values.sum()) / count
            for rate, count in zip(rates, kept, strict=True)
        ],
        "classes": classes,
        "confusion": confusion,
    }


def _compare(targets: Tensor, dense: Tensor, sparse: Tensor) -> dict[str, Any]:
    images = len(targets)
    return {
        "images": images,
        "dense_top1": 100.0 * int((dense == targets).sum()) / images,
        "sparse_top1": 100.0 * int((sparse == targets).sum()) / images,
        **asdict(compare_answers(dense == targets, sparse == targets)),
        "agreement": 100.0 * int((dense == sparse).sum()) / images,
    }


def _arrays(comparison: Comparison, names: Sequence[str]) -> bytes:
    """An NPZ file; classes without an image have no keep rates but NaN."""
    images = torch.bincount(comparison.targets, minlength=len(names))
    file = io.BytesIO()
    np.savez_compressed(
        file,
        keep=(comparison.kept.sum(dim=0) / images.sum()).numpy(),
        keep_by_class=(comparison.kept / images.view(-1, 1, 1, 1)).numpy(),
        images_by_class=images.numpy(),
        class_names=np.array(names),
        targets=comparison.targets.numpy(),
        dense=comparison.dense.numpy(),
        sparse=comparison.sparse.numpy(),
    )
    return file.getvalue()


def draw_keep_rates(comparison: Comparison, names: Sequence[str]) -> bytes:
    """A PNG: how often each position is kept, a row a stage; of all images, then class by class.

    If there are many classes, those are drawn whose maps after the last stage differ most from the
    map of all images.
    """
    from matplotlib.figure import Figure  # an extra

    images = torch.bincount(comparison.targets, minlength=len(names))
    total = comparison.kept.sum(dim=0) / len(comparison.targets)
    there = images.nonzero().flatten().tolist()
    if len(there) > _CLASSES_DRAWN:
        apart = (comparison.kept[:, -1] / images.view(-1, 1, 1) - total[-1]).abs().mean(dim=(1, 2))
        there = sorted(sorted(there, key=lambda index: -float(apart[index]))[:_CLASSES_DRAWN])
    titles = [f"all {len(comparison.targets)} images", *(names[index] for index in there)]
    maps = [total, *(comparison.kept[index] / images[index] for index in there)]

    stages, rows, columns = total.shape
    longest = 1.25 / max(rows, columns)  # inches of a patch
    size = len(maps) * (columns * longest + 0.12) + 1.9, stages * (rows * longest + 0.12) + 0.8
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(stages, len(maps), squeeze=False)
    for column, (title, rates) in enumerate(zip(titles, maps, strict=True)):
        short = textwrap.shorten(title, 32, placeholder="…")
        grid[0][column].set_title(textwrap.fill(short, 16), fontsize=8)
        for stage in range(stages):
            axes = grid[stage][column]
            drawn = axes.imshow(rates[stage].numpy(), vmin=0.0, vmax=1.0, cmap="viridis")
            axes.set(xticks=[], yticks=[])
    for stage in range(stages):
        count = round(float(total[stage].sum()))
        label = f"stage {stage + 1}\n{count} of {rows * columns}"
        grid[stage][0].set_ylabel(label, fontsize=8)
    bar = figure.colorbar(drawn, ax=grid, shrink=0.8, aspect=30, pad=0.01)
    bar.set_label("share of images that keep the patch", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _print(console: Console, result: dict[str, Any], folder: Path) -> None:
    low, high = result["interval"]
    shares = (f"stage {n} {share:.0f}%" for n, share in enumerate(result["static_share"], 1))
    console.print(
        f"[bold]{result['images']} images. Top-1: dense {result['dense_top1']:.2f}%, pruned "
        f"{result['sparse_top1']:.2f}%. Points lost: {result['points_lost']:.2f}[/] "
        f"(95%: {low:.2f} to {high:.2f})\n"
        f"Both models give the same answer for {result['agreement']:.2f}% of the images. Right to "
        f"wrong: {result['right_to_wrong']}, wrong to right: {result['wrong_to_right']}.\n"
        "A mask that is the same for all images would keep this share of the kept tokens: "
        + ", ".join(shares)
    )
    classes = result["classes"]
    shown = classes if len(classes) <= _CLASSES_PRINTED else classes[: _CLASSES_PRINTED - 2]
    table = make_table("class", "images", "dense %", "pruned %", "points lost (95%)")
    for row in shown:
        low, high = row["interval"]
        table.add_row(
            cell(row["name"]),
            str(row["images"]),
            f"{row['dense_top1']:.1f}",
            f"{row['sparse_top1']:.1f}",
            f"{row['points_lost']:.1f} ({low:.1f} to {high:.1f})",
        )
    console.print(table)
    console.print(POINTS_LOST)
    if len(shown) < len(classes):
        console.print(f"{len(classes) - len(shown)} more classes are in {plain(folder / JSON)}")
    for row in result["confusion"][:_CONFUSIONS_PRINTED]:
        console.print(
            plain(
                "dense says {dense}, pruned says {sparse}, images: {images}; dense is right on "
                "{dense_right}, pruned on {sparse_right}".format(**row)
            ),
            markup=False,
        )
    print(f"all figures, arrays and keep maps are in {plain(folder)}")
