"""What pictures are drawn with: text and rows of pictures in Pillow, colours of scores, stripes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PALE_INK, BACKGROUND = (28, 30, 38), (92, 96, 110), (255, 255, 255)
NEAREST = Image.Resampling.NEAREST

# A patch that has left: little of the picture is visible, under stripes of two greys. They show on
# dark and on bright pictures, so that nobody takes a patch that has left for a dark one.
_VISIBLE = 0.25
_STRIPES = ((52, 55, 68), (168, 172, 184))
# From low to high scores, from dark to light: also for the colour-blind, and in grey.
_HEAT = ((38, 18, 84), (49, 84, 150), (30, 146, 146), (104, 199, 96), (250, 230, 60))


def hatch(pixels: np.ndarray, gone: np.ndarray, width: int = 4) -> np.ndarray:
    """Fade and stripe the parts of a picture that are gone.

    Args:
        pixels: [H, W, 3] uint8.
        gone: [H, W] bool.
        width: of a stripe, in pixels along a row.
    """
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    stripes = np.array(_STRIPES)[(x + y) // width % 2]
    faded = _VISIBLE * pixels + (1 - _VISIBLE) * stripes
    return np.where(gone[..., None], faded.round().astype(np.uint8), pixels)


def spread(grid: np.ndarray, patch_size: tuple[int, int], size: Sequence[int]) -> np.ndarray:
    """Values per patch, [rows, columns, …] → values per pixel, [H, W, …]. Where a model pads, the
    last patches reach beyond the picture, and what is beyond is cut off."""
    pixels = grid.repeat(patch_size[0], axis=0).repeat(patch_size[1], axis=1)
    return pixels[: size[0], : size[1]]


def heat_colours(share: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1, [...] → colours, [..., 3] uint8."""
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(share, stops, channel) for channel in zip(*_HEAT, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def stack(
    pictures: Sequence[Image.Image],
    gap: int,
    down: bool = False,
    cell: int = 0,
    transparent: bool = False,
) -> Image.Image:
    """Pictures in a row, or in a column.

    Args:
        pictures: RGB.
        gap: pixels between them.
        down: make a column.
        cell: pixels that each takes at least, along the row or column.
        transparent: between the pictures; else white.
    """
    lengths = [max(cell, picture.size[down]) + gap for picture in pictures]
    whole, across = sum(lengths) - gap, max(picture.size[not down] for picture in pictures)
    size = (across, whole) if down else (whole, across)
    sheet = Image.new("RGBA", size) if transparent else Image.new("RGB", size, BACKGROUND)
    for index, picture in enumerate(pictures):
        start = sum(lengths[:index])
        sheet.paste(picture, (0, start) if down else (start, 0))
    return sheet


def text_block(
    lines: Sequence[str], size: int, width: int | None = None, dark: int | None = None
) -> Image.Image:
    """Lines of text as a picture.

    Args:
        lines: each is cut where it does not fit.
        size: of the font, in pixels.
        width: of the picture; by default what the lines need.
        dark: how many lines are in dark ink, the others in pale; by default all.
    """
    width = text_width(lines, size) if width is None else width
    height = line_height(size)
    block = Image.new("RGB", (width, len(lines) * height), BACKGROUND)
    draw = ImageDraw.Draw(block)
    for row, line in enumerate(lines):
        fits = _cut(line, width, size)
        ink = INK if dark is None or row < dark else PALE_INK
        draw.text((0, row * height), fits, ink, _font(size, _is_ascii(fits)))
    return block


def line_height(size: int) -> int:
    return round(1.35 * size)


def text_width(lines: Sequence[str], size: int) -> int:
    return math.ceil(max(_length(line, size) for line in lines))


def _length(text: str, size: int) -> float:
    return float(_font(size, _is_ascii(text)).getlength(text))


def _cut(text: str, width: float, size: int) -> str:
    text = " ".join(text.split())
    if _length(text, size) <= width:
        return text
    fits = bisect_right(range(len(text)), width, key=lambda end: _length(f"{text[:end]}…", size))
    return text[: max(0, fits - 1)].rstrip() + "…"


def _is_ascii(text: str) -> bool:
    return text.replace("…", "").isascii()


@cache
def _font(size: int, ascii_only: bool) -> Any:
    """Pillow's own font, which has little but ASCII; for other text one of the system's, if any."""
    if not ascii_only:
        for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf"):
            try:
                # Pillow's other layout, for scripts that join letters, takes 1000 times as long.
                return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)
            except OSError:
                continue
    return ImageFont.load_default(size)
