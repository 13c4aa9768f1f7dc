"""Families of backbones: which adapter serves a model."""

from __future__ import annotations

from torch import nn

from dynamicvit.core.backbones.base import Adapter, Backbone, UnsupportedBackbone, unsupported
from dynamicvit.core.backbones.eva import EvaAdapter
from dynamicvit.core.backbones.vit import DistilledAdapter, ViTAdapter

__all__ = ["Adapter", "Backbone", "UnsupportedBackbone", "adapter_of", "register"]

_ADAPTERS: list[Adapter] = [ViTAdapter(), DistilledAdapter(), EvaAdapter()]


def register(adapter: Adapter) -> None:
    """Use an adapter for the models of its family. Later adapters are asked first."""
    _ADAPTERS.append(adapter)


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter that serves a model.

    Raises:
        TypeError: if `model` is not a module.
        UnsupportedBackbone: if its tokens cannot be pruned rightly; the message says why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a timm model, got {type(model).__name__}")
    for adapter in reversed(_ADAPTERS):
        if isinstance(model, adapter.family):
            adapter.check(model)
            return adapter
    biases = ("relative_position_bias", "rel_pos")
    if hasattr(model, "blocks") and any(
        bias in name for name, _ in model.named_parameters() for bias in biases
    ):
        raise unsupported(
            model,
            "its attention adds a position bias for the whole grid, which is not gathered with the "
            "tokens",
        )
    raise unsupported(model, "it is not built on timm's VisionTransformer or Eva")
