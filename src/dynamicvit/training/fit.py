"""Training: setup → fit → validate, with checkpoints that resume."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import yaml
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import Mixup, resolve_input_data_config
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from dynamicvit.checkpoint import load_model, load_strictly
from dynamicvit.core.backbone import Backbone, check_backbone
from dynamicvit.core.folder import save_folder
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.files import read_checkpoint, write_checkpoint, write_text
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.data import (
    DataError,
    ImageData,
    check_labels,
    create_image_loader,
    open_data,
    seed_of,
)
from dynamicvit.training.evaluate import (
    Evaluation,
    backbone_of,
    check_classes,
    evaluate_model,
)
from dynamicvit.training.losses import LossWeights
from dynamicvit.training.task import DenseTask, SparseTask, WarmStartTask

LAST, BEST, METRICS, CONFIG = "last.pt", "best", "metrics.jsonl", "config.yaml"


@dataclass
class _Run:
    """What a training loop holds; `epoch` and `step` (in the epoch) are where it goes on."""

    config: TrainConfig
    accelerator: Accelerator
    student: nn.Module
    teacher: Backbone | None
    task: nn.Module
    ema: ModelEmaV3 | None
    optimizer: Any
    scheduler: CosineLRScheduler
    train_loader: DataLoader
    val_loader: DataLoader
    mixup: Mixup | None
    class_names: list[str] | None
    train_data: ImageData
    epoch: int = 0
    step: int = 0
    best: float = -1.0
    console: Console = field(default_factory=Console)
    writer: Any = None  # of TensorBoard

    @property
    def total_step(self) -> int:
        return self.epoch * len(self.train_loader) + self.step

    @property
    def output(self) -> Path:
        return Path(self.config.output)


def train(config: TrainConfig, resume: bool = False) -> Evaluation:
    """Train a sparse model from a dense one, or a dense model, by `config`.

    From then on this process flushes denormal numbers to zero, on CPUs that can.

    Args:
        config: what to train, on what, how.
        resume: go on from the last checkpoint in `config.output` (from the start, if the run was
            stopped before its first one). Without it a folder that holds a run is refused.

    Returns:
        The evaluation after the last epoch (of the moving average, if there is one).

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with the config, data or checkpoint.
    """
    run = _set_up(config, resume)
    if config.warm_start and run.total_step == 0 and config.sparse:
        _warm_start(run)
    try:
        evaluation = _fit(run)
    finally:
        if run.writer is not None:
            run.writer.close()
    if run.train_data.unreadable is not None:
        run.console.print(f"unreadable training images: {run.train_data.unreadable}")
    return evaluation


# Setup.


def _set_up(config: TrainConfig, resume: bool) -> _Run:
    output = Path(config.output)
    if not resume and ((output / METRICS).exists() or (output / LAST).exists()):
        raise ValueError(
            f"output {output} already holds a run: resume it, or choose another folder"
        )
    writer_class = _tensorboard_writer() if config.tensorboard else None
    set_seed(config.seed)
    # Gradients of frozen-out tokens fade into denormals, which x86 computes many times slower.
    torch.set_flush_denormal(True)
    accelerator = Accelerator(mixed_precision=config.precision)
    open_arguments: dict[str, Any] = {
        "data_dir": config.data_dir,
        "skip_unreadable": config.skip_unreadable,
        "batch_size": config.batch_size,
    }
    dense = load_model(config.model, config.pretrained, **config.model_kwargs)
    if isinstance(dense, SparseViT):
        raise ValueError(f"model must be dense to start from, got the sparse model {config.model}")
    if config.sparse:
        check_backbone(dense)
    open_arguments["in_chans"] = dense.in_chans
    train_data = open_data(config.data, config.train_split, training=True, **open_arguments)
    val_data = open_data(
        config.data, config.val_split, class_names=train_data.class_names, **open_arguments
    )
    student, teacher = _create_student(config, dense, train_data.class_names)
    train_loader, val_loader = _create_loaders(
        config, student, train_data, val_data, accelerator.device
    )
    if len(train_loader) == 0:
        raise ValueError(
            f"batch_size must not exceed the training split's "
            f"{len(cast(Any, train_data.dataset))} images, got {config.batch_size}"
        )
    task = _create_task(config, student, teacher)
    batch = config.batch_size * accelerator.num_processes
    # fused: one kernel for all parameters, on the CPU too
    optimizer = AdamW(parameter_groups(student, config, config.lr * batch / 1024), fused=True)
    if config.compile:
        task.compile()
    student.to(accelerator.device)
    ema = ModelEmaV3(student, decay=config.ema, use_warmup=True) if config.ema else None
    task, optimizer, train_loader, val_loader = accelerator.prepare(
        task, optimizer, train_loader, val_loader
    )
    steps = len(train_loader)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * steps,
        lr_min=config.min_lr * batch / 1024,
        warmup_t=min(config.warmup_epochs, config.epochs) * steps,
        warmup_lr_init=config.min_lr * batch / 1024,
        t_in_epochs=False,
    )
    mixup = None
    if config.mixup or config.cutmix:
        if config.batch_size % 2:
            raise ValueError(f"batch_size must be even for Mixup, got {config.batch_size}")
        mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.label_smoothing,
            num_classes=student.num_classes,
        )
    run = _Run(
        config=config,
        accelerator=accelerator,
        student=student,
        teacher=teacher,
        task=task,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        train_loader=train_loader,
        val_loader=val_loader,
        mixup=mixup,
        class_names=train_data.class_names,
        train_data=train_data,
    )
    if resume and (output / LAST).exists():
        _restore(run)
    if accelerator.is_main_process:
        write_text(output / CONFIG, yaml.safe_dump(asdict(config), sort_keys=False))
        _forget_later_metrics(run)
        if writer_class is not None:
            run.writer = writer_class(str(output))
    return run


def _tensorboard_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ValueError(
            "tensorboard needs the extra: pip install 'dynamicvit[tensorboard]'"
        ) from error
    return SummaryWriter


def _create_student(
    config: TrainConfig, dense: Any, class_names: list[str] | None
) -> tuple[nn.Module, Backbone | None]:
    """The model to train and, in sparse training, its teacher."""
    if not config.sparse and class_names is not None and dense.num_classes != len(class_names):
        dense.reset_classifier(len(class_names))
    try:
        check_classes(class_names, dense, f"the model {config.model}")
    except DataError as error:
        advice = "train a dense model on this data first (keep_ratio null), and start from that"
        raise DataError(f"{error}: {advice}") from error
    for name in ("mean", "std"):
        value = getattr(config, name)
        if value is not None:
            if len(value) != dense.in_chans:
                raise ValueError(f"{name} must be one a channel, {dense.in_chans}, got {value}")
            dense.pretrained_cfg[name] = tuple(value)
    if config.crop_pct is not None:
        dense.pretrained_cfg["crop_pct"] = config.crop_pct
    if not config.sparse:
        return dense, None
    if not config.pretrained and timm.is_model(config.model):
        Console(stderr=True).print("warning: pretrained is false, so the teacher is untrained")
    schedule = None
    if config.blocks is not None and config.ratios is not None:
        schedule = KeepSchedule(tuple(config.blocks), tuple(config.ratios))
    sparse = sparsify(dense, None if schedule else config.keep_ratio, schedule=schedule)
    if config.drop_path:
        _set_drop_path(sparse.backbone, config.drop_path)
    if config.start_at_ratio:
        for scorer, ratio in zip(sparse.scorers, sparse.schedule.step_ratios(), strict=True):
            cast(Any, scorer).set_keep_prior(ratio)
    return sparse, cast(Backbone, dense)


def _set_drop_path(model: Backbone, rate: float) -> None:
    """Stochastic depth rising linearly over the blocks, as timm builds it."""
    rates = np.linspace(0.0, rate, len(model.blocks))
    for block, block_rate in zip(model.blocks, rates, strict=True):
        names = [n for n in ("drop_path", "drop_path1", "drop_path2") if hasattr(block, n)]
        if not names:
            raise ValueError(f"drop_path must be 0 for blocks {type(block).__name__}, got {rate}")
        for name in names:
            setattr(block, name, DropPath(float(block_rate)))


def _create_loaders(
    config: TrainConfig,
    student: nn.Module,
    train_data: ImageData,
    val_data: ImageData,
    device: torch.device,
) -> tuple[DataLoader, DataLoader]:
    shared: dict[str, Any] = {
        "data_config": resolve_input_data_config(backbone_of(student)),
        "workers": config.workers,
        "device": device,
    }
    try:
        train_loader = create_image_loader(
            train_data,
            config.batch_size,
            training=True,
            scale=tuple(config.crop_scale or (1.0, 1.0)),
            ratio=tuple(config.crop_ratio if config.crop_scale else (1.0, 1.0)),
            hflip=config.hflip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            re_mode="pixel",
            **shared,
        )
    except (AssertionError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"auto_augment is not a policy that timm knows, got {config.auto_augment!r}"
        ) from error
    val_loader = create_image_loader(val_data, config.batch_size, training=False, **shared)
    return train_loader, val_loader


def _create_task(config: TrainConfig, student: nn.Module, teacher: Backbone | None) -> nn.Module:
    if teacher is None:
        return DenseTask(student, config.label_smoothing)
    weights = LossWeights(
        cross_entropy=config.cross_entropy_weight,
        ratio=config.ratio_weight,
        logit_kl=config.logit_kl_weight,
        token=config.token_weight,
    )
    return SparseTask(cast(SparseViT, student), teacher, weights, config.label_smoothing)


def parameter_groups(model: nn.Module, config: TrainConfig, lr: float) -> list[dict[str, Any]]:
    """AdamW groups at two speeds, each with and without weight decay.

    Args:
        model: a SparseViT, whose backbone learns at `config.backbone_lr` times `lr`, or a dense
            model, all of which learns at `lr`.
        lr: of the scorers.
    """
    parts: list[tuple[str, nn.Module, float]]
    if isinstance(model, SparseViT):
        parts = [
            ("scorers", model.scorers, 1.0),
            ("backbone", model.backbone, config.backbone_lr),
        ]
    else:
        parts = [("dense", model, 1.0)]
    groups = []
    for name, module, scale in parts:
        spared: set[str] = getattr(module, "no_weight_decay", set)()
        for group in param_groups_weight_decay(
            module, config.weight_decay, no_weight_decay_list=spared
        ):
            # timm's scheduler multiplies by lr_scale, from warm-up to the end.
            groups.append({**group, "lr": lr, "lr_scale": scale, "name": name})
    return groups


# Fit.


def _warm_start(run: _Run) -> None:
    """Fit the scorers to the teacher's attention for `config.warm_start` steps, at constant lr."""
    student, config = cast(SparseViT, run.student), run.config
    task = WarmStartTask(student, cast(Backbone, run.teacher))
    student.backbone.requires_grad_(False)
    optimizer = AdamW(
        student.scorers.parameters(), lr=1e-3, weight_decay=config.weight_decay, fused=True
    )
    task, optimizer = run.accelerator.prepare(task, optimizer)
    done = 0
    set_seed(seed_of(config.seed, "warm start"))
    run.train_data.set_epoch(config.seed, -1)
    while done < config.warm_start:
        for images, targets in run.train_loader:
            result = task(images, targets)
            run.accelerator.backward(result["loss"])
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done % config.log_steps == 0 or done == config.warm_start:
                _log(run, {"kind": "warm_start", "step": done, **_numbers(result)})
            if done == config.warm_start:
                break
    student.backbone.requires_grad_(True)
    if run.ema is not None:
        run.ema.set(student)


def _fit(run: _Run) -> Evaluation:
    config, steps = run.config, len(run.train_loader)
    evaluation: Evaluation | None = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    show = run.accelerator.is_main_process and run.console.is_terminal
    with Progress(*columns, console=run.console, disable=not show) as progress:
        bar = progress.add_task("train", total=config.epochs * steps, status="")
        while run.epoch < config.epochs:
            progress.update(bar, description=f"epoch {run.epoch + 1}/{config.epochs}")
            for line in _epoch(run):
                progress.update(bar, completed=run.total_step, status=_status(line))
            evaluation = _validate(run)
    if evaluation is None:  # the run was complete already
        evaluation = evaluate_model(_evaluated(run), run.val_loader, run.accelerator)
    return evaluation


def _epoch(run: _Run) -> Any:
    """Train until the epoch's end; yields a line of numbers every `log_steps` steps."""
    config, accelerator = run.config, run.accelerator
    # All randomness follows from the seed and a place: data order from the epoch, augmentation from
    # epoch and image (see data.py), sampling noise from the step. So a resumed run needs no
    # generator's state, and is the same run.
    set_seed(seed_of(config.seed, "order", run.epoch))
    run.train_data.set_epoch(config.seed, run.epoch)
    loader = skip_first_batches(run.train_loader, run.step) if run.step else run.train_loader
    run.task.train()
    last_time, last_step = time.perf_counter(), run.step
    for images, targets in loader:
        set_seed(seed_of(config.seed, "noise", run.total_step, accelerator.process_index))
        if run.class_names is None:  # then the count of classes could not be checked before
            check_labels(targets, cast(Any, run.student).num_classes)
        _apply_learning_rates(run)
        if run.mixup is not None:
            images, targets = run.mixup(images, targets)
        result = run.task(images, targets)
        accelerator.backward(result["loss"])
        if config.clip_grad is not None:
            accelerator.clip_grad_norm_(run.student.parameters(), config.clip_grad)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        if run.ema is not None:
            run.ema.update(run.student, step=run.total_step)
        if run.step % config.log_steps == 0 or run.step == len(run.train_loader):
            numbers = _numbers(result)
            now = time.perf_counter()
            images_seen = (run.step - last_step) * len(images) * accelerator.num_processes
            line = {
                "kind": "train",
                "epoch": run.epoch,
                "step": run.total_step,
                **numbers,
                "lr": {group["name"]: group["lr"] for group in run.optimizer.param_groups},
                "images_per_second": round(images_seen / (now - last_time), 2),
            }
            last_time, last_step = now, run.step
            _log(run, line)
            yield line
        inside = run.step < len(run.train_loader)  # at the end, _validate saves
        if inside and config.checkpoint_steps and run.total_step % config.checkpoint_steps == 0:
            _save(run)
    run.epoch, run.step = run.epoch + 1, 0


def _validate(run: _Run) -> Evaluation:
    """Evaluate at the end of an epoch; save the best model and the checkpoint to go on from."""
    model = _evaluated(run)
    evaluation = evaluate_model(model, run.val_loader, run.accelerator)
    line = {"kind": "validation", "epoch": run.epoch, "step": run.total_step, **asdict(evaluation)}
    _log(run, line)
    if run.accelerator.is_main_process:
        run.console.print(
            f"epoch {run.epoch}: top-1 {evaluation.top1:.2f}%  top-5 {evaluation.top5:.2f}%  "
            f"loss {evaluation.loss:.4f}"
        )
        if evaluation.top1 > run.best:
            save_folder(model, run.output / BEST, run.class_names)
    run.best = max(run.best, evaluation.top1)
    _save(run)
    return evaluation


def _evaluated(run: _Run) -> nn.Module:
    return run.ema.module if run.ema is not None else run.student


def _apply_learning_rates(run: _Run) -> None:
    run.scheduler.step_update(run.total_step)
    if run.epoch < run.config.freeze_epochs:
        for group in run.optimizer.param_groups:
            if group["name"] == "backbone":
                group["lr"] = 0.0


# Records.


def _numbers(result: dict[str, Tensor]) -> dict[str, Any]:
    return {k: v.detach().float().tolist() for k, v in result.items() if k != "output"}


def _log(run: _Run, line: dict[str, Any]) -> None:
    if not run.accelerator.is_main_process:
        return
    path = run.output / METRICS
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if run.writer is not None:
        _log_to_tensorboard(run, line)


def _log_to_tensorboard(run: _Run, line: dict[str, Any]) -> None:
    for key, value in line.items():
        if key in ("kind", "step", "epoch"):
            continue
        named = value.items() if isinstance(value, dict) else [("", value)]
        if isinstance(value, list | tuple):
            named = [(str(stage), item) for stage, item in enumerate(value)]
        for suffix, number in named:
            tag = "/".join(part for part in (line["kind"], key, suffix) if part)
            run.writer.add_scalar(tag, number, line["step"])
    run.writer.flush()


def _status(line: dict[str, Any]) -> str:
    parts = [f"{k} {v:.3f}" for k, v in line.items() if k in _SHOWN and isinstance(v, float)]
    if "kept" in line:
        parts.append("kept " + " ".join(f"{share:.2f}" for share in line["kept"]))
    parts.append(f"{line['images_per_second']:.0f} images/s")
    return "  ".join(parts)


_SHOWN = ("loss", "cross_entropy", "ratio", "logit_kl", "token")


def _forget_later_metrics(run: _Run) -> None:
    """Drop lines written after the checkpoint that the run goes on from: they will come again."""
    path = run.output / METRICS
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # cut off by the kill
            continue
        warm = line["kind"] == "warm_start"
        if (run.total_step > 0) if warm else (line["step"] <= run.total_step):
            kept.append(text + "\n")
    write_text(path, "".join(kept))


def _save(run: _Run) -> None:
    """Write everything needed to go on, whole or not at all."""
    if not run.accelerator.is_main_process:
        return
    state = {
        "format": "dynamicvit training checkpoint 1",
        "config": asdict(run.config),
        "epoch": run.epoch,
        "step": run.step,
        "best": run.best,
        "student": run.student.state_dict(),
        "ema": run.ema.module.state_dict() if run.ema is not None else None,
        "optimizer": run.optimizer.state_dict(),
    }
    write_checkpoint(run.output / LAST, state)


def _restore(run: _Run) -> None:
    path = run.output / LAST
    state = read_checkpoint(path, "dynamicvit training checkpoint 1")
    ours, saved = asdict(run.config), state["config"]
    free = (
        "data",
        "data_dir",
        "output",
        "epochs",
        "workers",
        "checkpoint_steps",
        "log_steps",
        "tensorboard",
    )
    changed = [key for key in ours if key not in free and ours[key] != saved.get(key)]
    if changed:
        raise ValueError(
            f"{path} belongs to a run with another config: "
            + "; ".join(f"{key} was {saved.get(key)!r}, got {ours[key]!r}" for key in changed)
        )
    load_strictly(run.student, state["student"], str(path))
    if run.ema is not None:
        load_strictly(run.ema.module, state["ema"], str(path))
    run.optimizer.load_state_dict(state["optimizer"])
    run.epoch, run.step, run.best = state["epoch"], state["step"], state["best"]
