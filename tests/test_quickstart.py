from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dynamicvit
import dynamicvit.quickstart as quickstart_module
from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.class_names import renamed_classes
from dynamicvit.evaluation.timing import compare_speed
from dynamicvit.io.embedded import ASSETS
from dynamicvit.io.folder import save_folder
from dynamicvit.io.load import load_model
from dynamicvit.quickstart import quickstart, unpack_images
from tests.conftest import tiny_vit


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart_module, "compare_speed", partial(compare_speed, seconds=0.01))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_package_carries_images_and_a_model() -> None:
    assert _size(ASSETS / "images") < 4e6
    assert _size(ASSETS / "model") < 4e6
    assert "MIT License" in (ASSETS / "images" / "LICENSE").read_text()
    model: Any = load_model(ASSETS / "model")
    assert len(model.blocks) == 12
    assert model.patch_embed.grid_size == (14, 14)
    assert len(model.pretrained_cfg["label_names"]) == model.num_classes == 10


def test_embedded_images_unpack_to_an_image_folder(tmp_path: Path) -> None:
    folder = unpack_images(tmp_path / "data")
    for split, count in (("train", 600), ("val", 200)):
        classes = sorted(path.name for path in (folder / split).iterdir())
        assert len(classes) == 10
        assert classes[0] == "0 T-shirt-top"
        # Else the command trains a new head, or warns.
        assert renamed_classes(classes, load_model(str(ASSETS / "model"))) == []
        assert [len(list((folder / split / name).iterdir())) for name in classes] == [count] * 10
    with Image.open(folder / "val" / "7 Sneaker" / "000.png") as image:
        assert (image.size, image.mode) == ((28, 28), "L")
    stamp = folder / "val" / "7 Sneaker" / "000.png"
    before = stamp.stat().st_mtime_ns
    unpack_images(folder)
    assert stamp.stat().st_mtime_ns == before, "unpacked again without need"


def test_quickstart_on_the_user_s_own_data_and_model(
    images: Path,
    dense_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "quickstart"
    (output / "mine").mkdir(parents=True)
    options: dict[str, Any] = {"batch_size": 4, "device": "cpu"}
    for quiet in (True, False):  # it can be run again
        metrics = quickstart(str(output), str(images), str(dense_folder), quiet=quiet, **options)
        assert metrics["settings"]["train"]["device"] == "cpu"
        told = capsys.readouterr().out
        assert (told == "") == quiet
    # Every main number is there in full, also in 80 columns, and batch 1 is not hidden.
    assert "…" not in told
    for speed in metrics["speed"]:
        row = rf"{speed['batch_size']} +{speed['dense']:.0f} +{speed['sparse']:.0f} +"
        assert re.search(rf"{row}{speed['speed_up']:.2f}×", told)
    assert f"{metrics['speed'][0]['speed_up']:.2f}× at batch 1" in told
    assert json.loads((output / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert (output / "mine").exists(), "what is not a quickstart's stays"
    sparse = dynamicvit.load(output / "sparse")
    assert isinstance(sparse, SparseViT)
    assert metrics["sparse"]["tokens"] == (16, *sparse.schedule.counts(16))
    assert metrics["points_lost"] == metrics["dense"]["top1"] - metrics["sparse"]["top1"]
    assert metrics["gmacs_saved_percent"] > 10
    assert [speed["batch_size"] for speed in metrics["speed"]] == [1, 8, 32]
    with Image.open(output / "keep_maps.png") as picture:
        assert picture.width > 4 * 32


def test_quickstart_fits_a_head_first_where_classes_differ(
    images: Path,
    tmp_path: Path,
) -> None:
    save_folder(tiny_vit(num_classes=7), tmp_path / "seven")
    output = tmp_path / "quickstart"
    metrics = quickstart(str(output), str(images), str(tmp_path / "seven"), batch_size=4)
    assert metrics["settings"]["model"] == str(output / "sparse_run" / "dense" / "best")
    assert dynamicvit.load(output / "sparse").num_classes == 2


def test_quickstart_never_removes_what_it_did_not_write(
    images: Path,
    dense_folder: Path,
) -> None:
    """Not even with the data's own folder as output, nor a folder of the name of a run."""
    files = sorted(images.rglob("*.png"))
    quickstart(str(images), str(images), str(dense_folder), batch_size=4)
    assert sorted(images.rglob("*/*/*.png")) == files
    for file in ("config.yaml", "metrics.jsonl"):
        (images / "sparse_run" / file).unlink()
    with pytest.raises(ValueError, match="output has a sparse_run that no quickstart wrote"):
        quickstart(str(images), str(images), str(dense_folder), batch_size=4)
    assert (images / "sparse_run" / "checkpoints").exists()


def test_quickstart_refuses_bad_options_before_it_writes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_ratio must lie in \(0, 1\], got 2"):
        quickstart(str(tmp_path / "new"), keep_ratio=2)
    with pytest.raises(ValueError, match=r"device must be one of cpu.* here, got 'meta'"):
        quickstart(str(tmp_path / "new"), device="meta")
    assert not (tmp_path / "new").exists()


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data must be given with model, .*, got m alone"):
        quickstart(model="m")
    for options in ({"pretrained": False}, {"weights": "mine.pt"}):
        with pytest.raises(
            ValueError, match="model must be given with pretrained and weights, got"
        ):
            quickstart(**options)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output must be a folder, got .* is a file"):
        quickstart(str(tmp_path / "file"))


def test_quickstart_begins_with_other_weights_than_timm_s(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New ones, or those of a file: the model is written, and trained from there."""
    asked: list[tuple[Any, ...]] = []
    real = quickstart_module.load_model

    def load_model(name: str, pretrained: bool = True, **options: Any) -> Any:
        asked.append((name, pretrained, options))
        return tiny_vit(num_classes=2) if name == "some_vit" else real(name)

    monkeypatch.setattr(quickstart_module, "load_model", load_model)
    for options in ({"pretrained": False}, {"weights": "mine.pt"}):
        output = tmp_path / next(iter(options))
        metrics = quickstart(
            str(output), str(images), "some_vit", batch_size=4, quiet=True, **options
        )
        assert asked[-1] == (
            "some_vit",
            options.get("pretrained", True),
            {key: value for key, value in options.items() if key == "weights"},
        )
        assert not isinstance(real(output / "dense"), SparseViT)
        assert metrics["settings"]["model"] == str(output / "dense")
        assert metrics["settings"]["weights"] == options.get("weights")
