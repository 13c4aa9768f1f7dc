"""Wrong calls of public functions: TypeError or ValueError, or what a missing file gives."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dynamicvit
from dynamicvit import KeepSchedule, SparseViT, UnsupportedBackbone
from dynamicvit.deploy.predict import predict_files
from dynamicvit.evaluation.evaluate import evaluate
from dynamicvit.evaluation.supported_models import models
from dynamicvit.io.load import load_model
from tests.conftest import tiny_vit
from tests.fuzz.counts import counts

PROMISED = (TypeError, ValueError, FileNotFoundError, OSError, UnsupportedBackbone)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 10**20, 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "cpu", "a\0b", "\udce9", "no/where", b"x", (), [], {}, set(), [0.7], [[1]], [None]),
    *((1, 2), [1, "a"], {"a": 1}, 3j, object, object(), len, Path("nowhere"), range(3)),
    *(torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), torch.zeros(1, 3, 32, 32)),
    *(torch.zeros(1, 3, 32, 32, dtype=torch.int64), torch.zeros(2, 1, 9, 9), np.zeros(3)),
    *(torch.nn.Linear(2, 2), Image.new("RGB", (4, 4)), KeepSchedule((1,), (0.5,))),
)


def _calls(folder: Path, images: Path) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """Functions, each with arguments that are right."""
    sparse = dynamicvit.sparsify(tiny_vit(num_classes=2), 0.7)
    sparse.save_pretrained(folder / "sparse")
    torch.save(tiny_vit(num_classes=2).state_dict(), folder / "weights.pth")
    model, data = str(folder / "sparse"), {"data": str(images), "workers": 0, "quiet": True}
    picture = str(images / "val" / "dark" / "00.png")
    return [
        (dynamicvit.load, {"folder_or_hub_id": model}),
        (load_model, {"name": model, "pretrained": False}),
        (load_model, {"name": "test_vit", "pretrained": False, "weights": None}),
        (dynamicvit.from_released, {"state_dict": folder / "weights.pth", "num_heads": 2}),
        (
            dynamicvit.from_released,
            {"state_dict": folder / "weights.pth", "img_size": 32, "schedule": None},
        ),
        (sparse.predict, {"image": picture, "top_k": 1}),
        (sparse.save_pretrained, {"folder": folder / "again", "class_names": ["a", "b"]}),
        (
            predict_files,
            {"images": [picture], "model": model, "top_k": 1, "device": "cpu", "quiet": True},
        ),
        (
            evaluate,
            {"models": [model], "batch_size": 4, "crop_pct": 1.0, "precision": "float32", **data},
        ),
        (models, {"keep_ratio": 0.7, "quiet": True, "filter": "deit_tiny_patch16_224"}),
        *_core_calls(sparse),
    ]


def _core_calls(sparse: SparseViT) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    image = torch.zeros(1, 3, 32, 32)
    decisions = [torch.ones(1, 16)] * 3

    calibrated, half = copy.deepcopy(sparse), sparse.schedule.with_keep_ratio(0.5)
    calibrated.calibrate(torch.randn(4, 3, 32, 32), (0.5, 1.0))

    def resize(img_size: Any) -> None:
        copy.deepcopy(sparse).set_input_size(img_size)

    def reset(num_classes: Any, global_pool: Any) -> None:
        copy.deepcopy(sparse).reset_classifier(num_classes, global_pool)

    return [
        (dynamicvit.sparsify, {"model": tiny_vit(), "keep_ratio": 0.7, "align": None}),
        (dynamicvit.sparsify, {"model": tiny_vit(), "schedule": None, "scorer": "random"}),
        (dynamicvit.sparsify, {"model": tiny_vit(), "keep_ratio": 0.7, "squeeze": True}),
        (dynamicvit.SparseViT, {"backbone": tiny_vit(), "schedule": KeepSchedule((1,), (0.5,))}),
        (dynamicvit.count_gmacs, {"model": tiny_vit(), "input_size": (3, 32, 32)}),
        (dynamicvit.TokenScorer, {"dim": 32}),
        (KeepSchedule, {"blocks": (1, 2), "ratios": (0.7, 0.5)}),
        (KeepSchedule.from_keep_ratio, {"keep_ratio": 0.7, "depth": 12, "stages": 3}),
        (sparse.forward, {"images": image}),
        (sparse.pruned, {"images": image}),
        (sparse.masked, {"images": image, "decisions": decisions, "temperature": 1.0}),
        (sparse.at, {"keep_ratio": 0.5}),
        (sparse.at, {"schedule": KeepSchedule((1,), (0.5,))}),
        (calibrated.at, {"keep_ratio": 0.6, "per_image": True}),
        (calibrated.at, {"gmacs": calibrated.budget().cost(half), "per_image": True}),
        (sparse.calibrate, {"images": image.repeat(2, 1, 1, 1), "keep_ratios": (0.5, 1.0)}),
        (resize, {"img_size": (32, 32)}),
        (reset, {"num_classes": 3, "global_pool": "token"}),
    ]


@counts(few=150, many=4000)
def test_a_wrong_call_is_refused_in_the_promised_way(
    count: int,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dynamicvit.io.hub._reachable", lambda: False)
    calls, numbers = _calls(tmp_path, images), random.Random(0)
    refused, wrong = 0, dict[str, str]()
    for _ in range(count):
        function, right = numbers.choice(calls)
        changed = numbers.sample(list(right), numbers.choice([1, 1, min(2, len(right))]))
        arguments = right | {name: numbers.choice(VALUES) for name in changed}
        call = f"{function.__name__}({', '.join(f'{k}={v!r:.60}' for k, v in arguments.items())})"
        positional = [arguments.pop("filter")] if "filter" in arguments else []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(*positional, **arguments)
        except PROMISED as error:
            assert str(error), call
            refused += 1
        except Exception as error:
            wrong.setdefault(f"{function.__name__}: {error!r:.100}", call)
        capsys.readouterr()
    assert not wrong, "\n".join(f"{error} from {call}" for error, call in wrong.items())
    assert refused > count // 4
