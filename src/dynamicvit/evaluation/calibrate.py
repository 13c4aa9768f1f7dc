"""calibrate(): measure a saved model's levels, so that each image can have its own budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from dynamicvit.core.levels import KEEP_RATIOS, Calibration, check_levels
from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.console import make_table, plain
from dynamicvit.evaluation.setup import Source
from dynamicvit.io.arguments import check_types
from dynamicvit.io.folder import save_calibration
from dynamicvit.io.load import load_model


@check_types
def calibrate(
    model: str,
    /,
    data: str,
    data_dir: str | None = None,
    split: str = "val",
    keep_ratios: list[float] | None = None,
    batch_size: int = 64,
    workers: int = 2,
    crop_pct: float | None = None,
    skip_unreadable: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> Calibration:
    """Prepare a model folder for --per_image: a budget for each image.

    Answers at each level are compared with those of the model that keeps all tokens. Classes of the
    images are not used. The result is written into the folder's config.json.

    Args:
        model: model folder of a sparse model.
        data: image folder with split sub-folders, or a timm data set name such as torch/cifar10.
        data_dir: where a named data set lies.
        split: which split to use. Some hundreds of images are enough.
        keep_ratios: of the levels, growing; by default 0.35, 0.5, 0.7 and 1.
        batch_size: images a batch.
        workers: data loading processes.
        crop_pct: the share of the image's side that is kept; by default the model's own.
        skip_unreadable: leave out images that cannot be read, instead of stopping.
        device: such as cpu or cuda:1; by default a GPU if there is one.
        quiet: print nothing.

    Returns:
        What was measured.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an option, the model or the data.
    """
    levels = check_levels(KEEP_RATIOS if keep_ratios is None else keep_ratios)
    if not Path(model).is_dir():
        raise ValueError(f"model must be a folder, which is written to, got {model}")
    source = Source(
        data, data_dir, split, batch_size, workers, crop_pct, "float32", skip_unreadable, device
    )
    if source.accelerator.num_processes > 1:
        raise ValueError(f"calibrate runs in one process, got {source.accelerator.num_processes}")
    sparse = load_model(model)
    if not isinstance(sparse, SparseViT):
        raise ValueError(f"model must be sparse, got the dense model {model}")
    sparse.to(source.accelerator.device)
    with source.batches(sparse, model, "calibrating", quiet) as (_, batches):
        found = sparse.calibrate(_readable(batches), levels)
    save_calibration(sparse, model)
    if not quiet:
        _print(found)
        print(
            f"the calibration is in {plain(model)}: evaluate it with --keep_ratio and --per_image"
        )
    return found


def _readable(batches: Iterable[Any]) -> Iterator[Tensor]:
    for images, targets in batches:
        there = images[targets >= 0]  # -1: could not be read
        if len(there):
            yield there


def _print(found: Calibration) -> None:
    table = make_table("keep ratio", "divergence, easiest tenth", "all images", "hardest tenth")
    for level, ratio in enumerate(found.keep_ratios):
        losses = [row[level] for row in found.losses]
        tenth = max(1, len(losses) // 10)
        mean = sum(loss * share for loss, share in zip(losses, found.shares, strict=True))
        ends = [sum(part) / tenth for part in (losses[:tenth], losses[-tenth:])]
        table.add_row(f"{ratio:g}", *(f"{max(loss, 0.0):.3f}" for loss in (ends[0], mean, ends[1])))
    Console().print(table)
    print("divergence: mean KL divergence from the answers with all tokens, in nats")
