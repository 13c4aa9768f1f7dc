from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import dynamicvit.training.metrics as records
import dynamicvit.training.student as student
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.core.selectors.learned import TokenScorer
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.metrics import METRICS, CollapseWatch, check_trackers
from dynamicvit.training.task import SparseTask
from dynamicvit.training.train import train


def _lines(options: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (Path(options["output"]) / METRICS).read_text().splitlines()]


def _named(ratios: list[float], kept: list[list[float]]) -> list[int]:
    watch = CollapseWatch(ratios)
    for shares in kept:
        watch.add(shares)
    found = watch.check()
    for shares in kept:
        watch.add(shares)
    assert watch.check() == [], "a stage is named once"
    return [stage for stage, _ in found]


@pytest.mark.parametrize(
    ("ratios", "kept", "named"),
    [
        ([0.7, 0.7], [[0.7, 0.5]], []),
        ([0.7, 0.7], [[1.0, 0.7]], [0]),
        ([0.7, 0.7], [[0.7, 0.699]], [1]),  # of what is present, all
        ([0.7, 0.7], [[0.7, 0.001]], [1]),
        ([0.7, 0.7], [[0.0, 0.0]], [0]),  # nothing is present at the second stage
        ([1.0, 0.7], [[1.0, 0.7]], []),  # as asked for
        ([0.7, 0.7], [[1.0, 0.6], [0.4, 0.2]], []),  # one batch is no trend
        ([0.7, 0.7], [], []),
        ([], [], []),
    ],
)
def test_collapse_is_named(ratios: list[float], kept: list[list[float]], named: list[int]) -> None:
    assert _named(ratios, kept) == named


def test_a_collapsed_scorer_is_told_of_once(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sparsify_badly(*args: Any, **kwargs: Any) -> SparseViT:
        sparse = sparsify(*args, **kwargs)
        cast(TokenScorer, sparse.scorers[0]).set_keep_prior(1 - 1e-7)
        return sparse

    monkeypatch.setattr(student, "sparsify", sparsify_badly)
    train(TrainConfig(**options))
    lines = _lines(options)
    [warning] = [line for line in lines if line["kind"] == "warning"]
    assert warning["stage"] == 0
    message = (
        "the scorer of stage 1 has collapsed: over the last 1 steps it kept 100.0% of the tokens "
        "present, where 70.0% are asked for"
    )
    assert message in warning["message"]
    assert message in " ".join(capsys.readouterr().out.split())


def test_a_skipped_step_hides_no_collapse(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SparseTask.forward
    calls = 0

    def spoil(task: SparseTask, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        result = forward(task, *args, **kwargs)
        factor = math.nan if calls == 2 else 1.0
        return result | {"loss": factor * result["loss"], "kept": factor * torch.ones(3)}

    monkeypatch.setattr(SparseTask, "forward", spoil)
    train(TrainConfig(**options | {"epochs": 1, "log_steps": 4}))
    warnings = [line["message"] for line in _lines(options) if line["kind"] == "warning"]
    assert ["over the last 3 steps it kept 100.0%" in message for message in warnings] == [True] * 3


def test_tensorboard_is_logged_to_where_it_is_installed(options: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(TrainConfig(**options | {"trackers": None, "epochs": 1}))
    [events] = Path(options["output"]).rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events)).Reload()
    tags = {"train/loss", "train/kept/2", "train/lr/scorers", "train/grad_norm", "validation/top1"}
    assert tags <= set(scalars.Tags()["scalars"])
    lines = _lines(options)
    losses = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    logged = [(event.step, event.value) for event in scalars.Scalars("train/loss")]
    assert logged == [(step, pytest.approx(loss)) for step, loss in losses]


def test_trackers_are_checked_before_training(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "get_available_trackers", list)
    assert check_trackers(None) == []
    for name, message in (
        ("tensorboard", r"pip install 'dynamicvit\[tensorboard\]'"),
        ("wandb", "tracker wandb is not installed: pip install wandb"),
        ("paper", r"trackers must be of .*tensorboard, .*wandb.*, got 'paper'"),
    ):
        with pytest.raises(ValueError, match=message):
            train(TrainConfig(**options | {"trackers": [name]}))
    assert not Path(options["output"]).exists()


def test_what_json_cannot_hold_is_null() -> None:
    value = {"a": [1.0, math.nan], "b": {"c": math.inf, "d": "text"}, "e": 3}
    assert records._without_nan(value) == {"a": [1.0, None], "b": {"c": None, "d": "text"}, "e": 3}
