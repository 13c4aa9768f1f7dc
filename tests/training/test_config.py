from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamicvit.training.config import TrainConfig, choose_batch
from dynamicvit.training.options import (
    AugmentationOptions,
    HardwareOptions,
    LossOptions,
    OptimizationOptions,
    PruningOptions,
)


def _config(**options: Any) -> TrainConfig:
    return TrainConfig(data="images", output="run", **options)


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (PruningOptions, {"keep_ratio": 2.0}, "keep_ratio must lie in"),
        (PruningOptions, {"keep_ratios": [0.5]}, r"keep_ratios must be two growing .* \[0.5\]"),
        (PruningOptions, {"keep_ratios": [0.5, 0.5]}, "keep_ratios must be two growing numbers"),
        (PruningOptions, {"keep_ratios": [0.0, 0.5]}, "keep_ratios must be two growing numbers"),
        (PruningOptions, {"keep_ratios": 0.5}, "keep_ratios must be two growing .* got 0.5"),
        (
            PruningOptions,
            {"keep_ratios": [0.4, 1], "scorer": "random"},
            "keep_ratios needs .* a scorer that learns, got scorer random",
        ),
        (
            PruningOptions,
            {"keep_ratios": [0.4, 1], "keep_ratio": None},
            "keep_ratios needs sparse training .* keep_ratio None",
        ),
        (
            PruningOptions,
            {"squeeze": True, "scorer": "pooling"},
            "squeeze must be false with scorer pooling, got true",
        ),
        (AugmentationOptions, {"hflip": 2.0}, "hflip must lie in"),
        (OptimizationOptions, {"patience": 0}, "patience must be 1 or more, got 0"),
        (LossOptions, {"token_weight": -1.0}, "token_weight must be 0 or more"),
        (LossOptions, {"class_weights": "some"}, "class_weights must be balanced or a list .* got"),
        (LossOptions, {"class_weights": [1.0, -1.0]}, "class_weights must be balanced or a list"),
        (LossOptions, {"class_weights": [0.0]}, "class_weights must be balanced or a list"),
        (HardwareOptions, {"precision": "float16"}, "precision must be one of float32, bfloat16"),
    ],
)
def test_a_group_checks_its_part(group: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group(**options)
    with pytest.raises((ValueError, TypeError), match=message.partition(" must ")[0]):
        _config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "1e-3"}, "lr must be a number or None, got '1e-3'"),
        ({"epochs": 2.5}, r"epochs must be an integer, got 2\.5"),
        ({"batch_size": True}, "batch_size must be an integer or None, got True"),
    ],
)
def test_a_value_of_another_type_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _config(**options)


def test_each_option_is_in_one_group() -> None:
    names = [field.name for group in TrainConfig.GROUPS for field in fields(group)]
    assert names == [field.name for field in fields(TrainConfig)]
    assert len(set(names)) == len(names)


def test_yaml_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = _config(lr=1e-7, blocks=[1], ratios=[0.5], model_kwargs={"img_size": 32}, ema=None)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert TrainConfig.from_file(file) == config
    assert TrainConfig(**yaml.safe_load(config.to_yaml())) == config
    assert TrainConfig.from_file(file, epochs=1).epochs == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: caf\xe9", "must be UTF-8 text"),
        (b"data: [", "is not valid YAML"),
        (b"- data", "must hold options"),
        (b"data: x\noutput: y\ncolour: 1", "options that training does not have: .'colour'"),
    ],
)
def test_a_broken_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} .*{message}") as caught:
        TrainConfig.from_file(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "images", "processes", "batch"),
    [
        ({}, 5000, 1, 128),
        ({}, 47, 1, 46),  # even, for Mixup
        ({"mixup": 0, "cutmix": 0}, 47, 1, 47),
        ({"accumulate": 2}, 47, 3, 6),
        ({"epoch_images": 10}, 47, 1, 10),
        ({"batch_size": 47, "mixup": 0, "cutmix": 0}, 47, 1, 47),
        ({"accumulate": 8}, 47, 3, "data must have at least 48 training images, .*got images"),
        ({}, 1, 1, "data must have at least 2 training images, so .* the training split's are 1"),
        ({"batch_size": 48}, 47, 1, "batch_size must not exceed the training split's 47 images"),
    ],
)
def test_the_batch_is_what_the_data_fills(
    options: dict[str, Any], images: int, processes: int, batch: int | str
) -> None:
    config = _config(**options)
    if isinstance(batch, int):
        assert choose_batch(config, images, processes).batch_size == batch
        return
    with pytest.raises(ValueError, match=batch):
        choose_batch(config, images, processes)


def test_old_names_of_precision_are_read() -> None:
    assert _config(precision="no") == _config(precision="float32")
    assert _config(precision="bf16") == _config(precision="bfloat16")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": "a"}, TypeError, "seed must be an integer, got 'a'"),
        ({"seed": -1}, ValueError, "seed must be 0 or more, got -1"),
        ({"epochs": None}, TypeError, "epochs must be an integer, got None"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer, got 1.5"),
        ({"temperature": None}, TypeError, "temperature must be a number, got None"),
        ({"drop_path": "a"}, TypeError, "drop_path must be a number, got 'a'"),
        ({"pretrained": 3}, TypeError, "pretrained must be true or false, got 3"),
        ({"blocks": 3}, TypeError, "blocks must be a list, each an integer or None, got 3"),
        ({"crop_scale": 0.5}, TypeError, "crop_scale must be a list, each a number or None, got"),
        ({"data": 3}, TypeError, "data must be a string, got 3"),
        ({"output": None}, TypeError, "output must be a string, got None"),
    ],
)
def test_options_of_another_type_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**{"data": "images", "output": "run", **options})
