"""How a run shows where it is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader

from dynamicvit.evaluation.console import bar_columns, track
from dynamicvit.evaluation.unreadable import DataError


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
    """

    SECONDS = 10.0  # between lines, where there is no terminal

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total = console, total
        self.bar = Progress(
            *bar_columns(),
            console=console,
            expand=True,
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=total, completed=done, unit="steps", status="")
        self.since = time.perf_counter(), done

    @contextmanager
    def shown(self) -> Iterator[Status]:
        """Inside, the bar is on the screen, if there is a screen."""
        with self.bar:
            yield self

    def validating(self, batches: DataLoader) -> Iterator[Any]:
        """Give the batches of a validation, and show how many are done."""
        if self.bar.disable:
            yield from track(batches, "validating", self.console.quiet, "batches")
            return
        task = self.bar.add_task("validating", total=len(batches), unit="batches", status="")
        for batch in batches:
            yield batch
            self.bar.advance(task)
        self.bar.remove_task(task)

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
        line = f"{epoch}  step {step}/{self.total}  {text}  {left} left"
        self.console.print(line, soft_wrap=True, highlight=False)

    def restart(self) -> None:
        """Leave out of the speed what was done since the last step."""
        self.since = time.perf_counter(), self.since[1]


def describe(numbers: dict[str, Any]) -> str:
    """The loss and the shares of kept tokens of a step, in few words; metrics.jsonl has all."""
    text = f"loss {numbers['loss']:.3f}"
    if "kept" in numbers:
        kept = [f"{share:.2f}" for share in numbers["kept"]]
        text += "  kept " + " ".join(kept if len(kept) <= 3 else [kept[0], "…", kept[-1]])
    return text
