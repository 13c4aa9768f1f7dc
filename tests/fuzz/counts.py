"""How many cases a fuzzer tries: few by default, many with the marker `slow`."""

from __future__ import annotations

import pytest


def counts(few: int, many: int) -> pytest.MarkDecorator:
    """Run a test with its `count` at `few`, and at `many` under the marker `slow`."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])
