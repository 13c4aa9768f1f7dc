from __future__ import annotations

import io
import os
from collections.abc import Iterator

import pytest
from rich.console import Console

from dynamicvit.evaluation import console as module
from dynamicvit.evaluation.console import cell, make_table, plain, show_steps, track


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_tracked_passes_unchanged(
    terminal: bool,
    quiet: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "_FIRST", -1.0)
    monkeypatch.setattr(module, "_NEXT", -1.0)
    screen = io.StringIO()
    monkeypatch.setattr(
        module, "Console", lambda **_: Console(file=screen, force_terminal=terminal, width=80)
    )
    assert list(track([3, 1, 2], "counting [x]", quiet)) == [3, 1, 2]
    assert list(track((item for item in [3, 1]), "counting", quiet)) == [3, 1]
    lines = capsys.readouterr().err.splitlines()
    if quiet:
        assert (screen.getvalue(), lines) == ("", [])
    elif terminal:
        assert "counting [x]" in screen.getvalue()
    else:
        assert lines[:2] == ["counting [x]: 0 of 3", "counting [x]: 1 of 3"]
        assert lines[3] == "counting: 0"


def test_an_item_is_asked_for_only_when_it_is_needed() -> None:
    """Loaders tell accelerate at each batch whether it is the last."""
    asked: list[int] = []

    def count() -> Iterator[int]:
        for index in range(3):
            asked.append(index)
            yield index

    for item in track(count(), "counting"):
        assert asked == list(range(item + 1))


def test_numbers_are_never_cut() -> None:
    table = make_table("model", "top-1 %", "points lost (95%)", "images/s")
    table.add_row("a/long/path/" * 12, "93.10", "0.50 (-0.2 to 1.2)", "12345")
    screen = io.StringIO()
    Console(file=screen, width=80).print(table)
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert all(part in text for part in ("93.10", "0.50 (-0.2 to 1.2)", "12345", "images/s"))
    assert "…" not in text


def test_any_name_can_be_printed() -> None:
    name = os.fsdecode(b"caf\xe9 [red]\xc3\xa9")
    assert plain(name) == "caf\\xe9 [red]é"
    screen = io.StringIO()
    Console(file=screen, width=80).print(cell(name))
    assert screen.getvalue().strip() == plain(name)


def test_a_pipe_gets_a_line_a_step_and_details_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with show_steps() as report:
        for image in range(25):
            report("comparing", f"{image} of 25 [images]")
            now += 1.0
        report("moving")
    output = capsys.readouterr()
    assert output.err.splitlines() == [
        "comparing 0 of 25 [images]",
        "comparing 11 of 25 [images]",
        "comparing 22 of 25 [images]",
        "moving",
    ]
    assert output.out == ""
    with show_steps(quiet=True) as report:
        report("comparing", "nothing")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_one_line_that_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with show_steps() as report:
        report("comparing", "[1] of 2")
    output = capsys.readouterr().err
    assert "comparing [1] of 2" in output
    assert output.endswith("\x1b[1A\x1b[2K")  # removed
