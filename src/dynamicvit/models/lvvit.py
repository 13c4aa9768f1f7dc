"""LV-ViT (arXiv 2104.10858): a plain ViT with a convolutional stem and a head on every token.

The published models divide their residual branches by a constant. Here it is folded into the
weights of each branch's last layer, so that timm's blocks can run them.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from timm.layers import ConvNormAct, HybridEmbed, LayerNorm, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import (
    VisionTransformer,
    checkpoint_filter_fn,
)
from torch import Tensor, nn

from dynamicvit.core.backbones import register
from dynamicvit.core.backbones.base import count_weights
from dynamicvit.core.backbones.vit import ViTAdapter

# What the published models divide their residual branches by, by their depth.
RESIDUAL_SCALE = {12: 1, 16: 2, 20: 2, 24: 3}
_STEM_STRIDE = 2


class LVViT(VisionTransformer):
    """LV-ViT. Its prediction is the class head's plus half the largest auxiliary logits.

    Args:
        patch_size: pixels, of stem and projection together; even.
        stem_width: filters of the stem's convolutions.
        residual_scale: divisor of new residual branches.
        in_chans: image channels.
        kwargs: of timm's VisionTransformer. Pooling is always "token".

    Raises:
        ValueError: naming an argument that does not fit.
    """

    aux_head: nn.Module

    def __init__(
        self,
        patch_size: int = 16,
        stem_width: int = 64,
        residual_scale: float = 1.0,
        in_chans: int = 3,
        **kwargs: Any,
    ) -> None:
        # "" is for timm's features_only, which takes no head.
        if kwargs.get("global_pool", "token") not in ("token", ""):
            raise ValueError(f"global_pool of an LV-ViT is 'token', got {kwargs['global_pool']!r}")
        if not isinstance(patch_size, int) or patch_size % _STEM_STRIDE:
            raise ValueError(f"patch_size must be an even integer, got {patch_size!r}")
        conv: Any = partial(ConvNormAct, device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        stem = nn.Sequential(
            conv(in_chans, stem_width, 7, stride=_STEM_STRIDE),
            conv(stem_width, stem_width, 3),
            conv(stem_width, stem_width, 3),
        )
        defaults: dict[str, Any] = {"qkv_bias": False, "norm_layer": partial(LayerNorm, eps=1e-5)}
        super().__init__(
            patch_size=patch_size // _STEM_STRIDE,
            in_chans=in_chans,
            embed_layer=partial(HybridEmbed, backbone=stem),
            **(defaults | kwargs),
        )
        self._reset_aux_head()
        if kwargs.get("weight_init") != "skip":
            with torch.no_grad():
                block: Any
                for block in self.blocks:
                    block.attn.proj.weight.div_(residual_scale)
                    block.mlp.fc2.weight.div_(residual_scale)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, P + K, C] → logits [B, num_classes], of the class token and all others."""
        features = super().forward_head(x, pre_logits=True)
        if pre_logits or self.num_classes == 0:
            return features
        auxiliary = self.aux_head(x[:, self.num_prefix_tokens :])
        return self.head(features) + 0.5 * auxiliary.amax(dim=1)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads."""
        if global_pool not in (None, "token", ""):
            raise ValueError(f"global_pool of an LV-ViT is 'token', got {global_pool!r}")
        super().reset_classifier(num_classes)
        self._reset_aux_head()

    def _reset_aux_head(self) -> None:
        self.aux_head = nn.Identity()
        if self.num_classes > 0:
            like = next(self.parameters())
            self.aux_head = nn.Linear(
                self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype
            )
            trunc_normal_(self.aux_head.weight, std=0.02)
            nn.init.zeros_(self.aux_head.bias)


class LVViTAdapter(ViTAdapter):
    """The losses see class logits and, as tokens, every token's auxiliary logits."""

    family = LVViT
    heads = (LVViT.forward_head,)
    token_logits = True

    def masked_head(
        self, model: Any, x: Tensor, keep_BN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        features = VisionTransformer.forward_head(model, x, pre_logits=True)
        return model.head(features), model.aux_head(x[:, model.num_prefix_tokens :])

    def head_macs(self, model: Any, tokens: int) -> float:
        patches = tokens - model.num_prefix_tokens
        return super().head_macs(model, tokens) + patches * count_weights(model.aux_head)


register(LVViTAdapter())


def from_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict in this module's key names, the residual scale folded in.

    Weights that already have this module's names are returned unchanged.

    Raises:
        ValueError: if the depth is not that of a published model, so that the scale is not known.
    """
    if "patch_embed.conv1.weight" not in weights:
        return weights
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    if depth not in RESIDUAL_SCALE:
        raise ValueError(f"LV-ViT has {' or '.join(map(str, RESIDUAL_SCALE))} blocks, got {depth}")
    renamed = {}
    for key, value in weights.items():
        if re.fullmatch(r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\.(weight|bias)", key):
            value = value / RESIDUAL_SCALE[depth]
        renamed[re.sub(r"^patch_embed\.(conv|bn)(\d)\.", _stem_key, key)] = value
    return renamed


def _stem_key(match: re.Match[str]) -> str:
    return f"patch_embed.backbone.{int(match[2]) - 1}.{match[1]}."


def _filter(weights: dict[str, Tensor], model: LVViT) -> dict[str, Tensor]:
    filtered: dict[str, Tensor] = checkpoint_filter_fn(from_official(weights), model)
    return filtered


def _cfg(url: str = "", **changes: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.backbone.0.conv",
        "classifier": ("head", "aux_head"),
        "license": "apache-2.0",
    } | changes


_RELEASES = "https://github.com/zihangJiang/TokenLabeling/releases/download/1.0/"
default_cfgs = generate_default_cfgs(
    {
        "lvvit_tiny.untrained": _cfg(),
        "lvvit_small.in1k": _cfg(_RELEASES + "lvvit_s-26M-224-83.3.pth.tar"),
        "lvvit_medium.in1k": _cfg(_RELEASES + "lvvit_m-56M-224-84.0.pth.tar"),
        "lvvit_large.untrained": _cfg(),
    }
)


def _create(name: str, pretrained: bool, sizes: dict[str, Any], kwargs: dict[str, Any]) -> LVViT:
    fixed = {"mlp_ratio": 3.0, "residual_scale": RESIDUAL_SCALE[sizes["depth"]]}
    model: LVViT = build_model_with_cfg(
        LVViT,
        name,
        pretrained,
        pretrained_filter_fn=_filter,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **(fixed | sizes | kwargs),
    )
    return model


@register_model
def lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T: width 240, 12 blocks."""
    sizes = {"embed_dim": 240, "depth": 12, "num_heads": 4}
    return _create("lvvit_tiny", pretrained, sizes, kwargs)


@register_model
def lvvit_small(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S: width 384, 16 blocks."""
    sizes = {"embed_dim": 384, "depth": 16, "num_heads": 6}
    return _create("lvvit_small", pretrained, sizes, kwargs)


@register_model
def lvvit_medium(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M: width 512, 20 blocks."""
    sizes = {"embed_dim": 512, "depth": 20, "num_heads": 8}
    return _create("lvvit_medium", pretrained, sizes, kwargs)


@register_model
def lvvit_large(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L: width 768, 24 blocks, a stem of 128 filters."""
    sizes = {"embed_dim": 768, "depth": 24, "num_heads": 12, "stem_width": 128}
    return _create("lvvit_large", pretrained, sizes, kwargs)
