"""The adapter: what SparseViT needs to know of a timm model, and nothing more.

timm's blocks are called, never copied or patched. A model whose forward pass is not the one
written here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    AttentionRope,
    HybridEmbed,
    PatchEmbed,
    apply_rot_embed_cat,
)
from timm.models import checkpoint as checkpoint_block
from timm.models import deit, eva
from timm.models import vision_transformer as vit
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dynamicvit.core.tokens import key_bias, masked_mean

Backbone: TypeAlias = VisionTransformer | Eva
# (model, final tokens, keep mask) → logits and tokens, as the losses see them.
MaskedHead: TypeAlias = Callable[[Any, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class UnsupportedBackbone(TypeError):
    """The model is not one whose tokens can be pruned rightly; the message says why."""


# Blocks that take an additive attention mask and treat tokens as a set.
_BLOCKS = (
    vit.Block,
    vit.ResPostBlock,
    vit.ParallelScalingBlock,
    vit.ParallelThingsBlock,
    vit.DiffParallelScalingBlock,
    eva.EvaBlock,
    eva.EvaBlockPostNorm,
)
# Those of them that normalise, then attend; and attention whose queries and keys can be read.
_READABLE_BLOCKS = (vit.Block, eva.EvaBlock)
_READABLE_ATTENTION = (Attention, AttentionRope, EvaAttention)
_POOLS = ("token", "avg", "max", "avgmax", "map")


def check_backbone(model: nn.Module) -> None:
    """Raise UnsupportedBackbone unless `model` is a timm ViT or Eva that we run rightly."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a timm model, got {type(model).__name__}")
    cls: Any = type(model)

    def refuse(reason: str) -> UnsupportedBackbone:
        return UnsupportedBackbone(f"{cls.__name__} is not supported: {reason}")

    if not isinstance(model, VisionTransformer | Eva):
        biases = ("relative_position_bias", "rel_pos")
        if hasattr(model, "blocks") and any(
            bias in name for name, _ in model.named_parameters() for bias in biases
        ):
            raise refuse(
                "its attention adds a position bias for the whole grid, which is not gathered "
                "with the tokens"
            )
        raise refuse("it is not built on timm's VisionTransformer or Eva")
    family: Any = VisionTransformer if isinstance(model, VisionTransformer) else Eva
    if (
        cls.forward is not family.forward
        or cls.forward_features is not family.forward_features
        or cls.pool is not family.pool
        or cls.forward_head not in _HEADS
    ):
        raise refuse("it overrides timm's forward pass")
    if not isinstance(model.patch_embed, PatchEmbed | HybridEmbed):
        raise refuse(f"its patch embedding is {type(model.patch_embed).__name__}")
    if isinstance(model, Eva) and model.patch_drop is not None:
        raise refuse("its random patch dropout cannot be left out; create it without")
    for block in model.blocks:
        if type(block) not in _BLOCKS:
            raise refuse(f"its blocks are {type(block).__name__}")
        if any(isinstance(module, nn.Conv1d | nn.Conv2d) for module in block.modules()):
            raise refuse("its blocks hold convolutions, which need every token in its place")
    check_pooling(model.global_pool)


def check_pooling(pool: str) -> None:
    """Raise UnsupportedBackbone unless this way of pooling can leave dropped tokens out."""
    if pool not in _POOLS:
        raise UnsupportedBackbone(f"global_pool must be one of {', '.join(_POOLS)}, got {pool!r}")


def check_images(model: Backbone, images: Tensor) -> None:
    """Raise TypeError or ValueError unless `images` is a batch that `model` takes."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor [B, C, H, W], got {type(images).__name__}")
    shape = tuple(images.shape)
    if images.ndim != 4:
        raise ValueError(f"images must have 4 axes [B, C, H, W], got shape {shape}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, got {images.dtype}")
    if shape[1] != model.in_chans:
        raise ValueError(f"images must have {model.in_chans} channels, got shape {shape}")
    embed = model.patch_embed
    if embed.img_size is not None and getattr(embed, "strict_img_size", True):
        if shape[2:] != tuple(embed.img_size):
            height, width = embed.img_size
            raise ValueError(f"images must be {height}×{width} pixels, got shape {shape}")
    elif not embed.dynamic_img_pad:
        patch_h, patch_w = cast(tuple[int, int], embed.feat_ratio(as_scalar=False))
        if shape[2] % patch_h or shape[3] % patch_w or 0 in shape[2:]:
            raise ValueError(
                f"image height and width must be multiples of the patch size "
                f"{patch_h}×{patch_w}, got shape {shape}"
            )


def embed(model: Backbone, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images [B, in_chans, H, W] → tokens and what belongs to their positions.

    Random patch dropout, if the model has it, is left out: here the schedule says what leaves.

    Returns:
        Tokens [B, P + N, C], absolute positions added; and rotary embeddings of the patch tokens
        in one layout for all kinds, [L, B, H, N, D], where L (blocks), B and H (heads) are 1 if
        they share them, or None.
    """
    rope = None
    x = model.patch_embed(images)
    if isinstance(model, Eva):
        x, rope = model._pos_embed(x)
        if rope is not None:
            rope = rope[:, None] if model.rope_mixed else rope[None, None, None]
    else:
        x = model._pos_embed(x)
    return model.norm_pre(x), rope


def gather_rope(rope: Tensor, index_BK: Tensor) -> Tensor:
    """Rotary embeddings [L, 1 or B, H, N, D] of the tokens at `index_BK`: [L, B, H, K, D]."""
    depth, _, heads, _, dim = rope.shape
    batch = len(index_BK)
    index = index_BK[None, :, None, :, None].expand(depth, batch, heads, -1, dim)
    return rope.expand(-1, batch, -1, -1, -1).gather(3, index)


def run_block(
    model: Backbone, index: int, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None = None
) -> Tensor:
    """Tokens [B, P + n, C] through one of timm's own blocks.

    Args:
        model: the backbone.
        index: of the block.
        x: the tokens.
        rope: as `embed` and `gather_rope` give it, for the n patch tokens.
        attn_mask: additive bias [B, 1, P + n, P + n].
    """
    options: dict[str, Any] = {"attn_mask": attn_mask}
    if rope is not None:
        options["rope"] = rope[index if len(rope) > 1 else 0]
    block = model.blocks[index]
    if model.grad_checkpointing and model.training:
        return checkpoint_block(block, x, **options)
    return block(x, **options)


def check_attention(model: Backbone, class_token: bool) -> None:
    """Raise UnsupportedBackbone unless `class_attention` and `mean_keys` can read its blocks."""

    def refuse(reason: str) -> UnsupportedBackbone:
        return UnsupportedBackbone(
            f"{type(model).__name__} is not supported by this scorer: {reason}"
        )

    if class_token and getattr(model, "cls_token", None) is None:
        raise refuse("it has no class token, whose attention would be looked at")
    for block in model.blocks:
        if type(block) not in _READABLE_BLOCKS:
            raise refuse(f"attention cannot be read from its blocks, {type(block).__name__}")
        if type(block.attn) not in _READABLE_ATTENTION:
            raise refuse(f"queries and keys cannot be read from {type(block.attn).__name__}")


def class_attention(
    model: Backbone, index: int, x: Tensor, rope: Tensor | None, keep_BN: Tensor | None = None
) -> Tensor:
    """What the class token will attend to in a block: [B, n] float32, mean over heads.

    Args:
        model, index, x, rope: as for `run_block`.
        keep_BN: which patch tokens are there, if not all.
    """
    block: Any = model.blocks[index]
    attn = block.attn
    x = block.norm1(x)
    query = attn.q_norm(_project(attn, 0, x[:, :1]))
    keys = attn.k_norm(_project(attn, 1, x))
    if rope is not None:  # prefix tokens, the class token among them, are not rotated
        prefix, patches = keys.split([attn.num_prefix_tokens, rope.shape[3]], dim=2)
        layer = rope[index if len(rope) > 1 else 0]
        rotated = apply_rot_embed_cat(patches, layer, half=attn.rotate_half)
        keys = torch.cat([prefix, rotated.type_as(prefix)], dim=2)
    groups = query.shape[1] // keys.shape[1]  # query heads that share a head of keys
    if groups > 1:
        keys = keys.repeat_interleave(groups, dim=1)
    logits = (query * attn.scale @ keys.transpose(2, 3)).float()
    if keep_BN is not None:
        bias = key_bias(keep_BN.detach())
        logits = logits + F.pad(bias, (model.num_prefix_tokens, 0))[:, None, None, :]
    attention: Tensor = logits.softmax(dim=-1)[:, :, 0, model.num_prefix_tokens :].mean(dim=1)
    return attention


def mean_keys(model: Backbone, index: int, x: Tensor) -> Tensor:
    """Keys, mean over heads, that a block without rotary embeddings gives tokens: [B, n, D]."""
    block: Any = model.blocks[index]
    return block.attn.k_norm(_project(block.attn, 1, block.norm1(x))).mean(dim=1)


def _project(attn: Any, part: int, x: Tensor) -> Tensor:
    """Queries (part 0) or keys (1) of tokens [B, n, C]: [B, heads, n, D], neither normalised nor
    rotated."""
    if attn.qkv is None:
        y = (attn.q_proj, attn.k_proj)[part](x)
    else:
        weight = attn.qkv.weight.chunk(3)[part]
        if attn.qkv.bias is not None:
            bias = attn.qkv.bias.chunk(3)[part]
        else:  # an Eva's queries have a bias of their own, its keys have none
            bias = getattr(attn, "q_bias", None) if part == 0 else None
        y = F.linear(x, weight, bias)
    return y.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)


def masked_head(model: Backbone, x: Tensor, keep_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Final tokens [B, P + N, C] → what the losses see: logits, and a tensor [B, N, …] of tokens.

    Where `keep_BN` is given, dropped patch tokens are there but the logits do not see them.
    """
    return _HEADS[type(model).forward_head](model, x, keep_BN)


def register_head(forward_head: Callable[..., Tensor], masked: MaskedHead) -> None:
    """Have `masked_head` serve models of one more kind.

    Args:
        forward_head: the (unbound) method of the model's class.
        masked: the same computation where dropped tokens are present.
    """
    _HEADS[forward_head] = masked


def _pooled_head(model: Backbone, x: Tensor, keep_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    tokens = x[:, model.num_prefix_tokens :]
    if keep_BN is None or model.global_pool == "token":
        return model.forward_head(x), tokens
    # Eva's attention pooling sees the prefix tokens too; a ViT says whether its pooling does.
    if getattr(model, "pool_include_prefix", model.global_pool == "map"):
        keep_BN = nn.functional.pad(keep_BN, (model.num_prefix_tokens, 0), value=1.0)
    else:
        x = tokens
    match model.global_pool:
        case "map":
            bias = key_bias(keep_BN)[:, None, None, :].to(x.dtype)
            pooled = cast(nn.Module, model.attn_pool)(x, attn_mask=bias)
        case "avg":
            pooled = masked_mean(x, keep_BN)
        case "max":
            pooled = _masked_max(x, keep_BN)
        case "avgmax":
            pooled = 0.5 * (_masked_max(x, keep_BN) + masked_mean(x, keep_BN))
    return model.head(model.head_drop(model.fc_norm(pooled))), tokens


def _masked_max(x_BNC: Tensor, keep_BN: Tensor) -> Tensor:
    largest = x_BNC.masked_fill(keep_BN.unsqueeze(-1) < 0.5, float("-inf")).amax(dim=1)
    return largest.masked_fill(largest == float("-inf"), 0.0)  # where nothing is kept: no NaN


_HEADS: dict[Callable[..., Tensor], MaskedHead] = {
    VisionTransformer.forward_head: _pooled_head,
    deit.VisionTransformerDistilled.forward_head: _pooled_head,
    Eva.forward_head: _pooled_head,
}
