from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dynamicvit.io.arguments import check_types


@check_types
def _function(
    names: list[str],
    grid: list[list[float]] | None = None,
    count: int = 1,
    share: float = 0.5,
    on: bool = False,
    other: Any = None,
) -> str:
    return f"{names} {count}"


def test_what_fits_is_passed_on() -> None:
    assert _function(["a"], count=2) == "['a'] 2"
    alike: list[Any] = [("a",), [[1, 0.5], []], np.int64(3), np.float32(0.5), True, object()]
    assert _function(*alike) == "('a',) 3"
    assert _function([], share=1, grid=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": "a"}, "names must be a list, each a string, got 'a'"),
        ({"names": ["a", 1]}, r"names must be a list, each a string, got \['a', 1\]"),
        ({"names": torch.zeros(3)}, "names must be a list"),
        ({"grid": [0.5]}, r"grid must be a list, each a list, each a number or None, got \[0.5\]"),
        ({"count": True}, "count must be an integer, got True"),
        ({"count": 1.5}, r"count must be an integer, got 1\.5"),
        ({"share": "x"}, "share must be a number, got 'x'"),
        ({"share": torch.zeros(2)}, r"share must be a number, got tensor"),
        ({"on": 1}, "on must be true or false, got 1"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _function(**({"names": []} | arguments))


def test_a_missing_argument_is_python_s_own_error() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'names'"):
        _function()  # type: ignore[call-arg]
