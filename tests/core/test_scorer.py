from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynamicvit import TokenScorer
from dynamicvit.core.selectors.learned import FusedScorer
from dynamicvit.core.tokens import gather_tokens, keep_mask, topk_keep
from tests.conftest import randomise


def _paper_log_probabilities(scorer: TokenScorer, x: Tensor, keep: Tensor) -> Tensor:
    """The prediction module as the paper writes it, one formula after the other."""
    norm, linear, head = scorer.norm, scorer.embed, cast(Any, scorer.head)
    u = F.gelu(linear(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps=1e-5)))
    half = x.shape[-1] // 2
    pooled = (u[..., half:] * keep[..., None]).sum(dim=1) / keep.sum(dim=1, keepdim=True)
    u = torch.cat([u[..., :half], pooled[:, None].expand(-1, x.shape[1], -1)], dim=-1)
    for layer in (head[0], head[2]):
        u = F.gelu(F.linear(u, layer.weight, layer.bias))
    result: Tensor = F.linear(u, head[4].weight, head[4].bias).log_softmax(dim=-1)
    return result


def test_the_score_is_the_papers_log_odds_of_keeping() -> None:
    scorer = TokenScorer(16)
    randomise(scorer)
    x, keep = torch.randn(3, 7, 16), (torch.rand(3, 7) > 0.4).float()
    log_keep, log_drop = _paper_log_probabilities(scorer, x, keep).unbind(dim=-1)
    score = scorer(x, keep)
    torch.testing.assert_close(score, log_keep - log_drop)
    assert torch.equal(score.argsort(dim=1), log_keep.argsort(dim=1))  # the paper orders by this
    torch.testing.assert_close(scorer(x), scorer(x, torch.ones(3, 7)))


def test_masking_tokens_scores_the_rest_as_if_they_had_left() -> None:
    scorer = TokenScorer(16)
    randomise(scorer)
    x = torch.randn(3, 9, 16)
    index = topk_keep(torch.rand(3, 9), 4)
    masked = gather_tokens(scorer(x, keep_mask(index, 9)), index)
    torch.testing.assert_close(masked, scorer(gather_tokens(x, index)))
    # which is not what all tokens together give: the global feature does depend on who is there
    assert (masked - gather_tokens(scorer(x), index)).abs().max() > 1e-3


@given(seed=st.integers(0, 1000), dim=st.sampled_from([4, 16, 48]), tokens=st.integers(1, 9))
@torch.no_grad()
def test_the_fused_form_gives_the_same_scores(seed: int, dim: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scorer = TokenScorer(dim)
    randomise(scorer)
    x = torch.randn(2, tokens, dim, generator=generator)
    keep = (torch.rand(2, tokens, generator=generator) > 0.3).float()
    fused = FusedScorer(scorer)
    torch.testing.assert_close(fused(x), scorer(x))
    torch.testing.assert_close(fused(x, keep), scorer(x, keep))


def test_the_fused_form_is_a_copy_of_the_same_type() -> None:
    scorer = TokenScorer(16).to(torch.bfloat16)
    fused = FusedScorer(scorer)
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.bfloat16}
    count = [sum(p.numel() for p in module.parameters()) for module in (scorer, fused)]
    assert count[1] < count[0]
    assert not any(p is q for p in fused.parameters() for q in scorer.parameters())


@pytest.mark.parametrize("probability", [0.3, 0.5, 0.9, 1.0])
def test_the_keep_prior_sets_the_starting_probability(probability: float) -> None:
    scorer = TokenScorer(8)
    scorer.set_keep_prior(probability)
    torch.nn.init.zeros_(cast(Any, scorer.head)[-1].weight)
    keep = scorer(torch.randn(2, 5, 8)).sigmoid()
    # 1 becomes 0.999: with infinite odds nothing could be learned
    assert keep.flatten().tolist() == pytest.approx([min(probability, 0.999)] * 10, abs=1e-5)


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1, float("nan")])
def test_an_impossible_prior_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match=r"probability must lie in \(0, 1\], got"):
        TokenScorer(8).set_keep_prior(probability)


@pytest.mark.parametrize("dim", [0, -4, 2, 30])
def test_a_width_it_cannot_halve_twice_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"dim must be a positive multiple of 4, got {dim}"):
        TokenScorer(dim)
