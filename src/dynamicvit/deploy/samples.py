"""The images on which an export is compared with PyTorch, or its value ranges are measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynamicvit.io.embedded import embedded_images
from dynamicvit.io.images import IMAGE_SUFFIXES, pick_evenly
from dynamicvit.io.predictions import ImageSource, batches


class Sample(NamedTuple):
    """An image, and the name of the folder that it lies in."""

    source: ImageSource
    folder: str


def pick_samples(folder: str | None, count: int, argument: str = "images") -> list[Sample]:
    """Images from all over a folder and its sub-folders; None means the embedded ones.

    Args:
        folder: where to look.
        count: how many to take; where there are fewer, all.
        argument: what the user calls the folder.

    Raises:
        ValueError: naming the argument, if there is no such folder or no image in it.
    """
    found: list[Sample] = []
    if folder is None:
        found.extend(Sample(picture, name) for name, _, picture in embedded_images("val"))
    elif not Path(folder).is_dir():
        raise ValueError(f"{argument} must be a folder of images, got {folder}")
    else:
        files = sorted(Path(folder).rglob("*"))
        images = (path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
        found.extend(Sample(path, path.parent.name) for path in images)
    if not found:
        raise ValueError(f"{argument} must be a folder of images, got none in {folder}")
    return pick_evenly(found, count)


def find_labels(samples: Sequence[Sample], class_names: Sequence[str]) -> Tensor | None:
    """The class index of each image, by its folder's name: [images]; or None.

    The folders must have names of classes or, as many as there are classes, of ImageNet's synsets.
    """
    folders = sorted({sample.folder for sample in samples})
    if set(folders) <= set(class_names):
        return torch.tensor([class_names.index(sample.folder) for sample in samples])
    synsets = all(re.fullmatch(r"n\d{8}", name) for name in folders)
    if synsets and len(folders) == len(class_names):
        return torch.tensor([folders.index(sample.folder) for sample in samples])
    return None


def load_samples(model: nn.Module, samples: Sequence[Sample], size: int) -> Iterator[Tensor]:
    """Batches of so many images, [B, C, H, W], prepared as the model's `pretrained_cfg` says.

    Raises:
        ValueError: if the model takes no images, or one cannot be read.
    """
    sources = {f"images[{index}]": sample.source for index, sample in enumerate(samples)}
    return batches(sources, model, size)
