"""Wall-clock speed of a pruned model against its dense one, measured fairly."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Speed:
    """Dense against pruned at one batch size, same engine, precision and inputs.

    Attributes:
        batch_size: images a call.
        dense, sparse: images a second, medians over the rounds.
        speed_up: median over rounds of dense time / pruned time.
        spread: the lower and upper quartile of those ratios.
    """

    batch_size: int
    dense: float
    sparse: float
    speed_up: float
    spread: tuple[float, float]


@torch.no_grad()
def compare_speed(
    dense: nn.Module,
    sparse: nn.Module,
    input_size: tuple[int, int, int],
    batch_sizes: Sequence[int] = (1, 8, 32),
    seconds: float = 4.0,
    precision: str = "no",
) -> list[Speed]:
    """Time two models in turn, A B B A …, so that a drifting machine cannot favour one.

    Args:
        dense, sparse: the models, on one device. Run in eval mode; their modes are restored.
        input_size: (channels, height, width).
        batch_sizes: images a call, one result each.
        seconds: spent on each batch size, at least; at least 7 rounds are run.
        precision: "no" for float32, "bf16" for autocast to bfloat16; the same for both.
    """
    models = (dense, sparse)
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    device = next(dense.parameters()).device
    results = []
    for batch_size in batch_sizes:
        images = torch.randn(batch_size, *input_size, device=device)
        # As many calls a timing as make about 50 ms, so that the clock's grain does not matter.
        once = min(_seconds(dense, images, precision) for _ in range(3))
        calls = max(1, round(0.05 / once))
        times: list[tuple[float, float]] = []
        start = time.perf_counter()
        while len(times) < 7 or time.perf_counter() - start < seconds:
            order = models if len(times) % 2 == 0 else models[::-1]
            took = {id(model): _seconds(model, images, precision, calls) for model in order}
            times.append((took[id(dense)], took[id(sparse)]))
        ratios = [a / b for a, b in times]
        low, _, high = statistics.quantiles(ratios, n=4)
        images_a_time = batch_size * calls
        results.append(
            Speed(
                batch_size=batch_size,
                dense=images_a_time / statistics.median(a for a, _ in times),
                sparse=images_a_time / statistics.median(b for _, b in times),
                speed_up=statistics.median(ratios),
                spread=(low, high),
            )
        )
    for model, mode in zip(models, modes, strict=True):
        model.train(mode)
    return results


def environment() -> dict[str, Any]:
    """Hardware, versions and date, to stand beside every measured number."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "system": platform.system(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _seconds(model: nn.Module, images: Tensor, precision: str, calls: int = 1) -> float:
    device = images.device.type
    autocast: Any = torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()
    with autocast:
        _wait(images.device)
        start = time.perf_counter()
        for _ in range(calls):
            model(images)
        _wait(images.device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _commit() -> str | None:
    """The commit of the checkout this package runs from; None where there is none."""
    here = Path(__file__)
    try:
        # Fails for a package installed inside somebody else's checkout, whose commit is not ours.
        _git("ls-files", "--error-unmatch", here.name, cwd=here.parent)
        return _git("describe", "--always", "--dirty", cwd=here.parent)
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str, cwd: Path) -> str:
    result = subprocess.run(
        ["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def _processor() -> str:
    """The processor's name where the system tells, its architecture elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
