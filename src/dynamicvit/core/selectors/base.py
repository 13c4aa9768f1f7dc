"""Selector: which tokens matter. All kinds have one call, and attributes that describe them."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Self

from torch import Tensor, nn

from dynamicvit.core.backbones import Adapter, Backbone
from dynamicvit.core.backbones.base import count_weights
from dynamicvit.core.tokens import Tokens


class Stage(NamedTuple):
    """A point of the network where tokens leave, as its selector sees it.

    Attributes:
        number: of the stage, from 0.
        block: index of the block before which it lies.
        num_kept: patch tokens to keep.
        tokens: what arrives there.
        model, adapter: the backbone, and the adapter of its family.
        noise: [B, N] uniform draws in [0, 1) for what is drawn at this stage; None for fresh ones.
        squeeze: tokens that leave are merged into their hosts.
    """

    number: int
    block: int
    num_kept: int
    tokens: Tokens
    model: Backbone
    adapter: Adapter
    noise: Tensor | None = None
    squeeze: bool = False


class Merged(NamedTuple):
    """What a selector that merges gives: tokens [B, K, C] and their sizes [B, K]."""

    x: Tensor
    size: Tensor


class Selector(nn.Module):
    """Ranks tokens, or merges them.

    Called as `selector(x_BNC, keep_BN, stage)`: patch tokens, which of them are still there (None
    means all), and the stage. It gives scores [B, N], or `Merged` if it `merges`.

    Attributes:
        merges: it makes new tokens, which have no position in the grid. It ignores keep masks.
        counts_size: attention counts a merged token as often as it has patches.
        log_odds: scores are log-odds of keeping. Training samples them. Others only rank: the best
            are kept in training too.
        learns: it has parameters to train.
        reads_blocks: it reads weights of the backbone's blocks, so they must not be sharded.
        random: it draws random numbers.
    """

    merges: ClassVar[bool] = False
    counts_size: ClassVar[bool] = False
    log_odds: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    reads_blocks: ClassVar[bool] = False
    random: ClassVar[bool] = False

    @classmethod
    def create(cls, model: Backbone) -> Self:
        """A new, untrained one for this backbone."""
        return cls()

    def check(self, model: Backbone) -> None:
        """Raise UnsupportedBackbone unless it works for this backbone."""

    def set_keep_prior(self, probability: float) -> None:
        """Start from tokens being kept with this probability, if that can be learned."""

    def difficulty(self, scores_BN: Tensor) -> Tensor:
        """[B]: the share of its tokens that an image needs, by what this selector gave for it.

        Raises:
            TypeError: if this selector does not tell images apart.
        """
        if not self.log_odds:
            raise TypeError(
                f"per_image needs scores that tell images apart, {type(self).__name__} has none"
            )
        return scores_BN.float().sigmoid().mean(dim=1)

    def macs(self, model: Backbone, tokens: int) -> float:
        """Multiply-adds for an image with this many patch tokens."""
        of_block = model.embed_dim**2 if self.reads_blocks else 0  # keys of all tokens
        return tokens * (count_weights(self) + of_block)

    def fused(self) -> Selector:
        """Its inference form: the same up to rounding, in fewer operations."""
        return self

    def forward(
        self, x_BNC: Tensor, keep_BN: Tensor | None = None, stage: Stage | None = None
    ) -> Tensor | Merged:
        raise NotImplementedError


def require_stage(selector: Selector, stage: Stage | None) -> Stage:
    """The stage, for selectors that need to know where they are asked."""
    if stage is None:
        raise TypeError(f"stage must be given to a {type(selector).__name__}, got None")
    return stage


def check_probability(probability: float) -> None:
    """Raise ValueError unless this is the probability of keeping tokens."""
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"probability must lie in (0, 1], got {probability!r}")
