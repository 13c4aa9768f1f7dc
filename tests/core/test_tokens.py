from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynamicvit.core.tokens import (
    MIN_KEEP,
    Tokens,
    attention_bias,
    best_keep,
    bound_gradient,
    gather_tokens,
    keep_mask,
    key_bias,
    masked_mean,
    sample_keep,
    straight_through,
    topk_keep,
)

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 20)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(SEEDS, st.data(), SIZES, SIZES)
def test_topk_keeps_the_top_scores_and_gather_takes_them(
    seed: int, data: st.DataObject, batch: int, num_tokens: int
) -> None:
    count = data.draw(st.integers(1, num_tokens))
    # Few distinct values, so that ties are common.
    scores = torch.randint(0, 5, (batch, num_tokens), generator=_generator(seed)).float()
    index = topk_keep(scores, count)
    assert index.shape == (batch, count)
    mask = keep_mask(index, num_tokens)
    assert mask.sum(dim=1).tolist() == [count] * batch, "indices are not distinct"
    kept = gather_tokens(scores, index).sort(dim=1, descending=True).values
    assert torch.equal(kept, scores.sort(dim=1, descending=True).values[:, :count])

    tokens = torch.randn(batch, num_tokens, 3, generator=_generator(seed))
    gathered = gather_tokens(tokens, index)
    assert gathered.shape == (batch, count, 3)
    for row in range(batch):
        assert torch.equal(gathered[row], tokens[row, index[row]])


@pytest.mark.parametrize("count", [0, -1, 5])
def test_topk_refuses_an_impossible_count(count: int) -> None:
    with pytest.raises(ValueError, match=rf"count must lie in 1\.\.4, got {count}"):
        topk_keep(torch.zeros(2, 4), count)


def test_keep_mask_has_ones_at_the_indices() -> None:
    mask = keep_mask(torch.tensor([[2, 0], [3, 1]]), 4, dtype=torch.float64)
    expected = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.float64)
    assert torch.equal(mask, expected)
    assert mask.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_sampled_decisions_are_hard_and_their_gradient_is_soft(
    dtype: torch.dtype, tau: float
) -> None:
    scores = (2 * torch.randn(4, 50)).to(dtype).requires_grad_()
    uniform = torch.rand(4, 50)
    decisions = sample_keep(scores, uniform, tau)
    assert decisions.dtype == torch.float32
    assert set(decisions.unique().tolist()) == {0.0, 1.0}

    weights = torch.randn(4, 50)
    (decisions * weights).sum().backward()
    soft_scores = scores.detach().float().requires_grad_()
    soft = torch.sigmoid((soft_scores + torch.logit(uniform)) / tau)
    assert torch.equal(decisions.detach(), (soft > 0.5).float())
    (soft * weights).sum().backward()
    assert scores.grad is not None
    assert soft_scores.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        scores.grad.float(), soft_scores.grad, atol=tolerance, rtol=tolerance
    )


@given(SEEDS, st.floats(0.0, 10.0))
def test_a_higher_score_never_turns_keep_into_drop(seed: int, raise_by: float) -> None:
    generator = _generator(seed)
    scores = 3 * torch.randn(1, 40, generator=generator)
    uniform = torch.rand(1, 40, generator=generator)
    lower = sample_keep(scores, noise_BN=uniform)
    higher = sample_keep(scores + raise_by, noise_BN=uniform)
    assert (higher >= lower).all()
    # and enough of a raise keeps everything, whatever the noise
    assert sample_keep(scores + 40.0, noise_BN=uniform).all()


@pytest.mark.parametrize("uniform", [0.0, 1.0])
@pytest.mark.parametrize("score", [-30.0, 0.0, 30.0])
def test_extreme_noise_is_bounded(uniform: float, score: float) -> None:
    scores = torch.full((1, 3), score, requires_grad=True)
    decisions = sample_keep(scores, noise_BN=torch.full((1, 3), uniform))
    decisions.sum().backward()
    # a sure score outweighs any noise; between even odds the noise decides
    assert decisions.tolist() == [[float(score > 0 or (score == 0 and uniform == 1.0))] * 3]
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("score", [-2.0, 0.0, 1.0])
def test_sampling_is_the_gumbel_softmax_over_keep_and_drop(score: float, tau: float) -> None:
    """Frequency and mean gradient, against probability theory and torch's own Gumbel-softmax."""
    draws = 20_000
    probability = torch.tensor(score).sigmoid().item()
    # six standard errors of a difference of two means of numbers in [0, 1]
    tolerance = 6 * (2 * 0.25 / draws) ** 0.5

    scores = torch.full((1, draws), score, requires_grad=True)
    ours = sample_keep(scores, temperature=tau)
    ours.sum().backward()
    assert ours.mean().item() == pytest.approx(probability, abs=tolerance)

    pair = torch.tensor([score, 0.0]).expand(draws, 2).clone().requires_grad_()
    gumbel = F.gumbel_softmax(pair.log_softmax(dim=-1), tau=tau, hard=True)[:, 0]
    gumbel.sum().backward()
    assert ours.mean().item() == pytest.approx(gumbel.mean().item(), abs=tolerance)
    assert scores.grad is not None
    assert pair.grad is not None
    assert scores.grad.mean().item() == pytest.approx(
        pair.grad[:, 0].mean().item(), abs=tolerance / tau
    )


def test_the_best_are_kept_with_the_gradient_of_soft_decisions() -> None:
    scores = torch.tensor([[-1.0, 0.0, 1e-3, 5.0]], requires_grad=True)
    assert best_keep(scores, 2).tolist() == [[0.0, 0.0, 1.0, 1.0]]
    there = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert best_keep(scores, 2, there).tolist() == [[0.0, 1.0, 1.0, 0.0]]
    decisions = straight_through(best_keep(scores, 2), scores)
    decisions.sum().backward()
    soft = scores.detach().sigmoid()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, soft * (1 - soft))


@given(SEEDS, SIZES, SIZES, st.data())
def test_masked_mean_is_the_mean_of_the_gathered_tokens(
    seed: int, batch: int, num_tokens: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, num_tokens))
    tokens = torch.randn(batch, num_tokens, 3, generator=_generator(seed))
    index = topk_keep(torch.rand(batch, num_tokens, generator=_generator(seed)), count)
    mean = masked_mean(tokens, keep_mask(index, num_tokens))
    torch.testing.assert_close(mean, gather_tokens(tokens, index).mean(dim=1))


def test_masked_mean_without_a_mask_or_without_tokens() -> None:
    tokens = torch.randn(2, 4, 3)
    assert torch.equal(masked_mean(tokens), tokens.mean(dim=1))
    assert torch.equal(masked_mean(tokens, torch.zeros(2, 4)), torch.zeros(2, 3))


def test_key_bias_has_the_gradient_of_the_floored_logarithm() -> None:
    keep = torch.tensor([[0.0, 1e-8, 1e-6, 1e-3, 0.5, 1.0]], requires_grad=True)
    bias = key_bias(keep)
    floored = keep.detach().clamp(min=MIN_KEEP)
    torch.testing.assert_close(bias.detach(), floored.log())
    bias.sum().backward()
    assert keep.grad is not None
    torch.testing.assert_close(keep.grad, 1.0 / floored)
    assert keep.grad[0, 0] == pytest.approx(1 / MIN_KEEP)  # a dropped token does learn


def _paper_attention(logits: Tensor, keep: Tensor, num_prefix: int) -> Tensor:
    """exp(a) G / Σ exp(a) G, as the paper writes it, in double precision."""
    size = logits.shape[-1]
    all_keep = F.pad(keep, (num_prefix, 0), value=1.0)[:, None, None, :]
    itself = torch.eye(size, dtype=torch.bool)
    policy = torch.where(itself, torch.ones((), dtype=keep.dtype), all_keep)
    weights = logits.double().exp() * policy
    return weights / weights.sum(dim=-1, keepdim=True)


def _hard(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) > 0.5).double()


def _fractional(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator).double().clamp(min=1e-3)


@pytest.mark.parametrize("decisions", [_hard, _fractional])
@given(seed=SEEDS, num_prefix=st.integers(0, 3), num_tokens=st.integers(2, 12))
def test_the_bias_is_the_papers_attention_mask(
    decisions: Callable[[tuple[int, int], torch.Generator], Tensor],
    seed: int,
    num_prefix: int,
    num_tokens: int,
) -> None:
    generator = _generator(seed)
    size = num_prefix + num_tokens
    logits = torch.randn(2, 3, size, size, generator=generator)
    weights = torch.randn(2, 3, size, size, generator=generator)
    reference = decisions((2, num_tokens), generator).requires_grad_()
    keep = reference.detach().float().requires_grad_()

    bias = attention_bias(keep, num_prefix)
    assert bias.shape == (2, 1, size, size)
    assert bias.dtype == torch.float32
    ours = (logits + bias).softmax(dim=-1)
    paper = _paper_attention(logits, reference, num_prefix)
    # a dropped token's weight is e⁻²⁸ of what it was, not 0
    torch.testing.assert_close(ours.double(), paper, atol=2e-4, rtol=1e-4)

    (ours * weights).sum().backward()
    (paper * weights).sum().backward()
    assert keep.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(keep.grad.double(), reference.grad, atol=2e-3, rtol=1e-3)


def test_a_dropped_token_sees_itself_and_what_is_kept() -> None:
    keep = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    bias = attention_bias(keep, num_prefix=1).detach()
    visible = bias[0, 0] == 0.0
    assert visible.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, False, True],
    ]
    assert bias[0, 0][~visible].exp().tolist() == pytest.approx([MIN_KEEP] * 6, rel=1e-5)
    # With nothing to learn from it, a dropped token is blocked outright.
    assert (attention_bias(keep.detach(), num_prefix=1)[0, 0][~visible] < -80).all()


def test_what_belongs_to_a_token_leaves_with_it() -> None:
    values = torch.arange(8.0).view(1, 8)
    rope = values.view(1, 1, 1, 8, 1)
    tokens = Tokens(
        torch.cat([torch.tensor([[-1.0]]), values], dim=1)[..., None],
        num_prefix=1,
        grid=(2, 4),
        rope=rope,
        keep=values,
        size=values,
        bias=torch.zeros(1, 1, 9, 9),
    )
    once = tokens.take(torch.tensor([[6, 1, 3]]))
    twice = once.take(torch.tensor([[2, 0]]))
    assert twice.x.flatten().tolist() == [-1, 3, 6]
    assert twice.positions is not None
    for found in (twice.rope, twice.positions, twice.keep, twice.size):
        assert found is not None
        assert found.flatten().tolist() == [3, 6]
    assert twice.bias is None


def test_only_the_blocks_that_are_left_keep_their_rotary_embeddings() -> None:
    kept = torch.tensor([[2, 0]])
    own = torch.arange(12.0).view(3, 1, 1, 4, 1)  # of three blocks
    tokens = Tokens(torch.zeros(1, 4, 1), num_prefix=0, grid=(2, 2), rope=own)
    assert cast(Any, tokens.take(kept, 2).rope).flatten().tolist() == [6, 4, 10, 8]
    shared = tokens._replace(rope=own[:1]).take(kept, 2)
    assert cast(Any, shared.rope).flatten().tolist() == [2, 0]


def test_a_gradient_is_bounded_and_nothing_else() -> None:
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    y = bound_gradient(x, 0.5)
    assert torch.equal(y, x)
    (y * torch.tensor([0.25, -7.0, 1e6])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.25, -0.5, 0.5]
