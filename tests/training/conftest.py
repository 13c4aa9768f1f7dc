"""A tiny image folder and tiny models to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dynamicvit.core.folder import save_folder
from tests.conftest import tiny_vit

CLASSES = ("bright", "dark")


def write_images(root: Path, counts: dict[str, int], classes: tuple[str, ...] = CLASSES) -> Path:
    """`root/SPLIT/CLASS/INDEX.png`, 32 px, noise around a brightness that tells the class."""
    numbers = np.random.default_rng(0)
    for split, count in counts.items():
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = numbers.normal(200 - 140 * label, 30, (32, 32, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02}.png")
    return root


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", {"train": 8, "val": 4})


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    """A dense model of two classes, as a model folder."""
    save_folder(tiny_vit(num_classes=2), tmp_path / "dense", class_names=CLASSES)
    return tmp_path / "dense"


@pytest.fixture
def options(images: Path, dense_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a TrainConfig that trains in a second."""
    return {
        "data": str(images),
        "output": str(tmp_path / "run"),
        "model": str(dense_folder),
        "workers": 0,
        "epochs": 2,
        "batch_size": 4,
        "warmup_epochs": 1,
        "freeze_epochs": 0,
        "log_steps": 1,
    }
