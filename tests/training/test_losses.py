from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynamicvit import SparseOutput
from dynamicvit.training.losses import (
    LossWeights,
    batch_threshold,
    cross_entropy,
    distillation_loss,
    kept_count,
    logit_kl,
    ratio_loss,
    score_loss,
    token_kl,
    token_mse,
    weigh_targets,
)

SEEDS = st.integers(0, 2**32 - 1)


def _student(keep: Tensor, classes: int = 5) -> SparseOutput:
    batch, num_tokens = keep.shape
    return SparseOutput(
        logits=torch.randn(batch, classes),
        tokens=torch.randn(batch, num_tokens, 4),
        keep=(torch.ones_like(keep), keep),
        scores=(torch.zeros_like(keep),) * 2,
    )


def test_ratio_loss_by_hand() -> None:
    half = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    quarter = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert ratio_loss([half], [0.5]).item() == 0.0
    # stage 2: mean of (0.5 - 0.25)² and (0.5 - 0)²; then the sum over stages
    expected = 0.0 + (0.25**2 + 0.5**2) / 2
    assert ratio_loss([half, quarter], [0.5, 0.5]).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="shorter"):
        ratio_loss([half, quarter], [0.5])


def test_ratio_loss_pushes_towards_the_ratio() -> None:
    keep = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    ratio_loss([keep], [0.5]).backward()
    assert keep.grad is not None
    assert (keep.grad[0] < 0).all(), "too few are kept: more would lower the loss"
    assert (keep.grad[1] > 0).all(), "too many are kept"


@given(SEEDS, st.floats(0.05, 1.0), st.floats(0.05, 0.95))
def test_a_batch_as_a_whole_reaches_its_budget(seed: int, ratio: float, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(4, 25, generator=generator) + torch.arange(4.0)[:, None]
    ratios = torch.tensor([ratio, ratio * share])
    halves = scores.chunk(2)  # as two processes have them
    threshold = batch_threshold(ratios, lambda own: own)
    kept = scores >= threshold(0, scores, None)
    asked = 100 if ratio == 1.0 else max(1, round(float(ratios[0]) * 100))
    assert kept.sum() == asked
    again = kept & (scores >= threshold(1, scores, kept.float()))
    assert again.sum() == max(1, round(float(ratios[1]) * 100))
    gathered = batch_threshold(ratios, lambda _: scores)(0, halves[0], None)
    assert gathered == threshold(0, scores, None)


def test_the_mean_score_gets_no_gradient() -> None:
    """Neither from one process nor, with what another one has, from both."""
    values = torch.tensor([[3.0, 1.0, 5.0], [2.0, -2.0, 5.0]])
    keep = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    weights = torch.tensor([[1.0, 2.0, 0.0], [3.0, 6.0, 0.0]])
    scores = values.clone().requires_grad_()
    limit = batch_threshold(torch.tensor([0.5]), lambda own: own)(0, scores, keep)
    ((scores - limit) * weights).sum().backward()
    torch.testing.assert_close(scores.grad, (weights - 3.0) * keep)

    scores = values.clone().requires_grad_()
    # Another process has as many tokens, and takes three times as much off the mean.
    means = iter([torch.tensor(4.0), torch.tensor(-6.0)])
    asked: list[float] = []

    def mean(own: torch.Tensor) -> torch.Tensor:
        asked.append(float(own))
        return next(means)

    limit = batch_threshold(torch.tensor([0.5]), lambda own: own, mean)(0, scores, keep)
    ((scores - limit) * weights).sum().backward()
    assert asked == [4.0, -3.0]
    torch.testing.assert_close(scores.grad, (weights - 6.0) * keep)


def test_scores_are_held_near_0() -> None:
    scores = torch.tensor([[3.0, 1.0], [2.0, -2.0]], requires_grad=True)
    loss = score_loss([scores, 2 * scores])
    assert loss.item() == pytest.approx((9 + 1 + 4 + 4) / 4 * (1 + 4))


def test_a_budget_larger_than_what_is_left_keeps_what_is_left() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    keep = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert batch_threshold(torch.tensor([0.75]), lambda own: own)(0, scores, keep) == 2.0
    assert batch_threshold(torch.tensor([1.0]), lambda own: own)(0, scores, None) == -20.0


def test_cross_entropy_takes_classes_and_probabilities() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    by_hand = (math.log1p(math.exp(-2.0)) + math.log(2.0)) / 2
    assert cross_entropy(logits, labels).item() == pytest.approx(by_hand)
    probabilities = F.one_hot(labels, 2).float()
    assert cross_entropy(logits, probabilities).item() == pytest.approx(by_hand)
    smoothed = cross_entropy(logits, labels, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(by_hand + 0.05 * 2.0 / 2)
    # mixed targets are smoothed where they are mixed, not twice
    assert torch.equal(
        cross_entropy(logits, probabilities, label_smoothing=0.1),
        cross_entropy(logits, probabilities),
    )


@given(SEEDS)
def test_logit_kl_is_the_divergence_of_the_student_from_the_teacher(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 5, generator=generator)
    p, q = teacher.softmax(dim=-1), student.softmax(dim=-1)
    by_hand = (p * (p / q).log()).sum() / len(p)
    torch.testing.assert_close(logit_kl(student, teacher), by_hand, atol=1e-5, rtol=1e-5)
    assert logit_kl(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)


@given(SEEDS)
def test_token_loss_sees_kept_tokens_alone(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 6, 4, generator=generator)
    keep = (torch.rand(3, 6, generator=generator) > 0.4).float()
    keep[0, 0] = 1.0
    chosen = keep > 0.5
    by_hand = F.mse_loss(student[chosen], teacher[chosen])
    torch.testing.assert_close(token_mse(student, teacher, keep), by_hand)
    elsewhere = torch.where(chosen[..., None], student, 1e3)
    torch.testing.assert_close(token_mse(elsewhere, teacher, keep), by_hand)


def test_token_loss_only_selects_with_the_mask() -> None:
    keep = torch.tensor([[1.0, 0.0]], requires_grad=True)
    tokens = torch.randn(1, 2, 4, requires_grad=True)
    token_mse(tokens, torch.zeros(1, 2, 4), keep).backward()
    assert keep.grad is None
    assert tokens.grad is not None
    assert (tokens.grad[0, 0] != 0).all()
    assert (tokens.grad[0, 1] == 0).all()
    assert token_mse(tokens, torch.zeros(1, 2, 4), torch.zeros(1, 2)).item() == 0.0


@pytest.mark.parametrize("token_loss", [token_mse, token_kl])
@given(SEEDS, st.integers(1, 5))
def test_the_mean_of_shared_token_losses_is_that_of_the_whole_batch(
    token_loss: Any, seed: int, shares: int
) -> None:
    """With the mean count of kept tokens, whatever the shares keep, nothing included."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 6, 4, generator=generator)
    keep = (torch.rand(5, 6, generator=generator) > 0.8).float()
    parts = [part.tensor_split(shares) for part in (student, teacher, keep)]
    count = torch.stack([kept_count(part) for part in parts[2]]).mean()
    losses = [token_loss(*part, count) for part in zip(*parts, strict=True)]
    whole = token_loss(student, teacher, keep)
    torch.testing.assert_close(torch.stack(losses).mean(), whole, atol=1e-6, rtol=1e-5)


def test_the_objective_is_the_weighted_sum_of_its_parts() -> None:
    keep = (torch.rand(3, 6) > 0.4).float()
    student = _student(keep)
    teacher_logits, teacher_tokens = torch.randn(3, 5), torch.randn(3, 6, 4)
    labels, ratios = torch.tensor([0, 3, 4]), (0.9, 0.5)
    weights = LossWeights(cross_entropy=0.3, ratio=5.0, logit_kl=0.0, token=0.7)
    losses = distillation_loss(
        student, teacher_logits, teacher_tokens, labels, ratios, weights, label_smoothing=0.1
    )
    parts = {
        "cross_entropy": cross_entropy(student.logits, labels, 0.1),
        "ratio": ratio_loss(student.keep, ratios),
        "logit_kl": logit_kl(student.logits, teacher_logits),
        "token": token_mse(student.tokens, teacher_tokens, keep),
    }
    for name, value in parts.items():  # a term of weight 0 is still there to be looked at
        assert losses[name].item() == pytest.approx(value.item())
    total = 0.3 * parts["cross_entropy"] + 5.0 / 2 * parts["ratio"] + 0.7 * parts["token"]
    assert losses["loss"].item() == pytest.approx(total.item())
    assert LossWeights() == LossWeights(cross_entropy=1.0, ratio=2.0, logit_kl=0.5, token=0.5)


def test_losses_are_computed_in_float32() -> None:
    student = _student(torch.ones(2, 6))
    half = SparseOutput(student.logits.bfloat16(), student.tokens.bfloat16(), *student[2:])
    losses = distillation_loss(
        half,
        torch.randn(2, 5).bfloat16(),
        torch.randn(2, 6, 4).bfloat16(),
        torch.tensor([0, 1]),
        (0.9, 0.5),
    )
    assert {value.dtype for value in losses.values()} == {torch.float32}


@given(SEEDS, st.sampled_from([0.0, 0.1]))
def test_weighed_targets_give_torch_s_weighted_loss(seed: int, smoothing: float) -> None:
    torch.manual_seed(seed)
    logits, weights = torch.randn(6, 4), torch.rand(4)
    targets = torch.randint(4, (6,))
    options: dict[str, Any] = {"weight": weights, "reduction": "sum"}
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing, **options) / 6
    found = cross_entropy(logits, weigh_targets(targets, weights, smoothing), label_smoothing=0.5)
    torch.testing.assert_close(found, expected)
    mixed = torch.rand(6, 4).softmax(-1)
    expected = F.cross_entropy(logits, mixed, **options) / 6
    torch.testing.assert_close(cross_entropy(logits, weigh_targets(mixed, weights)), expected)
