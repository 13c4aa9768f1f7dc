"""Image files: finding them, and opened pictures in the form that a model takes."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

T = TypeVar("T")

# Files of a folder that count as images. timm's own list has PNG and JPEG only, without a warning.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# The shorter side is resized to the model's, so a line of pixels would fill the memory.
MOST_ELONGATED = 1000
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels → Pillow's name of what they are


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """`image.convert(mode)`, with transparent palettes read as Pillow advises, and 16 bits a pixel
    scaled to 8.

    Raises:
        ValueError: if pixels are not of 8 or 16 bits, so that white is not known; or if one side is
            more than `MOST_ELONGATED` times the other.
    """
    width, height = image.size
    if not 0 < max(width, height) <= MOST_ELONGATED * min(width, height):
        raise ValueError(
            f"the longer side must be at most {MOST_ELONGATED} times the shorter, got {width} × "
            f"{height} pixels"
        )
    if image.mode.startswith("I"):  # Pillow's own conversion would cut off, not scale
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError(f"its pixels are of 32 bits (mode {image.mode})")
        image = Image.fromarray((pixels // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating point (mode F)")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def find_images(names: Sequence[str]) -> list[str]:
    """The image files that are meant, in order, each once.

    Args:
        names: files, folders (their images and those of folders in them, as told by
            `IMAGE_SUFFIXES`) and patterns such as "photos/*.jpg".

    Raises:
        TypeError: if `names` is no sequence of strings.
        ValueError: if a folder or a pattern has no image.
        FileNotFoundError: if there is no such file.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"images must be a list of names, got {names!r}")
    found: list[str] = []
    for name in names:
        if os.path.isdir(name):
            files = [
                os.path.join(folder, file) for folder, _, some in os.walk(name) for file in some
            ]
            files = sorted(file for file in files if file.lower().endswith(IMAGE_SUFFIXES))
        elif glob.has_magic(name) and not os.path.exists(name):
            files = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
        elif os.path.lexists(name):
            files = [name]
        else:
            raise FileNotFoundError(f"no image at {name}")
        if not files:
            raise ValueError(f"images must be files, folders or patterns, got none in {name!r}")
        found += files
    return list(dict.fromkeys(found))


def pick_evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly spread."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def why_unreadable(error: Exception) -> str:
    """Why a picture cannot be read, without the name that its reader has for the open file."""
    return "cannot identify image file" if isinstance(error, UnidentifiedImageError) else str(error)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if a path is a pipe, a socket or a device, because reading would wait.

    Raises:
        FileNotFoundError: if there is nothing of this name.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError("it is not a regular file")
