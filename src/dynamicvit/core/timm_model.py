"""What timm's tools look for on a model: a SparseViT answers as its backbone does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from dynamicvit.core.backbones import Backbone
from dynamicvit.core.backbones.base import check_pooling


class TimmModel(nn.Module):
    """The interface of timm's models, on top of a backbone of timm's."""

    backbone: Backbone

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        return self.backbone.head_hidden_size

    @property
    def embed_dim(self) -> int:
        return self.backbone.embed_dim

    @property
    def in_chans(self) -> int:
        return self.backbone.in_chans

    @property
    def num_prefix_tokens(self) -> int:
        return self.backbone.num_prefix_tokens

    @property
    def global_pool(self) -> str:
        return self.backbone.global_pool

    @property
    def patch_embed(self) -> nn.Module:
        return self.backbone.patch_embed

    @property
    def _traits(self) -> dict[str, Any]:  # where timm looks up the input size
        return getattr(self.backbone, "_traits", {})

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        return getattr(self.backbone, "pretrained_cfg", {})

    @property
    def default_cfg(self) -> dict[str, Any]:
        return self.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classification head (and, if given, the pooling).

        Raises:
            TypeError, ValueError, UnsupportedBackbone: naming the argument and what was got.
        """
        if not isinstance(num_classes, int) or isinstance(num_classes, bool):
            raise TypeError(f"num_classes must be an integer, got {num_classes!r}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
        if global_pool is not None:
            check_pooling(global_pool)
        try:
            self.backbone.reset_classifier(num_classes, global_pool)
        except AssertionError as error:
            raise ValueError(f"global_pool does not fit: {error} Got {global_pool!r}") from error

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Change the input height and width in pixels; timm resamples position embeddings.

        Raises:
            TypeError, ValueError: unless `img_size` is two integers, multiples of the patch size.
        """
        if not (
            isinstance(img_size, Sequence)
            and len(img_size) == 2
            and all(isinstance(side, int) and not isinstance(side, bool) for side in img_size)
        ):
            raise TypeError(f"img_size must be two integers (height, width), got {img_size!r}")
        height, width = cast(tuple[int, int], self.backbone.patch_embed.feat_ratio(as_scalar=False))
        if any(
            side < 1 or side % patch for side, patch in zip(img_size, (height, width), strict=True)
        ):
            raise ValueError(
                f"img_size must be multiples of the patch size {height}×{width}, got {img_size!r}"
            )
        self.backbone.set_input_size(img_size=img_size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm's optimisers find layers, for a learning rate that decays with depth."""
        tokens = "cls_token|dist_token|reg_token|pos_embed|patch_embed|norm_pre|rope"
        return {
            "stem": rf"^backbone\.(?:{tokens})",
            "blocks": [(r"^backbone\.blocks\.(\d+)", None), (r".*", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
