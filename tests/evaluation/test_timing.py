from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dynamicvit.evaluation import timing
from dynamicvit.evaluation.timing import compare_speed, compare_times, interleave, medians


class _Work(nn.Module):
    """A model that takes `amount` of work, and counts its images."""

    def __init__(self, amount: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.amount = amount
        self.calls: list[tuple[int, bool, torch.dtype]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result = torch.eye(64)
        for _ in range(self.amount):
            result = result @ torch.eye(64)
        self.calls.append((len(images), self.training, result.dtype))
        return result


def test_both_are_run_alike_and_the_ratio_is_of_their_times() -> None:
    slow, fast = _Work(400).train(), _Work(1)
    [one, two] = compare_speed(slow, fast, (3, 8, 8), batch_sizes=(1, 2), seconds=0.05)
    assert (one.batch_size, two.batch_size) == (1, 2)
    assert slow.training, "the mode is restored"
    assert not any(training for _, training, _ in slow.calls)
    assert {size for size, _, _ in fast.calls} == {1, 2}
    for speed in (one, two):
        assert speed.sparse > speed.dense > 0  # 400 times the work
        assert speed.spread[0] <= speed.speed_up <= speed.spread[1]


def test_precision_reaches_both() -> None:
    models = _Work(1), _Work(1)
    compare_speed(*models, (3, 8, 8), batch_sizes=(1,), seconds=0.01, precision="bfloat16")
    for model in models:
        assert {dtype for _, _, dtype in model.calls} == {torch.bfloat16}


def test_precisions_have_one_set_of_names() -> None:
    with pytest.raises(ValueError, match=r"precision must be float32, .* got 'bf16'"):
        compare_speed(_Work(1), _Work(1), (3, 8, 8), precision="bf16")


def test_rounds_alternate() -> None:
    calls: list[str] = []
    seen: list[float] = []

    def call(name: str) -> Callable[[torch.Tensor], None]:
        def run(images: torch.Tensor) -> None:
            calls.append(name)
            seen.append(float(images))

        return run

    batches = [torch.tensor(0.0), torch.tensor(1.0)]
    times = interleave([call("a"), call("b")], batches, seconds=0)
    assert [len(took) for took in times] == [2] * 7
    assert "".join(calls) == "ab" + "abba" * 3 + "ab"
    assert seen == [0, 0, *([0, 0, 1, 1] * 3), 0, 0], "each round has the next batch, for both"


def test_the_first_call_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles, for longer than the seconds that are given."""
    now = 0.0

    def compile_first(images: torch.Tensor) -> None:
        nonlocal now
        now += 100.0 if now == 0 else 1.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert interleave([compile_first], [torch.zeros(1)], seconds=20, rounds=1) == [(1.0,)] * 21


def test_rounds_are_summed_up_by_medians_of_times_and_of_ratios() -> None:
    times = [(2.0, 1.0), (9.0, 3.0), (4.0, 1.0)]
    assert medians(times) == [4.0, 1.0]
    assert compare_times(times) == (3.0, (2.0, 4.0))
    assert compare_times(times, 1, 0)[0] == pytest.approx(1 / 3)
    assert compare_times(times[:1]) == (2.0, (2.0, 2.0))
