"""TokenScorer: the prediction module that says, for each patch token, whether it goes on."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from dynamicvit.core.tokens import masked_mean


class TokenScorer(nn.Module):
    """The paper's prediction module: local and global features → log-odds of keeping.

    Args:
        dim: channels C of the tokens, divisible by 4.

    Raises:
        ValueError: if `dim` is not a positive multiple of 4.

    Source: DynamicViT, arXiv 2106.02034. The paper takes the log-softmax of the two outputs; their
    difference, returned here, carries the same information: it orders tokens as the keep
    probability does, and does not saturate.

    >>> TokenScorer(384)(torch.randn(2, 196, 384)).shape
    torch.Size([2, 196])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"dim must be a positive multiple of 4, got {dim}")
        self.norm = nn.LayerNorm(dim)
        self.embed = nn.Linear(dim, dim)
        self.head = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
        )
        self.act = nn.GELU()

    def forward(self, x_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """Score tokens.

        Args:
            x_BNC: patch tokens, no prefix tokens.
            keep_BN: which of them are still there; the global feature averages those alone.
                None means all.

        Returns:
            [B, N] log-odds of keeping.
        """
        local, glob = self.act(self.embed(self.norm(x_BNC))).chunk(2, dim=-1)
        pooled = masked_mean(glob, keep_BN).unsqueeze(1).expand(-1, local.shape[1], -1)
        logits = self.head(torch.cat([local, pooled], dim=-1))
        return logits[..., 0] - logits[..., 1]

    @torch.no_grad()
    def set_keep_prior(self, probability: float) -> None:
        """Set the last bias so that an untrained scorer keeps tokens with this probability.

        Random scorers otherwise start near 0.5 whatever the keep ratio.

        Raises:
            ValueError: if `probability` does not lie in (0, 1].
        """
        if not 0.0 < probability <= 1.0:
            raise ValueError(f"probability must lie in (0, 1], got {probability!r}")
        probability = min(probability, 1.0 - 1e-3)
        bias = cast(nn.Linear, self.head[-1]).bias
        bias[0], bias[1] = math.log(probability), math.log1p(-probability)


class RandomScorer(nn.Module):
    """Scores drawn at random: what any learned scorer has to beat."""

    def forward(self, x_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """[B, N, C] tokens → [B, N] uniform noise."""
        return torch.rand(x_BNC.shape[:2], device=x_BNC.device)
