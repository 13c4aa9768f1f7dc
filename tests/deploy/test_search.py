from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynamicvit
from dynamicvit import KeepSchedule, UnsupportedBackbone, cli
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.deploy import search as search_module
from dynamicvit.deploy.candidates import choose_rules, list_schedules
from dynamicvit.deploy.search import search
from dynamicvit.deploy.search_data import search_data
from dynamicvit.deploy.search_result import Point, Search
from dynamicvit.evaluation.accuracy import Change
from dynamicvit.evaluation.evaluate import evaluate
from dynamicvit.evaluation.timing import Speed
from dynamicvit.io.folder import save_folder
from dynamicvit.io.load import load_model
from tests.conftest import CLASSES, tiny_vit


@pytest.fixture
def sparse_folder(dense_folder: Path, tmp_path: Path) -> Path:
    sparsify(load_model(dense_folder), 0.7).save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# A tiny model gains no time, so what is measured is replaced where the speed matters.
def _twice_as_fast(models: Any, *_: Any) -> list[Speed]:
    return [Speed(1, 100.0, 200.0 + n, 2.0 + n, (1.9, 2.1)) for n in range(len(models) - 1)]


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
def test_a_grid_that_cannot_be(options: dict[str, Any], message: str, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        search(sparsify(tiny_vit(), 0.7), pixels, quiet=True, **options)


def _point(gmacs: float, lost: float, upper: float, speed_up: float | None = None) -> Point:
    change = Change(lost, (-upper, upper), 0, 0)
    speed = None if speed_up is None else Speed(1, 1.0, speed_up, speed_up, (speed_up, speed_up))
    schedule = KeepSchedule((1,), (0.5,))
    agreement = 1 - lost / 100
    return Point("a", schedule, "pooling", False, False, False, (16, 8), gmacs, agreement,
                 90 - lost, change, False, speed)  # fmt: skip


def _result(**changes: Any) -> Search:
    points = (
        _point(4.0, 0.0, 0.4, 1.2),
        _point(3.0, 0.3, 0.9, 1.5),
        _point(2.0, 0.5, 1, 1.4),
        _point(1.0, 2, 3, 0.9),
        _point(0.5, 0.1, 3),  # not timed
    )
    dense = {"model": None, "top1": 90.0, "gmacs": 5.0}
    constraint = {"max_loss": 0.5, "min_agreement": None, "sure": False}
    found = Search(points, dense, 99, 9, "latency", "eager", "float32", 1, constraint)
    return replace(found, **changes)


@pytest.mark.parametrize(
    ("objective", "constraint", "gmacs"),
    [
        ("latency", {}, 3.0),
        ("latency", {"max_loss": 0.2}, 4.0),
        ("latency", {"max_loss": 0.9, "sure": True}, 3.0),
        ("latency", {"max_loss": 0.3, "sure": True}, None),
        ("latency", {"min_agreement": 0.999}, 4.0),
        ("gmacs", {}, 0.5),
        ("gmacs", {"max_loss": 0.9, "sure": True}, 3.0),
        ("gmacs", {"min_agreement": 1.0}, 4.0),
        ("gmacs", {"max_loss": 0.3, "sure": True}, None),
    ],
)
def test_it_is_asked_again(objective: str, constraint: dict[str, Any], gmacs: float | None) -> None:
    found = _result(objective=objective).recommend(**constraint)
    best = found.recommended
    assert (best and best.gmacs) == gmacs
    assert ("than the dense model" in str(found)) == (best is None)
    if best is None:
        with pytest.raises(ValueError, match="there is no model to build or save: nothing with"):
            found.save("nowhere")


def test_what_is_slower_or_dearer_than_dense_is_not_recommended() -> None:
    slow = tuple(replace(point, speed=None, gmacs=9.0) for point in _result().points)
    for objective in ("latency", "gmacs"):
        assert _result(points=slow, objective=objective).recommended is None


def test_the_last_line_says_what_was_gained() -> None:
    lines = str(_result()).splitlines()
    assert re.findall(r"[\d.]+[×%]?", lines[-1]) == ["0.30", "1.50×", "40%"]
    assert re.findall(r"[\d.]+", lines[-2]) == ["99", "0.90"], "what it may lose"
    unsure = len(lines) - 1
    assert len(str(_result().recommend(max_loss=1.0)).splitlines()) == unsure
    again = str(_result(objective="gmacs").recommend(min_agreement=0.995)).splitlines()[-1]
    assert re.findall(r"[\d.]+[×%]?", again) == ["99.90%", "90%"]


def test_a_dense_model_is_searched_without_training(pixels: Tensor, tmp_path: Path) -> None:
    dense = tiny_vit()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    dense.train()
    with torch.no_grad():
        labels = tiny_vit()(pixels).argmax(1)
    batches = list(pixels.split(7))
    found = search(dense, batches, labels.tolist(), max_loss=20, objective="gmacs", quiet=True)
    assert dense.training
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert (found.images, found.chosen_on, found.dense["top1"]) == (20, 20, 100.0)
    assert {point.scorer for point in found.points} > {"class_attention"}
    assert all(point.squeeze == (point.scorer == "class_attention") for point in found.points)
    assert list(found.points) == sorted(found.points, key=lambda point: -point.gmacs)
    judging = torch.ones(40, dtype=torch.bool)
    judging[::2] = False
    dense.eval()
    for point in found.points:
        with torch.no_grad():
            answers = found.build(point)(pixels[judging]).argmax(1)
        right = (answers == labels[judging]).float().mean().item()
        assert point.agreement == pytest.approx(right)  # the dense answers are the labels
        assert point.top1 == pytest.approx(100 * right)
        assert point.change is not None
        assert point.change.points_lost == pytest.approx(100 - 100 * right)
        assert point.gmacs == dynamicvit.count_gmacs(found.build(point), (3, 32, 32))
        better = [o for o in found.points if o.gmacs < point.gmacs and o.quality >= point.quality]
        assert not (point.frontier and better)
    assert found.frontier
    assert found.recommended is not None
    found.save(tmp_path / "saved")
    with torch.no_grad():
        expected, saved = found.build()(pixels), dynamicvit.load(tmp_path / "saved")(pixels)
    assert torch.equal(expected, saved)
    loaded = dynamicvit.load(tmp_path / "saved")
    again = replace(found, model=loaded)
    with pytest.raises(ValueError, match=r"folder must not be the one .*from, got .*saved"):
        again.save(tmp_path / "saved")


def test_reductions_in_every_block_and_refined_stages_are_tried(pixels: Tensor) -> None:
    tried: list[KeepSchedule] = []
    original = SparseViT.__init__

    def record(self: SparseViT, backbone: nn.Module, schedule: KeepSchedule, *rest: Any) -> None:
        tried.append(schedule)
        original(self, backbone, schedule, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(SparseViT, "__init__", record)
        choose_rules(tiny_vit(depth=6), pixels, 0.5, "eager", quiet=True)
    assert {len(schedule.blocks) for schedule in tried} == {3, 5}
    usual = KeepSchedule.from_keep_ratio(0.5, 6)
    steps = {schedule.ratios[0] for schedule in tried if schedule.blocks == usual.blocks}
    assert len(steps) > 7  # more than the grid has


def test_selectors_that_do_not_fit_are_left_out(pixels: Tensor) -> None:
    model = tiny_vit(class_token=False, global_pool="avg")
    found = search(model, pixels, min_agreement=0.1, objective="gmacs", quiet=True)
    assert {point.scorer for point in found.points} == {"pooling"}
    with torch.no_grad():
        files = choose_rules(tiny_vit(), pixels, 0.2, "onnx", quiet=True)
    assert {point.scorer for point in files} == {"class_attention"}  # merging is not exported


def test_a_sparse_model_is_searched_over_its_budgets(pixels: Tensor, tmp_path: Path) -> None:
    model = sparsify(tiny_vit(), 0.7).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "_time", _twice_as_fast)
        found = search(model, pixels, min_agreement=0.01, quiet=True)
    assert model.calibration is None  # the caller's stays as it is
    assert (found.images, found.chosen_on) == (30, 10)
    assert found.dense["top1"] is None
    assert sum(point.own for point in found.points) == 1
    own = [point for point in found.points if point.per_image]
    assert own
    assert all(point.name.endswith("per image") for point in own)
    assert all(point.tokens[0] == 16 and point.change is None for point in own)
    for point in (own[0], next(point for point in found.points if not point.per_image)):
        chosen = replace(found, points=(replace(point, speed=Speed(1, 1, 2, 2.0, (2, 2))),))
        chosen.save(tmp_path / point.name)
        saved = dynamicvit.load(tmp_path / point.name)
        assert (saved.levels is not None) == point.per_image
        with torch.no_grad():
            assert torch.equal(saved(pixels), chosen.build()(pixels))
    # No image serves twice, and where none needs to be set apart, all judge.
    plain = search(model, pixels, objective="gmacs", engine="compile", quiet=True)
    assert (plain.images, plain.chosen_on) == (40, 0)
    assert not any(point.per_image for point in plain.points)


def test_the_mean_cost_of_images_with_their_own_budgets(pixels: Tensor) -> None:
    model = sparsify(tiny_vit(), 0.7).eval()
    model.calibrate(pixels, [0.5, 0.7, 1.0])
    found = search(model, pixels, objective="gmacs", keep_ratios=[0.7], quiet=True)
    [point] = [point for point in found.points if point.per_image]
    assert found.chosen_on == 0  # it came calibrated
    fixed = next(point for point in found.points if not point.per_image)
    assert point.gmacs == pytest.approx(fixed.gmacs, rel=0.06)  # 40 images: one is 2.5% of them
    with torch.no_grad():
        keep = model.at(keep_ratio=0.7, per_image=True).pruned(pixels).keep
    assert point.tokens == pytest.approx((16, *(float(mask.sum(1).mean()) for mask in keep)))


def test_few_are_timed_with_the_engine_that_was_asked_for(pixels: Tensor) -> None:
    model = sparsify(tiny_vit(), 0.7).eval()
    options: dict[str, Any] = {"batch_size": 3, "seconds": 0, "keep_ratios": [0.5], "quiet": True}
    found = search(model, pixels, engine="eager", **options)
    timed = [point for point in found.points if point.speed is not None]
    assert any(point.own for point in timed)
    for point in timed:
        assert point.speed is not None
        assert point.speed.batch_size == 3
        assert point.speed.spread[0] <= point.speed.speed_up <= point.speed.spread[1]
    assert not any(p.speed for p in search(model, pixels, objective="gmacs", quiet=True).points)


def test_ctrl_c_keeps_what_was_found(pixels: Tensor) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("dynamicvit.deploy.candidates._refine", interrupted)
        assert choose_rules(tiny_vit(), pixels, 0.5, "eager", quiet=True)


def test_a_result_is_read_back(pixels: Tensor, tmp_path: Path) -> None:
    model = tiny_vit()
    file = tmp_path / "a" / "search.json"
    found = search(model, pixels, pixels[:, 0, 0, 0].long() % 5, objective="gmacs", quiet=True)
    found = found.recommend(max_loss=90)
    found.to_json(file)
    read = Search.from_json(file)
    assert read == found
    assert str(read) == str(found)
    with pytest.raises(ValueError, match="model must be given to from_json"):
        read.recommend(max_loss=100).build(read.points[0])
    again = Search.from_json(file, model).build(read.points[0])
    with torch.no_grad():
        assert torch.equal(again(pixels), found.build(found.points[0])(pixels))
    for content in (b"[]", b"{}", b"no JSON", b"\xff", b'{"points": [{}], "recommended": null}'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"file must be what search wrote, got .*search.json"):
            Search.from_json(file)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "vit"}, TypeError, "model must be a SparseViT or a timm model, got str"),
        ({"model": nn.Linear(2, 2)}, UnsupportedBackbone, "is not supported"),
        ({"images": 3}, TypeError, "images must be a tensor or batches of them, got"),
        ({"images": ["x"]}, TypeError, "images must be a tensor or batches of them, got"),
        ({"images": torch.zeros(3, 3, 32, 32)}, ValueError, r"M of 4 or more, got \[3, 3, 32, 32"),
        ({"images": []}, ValueError, r"images must have shape \[M, C, H, W\]"),
        ({"images": torch.zeros(8, 3, 16, 16)}, ValueError, "images"),
        ({"labels": [0.5] * 40}, TypeError, "labels must be class indices, got torch.float32"),
        ({"labels": [0]}, ValueError, r"labels must be one an image, 40, got \[1\]"),
        ({"labels": [7] * 40}, ValueError, "labels must be class indices from 0 to 4, got 7"),
        ({"labels": [-1] * 40}, ValueError, "labels must be class indices from 0 to 4, got -1"),
        ({"labels": ["a"] * 40}, TypeError, r"labels must be class indices, got \['a'"),
        (
            {"labels": torch.zeros(40, device="meta")},
            TypeError,
            "labels must be class indices, got",
        ),
        (
            {"images": [torch.zeros(4, 3, 32, 32), torch.zeros(4, 3, 16, 16)]},
            ValueError,
            r"images must be batches .* got \[4, 3, 32, 32\] on cpu, \[4, 3, 16, 16\]",
        ),
        ({"images": [torch.tensor(1.0)]}, ValueError, "images must be batches .* got .* on cpu"),
        (
            {"images": torch.zeros(8, 3, 32, 32, device="meta")},
            ValueError,
            "images must hold values",
        ),
        (
            {"images": torch.full((8, 3, 32, 32), math.nan)},
            ValueError,
            "images must be finite, got",
        ),
        (
            {"images": torch.full((8, 3, 32, 32), math.inf)},
            ValueError,
            "images must be finite, got",
        ),
        ({"max_loss": 0.5}, ValueError, "max_loss needs labels, got 0.5 without"),
        ({"max_loss": 1.0, "min_agreement": 0.9}, ValueError, "not both, got 1.0 and 0.9"),
        ({"labels": [0] * 40, "max_loss": -1.0}, ValueError, "max_loss must be 0 or more, got -1"),
        ({"min_agreement": 99.0}, ValueError, r"min_agreement must lie in \[0, 1\], got 99.0"),
        ({"sure": True}, ValueError, "sure goes with max_loss"),
        ({"max_loss": "half"}, TypeError, "max_loss must be a number or None, got 'half'"),
        ({"objective": "size"}, ValueError, "objective must be latency or gmacs, got 'size'"),
        ({"engine": "tpu"}, ValueError, "engine must be one of eager, .*, got 'tpu'"),
        ({"precision": "fp8"}, ValueError, "precisions must be of .*, got 'fp8'"),
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
        ({"seconds": -1.0}, ValueError, "seconds must be 0 or more, got -1.0"),
        ({"keep_ratios": [0.5]}, ValueError, "keep_ratios goes with a sparse model, got it with a"),
        ({"keep_ratios": 0.5}, TypeError, "keep_ratios must be a list, each a number or None"),
    ],
)
def test_bad_arguments(
    options: dict[str, Any], error: type[Exception], message: str, pixels: Tensor
) -> None:
    arguments = {"model": tiny_vit(), "images": pixels, "quiet": True, **options}
    with pytest.raises(error, match=message):
        search(arguments.pop("model"), arguments.pop("images"), **arguments)


@pytest.mark.parametrize(
    ("dense", "error", "message"),
    [
        (tiny_vit(img_size=16), ValueError, r"dense must have .*\(3, 32, 32\), got \(3, 16, 16\)"),
        (tiny_vit(num_classes=2), ValueError, "dense must have the 5 classes of model, got 2"),
        (nn.Identity(), ValueError, "dense must have"),
        (sparsify(tiny_vit(), 0.5), TypeError, "dense must be a dense model, got a SparseViT"),
        ("vit", TypeError, "dense must be a timm model, got 'vit'"),
    ],
)
def test_a_dense_model_that_cannot_be_compared(
    dense: Any, error: type[Exception], message: str, pixels: Tensor
) -> None:
    with pytest.raises(error, match=message):
        search(sparsify(tiny_vit(), 0.7), pixels, dense=dense, quiet=True)


def test_search_from_the_command_line(
    images: Path,
    sparse_folder: Path,
    dense_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search_module, "_time", _twice_as_fast)
    output, best = tmp_path / "out" / "search.json", tmp_path / "best"
    arguments = [str(sparse_folder), "--data", str(images), "--dense", str(dense_folder)]
    arguments += ["--keep-ratios", "[0.5]", "--max-loss", "100", "--workers", "0"]
    arguments += ["--engine", "compile", "--seconds", "0", "--batch-size", "3"]
    assert cli.main(["search", *arguments, "--output", str(output), "--save", str(best)]) == 0
    result = json.loads(output.read_text())
    assert [point["tokens"] for point in result["points"]] == [[16, 11, 7, 5], [16, 8, 4, 2]]
    assert result["recommended"] in result["points"]
    assert [point["own"] for point in result["points"]] == [True, False]
    assert result["environment"]["torch"] == torch.__version__
    assert (result["crop_pct"], result["images"], result["chosen_on"]) == (None, 8, 0)
    printed = capsys.readouterr().out
    assert printed.endswith(f"the results are in {output}\nthe recommended model is in {best}\n")
    assert "(own)" in printed
    # evaluate finds the same for the model that was saved, for the given one and for the dense one.
    found = evaluate([str(best), str(sparse_folder), str(dense_folder)], str(images), workers=0)
    point, given, dense = result["recommended"], result["points"][0], result["dense"]
    for seen, name in ((point, best), (given, sparse_folder), (dense, dense_folder)):
        assert (seen["top1"], seen["gmacs"]) == tuple(
            found[str(name)][k] for k in ("top1", "gmacs")
        )


def test_a_dense_model_from_the_command_line(
    images: Path, dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"workers": 0, "objective": "gmacs", "max_loss": 100}
    saved = str(tmp_path / "saved")
    found = search_data(str(dense_folder), str(images), images=6, save=saved, **options)
    assert (found["images"], found["chosen_on"]) == (3, 3)
    assert found["dense"]["model"] is None
    assert dynamicvit.load(saved).schedule.ratios == found["recommended"]["schedule"]["ratios"]
    assert "fewer GMACs" in capsys.readouterr().out.splitlines()[-2]
    options |= {"max_loss": 0.0, "sure": True}
    with pytest.raises(ValueError, match="there is no model to build or save: nothing with at mos"):
        search_data(str(dense_folder), str(images), save=saved, **options)


def test_random_selection_draws_the_same_each_time(pixels: Tensor) -> None:
    model = sparsify(tiny_vit(), 0.5, scorer="random").eval()
    found = [search(model, pixels, objective="gmacs", quiet=True).points for _ in range(2)]
    assert found[0] == found[1]


def test_the_command_names_what_is_wrong(
    images: Path, dense_folder: Path, sparse_folder: Path, tmp_path: Path
) -> None:
    data = str(images)
    file = tmp_path / "file"
    file.touch()
    other = tmp_path / "other"
    save_folder(tiny_vit(num_classes=2, img_size=16), other)
    reverse = tmp_path / "reverse"
    save_folder(tiny_vit(num_classes=2), reverse, class_names=CLASSES[::-1])
    three = tmp_path / "three"
    sparsify(tiny_vit(num_classes=3), 0.7).save_pretrained(three)
    link = tmp_path / "link"
    link.symlink_to(sparse_folder)
    nowhere = tmp_path / "nowhere"
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (nowhere, {"save": str(file)}, f"save must be a folder, got {file}, and {file} is a"),
        (nowhere, {"output": str(tmp_path)}, "output must be a file, got the folder"),
        (dense_folder, {"save": str(dense_folder)}, "save must not be the folder of model, got"),
        (link, {"save": str(sparse_folder / ".")}, "save must not be the folder of model, got"),
        (
            sparse_folder,
            {"dense": str(dense_folder), "save": str(dense_folder)},
            "save must not be the folder of dense, got",
        ),
        (nowhere, {"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        (nowhere, {"images": 3}, "images must be 4 or more, got 3"),
        (nowhere, {"max_loss": -1}, "max_loss must be 0 or more, got -1"),
        (nowhere, {"engine": "tpu"}, "engine must be one of"),
        (nowhere, {}, "no model folder at"),
        (dense_folder, {"dense": str(dense_folder)}, "dense goes with a sparse model, got"),
        (dense_folder, {"ratios": [[0.5]]}, "ratios goes with a sparse model"),
        (three, {}, "data must have the 3 classes of .*, got 2: bright, dark"),
        (sparse_folder, {"data": "nowhere"}, "data must be a folder .*got nowhere"),
        (sparse_folder, {"dense": str(sparse_folder)}, "dense must be a dense model, got"),
        (sparse_folder, {"dense": str(other)}, r"dense must have the input_size .*\(3, 16, 16\)"),
        (sparse_folder, {"dense": str(reverse)}, "dense must have its classes in the order"),
        (three, {"dense": str(dense_folder)}, "dense must have the 3 classes of .*, got 2"),
    ]
    for name, options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            search_data(str(name), **{"data": data, "workers": 0, **options})


def test_points_lost_have_the_sign_that_compare_has(pixels: Tensor) -> None:
    model = sparsify(tiny_vit(), 0.7).eval()
    with torch.no_grad():
        labels = model(pixels).argmax(1)  # so that pruned is better
    found = search(model, pixels, labels, objective="gmacs", quiet=True)
    own = next(point for point in found.points if point.own)
    assert own.change is not None
    assert own.change.points_lost <= 0
    text = str(found)
    low, high = own.change.interval
    assert f"{own.change.points_lost:.2f} ({low:.1f} to {high:.1f})" in text
    assert "0.7 (own)" in text
    assert max(map(len, text.splitlines())) <= 100


def test_it_is_public() -> None:
    found: Callable[..., Search] = dynamicvit.search
    assert found is search
