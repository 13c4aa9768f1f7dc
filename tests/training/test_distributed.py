"""Runs of several processes, on the CPU: what they compute is what one computes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from dynamicvit.evaluation import launch
from dynamicvit.evaluation.launch import start_processes
from dynamicvit.io.folder import save_folder
from dynamicvit.training.checkpoints import find_checkpoints
from dynamicvit.training.metrics import METRICS
from tests.conftest import CLASSES, tiny_vit, write_images
from tests.evaluation.test_data import _write_shards
from tests.training import worker

ROOT = Path(__file__).parents[2]
BATCH = 8  # of all processes
STEPS = 15
# In float32: gradients summed in another order differ in their last digits.
LOSS, WEIGHT = 5e-6, 5e-6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    write_images(root / "images", {"train": 20, "val": 5})
    save_folder(tiny_vit(num_classes=2), root / "dense", class_names=CLASSES)
    lvvit = tiny_vit("lvvit_small", num_classes=2, stem_width=8)
    save_folder(lvvit, root / "lvvit", class_names=CLASSES)
    _write_shards(root / "images", root / "shards")
    return root


def _options(root: Path, output: str, **changes: Any) -> dict[str, Any]:
    """With all that draws: augmentation, Mixup, keep decisions, stochastic depth."""
    return {
        "data": str(root / "images"),
        "model": str(root / "dense"),
        "output": str(root / output),
        "workers": 0,
        "epochs": 3,
        "warmup_epochs": 1,
        "freeze_epochs": 0,
        "log_steps": 1,
        "trackers": [],
        "batch_size": BATCH,
        "drop_path": 0.1,
        "clip_grad": 1.0,
        "temperature": 0.5,
        "lr": 0.5,
        "backbone_lr": 0.2,
    } | changes


def _environment(**more: object) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | _text(more)


def _text(values: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _torchrun(processes: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={processes}", "-m", *arguments]


def _launch(root: Path, processes: int, runs: list[dict[str, Any]]) -> None:
    """What `runs` say, one after the other, in each of so many processes."""
    file = root / f"runs_{processes}.json"
    file.write_text(json.dumps(runs))
    command = _torchrun(processes, "tests.training.worker", str(file))
    done = subprocess.run(
        command, env=_environment(), cwd=ROOT, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-6000:]


def _lines(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (output / METRICS).read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def _last_state(output: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(find_checkpoints(output)[-1], weights_only=True)
    return state


def _weights(output: Path, part: str) -> torch.Tensor:
    state = _last_state(output)
    assert state["place"]["epoch"] == 3
    # A bias on all keys shifts all of a query's scores and changes nothing: its gradient is nothing
    # but rounding, of which Adam makes whole steps.
    for name, value in state[part].items():
        if name.endswith("attn.qkv.bias"):
            value.chunk(3)[1].zero_()
    return torch.cat([value.float().flatten() for value in state[part].values()])


def _assert_same_run(ours: Path, expected: Path) -> None:
    """The first ten losses, what validation counts, and the final weights."""
    losses = [[line["loss"] for line in _lines(run, "train")] for run in (ours, expected)]
    assert len(losses[0]) == len(losses[1]) == STEPS
    assert losses[0][:10] == pytest.approx(losses[1][:10], abs=LOSS, nan_ok=True)
    for mine, theirs in zip(*(_lines(run, "validation") for run in (ours, expected)), strict=True):
        assert (mine["images"], mine["top1"]) == (10, theirs["top1"])
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=LOSS)
    for part in ("student", "ema"):
        difference = _weights(ours, part) - _weights(expected, part)
        assert difference.abs().max() < WEIGHT


@pytest.fixture(scope="module")
def launched(root: Path) -> Path:
    """All the runs that the tests below look at, in three launches."""
    half, quarter, moved = ({"batch_size": BATCH // n} for n in (2, 4, 1))
    moved["checkpoint_steps"] = 7
    # The token loss is a mean over each micro-batch's tokens.
    parts: dict[str, Any] = {"batch_size": BATCH // 4, "accumulate": 2, "token_weight": 0.0}
    dense = {"keep_ratio": None}
    lvvit = {"model": str(root / "lvvit"), "warm_start": 2, "start_at_ratio": True}
    bad = [3, 4, 9]
    budgets = {"keep_ratios": [0.4, 1.0]}  # tokens of all processes compete for a step's budget
    shards = {"data": "wds/tiny", "data_dir": str(root / "shards"), "workers": 1}
    for arguments in (
        {"options": _options(root, "one")},
        {"options": _options(root, "one_no_tokens", token_weight=0.0)},
        {"options": _options(root, "one_dense", **dense)},
        {"options": _options(root, "one_lvvit", **lvvit)},
        {"options": _options(root, "one_bad"), "bad": bad},
        {"options": _options(root, "one_budgets", **budgets)},
    ):
        worker.run(**cast(dict[str, Any], arguments))
    _launch(
        root,
        2,
        [
            {"options": _options(root, "ddp_2", **half)},
            {"options": _options(root, "fsdp_2", **half, shard=True)},
            {"options": _options(root, "accumulated", **parts)},
            {"options": _options(root, "accumulated_fsdp", **parts, shard=True)},
            {"options": _options(root, "dense", **half, **dense, shard=True)},
            {"options": _options(root, "lvvit", **half, **lvvit, shard=True)},
            {"options": _options(root, "bad", **half), "bad": bad},
            {"options": _options(root, "budgets", **half, **budgets)},
            {"options": _options(root, "budgets_fsdp", **half, **budgets, shard=True)},
            {"options": _options(root, "moved", **moved | half, shard=True), "stop": 7},
            {"options": _options(root, "streamed", **half | shards | {"epochs": 1})},
            {
                "options": {
                    "models": [str(root / "dense")],
                    "batch_size": 4,
                    "output": str(root / "shards.json"),
                    **shards,
                }
            },
        ],
    )
    _launch(
        root,
        4,
        [
            {"options": _options(root, "ddp_4", **quarter)},
            {"options": _options(root, "fsdp_4", **quarter, shard=True)},
            {"options": _options(root, "moved", **moved | quarter), "resume": True},
            {"options": _options(root, "gathered", **moved | quarter), "stop": 7},
        ],
    )
    worker.run(_options(root, "gathered", **moved), resume=True)
    return root


@pytest.mark.parametrize("kind", ["ddp_2", "ddp_4", "fsdp_2", "fsdp_4"])
def test_several_processes_are_one_with_the_same_global_batch(launched: Path, kind: str) -> None:
    _assert_same_run(launched / kind, launched / "one")
    head = tiny_vit(num_classes=2).state_dict()["head.weight"]
    learnt = _last_state(launched / "one")["student"]["backbone.head.weight"]
    assert (learnt - head).abs().mean() > 50 * WEIGHT, "too little was learnt to be compared"


@pytest.mark.parametrize("kind", ["budgets", "budgets_fsdp"])
def test_the_budget_of_a_step_is_one_for_all_processes(launched: Path, kind: str) -> None:
    _assert_same_run(launched / kind, launched / "one_budgets")


@pytest.mark.parametrize("kind", ["accumulated", "accumulated_fsdp"])
def test_accumulated_batches_are_one_batch(launched: Path, kind: str) -> None:
    _assert_same_run(launched / kind, launched / "one_no_tokens")


def test_a_dense_model_and_an_lvvit_are_divided_too(launched: Path) -> None:
    """Without scorers; and with a warm start, and statistics of a stem, which are not divided."""
    _assert_same_run(launched / "dense", launched / "one_dense")
    _assert_same_run(launched / "lvvit", launched / "one_lvvit")
    warm = [_lines(launched / run, "warm_start") for run in ("lvvit", "one_lvvit")]
    assert len(warm[0]) == 2
    for ours, expected in zip(*warm, strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], abs=LOSS)


def test_a_run_goes_on_with_another_number_of_processes(launched: Path) -> None:
    """From two sharded ones to four, and from four to one."""
    _assert_same_run(launched / "moved", launched / "one")
    _assert_same_run(launched / "gathered", launched / "one")


def test_a_step_that_is_bad_in_one_process_is_left_out_in_all(launched: Path) -> None:
    skipped = [line["skipped"] for line in _lines(launched / "bad", "train")]
    assert skipped == [0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    for run in ("bad", "one_bad"):
        losses = [line["loss"] for line in _lines(launched / run, "train")]
        assert [step for step, loss in enumerate(losses) if loss is None] == [3, 4, 9]
    difference = _weights(launched / "bad", "student") - _weights(launched / "one_bad", "student")
    assert difference.abs().max() < WEIGHT


def test_shards_are_counted_once_by_all_processes_together(launched: Path) -> None:
    [figures] = json.loads((launched / "shards.json").read_text()).values()
    assert figures["images"] == 10
    assert [line["images"] for line in _lines(launched / "streamed", "validation")] == [10]
    losses = [line["loss"] for line in _lines(launched / "streamed", "train")]
    assert len(losses) == 5
    assert all(0 < loss < 10 for loss in losses)


def _metrics_grow(path: Path, lines: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 3600  # it hangs
    while not (path.exists() and len(path.read_text().splitlines()) >= lines):
        assert all(process.poll() is None for process in processes), "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _config(root: Path, output: str, **changes: Any) -> Path:
    file = root / f"{output}.yaml"
    file.write_text(yaml.safe_dump(_options(root, output, **changes)))
    return file


def _start_alone(config: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """Two processes without torchrun's agent, as srun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dynamicvit", "train", "--config", str(config), *arguments]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            command,
            env=_environment(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=2,
                LOCAL_WORLD_SIZE=2,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            cwd=ROOT,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for rank in range(2)
    ]


LONG = {"epochs": 40, "batch_size": BATCH // 2, "checkpoint_steps": 2}


def test_sigterm_to_one_process_stops_all_with_a_checkpoint(root: Path) -> None:
    processes = _start_alone(_config(root, "stopped", **LONG))
    try:
        _metrics_grow(root / "stopped" / METRICS, 4, processes)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=3600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], outputs
    last = _lines(root / "stopped", "train")[-1]["step"]
    assert f"stopped by SIGTERM after step {last}; --resume goes on from there" in outputs[0][0]
    assert _last_state(root / "stopped")["place"]["step"] == last


def test_sigterm_to_the_process_group_stops_with_a_checkpoint(root: Path) -> None:
    """As GNU timeout, systemd and srun send it: to the loader processes too."""
    config = _config(root, "group", **LONG | {"workers": 2})
    command = [sys.executable, "-m", "dynamicvit", "train", "--config", str(config)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command,
        env=_environment(),
        cwd=ROOT,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )
    try:
        _metrics_grow(root / "group" / METRICS, 4, [process])
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=3600)
    finally:
        process.kill()
    assert process.returncode == 143, output
    last = _lines(root / "group", "train")[-1]["step"]
    assert _last_state(root / "group")["place"]["step"] == last


def test_a_lost_process_ends_the_other_with_one_line(root: Path) -> None:
    processes = _start_alone(_config(root, "lost", **LONG))
    try:
        _metrics_grow(root / "lost" / METRICS, 4, processes)
        processes[1].kill()
        _, error = processes[0].communicate(timeout=3600)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 2, error
    message = (
        f"a process of this run was lost; start them again with --resume, to go on from {root}"
    )
    assert message in error
    assert "Traceback" not in error


def test_a_run_under_torchrun_ends_with_its_lost_process_and_resumes(root: Path) -> None:
    config = _config(root, "restarted", **LONG)
    arguments = ("dynamicvit.cli", "train", "--config", str(config))
    pipe = subprocess.PIPE
    agent = subprocess.Popen(
        _torchrun(2, *arguments), env=_environment(), cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    )
    try:
        _metrics_grow(root / "restarted" / METRICS, 4, [agent])
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        ranks = {
            int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children
        }
        [second] = [pid for pid, names in ranks.items() if b"RANK=1" in names]
        os.kill(second, signal.SIGKILL)
        _, error = agent.communicate(timeout=3600)
    finally:
        agent.kill()
    assert agent.returncode != 0
    assert "a process of this run was lost" in error
    assert _last_state(root / "restarted")["place"]["step"] >= 2
    worker.run(_options(root, "restarted", **LONG | {"batch_size": BATCH}), resume=True)
    assert len(_lines(root / "restarted", "train")) == 40 * STEPS / 3


def test_a_processor_without_bfloat16_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for has in (True, False):
        monkeypatch.setattr(launch, "has_bfloat16", lambda has=has: has)
        for precision in ("float32", "bfloat16"):
            # In one process: accelerate by itself refuses another precision.
            with start_processes(precision).autocast():
                product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert product.dtype == getattr(torch, precision)
            error = capsys.readouterr().err
            warned = error.startswith("warning: this processor has no bfloat16")
            assert warned == (precision == "bfloat16" and not has)
            assert len(error.splitlines()) == warned
    AcceleratorState._reset_state(reset_partial_state=True)


def test_what_a_launcher_cannot_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start_processes("float32")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="the launcher's fsdp_version must be 2, got 1"):
        start_processes("float32")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    for asked in ("bf16", "fp16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        with pytest.raises(ValueError, match=f"mixed_precision must be 'no', got '{asked}'"):
            start_processes("float32")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 2 processes, .* cannot join .*, got 1"):
        start_processes("float32")


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("meta", "cuda:99", "toaster"):
        with pytest.raises(ValueError, match=f"device must be one of cpu.* here, got '{name}'"):
            start_processes("float32", name)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert launch.find_device(None).type == "cuda"
    assert launch.find_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="device must be one of cpu, cuda here, got 'cuda:2'"):
        launch.find_device("cuda:2")
