"""Explanation: what a model kept of an image and predicted for it, as arrays and as pictures."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from dynamicvit.io.files import write_bytes
from dynamicvit.io.predictions import Prediction
from dynamicvit.views.drawing import (
    BACKGROUND,
    INK,
    NEAREST,
    hatch,
    heat_colours,
    line_height,
    spread,
    stack,
    text_block,
    text_width,
)

SUFFIXES = (".png", ".gif", ".webp", ".npz")  # what `Explanation.save` writes
SIDE = 224  # approximate pixels of a picture's shorter side

_TILE_SIDE = 112  # the same in a sheet
_MOST = 3  # a picture's longer side is at most so many times that
_WHOLE = 0.995  # a picture of which so much is visible is not called cropped
_BAR_GROUND, _GONE = (236, 238, 243), (222, 224, 230)
_DENSE, _PRUNED = (126, 134, 156), (33, 113, 181)


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What a SparseViT kept of an image, and predicted for it. `explain` makes it; a notebook shows
    it as a picture.

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
        dense_model: the model that `dense` is of, in words.
        visible: share of the picture's area that the model saw, from 0 to 1; the rest was cropped
            off. 1 for prepared images.
        level: which of the model's levels the image got, from 1, and how many there are; None where
            all images have one budget.
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
    level: tuple[int, int] | None = None

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
    def patches(self) -> str:
        """`counts`, and the level where images have different ones, in words."""
        level = "" if self.level is None else f", level {self.level[0]} of {self.level[1]}"
        return " → ".join(map(str, self.counts)) + level

    @property
    def cropped(self) -> str:
        """What the pictures leave out, in words; empty where they show the whole picture."""
        return f"{self.visible:.0%} of the picture" if self.visible < _WHOLE else ""

    def picture(self) -> Image.Image:
        """The input, what each stage keeps of it, the scores, and the predictions: RGB."""
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
        finite = scores[there] if there.any() else np.zeros(1)
        lowest, highest = float(finite.min()), float(finite.max())
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
            animation = {"save_all": True, "append_images": rest, "duration": times, "loop": 0}
            # GIF has no such option, and ignores it.
            first.save(content, kind[1:].upper(), lossless=True, **animation)
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
        parts = [f"patches {self.patches}"]
        for side, found in (("dense", self.dense), ("pruned", self.pruned)):
            parts += [f"{side}: {found[0].name}"] if found else []
        return f"<Explanation, {', '.join(parts)}>"


def draw_sheet(
    explanations: Sequence[Explanation],
    captions: Sequence[str] | None = None,
    side: int = _TILE_SIDE,
) -> Image.Image:
    """Many images: for each a row of the input and what each stage keeps, in columns of such rows.

    Args:
        explanations: of images of one size, by one model.
        captions: a line of text for each image; by default the predicted classes.
        side: approximate length of a picture's shorter side, in pixels.

    Returns:
        An RGB picture.
    """
    size = max(12, round(side / 9)) if side < SIDE else _text_size(side)
    gap = 2 * size // 3
    start, *kept = explanations[0].counts
    cropped = "cropped, " if any(item.cropped for item in explanations) else ""
    titles = [f"{cropped}{start} patches", *(f"{count} kept" for count in kept)]
    cell = max(explanations[0].panels(side)[0].width, text_width(titles, size))
    head = stack([text_block([title], size, cell, dark=0) for title in titles], gap)
    rows = []
    for index, item in enumerate(explanations):
        below = _captions(item) if captions is None else [captions[index]]
        width = (head.width - gap * (len(below) - 1)) // max(1, len(below))
        words = [text_block([line], size, width) for line in below]
        pictures = [stack(item.panels(side), gap, cell=cell)]
        rows.append(stack(pictures + ([stack(words, gap)] if words else []), gap // 2, down=True))
    # As many columns as make the sheet about as wide as high, or wider.
    columns = math.ceil(math.sqrt(len(rows) * rows[0].height / head.width))
    length = math.ceil(len(rows) / columns)
    groups = [
        stack([head, *rows[first : first + length]], gap, down=True)
        for first in range(0, len(rows), length)
    ]
    return ImageOps.expand(stack(groups, 3 * gap), gap, BACKGROUND)


def _draw_picture(explanation: Explanation) -> Image.Image:
    """Three rows: the input and what each stage keeps; the scores; the predictions."""
    panels, titles = explanation.panels(), _titles(explanation)
    size = _text_size(min(panels[0].size))
    cell = max(panels[0].width, *(text_width(title, size) for title in titles))
    kept = [
        stack([text_block(title, size, cell, dark=1), panel], 0, down=True)
        for title, panel in zip(titles, panels, strict=True)
    ]
    scores = [
        _draw_scores(explanation, stage, panels[0].size, size)
        for stage in range(len(explanation.kept))
    ]
    rows = [stack(kept, size), stack([_draw_legend(cell, size), *scores], size, cell=cell)]
    if explanation.dense or explanation.pruned:
        half = (rows[0].width - 3 * size) // 2
        level = explanation.level
        patches = f"{', '.join(map(str, explanation.counts))} patches"
        patches += "" if level is None else f", level {level[0]} of {level[1]}"
        dense = f"dense, {explanation.dense_model}"
        rows.append(
            stack(
                [
                    _draw_predictions(explanation.dense, dense, half, size, _DENSE),
                    _draw_predictions(
                        explanation.pruned, f"pruned, {patches}", half, size, _PRUNED
                    ),
                ],
                3 * size,
            )
        )
    return ImageOps.expand(stack(rows, size, down=True), size, BACKGROUND)


def _draw_frames(explanation: Explanation) -> list[Image.Image]:
    """The input, then what each stage keeps, each with its title and the likeliest classes."""
    panels, titles = explanation.panels(), _titles(explanation)
    size = _text_size(min(panels[0].size))
    width = max(panels[0].width, *(text_width(title, size) for title in titles))
    below = text_block(_captions(explanation), size, width)
    return [
        ImageOps.expand(
            stack([text_block(title, size, width, dark=1), panel, below], size // 2, down=True),
            size,
            BACKGROUND,
        )
        for title, panel in zip(titles, panels, strict=True)
    ]


def _text_size(side: int) -> int:
    return max(13, round(side / 17))


def _titles(explanation: Explanation) -> list[list[str]]:
    """Two lines above each picture."""
    height, width = explanation.pixels.shape[:2]
    start, *counts = explanation.counts
    seen = f"{width} x {height} pixels"
    titles = [["input", seen]]
    if explanation.cropped:
        titles = [["input, cropped", f"{seen}, {explanation.cropped}"]]
    for stage, (block, count) in enumerate(zip(explanation.blocks, counts, strict=True), start=1):
        titles.append([f"stage {stage}, block {block}", f"{count} of {start} patches"])
    return titles


def _captions(explanation: Explanation) -> list[str]:
    """The likeliest class, dense and pruned."""
    return [
        f"{side} {found[0].probability:.1%} {found[0].name}"
        for side, found in (("dense", explanation.dense), ("pruned", explanation.pruned))
        if found
    ]


def _draw_legend(width: int, size: int) -> Image.Image:
    """What the pictures and the heat maps show."""
    notes = {
        "striped": "patches that have left.",
        "keep scores": "the higher its score, the likelier a patch stays. Bright is high. Patches "
        "right of the mark on the scale stay. Grey patches had left before.",
    }
    letters = round(width / (0.52 * size))
    blocks = [
        text_block([title, *textwrap.wrap(note, letters)], size, width, dark=1)
        for title, note in notes.items()
    ]
    return stack(blocks, size // 2, down=True)


def _draw_scores(
    explanation: Explanation, stage: int, shape: tuple[int, int], size: int
) -> Image.Image:
    """A stage's heat map, and below it the scale, with a mark from which on patches stay."""
    heat, lowest, highest = explanation.heat_map(stage)
    width, bar = shape[0], max(4, size // 2)
    scale = Image.new("RGB", (width, 2 * bar), BACKGROUND)
    ramp = heat_colours(np.linspace(0, 1, width))[None].repeat(bar, axis=0)
    scale.paste(Image.fromarray(ramp), (0, bar // 2))
    threshold = float(explanation.scores[stage][explanation.kept[stage]].min())
    if highest > lowest and math.isfinite(threshold):
        x = round((threshold - lowest) / (highest - lowest) * (width - 1))
        ImageDraw.Draw(scale).line((x, 0, x, 2 * bar), INK, max(2, size // 7))
    ends = [text_block([f"{end:.3g}"], size, dark=0) for end in (lowest, highest)]
    numbers = stack(ends, max(size, width - ends[0].width - ends[1].width))
    return stack([Image.fromarray(heat).resize(shape, NEAREST), scale, numbers], 2, down=True)


def _draw_predictions(
    found: Sequence[Prediction], title: str, width: int, size: int, colour: tuple[int, int, int]
) -> Image.Image:
    """A title, and for each class its name, a bar and its probability."""
    head = text_block([title], size, width)
    if not found:
        return head
    line = line_height(size)
    numbers = text_block([f"{item.probability:.1%}" for item in found], size)
    names = text_block([item.name for item in found], size, (width - numbers.width) * 45 // 100)
    bars = Image.new("RGB", (width - names.width - numbers.width - size, names.height), BACKGROUND)
    draw = ImageDraw.Draw(bars)
    for row, item in enumerate(found):
        top, bottom = row * line + size // 6, row * line + size
        draw.rectangle((0, top, bars.width, bottom), _BAR_GROUND)
        if filled := round(item.probability * bars.width):
            draw.rectangle((0, top, filled, bottom), colour)
    return stack([head, stack([names, bars, numbers], size // 2)], size // 4, down=True)
