from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynamicvit import sparsify
from dynamicvit.deploy.predict import predict_files
from dynamicvit.io import predictions as core
from dynamicvit.io.folder import save_folder
from dynamicvit.io.load import load_model
from tests.conftest import tiny_vit


@pytest.fixture
def files(images: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(images / "val" / "dark")
    return ["00.png", "01.png", "02.png"]


def test_each_image_gets_its_classes(
    files: list[str], dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "predictions.json"
    results = predict_files(files, str(dense_folder), top_k=9, output=str(output))
    assert list(results) == files
    assert json.loads(output.read_text()) == results
    expected = core.predict(load_model(dense_folder), files)
    for found, best in zip(results.values(), expected, strict=True):
        assert [item["name"] for item in found] == [item.name for item in best]
        assert {item["name"] for item in found} == {"bright", "dark"}
        assert found[0]["probability"] >= found[1]["probability"]
        assert set(found[0]) == {"name", "index", "probability"}
    printed = capsys.readouterr().out
    assert printed.endswith(f"the predictions are in {output}\n")
    for name, classes in results.items():
        shown = [item["name"] for item in classes]
        shown += [f"{100 * item['probability']:.1f}" for item in classes]
        assert any(all(text in line for text in (name, *shown)) for line in printed.splitlines())


def test_a_sparse_model_is_used_as_it_is(files: list[str], tmp_path: Path) -> None:
    sparse = sparsify(tiny_vit(), keep_ratio=0.5)
    sparse.save_pretrained(tmp_path / "sparse")
    [found] = predict_files(files[:1], str(tmp_path / "sparse"), top_k=1).values()
    assert found[0]["index"] == sparse.predict(files[0], 1)[0].index


@pytest.mark.parametrize(("dense", "sparse", "said"), [(1.0, 2.0, True), (2.0, 1.0, False)])
def test_a_faster_dense_model_is_named(
    dense: float,
    sparse: float,
    said: bool,
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interleave(calls: list[Any], batches: list[Any], **_: Any) -> list[tuple[float, ...]]:
        assert [len(batch) for batch in batches] == [3]
        assert len(calls) == 2
        return [(dense, sparse)] * 3

    monkeypatch.setattr("dynamicvit.deploy.predict.interleave", interleave)
    sparsify(tiny_vit(), keep_ratio=0.5).save_pretrained(tmp_path / "sparse")
    predict_files(files, str(tmp_path / "sparse"))
    assert ("the dense model is 2.00 times as fast here" in capsys.readouterr().out) == said


def test_names_are_printed_as_they_are(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Square brackets are markup to the table's library."""
    Path(files[0]).rename("[red]x.png")
    save_folder(tiny_vit(num_classes=2), tmp_path / "model", class_names=["[bold]", "[/i]"])
    predict_files(["[red]x.png"], str(tmp_path / "model"))
    text = capsys.readouterr().out
    assert all(name in text for name in ("[red]x.png", "[bold]", "[/i]"))


def test_the_suffix_says_what_is_written(
    files: list[str], dense_folder: Path, tmp_path: Path
) -> None:
    written = {
        suffix: tmp_path / f"predictions{suffix}" for suffix in (".json", ".jsonl", ".csv", ".CSV")
    }
    for output in written.values():
        results = predict_files(files[:2], str(dense_folder), output=str(output), quiet=True)
    assert json.loads(written[".json"].read_text()) == results
    lines = [json.loads(line) for line in written[".jsonl"].read_text().splitlines()]
    assert {line["image"]: line["predictions"] for line in lines} == results
    with written[".csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["rank"]) for row in rows] == [
        ("00.png", "1"),
        ("00.png", "2"),
        ("01.png", "1"),
        ("01.png", "2"),
    ]
    for row, item in zip(rows, results["00.png"], strict=False):
        assert (row["name"], int(row["index"])) == (item["name"], item["index"])
        assert float(row["probability"]) == item["probability"]
    assert written[".CSV"].read_bytes() == written[".csv"].read_bytes()
    for name in ("out.txt", "out"):
        with pytest.raises(ValueError, match=rf"output must end in \.json, .*got {name}"):
            predict_files(files, "nowhere", output=name)  # before a model is looked for


def test_folders_and_patterns_are_taken(images: Path, dense_folder: Path) -> None:
    (images / "val" / "notes.txt").write_text("no image")
    folder = predict_files([str(images / "val")], str(dense_folder), quiet=True)
    assert len(folder) == 8
    pattern = str(images / "val" / "*" / "*.png")
    assert list(predict_files([pattern], str(dense_folder))) == list(folder)
    both = [str(images / "val" / "dark"), str(images / "val" / "**" / "00.png")]
    assert len(predict_files(both, str(dense_folder), quiet=True)) == 5
    odd = images / "val" / "[1].png"
    (images / "val" / "dark" / "00.png").rename(odd)
    assert list(predict_files([str(odd)], str(dense_folder), quiet=True)) == [str(odd)]
    for nothing in (str(images / "*.png"), str(dense_folder)):
        with pytest.raises(ValueError, match="images must be files, folders or patterns, got none"):
            predict_files([nothing], str(dense_folder))


def test_unreadable_images_are_skipped_on_request(
    files: list[str], dense_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(files[1]).write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read image 01\.png"):
        predict_files(files, str(dense_folder))
    assert list(predict_files(files, str(dense_folder), skip_unreadable=True)) == [
        "00.png",
        "02.png",
    ]
    assert "unreadable images: 1: 01.png" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"none of the 1 images can be read: 01\.png"):
        predict_files(files[1:2], str(dense_folder), skip_unreadable=True)


def test_predict_names_what_is_wrong(files: list[str], dense_folder: Path) -> None:
    for device in ("warp", "meta", "cpu:x"):
        with pytest.raises(ValueError, match=f"device must be one of cpu.* here, got '{device}'"):
            predict_files(files, str(dense_folder), device=device)
    with pytest.raises(TypeError, match="images must be a list, each a string, got 'x'"):
        predict_files("x", str(dense_folder))  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_file_names_that_are_not_utf_8_are_taken(
    files: list[str], dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.rename(files[0], b"caf\xe9.png")
    output = tmp_path / "out.csv"
    results = predict_files(["."], str(dense_folder), top_k=1, output=str(output))
    assert os.path.join(".", os.fsdecode(b"caf\xe9.png")) in results
    assert b"./caf\xe9.png,1," in output.read_bytes()
    assert "caf\\xe9.png" in capsys.readouterr().out


def test_more_images_than_a_batch(
    files: list[str], dense_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{index}.bmp" for index in range(70)]
    for index, name in enumerate(names):
        Image.new("RGB", (32, 32), (3 * index, 0, 255 - 3 * index)).save(name)
    results = predict_files(names, str(dense_folder), top_k=2)
    assert list(results) == names
    expected = core.predict(load_model(dense_folder), names[-1])
    assert results[names[-1]][0]["probability"] == pytest.approx(expected[0].probability, abs=1e-5)
    printed = capsys.readouterr().out
    assert "20 more images" in printed
    assert max(map(len, printed.splitlines())) <= 80
