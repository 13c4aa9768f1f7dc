"""A budget that a command is given: --keep_ratio, --per_image, and calibrate before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dynamicvit
from dynamicvit import SparseViT, cli, sparsify
from dynamicvit.deploy.export import read_metadata
from dynamicvit.io.load import at_budget
from dynamicvit.views.demo_answers import Answers
from tests.conftest import CLASSES, tiny_vit


@pytest.fixture
def sparse_folder(tmp_path: Path) -> Path:
    sparsify(tiny_vit(num_classes=2), keep_ratio=0.7).save_pretrained(tmp_path / "sparse", CLASSES)
    return tmp_path / "sparse"


def _calibrate(folder: Path, images: Path) -> SparseViT:
    options = f"--data {images} --split train --keep_ratios [0.5,0.7,1.0] --workers 0 --device cpu"
    cli.main(["calibrate", str(folder), *options.split()])
    return dynamicvit.load(folder)


def test_calibrate_writes_into_the_folder(
    sparse_folder: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (sparse_folder / "model.safetensors").read_bytes()
    sparse = _calibrate(sparse_folder, images)
    assert (sparse_folder / "model.safetensors").read_bytes() == before
    assert sparse.calibration is not None
    assert sparse.calibration.keep_ratios == (0.5, 0.7, 1.0)
    assert sparse.levels is None
    assert sparse.schedule.ratios[0] == 0.7
    assert f"the calibration is in {sparse_folder}" in capsys.readouterr().out


def test_budgets_of_commands(sparse_folder: Path, images: Path, tmp_path: Path) -> None:
    """Each command's own figures say what was kept."""
    sparse = _calibrate(sparse_folder, images)
    name, data = str(sparse_folder), ["--data", str(images), "--workers", "0"]
    photo = str(images / "val" / "bright" / "00.png")
    budget = ["--keep_ratio", "0.6"]
    found = tmp_path / "found.json"
    counts = (16, *sparse.at(keep_ratio=0.6).schedule.counts(16))

    cli.main(["evaluate", name, *data, *budget, "--output", str(found)])
    row = json.loads(found.read_text())[name]
    assert tuple(row["tokens"]) == tuple(row["tokens_mean"]) == counts
    assert row["tokens_std"] == [0.0] * 4
    assert row["levels"] == []

    cli.main(["evaluate", name, *data, *budget, "--per_image", "--output", str(found)])
    row = json.loads(found.read_text())[name]
    assert [level["tokens"][1] for level in row["levels"]] == [8, 11, 16]
    assert sum(level["images"] for level in row["levels"]) == row["images"] == 8
    mean = sum(level["tokens"][1] * level["images"] for level in row["levels"]) / 8
    assert row["tokens_mean"][1] == pytest.approx(mean)
    right = sum(level["top1"] * level["images"] for level in row["levels"] if level["images"])
    assert right / 8 == pytest.approx(row["top1"])

    cli.main(["compare", name, *data, *budget, "--output", str(tmp_path / "compare")])
    assert (
        tuple(json.loads((tmp_path / "compare" / "compare.json").read_text())["tokens"]) == counts
    )

    explain = ["explain", photo, "--model", name, "--output", str(tmp_path / "explain")]
    cli.main([*explain, *budget, "--formats", "[npz]"])
    assert len(np.load(tmp_path / "explain" / "00.npz")["kept_1"]) == counts[1]

    cli.main(["predict", photo, "--model", name, *budget, "--output", str(found)])
    [[best]] = [row[:1] for row in json.loads(found.read_text()).values()]
    assert best["probability"] == pytest.approx(
        sparse.at(keep_ratio=0.6).predict(photo)[0].probability, abs=1e-6
    )

    cli.main(["export", name, str(tmp_path / "m.pt2"), *budget, "--per_image", "--samples", "1"])
    described = read_metadata(tmp_path / "m.pt2")
    assert tuple(described["kept_counts"]) == counts[1:]
    assert len(described["levels"]["counts"]) == 3

    bench = ["benchmark", name, *budget, "--engines", "[eager]", "--precisions", "[float32]"]
    cli.main([*bench, "--batch_sizes", "[1]", "--seconds", "0", "--output", str(found)])
    assert tuple(json.loads(found.read_text())["tokens"]) == counts

    page = tmp_path / "page.html"
    cli.main(["report", name, *data[:2], *budget, "--per_image", "--output", str(page)])
    text = page.read_text()
    assert "share of the calibration images" in text
    assert "level " in text


def test_the_demo_says_which_level_an_image_got(sparse_folder: Path, images: Path) -> None:
    _calibrate(sparse_folder, images)
    name = str(sparse_folder)
    answers = Answers([name], keep_ratio=0.6, per_image=True)
    assert answers.lowest == 0.5
    assert answers.models[name].schedule.ratios[0] == 0.6
    upload = {"path": str(images / "val" / "bright" / "00.png")}
    assert "of 3 patches" in answers.show(upload, name, 0.6).note
    plain = Answers([name])
    assert "of 3" not in plain.show(upload, name, 0.6).note


def test_an_explanation_says_which_level_an_image_got(sparse_folder: Path, images: Path) -> None:
    sparse = _calibrate(sparse_folder, images)
    photo = str(images / "val" / "bright" / "00.png")
    assert dynamicvit.explain(sparse, photo).level is None
    each = sparse.at(keep_ratio=0.6, per_image=True)
    assert each.levels is not None
    found = dynamicvit.explain(each, photo)
    assert found.level is not None
    number, count = found.level
    assert count == 3
    assert found.counts[1:] == each.levels.schedules[number - 1].counts(16)
    assert f"level {number} of 3" in repr(found)


def test_per_image_alone_has_the_model_s_own_mean(sparse_folder: Path, images: Path) -> None:
    sparse = _calibrate(sparse_folder, images)
    each = at_budget(sparse, "sparse", per_image=True)
    assert each.levels == sparse.at(keep_ratio=0.7, per_image=True).levels
    assert at_budget(sparse, "sparse") is sparse


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            "dense",
            {"keep_ratio": 0.5},
            "keep_ratio needs a sparse model, got the dense model",
        ),
        ("dense", {"per_image": True}, "per_image needs a sparse model, got the dense model it"),
        ("sparse", {"per_image": True}, "per_image needs `dynamicvit calibrate it` before, got"),
        ("sparse", {"keep_ratio": 2.0}, r"keep_ratio must lie in \(0, 1\], got 2.0"),
    ],
)
def test_budgets_that_do_not_fit(model: str, options: dict[str, Any], message: str) -> None:
    dense = tiny_vit()
    with pytest.raises(ValueError, match=message):
        at_budget(dense if model == "dense" else sparsify(dense), "it", **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dense", [], "model must be sparse, got the dense model"),
        ("owner/name", [], "model must be a folder, which is written to, got owner/name"),
        ("sparse", ["--keep_ratios", "[0.5]"], "keep_ratios must be 2 or more and growing"),
    ],
)
def test_calibrations_that_do_not_fit(
    name: str,
    options: list[str],
    message: str,
    sparse_folder: Path,
    dense_folder: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(sparse_folder.parent)
    with pytest.raises(SystemExit):
        cli.main(["calibrate", name, "--data", str(images), "--workers", "0", *options])
    assert message in capsys.readouterr().err
