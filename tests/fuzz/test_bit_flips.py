"""Flipped bits and cut files: weights that load are the weights that were written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from dynamicvit import load, sparsify
from dynamicvit.io.folder import CONFIG, WEIGHTS
from dynamicvit.io.weights import read_weights
from tests.conftest import tiny_vit
from tests.fuzz.counts import counts


def _damage(content: bytes, numbers: random.Random) -> bytes:
    damaged = bytearray(content)
    if numbers.random() < 0.2:
        return bytes(damaged[: numbers.randrange(len(damaged))])
    # Headers are the more fragile part: half of the bits lie there.
    within = len(damaged) if numbers.random() < 0.5 else min(len(damaged), 3000)
    for _ in range(numbers.choice([1, 1, 1, 8])):
        damaged[numbers.randrange(within)] ^= 1 << numbers.randrange(8)
    return bytes(damaged)


@counts(few=40, many=300)
def test_a_damaged_folder_is_refused_or_a_model(count: int, tmp_path: Path) -> None:
    sparsify(tiny_vit(), 0.7).save_pretrained(tmp_path / "model")
    whole = {name: (tmp_path / "model" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    numbers = random.Random(0)
    refused = 0
    for _ in range(count):
        name = numbers.choice([CONFIG, WEIGHTS])
        (tmp_path / "model" / name).write_bytes(_damage(whole[name], numbers))
        try:
            model: Any = load(tmp_path / "model")
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path / "model") in str(error)
            refused += 1
        else:  # safetensors has no checksum: a value may be another, but none is not finite
            assert all(value.isfinite().all() for value in model.state_dict().values())
        (tmp_path / "model" / name).write_bytes(whole[name])
    assert refused >= count // 10


@counts(few=40, many=300)
def test_a_damaged_torch_file_is_refused_or_read(count: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": tiny_vit().state_dict(), "epoch": 3}, path)
    whole, expected = path.read_bytes(), read_weights(path)
    numbers = random.Random(1)
    for _ in range(count):
        path.write_bytes(_damage(whole, numbers))
        try:
            found = read_weights(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert all(isinstance(value, torch.Tensor) for value in found.values())
            assert len(found) <= len(expected)
