"""What a learned scorer is compared with: other rules for what goes on, each by its name.

Rules that choose tokens are scorers, like the learned one. Those that make new tokens out of all of
them are mergers, whose results have no place of their own: they run in the pruned path alone, which
is differentiable for them. Either way as many tokens go on as the schedule says.

Axes: B images, N patch tokens present, P prefix tokens, C channels, K tokens that go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicvit.core.backbone import (
    Backbone,
    UnsupportedBackbone,
    check_attention,
    class_attention,
    mean_keys,
)
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.scorer import RandomScorer, TokenScorer
from dynamicvit.core.tokens import gather_tokens


class Place(NamedTuple):
    """Where a rule stands, for rules that ask for more than patch tokens.

    Attributes:
        model: the backbone.
        block: the index of that before which the rule is asked.
        x: [B, P + N, C] tokens.
        rope: rotary embeddings of the patch tokens, as `backbone.embed` gives them, or None.
        positions: [B, N] int64, where each patch token was in the image.
        grid: rows and columns of the image's patches.
    """

    model: Backbone
    block: int
    x: Tensor
    rope: Tensor | None
    positions: Tensor
    grid: tuple[int, int]


class PlacedScorer(nn.Module):
    """A scorer that is also told its `Place`: called with tokens, keep mask (or None) and place."""

    def check(self, model: Backbone) -> None:
        """Raise UnsupportedBackbone unless the rule works for this backbone."""


class ClassAttentionScorer(PlacedScorer):
    """Attention of the class token, mean over heads: EViT's rule (arXiv 2202.07800).

    EViT lets tokens leave inside a block, between attention and MLP. Here they leave before it, by
    the attention that the block is about to pay, read from its own weights.
    """

    ranks_only = True

    def check(self, model: Backbone) -> None:
        check_attention(model, class_token=True)

    def forward(self, x_BNC: Tensor, keep_BN: Tensor | None, place: Place) -> Tensor:
        """[B, N] shares of attention."""
        return class_attention(place.model, place.block, place.x, place.rope, keep_BN)


class StaticScorer(PlacedScorer):
    """A learned log-odds of keeping for each position, the same for every image.

    Args:
        num_tokens: patch tokens of an image.
    """

    # Adam moves a parameter by about the learning rate a step, which is meant for a network's.
    SCALE = 10.0

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1e-3 * torch.randn(num_tokens))  # no ties

    def forward(self, x_BNC: Tensor, keep_BN: Tensor | None, place: Place) -> Tensor:
        """[B, N] log-odds; ValueError for an image of another number of patches."""
        rows, columns = place.grid
        if rows * columns != len(self.weight):
            raise ValueError(
                f"a static mask is for images of {len(self.weight)} patches, got {rows}×{columns}"
            )
        return (self.SCALE * self.weight)[place.positions]

    @torch.no_grad()
    def set_keep_prior(self, probability: float) -> None:
        """As `TokenScorer.set_keep_prior`."""
        odds = torch.tensor(min(probability, 1.0 - 1e-3)).logit()
        self.weight.add_(odds / self.SCALE - self.weight.mean())


class Merger(nn.Module):
    """A rule that makes `count` tokens out of those present.

    Called with patch tokens [B, N, C], `count`, sizes [B, N] (how many patches each token stands
    for) and place; gives tokens [B, K, C] and their sizes [B, K].
    """

    weighs = False  # whether attention counts a token as often as its size says

    def check(self, model: Backbone) -> None:
        """Raise UnsupportedBackbone unless the rule works for this backbone."""
        if getattr(model, "rope", None) is not None:
            raise UnsupportedBackbone(
                f"{type(model).__name__} is not supported by {type(self).__name__}: a merged token "
                "has no rotary position"
            )


class ClassAttentionMerger(Merger):
    """`ClassAttentionScorer`'s choice, all that it drops merged into one token, as EViT does.

    That token is the mean of what is dropped, weighted by attention, and counts as one of `count`.
    """

    def check(self, model: Backbone) -> None:
        super().check(model)
        check_attention(model, class_token=True)

    def forward(
        self, x_BNC: Tensor, count: int, sizes_BN: Tensor, place: Place
    ) -> tuple[Tensor, Tensor]:
        attention = class_attention(place.model, place.block, place.x, place.rope)
        order = attention.argsort(dim=1, descending=True)
        kept, rest = order[:, : count - 1], order[:, count - 1 :]
        share = gather_tokens(attention, rest)
        # Attention that rounds to none of it would give 0 / 0.
        share = share.clamp(min=torch.finfo(torch.float32).tiny)
        share = (share / share.sum(dim=1, keepdim=True)).to(x_BNC.dtype)
        merged = share.unsqueeze(1) @ gather_tokens(x_BNC, rest)
        sizes = gather_tokens(sizes_BN, rest).sum(dim=1, keepdim=True)
        return (
            torch.cat([gather_tokens(x_BNC, kept), merged], dim=1),
            torch.cat([gather_tokens(sizes_BN, kept), sizes], dim=1),
        )


class SimilarityMerger(Merger):
    """Similar tokens become one: ToMe's bipartite soft matching (arXiv 2210.09461).

    Every other token looks for the most similar among the rest, by the cosine of the keys (mean
    over heads) that the next block will use; the most similar pairs merge, into means weighted by
    size. Attention then counts a token as often as its size says. ToMe merges some tokens in every
    block, here a stage merges all that the schedule asks for; where that is more than half, in
    several rounds.
    """

    weighs = True

    def check(self, model: Backbone) -> None:
        super().check(model)
        check_attention(model, class_token=False)
        if model.global_pool not in ("token", "max"):
            raise UnsupportedBackbone(
                f"{type(model).__name__} with global_pool {model.global_pool!r} is not supported "
                f"by {type(self).__name__}: its mean would have to count a token by its size"
            )

    def forward(
        self, x_BNC: Tensor, count: int, sizes_BN: Tensor, place: Place
    ) -> tuple[Tensor, Tensor]:
        keys = mean_keys(place.model, place.block, x_BNC)
        return merge_similar(x_BNC, keys, sizes_BN, count)


def merge_similar(
    x_BNC: Tensor, keys_BND: Tensor, sizes_BN: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Merge tokens, the most similar first, until `count` are left.

    Args:
        x_BNC: the tokens.
        keys_BND: what similarity is measured on; keys of merged tokens are merged alike.
        sizes_BN: how many patches each token stands for.
        count: how many to leave, 1 ≤ count ≤ N.

    Returns:
        Tokens [B, K, C], means weighted by size, and their sizes [B, K].
    """
    channels = x_BNC.shape[-1]
    both = torch.cat([x_BNC, keys_BND.to(x_BNC.dtype)], dim=-1)
    sizes = sizes_BN
    while (excess := both.shape[1] - count) > 0:
        unit = F.normalize(both[..., channels:].detach().float(), dim=-1)
        best = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=-1)
        order = best.values.argsort(dim=1, descending=True)
        merged, rest = order[:, :excess], order[:, excess:]
        target = best.indices.gather(1, merged)
        left, right = both[:, ::2], both[:, 1::2]
        left_size, right_size = sizes[:, ::2], sizes[:, 1::2]
        size = gather_tokens(left_size, merged)
        grown = right_size.scatter_add(1, target, size)
        total = (right * right_size.unsqueeze(-1)).scatter_add(
            1,
            target.unsqueeze(-1).expand(-1, -1, both.shape[-1]),
            gather_tokens(left, merged) * size.unsqueeze(-1),
        )
        both = torch.cat([gather_tokens(left, rest), total / grown.unsqueeze(-1)], dim=1)
        sizes = torch.cat([gather_tokens(left_size, rest), grown], dim=1)
    return both[..., :channels], sizes


class PoolingMerger(Merger):
    """Structural downsampling: the image's area is cut anew into `count` cells, averaged over.

    The paper pools a grid once, 2×2. Here each stage has its count: the area is cut into rows of
    equal height, those into cells of equal width, as near to the patches' proportions as `count`
    cells can be (a row may have one cell more than another); and a new token is the mean of the
    present ones, weighted by the area in which their cells meet its own. With a quarter of an even
    grid that is 2×2 pooling.
    """

    def forward(
        self, x_BNC: Tensor, count: int, sizes_BN: Tensor, place: Place
    ) -> tuple[Tensor, Tensor]:
        share = pooling_shares(x_BNC.shape[1], count, place.grid).to(x_BNC.device)
        sizes = sizes_BN.new_full((len(x_BNC), count), place.grid[0] * place.grid[1] / count)
        return share.to(x_BNC.dtype) @ x_BNC, sizes


def pooling_shares(before: int, after: int, grid: tuple[int, int]) -> Tensor:
    """[K, N] float32: what each of N cells contributes to the mean in each of K new ones.

    Args:
        before, after: numbers of cells N and K that the image's area is cut into.
        grid: rows and columns of patches: the proportions of the image.
    """
    (top, bottom, left, right), (new_top, new_bottom, new_left, new_right) = (
        torch.tensor(_cells(count, grid)).unbind(1) for count in (before, after)
    )
    height = torch.minimum(bottom, new_bottom[:, None]) - torch.maximum(top, new_top[:, None])
    width = torch.minimum(right, new_right[:, None]) - torch.maximum(left, new_left[:, None])
    area = height.clamp(min=0.0) * width.clamp(min=0.0)
    return area / area.sum(dim=1, keepdim=True)


def _cells(count: int, grid: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """Top, bottom, left and right of each of `count` cells of the unit square, row by row."""
    rows = min(count, max(1, round((count * grid[0] / grid[1]) ** 0.5)))
    cells = []
    for row in range(rows):
        columns = count * (row + 1) // rows - count * row // rows
        for column in range(columns):
            box = (row / rows, (row + 1) / rows, column / columns, (column + 1) / columns)
            cells.append(box)
    return cells


SCORERS: dict[str, type[nn.Module]] = {
    "learned": TokenScorer,
    "random": RandomScorer,
    "static": StaticScorer,
    "class_attention": ClassAttentionScorer,
    "class_attention_merging": ClassAttentionMerger,
    "similarity_merging": SimilarityMerger,
    "pooling": PoolingMerger,
}
LEARNING = ("learned", "static")  # those with something of their own to learn
# Those that read weights of blocks, which must then be there in whole.
READING = ("class_attention", "class_attention_merging", "similarity_merging")


def check_scorer(name: str) -> None:
    """Raise ValueError unless this is the name of a rule."""
    if not isinstance(name, str) or name not in SCORERS:
        raise ValueError(f"scorer must be one of {', '.join(SCORERS)}, got {name!r}")


def create_scorers(name: str, model: Any, schedule: KeepSchedule) -> list[nn.Module]:
    """New, untrained ones, one a stage, where the backbone is (its device and dtype).

    Args:
        name: a key of `SCORERS`.
        model: the backbone.
        schedule: its stages.

    Raises:
        ValueError: if there is no such rule, or a static mask is asked for images of any size.
    """
    check_scorer(name)
    arguments: dict[str, tuple[int | None]] = {
        "learned": (model.embed_dim,),
        "static": (model.patch_embed.num_patches,),
    }
    if name == "static" and model.patch_embed.num_patches is None:
        raise ValueError(f"scorer must not be static for images of any size, got {name!r}")
    like = next(model.parameters())
    return [
        SCORERS[name](*arguments.get(name, ())).to(like.device, like.dtype) for _ in schedule.blocks
    ]


def scorer_name(scorers: Iterable[nn.Module]) -> str | None:
    """The key of `SCORERS` whose modules these are; None if they are not all of one kind there."""
    kinds = {type(scorer) for scorer in scorers}
    return next((name for name, kind in SCORERS.items() if kinds == {kind}), None)
