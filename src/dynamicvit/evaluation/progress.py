"""What a command is doing, on stderr: a line that changes on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

_SECONDS = 10.0  # between two lines about the same step, where there is no terminal

Report = Callable[..., None]


@contextmanager
def show_progress(quiet: bool = False) -> Iterator[Report]:
    """Give a function to call with each step: `report("comparing", "64 of 256 images")`.

    On a terminal the step and its detail are shown until the next call, and removed at the end.
    Elsewhere (a pipe, a log file) each step is a line, and its details follow every ten seconds.

    Args:
        quiet: say nothing.
    """
    console = Console(stderr=True)
    if quiet:
        yield lambda step, detail="": None
        return
    if console.is_terminal:
        with console.status("") as status:
            yield lambda step, detail="": status.update(escape(f"{step} {detail}".rstrip()))
        return
    last, printed = "", 0.0

    def report(step: str, detail: str = "") -> None:
        nonlocal last, printed
        now = time.monotonic()
        if step != last or now - printed > _SECONDS:
            print(f"{step} {detail}".rstrip(), file=console.file, flush=True)
            last, printed = step, now

    yield report
