"""TokenScorer: the prediction module that decides, for each patch token, whether it stays."""

from __future__ import annotations

import math
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicvit.core.backbones import Backbone
from dynamicvit.core.selectors.base import Selector, Stage, check_probability
from dynamicvit.core.tokens import masked_mean


class TokenScorer(Selector):
    """The paper's prediction module: local and global features → log-odds of keeping.

    Args:
        dim: channels C of the tokens, divisible by 4.

    Raises:
        TypeError, ValueError: if `dim` is not a positive multiple of 4.

    Source: DynamicViT, arXiv 2106.02034. The paper takes the log-softmax of two outputs. Their
    difference, returned here, carries the same information: it orders tokens as the keep
    probability does, and does not saturate.

    >>> TokenScorer(384)(torch.randn(2, 196, 384)).shape
    torch.Size([2, 196])
    """

    log_odds = True
    learns = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise TypeError(f"dim must be an integer, got {dim!r}")
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

    @classmethod
    def create(cls, model: Backbone) -> Self:
        return cls(model.embed_dim)

    def check(self, model: Backbone) -> None:
        if self.embed.in_features != model.embed_dim:
            raise ValueError(
                f"scorers must be for tokens of width {model.embed_dim}, got one of width "
                f"{self.embed.in_features}"
            )

    def forward(
        self, x_BNC: Tensor, keep_BN: Tensor | None = None, stage: Stage | None = None
    ) -> Tensor:
        """Score tokens.

        Args:
            x_BNC: patch tokens, no prefix tokens.
            keep_BN: which of them are still there; the global feature averages those alone.
                None means all.
            stage: not used.

        Returns:
            [B, N] log-odds of keeping.
        """
        local, glob = self.act(self.embed(self.norm(x_BNC))).chunk(2, dim=-1)
        pooled = masked_mean(glob, keep_BN).unsqueeze(1).expand(-1, local.shape[1], -1)
        logits = self.head(torch.cat([local, pooled], dim=-1))
        return logits[..., 0] - logits[..., 1]

    def fused(self) -> Selector:
        return (
            FusedScorer(self) if type(self) is TokenScorer else self
        )  # others may score otherwise

    @torch.no_grad()
    def set_keep_prior(self, probability: float) -> None:
        """Set the last bias so that an untrained scorer keeps tokens with this probability.

        Random scorers otherwise start near 0.5 whatever the keep ratio.

        Raises:
            ValueError: if `probability` does not lie in (0, 1].
        """
        check_probability(probability)
        probability = min(probability, 1.0 - 1e-3)
        bias = cast(nn.Linear, self.head[-1]).bias
        bias[0], bias[1] = math.log(probability), math.log1p(-probability)


class FusedScorer(Selector):
    """A TokenScorer's inference form: the same scores from fewer and smaller operations.

    The norm's affine part is folded into the layer after it, the layer that would take local and
    global features side by side is split into one for each (the global one then runs once an
    image, not once a token), and the last layer gives the difference of its two outputs.

    Args:
        scorer: a trained TokenScorer; its weights are copied.
    """

    log_odds = True

    @torch.no_grad()
    def __init__(self, scorer: TokenScorer) -> None:
        super().__init__()
        first, _, second, _, last = cast(tuple[nn.Linear, ...], tuple(scorer.head))
        half = first.out_features
        embed = scorer.embed.weight
        self.eps = scorer.norm.eps
        self.embed = _linear(
            embed * scorer.norm.weight, scorer.embed.bias + embed @ scorer.norm.bias
        )
        self.local = _linear(first.weight[:, :half])
        self.glob = _linear(first.weight[:, half:], first.bias)
        self.hidden = _linear(second.weight, second.bias)
        self.score = _linear(last.weight[:1] - last.weight[1:], last.bias[:1] - last.bias[1:])

    def forward(
        self, x_BNC: Tensor, keep_BN: Tensor | None = None, stage: Stage | None = None
    ) -> Tensor:
        """As `TokenScorer.forward`."""
        x = F.layer_norm(x_BNC, x_BNC.shape[-1:], eps=self.eps)
        local, glob = F.gelu(self.embed(x)).chunk(2, dim=-1)
        pooled = self.glob(masked_mean(glob, keep_BN)).unsqueeze(1)
        hidden = F.gelu(self.hidden(F.gelu(self.local(local) + pooled)))
        score: Tensor = self.score(hidden).squeeze(-1)
        return score


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(
        weight.shape[1],
        weight.shape[0],
        bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer
