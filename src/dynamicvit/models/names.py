"""Names in timm's registry: sparse models of ours, and which of timm's can become sparse.

`timm.create_model("dynamicvit_deit_small_patch16_224", keep_ratio=0.7)` makes a sparse model, for
the backbones of the paper and the families they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules, register_model
from torch import nn

from dynamicvit.core.backbones import UnsupportedBackbone, adapter_of
from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule

BACKBONES = (
    "deit_256",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_base_patch16_384",
    "lvvit_tiny",
    "lvvit_small",
    "lvvit_medium",
    "lvvit_large",
)


def _entrypoint(backbone: str) -> Callable[..., SparseViT]:
    def create(
        pretrained: bool = False,
        keep_ratio: float | None = None,
        schedule: KeepSchedule | None = None,
        features_only: bool = False,
        **kwargs: Any,
    ) -> SparseViT:
        if features_only:
            raise ValueError(
                f"features_only needs a token at every position, and those of dynamicvit_{backbone}"
                " leave; use forward_features, or the dense model's features"
            )
        if keep_ratio is not None and schedule is not None:
            raise ValueError(
                f"give keep_ratio or schedule, not both, got {keep_ratio!r} and {schedule!r}"
            )
        dense: Any = timm.create_model(backbone, pretrained=pretrained, **kwargs)
        if schedule is None:
            ratio = 0.7 if keep_ratio is None else keep_ratio
            schedule = KeepSchedule.from_keep_ratio(ratio, depth=adapter_of(dense).depth(dense))
        return SparseViT(dense, schedule)

    create.__name__ = create.__qualname__ = f"dynamicvit_{backbone}"
    create.__doc__ = f"`{backbone}` with untrained scorers; keep_ratio is 0.7 by default."
    return create


for _backbone in BACKBONES:
    register_model(_entrypoint(_backbone))


def build_on_meta(name: str) -> Any:
    """timm's model of this name with shapes but no values: any size fits in memory."""
    with torch.device("meta"):
        # Values are not there to be initialised, which would take seconds.
        skips = ("deit", "lvvit", "vision_transformer", "vision_transformer_hybrid")
        options: dict[str, Any] = (
            {"weight_init": "skip"} if is_model_in_modules(name, skips) else {}
        )
        return timm.create_model(name, **options)


def why_unsupported(name: str) -> str | None:
    """Why timm's model of this name cannot become sparse, and which ones near it in size can.

    Shapes alone tell, so no weights are read or downloaded. None if it can, or if timm does not
    know the name.
    """
    if not timm.is_model(name):
        return None
    model = build_on_meta(name)
    try:
        adapter_of(model.backbone if isinstance(model, SparseViT) else model)
    except UnsupportedBackbone as error:
        size = count_parameters(model)
        sizes = {other: count_parameters(build_on_meta(other)) for other in BACKBONES}
        near = sorted(sizes, key=lambda other: abs(math.log(sizes[other] / size)))[:2]
        return f"{error}; near in size: {', '.join(near)}"
    return None


def count_parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())
