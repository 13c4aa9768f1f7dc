from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dynamicvit.io.predictions import Prediction
from dynamicvit.views.drawing import hatch
from dynamicvit.views.explanation import Explanation, draw_sheet

COLOUR = (200, 40, 60)  # like nothing else in the pictures


def _explanation(
    height: int = 32,
    width: int = 32,
    patch: int = 8,
    kept: tuple[tuple[int, ...], ...] = ((0, 5, 6, 15), (5, 15)),
    **changes: Any,
) -> Explanation:
    """An evenly bright image, of which the given positions are kept."""
    rows, columns = -(-height // patch), -(-width // patch)
    scores = np.full((len(kept), rows * columns), -np.inf, dtype=np.float32)
    scores[0] = np.linspace(-2, 2, rows * columns)
    for stage in range(1, len(kept)):
        scores[stage, list(kept[stage - 1])] = np.arange(len(kept[stage - 1]))
    found = [Prediction("ant", 0, 0.75), Prediction("bee", 1, 0.25)]
    explanation = Explanation(
        pixels=np.full((height, width, 3), COLOUR, dtype=np.uint8),
        patch_size=(patch, patch),
        grid=(rows, columns),
        blocks=tuple(range(1, len(kept) + 1)),
        kept=tuple(np.array(positions) for positions in kept),
        scores=scores,
        dense=found,
        pruned=found,
        dense_model="the same weights",
    )
    return replace(explanation, **changes)


def _bright(picture: Image.Image) -> np.ndarray:
    return (np.asarray(picture) == COLOUR).all(axis=-1)


@pytest.mark.parametrize("brightness", [0, 30, 110, 200, 255])
def test_what_is_gone_is_told_from_what_is_kept(brightness: int) -> None:
    """On dark and on bright pictures alike: exactly what is gone has stripes, dark and bright."""
    pixels = np.full((30, 45, 3), brightness, dtype=np.uint8)
    gone = np.random.default_rng(0).random((30, 45)) > 0.5
    drawn = hatch(pixels, gone).astype(int)
    assert (drawn[~gone] == brightness).all()
    light = drawn.mean(axis=-1)[gone]
    assert np.ptp(light) > 60
    stripes = light < light.mean()
    assert 0.3 < stripes.mean() < 0.7


@pytest.mark.parametrize(
    ("height", "width", "patch"),
    [(32, 32, 8), (28, 56, 14), (224, 384, 16), (224, 384, 32), (30, 45, 14)],
    ids=str,
)
def test_exactly_the_pixels_of_dropped_patches_are_striped(
    height: int, width: int, patch: int
) -> None:
    """Also where patches reach beyond the image: the last."""
    numbers = np.random.default_rng(0)
    mask = numbers.random((-(-height // patch), -(-width // patch))) > 0.5
    explanation = _explanation(height, width, patch, kept=(tuple(mask.ravel().nonzero()[0]),))
    given, shown = (np.asarray(panel) for panel in explanation.panels())
    y, x = np.mgrid[: given.shape[0], : given.shape[1]] * height // given.shape[0]
    changed = (shown != given).any(axis=-1)
    assert (changed != mask[y // patch, x // patch]).all()


@pytest.mark.parametrize(
    ("height", "width", "patch", "scale"),
    [(32, 32, 8, 7), (224, 384, 14, 1), (224, 384, 32, 1), (28, 28, 2, 8), (256, 16, 16, 2)],
    ids=str,
)
def test_the_pictures_show_what_is_kept(height: int, width: int, patch: int, scale: int) -> None:
    """Counted in the finished pictures, where the rest is darker or the background."""
    explanation = _explanation(height, width, patch, kept=((0, 5, 6), (5,)), dense=[], pruned=[])
    areas = [height * width, 3 * patch**2, patch**2]
    assert _bright(explanation.picture()).sum() == sum(areas) * scale**2
    found = [_bright(frame).sum() for frame in explanation.frames()]
    assert found == [area * scale**2 for area in areas]
    # and in the right places: within the frame, patch 5 alone is bright
    y, x = np.nonzero(_bright(explanation.frames()[-1]))
    top, left = (values.min() for values in np.nonzero(_bright(explanation.frames()[0])))
    row, column = divmod(5, explanation.grid[1])
    assert (y.min() - top, x.min() - left) == (
        row * patch * scale,
        column * patch * scale,
    )


def test_a_sheet_shows_each_image_and_stage() -> None:
    explanation = _explanation(28, 28, 7)
    sheet = draw_sheet([explanation] * 5)
    assert _bright(sheet).sum() == 5 * 16 * (28 * 28 + 6 * 49)  # four times enlarged
    assert sheet.width > sheet.height
    large = _explanation(448, 448, 32)  # made smaller, four times
    assert _bright(draw_sheet([large], ["a caption"])).sum() == (448 * 448 + 6 * 1024) / 16
    assert draw_sheet([large], ["one"]).size == draw_sheet([large], ["another " * 99]).size


def test_heat_maps_are_dark_for_low_scores_and_grey_for_what_had_left() -> None:
    heat, lowest, highest = _explanation().heat_map(0)
    assert (lowest, highest) == (-2, 2)
    light = heat[::8, ::8].astype(int).sum(axis=-1).ravel()
    assert (np.diff(light) > 0).all()
    heat, lowest, highest = _explanation().heat_map(1)
    assert (lowest, highest) == (0, 3)
    colours = heat[::8, ::8].reshape(16, 3)
    gone = [position for position in range(16) if position not in (0, 5, 6, 15)]
    assert len({tuple(colour) for colour in colours[gone]}) == 1
    assert len({tuple(colour) for colour in colours}) == 1 + 4
    empty = _explanation(scores=np.full((2, 16), -np.inf, dtype=np.float32))
    nothing = empty.heat_map(0)
    assert nothing[1:] == (0, 0)


def test_predictions_are_drawn_as_long_as_they_are_likely() -> None:
    def filled(probability: float) -> int:
        found = [Prediction("ant", 0, probability)]
        picture = np.asarray(_explanation(pruned=found).picture())
        return int((picture == (33, 113, 181)).all(axis=-1).sum())

    assert filled(0.0) == 0
    assert filled(1.0) > 0
    assert filled(0.5) == pytest.approx(filled(1.0) / 2, rel=0.02)


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    patch=st.integers(1, 40),
    stages=st.integers(1, 6),
    name=st.text(max_size=200),
)
def test_anything_can_be_drawn(height: int, width: int, patch: int, stages: int, name: str) -> None:
    found = [Prediction(name, 0, 0.5)]
    explanation = _explanation(
        height, width, patch, kept=((0,),) * stages, dense=found, pruned=found, dense_model=name
    )
    for picture in (explanation.picture(), *explanation.frames()):
        assert min(picture.size) > 0
    draw_sheet([explanation] * 3, [name] * 3)
