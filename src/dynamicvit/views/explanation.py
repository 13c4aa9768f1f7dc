"""Explanation: what a model kept of an image and took it for, as arrays and as pictures."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dynamicvit.io.files import write_bytes
from dynamicvit.io.predictions import Prediction
from dynamicvit.views.drawing import (
    INK,
    NEAREST,
    PALE_INK,
    cut,
    hatch,
    heat_colours,
    length,
    spread,
    wrap,
    write,
)

SUFFIXES = (".png", ".gif", ".webp", ".npz")  # what `Explanation.save` writes
SIDE = 224  # pixels that the shorter side of a picture has, about

_TILE_SIDE = 112  # and of one in a sheet
_MOST = 3  # a small image is enlarged to no more than this many times that length
_WHOLE = 0.995  # share of the picture from which on nothing worth a word is cropped off
_BACKGROUND, _BAR_GROUND, _GONE = (255, 255, 255), (236, 238, 243), (222, 224, 230)
_DENSE, _PRUNED = (126, 134, 156), (33, 113, 181)


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What a SparseViT kept of an image, and took it for. `explain` makes it; a notebook shows it.

    Attributes:
        pixels: [H, W, 3] uint8: what the model saw, after resizing and cropping.
        patch_size: height and width of a patch in pixels.
        grid: rows and columns of patches. The patch at position p is in row `p // columns`.
        blocks: for each of the S stages, the (0-based) block before which patches leave.
        kept: for each stage, the positions of the patches kept after it, ascending: [K] int64.
        scores: [S, N] float32: log-odds of keeping; -inf for patches that had left before.
        dense: the likeliest five classes with all patches kept, best first; none where the model
            has no classification head.
        pruned: the same, with tokens leaving.
        dense_model: whose predictions `dense` are, in words.
        visible: share of the picture's area that the model saw, from 0 to 1; the rest was cropped
            off. 1 for prepared images.
    """

    pixels: np.ndarray
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    blocks: tuple[int, ...]
    kept: tuple[np.ndarray, ...]
    scores: np.ndarray
    dense: list[Prediction]
    pruned: list[Prediction]
    dense_model: str
    visible: float = 1.0

    @property
    def masks(self) -> np.ndarray:
        """[S, rows, columns] bool: True where a patch is kept after a stage."""
        flat = np.zeros(self.scores.shape, dtype=bool)
        for mask, positions in zip(flat, self.kept, strict=True):
            mask[positions] = True
        return flat.reshape(-1, *self.grid)

    @property
    def counts(self) -> tuple[int, ...]:
        """Patches at the start and after each stage."""
        return (self.scores.shape[1], *map(len, self.kept))

    @property
    def cropped(self) -> str:
        """What the pictures leave out, in words; empty where they show the whole picture."""
        return f"{self.visible:.0%} of the picture" if self.visible < _WHOLE else ""

    def picture(self) -> Image.Image:
        """The input and what each stage keeps of it, its scores, and the predictions: RGB."""
        return _draw_picture(self)

    def frames(self) -> list[Image.Image]:
        """The input, then what each stage keeps of it: RGB pictures of one size."""
        return _draw_frames(self)

    def panels(self, side: int = SIDE) -> list[Image.Image]:
        """The input, then what each stage keeps of it, without text: RGB pictures of one size.

        Patches that have left are faded and striped.

        Args:
            side: pixels that the shorter side has, about: pictures are enlarged, and where this is
                below 224 reduced, by a whole factor, so that patches stay sharp.
        """
        size = self.pixels.shape[:2]
        shorter, longer = sorted(size)
        larger = max(1, min(round(side / shorter), _MOST * side // longer))
        smaller = max(1, round(shorter / side)) if side < SIDE else 1
        reduced = Image.fromarray(self.pixels).reduce(smaller)
        target = (reduced.width * larger, reduced.height * larger)
        shown = np.asarray(reduced.resize(target, NEAREST))
        stripe = max(2, min(target) // 56)
        panels = [Image.fromarray(shown)]
        for mask in self.masks:
            gone = Image.fromarray(~spread(mask, self.patch_size, size)).resize(target, NEAREST)
            panels.append(Image.fromarray(hatch(shown, np.asarray(gone), stripe)))
        return panels

    def heat_map(self, stage: int) -> tuple[np.ndarray, float, float]:
        """A stage's scores as colours, [H, W, 3] uint8, and the lowest and highest of them.

        Patches that had left before are grey.
        """
        scores = self.scores[stage]
        there = np.isfinite(scores)
        lowest, highest = (
            (float(scores[there].min()), float(scores[there].max())) if there.any() else (0.0, 0.0)
        )
        share = (np.where(there, scores, lowest) - lowest) / ((highest - lowest) or 1.0)
        colours = np.where(there[:, None], heat_colours(share), np.array(_GONE, dtype=np.uint8))
        grid = colours.reshape(*self.grid, 3)
        return spread(grid, self.patch_size, self.pixels.shape[:2]), lowest, highest

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all.

        Args:
            path: ends in .png (the picture), .gif or .webp (an animation: the input, then each
                stage), or .npz (the attributes as arrays; `kept_1` and so on hold the positions,
                classes are `dense_index`, `dense_name`, `dense_probability`, and so for `pruned_`).
                Folders that are absent are made.

        Raises:
            ValueError: if it ends in something else.
        """
        target = Path(path)
        kind = target.suffix.lower()
        if kind not in SUFFIXES:
            raise ValueError(f"path must end in {', '.join(SUFFIXES)}, got {str(target)!r}")
        content = io.BytesIO()
        if kind == ".npz":
            np.savez_compressed(content, **self._arrays())
        elif kind == ".png":
            self.picture().save(content, format="PNG")
        else:
            first, *rest = self.frames()
            times = [1000] * len(rest) + [2500]  # milliseconds
            options: dict[str, Any] = {"lossless": True} if kind == ".webp" else {}
            first.save(
                content,
                format=kind[1:].upper(),
                save_all=True,
                append_images=rest,
                duration=times,
                loop=0,
                **options,
            )
        write_bytes(target, content.getvalue())

    def _arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {
            f"kept_{stage}": positions for stage, positions in enumerate(self.kept, start=1)
        }
        for side, found in (("dense", self.dense), ("pruned", self.pruned)):
            arrays[f"{side}_index"] = np.array([item.index for item in found], dtype=np.int64)
            arrays[f"{side}_name"] = np.array([item.name for item in found], dtype=np.str_)
            arrays[f"{side}_probability"] = np.array([item.probability for item in found])
        names = ("pixels", "patch_size", "grid", "blocks", "scores", "dense_model", "visible")
        return arrays | {name: np.asarray(getattr(self, name)) for name in names}

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.picture().save(content, format="PNG")
        return content.getvalue()

    def __repr__(self) -> str:
        parts = [f"patches {' → '.join(map(str, self.counts))}"]
        for side, found in (("dense", self.dense), ("pruned", self.pruned)):
            parts += [f"{side}: {found[0].name}"] if found else []
        return f"<Explanation, {', '.join(parts)}>"


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
    size = max(12, round(side / 9)) if side < SIDE else max(13, round(side / 17))
    gap, line = 2 * size // 3, round(1.35 * size)
    first = explanations[0].panels(side)
    start, *kept = explanations[0].counts
    cropped = "cropped, " if any(item.cropped for item in explanations) else ""
    titles = [f"{cropped}{start} patches", *(f"{count} kept" for count in kept)]
    cell_w = max(first[0].width, *(math.ceil(length(title, size)) for title in titles)) + gap
    cell_h = first[0].height + gap // 2 + line + gap
    group_w = len(first) * cell_w + 2 * gap
    head = gap + line
    count = len(explanations)
    # As many columns as make it wider than high, as screens are.
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
            write(draw, (gap + group * group_w + column * cell_w, gap // 2), title, size, PALE_INK)
    for index, explanation in enumerate(explanations):
        group, row = divmod(index, rows)
        left, top = gap + group * group_w, head + row * cell_h
        shown = first if index == 0 else explanation.panels(side)
        for column, picture in enumerate(shown):
            sheet.paste(picture, (left + column * cell_w, top))
        below = _captions(explanation) if captions is None else [captions[index]]
        width = (group_w - 3 * gap) // max(1, len(below))
        for column, text in enumerate(below):
            at = (left + column * width, top + first[0].height + gap // 2)
            write(draw, at, cut(text, width - gap, size), size)
    return sheet


def _draw_picture(explanation: Explanation) -> Image.Image:
    """Three rows: the input and what each stage keeps; the scores; the predictions."""
    shown = explanation.panels()
    width, height = shown[0].size
    titles = _titles(explanation)
    size = max(13, round(min(width, height) / 17))
    cell = max(width, *(math.ceil(length(line, size)) for pair in titles for line in pair))
    gap, line = size, round(1.35 * size)
    heat_top = 2 * gap + 2 * line + height
    bar = max(4, size // 2)
    bottom = heat_top + height + bar + 2 * gap + line
    rows = max(len(explanation.dense), len(explanation.pruned))
    answers = (rows + 2) * line + rows * line // 4 + gap if rows else 0
    sheet = Image.new("RGB", (gap + len(shown) * (cell + gap), bottom + answers), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, (picture, (title, below)) in enumerate(zip(shown, titles, strict=True)):
        left = gap + column * (cell + gap)
        write(draw, (left, gap // 2), title, size)
        write(draw, (left, gap // 2 + line), below, size, PALE_INK)
        sheet.paste(picture, (left, gap + 2 * line))
    _write_legend(draw, (gap, heat_top), cell, size)
    for stage, scores in enumerate(explanation.scores):
        left = gap + (stage + 1) * (cell + gap)
        heat, lowest, highest = explanation.heat_map(stage)
        sheet.paste(Image.fromarray(heat).resize((width, height), NEAREST), (left, heat_top))
        top = heat_top + height + gap // 2
        ramp = heat_colours(np.linspace(0, 1, width))[None].repeat(bar, axis=0)
        sheet.paste(Image.fromarray(ramp), (left, top))
        threshold = float(scores[explanation.kept[stage]].min())
        span = highest - lowest
        if span > 0 and math.isfinite(threshold):
            x = left + round((threshold - lowest) / span * (width - 1))
            draw.line((x, top - bar // 2, x, top + bar + bar // 2), INK, max(2, size // 7))
        text = top + bar + gap // 4
        write(draw, (left, text), f"{lowest:.3g}", size, PALE_INK)
        right = f"{highest:.3g}"
        write(draw, (left + width - length(right, size), text), right, size, PALE_INK)
    if rows:
        half = (sheet.width - 5 * gap) // 2
        counts = ", ".join(map(str, explanation.counts))
        for left, side, note, found, colour in (
            (gap, "dense", explanation.dense_model, explanation.dense, _DENSE),
            (4 * gap + half, "pruned", f"{counts} patches", explanation.pruned, _PRUNED),
        ):
            _write_predictions(draw, (left, bottom), half, size, (side, note), found, colour)
    return sheet


def _draw_frames(explanation: Explanation) -> list[Image.Image]:
    """The input, then what each stage keeps, each with its title and the likeliest classes."""
    shown = explanation.panels()
    titles = _titles(explanation)
    size = max(13, round(min(shown[0].size) / 17))
    gap, line = size, round(1.35 * size)
    below = _captions(explanation)
    texts = [text for pair in titles for text in pair]
    width = max(shown[0].width, *(math.ceil(length(text, size)) for text in texts))
    top = gap + 2 * line
    frames = []
    for picture, (title, counts) in zip(shown, titles, strict=True):
        height = top + picture.height + gap + len(below) * line
        frame = Image.new("RGB", (width + 2 * gap, height), _BACKGROUND)
        draw = ImageDraw.Draw(frame)
        write(draw, (gap, gap // 2), title, size)
        write(draw, (gap, gap // 2 + line), counts, size, PALE_INK)
        frame.paste(picture, (gap, top))
        for row, text in enumerate(below):
            at = (gap, top + picture.height + gap // 2 + row * line)
            write(draw, at, cut(text, width, size), size)
        frames.append(frame)
    return frames


def _titles(explanation: Explanation) -> list[tuple[str, str]]:
    """Two lines above each picture."""
    height, width = explanation.pixels.shape[:2]
    start, *counts = explanation.counts
    seen = f"{width} x {height} pixels"
    titles = [("input", seen)]
    if explanation.cropped:
        titles = [("input, cropped", f"{seen}, {explanation.cropped}")]
    for stage, (block, count) in enumerate(zip(explanation.blocks, counts, strict=True), start=1):
        titles.append((f"stage {stage}, block {block}", f"{count} of {start} patches"))
    return titles


def _captions(explanation: Explanation) -> list[str]:
    """What the image is taken for, dense and pruned."""
    return [
        f"{side} {found[0].probability:.0%} {found[0].name}"
        for side, found in (("dense", explanation.dense), ("pruned", explanation.pruned))
        if found
    ]


def _write_legend(draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, size: int) -> None:
    """What the pictures and the heat maps show."""
    left, top = at
    line = round(1.35 * size)
    for title, notes in (
        ("striped", ("patches that have left.",)),
        (
            "keep scores",
            (
                "log-odds of going on, as the stage's scorer gives them; bright is high.",
                "The mark on the scale: from there on, patches stay.",
                "Grey: had left before.",
            ),
        ),
    ):
        write(draw, (left, top), title, size)
        top += line
        for note in notes:
            for text in wrap(note, width, size):
                write(draw, (left, top), text, size, PALE_INK)
                top += line
            top += line // 4


def _write_predictions(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    width: int,
    size: int,
    title: tuple[str, str],
    found: Sequence[Prediction],
    colour: tuple[int, int, int],
) -> None:
    """Bars: a class each, its name and its probability."""
    left, top = at
    line = round(1.35 * size)
    side, note = title
    write(draw, at, side, size)
    offset = length(f"{side}  ", size)
    write(draw, (left + offset, top), cut(note, width - offset, size), size, PALE_INK)
    number = math.ceil(length("100.0%", size)) + size // 2
    names = round(0.45 * (width - number))
    start, end = left + names + size // 2, left + width - number
    for row, item in enumerate(found):
        y = top + line + line // 4 + row * (line + line // 4)
        write(draw, (left, y), cut(item.name, names, size), size)
        bar = (start, y + size // 6, end, y + size)
        draw.rectangle(bar, _BAR_GROUND)
        filled = round(item.probability * (end - start))
        if filled:
            draw.rectangle((start, bar[1], start + filled, bar[3]), colour)
        text = f"{item.probability:.1%}"
        write(draw, (left + width - length(text, size), y), text, size)
