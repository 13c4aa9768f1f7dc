"""Time calls in turn, in rounds A B B A …, so that a drifting machine favours none of them.

`take_turns` gives one round after another, and `interleave` collects rounds for some seconds.
`medians` and `compare_times` summarise rounds. `compare_speed` does all of this for two models.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynamicvit.core.macs import in_eval_mode

Engine = Callable[[Tensor], Any]  # what is called with images [B, C, H, W]
Round = tuple[float, ...]  # seconds of each call, once


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
    """Time two models in turn on the same random images.

    Args:
        dense, sparse: the models, on one device. Run in eval mode; their modes are restored.
        input_size: (channels, height, width).
        batch_sizes: images a call, one result each.
        seconds: spent on each batch size, at least; at least 7 rounds are run.
        precision: "float32", or "bfloat16" or "float16" for autocast; the same for both.

    Raises:
        ValueError: if there is no such precision.
    """
    if precision not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"precision must be float32, bfloat16 or float16, got {precision!r}")
    device = next(dense.parameters()).device
    dtype = torch.float16 if precision == "float16" else torch.bfloat16

    def repeat(model: nn.Module, calls: int, images: Tensor) -> None:
        with torch.autocast(device.type, dtype, enabled=precision != "float32"):
            for _ in range(calls):
                model(images)

    def compare(batch_size: int) -> Speed:
        images = torch.randn(batch_size, *input_size, device=device)
        # As many calls a timing as take about 50 ms: the clock counts in steps.
        once = min(time_call(partial(repeat, dense, 1), images)[0] for _ in range(3))
        calls = max(1, round(0.05 / once))
        both = [partial(repeat, model, calls) for model in (dense, sparse)]
        times = interleave(both, [images], seconds)
        a, b = (batch_size * calls / took for took in medians(times))
        return Speed(batch_size, a, b, *compare_times(times))

    with in_eval_mode(dense), in_eval_mode(sparse):
        return [compare(batch_size) for batch_size in batch_sizes]


def take_turns(calls: Sequence[Engine], batches: Sequence[Tensor]) -> Iterator[Round]:
    """Rounds of timed calls without end: the first in order, the next in reverse order, and so on.

    Args:
        calls: what to time. Each is called once before the first round, without a clock.
        batches: images; each round takes the next of them, the same for all calls.
    """
    for call in calls:
        call(batches[0])
    index = 0
    while True:
        order = range(len(calls))
        took = [0.0] * len(calls)
        for position in order if index % 2 == 0 else reversed(order):
            took[position] = time_call(calls[position], batches[index % len(batches)])[0]
        yield tuple(took)
        index += 1


def interleave(
    calls: Sequence[Engine], batches: Sequence[Tensor], seconds: float, rounds: int = 7
) -> list[Round]:
    """Rounds of `take_turns`, for `seconds` at least and `rounds` at least."""
    turns = take_turns(calls, batches)
    times = [next(turns)]  # with it come the calls without a clock, which may compile for minutes
    start = time.perf_counter()
    while len(times) < rounds or time.perf_counter() - start < seconds:
        times.append(next(turns))
    return times


def medians(times: Sequence[Round]) -> list[float]:
    """The median over rounds of the seconds of each call."""
    return [statistics.median(column) for column in zip(*times, strict=True)]


def compare_times(
    times: Sequence[Round], slow: int = 0, fast: int = 1
) -> tuple[float, tuple[float, float]]:
    """How many times as fast one call is as another: median over rounds, and the quartiles.

    Args:
        times: rounds.
        slow, fast: which of the calls. The ratio is the time of `slow` / the time of `fast`.
    """
    ratios = [took[slow] / took[fast] for took in times]
    if len(ratios) < 2:
        return ratios[0], (ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4)
    return median, (low, high)


def time_call(call: Engine, images: Tensor) -> tuple[float, Any]:
    """Seconds of one call, by the clock or on a GPU between two CUDA events; and what it gives."""
    if not images.is_cuda:
        start = time.perf_counter()
        result = call(images)
        return time.perf_counter() - start, result
    stream = torch.cuda.current_stream(images.device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(images.device)
    begin.record(stream)
    result = call(images)
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, result
