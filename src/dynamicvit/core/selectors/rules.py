"""Rules that rank tokens without the paper's scorer: random, static, class attention."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from dynamicvit.core.backbones import Backbone, adapter_of
from dynamicvit.core.backbones.attention import check_attention, class_attention
from dynamicvit.core.selectors.base import Selector, Stage, check_probability, require_stage


class RandomScorer(Selector):
    """Random scores: the baseline for every other selector."""

    random = True

    def forward(
        self, x_BNC: Tensor, keep_BN: Tensor | None = None, stage: Stage | None = None
    ) -> Tensor:
        """[B, N, C] tokens → [B, N] uniform noise."""
        if stage is not None and stage.noise is not None:
            return stage.noise
        return torch.rand(x_BNC.shape[:2], device=x_BNC.device)


class StaticScorer(Selector):
    """A learned log-odds of keeping for each position, the same for every image.

    Args:
        num_tokens: patch tokens of an image.
    """

    log_odds = True
    learns = True
    # Adam moves a parameter by about the learning rate a step. That suits a network's weights, and
    # is too little for log-odds.
    SCALE = 10.0

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1e-3 * torch.randn(num_tokens))  # no ties

    @classmethod
    def create(cls, model: Backbone) -> Self:
        num_tokens = adapter_of(model).num_patches(model)
        if num_tokens is None:
            raise ValueError("scorer must not be static for images of any size, got 'static'")
        return cls(num_tokens)

    def check(self, model: Backbone) -> None:
        num_tokens = adapter_of(model).num_patches(model)
        if num_tokens not in (None, len(self.weight)):
            raise ValueError(
                f"scorers must be for images of {num_tokens} patches, got one for "
                f"{len(self.weight)}"
            )

    def forward(
        self, x_BNC: Tensor, keep_BN: Tensor | None = None, stage: Stage | None = None
    ) -> Tensor:
        """[B, N] log-odds. Raises ValueError for an image of another number of patches."""
        tokens = require_stage(self, stage).tokens
        rows, columns = tokens.grid
        if rows * columns != len(self.weight):
            raise ValueError(
                f"a static mask is for images of {len(self.weight)} patches, got {rows}×{columns}"
            )
        scores = self.SCALE * self.weight
        if tokens.positions is None:
            return scores.expand(x_BNC.shape[0], -1)
        return scores[tokens.positions]

    def difficulty(self, scores_BN: Tensor) -> Tensor:
        raise TypeError("per_image needs scores that tell images apart, a static mask has none")

    @torch.no_grad()
    def set_keep_prior(self, probability: float) -> None:
        check_probability(probability)
        odds = torch.tensor(min(probability, 1.0 - 1e-3)).logit()
        self.weight.add_(odds / self.SCALE - self.weight.mean())


class ClassAttentionScorer(Selector):
    """Attention of the class token, mean over heads: EViT's rule (arXiv 2202.07800).

    EViT drops tokens inside a block, between attention and MLP. Here they leave before the block.
    The attention is computed from that block's own weights.
    """

    reads_blocks = True

    def check(self, model: Backbone) -> None:
        check_attention(model, class_token=True)

    def forward(
        self, x_BNC: Tensor, keep_BN: Tensor | None = None, stage: Stage | None = None
    ) -> Tensor:
        """[B, N] shares of attention."""
        at = require_stage(self, stage)
        return class_attention(at.model, at.block, at.tokens)

    def difficulty(self, scores_BN: Tensor) -> Tensor:
        """Over how many tokens attention is spread, as a share of all: its perplexity over N."""
        shares = scores_BN.float() / scores_BN.float().sum(dim=1, keepdim=True)
        return torch.special.entr(shares).sum(dim=1).exp() / shares.shape[1]
