"""The images and the dense model that the package carries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

ASSETS = Path(__file__).parent.parent / "assets"
SHEET_COLUMNS = 20  # tiles a row in the contact sheets of ASSETS / "images"
TILE = 28


def embedded_images(split: str) -> Iterator[tuple[str, int, Image.Image]]:
    """Class name, number within the class and 28 px grey picture of each embedded image.

    Args:
        split: "train" or "val".
    """
    for path in sorted((ASSETS / "images" / split).glob("*.png")):
        with Image.open(path) as sheet:
            for index in range(sheet.height // TILE * SHEET_COLUMNS):
                row, column = divmod(index, SHEET_COLUMNS)
                box = (column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE)
                yield path.stem, index, sheet.crop(box)
