from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image

import dynamicvit
import dynamicvit.evaluation.evaluate as evaluate_module
from dynamicvit.core.model import sparsify
from dynamicvit.deploy.search_data import search_data
from dynamicvit.evaluation.accuracy import (
    compare_answers,
    count_confusion,
    evaluate_model,
    macro_f1,
)
from dynamicvit.evaluation.compare import compare
from dynamicvit.evaluation.evaluate import evaluate
from dynamicvit.evaluation.unreadable import DataError
from dynamicvit.io.folder import save_folder
from dynamicvit.io.load import load_model
from dynamicvit.io.predictions import class_names
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.run_folder import BEST
from dynamicvit.training.train import train
from tests.conftest import CLASSES, tiny_vit, write_images


def _batches(*batches: Any) -> Any:
    return list(batches)


def _loader(model: torch.nn.Module) -> Any:
    inputs = torch.randn(10, 3, 32, 32)
    with torch.no_grad():
        ranked = model(inputs).argsort(dim=-1, descending=True)
    # The right class is the model's first choice 4 times, its second 3 times, its last 3 times.
    place = torch.tensor([0] * 4 + [1] * 3 + [6] * 3)
    targets = ranked.gather(1, place.unsqueeze(1)).squeeze(1)
    return [(inputs[:6], targets[:6]), (inputs[6:], targets[6:])]


def test_every_image_is_counted_once_in_its_place() -> None:
    model = sparsify(tiny_vit(num_classes=7), 0.7)
    loader = _loader(model)
    model.train().backbone.eval()
    result = evaluate_model(model, loader, Accelerator(cpu=True))
    assert (model.training, model.backbone.training) == (True, False), "each mode is restored"
    assert (result.top1, result.top5, result.images) == (40.0, 70.0, 10)
    logits = model.eval()(torch.cat([inputs for inputs, _ in loader]))
    targets = torch.cat([targets for _, targets in loader])
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item())
    assert result.tokens == (16, 11, 7, 5)
    assert result.gmacs == pytest.approx(dynamicvit.count_gmacs(model, (3, 32, 32)))


def test_the_mode_is_restored_and_no_image_is_an_error() -> None:
    model = tiny_vit().train()
    evaluate_model(model, _batches((torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))))
    assert model.training
    with pytest.raises(DataError, match="gave no images"):
        evaluate_model(model, _batches())


def test_evaluate_compares_models_and_writes_json(
    images: Path, dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = tmp_path / "sparse"
    sparsify(load_model(dense_folder), 0.7).save_pretrained(sparse)
    (images / "val" / "dark" / "00.png").write_text("not an image")
    results = evaluate(
        [str(dense_folder), str(sparse)],
        str(images),
        workers=0,
        skip_unreadable=True,
        output=str(tmp_path / "results.json"),
    )
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results[str(dense_folder)]["tokens"] == (16,)
    assert results[str(sparse)]["gmacs"] < results[str(dense_folder)]["gmacs"]
    assert results[str(sparse)]["unreadable"] == 1
    assert results[str(sparse)]["images"] == 7
    assert "GMACs" in capsys.readouterr().out


def test_a_random_choice_is_evaluated_alike_each_time(
    images: Path, dense_folder: Path, tmp_path: Path
) -> None:
    folder = str(tmp_path / "random")
    sparsify(load_model(dense_folder), 0.5, scorer="random").save_pretrained(folder)
    losses = [evaluate([folder], str(images), workers=0)[folder]["loss"] for _ in range(2)]
    assert losses[0] == losses[1]


def test_the_crop_can_be_another_than_the_model_s(images: Path, dense_folder: Path) -> None:
    for path in images.rglob("*.png"):  # dark outside its middle half
        picture = Image.new("RGB", (64, 64))
        picture.paste((255, 255, 255), (16, 16, 48, 48))
        picture.save(path)
    name = str(dense_folder)
    found = [
        evaluate([name], str(images), workers=0, crop_pct=crop)[name]["loss"]
        for crop in (None, 1.0, 0.5)
    ]
    assert found[1] != found[2]
    for crop in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"crop_pct must lie in \(0, 1\], got {crop}"):
            evaluate([name], str(images), crop_pct=crop)


def test_other_dense_models_are_evaluated_beside(images: Path) -> None:
    model = timm.create_model("resnet18", num_classes=2)
    loader = _batches((torch.randn(2, 3, 32, 32), torch.tensor([0, 1])))
    result = evaluate_model(model, loader)
    assert result.tokens == ()
    assert result.gmacs == pytest.approx(1.81, rel=0.01), "at its own 224 pixels"


def test_evaluate_names_what_is_wrong(images: Path, dense_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        evaluate([str(dense_folder)], str(images), batch_size=0)
    for workers in (-1, 10**9):
        with pytest.raises(ValueError, match=f"workers must be from 0 to 1024, got {workers}"):
            evaluate([str(dense_folder)], str(images), workers=workers)
    with pytest.raises(ValueError, match="models must be a list of at least one model, got"):
        evaluate([], str(images))
    with pytest.raises(ValueError, match="precision must be"):
        evaluate([str(dense_folder)], str(images), precision="fp8")
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        evaluate([str(tmp_path / "nowhere")], str(images))
    (images / "val" / "dark").rename(images / "val" / "dim")
    with pytest.raises(ValueError, match=r"data must be a folder .*got nowhere"):
        evaluate([str(dense_folder)], "nowhere")


def test_confusion_and_macro_f1() -> None:
    targets = torch.tensor([0, 0, 0, 1, 1, 3])
    answers = torch.tensor([0, 0, 1, 1, 3, 3])
    found = count_confusion(targets, answers, 5)
    assert found.tolist()[:2] == [[2, 1, 0, 0, 0], [0, 1, 0, 1, 0]]
    assert (int(found.sum()), found.shape) == (6, (5, 5))
    # Precision and recall by hand: class 0 has 1 and 2/3, class 1 1/2 and 1/2, class 3 1/2 and 1.
    # Classes 2 and 4 neither occur nor are answered.
    expected = [2 * (2 / 3) / (1 + 2 / 3), 0.5, 2 * 0.5 / 1.5]
    assert macro_f1(targets, answers, 5) == pytest.approx(100 * sum(expected) / 3)
    assert macro_f1(targets, targets, 5) == 100.0


def test_the_confusion_is_written_and_printed(
    images: Path, dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, name = tmp_path / "results.json", str(dense_folder)
    [found] = evaluate([name], str(images), workers=0, output=str(output)).values()
    matrix = torch.tensor(found["confusion"])
    assert matrix.sum(dim=1).tolist() == [4, 4]
    assert found["top1"] == pytest.approx(100 * float(matrix.diagonal().sum()) / 8)
    assert found["classes"] == ["bright", "dark"]
    assert json.loads(output.read_text())[name] == json.loads(json.dumps(found))
    rows = [line.strip().rstrip(",") for line in output.read_text().splitlines()]
    assert str(found["confusion"][0]) in rows, "a row a line"
    printed, _, told = capsys.readouterr().out.rpartition("the results are in ")
    assert told == f"{output}\n"
    for index, (label, row) in enumerate(zip(found["classes"], found["confusion"], strict=True)):
        assert re.search(rf"{index + 1} {label} +{row[0]} +{row[1]}", printed)
    assert max(map(len, printed.splitlines())) <= 80


def test_the_matrix_of_many_classes_is_not_printed(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [f"class {index:02}" for index in range(13)]
    save_folder(tiny_vit(num_classes=13), tmp_path / "many", class_names=[*CLASSES, *names[2:]])
    monkeypatch.setattr(evaluate_module, "_CLASSES_WRITTEN", 12)
    [found] = evaluate([str(tmp_path / "many")], str(images), workers=0).values()
    assert "class 05" not in capsys.readouterr().out
    assert found["confusion"] is None
    assert 0 <= found["macro_f1"] <= found["top1"] <= 100


def test_quiet_prints_nothing(
    images: Path, dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = str(tmp_path / "sparse")
    sparsify(load_model(dense_folder), 0.7).save_pretrained(sparse)
    evaluate([sparse], str(images), workers=0, quiet=True)
    search_data(sparse, str(images), workers=0, seconds=0, quiet=True)
    compare(sparse, str(images), workers=0, output=str(tmp_path / "compare"), quiet=True)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_device_can_be_chosen(images: Path, dense_folder: Path) -> None:
    name = str(dense_folder)
    for device in ("cpu", None):
        assert evaluate([name], str(images), workers=0, device=device)[name]["images"] == 8
    for device in ("warp", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"device must be one of cpu.* here, got '{device}'"):
            evaluate([name], str(images), workers=0, device=device)


def test_weights_need_a_timm_name(images: Path, dense_folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"weights go with a timm name among the models, got .*den"
    ):
        evaluate([str(dense_folder)], str(images), weights="x.pth")


def _answers(images: int, lost: int, gained: int) -> tuple[torch.Tensor, torch.Tensor]:
    one, other = torch.ones(images, dtype=torch.bool), torch.ones(images, dtype=torch.bool)
    other[:lost] = False
    one[lost : lost + gained] = False
    return one, other


def test_a_difference_comes_with_how_sure_it_is() -> None:
    found = compare_answers(*_answers(200, 5, 4))
    assert (found.points_lost, found.right_to_wrong, found.wrong_to_right) == (0.5, 5, 4)
    assert compare_answers(*_answers(200, 4, 5)).points_lost == -0.5
    low, high = compare_answers(*_answers(200, 0, 0)).interval
    assert low == -high
    # Had 1.5% of all images changed, 200 that did not would be a 5% chance.
    assert high == pytest.approx(100 * (1 - 0.05 ** (1 / 200)), abs=0.2)
    widths = [compare_answers(*_answers(n, n // 40, n // 40)).interval[1] for n in (80, 800, 8000)]
    assert widths == sorted(widths, reverse=True)
    assert compare_answers(*_answers(1, 1, 0)).interval[1] == 100.0


@pytest.mark.parametrize(("lose", "gain"), [(0.1, 0.1), (0.1, 0.02), (0.02, 0.02), (0.3, 0.1)])
def test_the_interval_holds_the_truth_as_often_as_it_says(lose: float, gain: float) -> None:
    """The chance of every outcome of 60 images, counted where the interval has the truth."""
    images, truth, covered = 60, 100 * (lose - gain), 0.0
    for lost in range(images + 1):
        for gained in range(images + 1 - lost):
            same = images - lost - gained
            ways = math.comb(images, lost) * math.comb(images - lost, gained)
            chance = ways * lose**lost * gain**gained * (1 - lose - gain) ** same
            if chance > 1e-7:
                low, high = compare_answers(*_answers(images, lost, gained)).interval
                covered += chance * (low <= truth <= high)
    assert covered >= 0.94


def _swapped(folder: Path) -> Path:
    """A model with its two classes in the other order."""
    model = load_model(str(folder))
    with torch.no_grad():
        for value in (model.head.weight, model.head.bias):
            value.copy_(value.flip(0))
    save_folder(model, folder.parent / "swapped", class_names=CLASSES[::-1])
    return folder.parent / "swapped"


def test_classes_are_taken_in_the_model_s_order(
    images: Path, dense_folder: Path, tmp_path: Path
) -> None:
    swapped = _swapped(dense_folder)
    results = evaluate([str(dense_folder), str(swapped)], data=str(images), workers=0, quiet=True)
    first, second = results.values()
    assert first["classes"] == list(CLASSES)
    assert second["classes"] == list(CLASSES[::-1])
    # The model names one class for all images: top-1 is a half in either order, the loss is not.
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
    options: dict[str, Any] = {"data": str(images), "workers": 0, "epochs": 0, "batch_size": 4}
    found = [
        train(TrainConfig(**options, model=str(model), output=str(tmp_path / f"run_{model.name}")))
        for model in (dense_folder, swapped)
    ]
    assert found[1].loss == pytest.approx(found[0].loss, rel=1e-4)
    trained = load_model(str(tmp_path / "run_swapped" / BEST))
    assert class_names(trained) == list(CLASSES[::-1])


def test_other_names_of_classes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order: the data's names, the model's, and what is said: nothing or a warning."""
    for number, (names, known, said) in enumerate(
        [
            (("cat", "dog"), ("cat", "dog"), ""),
            (("ankle_boot", "shirt"), ("Ankle boot", "Shirt"), ""),
            (("n01440764", "n01443537"), ("tench", "goldfish"), ""),
            (("0", "1"), ("tench", "goldfish"), ""),
            (("1", "2"), ("0", "1"), ""),
            (("cat", "dog"), None, ""),
            (("cat", "hound"), ("cat", "dog"), "'hound' counts as 'dog'"),
            (("ant", "cat"), ("cat", "dog"), "'ant' counts as 'cat'"),
            (("goldfish", "tench"), ("n01440764", "n01443537"), "'goldfish' counts as 'n01440764'"),
            (("car", "plane"), ("cat", "dog"), "'car' counts as 'cat'"),
            (("n02086240", "n02087394"), ("n01440764", "n01443537"), "'n02086240' counts as"),
            (("0 cat", "1-dog"), ("cat", "dog"), ""),
        ]
    ):
        place = tmp_path / str(number)
        data = write_images(place / "images", {"train": 4, "val": 2}, names)
        save_folder(tiny_vit(num_classes=2), place / "model", class_names=known)
        options: dict[str, Any] = {"data": str(data), "workers": 0}
        evaluate([str(place / "model")], **options, quiet=True)
        warned = capsys.readouterr().err
        assert said in warned
        assert bool(said) == bool(warned)
