"""One file with a budget for each image."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dynamicvit import SparseViT
from dynamicvit.deploy import runtime
from dynamicvit.deploy.export import FORMATS, export_model, read_metadata
from tests.conftest import write_images
from tests.deploy.test_export import _page_code, _two_stages

RATIOS = (0.4, 0.7, 1.0)


def _images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    contrast = torch.linspace(0.1, 2.0, count).view(-1, 1, 1, 1)
    return contrast * torch.randn(count, 3, 32, 32, generator=generator)


def _each(**options: Any) -> SparseViT:
    """A model of which images get each of the three levels."""
    sparse: SparseViT = _two_stages(**options).eval()
    calibration = sparse.calibrate(_images(24), RATIOS)
    # Losses for which the middle level is best in the middle.
    losses = [(0.0, 0.0, 0.0)] * 8 + [(1.0, 0.0, 0.0)] * 8 + [(2.0, 1.0, 0.0)] * 8
    sparse.calibration = calibration._replace(losses=tuple(losses))
    return sparse.at(keep_ratio=0.75, per_image=True)


@torch.no_grad()
def _check(each: SparseViT, path: Path, atol: float = 1e-3) -> None:
    run = runtime.PerImage(str(path))
    assert each.levels is not None
    for images in (_images(24), _images(24)[:1], _images(24).flip(0)[:5]):
        logits, levels = run(images.numpy())
        expected, expected_levels = each.forward_levels(images)
        np.testing.assert_array_equal(levels, expected_levels)
        np.testing.assert_allclose(logits, expected, atol=atol)
    assert len(set(run(_images(24).numpy())[1])) == 3


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize(
    "options",
    [{}, {"name": "eva02_tiny_patch14_224"}, {"squeeze": True, "reg_tokens": 2}],
    ids=["vit", "eva", "squeezed"],
)
def test_files_give_each_image_what_the_model_gives(
    options: dict[str, Any], format: str, tmp_path: Path
) -> None:
    each = _each(**options)
    path = tmp_path / f"model{FORMATS[format][0]}"
    export_model(each, path, samples=5)
    described = read_metadata(path)["levels"]
    assert each.levels is not None
    assert described["bounds"] == list(each.levels.bounds)
    assert described["counts"] == [[6, 2], [11, 7], [16, 16]]
    _check(each, path)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_int8_files_are_cut_too(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{FORMATS[format][0]}"
    photos = write_images(tmp_path / "photos", {"train": 4})
    each = _each()
    export_model(each, path, precision="int8", images=str(photos), samples=5)
    logits, levels = runtime.PerImage(str(path))(_images(24).numpy())
    assert np.isfinite(logits).all()
    with torch.no_grad():
        expected, expected_levels = each.forward_levels(_images(24))
    assert (levels == expected_levels.numpy()).mean() > 0.7
    assert np.abs(logits - expected.numpy()).mean() < 0.2 * np.abs(expected.numpy()).max()


def test_the_page_runs_without_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of runtime.py, beside the program."""
    shutil.copy(runtime.__file__, tmp_path)
    text = (tmp_path / "runtime.py").read_text()
    assert "import dynamicvit" not in text
    assert "from dynamicvit" not in text
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "runtime", raising=False)
    each = _each()
    export_model(each, "model.onnx", samples=1)
    Image.effect_noise((40, 50), 90).convert("RGB").save("photo.jpg")
    first, *_, last = _page_code()
    scope: dict[str, Any] = {}
    exec(first + last, scope)
    monkeypatch.delitem(sys.modules, "runtime")
    expected = {item.index: item.probability for item in each.predict("photo.jpg")}
    odds = np.exp(scope["logits"])
    for row in odds / odds.sum(axis=1, keepdims=True):
        for index, probability in expected.items():
            assert row[index] == pytest.approx(probability, abs=1e-3)


def test_a_signal_after_openvino_s_models_ended_is_handled(tmp_path: Path) -> None:
    """On processors with AMX it ended the process (docs/openvino-signal-stack.md)."""
    path = tmp_path / "model.xml"
    export_model(_two_stages(), path, quiet=True)
    script = f"""
import signal, subprocess
from pathlib import Path
from dynamicvit.deploy.formats import LOADERS
one, other = (LOADERS["openvino"](Path({str(path)!r}), "float32") for _ in range(2))
del one
del other
signal.signal(signal.SIGCHLD, lambda *_: None)
for _ in range(20):
    subprocess.run(["true"], check=True)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_files_with_one_budget_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_model(_two_stages(), path, samples=1)
    with pytest.raises(ValueError, match="path must be a file of a model with per_image=True, got"):
        runtime.PerImage(str(path))
