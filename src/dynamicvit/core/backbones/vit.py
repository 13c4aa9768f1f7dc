"""timm's VisionTransformer, and DeiT with its distillation token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dynamicvit.core.backbones.base import Adapter, Backbone
from dynamicvit.core.tokens import Tokens


class ViTAdapter(Adapter):
    family: ClassVar[type[nn.Module]] = VisionTransformer
    base = VisionTransformer
    heads: ClassVar[tuple[Callable[..., Any], ...]] = (VisionTransformer.forward_head,)

    def embed(self, model: Backbone, images: Tensor) -> Tokens:
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        return Tokens(x, model.num_prefix_tokens, self.grid(model, images.shape))


class DistilledAdapter(ViTAdapter):
    family = VisionTransformerDistilled
    heads = (VisionTransformerDistilled.forward_head,)

    def head(self, model: Backbone, x: Tensor, pre_logits: bool = False) -> Tensor:
        logits: Tensor | tuple[Tensor, Tensor] = model.forward_head(x, pre_logits=pre_logits)
        # In train() timm gives the two heads' logits apart, in eval() their mean.
        return (logits[0] + logits[1]) / 2 if isinstance(logits, tuple) else logits
