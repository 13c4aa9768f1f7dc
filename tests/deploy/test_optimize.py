from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamicvit import SparseViT, optimize, sparsify
from dynamicvit.deploy import engines
from dynamicvit.deploy import optimize as module
from dynamicvit.evaluation import timing
from tests.conftest import randomise, tiny_vit

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _sparse() -> SparseViT:
    sparse = sparsify(tiny_vit(), keep_ratio=0.7)
    randomise(sparse.scorers)
    return sparse


def _endless() -> nn.Module:
    model = tiny_vit()
    nn.init.constant_(model.get_parameter("head.bias"), float("inf"))
    return model


@torch.no_grad()
def test_the_fastest_within_the_tolerance_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_bfloat16", lambda: True)  # torch computes it everywhere
    sparse = _sparse()

    def take_turns(calls: list[Any], batches: list[Tensor]) -> Iterator[tuple[float, ...]]:
        """The later a candidate is, the faster it claims to be; the last are bfloat16's."""
        while True:
            yield tuple(1.0 / (1 + index) for index in range(len(calls)))

    monkeypatch.setattr(module, "take_turns", take_turns)
    found = optimize(sparse.train(), IMAGES, engines=["eager"], rounds=1)
    assert sparse.training
    assert (found.chosen.engine, found.chosen.precision) == ("eager", "float32")
    assert found.chosen.attention == "plain"
    assert found.speed_up == pytest.approx(2.0)
    assert found.dense_images_per_second == found.chosen.images_per_second / 2
    assert "2.00×" in str(found)
    slow = replace(found, dense_images_per_second=1e9)
    assert "1000000000.0" in str(slow)
    torch.testing.assert_close(found(IMAGES), sparse.eval()(IMAGES), atol=1e-4, rtol=1e-3)
    half = [item for item in found.candidates if item.precision == "bfloat16"]
    assert len(half) == 2
    for item in half:
        assert item.reason == "its error is above 0.001"
        assert item.error > 1e-3
    loose = optimize(sparse, IMAGES, tolerance=10.0, engines=["eager"], rounds=1)
    assert loose.chosen.precision == "bfloat16"
    assert "eager, bfloat16, plain attention: " in str(loose)
    assert loose(IMAGES).dtype == torch.float32


@torch.no_grad()
def test_engines_of_files_are_candidates() -> None:
    dense = tiny_vit()
    found = optimize(dense, IMAGES, engines=["openvino", "onnx"], rounds=1)
    names = {(item.engine, item.precision) for item in found.candidates if not item.reason}
    assert {("onnx", "float32"), ("openvino", "float32")} <= names
    assert found.dense_images_per_second is None
    reasons = {item.engine: item.reason for item in found.candidates if item.reason}
    if not engines.available("openvino", "bfloat16"):
        assert "this processor has no bfloat16" in str(reasons["openvino"])
    assert reasons["onnx"] == "engine 'onnx' does not compute in bfloat16 here"
    assert reasons["eager"] == "it was not asked for"
    assert found.chosen.engine != "eager"
    torch.testing.assert_close(found(IMAGES), dense(IMAGES), atol=1e-4, rtol=1e-3)


def test_an_engine_that_fails_is_out_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(model: Any, engine: str, *arguments: Any) -> Any:
        if engine == "compile":
            raise RuntimeError("no C++ compiler\nand much more")
        return engines.build(model, engine, *arguments)

    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(engines, "has_bfloat16", lambda: True)
    found = optimize(_sparse(), IMAGES, engines=["eager", "compile"], rounds=1)
    assert found.chosen.engine == "eager"
    assert {item.reason for item in found.candidates if item.engine == "compile"} == {
        "no C++ compiler"
    }
    with pytest.raises(ValueError, match="no engine runs the model here: no C\\+\\+ compiler"):
        optimize(_sparse(), IMAGES, engines=["compile"], rounds=1)


def test_logits_of_zero_have_no_error() -> None:
    model = tiny_vit()
    for weight in model.get_submodule("head").parameters():
        nn.init.zeros_(weight)
    found = optimize(model, IMAGES, engines=["eager"], precisions=["float32"], rounds=1)
    assert [item.error for item in found.candidates] == [0.0, 0.0]


def test_modes_stay_as_they_were() -> None:
    sparse = _sparse().train()
    sparse.backbone.eval()
    optimize(sparse, IMAGES, engines=["eager"], rounds=1)
    assert sparse.training
    assert not sparse.backbone.training


def test_a_time_budget_ends_the_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def build_slowly(*arguments: Any) -> Any:
        nonlocal now
        now += 10.0
        return engines.build(*arguments)

    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module, "build", build_slowly)
    found = optimize(_sparse(), IMAGES, engines=["compile", "eager"], seconds=15.0, rounds=9)
    tried = [(item.engine, item.attention) for item in found.candidates if item.images_per_second]
    assert tried == [("eager", "fused"), ("eager", "plain")]
    assert found.chosen.precision == "float32"
    assert found.dense_images_per_second is None
    assert {item.reason for item in found.candidates if item.engine == "compile"} == {
        "there was no time left"
    }
    assert "stopped early" in str(found)
    assert "building eager, float32, plain" in capsys.readouterr().err
    optimize(_sparse(), IMAGES, engines=["eager"], precisions=["float32"], rounds=1, quiet=True)
    assert capsys.readouterr().err == ""


def test_ctrl_c_gives_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(after: int, function: Any) -> Any:
        calls = iter(range(100))

        def run(*arguments: Any) -> Any:
            if next(calls) == after:
                raise KeyboardInterrupt
            return function(*arguments)

        return run

    monkeypatch.setattr(module, "build", interrupt(1, engines.build))
    found = optimize(_sparse(), IMAGES, engines=["eager"])
    assert found.chosen.attention == "fused"
    assert "stopped early" in str(found)
    monkeypatch.setattr(module, "build", interrupt(0, engines.build))
    with pytest.raises(KeyboardInterrupt):  # there is nothing yet
        optimize(_sparse(), IMAGES, engines=["eager"])
    monkeypatch.setattr(module, "build", interrupt(1, engines.build))
    with pytest.raises(KeyboardInterrupt):  # nothing that was asked for
        optimize(_sparse(), IMAGES, engines=["onnx"])

    monkeypatch.setattr(module, "build", engines.build)
    # One call of each form without a clock, then rounds of two: the third round is interrupted.
    monkeypatch.setattr(timing, "time_call", interrupt(5, timing.time_call))
    found = optimize(_sparse(), IMAGES, engines=["eager"], precisions=["float32"])
    assert found.chosen.images_per_second > 0
    assert found.dense_images_per_second is None


def test_other_images_than_the_example_are_refused() -> None:
    found = optimize(_sparse(), IMAGES, engines=["eager"], precisions=["float32"], rounds=1)
    assert found(torch.zeros(5, 3, 32, 32)).shape == (5, 5)
    images: Any
    for images, kind, message in (
        ([1], TypeError, r"images must be images \[B, C, H, W\], got list"),
        (IMAGES.double(), TypeError, "images must be float32, got torch.float64"),
        (IMAGES[0], ValueError, r"images must be images \[B, C, H, W\], got \(3, 32, 32\)"),
        (IMAGES[:, :1], ValueError, r"images must have shape \[B, 3, 32, 32\], got \[2, 1, 32, 32"),
        (IMAGES.to("meta"), ValueError, "images must be on cpu, got meta"),
    ):
        with pytest.raises(kind, match=message):
            found(images)


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        (torch.zeros(3, 32, 32), {}, r"example must be images \[B, C, H, W\], got \(3, 32, 32\)"),
        ([1], {}, r"example must be images \[B, C, H, W\], got list"),
        (IMAGES.half(), {}, "example must be float32, got torch.float16"),
        (IMAGES.to("meta"), {}, "example must be on the model's device cpu, got meta"),
        (IMAGES, {"model": 3}, "model must be a SparseViT or a timm model, got 3"),
        (IMAGES, {"precisions": []}, r"precisions must be one or more of .*, got \[\]"),
        (IMAGES, {"engines": []}, r"engines must be one or more of .*, got \[\]"),
        (IMAGES, {"engines": "eager"}, "engines must be a list of names, got 'eager'"),
        (IMAGES, {"rounds": 1.5}, "rounds must be an integer, got 1.5"),
        (IMAGES * float("nan"), {}, "example must be finite, got NaN or infinity"),
        (IMAGES / 0, {}, "example must be finite, got NaN or infinity"),
        (IMAGES, {"model": _endless()}, "model must give finite logits, got NaN or infinity"),
        (IMAGES, {"engines": ["onnx"], "seconds": 1e-9}, "seconds is too short .*, got 1e-09"),
        (IMAGES, {"seconds": 0}, "seconds must be above 0, got 0"),
        (torch.zeros(0, 3, 32, 32), {}, r"example must be images .*, got \(0, 3, 32, 32\)"),
        (IMAGES, {"tolerance": -1.0}, "tolerance must be 0 or more, got -1.0"),
        (IMAGES, {"rounds": 0}, "rounds must be 1 or more, got 0"),
        (IMAGES, {"engines": ["tensorrt"]}, "engines must be of eager, .*, got 'tensorrt'"),
        (IMAGES, {"engines": ["eager", "tensorrt"]}, "engines must be of eager, .*, got 'tensorrt"),
        (IMAGES, {"precisions": ["bf16"]}, "precisions must be of float32, .*, got 'bf16'"),
        (
            IMAGES,
            {"engines": ["onnx"], "precisions": ["bfloat16"]},
            "'onnx' does not compute in bfloat16 here",
        ),
        (
            IMAGES,
            {"engines": ["eager"], "precisions": ["bfloat16"], "tolerance": 0.0},
            "tolerance must be at least .* for a form, got 0.0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    example: Tensor, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "has_bfloat16", lambda: True)
    with pytest.raises((TypeError, ValueError), match=message):
        optimize(**{"model": _sparse(), "example": example, "quiet": True, **options})


def test_on_a_processor_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name it is refused before anything runs; by default it is left out, with the reason."""
    monkeypatch.setattr(engines, "has_bfloat16", lambda: False)
    found = optimize(_sparse(), IMAGES, engines=["eager"], rounds=1)
    reasons = {item.reason for item in found.candidates if item.precision == "bfloat16"}
    assert reasons == {"this processor has no bfloat16, got it for engine 'eager'"}
    monkeypatch.setattr(module, "build", None)
    with pytest.raises(ValueError, match="this processor has no bfloat16"):
        optimize(_sparse(), IMAGES, engines=["eager"], precisions=["bfloat16"])
