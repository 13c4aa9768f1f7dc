"""Timing calls in turn, A B B A …, so that a drifting machine favours none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Engine = Callable[[Tensor], Any]


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
    precision: str = "float32",
) -> list[Speed]:
    """Time two models in turn, A B B A …, so that a drifting machine cannot favour one.

    Args:
        dense, sparse: the models, on one device. Run in eval mode; their modes are restored.
        input_size: (channels, height, width).
        batch_sizes: images a call, one result each.
        seconds: spent on each batch size, at least; at least 7 rounds are run.
        precision: "float32", or "bfloat16" for autocast; the same for both.
    """
    models = (dense, sparse)
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    device = next(dense.parameters()).device
    autocast = partial(
        torch.autocast, device.type, torch.bfloat16, enabled=precision in ("bf16", "bfloat16")
    )

    def repeat(model: nn.Module, calls: int) -> Engine:
        def run(images: Tensor) -> None:
            with autocast():
                for _ in range(calls):
                    model(images)

        return run

    results = []
    for batch_size in batch_sizes:
        images = torch.randn(batch_size, *input_size, device=device)
        # As many calls a timing as make about 50 ms, so that the clock's grain does not matter.
        once = min(time_call(repeat(dense, 1), images) for _ in range(3))
        calls = max(1, round(0.05 / once))
        times = interleave([repeat(model, calls) for model in models], [images], seconds)
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


def interleave(
    calls: Sequence[Engine], batches: Sequence[Tensor], seconds: float, rounds: int = 7
) -> list[tuple[float, ...]]:
    """Seconds of a call of each, in rounds A B B A …, so that a drifting machine favours none.

    Args:
        calls: what to time.
        batches: images; each round takes the next of them, the same for all calls.
        seconds: spent, at least.
        rounds: run, at least.
    """
    times: list[tuple[float, ...]] = []
    for call in calls:
        call(batches[0])
    start = time.perf_counter()
    while len(times) < rounds or time.perf_counter() - start < seconds:
        images = batches[len(times) % len(batches)]
        order = range(len(calls))
        took = {
            index: time_call(calls[index], images)
            for index in (order if len(times) % 2 == 0 else reversed(order))
        }
        times.append(tuple(took[index] for index in order))
    return times


def time_call(call: Engine, images: Tensor) -> float:
    """Seconds of one call: by the clock, or on a GPU between two CUDA events."""
    if not images.is_cuda:
        start = time.perf_counter()
        call(images)
        return time.perf_counter() - start
    stream = torch.cuda.current_stream(images.device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(images.device)
    begin.record(stream)
    call(images)
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
