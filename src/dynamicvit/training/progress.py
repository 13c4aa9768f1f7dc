"""How a run shows where it is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dynamicvit.evaluation.unreadable import DataError

_SHOWN = ("loss", "cross_entropy", "ratio", "logit_kl", "token")


class Clock:
    """How fast steps are, and how much of that is waiting for images, since it was last read."""

    def __init__(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Give the batches of one more step, and add up the time that they take to come."""
        self.steps += 1
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                raise DataError("the training images ended before as many as the data tells")
            self.waited += time.perf_counter() - start
            yield batch

    def read(self, batch: int) -> dict[str, float]:
        """The speed since the last reading, of steps of `batch` images."""
        now = time.perf_counter()
        seconds = now - self.start
        speed = {
            "images_per_second": round(self.steps * batch / seconds, 2),
            "data_wait": round(self.waited / seconds, 4),
        }
        self.start, self.waited, self.steps = now, 0.0, 0
        return speed


class Status:
    """What a training loop tells of its steps.

    Args:
        console: of the run; quiet in all processes but the first.
        total: number of the last step.
        done: number of the step that the loop starts after.
        batch: images in a step.
    """

    SECONDS = 10.0  # between lines, where there is no terminal

    def __init__(self, console: Console, total: int, done: int, batch: int) -> None:
        self.console, self.total, self.batch = console, total, batch
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=total, completed=done, status="")
        self.since = time.perf_counter(), done

    @contextmanager
    def shown(self) -> Iterator[Status]:
        """Inside, the bar is on the screen, if there is a screen."""
        with self.bar:
            yield self

    def step(self, step: int, epoch: str, numbers: dict[str, Any]) -> None:
        """Tell of a step that is done.

        Args:
            step: its number, counted from 1.
            epoch: which epoch it is part of.
            numbers: of the step.
        """
        text = describe(numbers)
        self.bar.update(self.task, completed=step, description=epoch, status=text)
        start, before = self.since
        seconds = time.perf_counter() - start
        if not self.bar.disable or self.console.quiet or seconds < self.SECONDS:
            return
        self.since = start + seconds, step
        speed = (step - before) / max(seconds, 1e-9)
        left = timedelta(seconds=round((self.total - step) / speed))
        self.console.print(
            f"{epoch}  step {step}/{self.total}  {text}  {speed * self.batch:.1f} images/s  "
            f"{left} left",
            soft_wrap=True,
            highlight=False,
        )

    def restart(self) -> None:
        """Leave out of the speed what was done since the last step."""
        self.since = time.perf_counter(), self.since[1]


def describe(numbers: dict[str, Any]) -> str:
    """The losses and shares of kept tokens of a step, in one line."""
    parts = [f"{k} {v:.3f}" for k, v in numbers.items() if k in _SHOWN and isinstance(v, float)]
    if "kept" in numbers:
        parts.append("kept " + " ".join(f"{share:.2f}" for share in numbers["kept"]))
    return "  ".join(parts)
