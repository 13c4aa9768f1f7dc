from __future__ import annotations

import pytest

from dynamicvit.evaluation import console
from dynamicvit.evaluation.console import show_steps


def test_a_pipe_gets_a_line_a_step_and_details_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
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
