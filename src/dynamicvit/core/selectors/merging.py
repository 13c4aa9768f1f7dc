"""Rules that merge tokens: they make fewer new tokens out of all present ones.

Merged tokens have no position in the grid and no keep mask. They run in the pruned path alone,
which is differentiable for them.

Axes: B images, N patch tokens present, C channels, K new tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamicvit.core.backbones import Backbone, UnsupportedBackbone
from dynamicvit.core.backbones.attention import check_attention, class_attention, mean_keys
from dynamicvit.core.selectors.base import Merged, Selector, Stage, require_stage
from dynamicvit.core.tokens import gather_tokens


class Merger(Selector):
    """A selector that makes `stage.num_kept` tokens out of those present."""

    merges = True

    def check(self, model: Backbone) -> None:
        if getattr(model, "rope", None) is not None:
            raise UnsupportedBackbone(
                f"{type(model).__name__} is not supported by {type(self).__name__}: a merged token "
                "has no rotary position"
            )

    def sizes(self, x_BNC: Tensor, stage: Stage) -> Tensor:
        """[B, N]: how many patches each token stands for."""
        size = stage.tokens.size
        return x_BNC.new_ones(x_BNC.shape[:2]) if size is None else size


class ClassAttentionMerger(Merger):
    """`ClassAttentionScorer`'s choice; all that it drops is merged into one token, as in EViT.

    That token is the mean of what is dropped, weighted by attention. It counts as a kept one.
    """

    reads_blocks = True

    def check(self, model: Backbone) -> None:
        super().check(model)
        check_attention(model, class_token=True)

    def forward(
        self, x_BNC: Tensor, keep_BN: Tensor | None = None, stage: Stage | None = None
    ) -> Merged:
        at = require_stage(self, stage)
        attention = class_attention(at.model, at.block, at.tokens)
        order = attention.argsort(dim=1, descending=True)
        kept, rest = order[:, : at.num_kept - 1], order[:, at.num_kept - 1 :]
        share = gather_tokens(attention, rest)
        # Attention that rounds to none of it would give 0 / 0.
        share = share.clamp(min=torch.finfo(torch.float32).tiny)
        share = (share / share.sum(dim=1, keepdim=True)).to(x_BNC.dtype)
        merged = share.unsqueeze(1) @ gather_tokens(x_BNC, rest)
        sizes = self.sizes(x_BNC, at)
        size = gather_tokens(sizes, rest).sum(dim=1, keepdim=True)
        return Merged(
            torch.cat([gather_tokens(x_BNC, kept), merged], dim=1),
            torch.cat([gather_tokens(sizes, kept), size], dim=1),
        )


class SimilarityMerger(Merger):
    """Similar tokens become one: ToMe's bipartite soft matching (arXiv 2210.09461).

    Every other token looks for the most similar among the rest, by the cosine of the keys (mean
    over heads) that the next block will use. The most similar pairs merge, into means weighted by
    size. Attention then counts a token as often as it has patches. ToMe merges some tokens in every
    block. Here a stage merges all that the schedule asks for, in several rounds where that is more
    than half.
    """

    counts_size = True
    reads_blocks = True

    def check(self, model: Backbone) -> None:
        super().check(model)
        check_attention(model, class_token=False)
        if model.global_pool not in ("token", "max"):
            raise UnsupportedBackbone(
                f"{type(model).__name__} with global_pool {model.global_pool!r} is not supported "
                f"by {type(self).__name__}: its mean would have to count a token by its size"
            )

    def forward(
        self, x_BNC: Tensor, keep_BN: Tensor | None = None, stage: Stage | None = None
    ) -> Merged:
        at = require_stage(self, stage)
        keys = mean_keys(at.model, at.block, x_BNC)
        return Merged(*merge_similar(x_BNC, keys, self.sizes(x_BNC, at), at.num_kept))


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
    """Structural downsampling: the image's area is divided into `stage.num_kept` cells.

    The paper pools a grid once, 2×2. Here each stage has its own number. The area is cut into rows
    of equal height, and each row into cells of equal width. Cells have about the proportions of the
    patches; a row may have one cell more than another. A new token is the mean of the present ones,
    weighted by the area that their cells share with its own. With a quarter of an even grid this is
    2×2 pooling.
    """

    def forward(
        self, x_BNC: Tensor, keep_BN: Tensor | None = None, stage: Stage | None = None
    ) -> Merged:
        at = require_stage(self, stage)
        rows, columns = at.tokens.grid
        share = pooling_shares(x_BNC.shape[1], at.num_kept, at.tokens.grid).to(x_BNC.device)
        size = x_BNC.new_full((x_BNC.shape[0], at.num_kept), rows * columns / at.num_kept)
        return Merged(share.to(x_BNC.dtype) @ x_BNC, size)


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
