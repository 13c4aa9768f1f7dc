from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import dynamicvit
from dynamicvit import KeepSchedule, cli
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.evaluation.compare import compare
from dynamicvit.evaluation.evaluate import Change, evaluate
from dynamicvit.evaluation.sweep import (
    Point,
    choose,
    evaluate_schedules,
    list_schedules,
    sweep,
)
from dynamicvit.io.folder import save_folder
from dynamicvit.io.load import load_model
from tests.conftest import CLASSES, tiny_vit


@pytest.fixture
def sparse_folder(dense_folder: Path, tmp_path: Path) -> Path:
    sparsify(load_model(dense_folder), 0.7).save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        # Of 16 patches; the model's own schedule comes first, and nothing twice.
        ({}, [(11, 7, 5), (14, 12, 11), (12, 10, 8), (9, 5, 3), (8, 4, 2)]),
        ({"keep_ratios": [0.7, 0.701, 1.0]}, [(11, 7, 5), (16, 16, 16)]),
        ({"keep_ratios": []}, [(11, 7, 5)]),
        ({"ratios": [[0.5, 0.5, 0.25]]}, [(11, 7, 5), (8, 8, 4)]),
        ({"blocks": [[1, 3]], "keep_ratios": [0.5]}, [(11, 7, 5), (8, 4)]),
        ({"blocks": [[1], [1, 2]], "ratios": [[0.5, 0.25], [0.75]]}, [(11, 7, 5), (12,), (8, 4)]),
        ({"blocks": [[1, 2], [1, 3]], "keep_ratios": [0.5]}, [(11, 7, 5), (8, 4), (8, 4)]),
    ],
)
def test_the_grid(options: dict[str, Any], counts: list[tuple[int, ...]]) -> None:
    model = sparsify(tiny_vit(), 0.7)
    assert [schedule.counts(16) for schedule in list_schedules(model, **options)] == counts


def test_the_usual_ratios_leave_a_token() -> None:
    model = sparsify(tiny_vit(img_size=16), 1.0)  # of 4 patches half, thrice, would leave none
    counts = [schedule.counts(4) for schedule in list_schedules(model)]
    assert counts == [(4, 4, 4), (3, 3, 2), (3, 2, 2), (2, 1, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratios": [0.7, 1.5]}, r"keep_ratios must lie in \(0, 1\], got 1.5"),
        ({"keep_ratios": [0.0]}, r"keep_ratios must lie in \(0, 1\], got 0.0"),
        ({"keep_ratios": [0.1]}, "ratios must leave at least one of the 16 patch tokens"),
        ({"ratios": [[0.5, 0.9, 0.2]]}, "ratios must not grow"),
        (
            {"ratios": [[0.5]]},
            r"ratios must be one a stage for blocks \[\(1, 2, 3\)\], got \[0.5\]",
        ),
        ({"blocks": [[0, 9, 10]]}, "blocks must be below the backbone's depth of 4"),
        ({"blocks": [[0]]}, r"blocks among \(1, 2, 3\)"),
    ],
)
def test_a_grid_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_schedules(sparsify(tiny_vit(), 0.7), **options)


def test_schedules_are_evaluated_as_the_models_they_make() -> None:
    dense = tiny_vit(num_classes=3, img_size=(16, 48))
    model = sparsify(dense, 0.7)
    schedules = list_schedules(model, [0.9, 0.5])
    inputs, targets = torch.randn(30, 3, 16, 48), torch.arange(30) % 3
    loader: Any = [(inputs[:20], targets[:20]), (inputs[20:], targets[20:])]
    targets[7] = -1  # could not be read
    images, top1, points = evaluate_schedules(
        model, dense, schedules, loader, Accelerator(cpu=True)
    )
    read = targets >= 0
    with torch.no_grad():
        before = (dense(inputs).argmax(-1) == targets)[read]
        assert (images, top1) == (29, pytest.approx(100 * before.float().mean().item()))
        assert sorted(points, key=lambda point: -point.gmacs) == points
        for point in points:
            one = SparseViT(model.backbone, point.schedule, list(model.scorers))
            after = (one(inputs).argmax(-1) == targets)[read]
            assert point.tokens == (12, *point.schedule.counts(12))
            assert point.gmacs == dynamicvit.count_gmacs(one, (3, 16, 48))
            assert point.top1 == pytest.approx(100 * after.float().mean().item())
            assert point.change.points_lost == pytest.approx(top1 - point.top1)
            assert point.change.right_to_wrong == (before & ~after).sum()
    for point in points:
        better = [o for o in points if o.gmacs < point.gmacs and o.top1 >= point.top1]
        assert point.frontier == (not better)


def _point(gmacs: float, lost: float, upper: float) -> Point:
    change = Change(lost, (-upper, upper), 0, 0)
    return Point(KeepSchedule((1,), (0.5,)), (16, 8), gmacs, 90.0 - lost, change)


@pytest.mark.parametrize(
    ("budget", "gmacs"),
    [
        ({"max_loss": 0.5}, 2.0),
        ({"max_loss": 0.4}, 3.0),
        ({"max_loss": 0.5, "sure": True}, 4.0),
        ({"max_loss": 0.05, "sure": True}, None),
        ({"max_loss": 9.0}, 1.0),
        ({"max_gmacs": 3.5}, 3.0),
        ({"max_gmacs": 2.0}, 2.0),
        ({"max_gmacs": 0.5}, None),
    ],
)
def test_the_point_to_use(budget: dict[str, Any], gmacs: float | None) -> None:
    points = [_point(4.0, 0.0, 0.4), _point(3.0, 0.3, 0.9), _point(2.0, 0.5, 1), _point(1.0, 2, 3)]
    chosen = choose(points, **budget)
    assert (chosen and chosen.gmacs) == gmacs
    with pytest.raises(ValueError, match="give max_loss or max_gmacs, got neither"):
        choose(points)


def test_sweep_from_the_command_line(
    images: Path,
    sparse_folder: Path,
    dense_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, best = tmp_path / "out" / "sweep.json", tmp_path / "best"
    arguments = [str(sparse_folder), "--data", str(images), "--dense", str(dense_folder)]
    arguments += ["--keep-ratios", "[0.5]", "--max-loss", "100", "--workers", "0"]
    arguments += ["--seconds", "0.001", "--batch-size", "3"]
    assert cli.main(["sweep", *arguments, "--output", str(output), "--save", str(best)]) == 0
    result = json.loads(output.read_text())
    assert [point["tokens"] for point in result["points"]] == [[16, 11, 7, 5], [16, 8, 4, 2]]
    assert result["recommended"] == result["points"][1]
    assert [point["trained"] for point in result["points"]] == [True, False]
    assert all(point["speed"]["sparse"] > 0 for point in result["points"])
    assert result["environment"]["torch"] == torch.__version__
    assert result["crop_pct"] is None
    printed = capsys.readouterr().out
    assert printed.endswith(f"the results are in {output}\nthe recommended model is in {best}\n")
    text = " ".join(printed.split())
    assert "at most 100 points lost: keep 0.5" in text
    assert "dense: top-1" in text
    # evaluate finds the same for the model that was saved, for the given one and for the dense one.
    found = evaluate([str(best), str(sparse_folder), str(dense_folder)], str(images), workers=0)
    point, given, dense = result["recommended"], result["points"][0], result["dense"]
    for seen, name in ((point, best), (given, sparse_folder), (dense, dense_folder)):
        assert (seen["top1"], seen["gmacs"]) == tuple(
            found[str(name)][k] for k in ("top1", "gmacs")
        )
    assert result["images"] == found[str(best)]["images"] == 8


def test_random_selection_draws_the_same_each_time(images: Path, tmp_path: Path) -> None:
    model = str(tmp_path / "random")
    sparsify(tiny_vit(num_classes=2), 0.5, scorer="random").save_pretrained(model)
    found = [sweep(model, str(images), workers=0, crop_pct=1.0)["points"] for _ in range(2)]
    assert found[0] == found[1]
    maps = []
    for name in ("one", "other"):
        compare(model, str(images), workers=0, crop_pct=1.0, output=str(tmp_path / name))
        with np.load(tmp_path / name / "keep_maps.npz", allow_pickle=False) as arrays:
            maps.append(arrays["keep"])
    assert np.array_equal(*maps)


def test_few_images_are_said_to_be_few(
    images: Path, sparse_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = partial(sweep, str(sparse_folder), str(images), workers=0, keep_ratios=[])
    # Whatever 8 images show, they cannot make sure of half a point: 95% confidence takes hundreds.
    result = run(max_loss=99.0)
    assert result["recommended"]["change"]["interval"][1] > 5
    printed = " ".join(capsys.readouterr().out.split())
    assert "8 images are too few" not in printed
    assert "dense (the model's own backbone with all tokens; --dense: another): top-1" in printed
    loss = result["points"][0]["change"]["points_lost"]
    run(max_loss=max(loss, 0.0))
    assert "8 images are too few to be sure" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="save needs a schedule within the budget"):
        run(max_loss=0.5, sure=True, save=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    assert run(max_gmacs=1e-9, output=str(tmp_path / "none.json"))["recommended"] is None
    assert json.loads((tmp_path / "none.json").read_text())["recommended"] is None


def test_sweep_names_what_is_wrong(
    images: Path, dense_folder: Path, sparse_folder: Path, tmp_path: Path
) -> None:
    data = str(images)
    file = tmp_path / "file"
    file.touch()
    for save in (file, file / "in"):
        with pytest.raises(ValueError, match=f"save must be a folder, got {save}, and {file} is a"):
            sweep(str(sparse_folder), data, save=str(save))
        with pytest.raises(ValueError, match=f"output must be a folder, got {save}, and {file} is"):
            compare(str(sparse_folder), data, output=str(save))
    for command in (sweep, lambda model, *rest, **options: evaluate([model], *rest, **options)):
        run = cast(Any, command)
        with pytest.raises(ValueError, match=f"output must be a file, got the folder {tmp_path}"):
            run("nowhere", data, output=str(tmp_path))
        with pytest.raises(ValueError, match=f"the folder of output must be a folder, got {file},"):
            run("nowhere", data, output=str(file / "in"))
        with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
            run("nowhere", data, batch_size=0)  # before any model is looked for
    other = tmp_path / "other"
    save_folder(tiny_vit(num_classes=2, img_size=16), other)
    reverse = tmp_path / "reverse"
    save_folder(tiny_vit(num_classes=2), reverse, class_names=CLASSES[::-1])
    three = tmp_path / "three"
    sparsify(tiny_vit(num_classes=3), 0.7).save_pretrained(three)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (dense_folder, {}, "model must be sparse, got the dense model"),
        (tmp_path / "nowhere", {}, "no model folder at"),
        (three, {}, "data must have the 3 classes of .*, got 2: bright, dark"),
        (sparse_folder, {"data": "nowhere"}, "data must be a folder .*got nowhere"),
        (sparse_folder, {"precision": "fp8"}, "precision must be"),
        (sparse_folder, {"dense": str(sparse_folder)}, "dense must be a dense model, got"),
        (sparse_folder, {"dense": str(other)}, r"dense must have the input_size .*\(3, 16, 16\)"),
        (sparse_folder, {"dense": str(reverse)}, "dense must have its classes in the order"),
        (three, {"dense": str(dense_folder)}, "dense must have the 3 classes of .*, got 2"),
        (sparse_folder, {"max_loss": 1, "max_gmacs": 1}, "not both, got 1 and 1"),
        (sparse_folder, {"max_loss": -1}, "max_loss must be 0 or more, got -1"),
        (sparse_folder, {"max_gmacs": 0}, "max_gmacs must be above 0, got 0"),
        (sparse_folder, {"max_gmacs": 1, "sure": True}, "sure goes with max_loss"),
        (sparse_folder, {"seconds": -1}, "seconds must be 0 or more, got -1"),
        (sparse_folder, {"keep_ratios": [2.0]}, r"keep_ratios must lie in \(0, 1\], got 2.0"),
    ]
    for name, options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            sweep(str(name), **{"data": data, "workers": 0, **options})


def test_points_are_told_apart_by_what_they_are() -> None:
    """The recommended row is found by equality."""
    one = _point(1.0, 0.5, 1.0)
    assert one == replace(one)
    assert one != replace(one, gmacs=2.0)


def test_points_lost_are_printed_with_the_sign_that_compare_has(
    images: Path, sparse_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sweep(str(sparse_folder), str(images), workers=0, seconds=1e-3)
    text = capsys.readouterr().out
    assert "points lost" in text
    for point in found["points"]:
        low, high = point["change"]["interval"]
        row = f"{point['change']['points_lost']:.2f} ({low:.1f} to {high:.1f})"
        assert any(f"{point['top1']:.2f}" in line and row in line for line in text.splitlines())
    assert "0.7 (trained)" in text
    assert "0.8" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
