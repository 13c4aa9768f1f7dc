from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamicvit import load, sparsify
from dynamicvit.deploy.predict import predict
from dynamicvit.io import predictions as core
from dynamicvit.io.folder import save_folder
from tests.conftest import tiny_vit


@pytest.fixture
def files(images: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(images / "val" / "dark")
    return ["00.png", "01.png", "02.png"]


def test_each_image_gets_its_classes(
    files: list[str], dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "predictions.json"
    results = predict(files, str(dense_folder), top_k=9, output=str(output))
    assert list(results) == files
    assert json.loads(output.read_text()) == results
    expected = core.predict(load(dense_folder), files)
    for found, best in zip(results.values(), expected, strict=True):
        assert [item["name"] for item in found] == [item.name for item in best]
        assert {item["name"] for item in found} == {"bright", "dark"}
        assert found[0]["probability"] >= found[1]["probability"]
        assert set(found[0]) == {"name", "index", "probability"}
    printed = capsys.readouterr().out
    for name, classes in results.items():
        shown = [f"{item['name']} {100 * item['probability']:.1f}%" for item in classes]
        assert any(all(text in line for text in (name, *shown)) for line in printed.splitlines())


def test_a_sparse_model_is_used_as_it_is(files: list[str], tmp_path: Path) -> None:
    sparse = sparsify(tiny_vit(), keep_ratio=0.5)
    sparse.save_pretrained(tmp_path / "sparse")
    [found] = predict(files[:1], str(tmp_path / "sparse"), top_k=1).values()
    assert found[0]["index"] == sparse.predict(files[0], 1)[0].index


def test_names_are_printed_as_they_are(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Square brackets are markup to the table's library."""
    Path(files[0]).rename("[red]x.png")
    save_folder(tiny_vit(num_classes=2), tmp_path / "model", class_names=["[bold]", "[/i]"])
    predict(["[red]x.png"], str(tmp_path / "model"))
    text = capsys.readouterr().out
    assert all(name in text for name in ("[red]x.png", "[bold]", "[/i]"))
