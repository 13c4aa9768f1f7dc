"""Runs by the configs in a JSON file, one after the other: what launched processes do in tests."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState

from dynamicvit.evaluation.evaluate import evaluate
from dynamicvit.training import loop
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.run import Run
from dynamicvit.training.task import SparseTask
from dynamicvit.training.train import train


class Stopped(Exception):
    """The run ended where a test wanted it to."""


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """End a run once its checkpoint of this step is written."""
    save = Run.save

    def save_and_stop(run: Any) -> None:
        save(run)
        if run.total_step == step:
            raise Stopped

    with mock.patch.object(Run, "save", save_and_stop):
        yield


@contextmanager
def not_finite_at(calls: list[int], rank: int, kind: type[Any] = SparseTask) -> Iterator[None]:
    """Make the loss of these calls (from 0) of a kind of task NaN in one process."""
    forward = kind.forward
    count = -1

    def spoil(task: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        result = forward(task, *args, **kwargs)
        if count in calls and PartialState().process_index == rank:
            result["loss"] = result["loss"] * float("nan")
        return result

    with mock.patch.object(kind, "forward", spoil):
        yield


@contextmanager
def killed_at(step: int, doing: str) -> Iterator[None]:
    """SIGKILL this process after a step, or in the middle of what it next does of this kind:
    "writing" a checkpoint, or "validating"."""
    train_step, replace, evaluate_model = loop.step, os.replace, loop.evaluate_model
    reached = False

    def die_if(now: bool) -> None:
        if reached and now:
            os.kill(os.getpid(), signal.SIGKILL)

    def step_and_die(run: Any, *args: Any) -> Any:
        nonlocal reached
        result = train_step(run, *args)
        reached = run.total_step >= step
        die_if(doing == "a step")
        return result

    def replace_or_die(source: Any, target: Any) -> None:
        die_if(doing == "writing" and str(target).endswith(".pt"))
        replace(source, target)

    def evaluate_or_die(*args: Any) -> Any:
        die_if(doing == "validating")
        return evaluate_model(*args)

    with (
        mock.patch.object(loop, "step", step_and_die),
        mock.patch.object(loop, "evaluate_model", evaluate_or_die),
        mock.patch("os.replace", replace_or_die),
    ):
        yield


def run_killed(options: dict[str, Any], kills: list[int]) -> None:
    """Train, killed at each of these steps and gone on with; each time in a process of its own,
    forked from this one, which itself never computes."""
    for number, step in enumerate([*kills, None]):
        child = os.fork()
        if child == 0:
            try:
                config = TrainConfig(**options | {"workers": number % 2})
                doing = ("validating", "a step", "writing")[number % 3]
                with killed_at(step, doing) if step else nullcontext():
                    train(config, resume=number > 0)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if step else 0), number


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
            train(TrainConfig(**options), resume)
        except Stopped:
            assert stop


if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        (run_killed if "kills" in arguments else run)(**arguments)
