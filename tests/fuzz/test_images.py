"""Damaged pictures of every format that Pillow writes: read, or refused by name."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from dynamicvit.evaluation.data import open_data
from dynamicvit.evaluation.unreadable import DataError
from dynamicvit.io.predictions import read_image
from tests.fuzz.counts import counts

# Formats of one frame that need no other program.
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "IM", "JPEG", "JPEG2000", "MPO", "MSP", "PCX"),
    *("PNG", "PPM", "QOI", "SGI", "SPIDER", "TGA", "TIFF", "WEBP", "XBM"),
)


def _pictures() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    written = []
    Image.init()
    for name in FORMATS:
        for mode in ("RGB", "L", "1", "P", "RGBA"):
            content = io.BytesIO()
            if name in Image.SAVE:
                try:
                    Image.fromarray(pixels).convert(mode).save(content, name)
                except (OSError, ValueError, KeyError):
                    continue
                written.append(content.getvalue())
                break
    return written


def _mutate(content: bytes, others: list[bytes], numbers: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(numbers.randint(1, 4)):
        at = numbers.randrange(len(damaged)) if damaged else 0
        kind = numbers.randrange(5)
        if kind == 0 and damaged:
            damaged[at] ^= 1 << numbers.randrange(8)
        elif kind == 1:
            damaged[at : at + 4] = numbers.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        elif kind == 2:
            del damaged[at:]
        elif kind == 3:
            del damaged[at : at + numbers.randint(1, 16)]
        else:
            other = numbers.choice(others)
            damaged[at:at] = other[: numbers.randint(1, 64)]
    return bytes(damaged)


@counts(few=1000, many=50_000)
def test_a_damaged_picture_is_read_or_refused(count: int, tmp_path: Path) -> None:
    numbers, pictures = random.Random(0), _pictures()
    assert len(pictures) > 10
    path = tmp_path / "picture.png"
    read = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of much
        for _ in range(count):
            path.write_bytes(_mutate(numbers.choice(pictures), pictures, numbers))
            try:
                picture = read_image(path, "RGB", "image")
            except ValueError as error:
                assert f"cannot read image {path}" in str(error)
            else:
                assert picture.mode == "RGB"
                read += 1
    assert 0 < read < count


@counts(few=200, many=2000)
def test_a_folder_of_damaged_pictures_is_gone_through(count: int, tmp_path: Path) -> None:
    numbers, pictures = random.Random(1), _pictures()
    folder = tmp_path / "val" / "class"
    folder.mkdir(parents=True)
    for index in range(count):
        damaged = _mutate(numbers.choice(pictures), pictures, numbers)
        (folder / f"{index:05}.png").write_bytes(damaged)
    data = open_data(str(tmp_path), "val", skip_unreadable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skipped = sum(data.dataset[index][1] == -1 for index in range(count))
        assert data.unreadable == skipped > 0
        strict = open_data(str(tmp_path), "val")
        for index in range(count):
            try:
                strict.dataset[index]
            except DataError as error:
                assert f"{index:05}.png" in str(error)
