"""Queries and keys of timm's attention, read from a block's weights: for rules that need them.

Axes: B images, N tokens, C channels, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor

from dynamicvit.core.backbones.base import Backbone, UnsupportedBackbone, block_rope
from dynamicvit.core.tokens import Tokens, key_bias

# Blocks that normalise, then attend; and attention whose queries and keys can be read.
_READABLE_BLOCKS = (Block, EvaBlock)
_READABLE_ATTENTION = (Attention, AttentionRope, EvaAttention)


def check_attention(model: Backbone, class_token: bool) -> None:
    """Raise UnsupportedBackbone unless `class_attention` and `mean_keys` can read its blocks."""

    def refuse(reason: str) -> UnsupportedBackbone:
        return UnsupportedBackbone(
            f"{type(model).__name__} is not supported by this scorer: {reason}"
        )

    if class_token and getattr(model, "cls_token", None) is None:
        raise refuse("it has no class token to read attention from")
    for block in model.blocks:
        if type(block) not in _READABLE_BLOCKS:
            raise refuse(f"attention cannot be read from its blocks, {type(block).__name__}")
        if type(block.attn) not in _READABLE_ATTENTION:
            raise refuse(f"queries and keys cannot be read from {type(block.attn).__name__}")


def class_attention(model: Backbone, index: int, tokens: Tokens) -> Tensor:
    """What the class token will attend to in a block: [B, N] float32, mean over heads.

    Args:
        model: the backbone.
        index: of the block.
        tokens: its input. Blocked tokens (`keep` is 0) draw no attention.
    """
    block: Any = model.blocks[index]
    attn = block.attn
    x = block.norm1(tokens.x)
    query = attn.q_norm(_project(attn, 0, x[:, :1]))
    keys = attn.k_norm(_project(attn, 1, x))
    rope = tokens.rope
    if rope is not None:  # prefix tokens, the class token among them, are not rotated
        prefix, patches = keys.split([attn.num_prefix_tokens, rope.shape[3]], dim=2)
        layer = block_rope(model, index, rope)
        rotated = apply_rot_embed_cat(patches, layer, half=attn.rotate_half)
        keys = torch.cat([prefix, rotated.type_as(prefix)], dim=2)
    groups = query.shape[1] // keys.shape[1]  # query heads that share a head of keys
    if groups > 1:
        keys = keys.repeat_interleave(groups, dim=1)
    logits = (query * attn.scale @ keys.transpose(2, 3)).float()
    if tokens.keep is not None:
        bias = key_bias(tokens.keep.detach())
        logits = logits + F.pad(bias, (tokens.num_prefix, 0))[:, None, None, :]
    attention: Tensor = logits.softmax(dim=-1)[:, :, 0, tokens.num_prefix :].mean(dim=1)
    return attention


def mean_keys(model: Backbone, index: int, x: Tensor) -> Tensor:
    """Keys, mean over heads, that a block without rotary embeddings gives tokens: [B, N, D]."""
    block: Any = model.blocks[index]
    return block.attn.k_norm(_project(block.attn, 1, block.norm1(x))).mean(dim=1)


def _project(attn: Any, part: int, x: Tensor) -> Tensor:
    """Queries (part 0) or keys (1) of tokens [B, N, C]: [B, heads, N, D].

    They are neither normalised nor rotated.
    """
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
