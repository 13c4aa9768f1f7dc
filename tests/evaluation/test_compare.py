from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import dynamicvit.evaluation.compare as compare_module
from dynamicvit import cli
from dynamicvit.core.model import sparsify
from dynamicvit.evaluation.compare import (
    Comparison,
    compare,
    compare_models,
    describe,
    draw_keep_rates,
)
from dynamicvit.io.load import load_model
from tests.conftest import CLASSES, tiny_vit, write_images


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("eva02_tiny_patch14_224", {}),
        ("lvvit_small", {"stem_width": 8, "patch_size": 16}),
    ],
)
def test_every_image_s_tokens_and_answers_are_counted(name: str, options: dict[str, Any]) -> None:
    dense = tiny_vit(name, img_size=(32, 64), num_classes=3, **options)
    model = sparsify(dense, 0.7)
    inputs, targets = torch.randn(9, 3, 32, 64), torch.tensor([0, 1, 0, 0, -1, 1, 1, 1, 0])
    loader: Any = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    found = compare_models(model, dense, loader, Accelerator(cpu=True))
    read = targets >= 0
    with torch.no_grad():
        output = model.pruned(inputs)
        assert found.dense.equal(dense(inputs).argmax(-1)[read])
    assert found.sparse.equal(output.logits.argmax(-1)[read])
    assert found.targets.equal(targets[read])
    rows, columns = found.kept.shape[-2:]
    assert columns == 2 * rows
    for label in range(3):
        expected = torch.stack([keep[targets == label].sum(0) for keep in output.keep])
        assert found.kept[label].flatten(1).equal(expected.long())


def _comparison() -> Comparison:
    """Of 6 images: class 0 loses one of three, class 1 wins one of three, class 2 has none."""
    kept = torch.zeros(3, 2, 1, 4, dtype=torch.int64)
    kept[0, 0], kept[1, 0] = torch.tensor([[3, 3, 0, 0]]), torch.tensor([[3, 0, 3, 0]])
    kept[:2, 1, 0, 1] = 3
    return Comparison(
        targets=torch.tensor([0, 0, 0, 1, 1, 1]),
        dense=torch.tensor([0, 0, 0, 1, 2, 0]),
        sparse=torch.tensor([0, 0, 2, 1, 2, 1]),
        kept=kept,
    )


def test_what_changed_is_told_class_by_class() -> None:
    found = describe(_comparison(), ["a", "b", "c"])
    assert found["images"] == 6
    assert found["dense_top1"] == found["sparse_top1"] == pytest.approx(100 * 4 / 6)
    assert (found["right_to_wrong"], found["wrong_to_right"], found["points_lost"]) == (1, 1, 0.0)
    assert found["agreement"] == pytest.approx(100 * 4 / 6)
    assert [row["name"] for row in found["classes"]] == ["a", "b"], "worst first, none of no image"
    assert [row["points_lost"] for row in found["classes"]] == pytest.approx([100 / 3, -100 / 3])
    assert sorted(map(tuple, (row.values() for row in found["confusion"]))) == [
        ("a", "b", 1, 0, 1),
        ("a", "c", 1, 1, 0),
    ]
    assert (found["tokens"], found["grid"]) == ([4, 2, 1], [1, 4])
    # Stage 1 keeps position 0 always and one of two others; stage 2 always the same.
    assert found["static_share"] == pytest.approx([75.0, 100.0])


def test_confusion_is_sorted_by_how_frequent_it_is() -> None:
    dense = torch.tensor([0, 1, 1, 2, 2, 2])
    sparse = torch.tensor([0, 0, 0, 0, 0, 0])
    both = Comparison(dense, dense, sparse, torch.ones(3, 1, 1, 1, dtype=torch.int64) * 2)
    rows = describe(both, ["a", "b", "c"])["confusion"]
    assert rows == [
        {"dense": "c", "sparse": "a", "images": 3, "dense_right": 3, "sparse_right": 0},
        {"dense": "b", "sparse": "a", "images": 2, "dense_right": 2, "sparse_right": 0},
    ]


def test_of_many_classes_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "_CLASSES_DRAWN", 2)
    sizes = []
    for classes in (1, 2, 3):
        targets = torch.arange(classes)
        kept = torch.randint(2, (classes, 1, 2, 4))
        both = Comparison(targets, targets, targets, kept)
        picture = draw_keep_rates(both, [f"class {index}" for index in range(classes)])
        with Image.open(io.BytesIO(picture)) as image:
            sizes.append(image.size)
    assert sizes[0] < sizes[1] == sizes[2]


def test_compare_from_the_command_line(
    images: Path, dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse, output = tmp_path / "sparse", tmp_path / "out" / "compare"
    sparsify(load_model(dense_folder), 0.7).save_pretrained(sparse)
    (images / "val" / "dark" / "00.png").write_text("not an image")
    arguments = [str(sparse), "--data", str(images), "--dense", str(dense_folder), "--workers=0"]
    assert cli.main(["compare", *arguments, "--skip-unreadable", "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "compare.json",
        "keep_maps.npz",
        "keep_maps.png",
    ]
    result = json.loads((output / "compare.json").read_text())
    assert (result["images"], result["unreadable"], result["tokens"]) == (7, 1, [16, 11, 7, 5])
    with np.load(output / "keep_maps.npz", allow_pickle=False) as arrays:
        assert arrays["keep"].shape == (3, 4, 4)
        assert arrays["keep"].sum(axis=(1, 2)) == pytest.approx([11, 7, 5], rel=1e-6)
        assert arrays["images_by_class"].tolist() == [4, 3]
        weighted = (arrays["keep_by_class"] * np.array([4, 3]).reshape(2, 1, 1, 1)).sum(0) / 7
        assert weighted == pytest.approx(arrays["keep"])
        assert tuple(arrays["class_names"]) == CLASSES
        right = (arrays["sparse"] == arrays["targets"]).mean()
        assert result["sparse_top1"] == pytest.approx(100 * right)
    with Image.open(output / "keep_maps.png") as picture:
        assert np.unique(np.asarray(picture.convert("L"))).size > 10
    printed = capsys.readouterr().out
    assert "7 images. Top-1" in printed
    assert printed.endswith(f" {output}\n")


@pytest.mark.parametrize(("count", "shown"), [(6, 6), (12, 12), (13, 10)])
def test_the_class_table_shows_every_class_it_has_room_for(
    count: int, shown: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tuple(f"kind-{index:02}" for index in range(count))
    data = write_images(tmp_path / "data", {"val": 1}, names)
    sparsify(tiny_vit(num_classes=count), 0.7).save_pretrained(tmp_path / "sparse", names)
    compare(str(tmp_path / "sparse"), str(data), workers=0, output=str(tmp_path / "out"))
    text, _, _ = capsys.readouterr().out.rpartition("all figures")
    table = text.partition("points lost: ")[0]
    assert sum(name in table for name in names) == shown
    assert (f"{count - shown} more classes are in" in text) == (shown < count)
    assert max(map(len, text.splitlines())) <= 80


def test_compare_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_vit()
    model = sparsify(dense, 0.7)
    pruned = model.pruned
    monkeypatch.setattr(model, "pruned", lambda images: pruned(images)._replace(keep=()))
    batch: Any = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="must choose tokens, not merge them, got TokenScorer"):
        compare_models(model, dense, batch, Accelerator(cpu=True))
    with pytest.raises(ValueError, match="gave no images"):
        compare_models(model, dense, [], Accelerator(cpu=True))
    monkeypatch.undo()
    batch = [(torch.randn(1, 3, 32, 32), torch.tensor([5]))]
    with pytest.raises(ValueError, match=r"data must have class indices below 5, .* got 5"):
        compare_models(model, dense, batch, Accelerator(cpu=True))
