from __future__ import annotations

import torch
from torch import nn

from dynamicvit.deploy.benchmark import compare_speed, environment


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
    compare_speed(*models, (3, 8, 8), batch_sizes=(1,), seconds=0.01, precision="bf16")
    for model in models:
        assert {dtype for _, _, dtype in model.calls} == {torch.bfloat16}


def test_environment_says_what_a_number_was_measured_on() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["processor"]
    assert found["threads"] == torch.get_num_threads()
