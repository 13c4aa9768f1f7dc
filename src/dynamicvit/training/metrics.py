"""The records of a run: metrics.jsonl, trackers, and warnings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from rich.console import Console

from dynamicvit.io.files import name_in_errors, write_bytes
from dynamicvit.training.config import TrainConfig

METRICS = "metrics.jsonl"


def check_trackers(names: list[str] | None) -> list[str]:
    """The trackers to use: TensorBoard if it is installed, unless others are asked for.

    Raises:
        ValueError: naming one that is not known, or whose package is not installed.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    if names is None:
        return [name for name in ("tensorboard",) if name in available]
    known = [name for name in LoggerType.list() if name != "all"]
    for name in names:
        if name not in known:
            raise ValueError(f"trackers must be of {', '.join(known)}, got {name!r}")
        if name not in available:
            package = "'dynamicvit[tensorboard]'" if name == "tensorboard" else name
            raise ValueError(f"tracker {name} is not installed: pip install {package}")
    return names


class Records:
    """Lines of metrics.jsonl, which trackers get too. Only the first process writes.

    Args:
        config: of the run.
        accelerator: made with the trackers as `log_with`.
        console: to print warnings to.
        progress: of the checkpoint that the run goes on from; None if it starts. Lines written
            after it are dropped: they will come again.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        console: Console,
        progress: dict[str, Any] | None,
    ) -> None:
        self.path = Path(config.output) / METRICS
        self.accelerator = accelerator
        self.console = console
        if accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_after(progress)
        accelerator.project_configuration.set_directories(config.output)
        # What TensorBoard shows of later steps is hidden, as they will come again.
        options = {"tensorboard": {"purge_step": (progress["step"] if progress else 0) + 1}}
        accelerator.init_trackers("dynamicvit", init_kwargs=options)
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # which makes a run of its own of them
                tracker.store_init_configuration(asdict(config))

    def log(self, line: dict[str, Any]) -> None:
        """Write a line: `kind` and `step`, and numbers, lists or dicts of them, or text."""
        if not self.accelerator.is_main_process:
            return
        line = {key: _without_nan(value) for key, value in line.items()}
        with name_in_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        numbers = {}
        for key, value in line.items():
            if key in ("kind", "step", "epoch"):
                continue
            named = value.items() if isinstance(value, dict) else [("", value)]
            if isinstance(value, list | tuple):
                named = [(str(stage), item) for stage, item in enumerate(value)]
            for suffix, number in named:
                if number is not None:
                    tag = "/".join(part for part in (line["kind"], key, suffix) if part)
                    numbers[tag] = number
        self.accelerator.log(numbers, step=line["step"])

    def warn(self, step: int, message: str, **details: Any) -> None:
        """Print a warning, and write it as a line of kind "warning"."""
        self.console.print(f"warning: {message}", soft_wrap=True)
        self.log({"kind": "warning", "step": step, "message": message, **details})

    def close(self) -> None:
        """Finish the trackers."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _drop_after(self, progress: dict[str, Any] | None) -> None:
        if not self.path.exists():
            return
        kept, damaged = [], 0
        texts = self.path.read_bytes().splitlines()
        for number, text in enumerate(texts, start=1):
            line = _read_line(text)
            if line is None:
                damaged += number < len(texts)  # the last one may be cut off by a kill
            elif progress is not None and _before(line, progress):
                kept.append(text + b"\n")
        if damaged:
            self.console.print(
                f"warning: {self.path} has damaged lines, which are removed: {damaged}",
                soft_wrap=True,
            )
        write_bytes(self.path, b"".join(kept))


def _read_line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    named = isinstance(line, dict) and isinstance(line.get("kind"), str)
    return line if named and isinstance(line.get("step"), int) else None


def _before(line: dict[str, Any], progress: dict[str, Any]) -> bool:
    """Whether a line was written before the checkpoint of this progress."""
    if line["kind"] == "warm_start":
        return True
    if line["kind"] == "validation" and progress["seen"] == 0:  # at an epoch's end it comes after
        return bool(line["step"] < progress["step"])
    return bool(line["step"] <= progress["step"])


def _without_nan(value: Any) -> Any:
    """The value with None instead of numbers that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


class CollapseWatch:
    """Names stages that keep all or nothing of what is present, though their ratio asks otherwise.

    Args:
        ratios: for each stage, the share of the tokens present that it should keep.
    """

    LIMIT = 0.01

    def __init__(self, ratios: Sequence[float]) -> None:
        self.ratios = ratios
        self.named: set[int] = set()
        self.window: list[Sequence[float]] = []

    def add(self, kept: Sequence[float]) -> None:
        """Note what a step kept: for each stage, the share of the original tokens."""
        self.window.append(kept)

    def check(self) -> list[tuple[int, str]]:
        """End a window: the stages (0-based) that collapsed in it, each once a run, and why."""
        window, self.window = self.window, []
        found = []
        before = 1.0
        for stage, asked in enumerate(self.ratios):
            mean = sum(kept[stage] for kept in window) / max(len(window), 1)
            share = mean / before if before > 0 else math.nan
            before = mean
            usual = self.LIMIT <= share <= 1 - self.LIMIT or math.isnan(share)
            asked_for = not self.LIMIT <= asked <= 1 - self.LIMIT
            if window and not usual and not asked_for and stage not in self.named:
                self.named.add(stage)
                found.append(
                    (
                        stage,
                        f"the scorer of stage {stage + 1} has collapsed: over the last "
                        f"{len(window)} steps it kept {share:.1%} of the tokens present, where "
                        f"{asked:.1%} are asked for",
                    )
                )
        return found
