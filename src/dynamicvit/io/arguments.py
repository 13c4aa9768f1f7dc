"""Check the types of arguments. Errors name the argument."""

from __future__ import annotations

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_NUMBERS: dict[Any, tuple[type, str]] = {
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
}
_WORDS: dict[Any, str] = {str: "a string", bool: "true or false", type(None): "None"}


def check_types(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise TypeError, which names the argument, if a value has another type than
    the annotation.

    This is for functions that are also commands: the command line checks types itself. It knows
    str, int, float, bool, None, and lists and unions of these. It ignores other types.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        _check(signature.bind(*args, **kwargs).arguments, typing.get_type_hints(function))
        return function(*args, **kwargs)

    return checked


def check_fields(options: Any, kind: type) -> None:
    """As `check_types`, for the fields of a dataclass that `options` is or inherits."""
    _check(vars(options), typing.get_type_hints(kind))


def _check(values: Mapping[str, Any], hints: dict[str, Any]) -> None:
    for name, value in values.items():
        if not _fits(value, hints.get(name, Any)):
            raise TypeError(f"{name} must be {_describe(hints[name])}, got {value!r:.200}")


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is list:
        several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return several and all(_fits(item, parts[0]) for item in value)
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint][0]) and not isinstance(value, bool)
    return hint not in _WORDS or isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list, each {_describe(typing.get_args(hint)[0])}"
    return _NUMBERS[hint][1] if hint in _NUMBERS else _WORDS.get(hint, str(hint))
