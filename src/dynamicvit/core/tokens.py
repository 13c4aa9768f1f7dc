"""Tokens, what travels through the model, and pure functions on them: keep, gather, mask.

Axes: B images, N patch tokens, P prefix tokens, C channels, K kept tokens.
A suffix names a tensor's axes: `x_BNC`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this a keep decision counts as 0 in the attention bias. Attention scores of a trained model
# lie so far apart that a millionth of a dropped token's weight can outweigh all that is kept; and
# -28 is a bias that bfloat16 holds exactly.
MIN_KEEP = math.exp(-28.0)


class Tokens(NamedTuple):
    """Tokens of a batch between two blocks, and everything that belongs to each of them.

    Attributes:
        x: [B, P + N, C], prefix tokens first.
        num_prefix: P; class, distillation and register tokens. They always stay.
        grid: rows and columns of patches in the whole image.
        rope: rotary embeddings of the patch tokens, [L, B, H, N, D]. L (blocks), B and H (heads)
            are 1 where they share them. Where blocks have their own, these are of the last L
            blocks. None for models without.
        positions: [B, N] int64, where each patch token lies in the grid, row by row. None while all
            are there in order, and for merged tokens, which have no position in the grid.
        keep: [B, N] float, 1 for tokens that stay and 0 for blocked ones. None: all stay.
        size: [B, N], how many patches each token stands for. None: one.
        bias: added to the attention of every block: [B, 1, 1 or P + N, P + N], or None.
    """

    x: Tensor
    num_prefix: int
    grid: tuple[int, int]
    rope: Tensor | None = None
    positions: Tensor | None = None
    keep: Tensor | None = None
    size: Tensor | None = None
    bias: Tensor | None = None

    def with_patches(self, patches: Tensor) -> Tokens:
        """The same with other values of the patch tokens: [B, N, C]."""
        return self._replace(x=torch.cat([self.x[:, : self.num_prefix], patches], dim=1))

    @property
    def patches(self) -> Tensor:
        """[B, N, C], without prefix tokens."""
        return self.x[:, self.num_prefix :]

    @property
    def num_patches(self) -> int:
        """N."""
        return self.x.shape[1] - self.num_prefix

    def of_images(self, rows: Tensor) -> Tokens:
        """The tokens of some images: int64 rows of the batch. Before any stage, so no bias."""
        return self._replace(
            x=self.x[rows],
            rope=self.rope if self.rope is None or self.rope.shape[1] == 1 else self.rope[:, rows],
        )

    def take(self, kept_BK: Tensor, blocks_left: int = 0) -> Tokens:
        """The patch tokens at `kept_BK` (along N), with all that belongs to each of them.

        A bias, which belongs to pairs of tokens, is left to the path.

        Args:
            kept_BK: int64.
            blocks_left: how many blocks the tokens still pass. Rotary embeddings of earlier ones
                are left out. 0 keeps those of all.
        """
        prefix = torch.arange(self.num_prefix, device=kept_BK.device).expand(kept_BK.shape[0], -1)
        rope = self.rope if self.rope is None else self.rope[-blocks_left:]
        return self._replace(
            x=gather_tokens(self.x, torch.cat([prefix, kept_BK + self.num_prefix], dim=1)),
            rope=None if rope is None else gather_rope(rope, kept_BK),
            keep=None if self.keep is None else gather_tokens(self.keep, kept_BK),
            size=None if self.size is None else gather_tokens(self.size, kept_BK),
            bias=None,
            positions=(
                kept_BK if self.positions is None else gather_tokens(self.positions, kept_BK)
            ),
        )


def topk_keep(scores_BN: Tensor, count: int) -> Tensor:
    """Indices of the `count` tokens with the highest score.

    Args:
        scores_BN: keep scores, any floating dtype.
        count: tokens to keep, 1 ≤ count ≤ N.

    Returns:
        [B, K] int64 indices along N, distinct in each row, in no particular order.
    """
    num_tokens = scores_BN.shape[1]
    if not 1 <= count <= num_tokens:
        raise ValueError(f"count must lie in 1..{num_tokens}, got {count}")
    return scores_BN.topk(count, dim=1, sorted=False).indices


def others(index_BK: Tensor, num_tokens: int) -> Tensor:
    """[B, K] kept indices → [B, N - K] those of the other tokens, in no particular order."""
    left = 1.0 - keep_mask(index_BK, num_tokens)
    return topk_keep(left, num_tokens - index_BK.shape[1])


def gather_tokens(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    """Take the tokens at `index_BK`: [B, N, C] and [B, K] → [B, K, C], or [B, N] → [B, K]."""
    if x_BNC.ndim == 2:
        return x_BNC.gather(1, index_BK)
    batch, num_tokens, _ = x_BNC.shape
    # Rows of one table: they are copied whole, where `gather` looks up number after number.
    rows = index_BK + num_tokens * torch.arange(batch, device=index_BK.device).unsqueeze(1)
    return F.embedding(rows, x_BNC.flatten(0, 1))


def gather_rope(rope: Tensor, index_BK: Tensor) -> Tensor:
    """Rotary embeddings [L, 1 or B, H, N, D] of the tokens at `index_BK`: [L, B, H, K, D]."""
    depth, _, heads, _, dim = rope.shape
    batch = index_BK.shape[0]
    index = index_BK[None, :, None, :, None].expand(depth, batch, heads, -1, dim)
    return rope.expand(-1, batch, -1, -1, -1).gather(3, index)


def keep_mask(index_BK: Tensor, num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, K] kept indices → [B, N] mask of ones (kept) and zeros (dropped)."""
    mask = torch.zeros(index_BK.shape[0], num_tokens, dtype=dtype, device=index_BK.device)
    return mask.scatter(1, index_BK, 1.0)


def sample_keep(
    scores_BN: Tensor, noise_BN: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Draw hard keep decisions whose gradient is that of the soft ones (straight-through).

    This is the paper's hard Gumbel-softmax over (keep, drop), written with one number a token: the
    difference of two Gumbel variables is logistic, so keep = sigmoid((score + noise) / temperature)
    is made hard.

    Args:
        scores_BN: log-odds of keeping. Computed in float32 whatever the dtype.
        noise_BN: uniform draws in [0, 1), which become the noise, instead of fresh ones.
        temperature: of the relaxation, > 0.

    Returns:
        [B, N] float32 decisions, exactly 0 or 1.
    """
    scores = scores_BN.float()
    uniform = torch.rand_like(scores) if noise_BN is None else noise_BN
    # rand can return exactly 0, whose logarithm would put an infinity, then a NaN, into training.
    uniform = uniform.clamp(1e-7, 1.0 - 1e-7)
    noise = uniform.log() - (-uniform).log1p()
    logits = (scores + noise) / temperature
    return straight_through((logits > 0).float(), logits)


def bound_gradient(x: Tensor, limit: float) -> Tensor:
    """x, whose gradient is clamped to [-limit, limit]."""
    bounded: Tensor = _Bounded.apply(x, limit)
    return bounded


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clamp(-ctx.limit, ctx.limit), None


def best_keep(scores_BN: Tensor, count: int, keep_BN: Tensor | None = None) -> Tensor:
    """[B, N] float32 mask of the `count` tokens with the highest score.

    Args:
        scores_BN: any floating dtype.
        count: tokens to keep, 1 ≤ count ≤ N.
        keep_BN: which tokens are still there; None means all.
    """
    scores = scores_BN.detach()
    if keep_BN is not None:
        scores = scores.masked_fill(keep_BN < 0.5, float("-inf"))
    return keep_mask(topk_keep(scores, count), scores.shape[1])


def straight_through(hard_BN: Tensor, logits_BN: Tensor) -> Tensor:
    """The decisions `hard_BN`, with the gradient that sigmoid(`logits_BN`) has."""
    soft = logits_BN.float().sigmoid()
    return hard_BN + (soft - soft.detach())


def squeeze(
    host_BKC: Tensor,
    left_BLC: Tensor,
    weight_BL: Tensor | None = None,
    can_host_BK: Tensor | None = None,
) -> Tensor:
    """Merge each token that leaves into its host, the most similar token (cosine) that stays.

    A token takes part with e to the power of its similarity, the host with e (arXiv 2304.10716).

    Args:
        host_BKC: tokens that stay.
        left_BLC: tokens that leave.
        weight_BL: multiplies what each of these gives; 0 for one that gives nothing. None: 1.
        can_host_BK: 0 where a token of `host_BKC` takes nothing. None: all can.

    Returns:
        The hosts, [B, K, C], in their dtype.
    """
    host, left = host_BKC.float(), left_BLC.float()
    similarity = F.normalize(left, dim=-1) @ F.normalize(host, dim=-1).transpose(1, 2)
    if can_host_BK is not None:
        similarity = similarity.masked_fill(can_host_BK.unsqueeze(1) < 0.5, float("-inf"))
    most, nearest = similarity.max(dim=-1)
    share = most.exp() if weight_BL is None else most.exp() * weight_BL
    # One product, which every engine knows, instead of a scatter.
    hosts = torch.arange(host.shape[1], device=host.device)
    share_BLK = share.unsqueeze(-1) * (nearest.unsqueeze(-1) == hosts)
    total = math.e + share_BLK.sum(dim=1).unsqueeze(-1)
    return ((math.e * host + share_BLK.transpose(1, 2) @ left) / total).to(host_BKC.dtype)


def masked_mean(x_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
    """Mean over the kept tokens: [B, N, C] and [B, N] → [B, C]. All tokens where keep is None.

    An image that keeps no token gets zeros, not NaN.
    """
    if keep_BN is None:
        return x_BNC.mean(dim=1)
    keep = keep_BN.to(x_BNC.dtype).unsqueeze(-1)
    return (x_BNC * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1e-6)


def key_bias(keep_BN: Tensor) -> Tensor:
    """log(keep), floored at -28, as an additive attention bias on the keys: [B, N].

    Its gradient is 1 / max(keep, e⁻²⁸) even at 0: a dropped token must still learn what it would
    have contributed. Where no gradient is asked for, the floor is lower: about -87.
    """
    keep = keep_BN.float()
    floor = MIN_KEEP if keep.requires_grad else torch.finfo(torch.float32).tiny
    floored = keep.detach().clamp(min=floor)
    return floored.log() + (keep - keep.detach()) / floored


def attention_bias(keep_BN: Tensor, num_prefix: int) -> Tensor:
    """The paper's attention mask G as an additive bias: every token sees itself and what is kept.

    `softmax(a + bias)` equals `exp(a) G / Σ exp(a) G` with `G_ij = 1 if i = j else keep_j`, and
    keep = 1 for prefix tokens (arXiv 2106.02034).

    Args:
        keep_BN: keep decisions in [0, 1].
        num_prefix: prefix tokens (class, distillation, registers) before the patch tokens.

    Returns:
        [B, 1, P + N, P + N] float32, to be given to timm blocks as `attn_mask`.
    """
    bias = F.pad(key_bias(keep_BN), (num_prefix, 0))
    size = bias.shape[1]
    itself = torch.eye(size, dtype=torch.bool, device=bias.device)
    return bias[:, None, None, :].expand(-1, 1, size, size).masked_fill(itself, 0.0)
