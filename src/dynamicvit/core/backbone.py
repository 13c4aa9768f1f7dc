"""The adapter: what SparseViT needs to know of a timm model, and nothing more.

timm's blocks are called, never copied or patched. A model whose forward pass is not the one
written here is refused by name.
"""

from __future__ import annotations

from timm.layers import HybridEmbed, PatchEmbed
from timm.models import deit
from timm.models import vision_transformer as vit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dynamicvit.core.tokens import key_bias, masked_mean


class UnsupportedBackbone(TypeError):
    """The model is not one whose tokens can be pruned rightly; the message says why."""


# Blocks that take an additive attention mask and treat tokens as a set.
_BLOCKS = (
    vit.Block,
    vit.ResPostBlock,
    vit.ParallelScalingBlock,
    vit.ParallelThingsBlock,
    vit.DiffParallelScalingBlock,
)
_HEADS = (VisionTransformer.forward_head, deit.VisionTransformerDistilled.forward_head)
_POOLS = ("token", "avg", "max", "avgmax", "map")


def check_backbone(model: nn.Module) -> None:
    """Raise UnsupportedBackbone unless `model` is a timm VisionTransformer we run rightly."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a timm model, got {type(model).__name__}")
    name = type(model).__name__

    def refuse(reason: str) -> UnsupportedBackbone:
        return UnsupportedBackbone(f"{name} is not supported: {reason}")

    if not isinstance(model, VisionTransformer):
        raise refuse("it is not built on timm's VisionTransformer")
    cls = type(model)
    if (
        cls.forward is not VisionTransformer.forward
        or cls.forward_features is not VisionTransformer.forward_features
        or cls.pool is not VisionTransformer.pool
        or cls.forward_head not in _HEADS
    ):
        raise refuse("it overrides timm's forward pass")
    if not isinstance(model.patch_embed, PatchEmbed | HybridEmbed):
        raise refuse(f"its patch embedding is {type(model.patch_embed).__name__}")
    for block in model.blocks:
        if type(block) not in _BLOCKS:
            raise refuse(f"its blocks are {type(block).__name__}")
    check_pooling(model.global_pool)


def check_pooling(pool: str) -> None:
    """Raise UnsupportedBackbone unless this way of pooling can leave dropped tokens out."""
    if pool not in _POOLS:
        raise UnsupportedBackbone(f"global_pool must be one of {', '.join(_POOLS)}, got {pool!r}")


def check_images(model: VisionTransformer, images: Tensor) -> None:
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
        patch_h, patch_w = embed.patch_size
        if shape[2] % patch_h or shape[3] % patch_w or 0 in shape[2:]:
            raise ValueError(
                f"image height and width must be multiples of the patch size "
                f"{patch_h}×{patch_w}, got shape {shape}"
            )


def embed(model: VisionTransformer, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] → tokens [B, P + N, C], positions added.

    Random patch dropout, if the model has it, is left out: here the schedule says what leaves.
    """
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def head(model: VisionTransformer, x: Tensor, keep_BN: Tensor | None = None) -> Tensor:
    """Final tokens [B, P + N, C] → logits.

    Where `keep_BN` is given, dropped patch tokens are there but pooling does not see them.
    """
    if keep_BN is None or model.global_pool == "token":
        return model.forward_head(x)
    if model.pool_include_prefix:
        keep_BN = nn.functional.pad(keep_BN, (model.num_prefix_tokens, 0), value=1.0)
    else:
        x = x[:, model.num_prefix_tokens :]
    match model.global_pool:
        case "map":
            bias = key_bias(keep_BN)[:, None, None, :].to(x.dtype)
            pooled = model.attn_pool(x, attn_mask=bias)
        case "avg":
            pooled = masked_mean(x, keep_BN)
        case "max":
            pooled = _masked_max(x, keep_BN)
        case "avgmax":
            pooled = 0.5 * (_masked_max(x, keep_BN) + masked_mean(x, keep_BN))
    return model.head(model.head_drop(model.fc_norm(pooled)))


def _masked_max(x_BNC: Tensor, keep_BN: Tensor) -> Tensor:
    largest = x_BNC.masked_fill(keep_BN.unsqueeze(-1) < 0.5, float("-inf")).amax(dim=1)
    return largest.masked_fill(largest == float("-inf"), 0.0)  # where nothing is kept: no NaN
