from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynamicvit.cli import main
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.metrics import METRICS
from dynamicvit.training.run_folder import CONFIG
from dynamicvit.training.train import train
from dynamicvit.views.plot import _panels, _read_metrics, _read_ratios, plot

WARM = {"kind": "warm_start", "step": 4, "loss": 0.6, "kept": [0.5, 0.4]}
TRAIN = {
    "kind": "train",
    "epoch": 0,
    "step": 10,
    "loss": 2.0,
    "cross_entropy": 1.5,
    "kept": [0.7, 0.5],
    "lr": {"scorers": 1e-3, "backbone": 0.0},
    "images_per_second": 100.0,
    "grad_norm": 0.1,
}
VALIDATION = {"kind": "validation", "epoch": 1, "step": 20, "top1": 50.0, "loss": 1.0}


def _write(folder: Path, lines: list[dict[str, Any]], config: str | None = "") -> Path:
    folder.mkdir()
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / CONFIG).write_text(config or "{keep_ratio: 0.7, ratios: null}")
    return folder


@pytest.mark.parametrize("keep_ratio", [0.7, None])
def test_a_run_is_drawn(options: dict[str, Any], keep_ratio: float | None) -> None:
    warm_start = 0 if keep_ratio is None else 2
    train(TrainConfig(**options, keep_ratio=keep_ratio, warm_start=warm_start))
    run = Path(options["output"])
    assert main(["plot", str(run)]) == 0
    with Image.open(run / "plot.png") as picture:
        assert picture.width > 1000
    assert not list(run.glob(".*")), "temporary files were left"
    titles = [panel.title for panel in _panels(_read_metrics(run), _read_ratios(run))]
    expected = ["loss", "validation top-1, %", "share of tokens kept", "learning rate"]
    if keep_ratio is None:
        expected.remove("share of tokens kept")
    assert titles[: len(expected)] == expected
    assert "images per second" in titles


def test_every_number_lies_where_it_belongs() -> None:
    warning = {"kind": "warning", "step": 10, "message": "collapsed", "stage": 1}
    later = {"kind": "train", "step": 20, "grad_norm": None, "images_per_second": 90.0}
    lines = [WARM, TRAIN | {"skipped": 0}, warning, later | {"skipped": 0}, VALIDATION]
    panels = {panel.title: panel for panel in _panels(lines, (0.7, 0.49))}
    assert "skipped" not in panels, "nothing was"
    assert "stage" not in panels
    losses = {name: points for name, points in panels["loss"].lines.items() if points}
    assert losses == {
        "total": [(10, 2.0)],
        "cross-entropy": [(10, 1.5)],
        "validation": [(20, 1.0)],
        "warm start": [(0, 0.6)],
    }
    assert panels["validation top-1, %"].lines == {"": [(20, 50.0)]}
    kept = panels["share of tokens kept"]
    assert kept.lines == {"stage 1": [(0, 0.5), (10, 0.7)], "stage 2": [(0, 0.4), (10, 0.5)]}
    assert kept.targets == (0.7, 0.49)
    assert panels["learning rate"].lines == {"scorers": [(10, 1e-3)], "backbone": [(10, 0.0)]}
    [(_, number), (step, not_finite)] = panels["grad norm"].lines[""]
    assert (number, step) == (0.1, 20)
    assert math.isnan(not_finite)
    assert panels["images per second"].lines == {"": [(10, 100.0), (20, 90.0)]}


@pytest.mark.parametrize(
    "lines",
    [
        [WARM],
        [TRAIN],
        [VALIDATION],
        [TRAIN | {"loss": float("nan"), "grad_norm": float("inf")}, VALIDATION],
        [TRAIN | {"step": step, "loss": float("nan") if step % 7 else 1.0} for step in range(200)],
        [TRAIN | {"loss": 0.0, "cross_entropy": 0.0, "grad_norm": None}],
    ],
)
def test_unfinished_and_odd_runs_are_drawn(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    run = _write(tmp_path / "run", lines)
    with (run / METRICS).open("a") as file:
        file.write('{"kind": "tra')  # cut off
    plot(str(run))
    with Image.open(run / "plot.png") as picture:
        picture.load()


def test_the_picture_may_be_another_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _write(tmp_path / "run", [TRAIN], config=None)
    assert plot(str(run), str(tmp_path / "new" / "run.svg")) == tmp_path / "new" / "run.svg"
    assert str(tmp_path / "new" / "run.svg") in capsys.readouterr().out
    plot(str(run), quiet=True)
    assert capsys.readouterr().out == ""
    assert "<svg" in (tmp_path / "new" / "run.svg").read_text()


@pytest.mark.parametrize(
    ("config", "ratios"),
    [
        ("{keep_ratio: 0.5, ratios: null}", (0.5, 0.25, 0.125)),
        ("{keep_ratio: 0.7, blocks: [1], ratios: [0.6]}", [0.6]),
        ("{keep_ratio: null, ratios: null}", ()),
        (None, ()),
    ],
)
def test_the_ratios_aimed_at_are_the_run_s(tmp_path: Path, config: str | None, ratios: Any) -> None:
    assert _read_ratios(_write(tmp_path / "run", [TRAIN], config)) == ratios


@pytest.mark.parametrize(
    ("metrics", "config", "output", "message"),
    [
        (None, None, None, "run must hold metrics.jsonl, which is not in '.*run'"),
        ("", None, None, "metrics.jsonl is empty: the run has logged nothing yet"),
        ("{'a'", None, None, r"""metrics.jsonl is not a run's metrics: line 1 is "\{'a'\""""),
        ('{"loss": 1}\n', None, None, "is not a run's metrics: line 1 is '{\"loss\": 1}'"),
        ("[1]\n{}\n", None, None, r"is not a run's metrics: line 1 is '\[1\]'"),
        (json.dumps(TRAIN) + "\nx\n" + json.dumps(TRAIN), None, None, "line 2 is 'x'"),
        (json.dumps(TRAIN), "[1]", None, "config.yaml must hold options"),
        (json.dumps(TRAIN), "a: [", None, "config.yaml is not valid YAML"),
        (json.dumps(TRAIN), "{keep_ratio: 7, ratios: null}", None, "is not a run's config: keep_"),
        (json.dumps(TRAIN), None, "run.svg", "output must be a file, got the folder run.svg"),
        (json.dumps(TRAIN), None, "run.txt", "output must end in .png, .svg, .pdf, got 'run.txt'"),
    ],
)
def test_what_is_not_a_run_is_refused(
    tmp_path: Path,
    metrics: str | None,
    config: str | None,
    output: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.svg").mkdir()
    run = _write(tmp_path / "run", [], config)
    (run / METRICS).unlink()
    for name, content in ((METRICS, metrics), (CONFIG, config)):
        if content is not None:
            (run / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        plot(str(run), output)
    assert not (run / "plot.png").exists()


def test_no_such_run_and_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="run must be the folder of a run, got 'nowhere'"):
        plot("nowhere")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'dynamicvit\[plot\]'"):
        plot(str(_write(tmp_path / "run", [TRAIN])))
