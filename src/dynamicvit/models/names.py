"""Sparse models by name in timm's registry: `timm.create_model("dynamicvit_deit_small_patch16_224",
keep_ratio=0.7)`, for the backbones of the paper and the families they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from timm.models import register_model

from dynamicvit.core.backbones import adapter_of
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
