"""Explanations drawn: what stays, stage by stage, why, and what the image is taken for."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from dynamicvit.io.predictions import Prediction
    from dynamicvit.views.explanation import Explanation

_DIMMED = 0.22  # brightness left of a patch that has gone
_TINT = (24, 28, 56)  # and the colour it fades into
_BACKGROUND, _INK, _PALE_INK = (255, 255, 255), (28, 30, 38), (92, 96, 110)
_BAR_GROUND = (236, 238, 243)
_DENSE, _PRUNED = (126, 134, 156), (33, 113, 181)
_GONE = (222, 224, 230)
# From low to high scores, from dark to light: it tells in grey too, and to the colour-blind.
_HEAT = ((38, 18, 84), (49, 84, 150), (30, 146, 146), (104, 199, 96), (250, 230, 60))

_SIDE = 224  # pixels that the shorter side of a picture has, about
_TILE_SIDE = 112  # and of one in a sheet
_MOST = 3  # a small image is enlarged to no more than this many times that length


def draw_explanation(explanation: Explanation) -> Image.Image:
    """Three rows: the input and what each stage keeps; the scores; the predictions."""
    shown = draw_panels(explanation, _SIDE)
    width, height = shown[0].size
    titles = _titles(explanation)
    size = max(13, round(min(width, height) / 17))
    cell = max(width, *(math.ceil(_length(line, size)) for pair in titles for line in pair))
    gap, line = size, round(1.35 * size)
    heat_top = 2 * gap + 2 * line + height
    bar = max(4, size // 2)
    bottom = heat_top + height + bar + 2 * gap + line
    rows = max(len(explanation.dense), len(explanation.pruned))
    sheet = Image.new(
        "RGB",
        (
            gap + len(shown) * (cell + gap),
            bottom + ((rows + 2) * line + rows * line // 4 + gap if rows else 0),
        ),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    for column, (picture, (title, below)) in enumerate(zip(shown, titles, strict=True)):
        left = gap + column * (cell + gap)
        _write(draw, (left, gap // 2), title, size)
        _write(draw, (left, gap // 2 + line), below, size, _PALE_INK)
        sheet.paste(picture, (left, gap + 2 * line))
    _write_legend(draw, (gap, heat_top), cell, size)
    for stage, scores in enumerate(explanation.scores):
        left = gap + (stage + 1) * (cell + gap)
        heat, lowest, highest = heat_map(explanation, stage)
        sheet.paste(Image.fromarray(heat).resize((width, height), _NEAREST), (left, heat_top))
        top = heat_top + height + gap // 2
        ramp = heat_colours(np.linspace(0, 1, width))[None].repeat(bar, axis=0)
        sheet.paste(Image.fromarray(ramp), (left, top))
        threshold = float(scores[explanation.kept[stage]].min())
        span = highest - lowest
        if span > 0 and math.isfinite(threshold):
            x = left + round((threshold - lowest) / span * (width - 1))
            draw.line((x, top - bar // 2, x, top + bar + bar // 2), _INK, max(2, size // 7))
        text = top + bar + gap // 4
        _write(draw, (left, text), f"{lowest:.3g}", size, _PALE_INK)
        right = f"{highest:.3g}"
        _write(draw, (left + width - _length(right, size), text), right, size, _PALE_INK)
    if rows:
        half = (sheet.width - 5 * gap) // 2
        counts = ", ".join(map(str, explanation.counts))
        for left, side, note, found, colour in (
            (gap, "dense", explanation.dense_model, explanation.dense, _DENSE),
            (4 * gap + half, "pruned", f"{counts} patches", explanation.pruned, _PRUNED),
        ):
            _write_predictions(draw, (left, bottom), half, size, (side, note), found, colour)
    return sheet


def draw_frames(explanation: Explanation) -> list[Image.Image]:
    """The input, then what each stage keeps, each with its title and the likeliest classes."""
    shown = draw_panels(explanation, _SIDE)
    titles = _titles(explanation)
    size = max(13, round(min(shown[0].size) / 17))
    gap, line = size, round(1.35 * size)
    below = _captions(explanation)
    width = max(
        shown[0].width, *(math.ceil(_length(text, size)) for pair in titles for text in pair)
    )
    top = gap + 2 * line
    frames = []
    for picture, (title, counts) in zip(shown, titles, strict=True):
        frame = Image.new(
            "RGB",
            (width + 2 * gap, top + picture.height + gap + len(below) * line),
            _BACKGROUND,
        )
        draw = ImageDraw.Draw(frame)
        _write(draw, (gap, gap // 2), title, size)
        _write(draw, (gap, gap // 2 + line), counts, size, _PALE_INK)
        frame.paste(picture, (gap, top))
        for row, text in enumerate(below):
            place = (gap, top + picture.height + gap // 2 + row * line)
            _write(draw, place, _cut(text, width, size), size)
        frames.append(frame)
    return frames


def draw_sheet(
    explanations: Sequence[Explanation],
    captions: Sequence[str] | None = None,
    side: int = _TILE_SIDE,
) -> Image.Image:
    """Many images, each a row of the input and what each stage keeps, in columns of such rows.

    Args:
        explanations: of images of one size, by one model.
        captions: a line of text an image; by default what it is taken for.
        side: pixels that the shorter side of a picture has, about.

    Returns:
        An RGB picture.
    """
    size = max(12, round(side / 9)) if side < _SIDE else max(13, round(side / 17))
    gap, line = 2 * size // 3, round(1.35 * size)
    first = draw_panels(explanations[0], side)
    start, *kept = explanations[0].counts
    titles = [f"{start} patches", *(f"{count} kept" for count in kept)]
    cell_w = max(first[0].width, *(math.ceil(_length(title, size)) for title in titles)) + gap
    cell_h = first[0].height + gap // 2 + line + gap
    group_w = len(first) * cell_w + 2 * gap
    head = gap + line
    count = len(explanations)
    # As many columns as make it wider than high, for screens are so.
    groups = next(
        number
        for number in range(1, count + 1)
        if head + math.ceil(count / number) * cell_h <= number * group_w or number == count
    )
    rows = math.ceil(count / groups)
    groups = math.ceil(count / rows)
    sheet = Image.new("RGB", (gap + groups * group_w - 2 * gap, head + rows * cell_h), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for group in range(groups):
        for column, title in enumerate(titles):
            place = (gap + group * group_w + column * cell_w, gap // 2)
            _write(draw, place, title, size, _PALE_INK)
    for index, explanation in enumerate(explanations):
        group, row = divmod(index, rows)
        left, top = gap + group * group_w, head + row * cell_h
        shown = first if index == 0 else draw_panels(explanation, side)
        for column, picture in enumerate(shown):
            sheet.paste(picture, (left + column * cell_w, top))
        below = _captions(explanation) if captions is None else [captions[index]]
        width = (group_w - 3 * gap) // max(1, len(below))
        for column, text in enumerate(below):
            place = (left + column * width, top + first[0].height + gap // 2)
            _write(draw, place, _cut(text, width - gap, size), size)
    return sheet


def dim_dropped(pixels: np.ndarray, mask: np.ndarray, patch_size: tuple[int, int]) -> np.ndarray:
    """Dim the patches of a picture that are not kept.

    Args:
        pixels: [H, W, 3] uint8.
        mask: [rows, columns] bool, True where the patch is kept. Patches may reach beyond the
            picture, to the right and below, as they do where a model pads.
        patch_size: height and width of a patch in pixels.
    """
    kept = _spread(mask, patch_size, pixels.shape[:2])[..., None]
    dimmed = pixels * _DIMMED + np.array(_TINT) * (1 - _DIMMED)
    return np.where(kept, pixels, dimmed.astype(np.uint8))


def heat_map(explanation: Explanation, stage: int) -> tuple[np.ndarray, float, float]:
    """A stage's scores as colours, [H, W, 3] uint8, and the lowest and highest of them.

    Patches that had left before are grey.
    """
    scores = explanation.scores[stage]
    there = np.isfinite(scores)
    lowest, highest = (
        (float(scores[there].min()), float(scores[there].max())) if there.any() else (0.0, 0.0)
    )
    share = (np.where(there, scores, lowest) - lowest) / ((highest - lowest) or 1.0)
    colours = np.where(there[:, None], heat_colours(share), np.array(_GONE, dtype=np.uint8))
    size = explanation.pixels.shape[:2]
    grid = colours.reshape(*explanation.grid, 3)
    return _spread(grid, explanation.patch_size, size), lowest, highest


_NEAREST = Image.Resampling.NEAREST


def _spread(grid: np.ndarray, patch_size: tuple[int, int], size: Sequence[int]) -> np.ndarray:
    """Values a patch → values a pixel."""
    pixels = grid.repeat(patch_size[0], axis=0).repeat(patch_size[1], axis=1)
    return pixels[: size[0], : size[1]]


def heat_colours(share: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1, [n] → colours, [n, 3] uint8."""
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(share, stops, channel) for channel in zip(*_HEAT, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def draw_panels(explanation: Explanation, side: int) -> list[Image.Image]:
    """The input and what each stage keeps, brought to about `side` pixels by a whole factor, so
    that patches stay sharp."""
    pixels = explanation.pixels
    shown = [
        pixels,
        *(dim_dropped(pixels, mask, explanation.patch_size) for mask in explanation.masks),
    ]
    shorter, longer = sorted(pixels.shape[:2])
    larger = max(1, min(round(side / shorter), _MOST * side // longer))
    smaller = max(1, round(shorter / side)) if side < _SIDE else 1
    pictures = [Image.fromarray(item).reduce(smaller) for item in shown]
    width, height = pictures[0].size
    return [picture.resize((width * larger, height * larger), _NEAREST) for picture in pictures]


def _titles(explanation: Explanation) -> list[tuple[str, str]]:
    """Two lines above each picture."""
    height, width = explanation.pixels.shape[:2]
    start, *counts = explanation.counts
    titles = [("input", f"{width} x {height} pixels")]
    for stage, (block, count) in enumerate(zip(explanation.blocks, counts, strict=True), start=1):
        titles.append((f"stage {stage}, block {block}", f"{count} of {start} patches"))
    return titles


def _captions(explanation: Explanation) -> list[str]:
    """What the image is taken for, dense and pruned; a name too long for its place is cut off."""
    return [
        f"{side} {found[0].probability:.0%} {found[0].name}"
        for side, found in (("dense", explanation.dense), ("pruned", explanation.pruned))
        if found
    ]


def _write_legend(draw: ImageDraw.ImageDraw, place: tuple[int, int], width: int, size: int) -> None:
    """What the heat maps show."""
    left, top = place
    line = round(1.35 * size)
    _write(draw, place, "keep scores", size)
    notes = (
        "log-odds of going on, as the stage's scorer gives them; bright is high.",
        "The mark on the scale: from there on, patches stay.",
        "Grey: had left before.",
    )
    top += line
    for note in notes:
        for text in _wrap(note, width, size):
            _write(draw, (left, top), text, size, _PALE_INK)
            top += line
        top += line // 4


def _write_predictions(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    width: int,
    size: int,
    title: tuple[str, str],
    found: Sequence[Prediction],
    colour: tuple[int, int, int],
) -> None:
    """Bars: a class each, its name and its probability."""
    left, top = place
    line = round(1.35 * size)
    side, note = title
    _write(draw, place, side, size)
    offset = _length(f"{side}  ", size)
    _write(draw, (left + offset, top), _cut(note, width - offset, size), size, _PALE_INK)
    number = math.ceil(_length("100.0%", size)) + size // 2
    names = round(0.45 * (width - number))
    start, end = left + names + size // 2, left + width - number
    for row, item in enumerate(found):
        y = top + line + line // 4 + row * (line + line // 4)
        _write(draw, (left, y), _cut(item.name, names, size), size)
        bar = (start, y + size // 6, end, y + size)
        draw.rectangle(bar, _BAR_GROUND)
        filled = round(item.probability * (end - start))
        if filled:
            draw.rectangle((start, bar[1], start + filled, bar[3]), colour)
        text = f"{item.probability:.1%}"
        _write(draw, (left + width - _length(text, size), y), text, size)


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


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    colour: tuple[int, int, int] = _INK,
) -> None:
    draw.text(place, text, colour, _font(size, _known(text)))


def _length(text: str, size: int) -> float:
    return float(_font(size, _known(text)).getlength(text))


def _known(text: str) -> bool:
    return text.replace("…", "").isascii()


def _cut(text: str, width: float, size: int) -> str:
    """One line of it that fits."""
    text = " ".join(text.split())
    if _length(text, size) <= width:
        return text
    fits = bisect_right(range(len(text)), width, key=lambda end: _length(f"{text[:end]}…", size))
    return text[: max(0, fits - 1)].rstrip() + "…"


def _wrap(text: str, width: float, size: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _length(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
