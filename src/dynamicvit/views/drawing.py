"""What pictures are drawn with: text in Pillow, colours of scores, patches that are gone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PALE_INK = (28, 30, 38), (92, 96, 110)
NEAREST = Image.Resampling.NEAREST

# A patch that is gone: little of the picture is left, under stripes of two greys. They show on dark
# and on bright pictures alike, so that a gone patch is never taken for a dark one.
_LEFT = 0.25
_STRIPES = ((52, 55, 68), (168, 172, 184))
# From low to high scores, from dark to light: it tells in grey too, and to the colour-blind.
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
    faded = _LEFT * pixels + (1 - _LEFT) * stripes
    return np.where(gone[..., None], faded.round().astype(np.uint8), pixels)


def spread(grid: np.ndarray, patch_size: tuple[int, int], size: Sequence[int]) -> np.ndarray:
    """Values a patch, [rows, columns, …] → values a pixel, [H, W, …]. Patches may reach beyond the
    picture, to the right and below, as they do where a model pads."""
    pixels = grid.repeat(patch_size[0], axis=0).repeat(patch_size[1], axis=1)
    return pixels[: size[0], : size[1]]


def heat_colours(share: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1, [n] → colours, [n, 3] uint8."""
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(share, stops, channel) for channel in zip(*_HEAT, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


# Text.


@cache
def _font(size: int, ascii_only: bool) -> Any:
    """Pillow's own font, which knows little but ASCII; for all else one of the system's, if any."""
    if not ascii_only:
        for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf"):
            try:
                # Pillow's other layout, for scripts that join letters, takes 1000 times as long.
                return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)
            except OSError:
                continue
    return ImageFont.load_default(size)


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    colour: tuple[int, int, int] = INK,
) -> None:
    draw.text(at, text, colour, _font(size, _known(text)))


def length(text: str, size: int) -> float:
    return float(_font(size, _known(text)).getlength(text))


def _known(text: str) -> bool:
    return text.replace("…", "").isascii()


def cut(text: str, width: float, size: int) -> str:
    """One line of it that fits."""
    text = " ".join(text.split())
    if length(text, size) <= width:
        return text
    fits = bisect_right(range(len(text)), width, key=lambda end: length(f"{text[:end]}…", size))
    return text[: max(0, fits - 1)].rstrip() + "…"


def wrap(text: str, width: float, size: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and length(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
