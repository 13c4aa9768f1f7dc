from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamicvit.core.model import sparsify
from dynamicvit.core.scorer import RandomScorer
from dynamicvit.explain.keep_maps import dim_dropped, draw_keep_maps
from tests.conftest import tiny_vit


@pytest.mark.parametrize(("height", "width", "patch"), [(32, 32, 8), (28, 56, 14)])
def test_exactly_the_pixels_of_dropped_patches_are_dimmed(
    height: int, width: int, patch: int
) -> None:
    picture = torch.full((height, width, 3), 200, dtype=torch.uint8)
    mask = torch.rand(height // patch, width // patch) > 0.5
    dimmed = dim_dropped(picture, mask)
    changed = (dimmed != picture).any(dim=-1)
    for row in range(height):
        for column in range(width):
            assert changed[row, column] != mask[row // patch, column // patch]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_shows_the_input_and_each_stage(channels: int) -> None:
    sparse = sparsify(tiny_vit(img_size=(16, 32), in_chans=channels), 0.5)
    sparse.pretrained_cfg.update(mean=(0.5,) * channels, std=(0.5,) * channels)
    image = torch.full((1, channels, 16, 32), 0.6)  # 0.8 of full brightness
    picture = np.asarray(draw_keep_maps(sparse, image, ["a caption"], min_side=16))
    bright = (picture[30:46] == 204).all(axis=-1).sum()  # the row of pictures, without text
    # The input, then 4, 2 and 1 of 8 patches of 8×8 pixels.
    assert bright == 16 * 32 + (4 + 2 + 1) * 64


def test_keep_maps_follow_the_scorers() -> None:
    sparse = sparsify(tiny_vit(), 0.5)
    image = torch.zeros(1, 3, 32, 32)
    learned = [np.asarray(draw_keep_maps(sparse, image)) for _ in range(2)]
    assert (learned[0] == learned[1]).all()
    sparse.scorers = torch.nn.ModuleList(RandomScorer() for _ in range(3))
    assert (np.asarray(draw_keep_maps(sparse, image)) != learned[0]).any()
