"""Going on with a run: from its own config, from old, damaged or missing files; and its lock."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dynamicvit import cli
from dynamicvit.training import loop, run_folder
from dynamicvit.training.checkpoints import find_checkpoints, load_checkpoint
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.distributed import sigterm_noted
from dynamicvit.training.metrics import METRICS
from dynamicvit.training.run import Run
from dynamicvit.training.run_folder import BEST, CONFIG, LOCK, folder_locked, resume_arguments
from dynamicvit.training.train import train
from tests.training.worker import Stopped, stopped_after


def _lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output) / METRICS).read_text().splitlines()]


def test_a_run_goes_on_from_its_own_config_and_says_where(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options |= {"checkpoint_steps": 3, "seed": 7}
    with stopped_after(3), pytest.raises(Stopped):
        train(TrainConfig(**options))
    output = options["output"]
    capsys.readouterr()
    assert cli.main(["train", "--output", output, "--resume"]) == 0
    text = capsys.readouterr().out
    assert "going on after image 12 of epoch 1, step 3 of 8" in text
    assert [line["step"] for line in _lines(output) if line["kind"] == "train"] == [*range(1, 9)]
    before = _lines(output)
    assert cli.main(["train", "--output", output, "--resume"]) == 0
    assert "the run is complete, epoch 2 of 2" in capsys.readouterr().out
    assert [line["kind"] for line in _lines(output)] == [line["kind"] for line in before]


def test_the_budgets_of_steps_come_again(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"checkpoint_steps": 3, "keep_ratios": [0.4, 1.0], "log_steps": 1}
    train(TrainConfig(**options | {"output": str(tmp_path / "whole")}))
    with stopped_after(3), pytest.raises(Stopped):
        train(TrainConfig(**options))
    train(TrainConfig(**options), resume=True)
    runs = [_lines(str(tmp_path / "whole")), _lines(options["output"])]
    whole, resumed = (
        [(line["ratios"], line["loss"]) for line in run if line["kind"] == "train"] for run in runs
    )
    assert whole == resumed
    first = {ratios[0] for ratios, _ in whole}
    assert len(first) > 4
    assert min(first) > 0.4 - 1e-6
    assert max(first) <= 1.0


def test_what_is_given_goes_before_the_run_s_own_config(
    options: dict[str, Any], tmp_path: Path
) -> None:
    train(TrainConfig(**options | {"epochs": 1}))
    output = options["output"]
    own = [f"--config={output}/{CONFIG}"]
    assert resume_arguments(["--output", output, "--resume"]) == own
    assert resume_arguments([f"--output={output}", "--resume=true"]) == own
    assert resume_arguments(["--output", output, "--resume", "false"]) == []
    assert resume_arguments(["--output", output]) == []
    new = ["--output", str(tmp_path / "new"), "--resume"]
    assert resume_arguments([*new, "--data", "photos"]) == []
    with pytest.raises(ValueError, match=f"output must be .* to resume, got {tmp_path / 'new'}"):
        resume_arguments(new)
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"output": output, "epochs": 2}))
    assert resume_arguments(["--config", str(mine), "--resume"]) == own
    assert cli.main(["train", "--config", str(mine), "--resume"]) == 0
    assert [line["step"] for line in _lines(output) if line["kind"] == "validation"] == [4, 8]


def test_a_run_without_a_checkpoint_starts_again(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**options))
    train(TrainConfig(**options), resume=True)
    assert "has no checkpoint yet: the run starts from the beginning" in " ".join(
        capsys.readouterr().out.split()
    )
    assert [line["step"] for line in _lines(options["output"]) if line["kind"] == "train"] == [
        *range(1, 9)
    ]


def _interrupt(_: Run) -> None:
    raise KeyboardInterrupt


def test_a_missing_best_model_is_written_again(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**options))
    best = Path(options["output"]) / BEST
    shutil.rmtree(best)
    train(TrainConfig(**options), resume=True)
    assert "is missing; the next validation writes it again" in " ".join(
        capsys.readouterr().out.split()
    )
    assert (best / "model.safetensors").exists()


@pytest.mark.parametrize("content", [b"epochs: [", b"data: \xff", b"text"])
def test_a_broken_config_of_the_run_is_named(
    options: dict[str, Any], content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**options | {"epochs": 1}))
    path = Path(options["output"]) / CONFIG
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        train(TrainConfig(**options | {"epochs": 1}), resume=True)
    with pytest.raises(SystemExit):
        cli.main(["train", "--output", options["output"], "--resume"])
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1


def test_a_given_config_that_is_not_text_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"data: caf\xe9\n")
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(file), "--output", "x"])
    error = capsys.readouterr().err
    assert f"{file} must be UTF-8 text" in error
    assert error.count("\n") == 1


def test_broken_metrics_lose_their_broken_lines(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**options | {"epochs": 1}))
    path = Path(options["output"]) / METRICS
    whole = path.read_bytes().splitlines(keepends=True)
    broken = [b"\xff\n", b"3\n", b'{"kind": 5}\n', b"[" * 100_000 + b"\n", b'{"step": 1}\n']
    path.write_bytes(b"".join([whole[0], *broken, *whole[1:]]) + b'{"cut')
    train(TrainConfig(**options | {"epochs": 1}), resume=True)
    assert f"damaged lines, which are removed: {len(broken)}" in " ".join(
        capsys.readouterr().out.split()
    )
    assert path.read_bytes().splitlines(keepends=True)[: len(whole) - 1] == whole[:-1]


def test_bits_flipped_in_zip_headers_give_the_checkpoint_before(options: dict[str, Any]) -> None:
    """Or the same one, where nothing reads the bit."""
    train(TrainConfig(**options))
    output = Path(options["output"])
    first, last = find_checkpoints(output)
    content = last.read_bytes()
    with zipfile.ZipFile(last) as archive:
        start = archive.start_dir
        middle = archive.infolist()[5].header_offset
    weights = torch.load(last, weights_only=True)["student"]
    found_first = 0
    local, central, end = (
        range(30),
        range(start, start + 46),
        range(len(content) - 22, len(content)),
    )
    positions = [*local, *(middle + byte for byte in local), *central, *end]
    for position in positions[::3]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        last.write_bytes(damaged)
        found = load_checkpoint(output)
        assert found is not None
        found_first += found[0] == first
        if found[0] == last:
            for name, value in found[2]["student"].items():
                assert torch.equal(value, weights[name])
    assert found_first > 15
    bad = last.with_name(f"{last.name}.damaged")
    assert bad.exists()


def test_a_run_of_an_earlier_version_goes_on(options: dict[str, Any]) -> None:
    """Its config has other names of precision, and lacks options that have come since."""
    with stopped_after(4), pytest.raises(Stopped):
        train(TrainConfig(**options))
    output = Path(options["output"])
    [path] = find_checkpoints(output)
    state = torch.load(path, weights_only=True)
    new = ("weights", "patience", "class_weights", "device")
    config = {k: v for k, v in state["place"]["config"].items() if k not in new}
    config["precision"] = "no"
    state["place"]["config"] = config
    del state["place"]["best_epoch"]
    torch.save(state, path)
    (output / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    assert cli.main(["train", "--output", str(output), "--resume"]) == 0
    assert [line["step"] for line in _lines(options["output"]) if line["kind"] == "train"] == [
        *range(1, 9)
    ]
    assert yaml.safe_load((output / CONFIG).read_text())["precision"] == "float32"


def test_a_folder_in_use_is_refused_and_that_of_a_dead_process_taken_over(
    options: dict[str, Any],
) -> None:
    output = Path(options["output"])
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with folder_locked(output):
                os.write(done, b"x")
                signal.pause()
        finally:
            os._exit(1)
    try:
        os.read(ready, 1)
        with pytest.raises(ValueError, match=f"output must be .* in use by process {child} on"):
            train(TrainConfig(**options))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (output / LOCK).exists()
    train(TrainConfig(**options | {"epochs": 0}))
    assert not (output / LOCK).exists()


def test_a_second_sigterm_ends_the_process() -> None:
    child = os.fork()
    if child == 0:
        try:
            with sigterm_noted() as asked:
                signal.raise_signal(signal.SIGTERM)
                if asked():
                    signal.raise_signal(signal.SIGTERM)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_file_that_is_just_being_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lockf = run_folder.fcntl.lockf
    calls = []

    def remove_first(file: Any, flags: int) -> None:
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        lockf(file, flags)

    monkeypatch.setattr(run_folder.fcntl, "lockf", remove_first)
    with folder_locked(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert len(calls) == 2


def test_a_full_disk_is_told_with_the_file(options: dict[str, Any]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"epoch-0001-image-0+\.pt"):
            train(TrainConfig(**options))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(Path(options["output"]).rglob(".*"))


def test_training_stops_without_improvement_and_stays_stopped(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = loop.evaluate_model
    top1 = iter([50.0, 60.0, 60.0, 55.0, 55.0])

    def worse(*arguments: Any) -> Any:
        found = evaluate(*arguments)
        object.__setattr__(found, "top1", next(top1))
        return found

    monkeypatch.setattr(loop, "evaluate_model", worse)
    options |= {"epochs": 9, "patience": 2}
    for resume in (False, True):
        assert train(TrainConfig(**options), resume).top1 == 55.0
        assert "stopped early after epoch 4 of 9" in " ".join(capsys.readouterr().out.split())
        kept = [line["top1"] for line in _lines(options["output"]) if line["kind"] == "validation"]
        assert kept == [50.0, 60.0, 60.0, 55.0]
