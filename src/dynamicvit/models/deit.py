"""DeiT of width 256, the smallest backbone of the DynamicViT paper (arXiv 2106.02034)."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

default_cfgs = generate_default_cfgs(
    {
        "deit_256.untrained": {
            "input_size": (3, 224, 224),
            "num_classes": 1000,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def deit_256(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT (arXiv 2012.12877) of width 256 with 4 heads, between timm's tiny and small DeiT."""
    arguments = {"patch_size": 16, "embed_dim": 256, "depth": 12, "num_heads": 4} | kwargs
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer,
        "deit_256",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **arguments,
    )
    return model
