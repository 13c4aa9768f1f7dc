"""Paths: how a selector's decision is carried out.

Axes: B images, N patch tokens, P prefix tokens, C channels, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dynamicvit.core.backbones import Adapter, Backbone
from dynamicvit.core.selectors import Selector, Stage
from dynamicvit.core.tokens import (
    Tokens,
    attention_bias,
    best_keep,
    bound_gradient,
    gather_tokens,
    others,
    sample_keep,
    squeeze,
    straight_through,
    topk_keep,
)

# A decision must not claim to change its image's loss by more than this, when a threshold is given.
MOST_GRADIENT = 0.3


def keep_tokens(stage: Stage, kept_BK: Tensor) -> Tokens:
    """What goes on from a stage where the patch tokens at `kept_BK` stay and the others leave."""
    tokens = stage.tokens
    left = stage.adapter.depth(stage.model) - stage.block
    kept = tokens.take(kept_BK, left)
    if not stage.squeeze or kept.num_patches == tokens.num_patches:
        return kept
    leaving = gather_tokens(tokens.patches, others(kept_BK, tokens.num_patches))
    return kept.with_patches(squeeze(kept.patches, leaving))


class Path:
    """One way through the model. `SparseViT.run` calls `apply` at each stage, then runs blocks."""

    def noise(self, stage: int) -> Tensor | None:
        """[B, N] uniform draws for a stage; None for fresh ones."""
        return None

    def apply(self, stage: Stage, selector: Selector) -> tuple[Tokens, Tensor | None]:
        """The tokens that go on from a stage, and the scores, [B, N], if they were scored."""
        raise NotImplementedError

    def run_block(self, adapter: Adapter, model: Backbone, block: int, tokens: Tokens) -> Tensor:
        """[B, P + N, C] after a block."""
        return adapter.run_block(model, block, tokens)


class Pruned(Path):
    """Tokens really leave, and the best go on.

    Args:
        trace: ask every selector. Without it, a stage that keeps all its tokens asks none.
        scores: of the first stage, [B, N], if they are known.
    """

    def __init__(self, trace: bool = False, scores: Tensor | None = None) -> None:
        self.trace = trace
        self.scores = scores

    def apply(self, stage: Stage, selector: Selector) -> tuple[Tokens, Tensor | None]:
        tokens = stage.tokens
        all_stay = stage.num_kept >= tokens.num_patches
        if all_stay and (selector.merges or not self.trace):
            return tokens, None
        given: Any = self.scores if stage.number == 0 else None
        if given is None:
            given = selector(tokens.patches, None, stage)
        if not selector.merges:
            return keep_tokens(stage, topk_keep(given, stage.num_kept)), given
        tokens = tokens.with_patches(given.x)
        bias = None
        if selector.counts_size:
            weight = F.pad(given.size.log(), (tokens.num_prefix, 0))
            bias = weight[:, None, None, :].to(tokens.x.dtype)
        return tokens._replace(size=given.size, positions=None, bias=bias), None


class Masked(Path):
    """All tokens are there, and dropped ones are blocked inside attention: differentiable.

    Args:
        sample: draw decisions from log-odds, as training does. Otherwise the best are kept, as many
            as the schedule says; the same tokens as in the pruned path.
        decisions: given instead, for each stage [B, N].
        noise: for each stage, [B, N] uniform draws.
        temperature: of the sampling's relaxation.
        threshold: gives, from a stage's number, its scores and the keep mask before it ([B, N], or
            None), what is taken off the scores before decisions are drawn. The gradients of
            decisions are bounded then, for a loss that is a mean over images. By default nothing.
    """

    def __init__(
        self,
        sample: bool = False,
        decisions: Sequence[Tensor] | None = None,
        noise: Sequence[Tensor] | None = None,
        temperature: float = 1.0,
        threshold: Callable[[int, Tensor, Tensor | None], Tensor] | None = None,
    ) -> None:
        self.sample = sample
        self.decisions = decisions
        self.given_noise = noise
        self.temperature = temperature
        self.threshold = threshold

    def noise(self, stage: int) -> Tensor | None:
        return None if self.given_noise is None else self.given_noise[stage]

    def apply(self, stage: Stage, selector: Selector) -> tuple[Tokens, Tensor | None]:
        tokens = stage.tokens
        scores = selector(tokens.patches, tokens.keep, stage)
        decision = self.decide(stage, selector, scores)
        keep = decision if tokens.keep is None else tokens.keep * decision
        if self.threshold is not None:
            # A small budget may drop what an image cannot do without. Attention that looked there
            # makes the gradient of its decision a thousand times and more that of others.
            keep = bound_gradient(keep, MOST_GRADIENT / len(keep))
        if stage.squeeze:
            leaving = 1.0 - decision if tokens.keep is None else tokens.keep - keep
            x = squeeze(tokens.patches, tokens.patches, leaving, can_host_BK=keep)
            tokens = tokens.with_patches(x)
        return tokens._replace(keep=keep, bias=self.bias(keep, tokens)), scores

    def bias(self, keep: Tensor, tokens: Tokens) -> Tensor:
        """What blocks dropped tokens inside attention: [B, 1, P + N, P + N]."""
        return attention_bias(keep, tokens.num_prefix).to(tokens.x.dtype)

    def decide(self, stage: Stage, selector: Selector, scores: Tensor) -> Tensor:
        """[B, N] float32 decisions of this stage alone."""
        if self.decisions is not None:
            return self.decisions[stage.number].float()
        if self.sample and selector.log_odds:
            if self.threshold is not None:
                scores = scores - self.threshold(stage.number, scores, stage.tokens.keep)
            return sample_keep(scores, stage.noise, self.temperature)
        best = best_keep(scores, stage.num_kept, stage.tokens.keep)
        return straight_through(best, scores) if selector.log_odds else best
