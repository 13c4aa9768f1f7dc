"""What evaluate, search and compare begin with: device, models, images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from rich.console import Console
from timm.data import resolve_input_data_config
from torch import nn
from torch.utils.data import DataLoader

from dynamicvit.core.backbones import Backbone
from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.class_names import check_classes, warn_of_names
from dynamicvit.evaluation.console import plain, track
from dynamicvit.evaluation.data import ImageData, open_data
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.launch import start_processes
from dynamicvit.evaluation.loader import create_image_loader
from dynamicvit.io.load import at_budget, load_model

_MOST_WORKERS = 1024  # a typing error must not start processes until the memory is full


@contextmanager
def seeded(accelerator: Accelerator) -> Iterator[None]:
    """Inside, random selection draws the same numbers each time. The generators are restored."""
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
    known = cast(Any, model).pretrained_cfg.get("label_names") or ()
    # In the model's order, whatever order the names of folders have. Some may have no image.
    names = images.class_names
    if names is not None and list(known) != names and set(names) <= set(known):
        images = open_data(data, split, class_names=known, **options)
    check_classes(images.class_names, model, model_name)
    console = Console(stderr=True, quiet=not accelerator.is_main_process)
    warn_of_names(images.class_names, model, model_name, console)
    config = resolve_input_data_config(model)
    loader = create_image_loader(
        images,
        batch_size,
        config if crop_pct is None else config | {"crop_pct": crop_pct},
        training=False,
        workers=workers,
        device=accelerator.device,
    )
    return images, accelerator.prepare(loader)


def load_pair(
    model: str, dense: str | None = None, keep_ratio: float | None = None
) -> tuple[SparseViT, nn.Module]:
    """A sparse model, and the dense one that it is compared with.

    Args:
        model: model folder or hub id of a sparse model.
        dense: that of a dense model, or a timm name. By default the sparse model's own backbone,
            all tokens present.
        keep_ratio: share of tokens that each stage keeps; by default the model's own.

    Raises:
        ValueError, FileNotFoundError: if there is no such model, it is not sparse (dense), or the
            two do not take the same images or do not have the same classes.
    """
    sparse = load_model(model)
    if not isinstance(sparse, SparseViT):
        raise ValueError(f"model must be sparse, got the dense model {model}")
    sparse = at_budget(sparse, model, keep_ratio)
    if dense is None:
        return sparse, cast(nn.Module, sparse.backbone)
    other = load_model(dense)
    if isinstance(other, SparseViT):
        raise ValueError(f"dense must be a dense model, got the sparse model {dense}")
    configs = [resolve_input_data_config(item) for item in (sparse, other)]
    for key in ("input_size", "mean", "std"):
        ours, theirs = (config[key] for config in configs)
        if tuple(ours) != tuple(theirs):
            raise ValueError(f"dense must have the {key} of {model}, {ours}, got {theirs}")
    if sparse.num_classes != other.num_classes:
        raise ValueError(
            f"dense must have the {sparse.num_classes} classes of {model}, got {other.num_classes}"
        )
    ours, theirs = (cast(Any, item).pretrained_cfg.get("label_names") for item in (sparse, other))
    if ours and theirs and list(ours) != list(theirs) and sorted(ours) == sorted(theirs):
        raise ValueError(f"dense must have its classes in the order {ours}, got {theirs}")
    return sparse, other


def check_loading(batch_size: int, workers: int, crop_pct: float | None) -> None:
    """Raise ValueError, which names the argument, unless images can be loaded so."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if not 0 <= workers <= _MOST_WORKERS:
        raise ValueError(f"workers must be from 0 to {_MOST_WORKERS}, got {workers}")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must lie in (0, 1], got {crop_pct}")


def backbone_of(model: nn.Module) -> Backbone:
    """The timm model inside a SparseViT, or the model itself."""
    return cast(Backbone, model.backbone if isinstance(model, SparseViT) else model)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a model is evaluated at."""
    channels, height, width = resolve_input_data_config(model)["input_size"]
    return channels, height, width


def token_counts(model: nn.Module) -> tuple[int, ...]:
    """Patch tokens present at the start and after each stage; none for a model without patches."""
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if patches is None:
        return ()
    return (patches, *(model.schedule.counts(patches) if isinstance(model, SparseViT) else ()))


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
        Random selection draws the same each time. Then the images skipped are counted."""
        images, loader = open_images(model, name, self.accelerator, *self._options)
        with seeded(self.accelerator):
            yield images, track(loader, what, quiet or not self.main, "batches")
        print_unreadable(images, what, quiet or not self.main)

    def describe(self, images: ImageData) -> dict[str, Any]:
        """What stands beside figures of these images, in a JSON file."""
        return {**self._settings, "environment": environment(), **count_unreadable(images)}


def count_unreadable(images: ImageData) -> dict[str, int]:
    """How many images could not be read, where such are skipped."""
    return {} if images.unreadable is None else {"unreadable": images.unreadable}


def print_unreadable(images: ImageData, what: str, quiet: bool) -> None:
    """Say on stderr how many images could not be read, and which, if there are any. To be called in
    all processes together.

    Args:
        images: data of which some were read.
        what: for what they were read, such as "evaluating run/best".
        quiet: print nothing.
    """
    found = images.describe_unreadable()
    if found not in (None, "0") and not quiet:
        line = f"{plain(what)}: unreadable images: {found}"
        Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)
