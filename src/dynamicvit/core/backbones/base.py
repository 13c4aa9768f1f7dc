"""Adapter: what the loop needs from a family of backbones.

timm's blocks are called, never copied or patched. A model whose forward pass is not the one an
adapter knows is refused by name.

Axes: B images, N patch tokens, P prefix tokens, C channels, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias, cast

import torch
from timm.layers import HybridEmbed, PatchEmbed
from timm.models import checkpoint as checkpoint_block
from timm.models import eva
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from dynamicvit.core.tokens import Tokens, key_bias, masked_mean

Backbone: TypeAlias = vit.VisionTransformer | eva.Eva

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
_POOLS = ("token", "avg", "max", "avgmax", "map")


class UnsupportedBackbone(TypeError):
    """The model is not one whose tokens can be pruned rightly; the message says why."""


class Adapter:
    """A family of timm's plain transformers. It has no state: every method takes the model.

    Attributes:
        family: the class of its models.
        base: the timm class whose forward pass they must have.
        heads: the `forward_head` methods that `head` and `masked_head` follow.
        token_logits: whether the tokens that `masked_head` gives are logits. The token loss then
            compares them as distributions.
    """

    family: ClassVar[type[nn.Module]]
    base: ClassVar[type[nn.Module]]
    heads: ClassVar[tuple[Callable[..., Any], ...]]
    token_logits: ClassVar[bool] = False

    def check(self, model: nn.Module) -> None:
        """Raise UnsupportedBackbone unless tokens of `model` can be pruned rightly."""
        cls: Any = type(model)
        same = all(
            getattr(cls, name) is getattr(self.base, name)
            for name in ("forward", "forward_features", "pool")
        )
        if not same or cls.forward_head not in self.heads:
            raise unsupported(model, "it overrides timm's forward pass")
        known = cast(Backbone, model)
        if not isinstance(known.patch_embed, PatchEmbed | HybridEmbed):
            raise unsupported(model, f"its patch embedding is {type(known.patch_embed).__name__}")
        for block in known.blocks:
            if type(block) not in _BLOCKS:
                raise unsupported(model, f"its blocks are {type(block).__name__}")
            if any(isinstance(module, nn.Conv1d | nn.Conv2d) for module in block.modules()):
                raise unsupported(
                    model, "its blocks hold convolutions, which need every token at its position"
                )
        check_pooling(known.global_pool)

    def check_images(self, model: Backbone, images: Tensor) -> None:
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
        if not torch.compiler.is_compiling():
            self._check_kind(model, images)

    @staticmethod
    def _check_kind(model: Backbone, images: Tensor) -> None:
        weight = next(model.parameters())
        if images.device != weight.device:
            raise ValueError(
                f"images must be on the model's device {weight.device}, got {images.device}"
            )
        if (
            images.dtype != weight.dtype
            and weight.is_floating_point()
            and not torch.is_autocast_enabled(images.device.type)
        ):
            raise TypeError(f"images must be of the model's {weight.dtype}, got {images.dtype}")

    def depth(self, model: Backbone) -> int:
        """How many blocks the model has."""
        return len(model.blocks)

    def num_patches(self, model: Backbone) -> int | None:
        """How many patches an image has. None for a model of images of any size."""
        number: int | None = model.patch_embed.num_patches
        return number

    def grid(self, model: Backbone, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches in images of this size: [..., H, W] pixels."""
        rows, columns = model.patch_embed.dynamic_feat_size((size[-2], size[-1]))
        return rows, columns

    def block_macs(self, model: Backbone) -> tuple[float, float]:
        """Multiply-adds of a block, for each token and for each pair of tokens: mean over blocks.

        Norms and activations are not counted.
        """
        # Every matrix of a block meets every token once; attention, each pair of tokens twice.
        attentions = sum(hasattr(module, "fused_attn") for module in model.blocks.modules())
        depth = len(model.blocks)
        return count_weights(model.blocks) / depth, 2 * attentions * model.embed_dim / depth

    def head_macs(self, model: Backbone, tokens: int) -> float:
        """Multiply-adds of the head for an image with this many tokens at the end."""
        heads = model.get_classifier()
        macs = sum(map(count_weights, heads if isinstance(heads, tuple) else (heads,)))
        pool = getattr(model, "attn_pool", None)
        if isinstance(pool, nn.Module):  # its queries are few, and kept tokens are its keys
            macs += count_weights(pool) + count_weights(cast(nn.Module, pool.kv)) * (tokens - 1)
        return macs

    def embed(self, model: Backbone, images: Tensor) -> Tokens:
        """Images [B, in_chans, H, W] → tokens, absolute positions added.

        Random patch dropout is left out: the schedule says what leaves.
        """
        raise NotImplementedError

    def run_block(self, model: Backbone, block: int, tokens: Tokens) -> Tensor:
        """Tokens through one of timm's own blocks: [B, P + N, C]."""
        options: dict[str, Any] = {"attn_mask": tokens.bias}
        if tokens.rope is not None:
            options["rope"] = block_rope(model, block, tokens.rope)
        module = model.blocks[block]
        if model.grad_checkpointing and model.training:
            return checkpoint_block(module, tokens.x, **options)
        return module(tokens.x, **options)

    def norm(self, model: Backbone, x: Tensor) -> Tensor:
        """The final norm."""
        return model.norm(x)

    def head(self, model: Backbone, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, P + K, C] after the final norm → logits [B, num_classes]."""
        return model.forward_head(x, pre_logits=pre_logits)

    def masked_head(
        self, model: Backbone, x: Tensor, keep_BN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Final tokens [B, P + N, C] → what the losses see: logits, and tokens [B, N, …].

        Where `keep_BN` is given, dropped patch tokens are there, and the logits do not see them.
        """
        tokens = x[:, model.num_prefix_tokens :]
        if keep_BN is None or model.global_pool == "token":
            return self.head(model, x), tokens
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


def block_rope(model: Backbone, block: int, rope: Tensor) -> Tensor:
    """The rotary embeddings [B, H, N, D] of one block, out of those of `Tokens.rope`."""
    return rope[block - len(model.blocks) if len(rope) > 1 else 0]


def count_weights(module: nn.Module) -> int:
    """Elements of a module's matrices: its multiply-adds for one token."""
    return sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)


def unsupported(model: nn.Module, reason: str) -> UnsupportedBackbone:
    """The error that says why `model` is refused."""
    return UnsupportedBackbone(f"{type(model).__name__} is not supported: {reason}")


def check_pooling(pool: str) -> None:
    """Raise UnsupportedBackbone unless this way of pooling can leave dropped tokens out."""
    if pool not in _POOLS:
        raise UnsupportedBackbone(f"global_pool must be one of {', '.join(_POOLS)}, got {pool!r}")


def _masked_max(x_BNC: Tensor, keep_BN: Tensor) -> Tensor:
    largest = x_BNC.masked_fill(keep_BN.unsqueeze(-1) < 0.5, float("-inf")).amax(dim=1)
    return largest.masked_fill(largest == float("-inf"), 0.0)  # no NaN where nothing is kept
