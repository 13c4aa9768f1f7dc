"""benchmarks/accuracy.py, with a tiny model and a few steps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from benchmarks import accuracy
from benchmarks.accuracy import SCALES, plan, same_cost_ratio
from benchmarks.cluttered import write_cluttered
from benchmarks.tables import summarise, tables
from dynamicvit import SparseViT, sparsify
from dynamicvit.core.selectors import SELECTORS, name_of
from dynamicvit.io.embedded import embedded_images
from dynamicvit.io.load import load_model
from dynamicvit.training.metrics import METRICS
from tests.conftest import tiny_vit
from tests.training.worker import Stopped, stopped_after

ROOT = Path(accuracy.__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A benchmark's folder that already has data: five images a class and split."""
    for split in ("train", "val"):
        for name, index, picture in embedded_images(split):
            if index < 5:
                target = tmp_path / "run" / "data" / split / name
                target.mkdir(parents=True, exist_ok=True)
                picture.save(target / f"{index}.png")
    (tmp_path / "run" / "data" / ".complete").touch()
    return tmp_path / "run"


def _run(folder: Path, *rows: str, **options: Any) -> dict[str, Any]:
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    arguments = [str(folder), "--scale", "tiny", "--device", "cpu", "--rows", *rows, *more]
    assert accuracy.main(arguments) == 0
    report: dict[str, Any] = json.loads((folder / accuracy.JSON).read_text())
    return report


def test_rows_are_run_and_written_and_left_alone_when_done(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ("learned-0.5", "random-0.5", "pooling-0.7*", "steps-3-learned_warm")
    report = _run(folder, *rows, seeds=2)
    assert [row["row"] for row in report["rows"]] == [
        *("dense", "learned-0.5", "pooling-0.7-untrained", "pooling-0.7", "random-0.5"),
        *("steps-3-learned_warm", "learned-0.5-seed1", "random-0.5-seed1"),
    ]
    found = {row["row"]: row for row in report["rows"]}
    assert {row["scale"] for row in report["rows"]} == {"tiny"}
    assert found["learned-0.5"]["tokens"] == [16, 8, 4, 2]
    assert (found["learned-0.5"]["steps"], found["learned-0.5"]["warm_start"]) == (3, 3)
    assert found["pooling-0.7-untrained"]["steps"] == 0
    warm = found["steps-3-learned_warm"]
    assert (warm["steps"], warm["warm_start"]) == (2, 1)
    assert found["learned-0.5"]["gmacs"] < found["dense"]["gmacs"]
    for row in report["rows"]:
        assert row["images"] == 50
        assert row["environment"]["torch"]
        trained = row["settings"]["train"]
        assert (trained is None) == (row["steps"] == 0)
        model = load_model(folder / row["row"] / accuracy.FINAL)
        if row["scorer"] is not None:
            assert isinstance(model, SparseViT)
            assert name_of(model.scorers) == row["scorer"]
        assert not (folder / row["row"] / "checkpoints").exists()
    assert "learned-0.5" in capsys.readouterr().out
    assert (folder / accuracy.PLOT).read_bytes().startswith(b"\x89PNG")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished row was run again")

    monkeypatch.setattr(accuracy, "train", refuse)
    monkeypatch.setattr(accuracy, "evaluate_model", refuse)
    # Other seeds stay, also where they are not asked for.
    assert _run(folder, rows[0])["rows"] == report["rows"]
    dense, pooled = found["dense"], found["pooling-0.7"]
    against = f"{pooled['top1'] - dense['top1']:+.2f}".replace("-", "−")
    untrained = f"{found['pooling-0.7-untrained']['top1']:.2f}"
    assert f"| {untrained} | {pooled['top1']:.2f} | {against} |" in tables(report["rows"])["main"]
    both = [found[name]["top1"] for name in ("learned-0.5", "learned-0.5-seed1")]
    assert (
        f"{sum(both) / 2:.2f} ({min(both):.2f}–{max(both):.2f}, 2 seeds)"
        in tables(report["rows"])["main"]
    )


def test_a_row_that_was_interrupted_goes_on(folder: Path, tmp_path: Path) -> None:
    _run(folder, "dense")
    with pytest.raises(Stopped), stopped_after(3):
        _run(folder, "class_attention-0.7")
    row = folder / "class_attention-0.7"
    assert not (row / accuracy.RESULT).exists()
    assert [row["row"] for row in json.loads((folder / accuracy.JSON).read_text())["rows"]] == [
        "dense"
    ]
    resumed = _run(folder, "class_attention-0.7")["rows"][1]
    lines = [json.loads(line) for line in (row / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [3, 6]

    (tmp_path / "other").mkdir()
    (folder / "data").rename(tmp_path / "other" / "data")
    (folder / "dense").rename(tmp_path / "other" / "dense")
    whole = _run(tmp_path / "other", "class_attention-0.7")["rows"][1]
    for key in ("top1", "loss", "gmacs", "tokens", "steps", "settings"):
        assert resumed[key] == whole[key], key


def test_a_result_of_other_settings_is_not_passed_off(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(folder, "dense")
    result = folder / "dense" / accuracy.RESULT
    older = json.loads(result.read_text())
    del older["settings"]["train"]["epoch_images"], older["settings"]["train"]["temperature"]
    result.write_text(json.dumps(older, indent=2))
    with pytest.raises(SystemExit):
        _run(folder, "dense")  # an epoch has fewer images than by default
    message = "dense/result.json has a result of other settings: choose another folder, or remove "
    assert f"{message}it, got epoch_images 40 (not None)\n" in capsys.readouterr().err
    older["settings"]["train"]["epoch_images"] = 40
    result.write_text(json.dumps(older, indent=2))
    _run(folder, "static-0.7-untrained")  # an option that came later had its default before
    other = folder / "static-0.7-untrained" / accuracy.RESULT
    as_run = other.read_text()
    other.write_text(as_run.replace('"precision": "no"', '"precision": "bf16"'))
    with pytest.raises(SystemExit):
        _run(folder, "dense")  # not asked for, but it would be in the same table
    assert "static-0.7-untrained/result.json has a result of other" in capsys.readouterr().err
    other.write_text(as_run)
    written = result.read_text().replace('"batch_size": 10', '"batch_size": 20')
    result.write_text(written[:99])
    with pytest.raises(SystemExit):
        _run(folder, "random-0.7")
    assert "dense/result.json is damaged, remove it: " in capsys.readouterr().err
    result.write_text(written.replace('"precision": "float32"', '"precision": "bfloat16"'))
    with pytest.raises(SystemExit):
        _run(folder, "random-0.7")
    assert (
        "it, got precision float32 (not bfloat16), batch_size 10 (not 20)"
        in capsys.readouterr().err
    )
    assert not (folder / "random-0.7").exists()


def test_rows_stay_with_the_dense_model_that_they_are_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(folder, "static-0.7-untrained")
    shutil.rmtree(folder / "dense")
    with pytest.raises(SystemExit):
        _run(folder, "dense")
    assert "has rows (static-0.7-untrained, …) but not the dense model" in capsys.readouterr().err
    assert not (folder / "dense").exists()


def test_a_row_that_was_begun_with_other_settings_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Stopped), stopped_after(3):
        _run(folder, "random-0.7")
    monkeypatch.setitem(SCALES, "tiny", replace(SCALES["tiny"], tuning_steps=8))
    with pytest.raises(SystemExit):
        _run(folder, "random-0.7")
    error = capsys.readouterr().err
    assert "error: random-0.7: " in error
    assert "belongs to a run with another config: epoch_images was 30, got 40" in error


def test_cluttered_images_have_a_whole_one_and_pieces_of_others(
    folder: Path, tmp_path: Path
) -> None:
    written = write_cluttered(tmp_path / "cluttered", str(folder / "data"))
    for split in ("train", "val"):
        before = sorted((folder / "data" / split).glob("*/*.png"))
        after = sorted((written / split).glob("*/*.png"), key=lambda path: path.name)
        assert len(before) == len(after) == 50
        classes = sorted({path.parent.name for path in before})
        for old, new in zip(before, after, strict=True):
            assert new.parent.name.startswith(f"{classes.index(old.parent.name)}_")
            whole, canvas = (np.asarray(Image.open(path)) for path in (old, new))
            assert canvas.shape == (40, 40)
            windows = sliding_window_view(canvas, (28, 28))
            assert (windows >= whole).all(axis=(2, 3)).any()
            assert (canvas > 0).sum() <= (whole > 0).sum() + 4 * 8 * 8
        assert sum((np.asarray(Image.open(path)) > 0).sum() for path in after) > sum(
            (np.asarray(Image.open(path)) > 0).sum() for path in before
        )
    again = write_cluttered(tmp_path / "again", str(folder / "data"))
    files = [path.relative_to(written) for path in sorted(written.rglob("*.png"))]
    assert [(written / file).read_bytes() for file in files] == [
        (again / file).read_bytes() for file in files
    ]


def test_a_scale_of_cluttered_images_is_run_on_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SCALES, "tiny", replace(SCALES["tiny"], cluttered=True))
    [row] = _run(folder, "dense")["rows"]
    assert row["images"] == 50
    assert row["settings"]["data"] == "embedded, cluttered"
    assert (folder / "cluttered_embedded" / "val").is_dir()
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        accuracy.main([str(folder), "--scale", "cluttered"])
    error = capsys.readouterr().err
    assert "--scale cluttered starts from benchmarks/results/small/dense/model.safeten" in error
    assert SCALES["cluttered"].cluttered
    model = SCALES["cluttered"].model
    assert model is not None
    assert (ROOT / model["model_kwargs"]["pretrained_cfg_overlay"]["file"]).is_file()


def test_the_plan_has_every_comparison() -> None:
    rows = plan(SCALES["small"], seeds=3)
    names = [row.folder for row in rows]
    assert len(set(names)) == len(names)
    main = {(row.scorer, row.keep_ratio, bool(row.steps)) for row in rows if row.table == "main"}
    assert main == {
        ("random", 1.0, True),  # of which none leave
        *(("learned", ratio, True) for ratio in (0.9, 0.8, 0.7, 0.5)),
        *(
            (name, ratio, tuned)
            for name in SELECTORS
            if name != "learned"
            for ratio in (0.7, 0.5)
            for tuned in (True, False)
        ),
    }
    assert {row.stages for row in rows} == {1, 2, 3}
    removed = [row.options for row in rows if row.table == "losses"]
    assert removed == [
        {**accuracy.BEST_START, f"{name}_weight": 0.0}
        for name in ("cross_entropy", "ratio", "logit_kl", "token")
    ]
    # What one rule that learns is given, the other is too.
    learns = [row for row in rows if row.scorer and SELECTORS[row.scorer].learns and row.steps]
    assert {row.options["ratio_weight"] for row in learns if row.table == "main"} == {10.0}
    assert {row.options["warm_start"] for row in learns if row.table == "main"} == {120}
    assert {row.seed for row in rows if row.name == "learned-0.7"} == {0, 1, 2}
    assert {row.seed for row in rows if row.name == "learned-0.9"} == {0}
    steps = {(row.steps, row.name.split("-")[2]) for row in rows if row.table == "steps"}
    assert {budget for budget, _ in steps} == {100, 225, 450, 900}
    assert len({name for budget, name in steps if budget == 100}) == 7
    assert len({name for budget, name in steps if budget == 900}) == 3  # the others: main table
    # Stopped early, it has the most important.
    order = [row.table if row.seed == 0 else "seeds" for row in rows]
    assert list(dict.fromkeys(order)) == [
        *("dense", "main", "recipes", "steps", "budgets", "seeds", "stages", "losses", "starts")
    ]
    assert order == sorted(order, key=list(dict.fromkeys(order)).index)
    tuned = {row.scorer for row in rows if row.seed == 2 and row.steps and row.keep_ratio == 0.5}
    assert tuned == set(SELECTORS)


@pytest.mark.parametrize(("stages", "ratio"), [(3, 0.7), (2, 0.5724), (1, 0.2667)])
def test_fewer_stages_cost_the_same(stages: int, ratio: float) -> None:
    # 3 (1 + 0.7 + 0.49 + 0.343) = 4 (1 + r + r²) = 6 (1 + r)
    assert same_cost_ratio(0.7, stages, 12) == pytest.approx(ratio, abs=1e-3)


def test_seeds_become_one_line() -> None:
    shared = {"table": "main", "scorer": "random", "keep_ratio": 0.7, "stages": 3, "steps": 9}
    shared |= {"warm_start": 0, "gmacs": 1.0}
    rows = [
        {**shared, "row": name, "seed": seed, "top1": top1}
        for name, seed, top1 in (("a", 0, 80.0), ("b", 0, 70.0), ("a-seed1", 1, 84.0))
    ]
    one, two = summarise(rows)
    assert (one["row"], one["top1"], one["spread"], one["seeds"]) == ("a", 82.0, (80.0, 84.0), 2)
    assert (two["row"], two["spread"], two["seeds"]) == ("b", (70.0, 70.0), 1)


def test_rows_can_be_listed_with_the_time_that_they_take(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy.main([str(folder), "--scale", "tiny", "--device", "cpu", "--list"])
    printed = capsys.readouterr().out
    for row in plan(SCALES["tiny"], depth=4):
        assert row.folder in printed
    assert "hours left" in printed
    assert not (folder / accuracy.JSON).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "nothing"], "--rows must name some of dense, learned-0.7"),
        (["--seeds", "0"], "--seeds must be 1 or more, got 0"),
        (["--workers", "-1"], "--workers must be 0 or more, got -1"),
        (["--model", "nowhere"], "no model folder at nowhere"),
        (["--model", "{folder}/sparse"], "model must be a dense model's folder, got the sparse"),
        (["--data_dir", "nowhere"], "cannot open 'torch/fashion_mnist' in 'nowhere'"),
    ],
)
def test_what_cannot_be_run_is_refused(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    sparsify(tiny_vit()).save_pretrained(folder / "sparse")
    arguments = [part.format(folder=folder) for part in arguments]
    with pytest.raises(SystemExit) as stopped:
        accuracy.main([str(folder), "--scale", "tiny", "--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_it_runs_without_optional_packages(folder: Path) -> None:
    script = """
import sys
for name in ("jsonargparse", "docstring_parser", "matplotlib", "onnx", "onnxscript", "onnxruntime",
             "openvino", "nncf", "tensorboard", "datasets", "webdataset"):
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
from benchmarks import accuracy
sys.exit(accuracy.main(sys.argv[1:]))
"""
    arguments = [str(folder), "--scale", "tiny", "--device", "cpu", "--rows", "dense"]
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=3600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no plot: pip install 'dynamicvit[plot]'" in run.stdout
    assert (folder / accuracy.JSON).exists()
    assert not (folder / accuracy.PLOT).exists()


def test_one_model_for_all_budgets_stands_beside_those_trained_for_one() -> None:
    shared = {"scorer": "learned", "keep_ratio": 0.7, "stages": 3, "steps": 9, "warm_start": 0}
    shared |= {"gmacs": 1.0, "top1": 90.0}
    points = [
        [
            {"keep_ratio": 0.7, "per_image": per_image, "top1": top1 + per_image, "gmacs": 0.5}
            for per_image in (False, True)
        ]
        for top1 in (80.0, 82.0)
    ]
    rows = [
        {**shared, "row": "dense", "table": "dense", "seed": 0, "scorer": None},
        {**shared, "row": "learned-0.7", "table": "main", "seed": 0},
        {**shared, "row": "budgets", "table": "budgets", "seed": 0, "budgets": points[0]},
        {**shared, "row": "budgets-seed1", "table": "budgets", "seed": 1, "budgets": points[1]},
    ]
    assert tables(rows)["budgets"].endswith(
        "| 0.7 | 0.5000 | 81.00 (80.00–82.00, 2 seeds) | 82.00 (81.00–83.00, 2 seeds) | 90.00 |"
    )
