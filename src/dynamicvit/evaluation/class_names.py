"""Class names of a data set beside those of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import shorten
from typing import Any, cast

from rich.console import Console
from torch import nn

from dynamicvit.evaluation.console import plain
from dynamicvit.evaluation.data import ImageData
from dynamicvit.evaluation.unreadable import DataError
from dynamicvit.io.predictions import class_names

# Names that no one can compare with words: indices, and WordNet's, which ImageNet's folders have.
_CODES = {"index": re.compile(r"\d+"), "WordNet": re.compile(r"n\d{8}")}


def check_classes(names: Sequence[str] | None, model: nn.Module, model_name: str) -> None:
    """Raise DataError unless the data has as many classes as the model."""
    if names is not None and len(names) != model.num_classes:
        raise DataError(
            f"data must have the {model.num_classes} classes of {model_name}, got {len(names)}: "
            f"{shorten(', '.join(map(plain, names)), 200, placeholder=' …')}"
        )


def renamed_classes(names: Sequence[str] | None, model: nn.Module) -> list[tuple[str, str]]:
    """(The data's name, the model's name) of each class where these differ by more than case,
    punctuation and a number at the start. None where one of the two has no names, or the data has
    codes of the model's."""
    known = cast(Any, model).pretrained_cfg.get("label_names")
    if not isinstance(known, list | tuple) or names is None:
        return []
    kind = _kind(names)
    if kind == "index" or (kind == "WordNet" and _kind(known) != kind):
        return []
    pairs = ((str(ours), str(theirs)) for ours, theirs in zip(names, known, strict=False))
    return [(ours, theirs) for ours, theirs in pairs if _letters(ours) != _letters(theirs)]


def warn_of_names(
    names: Sequence[str] | None, model: nn.Module, model_name: str, console: Console
) -> None:
    """Say that the data's classes are taken in order, where some have other names than the
    model's."""
    renamed = renamed_classes(names, model)
    if renamed:
        ours, theirs = map(plain, renamed[0])
        console.print(
            f"warning: the data names {len(renamed)} of {model.num_classes} classes otherwise than "
            f"{plain(model_name)} and is compared class by class in order: "
            f"{ours!r} counts as {theirs!r}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _letters(name: str) -> str:
    return re.sub(r"^\d+(?=[\W_])|[\W_]", "", name).casefold()


def _kind(names: Sequence[str]) -> str:
    """What names are: words, or codes of one kind."""
    for kind, pattern in _CODES.items():
        if all(pattern.fullmatch(str(name)) for name in names):
            return kind
    return "words"


def names_of_classes(images: ImageData, model: nn.Module) -> list[str]:
    """One name a class: the data's, else the model's."""
    return list(images.class_names or class_names(model))
