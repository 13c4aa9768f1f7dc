"""Selectors by name."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dynamicvit.core.backbones import Backbone
from dynamicvit.core.selectors.base import Merged, Selector, Stage
from dynamicvit.core.selectors.learned import TokenScorer
from dynamicvit.core.selectors.merging import (
    ClassAttentionMerger,
    PoolingMerger,
    SimilarityMerger,
)
from dynamicvit.core.selectors.rules import ClassAttentionScorer, RandomScorer, StaticScorer

__all__ = ["SELECTORS", "Merged", "Selector", "Stage", "check_name", "create", "name_of"]

SELECTORS: dict[str, type[Selector]] = {
    "learned": TokenScorer,
    "random": RandomScorer,
    "static": StaticScorer,
    "class_attention": ClassAttentionScorer,
    "class_attention_merging": ClassAttentionMerger,
    "similarity_merging": SimilarityMerger,
    "pooling": PoolingMerger,
}


def check_name(name: str) -> None:
    """Raise ValueError unless there is a selector of this name."""
    if not isinstance(name, str) or name not in SELECTORS:
        raise ValueError(f"scorer must be one of {', '.join(SELECTORS)}, got {name!r}")


def create(name: str, model: Backbone, stages: int) -> list[Selector]:
    """New, untrained selectors, one a stage, on the backbone's device and in its dtype.

    Raises:
        ValueError: if there is no such selector, or it does not fit the backbone.
    """
    check_name(name)
    like = next(model.parameters())
    return [SELECTORS[name].create(model).to(like.device, like.dtype) for _ in range(stages)]


def name_of(scorers: Iterable[nn.Module]) -> str | None:
    """The key of `SELECTORS` whose modules these are. None if they are not all of one kind."""
    kinds = {type(scorer) for scorer in scorers}
    return next((name for name, kind in SELECTORS.items() if kinds == {kind}), None)
