"""What is refused at the door: models and images that would give wrong results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dynamicvit import UnsupportedBackbone, sparsify
from tests.conftest import TINY, tiny_vit


class _OtherForward(VisionTransformer):
    def forward_features(self, *arguments: Any, **options: Any) -> Tensor:
        return 2 * super().forward_features(*arguments, **options)


class _OtherPool(VisionTransformer):
    def pool(self, *arguments: Any, **options: Any) -> Tensor:
        return 2 * super().pool(*arguments, **options)


class _OtherHead(VisionTransformer):
    def forward_head(self, *arguments: Any, **options: Any) -> Tensor:
        return 2 * super().forward_head(*arguments, **options)


class _OtherCall(VisionTransformer):
    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return 2 * super().forward(*arguments, **options)


class _OtherBlock(Block):
    pass


class _OtherEmbed(nn.Module):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.num_patches = PatchEmbed(*arguments, **options).num_patches


def _swin() -> nn.Module:
    model: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=8, depths=(1, 1), num_heads=(1, 1)
    )
    return model


OVERRIDES = "it overrides timm's forward pass"
NOT_A_VIT = "it is not built on timm's VisionTransformer"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm.create_model("resnet18"), f"ResNet is not supported: {NOT_A_VIT}"),
        (_swin, f"SwinTransformer is not supported: {NOT_A_VIT}"),
        (lambda: nn.Linear(2, 2), f"Linear is not supported: {NOT_A_VIT}"),
        (lambda: _OtherForward(**TINY), f"_OtherForward is not supported: {OVERRIDES}"),
        (lambda: _OtherPool(**TINY), OVERRIDES),
        (lambda: _OtherHead(**TINY), OVERRIDES),
        (lambda: _OtherCall(**TINY), OVERRIDES),
        (lambda: tiny_vit(block_fn=_OtherBlock), "its blocks are _OtherBlock"),
        (lambda: tiny_vit(embed_layer=_OtherEmbed), "its patch embedding is _OtherEmbed"),
        (
            lambda: tiny_vit(global_pool=""),
            "global_pool must be one of token, avg, max, avgmax, map, got ''",
        ),
        (
            lambda: tiny_vit(global_pool="prr"),
            "global_pool must be one of token, avg, max, avgmax, map, got 'prr'",
        ),
    ],
)
def test_a_model_that_is_not_understood_is_refused_by_name(
    build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(UnsupportedBackbone, match=message):
        sparsify(build(), keep_ratio=0.7)


@pytest.mark.parametrize("model", [None, "deit_small_patch16_224", torch.zeros(1)])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="model must be a timm model, got"):
        sparsify(model, keep_ratio=0.7)


FIXED: dict[str, Any] = {}
DYNAMIC: dict[str, Any] = {"dynamic_img_size": True}


@pytest.mark.parametrize(
    ("options", "images", "error", "message"),
    [
        (FIXED, [[1.0]], TypeError, r"images must be a tensor \[B, C, H, W\], got list"),
        (FIXED, torch.zeros(3, 32, 32), ValueError, r"4 axes.*got shape \(3, 32, 32\)"),
        (FIXED, torch.zeros(1, 1, 32, 32), ValueError, r"3 channels, got shape \(1, 1, 32, 32\)"),
        (FIXED, torch.zeros(1, 3, 32, 40), ValueError, r"32×32 pixels.*\(1, 3, 32, 40\)"),
        (FIXED, torch.zeros(1, 3, 32, 32).int(), TypeError, "floating point, got torch.int32"),
        (FIXED, torch.zeros(1, 3, 32, 32).byte(), TypeError, "floating point, got torch.uint8"),
        (DYNAMIC, torch.zeros(1, 3, 32, 36), ValueError, r"multiples of the patch size 8×8.*36"),
        (DYNAMIC, torch.zeros(1, 3, 0, 32), ValueError, r"multiples of the patch size 8×8.*0, 32"),
        (DYNAMIC, torch.zeros(1, 3, 8, 8), ValueError, "at least one of the 1 patch tokens"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_both_paths(
    options: dict[str, Any], images: Any, error: type[Exception], message: str
) -> None:
    sparse = sparsify(tiny_vit(**options), keep_ratio=0.5)
    with pytest.raises(error, match=message):
        sparse(images)
    if "patch tokens" not in message:  # the masked path counts no tokens
        with pytest.raises(error, match=message):
            sparse.masked(images)
