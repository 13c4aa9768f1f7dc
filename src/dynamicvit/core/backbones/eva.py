"""timm's Eva: EVA, DINOv3, Perception Encoder and others with rotary position embeddings."""

from __future__ import annotations

from typing import cast

from timm.models.eva import Eva
from torch import Tensor, nn

from dynamicvit.core.backbones.base import Adapter, Backbone, unsupported
from dynamicvit.core.tokens import Tokens


class EvaAdapter(Adapter):
    family = Eva
    base = Eva
    heads = (Eva.forward_head,)

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if cast(Eva, model).patch_drop is not None:
            raise unsupported(
                model, "its random patch dropout cannot be left out; create it without"
            )

    def embed(self, model: Backbone, images: Tensor) -> Tokens:
        eva = cast(Eva, model)
        x, rope = eva._pos_embed(eva.patch_embed(images))
        if rope is not None:  # one layout for all kinds: [L, B, H, N, D]
            rope = rope[:, None] if eva.rope_mixed else rope[None, None, None]
        return Tokens(eva.norm_pre(x), eva.num_prefix_tokens, self.grid(model, images.shape), rope)
