"""What commands print: tables of 80 columns, and progress."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")

# Seconds of silence, where there is no terminal, before the first line of progress and the next.
_FIRST, _NEXT = 3.0, 10.0


def track(items: Iterable[T], what: str, quiet: bool = False, unit: str = "") -> Iterator[T]:
    """Go through the items and show on stderr how far that is: a bar on a terminal, else lines.

    Args:
        items: what to go through.
        what: what is done, such as "evaluating run/best".
        quiet: show nothing.
        unit: what the items are, such as "images".
    """
    # Before the bar, because loader processes should start without it.
    iterator, total = iter(items), length_hint(items) or None
    console = Console(stderr=True)
    if quiet:
        yield from iterator
    elif console.is_terminal:
        # Without a thread that draws: loader processes are forked from this one.
        with Progress(
            *bar_columns(), console=console, expand=True, transient=True, auto_refresh=False
        ) as progress:
            task = progress.add_task(escape(plain(what)), total=total, unit=unit, status="")
            progress.refresh()
            shown = time.monotonic()
            for item in iterator:
                yield item
                progress.advance(task)
                if time.monotonic() - shown > 0.1:
                    progress.refresh()
                    shown = time.monotonic()
    else:
        shown, wait = time.monotonic(), _FIRST
        for done, item in enumerate(iterator):
            if time.monotonic() - shown > wait:
                count = f"{done}" if total is None else f"{done} of {total}"
                print(f"{plain(what)}: {count} {unit}".rstrip(), file=sys.stderr, flush=True)
                shown, wait = time.monotonic(), _NEXT
            yield item


def bar_columns() -> list[ProgressColumn]:
    """What a bar shows of a task, which has the fields `unit` and `status`. The bar itself takes
    the room that is left."""
    return [
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed}/{task.total} {task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    ]


@contextmanager
def show_steps(quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Give a function to call with each step of long work: `report("comparing", "64 of 256")`.

    On a terminal, stderr shows the step and its detail until the next call. Elsewhere each step is
    a line, and its details follow every ten seconds.

    Args:
        quiet: show nothing.
    """
    console = Console(stderr=True)
    if quiet:
        yield lambda step, detail="": None
    elif console.is_terminal:
        with console.status("") as status:
            yield lambda step, detail="": status.update(escape(plain(f"{step} {detail}".rstrip())))
    else:
        last, shown = "", 0.0

        def report(step: str, detail: str = "") -> None:
            nonlocal last, shown
            if step != last or time.monotonic() - shown > _NEXT:
                print(plain(f"{step} {detail}".rstrip()), file=sys.stderr, flush=True)
                last, shown = step, time.monotonic()

        yield report


def make_table(first: str, *others: str) -> Table:
    """A table without lines between columns. The first column, of names, takes what room there is
    and goes on in the next line; the others are numbers, which are never cut."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def plain(name: object) -> str:
    """A name that any terminal can print: bytes of a file name that are not UTF-8 as `\\xe9`."""
    return os.fsencode(str(name)).decode(errors="backslashreplace")


def cell(name: object) -> str:
    """A user's name in a table, where square brackets would be taken for markup."""
    return escape(plain(name))
