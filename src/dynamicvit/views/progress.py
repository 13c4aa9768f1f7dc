"""Progress: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_EVERY = 5.0  # seconds between lines


def track(
    items: Iterable[T], what: str, total: int | None, unit: str = "images", quiet: bool = False
) -> Iterator[T]:
    """The items, with progress on stdout: a bar in a terminal, else a line every few seconds.

    Args:
        items: each counts one.
        what: is being done, such as "explaining".
        total: how many there are; None if that is not known.
        unit: what is counted.
        quiet: show nothing.
    """
    console = Console(quiet=quiet)
    if quiet:
        yield from items
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(items, total, description=what)
    else:
        said = time.perf_counter()
        for done, item in enumerate(items):
            if time.perf_counter() - said > _EVERY:
                said = time.perf_counter()
                of = f" of {total}" if total is not None else ""
                console.print(f"{what}: {done}{of} {unit}", highlight=False)
            yield item
