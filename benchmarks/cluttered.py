"""Images with a background: each on a larger canvas, among pieces of other images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dynamicvit.evaluation.data import open_data

CANVAS, SIDE = 40, 28
PIECES, PIECE = 4, 8


def write_cluttered(folder: Path, data: str, data_dir: str | None = None) -> Path:
    """Write an image folder, `folder/{train,val}/CLASS/*.png`, from grey images of 28×28 pixels.

    As in cluttered and translated MNIST (Mnih et al., arXiv 1406.6247), each image is placed at
    random on a black canvas of 40×40 pixels, with four pieces of 8×8 pixels of other images of its
    split. The lighter pixel wins. The same images give the same files. A finished folder is kept.

    Args:
        folder: the folder to write.
        data: as TrainConfig's.
        data_dir: as TrainConfig's.
    """
    if (folder / ".complete").exists():
        return folder
    for number, split in enumerate(("train", "val")):
        images = open_data(data, split, data_dir=data_dir, in_chans=1)
        pictures, labels = zip(
            *(images.dataset[i] for i in range(len(images.dataset))), strict=True
        )
        pixels = np.stack([np.asarray(picture) for picture in pictures])
        names = images.class_names or [str(label) for label in range(max(labels) + 1)]
        # The label comes first, so that sorting by name sorts by label.
        folders = [
            folder / split / f"{label}_{re.sub(r'[^a-z]+', '_', name.lower())}"
            for label, name in enumerate(names)
        ]
        for path in folders:
            path.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(number)
        for index, label in enumerate(labels):
            canvas = clutter(pixels, index, generator)
            Image.fromarray(canvas).save(folders[label] / f"{index:05}.png")
    (folder / ".complete").touch()
    return folder


def clutter(
    pixels: np.ndarray[Any, Any], index: int, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    """A canvas with an image and pieces of others.

    Args:
        pixels: uint8, (images, 28, 28).
        index: of the whole image.
        generator: draws positions and pieces.

    Returns:
        uint8, (40, 40).
    """
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)

    def put(part: np.ndarray[Any, Any]) -> None:
        top, left = generator.integers(CANVAS - len(part) + 1, size=2)
        place = canvas[top : top + len(part), left : left + len(part)]
        np.maximum(place, part, out=place)

    put(pixels[index])
    for _ in range(PIECES):
        other = (index + generator.integers(1, len(pixels))) % len(pixels)
        top, left = generator.integers(SIDE - PIECE + 1, size=2)
        put(pixels[other, top : top + PIECE, left : left + PIECE])
    return canvas
