"""benchmarks/gpu.py and benchmarks/training_step.py, on a CPU with tiny models."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training_step
from benchmarks.training_step import (
    ReferenceViT,
    Setting,
    Step,
    compare_gradients,
    compare_steps,
    keep_matrix,
)
from dynamicvit import SparseViT, sparsify
from dynamicvit.io.embedded import ASSETS
from tests.conftest import TINY, tiny_vit

ROOT = Path(training_step.__file__).parents[1]
STEP = Setting("vit_tiny_patch16_224", tuple(TINY.items()), batch_size=3)

# Runs the command where optional packages cannot be imported, and torch.compile traces but does not
# generate code, which would take a CPU minutes.
DRIVER = """
import sys
for name in ("jsonargparse", "docstring_parser", "matplotlib", "onnx", "onnxscript", "onnxruntime",
             "openvino", "nncf", "tensorboard", "datasets", "webdataset"):
    sys.modules[name] = None
import torch
compile = torch.compile
def trace(model, options=None, **more):
    return compile(model, backend="eager", **more)
torch.compile = trace
torch.set_num_threads(1)
from dynamicvit.deploy import engines
engines.has_bfloat16 = lambda: True  # as a GPU has; torch computes it on any processor
from benchmarks import gpu
sys.exit(gpu.main(sys.argv[1:]))
"""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=3600,
        check=False,
    )


def test_the_command_runs_whole_without_optional_packages(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    run = _run(str(output), "--device", "cpu", "--tiny")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(output.read_text())
    assert (report["failed"], report["skipped"]) == ([], [])
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["date"]

    for name in ("deit", "lvvit"):
        for precision in ("float32", "bfloat16"):
            found = report["correct"][f"{name}, {precision}"]
            assert {"dense logits", "pruned logits", "masked logits"} <= found.keys()
            assert any(key.startswith("gradient of") for key in found)
        assert report["correct"][f"{name}, tokens"] == {"images": 2, "same": 2, "largest_gap": 0}

    rows = report["inference"]
    assert {(row["engine"], row["keep_ratio"], row["align"]) for row in rows} == {
        *(("eager", 0.7, None), ("eager", 0.7, 1), ("eager", 0.8, None)),
        *(("compile", 0.7, None), ("compile", 0.8, None)),
    }
    for row in rows:
        ideal = row["gmacs"][0] / row["gmacs"][1]
        assert row["efficiency"] == pytest.approx(row["speed_up"] / ideal)
        assert row["dense"] == pytest.approx(1e3 * row["batch_size"] / row["dense_ms"])
        if row["engine"] == "compile":
            assert max(row["errors"]) < 1e-2
    for best in report["inference_best"]:
        both = [row for row in rows if row["model"] == best["model"]]
        assert best["dense"] == max(row["dense"] for row in both)
        assert best["sparse"] in [row["sparse"] for row in both]

    assert {row["side"] for row in report["training"]["steps"]} == set(training_step.SIDES)
    assert report["training"]["gradients"]["largest_error"] < 1e-4
    each = report["per_image"]
    assert [row["model"] for row in each] == ["vit_tiny_patch16_224", "lvvit_tiny"]
    for row in each:
        assert row["cost"] == pytest.approx(1.0, abs=0.05)
        assert row["error"] < 1e-2
    assert "images/s" in run.stdout
    assert sorted(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu", "--tiny"], "here, got 'gpu'"),
        (["--device", "cuda:99"], "device must be one of cpu"),
        (["--device", "cpu"], "on a CPU only --tiny models are run"),
    ],
)
def test_what_cannot_be_run_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import gpu

    with pytest.raises(SystemExit) as stopped:
        gpu.main([str(tmp_path / "gpu.json"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _gpu_run(path: Path, seconds: float) -> Any:
    from benchmarks import gpu

    report: dict[str, Any] = {"failed": [], "skipped": [], "inference": []}
    end = gpu.time.perf_counter() + seconds
    return gpu.Run(path, torch.device("cpu"), gpu.TINY, end, report)


def test_what_does_not_fit_into_the_time_is_named(tmp_path: Path) -> None:
    run = _gpu_run(tmp_path / "gpu.json", seconds=100.0)
    done: list[str] = []
    assert run.attempt("part", "long", 60.0, 50.0, lambda: done.append("long")) is None
    assert run.attempt("part", "short", 40.0, 50.0, lambda: done.append("short")) is not None
    assert done == ["short"]
    [skipped] = run.report["skipped"]
    assert (skipped["part"], skipped["row"]) == ("part", "long")
    assert skipped["reason"].endswith("s left of its part, 60 s needed")
    assert json.loads((tmp_path / "gpu.json").read_text())["skipped"] == [skipped]


def test_a_row_that_fails_is_written_down_and_leaves_others_alone(tmp_path: Path) -> None:
    run = _gpu_run(tmp_path / "gpu.json", seconds=100.0)

    def fail() -> None:
        raise RuntimeError("of a compiler")

    run.attempt("part", "one", 0.0, 0.0, fail)
    assert run.report["failed"] == ["part: one: RuntimeError: of a compiler"]


def test_other_tokens_on_a_device_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu

    sparse = sparsify(tiny_vit(), keep_ratio=0.7).eval()
    images = torch.randn(3, 3, 32, 32)
    cpu = torch.device("cpu")
    assert gpu.same_tokens(sparse, images, cpu) == {"images": 3, "same": 3, "largest_gap": 0.0}
    pruned, calls = SparseViT.pruned, []

    def other(self: SparseViT, images: torch.Tensor) -> Any:
        calls.append(self)
        return pruned(self, images if len(calls) == 1 else images.flip(0))

    monkeypatch.setattr(SparseViT, "pruned", other)
    found = gpu.same_tokens(sparse, images, cpu)
    assert found["same"] < 3
    assert found["largest_gap"] > 1e-4


# The training step.


def test_keep_matrix_is_the_papers() -> None:
    keep = torch.tensor([[1.0, 0.0]])
    expected = torch.tensor([[1.0, 1, 0], [1, 1, 0], [1, 1, 1]])
    assert torch.equal(keep_matrix(keep, 1), expected[None, None])


@pytest.mark.parametrize("side", ["ours", "ours, kept gradients"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "lvvit_tiny", str(ASSETS / "model")])
def test_gradients_are_those_of_the_reference(name: str, side: str) -> None:
    """Of a trained model too, whose attention is far from even."""
    found = compare_gradients(replace(STEP, model=name), ("reference", side))
    assert found["parameters"] > 50
    assert found["largest_error"] < 1e-4


def test_a_wrong_reference_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        training_step, "keep_matrix", lambda keep, prefix: keep_matrix(keep * 0 + 1, prefix)
    )
    assert compare_gradients(STEP)["largest_error"] > 1e-2


def test_sides_learn_the_same_and_the_teacher_does_not() -> None:
    steps = [Step(side, STEP) for side in ("reference", "ours")]
    assert isinstance(steps[0].student, ReferenceViT)
    images = steps[0].batches()[0]
    losses = []
    for step in steps:
        teacher: Any = step.task.teacher
        learnt = step.student.get_parameter("backbone.blocks.0.attn.qkv.weight")
        start = [weight.clone() for weight in (learnt, *teacher.parameters())]
        torch.manual_seed(0)
        step(images)
        losses.append(float(step.loss))
        same = [
            torch.equal(before, after)
            for before, after in zip(start, (learnt, *teacher.parameters()), strict=True)
        ]
        assert same == [False, *[True] * (len(start) - 1)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_steps_are_timed_and_memory_is_measured() -> None:
    reference, ours = compare_steps(STEP, seconds=0.0, rounds=3)
    assert (reference.side, ours.side) == ("reference", "ours")
    assert reference.speed_up == 1.0
    assert ours.spread[0] <= ours.speed_up <= ours.spread[1]
    assert math.isfinite(ours.loss)
    assert ours.peak_mb is not None
    assert reference.peak_mb is not None
    assert ours.memory_ratio == pytest.approx(reference.peak_mb / ours.peak_mb)


@pytest.mark.parametrize("sides", [(), ("ours",), ("reference", "theirs")])
def test_sides_are_checked(sides: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"sides must be of \(.*\), that one first, got \("):
        compare_steps(STEP, sides)
