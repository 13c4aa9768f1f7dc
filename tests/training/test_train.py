from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import dynamicvit
from dynamicvit import cli
from dynamicvit.core.backbones import UnsupportedBackbone
from dynamicvit.core.backbones import base as backbone
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.core.selectors import SELECTORS, name_of
from dynamicvit.io.folder import save_folder
from dynamicvit.io.load import load_model
from dynamicvit.training import loop, phases, progress, setup, student
from dynamicvit.training.checkpoints import CHECKPOINTS, find_checkpoints
from dynamicvit.training.config import TrainConfig, complete
from dynamicvit.training.kept_gradients import KeptGradients
from dynamicvit.training.metrics import METRICS
from dynamicvit.training.run_folder import BEST, CONFIG
from dynamicvit.training.student import create_task, parameter_groups
from dynamicvit.training.task import SparseTask, WarmStartTask
from dynamicvit.training.train import train
from tests.conftest import tiny_vit, write_images
from tests.evaluation.test_data import _write_shards, collected, shard_files  # noqa: F401
from tests.training.worker import Stopped, not_finite_at, stopped_after


def _lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output) / METRICS).read_text().splitlines()]


def _last(output: str | Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(find_checkpoints(Path(output))[-1], weights_only=True)
    return state


def _same_weights(output: str | Path, other: str | Path) -> None:
    """Both runs ended at the same place with the same bits."""
    ours, theirs = _last(output), _last(other)
    assert ours["place"]["epoch"] == theirs["place"]["epoch"]
    for part in ("student", "ema"):
        assert (ours[part] is None) == (theirs[part] is None)
        for name, value in (theirs[part] or {}).items():
            assert torch.equal(ours[part][name], value), (part, name)


def test_a_run_writes_model_metrics_config_and_checkpoint(options: dict[str, Any]) -> None:
    evaluation = train(TrainConfig(**options))
    output = Path(options["output"])
    lines = _lines(options["output"])
    assert [line["kind"] for line in lines] == (["train"] * 4 + ["validation"]) * 2
    first = lines[0]
    assert {"loss", "cross_entropy", "ratio", "logit_kl", "token", "lr"} <= first.keys()
    assert len(first["kept"]) == 3
    assert lines[-1]["top1"] == evaluation.top1
    assert lines[-1]["tokens"] == [16, 11, 7, 5]
    model = dynamicvit.load(output / BEST)
    assert isinstance(model, SparseViT)
    assert model.pretrained_cfg["label_names"] == ["bright", "dark"]
    assert TrainConfig(**yaml.safe_load((output / CONFIG).read_text())) == TrainConfig(**options)
    assert not list(output.glob(".*")), "temporary files were left"


def test_epochs_may_be_shorter_than_the_data(options: dict[str, Any]) -> None:
    train(TrainConfig(**options, epoch_images=9))
    steps = [line["step"] for line in _lines(options["output"]) if line["kind"] == "validation"]
    assert steps == [2, 4]  # of 4 images each; of all 16 there would be 8


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (17, "epoch_images must not exceed the training split's 16 images, got 17"),
        (3, "batch_size must not exceed the epoch's 3 images, got 4"),
        (0, "epoch_images must be 1 or more, got 0"),
    ],
)
def test_an_epoch_that_cannot_be_is_refused(
    options: dict[str, Any], length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**options, epoch_images=length))


@shard_files
def test_a_stream_has_no_shorter_epochs(
    options: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    _write_shards(images, tmp_path / "shards")
    options |= {"data": "wds/tiny", "data_dir": str(tmp_path / "shards")}
    with pytest.raises(ValueError, match=r"epoch_images must be null for data read .* got 8"):
        train(TrainConfig(**options, epoch_images=8))


@pytest.mark.parametrize("scorer", [name for name, kind in SELECTORS.items() if kind.reads_blocks])
def test_rules_that_read_blocks_are_not_sharded(options: dict[str, Any], scorer: str) -> None:
    sparse, teacher = sparsify(tiny_vit(), 0.7, scorer=scorer), tiny_vit()
    processes: Any = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), reduce=sum, gather=sum
    )
    config = TrainConfig(**options, shard=True, scorer=scorer)
    with pytest.raises(ValueError, match=f"shard must be false .* got {scorer}"):
        create_task(config, processes, sparse, cast(Any, teacher), None)


@pytest.mark.parametrize("scorer", ["static", "class_attention", "similarity_merging"])
def test_other_rules_are_trained_and_saved(options: dict[str, Any], scorer: str) -> None:
    options |= {"scorer": scorer, "start_at_ratio": True, "kept_gradients": True, "ema": None}
    train(TrainConfig(**options))
    model = dynamicvit.load(Path(options["output"]) / BEST)
    assert isinstance(model, SparseViT)
    assert name_of(model.scorers) == scorer
    before = load_model(options["model"]).state_dict()
    after = cast(Any, model.backbone).state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before), "nothing was learned"


def test_dense_training_learns_and_gets_the_data_s_head(options: dict[str, Any]) -> None:
    options |= {"model": "vit_tiny_patch16_224", "pretrained": False, "epochs": 6, "lr": 0.5}
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    evaluation = train(
        TrainConfig(**options, model_kwargs=shape, keep_ratio=None, mixup=0, cutmix=0, ema=None)
    )
    assert evaluation.top1 == 100.0, "bright and dark are easily told apart"
    model = load_model(Path(options["output"]) / BEST)
    assert model.num_classes == 2


def test_dense_training_has_stochastic_depth_too(options: dict[str, Any]) -> None:
    losses = []
    for rate in (0.0, 0.9):
        output = f"{options['output']}_{rate}"
        changes = {"output": output, "keep_ratio": None, "epochs": 1, "drop_path": rate}
        train(TrainConfig(**options | changes))
        losses.append([line["loss"] for line in _lines(output) if line["kind"] == "train"])
    assert all(one != other for one, other in zip(*losses, strict=True))
    small = {"model": "resnet10t", "pretrained": False, "keep_ratio": None, "drop_path": 0.1}
    with pytest.raises(ValueError, match="drop_path must be 0 for a ResNet, which has no blocks"):
        train(TrainConfig(**options | small))


def test_frozen_epochs_train_the_scorers_alone(options: dict[str, Any]) -> None:
    train(TrainConfig(**options | {"freeze_epochs": 2, "ema": None}))
    dense = load_model(options["model"])
    trained = dynamicvit.load(Path(options["output"]) / BEST)
    assert isinstance(trained, SparseViT)
    for name, value in trained.backbone.state_dict().items():
        assert torch.equal(value, dense.state_dict()[name]), name
    assert _lines(options["output"])[0]["lr"]["backbone"] == 0.0


def test_start_at_ratio_and_warm_start(options: dict[str, Any]) -> None:
    options |= {"epochs": 1, "start_at_ratio": True, "warm_start": 3, "keep_ratio": 0.9}
    train(TrainConfig(**options))
    lines = _lines(options["output"])
    assert [line["kind"] for line in lines[:4]] == ["warm_start"] * 3 + ["train"]
    assert lines[3]["kept"][0] > 0.7, "0.5 is where scorers start otherwise"


def test_the_warm_start_s_learning_rate_falls_from_one_over_width(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(phases, "AdamW", Watched)
    train(TrainConfig(**options | {"epochs": 0, "warm_start": 4}))
    width = load_model(f"{options['output']}/best").embed_dim
    assert rates == pytest.approx([share / width for share in (1, 0.75, 0.5, 0.25)])


def test_parameter_groups_have_two_speeds_and_spare_norms_and_biases() -> None:
    config = TrainConfig(data="", output="", backbone_lr=0.01, weight_decay=0.05)
    sparse = sparsify(tiny_vit(), 0.7)
    groups = parameter_groups(sparse, config, lr=1e-3)
    speeds = {(group["name"], group["lr"], group["lr_scale"]) for group in groups}
    assert speeds == {("scorers", 1e-3, 1.0), ("backbone", 1e-3, 0.01)}
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    everything = [p for g in groups for p in g["params"]]
    assert len(everything) == len(list(sparse.parameters()))
    for name, parameter in sparse.named_parameters():
        spared = parameter.ndim < 2 or name in sparse.no_weight_decay()
        assert (id(parameter) not in decayed) == spared, name


def test_a_run_killed_ten_times_is_the_run_never_stopped(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """With all that draws; killed in the middle of epochs, validating, and writing checkpoints."""
    options |= {
        "data": str(write_images(tmp_path / "more", {"train": 16, "val": 4})),
        "epochs": 4,
        "checkpoint_steps": 3,
        "random_erasing": 0.5,
        "drop_path": 0.1,
        "accumulate": 2,
        "batch_size": 2,
        "lr": 1.0,
        "ema": 0.9,
    }
    steps = 4 * 8
    straight = options | {"output": str(tmp_path / "straight")}
    train(TrainConfig(**straight))
    kills = sorted(random.Random(0).sample(range(1, steps - 3), 10))
    file = tmp_path / "killed.json"
    file.write_text(json.dumps([{"options": options, "kills": kills}]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "tests.training.worker", str(file)], env=environment, check=True
    )
    _same_weights(options["output"], straight["output"])
    for line, expected in zip(_lines(options["output"]), _lines(straight["output"]), strict=True):
        assert line["step"] == expected["step"]
        for name in ("loss", "kept", "grad_norm", "lr", "temperature"):
            assert line.get(name) == expected.get(name), (line["step"], name)
    assert not list(Path(options["output"]).rglob(".*")), "the killed left files"


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_run_resumes_the_same_at_any_step(
    options: dict[str, Any], stop: int, tmp_path: Path
) -> None:
    """Also where the backbone's frozen epochs end, after step 4."""
    options |= {"epochs": 3, "freeze_epochs": 1, "checkpoint_steps": 2, "lr": 50.0, "workers": 0}
    train(TrainConfig(**options | {"output": str(tmp_path / "straight")}))

    with stopped_after(stop), pytest.raises(Stopped):
        train(TrainConfig(**options))
    train(TrainConfig(**options), resume=True)
    _same_weights(options["output"], tmp_path / "straight")
    rates = [line["lr"] for line in _lines(options["output"]) if line["kind"] == "train"]
    assert [rate["backbone"] > 0 for rate in rates] == [False] * 4 + [True] * 8
    assert rates[5]["backbone"] == pytest.approx(0.01 * rates[5]["scorers"])


def test_an_epoch_is_not_lost_with_its_validation(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in it, twice."""
    straight = options | {"output": str(tmp_path / "straight")}
    train(TrainConfig(**straight))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_model", lambda *_: 1 / 0)
        for resume in (False, True):
            with pytest.raises(ZeroDivisionError):
                train(TrainConfig(**options), resume)
    trained = _lines(options["output"])
    assert [line["kind"] for line in trained] == ["train"] * 4
    train(TrainConfig(**options), resume=True)
    lines = _lines(options["output"])
    assert lines[:4] == trained, "with their times: they were not trained again"
    train(TrainConfig(**options), resume=True)  # complete: it is validated again, and told once
    again = _lines(options["output"])
    assert [line["kind"] for line in again] == (["train"] * 4 + ["validation"]) * 2
    assert [line["top1"] for line in again[4::5]] == [
        line["top1"] for line in _lines(straight["output"])[4::5]
    ]
    _same_weights(options["output"], straight["output"])


def test_bad_steps_are_left_out_and_too_many_end_the_run(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options |= {"max_skipped": 3, "checkpoint_steps": 1}
    with not_finite_at([1, 2, 4], rank=0):
        train(TrainConfig(**options))
    assert "not being finite: 3" in capsys.readouterr().out
    lines = [line for line in _lines(options["output"]) if line["kind"] == "train"]
    assert [line["skipped"] for line in lines] == [0, 1, 2, 2, 3, 3, 3, 3]
    assert [line["loss"] is None for line in lines] == [c in (1, 2, 4) for c in range(8)]
    assert [line["grad_norm"] is None for line in lines] == [c in (1, 2, 4) for c in range(8)]

    options["output"] += "_2"
    path = Path(options["output"]) / "bad_batch_0.safetensors"
    message = rf"3 steps in a row .* up to step 6; the batch whose loss was not is in {path};"
    with not_finite_at([1, 3, 4, 5, 6], rank=0), pytest.raises(ValueError, match=message):
        train(TrainConfig(**options))
    batch = load_file(path)
    assert batch["images"].shape == (4, 3, 32, 32)
    assert batch["targets"].shape == (4, 2)
    assert batch["step"].item() == 6
    weights = _last(options["output"])["student"].values()
    assert all(value.isfinite().all() for value in weights)


def test_bad_steps_of_the_warm_start_are_left_out_too(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options |= {"epochs": 0, "warm_start": 4, "max_skipped": 2}
    scorers = []
    for bad in ([], [1, 3], [0, 1, 2, 3]):
        run = options | {"output": f"{options['output']}_{len(bad)}"}
        if len(bad) == 4:  # with nothing learnt it would be the model that a run starts from
            message = r"2 steps in a row .* up to step 2 of the warm start; the batch .* is in"
            with not_finite_at(bad, 0, WarmStartTask), pytest.raises(ValueError, match=message):
                train(TrainConfig(**run))
            batch = load_file(Path(run["output"]) / "bad_batch_0.safetensors")
            assert (batch["images"].shape, batch["step"].item()) == ((4, 3, 32, 32), 2)
            continue
        with not_finite_at(bad, 0, WarmStartTask):
            train(TrainConfig(**run))
        lines = [line for line in _lines(run["output"]) if line["kind"] == "warm_start"]
        assert [line["loss"] is None for line in lines] == [call in bad for call in range(4)]
        assert lines[-1]["skipped"] == len(bad)
        told = "not being finite: 2" in capsys.readouterr().out
        assert told == bool(bad)
        weights = load_file(Path(run["output"]) / BEST / "model.safetensors")
        assert all(value.isfinite().all() for value in weights.values())
        scorers.append(weights["scorers.0.embed.weight"])
    assert not torch.equal(*scorers)


def test_the_bad_batch_is_saved_not_the_last(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options |= {"max_skipped": 2, "accumulate": 4, "batch_size": 2}
    seen: list[torch.Tensor] = []
    forward = SparseTask.forward

    def noted(task: SparseTask, images: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(images.clone())
        return forward(task, images, *args, **kwargs)

    monkeypatch.setattr(SparseTask, "forward", noted)
    path = Path(options["output"]) / "bad_batch_0.safetensors"
    with not_finite_at([1, 5, 6], rank=0), pytest.raises(ValueError, match="2 steps in a row"):
        train(TrainConfig(**options))
    assert len(seen) == 8
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in seen)
    assert torch.equal(load_file(path)["images"], seen[5])


def test_where_gradients_alone_are_bad_no_batch_is_blamed(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "clip_gradients", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(ValueError, match="up to step 1; a lower lr"):
        train(TrainConfig(**options, max_skipped=1))
    assert not list(Path(options["output"]).glob("bad_batch*"))


def test_a_skipped_step_changes_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad first step leaves weights, average and optimizer as they were, on resume too."""
    options |= {"checkpoint_steps": 1, "epochs": 1}
    with not_finite_at([0], rank=0), stopped_after(1), pytest.raises(Stopped):
        train(TrainConfig(**options))
    state = _last(options["output"])
    assert state["optimizer"] is None
    assert state["place"]["skipped"] == 1
    dense = load_model(options["model"]).state_dict()
    for part in ("student", "ema"):
        for name, value in dense.items():
            assert torch.equal(state[part][f"backbone.{name}"], value)
    train(TrainConfig(**options), resume=True)
    assert [line["skipped"] for line in _lines(options["output"])[:4]] == [1] * 4


def test_temperature_falls_to_its_last_value(options: dict[str, Any]) -> None:
    train(TrainConfig(**options, temperature=0.25))
    seen = [line["temperature"] for line in _lines(options["output"]) if line["kind"] == "train"]
    assert seen == pytest.approx([0.25 ** (step / 8) for step in range(1, 9)])
    train(TrainConfig(**options | {"output": options["output"] + "_2"}))
    norms = [
        [line["grad_norm"] for line in _lines(output) if line["kind"] == "train"]
        for output in (options["output"], options["output"] + "_2")
    ]
    assert norms[0][0] == norms[1][0], "both start at 1"
    assert norms[0][-1] != pytest.approx(norms[1][-1], rel=1e-5)


def test_recomputed_activations_give_the_same_weights(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    checkpoint_block = backbone.checkpoint_block

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return checkpoint_block(*args, **kwargs)

    monkeypatch.setattr(backbone, "checkpoint_block", counted)
    options |= {"epochs": 1, "drop_path": 0.5}
    train(TrainConfig(**options))
    assert not calls
    train(
        TrainConfig(**options | {"output": options["output"] + "_2"}, checkpoint_activations=True)
    )
    assert len(calls) == 4 * 4, (
        "in each step, each of the student's blocks, and none of the teacher"
    )
    ours, theirs = (_last(options["output"] + end)["student"] for end in ("_2", ""))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-4)


def test_a_compiled_step_makes_the_same_run_and_resumes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced and divided as for inductor, whose code would take a CPU half a minute to generate.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    save_folder(tiny_vit(num_classes=2, depth=1), options["model"])
    options |= {"epochs": 1, "checkpoint_steps": 2, "blocks": [0], "ratios": [0.5]}
    train(TrainConfig(**options))
    compiled = options | {"output": str(tmp_path / "compiled"), "compile": True}
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    train(TrainConfig(**compiled))
    assert frames["ok"] > before
    again = compiled | {"output": str(tmp_path / "again")}
    shutil.copytree(compiled["output"], again["output"])
    find_checkpoints(Path(again["output"]))[-1].unlink()  # as if it was stopped after step 2
    train(TrainConfig(**again), resume=True)
    _same_weights(again["output"], compiled["output"])
    runs = [
        [line for line in _lines(run["output"]) if line["kind"] == "train"]
        for run in (options, compiled, again)
    ]
    for expected, *others in zip(*runs, strict=True):
        for ours in others:
            for name in ("loss", "grad_norm"):
                assert ours[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("squeeze", [False, True])
def test_gradients_of_kept_tokens_alone_make_the_same_run(
    options: dict[str, Any], squeeze: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Counted(KeptGradients):
        def __init__(self, *arguments: Any) -> None:
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr("dynamicvit.training.kept_gradients.KeptGradients", Counted)
    options |= {"epochs": 1, "freeze_epochs": 0, "squeeze": squeeze}
    train(TrainConfig(**options, kept_gradients=False))
    assert not made
    assert dynamicvit.load(Path(options["output"]) / BEST).squeeze == squeeze
    monkeypatch.setattr(student, "KEPT_GRADIENTS_WIDTH", 32)
    train(TrainConfig(**options | {"output": options["output"] + "_2"}))  # the default on a CPU
    assert len(made) == 4 * 4, "in each step before the first stage, and at each of three"
    runs = [
        [line for line in _lines(options["output"] + end) if line["kind"] == "train"]
        for end in ("", "_2")
    ]
    for plain, kept in zip(*runs, strict=True):
        for name in ("loss", "grad_norm"):
            assert kept[name] == pytest.approx(plain[name], rel=1e-3)


def test_counts_are_aligned_on_request(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def sparsify(*arguments: Any, align: int | None, **options: Any) -> Any:
        asked.append(align)
        return dynamicvit.sparsify(*arguments, **options)

    monkeypatch.setattr(student, "sparsify", sparsify)
    train(TrainConfig(**options | {"epochs": 1}, align=16))
    assert asked == [16]


def test_waiting_for_images_is_told(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(TrainConfig(**options | {"epochs": 1}))
    shares = [line["data_wait"] for line in _lines(options["output"]) if line["kind"] == "train"]
    assert all(0 < share < 1 for share in shares)

    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)

    def batches() -> Iterator[int]:
        nonlocal now
        while True:
            now += 3.0
            yield 0

    clock, source = progress.Clock(), batches()
    for _ in range(2):
        steps = clock.waiting(source)
        for _ in range(2):  # accumulated
            next(steps)
            now += 1.0
    assert clock.read(batch=8) == {"images_per_second": 1.0, "data_wait": 0.75}
    now += 5.0
    assert clock.read(batch=8) == {"images_per_second": 0.0, "data_wait": 0.0}


def test_a_run_may_go_on_with_another_global_batch(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options |= {"checkpoint_steps": 3}
    with stopped_after(3), pytest.raises(Stopped):
        train(TrainConfig(**options))
    train(TrainConfig(**options | {"batch_size": 6}), resume=True)
    assert "the global batch was 4 images, now it is 6" in capsys.readouterr().out
    lines = [line for line in _lines(options["output"]) if line["kind"] == "train"]
    # After 12 of 16 images of the first epoch no batch of 6 is left.
    assert [(line["epoch"], line["step"]) for line in lines] == [
        *((0, step) for step in (1, 2, 3)),
        *((1, step) for step in (3, 4)),
    ]


@shard_files
def test_a_run_on_shards_resumes_the_same(
    options: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    """With a loader process; in a later epoch, whose order is another one."""
    _write_shards(images, tmp_path / "shards")
    options |= {"data": "wds/tiny", "data_dir": str(tmp_path / "shards"), "workers": 1}
    options |= {"checkpoint_steps": 2}
    straight = options | {"output": str(tmp_path / "straight")}
    train(TrainConfig(**straight))
    with stopped_after(6), pytest.raises(Stopped):
        train(TrainConfig(**options))
    train(TrainConfig(**options), resume=True)
    _same_weights(options["output"], straight["output"])
    losses = [line["loss"] for line in _lines(options["output"]) if line["kind"] == "train"]
    assert len(set(losses)) == 8


def test_resume_of_a_finished_run_evaluates_it(options: dict[str, Any]) -> None:
    first = train(TrainConfig(**options))
    again = train(TrainConfig(**options), resume=True)
    assert (first.top1, first.loss) == (again.top1, again.loss)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _foreign(path: Path) -> None:
    torch.save({"model": {}}, path)


def _payload(path: Path) -> None:
    torch.save({"format": os.system}, path)


DAMAGES = [
    (_truncate, r"epoch-0002-image-0000000000\.pt is damaged or not a checkpoint"),
    (_flip_a_bit, r"epoch-0002-image-0000000000\.pt is damaged: the checksum of .* is wrong"),
    (_foreign, r"\.pt is not a dynamicvit training checkpoint 3"),
    (_payload, r"\.pt is damaged or not a checkpoint"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    options: dict[str, Any],
    damage: Any,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    first = train(TrainConfig(**options))
    before, last = find_checkpoints(Path(options["output"]))
    shutil.copytree(options["output"], tmp_path / "whole")
    damage(last)
    again = train(TrainConfig(**options), resume=True)
    warning = capsys.readouterr().err
    assert re.search(f"warning: .*{message}.*going on from {before}", warning), warning
    assert (first.top1, first.loss) == (again.top1, again.loss)
    _same_weights(options["output"], tmp_path / "whole")
    names = sorted(path.name for path in before.parent.iterdir())
    assert names == [before.name, last.name, f"{last.name}.damaged"], "none left for a damaged one"


def test_without_a_whole_checkpoint_there_is_nothing_to_go_on_from(
    options: dict[str, Any],
) -> None:
    train(TrainConfig(**options))
    for path in find_checkpoints(Path(options["output"])):
        _truncate(path)
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole: .*0002.*; .*0001.*"):
        train(TrainConfig(**options), resume=True)


def test_a_checkpoint_of_another_model_is_refused(options: dict[str, Any]) -> None:
    train(TrainConfig(**options | {"epochs": 1}))
    [path] = find_checkpoints(Path(options["output"]))
    state = torch.load(path, weights_only=True)
    state["student"].pop("backbone.cls_token")
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"does not fit the model: missing backbone\.cls_token"):
        train(TrainConfig(**options), resume=True)


def test_as_many_checkpoints_stay_as_asked_for(options: dict[str, Any]) -> None:
    train(TrainConfig(**options, keep_checkpoints=3, checkpoint_steps=1))
    places = [(state.name) for state in sorted((Path(options["output"]) / CHECKPOINTS).iterdir())]
    assert places == [
        "epoch-0001-image-0000000008.pt",
        "epoch-0001-image-0000000012.pt",
        "epoch-0002-image-0000000000.pt",
    ]


def test_a_checkpoint_from_before_an_option_is_gone_on_with(options: dict[str, Any]) -> None:
    train(TrainConfig(**options | {"epochs": 1}))
    [path] = find_checkpoints(Path(options["output"]))
    state = torch.load(path, weights_only=True)
    del state["place"]["config"]["scorer"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="another config: scorer was 'learned', got 'random'"):
        train(TrainConfig(**options | {"epochs": 1, "scorer": "random"}), resume=True)
    train(TrainConfig(**options | {"epochs": 1}), resume=True)


def test_a_run_is_neither_overwritten_nor_resumed_as_another(options: dict[str, Any]) -> None:
    train(TrainConfig(**options | {"epochs": 1}))
    with pytest.raises(ValueError, match="which holds a run"):
        train(TrainConfig(**options))
    with pytest.raises(ValueError, match=r"another config: keep_ratio was 0\.7, got 0\.5"):
        train(TrainConfig(**options | {"keep_ratio": 0.5}), resume=True)


def test_a_run_goes_on_with_other_images_but_not_with_other_classes(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**options | {"epochs": 1}))
    other = write_images(tmp_path / "other", {"train": 8, "val": 4}, ("day", "night"))
    with pytest.raises(
        ValueError, match=r"of the classes \['bright', 'dark'\], got \['day', 'night'\]"
    ):
        train(TrainConfig(**options | {"data": str(other)}), resume=True)
    more = write_images(tmp_path / "more", {"train": 10, "val": 4})
    train(TrainConfig(**options | {"data": str(more)}), resume=True)
    message = "the training split had 16 images, now it has 20"
    assert f"warning: {message}" in capsys.readouterr().out
    [warning] = [line for line in _lines(options["output"]) if line["kind"] == "warning"]
    assert message in warning["message"]


def test_a_run_stopped_late_in_an_epoch_goes_on_with_fewer_images(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options["checkpoint_steps"] = 1
    with stopped_after(3), pytest.raises(Stopped):
        train(TrainConfig(**options))
    fewer = write_images(tmp_path / "fewer", {"train": 4, "val": 4})
    train(TrainConfig(**options | {"data": str(fewer)}), resume=True)
    steps = [line["epoch"] for line in _lines(options["output"]) if line["kind"] == "train"]
    assert steps == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_ratio": 0}, r"keep_ratio must lie in \(0, 1\], got 0"),
        ({"keep_ratio": 1.5}, "keep_ratio must lie in"),
        ({"blocks": [1, 2]}, "blocks and ratios go together"),
        ({"blocks": [1], "ratios": [0.5, 0.4]}, "must have the same length"),
        ({"epochs": -1}, "epochs must be 0 or more, got -1"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"accumulate": 0}, "accumulate must be 1 or more, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be 1 or more, got 0"),
        ({"max_skipped": 0}, "max_skipped must be 1 or more, got 0"),
        ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
        ({"lr": -1.0}, r"lr must be 0 or more, got -1\.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be 0 or more, got nan"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\), got 1\.0"),
        ({"crop_scale": [0.5]}, r"crop_scale must be two growing numbers above 0, got \[0\.5\]"),
        ({"crop_ratio": [2.0, 1.0]}, "crop_ratio must be two growing numbers"),
        ({"hflip": -0.5}, "hflip must lie in"),
        ({"precision": "fp16"}, "precision must be one of float32, bfloat16, got 'fp16'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(data="", output="", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 64}, "batch_size must not exceed the training split's 16 images, got 64"),
        ({"accumulate": 5}, "the training split's 16 images, got 4 × 5 in a step"),
        ({"batch_size": 3}, "batch_size must be even for Mixup, got 3"),
        (
            {"kept_gradients": True, "compile": True},
            "kept_gradients must be false with compile, got true",
        ),
        ({"model": "resnet18", "pretrained": False}, "ResNet is not supported"),
        ({"model": "no_such_model"}, "model must be a folder, a hub id or a timm name"),
        ({"model": "vit_tiny_patch16"}, "did you mean vit_tiny_patch16_"),
        ({"data": "nowhere"}, "data must be a folder .*got nowhere"),
        (
            {"class_weights": [1.0] * 3, "model": "no_such_model"},  # before a model is looked for
            "class_weights must be one a class, 2, got 3",
        ),
        ({"mean": [0.5]}, r"mean must be one a channel, 3, got \[0\.5\]"),
        (
            {"auto_augment": "strange"},
            "auto_augment is not a policy that timm knows, got 'strange'",
        ),
        ({"model_kwargs": {"depth": 3}}, "model_kwargs are for timm names"),
        ({"blocks": [99], "ratios": [0.5]}, "below the backbone's depth of 4"),
    ],
)
def test_a_run_that_cannot_start_says_why(
    options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, UnsupportedBackbone), match=message):
        train(TrainConfig(**options | changes))
    assert not Path(options["output"]).exists()


def test_a_class_count_that_does_not_match_is_named(options: dict[str, Any]) -> None:
    save_folder(tiny_vit(num_classes=5), options["model"])
    message = (
        r"data must have the 5 classes of the model .*dense, got 2: .*: train a dense model on this"
    )
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**options, dense_epochs=0))


def test_other_classes_are_learnt_by_the_dense_model_first(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one command, which goes on wherever it was stopped, and under another name."""
    save_folder(tiny_vit(num_classes=5), options["model"])
    options |= {"dense_epochs": 3, "epochs": 1}
    output = Path(options["output"])

    def stop(run: Any, status: Any) -> Any:
        if run.total_step:
            raise KeyboardInterrupt
        return validate(run, status)

    validate = loop.validate
    monkeypatch.setattr(loop, "validate", stop)
    for resume in (False, True):  # in the dense run, then in it again
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**options), resume)
    with pytest.raises(ValueError, match=r"output must be .* got .*run, which holds a run"):
        train(TrainConfig(**options))
    monkeypatch.undo()
    # Every option comes from the run's own config, the model above all.
    assert cli.main(["train", "--output", str(output), "--resume"]) == 0
    assert [line["kind"] for line in _lines(str(output / "dense"))].count("validation") == 3
    assert {line["step"] for line in _lines(str(output))} == {1, 2, 3, 4}
    dense, sparse = load_model(output / "dense" / BEST), dynamicvit.load(output / BEST)
    assert not isinstance(dense, SparseViT)
    assert isinstance(sparse, SparseViT)
    assert dense.num_classes == sparse.num_classes == 2
    written = yaml.safe_load((output / CONFIG).read_text())
    assert written["model"] == options["model"], "so that the whole can be run again"
    of_dense = yaml.safe_load((output / "dense" / CONFIG).read_text())
    assert (of_dense["lr"], of_dense["epochs"]) == (options["lr"], 3)
    moved = output.rename(output.with_name("moved"))
    (moved / "dense" / METRICS).unlink()  # it would not be found again
    train(TrainConfig(**options | {"output": str(moved), "epochs": 2}), resume=True)
    assert not (moved / "dense" / METRICS).exists()


@pytest.mark.parametrize("warm_start", [0, 3])
def test_no_epochs_give_a_baseline_without_training(
    options: dict[str, Any], warm_start: int
) -> None:
    evaluation = train(TrainConfig(**options | {"epochs": 0}, warm_start=warm_start))
    lines = _lines(options["output"])
    assert [line["kind"] for line in lines] == ["warm_start"] * warm_start + ["validation"]
    assert (lines[-1]["top1"], lines[-1]["step"]) == (evaluation.top1, 0)
    sparse = dynamicvit.load(Path(options["output"]) / BEST)
    dense = load_model(options["model"])
    assert isinstance(sparse, SparseViT)
    for name, value in dense.state_dict().items():
        assert torch.equal(sparse.backbone.state_dict()[name], value), name


def test_an_early_look_changes_nothing_else(options: dict[str, Any], tmp_path: Path) -> None:
    runs = [options | {"output": str(tmp_path / f"every {steps}")} for steps in (0, 3)]
    for run, steps in zip(runs, (0, 3), strict=True):
        train(TrainConfig(**run, validate_steps=steps))
    looks = [
        [(line["step"], line["epoch"]) for line in _lines(run["output"]) if "top1" in line]
        for run in runs
    ]
    assert looks == [[(4, 1), (8, 2)], [(3, 0), (4, 1), (6, 1), (8, 2)]]
    losses = [
        [line["loss"] for line in _lines(run["output"]) if line["kind"] == "train"] for run in runs
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("given", "images", "batch", "expected"),
    [
        ({}, 1_281_167, 1024, (1e-3, 5, 5, False)),
        ({"epochs": 15, "keep_ratio": None}, 100_000, 256, (1e-3, 2, 2, False)),
        ({}, 5000, 128, (8e-3, 5, 5, True)),
        ({"keep_ratio": None, "epochs": 5}, 5000, 64, (1.6e-3, 0, 0, True)),
        ({"lr": 0.5, "start_at_ratio": False, "freeze_epochs": 1}, 50, 8, (0.5, 1, 5, False)),
    ],
)
def test_what_is_left_open_follows_from_the_size_of_the_data(
    given: dict[str, Any], images: int, batch: int, expected: tuple[object, ...]
) -> None:
    config = complete(TrainConfig(data="", output="", **given), images, batch)
    found = config.lr, config.freeze_epochs, config.warmup_epochs, config.start_at_ratio
    assert found == (pytest.approx(expected[0]), *expected[1:])


def test_a_resumed_run_keeps_what_was_filled_in(options: dict[str, Any]) -> None:
    options |= {"lr": None, "start_at_ratio": None, "freeze_epochs": None, "warmup_epochs": None}
    train(TrainConfig(**options))
    output = Path(options["output"])
    first = yaml.safe_load((output / CONFIG).read_text())
    assert (first["lr"], first["freeze_epochs"]) == (pytest.approx(1e-3 * 1024 / 4), 0)
    assert first["start_at_ratio"] is True
    train(TrainConfig(**options | {"epochs": 6, "batch_size": 8}), resume=True)
    again = yaml.safe_load((output / CONFIG).read_text())
    assert again == first | {"epochs": 6, "batch_size": 8}


def test_the_data_is_looked_at_before_weights_are_fetched(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_model", None)  # a call would be another error
    with pytest.raises(ValueError, match=r"data must be a folder .*got nowhere"):
        train(TrainConfig(**options | {"data": "nowhere"}))


def test_a_sparse_model_is_not_made_sparse_again(options: dict[str, Any], tmp_path: Path) -> None:
    sparsify(load_model(options["model"]), 0.7).save_pretrained(tmp_path / "sparse")
    with pytest.raises(ValueError, match="model must be dense to start from"):
        train(TrainConfig(**options | {"model": str(tmp_path / "sparse")}))


def test_own_weights_are_started_from(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def load_model(*arguments: Any, **kwargs: Any) -> Any:
        asked.append((arguments, kwargs))
        return tiny_vit(num_classes=2)

    monkeypatch.setattr(setup, "load_model", load_model)
    weights = str(tmp_path / "mine.pt")
    config = TrainConfig(**options | {"epochs": 0}, weights=weights)
    train(config)
    assert asked == [((config.model, True), {"weights": weights})]


def test_the_device_is_the_one_asked_for(options: dict[str, Any]) -> None:
    train(TrainConfig(**options | {"epochs": 0}, device="cpu"))
    for device in ("meta", "cuda:99", "toaster"):
        with pytest.raises(ValueError, match=f"device must be one of cpu.* got '{device}'"):
            train(TrainConfig(**options | {"output": options["output"] + "_2"}, device=device))


@pytest.mark.parametrize("keep_ratio", [0.7, None])
def test_classes_are_weighed(options: dict[str, Any], tmp_path: Path, keep_ratio: Any) -> None:
    """Of classes of 2 and 6 images, balanced weights are 2 and 2 / 3."""
    images = write_images(tmp_path / "uneven", {"train": 6, "val": 2})
    for index in range(4):
        (images / "train" / "bright" / f"{index:02}.png").unlink()
    options |= {"data": str(images), "epochs": 1, "keep_ratio": keep_ratio, "mixup": 0, "cutmix": 0}
    losses = []
    for number, given in enumerate((None, "balanced", [2.0, 2 / 3])):
        run = options | {"output": f"{options['output']}_{number}", "class_weights": given}
        train(TrainConfig(**run))
        lines = [line for line in _lines(run["output"]) if line["kind"] == "train"]
        losses.append([line["cross_entropy"] for line in lines])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[2])
    with pytest.raises(ValueError, match="class_weights must be one a class, 2, got 3"):
        train(TrainConfig(**options, class_weights=[1.0, 1.0, 1.0]))


@shard_files
def test_a_stream_does_not_tell_what_is_balanced(
    options: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    _write_shards(images, tmp_path / "shards")
    options |= {"data": "wds/tiny", "data_dir": str(tmp_path / "shards")}
    with pytest.raises(ValueError, match="class_weights must be a list for wds/tiny"):
        train(TrainConfig(**options, class_weights="balanced"))


def test_quiet_training_prints_nothing(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**options | {"epochs": 1, "warm_start": 1}), quiet=True)
    assert capsys.readouterr() == ("", "")


def test_where_there_is_no_terminal_lines_tell_of_the_steps(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**options))
    text = capsys.readouterr().out
    assert " left" not in text, "it was done in no time"
    assert "dense training" not in text
    assert (
        "sparse training (learned, ratios 0.70 0.49 0.34)\nepochs 2, images 16, batch 4\n" in text
    )
    best = f"{options['output']}/best"
    assert f"to evaluate it: dynamicvit evaluate {best} --data {options['data']}" in text
    assert " met: " not in text, "there is nothing to say about the images"
    monkeypatch.setattr(progress.Status, "SECONDS", 0.0)
    monkeypatch.setattr("dynamicvit.evaluation.console._FIRST", -1.0)
    train(TrainConfig(**options | {"output": options["output"] + "_2"}))
    printed = capsys.readouterr()
    assert "validating: 0 of 2 batches" in printed.err
    lines = [line for line in printed.out.splitlines() if " left" in line]
    assert len(lines) == 8
    pattern = r"epoch 1/2  step 3/8  loss \d+\.\d+  kept 0.\d\d 0.\d\d 0.\d\d  0:\d\d:\d\d left"
    assert re.fullmatch(pattern, lines[2])
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("stages", [0, 3, 11])
def test_a_terminal_shows_the_run_in_one_line(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    status = progress.Status(console, 36_000, 0)
    numbers: dict[str, Any] = {"loss": 2.345, "kept": [0.5] * stages} if stages else {"loss": 2.3}
    with status.shown():
        status.step(12_000, "epoch 10/30", numbers)
        status.bar.refresh()
        loader = DataLoader(TensorDataset(torch.zeros(6)), batch_size=2)
        assert len(list(status.validating(loader))) == 3
    shown = re.split(r"[\r\n]", screen.getvalue())
    [line, *_] = [line for line in shown if "12000/36000 steps" in line]
    assert "loss 2.3" in line
    assert ("kept 0.50" in line) == bool(stages)
    assert "…" not in line.replace("0.50 … 0.50", "")
    assert any("3/3 batches" in line or "0/3 batches" in line for line in shown)
