"""Odd command lines: they run, or end in one line that says what is wrong."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest

from dynamicvit import cli, sparsify
from dynamicvit.evaluation import supported_models
from tests.conftest import tiny_vit
from tests.fuzz.counts import counts

VALUES = (
    *("", " ", "0", "-1", "1", "1e400", "nan", "inf", "null", "true", "[]", "[0.7]", "{}", "[[1]]"),
    *("x", "é", "\udce9", "a\nb", "a\0b", "no/where", "./nowhere", "-", "--", "99999999999999999"),
    *("'", '"', "{a: b", "!!python/object:os.system", "&a *a", "%s", "[red]", "x" * 3000),
)
# These start a server, train, or download; what their parsers refuse is tried all the same.
_LONG = {"demo", "quickstart", "train", "benchmark", "export"}


def _line(
    numbers: random.Random, files: list[str], options: dict[str, list[str]]
) -> tuple[list[str], bool]:
    """A command line, and whether it may be run to its end."""
    name = numbers.choice(list(options))
    arguments = [
        numbers.choice([*files, *files, *VALUES]) for _ in range(numbers.choice([0, 1, 1, 2]))
    ]
    for option in numbers.sample(options[name], min(len(options[name]), numbers.randint(0, 4))):
        value = numbers.choice([*files, *VALUES])
        arguments += numbers.choice([[option, value], [f"{option}={value}"], [option]])
    return [name, *arguments], name not in _LONG


@counts(few=30, many=200)
def test_a_command_line_runs_or_ends_in_one_line(
    count: int,
    images: Path,
    dense_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dynamicvit.io.hub._reachable", lambda: False)
    find = supported_models._find  # all of timm's models take minutes to count
    monkeypatch.setattr(supported_models, "_find", lambda filter: find(filter)[:2])
    sparsify(tiny_vit(num_classes=2), 0.7).save_pretrained(tmp_path / "sparse")
    (tmp_path / "bad.yaml").write_bytes(b"batch_size: \xff\xfe")
    (tmp_path / "odd.yaml").write_text("batch_size: [1, {a: b}]\nnone: 3\n")
    files = ["sparse", "dense", "images", "images/val/dark/00.png", "bad.yaml", "odd.yaml", "."]
    options = {
        name: [
            option
            for action in cli.build_parser(name)[0]._actions
            for option in action.option_strings
        ]
        for name in cli.COMMANDS
    }
    numbers, wrong = random.Random(0), list[str]()
    for _ in range(count):
        line, whole = _line(numbers, files, options)
        if not whole:
            line.append("--no_such_option")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert cli.main(line) == 0
        except SystemExit as end:
            error = capsys.readouterr().err
            start = f"dynamicvit {line[0]}: error: "
            right = end.code == 2 and error.splitlines()[-1].startswith(start)
            if end.code != 0 and (not right or "Traceback" in error):
                wrong.append(f"{line} printed {error}")
        except BaseException as error:
            wrong.append(f"{line} raised {error!r}")
        capsys.readouterr()
    assert not wrong, "\n".join(wrong)
