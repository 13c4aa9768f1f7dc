"""Runs by the configs in a JSON file, one after the other: what launched processes do in tests."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState

import dynamicvit.training.fit as fit
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.evaluate import evaluate
from dynamicvit.training.task import SparseTask


class Stopped(Exception):
    """The run ended where a test wanted it to."""


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """End a run once its checkpoint of this step is written."""
    save = fit._save

    def save_and_stop(run: Any) -> None:
        save(run)
        if run.total_step == step:
            raise Stopped

    with mock.patch.object(fit, "_save", save_and_stop):
        yield


@contextmanager
def not_finite_at(calls: list[int], rank: int) -> Iterator[None]:
    """Make the loss of these calls (from 0) NaN in one process."""
    forward = SparseTask.forward
    count = -1

    def spoil(task: SparseTask, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        result = forward(task, *args, **kwargs)
        if count in calls and PartialState().process_index == rank:
            result["loss"] = result["loss"] * float("nan")
        return result

    with mock.patch.object(SparseTask, "forward", spoil):
        yield


def run(
    options: dict[str, Any], resume: bool = False, stop: int = 0, bad: list[int] | None = None
) -> None:
    """Train, or `evaluate` where the options say so. `bad` steps are bad in the last process."""
    if "models" in options:
        evaluate(**options)
        return
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1
    with stopped_after(stop), not_finite_at(bad or [], last):
        try:
            fit.train(TrainConfig(**options), resume)
        except Stopped:
            assert stop


if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        run(**arguments)
