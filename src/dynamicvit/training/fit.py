"""Training: setup → fit → validate.

Beside it: `places` (randomness), `processes` (many of them), `checkpoints`, `records`.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from timm.data import Mixup, resolve_input_data_config
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from dynamicvit.core.backbones import Backbone, adapter_of
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.selectors import SELECTORS
from dynamicvit.evaluation.data import (
    DataError,
    ImageData,
    check_labels,
    create_image_loader,
    open_data,
    seed_of,
)
from dynamicvit.evaluation.evaluate import Evaluation, evaluate_model
from dynamicvit.evaluation.launch import launched_with_fsdp, start_processes
from dynamicvit.evaluation.setup import backbone_of, check_classes
from dynamicvit.io.files import write_text
from dynamicvit.io.folder import save_folder
from dynamicvit.io.load import load_model
from dynamicvit.training.checkpoints import (
    find_checkpoints,
    full_weights,
    load_parts,
    load_place,
    save_checkpoint,
)
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.defaults import complete
from dynamicvit.training.determinism import (
    Draws,
    EpochOrder,
    Feed,
    Layout,
    PlacedDropPath,
    place_drop_paths,
)
from dynamicvit.training.distributed import (
    clip_gradients,
    divide,
    gradients_summed,
    lost_process_named,
    mean_over_processes,
    sigterm_noted,
)
from dynamicvit.training.losses import LossWeights
from dynamicvit.training.metrics import METRICS, CollapseWatch, Records, check_trackers
from dynamicvit.training.task import DenseTask, SparseTask, WarmStartTask

BEST, DENSE, CONFIG, BAD_BATCH = "best", "dense", "config.yaml", "bad_batch"

# What a resumed run may have otherwise than when it was saved.
_FREE = (
    *("data", "data_dir", "output", "epochs", "workers", "batch_size", "accumulate", "shard"),
    *("checkpoint_activations", "checkpoint_steps", "keep_checkpoints", "max_skipped"),
    *("validate_steps", "log_steps", "trackers", "dense_epochs"),
)


@dataclass
class _Skips:
    """Steps that were left out, their loss or gradient not being finite.

    Attributes:
        most: so many in a row end the run.
        path: where the batch that was to blame is saved then.
        total: how many there were.
        in_row: how many since the last one that was not.
    """

    most: int
    path: Path
    total: int = 0
    in_row: int = 0

    @property
    def last_chance(self) -> bool:
        """Whether one more ends the run."""
        return self.in_row + 1 >= self.most

    def add(self, step: int, bad: tuple[Tensor, Tensor] | None, of: str = "") -> None:
        """Count one.

        Args:
            step: which, counted from 1.
            bad: this process's first micro-batch whose own loss was not finite, as the student saw
                it: images [B, C, H, W] and targets [B] or [B, K]. None if there was none, or if the
                run does not end here.
            of: what the step is one of, for the message.

        Raises:
            ValueError: if it is one too many.
        """
        self.total += 1
        self.in_row += 1
        if self.in_row < self.most:
            return
        where = ""
        if bad is not None:
            images, targets = (tensor.contiguous().cpu() for tensor in bad)
            tensors = {"images": images, "targets": targets, "step": torch.tensor(step)}
            save_file(tensors, self.path)
            where = f"; the batch whose loss was not is in {self.path}"
        # A warm start has a learning rate of its own.
        advice = "" if of else "; a lower lr or a clip_grad may help"
        raise ValueError(
            f"{self.most} steps in a row (max_skipped) had a loss or gradient that was not finite, "
            f"up to step {step}{of}{where}{advice}"
        )


@dataclass
class _Run:
    """What a training loop holds; `epoch` and `seen` (images of it) are where it goes on."""

    config: TrainConfig
    accelerator: Accelerator
    student: nn.Module
    teacher: Backbone | None
    task: nn.Module  # as it is called: inside DDP, or sharded
    whole: nn.Module | None  # a copy of a sharded student, to be evaluated and saved
    ema: ModelEmaV3 | None
    optimizer: AdamW
    scheduler: CosineLRScheduler
    feed: Feed
    val_data: ImageData
    val_loader: DataLoader
    mixup: Mixup | None
    drop_paths: list[PlacedDropPath]
    records: Records
    watch: CollapseWatch
    skips: _Skips
    steps: int  # in an epoch
    epoch: int = 0
    seen: int = 0
    best: float = -1.0

    @property
    def layout(self) -> Layout:
        return self.feed.layout

    @property
    def total_step(self) -> int:
        return self.epoch * self.steps + self.seen // self.layout.total

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds beside the place."""
        return {
            "student": self.student,
            "ema": self.ema.module if self.ema is not None else None,
            "optimizer": (self.student, self.optimizer),
        }


def train(config: TrainConfig, resume: bool = False) -> Evaluation:
    """Train a sparse model from a dense one, or a dense model, by `config`.

    Any launcher serves: one process, `accelerate launch`, `torchrun`, `srun`. From then on this
    process flushes denormal numbers to zero, on CPUs that can.

    On SIGTERM a checkpoint is written at the end of the step (of the next one, if it comes during
    validation; the last validation is finished), and the process exits with 143. Steps of a warm
    start, which comes first, are not kept: there it ends at once.

    Args:
        config: what to train, on what, how.
        resume: go on from the last whole checkpoint in `config.output` (from the start, if the run
            was stopped before its first one), with any number of processes. Without it a folder
            that holds a run is refused.

    Returns:
        The evaluation after the last epoch (of the moving average, if there is one).

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with the config, data or checkpoint; or
            that losses were not finite, `config.max_skipped` steps in a row.
        ConnectionError: if another process of the run was lost.
        SystemExit: after SIGTERM.
    """
    with lost_process_named(f"start them again with --resume, to go on from {config.output}"):
        run = _set_up(config, resume)
        try:
            evaluation = _fit(run)
        finally:
            run.records.close()
        console = run.records.console
        if left_out := run.skips.total:
            console.print(f"steps left out, their loss or gradient not being finite: {left_out}")
        for name, images in (("training", run.feed.data), ("validation", run.val_data)):
            for what, met in (
                (f"{name} images", images.describe_met()),
                (f"unreadable {name} images", images.describe_unreadable()),
            ):
                if met is not None:
                    console.print(f"{what} met: {met}", markup=False, soft_wrap=True)
    return evaluation


# Setup.


def _set_up(config: TrainConfig, resume: bool) -> _Run:
    output = Path(config.output)
    if not resume and ((output / METRICS).exists() or find_checkpoints(output)):
        raise ValueError(
            f"output {output} already holds a run: resume it, or choose another folder"
        )
    trackers = check_trackers(config.trackers)
    # Gradients of frozen-out tokens fade into denormals, which x86 computes many times slower.
    torch.set_flush_denormal(True)
    accelerator = start_processes(
        config.precision, log_with=trackers or None, project_dir=str(output)
    )
    set_seed(config.seed)
    # The data first: a mistake in it is told before weights are downloaded.
    open_arguments: dict[str, Any] = {
        "data_dir": config.data_dir,
        "skip_unreadable": config.skip_unreadable,
        "batch_size": config.batch_size,
    }
    train_data = open_data(config.data, config.train_split, training=True, **open_arguments)
    val_data = open_data(
        config.data, config.val_split, class_names=train_data.class_names, **open_arguments
    )
    dense = load_model(config.model, config.pretrained, **config.model_kwargs)
    if isinstance(dense, SparseViT):
        raise ValueError(f"model must be dense to start from, got the sparse model {config.model}")
    if config.sparse:
        adapter_of(dense)
    start = config
    if config.sparse and config.dense_epochs and _other_classes(dense, train_data.class_names):
        start = _train_dense_first(config, resume, accelerator, dense, train_data)
        dense = load_model(start.model)
        set_seed(config.seed)
    for images_of in (train_data, val_data):
        images_of.set_channels(dense.in_chans)
    layout = Layout(
        config.batch_size, accelerator.num_processes, config.accumulate, accelerator.process_index
    )
    images = len(cast(Any, train_data.dataset))
    config = complete(config, images, layout.total, _earlier(output) if resume else None)
    start = replace(start, start_at_ratio=config.start_at_ratio)
    student, teacher = _create_student(start, dense, train_data.class_names)
    train_loader, val_loader = _create_loaders(
        config, student, train_data, val_data, accelerator.device
    )
    length = images if config.epoch_images is None else config.epoch_images
    if length > images:
        raise ValueError(
            f"epoch_images must not exceed the training split's {images} images, got {length}"
        )
    if length < layout.total:
        several = layout.processes * layout.accumulate
        of = "training split's" if config.epoch_images is None else "epoch's"
        raise ValueError(
            f"batch_size must not exceed the {of} {length} images, got "
            f"{config.batch_size}" + (f" × {several} in a step" if several > 1 else "")
        )
    order = None
    if not isinstance(train_data.dataset, torch.utils.data.IterableDataset):
        order = EpochOrder(images, config.seed, length)
        cast(Any, train_loader.batch_sampler).sampler = order
    elif length < images:
        raise ValueError(f"epoch_images must be null for data read as a stream, got {length}")
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
    train_loader, val_loader = accelerator.prepare(train_loader, val_loader)
    feed = Feed(train_data, train_loader, order, layout, config.seed)
    drop_paths = place_drop_paths(student)
    if config.checkpoint_activations:
        cast(Any, student).set_grad_checkpointing()
    student.to(accelerator.device)
    found = load_place(output) if resume else None
    if found is not None:
        _check_same_run(found[0], config, train_data.class_names, found[1])
    records = Records(config, accelerator, found[1] if found else None)
    for name, images_of in (("training", train_data), ("validation", val_data)):
        records.console.print(f"{name} data: {images_of.describe()}", markup=False, soft_wrap=True)
    if accelerator.is_main_process:
        write_text(output / CONFIG, yaml.safe_dump(asdict(config), sort_keys=False))
    skips = _Skips(config.max_skipped, output / f"{BAD_BATCH}_{layout.rank}.safetensors")
    if found is None and config.warm_start and isinstance(student, SparseViT):
        _warm_start(config, student, cast(Backbone, teacher), feed, accelerator, records, skips)
    ema = ModelEmaV3(student, decay=config.ema, use_warmup=True) if config.ema else None
    task, whole = _distribute(config, accelerator, student, teacher, ema)
    # fused: one kernel for all parameters, on the CPU too
    scale = layout.total / 1024
    optimizer = AdamW(parameter_groups(student, config, cast(float, config.lr) * scale), fused=True)
    steps = length // layout.total
    run = _Run(
        config=config,
        accelerator=accelerator,
        student=student,
        teacher=teacher,
        task=task,
        whole=whole,
        ema=ema,
        optimizer=optimizer,
        scheduler=CosineLRScheduler(
            optimizer,
            t_initial=max(2, config.epochs * steps),  # timm takes no less
            lr_min=config.min_lr * scale,
            warmup_t=min(cast(int, config.warmup_epochs), config.epochs) * steps,
            warmup_lr_init=config.min_lr * scale,
            t_in_epochs=False,
        ),
        feed=feed,
        val_data=val_data,
        val_loader=val_loader,
        mixup=mixup,
        drop_paths=drop_paths,
        records=records,
        watch=CollapseWatch(
            student.schedule.step_ratios() if isinstance(student, SparseViT) else ()
        ),
        skips=skips,
        steps=steps,
    )
    if found is not None:
        _restore(run, *found)
    return run


def _other_classes(dense: Any, class_names: list[str] | None) -> bool:
    return class_names is not None and dense.num_classes != len(class_names)


def _train_dense_first(
    config: TrainConfig, resume: bool, accelerator: Accelerator, dense: Any, data: ImageData
) -> TrainConfig:
    """Train the dense model, with a head for the data's classes, unless that is done.

    Returns:
        The config with that model to start from.
    """
    folder = Path(config.output) / DENSE
    if not (Path(config.output) / CONFIG).exists():  # then the sparse run has not begun
        Console(quiet=not accelerator.is_main_process).print(
            f"{config.model} has {dense.num_classes} classes, the data "
            f"{len(data.class_names or ())}: first the dense model is trained on it, in {folder}",
            soft_wrap=True,
        )
        first: dict[str, Any] = {"keep_ratio": None, "blocks": None, "ratios": None, "lr": None}
        train(
            replace(config, output=str(folder), epochs=config.dense_epochs, **first),
            resume=resume,
        )
        accelerator.wait_for_everyone()
    return replace(config, model=str(folder / BEST), model_kwargs={}, pretrained=True)


def _earlier(output: Path) -> dict[str, Any] | None:
    """The config of the run in a folder, as it was filled in."""
    path = output / CONFIG
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None


def _create_student(
    config: TrainConfig, dense: Any, class_names: list[str] | None
) -> tuple[nn.Module, Backbone | None]:
    """The model to train and, in sparse training, its teacher."""
    if not config.sparse and _other_classes(dense, class_names):
        dense.reset_classifier(len(class_names or ()))
    try:
        check_classes(class_names, dense, f"the model {config.model}")
    except DataError as error:
        advice = "train a dense model on this data first (keep_ratio null, or dense_epochs)"
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
        if config.drop_path:
            _set_drop_path(dense, config.drop_path)
        return dense, None
    if not config.pretrained and timm.is_model(config.model):
        Console(stderr=True).print("warning: pretrained is false, so the teacher is untrained")
    schedule = None
    if config.blocks is not None and config.ratios is not None:
        schedule = KeepSchedule(tuple(config.blocks), tuple(config.ratios))
    keep_ratio = None if schedule else config.keep_ratio
    sparse = sparsify(
        dense, keep_ratio, schedule=schedule, align=config.align, scorer=config.scorer
    )
    if config.drop_path:
        _set_drop_path(sparse.backbone, config.drop_path)
    if config.start_at_ratio and SELECTORS[config.scorer].learns:
        for scorer, ratio in zip(sparse.scorers, sparse.schedule.step_ratios(), strict=True):
            cast(Any, scorer).set_keep_prior(ratio)
    return sparse, cast(Backbone, dense)


def _set_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth rising linearly over the blocks, as timm builds it."""
    blocks = cast(Any, getattr(model, "blocks", ()))
    if not blocks:
        raise ValueError(
            f"drop_path must be 0 for a {type(model).__name__}, which has no blocks, got {rate}"
        )
    rates = np.linspace(0.0, rate, len(blocks))
    for block, block_rate in zip(blocks, rates, strict=True):
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


def _distribute(
    config: TrainConfig,
    accelerator: Accelerator,
    student: nn.Module,
    teacher: Backbone | None,
    ema: ModelEmaV3 | None,
) -> tuple[nn.Module, nn.Module | None]:
    """The task as a step calls it, and if the student is sharded a whole copy of it."""
    task: nn.Module
    if teacher is None:
        task = DenseTask(student, config.label_smoothing)
    else:
        weights = LossWeights(
            cross_entropy=config.cross_entropy_weight,
            ratio=config.ratio_weight,
            logit_kl=config.logit_kl_weight,
            token=config.token_weight,
        )
        mean = mean_over_processes if accelerator.num_processes > 1 else None
        kept_gradients = config.kept_gradients
        if kept_gradients is None:
            kept_gradients = accelerator.device.type == "cpu"
        task = SparseTask(
            cast(SparseViT, student),
            teacher,
            weights,
            config.label_smoothing,
            mean,
            kept_gradients and not config.compile,
        )
    task.to(accelerator.device)
    if config.compile:
        task.compile()
    if not (config.shard or launched_with_fsdp()) or accelerator.num_processes == 1:
        return accelerator.prepare_model(task), None
    if teacher is not None and SELECTORS[config.scorer].reads_blocks:
        raise ValueError(
            "shard must be false (and FSDP not asked for) with a scorer that reads weights of "
            f"blocks, got {config.scorer}"
        )
    whole = copy.deepcopy(student)
    models = [student] if teacher is None else [student, teacher]
    divide(task, [block for model in models for block in getattr(backbone_of(model), "blocks", ())])
    if ema is not None:
        divide(ema.module, [])  # never called: only its weights lie as the student's do
        ema.foreach = False  # its buffers are whole, and cannot be updated in one with its weights
    return task, whole


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


def _warm_start(
    config: TrainConfig,
    student: SparseViT,
    teacher: Backbone,
    feed: Feed,
    accelerator: Accelerator,
    records: Records,
    skips: _Skips,
) -> None:
    """Fit the scorers to the teacher's attention for `config.warm_start` steps.

    Their learning rate falls from 1 / width to 0: higher than in the training that follows, since
    targets have no noise and steps are few; the wider a model, the smaller the steps it bears.
    The scorers are small: their gradients are averaged over processes one by one. With them a loss
    that is not finite in one process makes all of them leave the step out.
    """
    task = WarmStartTask(student, teacher.to(accelerator.device)).train()
    student.backbone.requires_grad_(False).eval()  # nothing of it learns, nothing of it is dropped
    learnt = list(student.scorers.parameters())
    lr = 1 / student.embed_dim
    optimizer = AdamW(learnt, lr=lr, weight_decay=config.weight_decay, fused=True)
    done = micro = 0
    total: dict[str, Tensor] = {}
    bad: tuple[Tensor, Tensor] | None = None
    while done < config.warm_start:
        for images, targets in feed.batches(-1, 0):
            images = images.contiguous(memory_format=torch.channels_last)
            set_seed(seed_of(config.seed, "warm start", done, micro, accelerator.process_index))
            with accelerator.autocast():
                result = task(images, targets)
            (result["loss"] / config.accumulate).backward()
            if skips.last_chance and bad is None and not result["loss"].isfinite():
                bad = images, targets
            for name, value in _vector(result).items():
                total[name] = total.get(name, 0.0) + value / config.accumulate
            micro += 1
            if micro < config.accumulate:
                continue
            for parameter in learnt:
                parameter.grad = mean_over_processes(cast(Tensor, parameter.grad))
            numbers = {name: mean_over_processes(value) for name, value in total.items()}
            done, micro = done + 1, 0
            norm = clip_gradients(student.scorers, None)
            if numbers["loss"].isfinite() and norm.isfinite():  # means over processes: they agree
                skips.in_row = 0
                optimizer.step()
            else:
                skips.add(done, bad, of=" of the warm start")
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = lr * (1 - done / config.warm_start)
            total, bad = {}, None
            if done % config.log_steps == 0 or done == config.warm_start:
                line = {k: v.tolist() for k, v in numbers.items()}
                skipped = {"skipped": skips.total}
                records.log({"kind": "warm_start", "step": done, **line, **skipped})
            if done == config.warm_start:
                break
    student.backbone.requires_grad_(True)
    optimizer.zero_grad()
    skips.in_row = 0


def _fit(run: _Run) -> Evaluation:
    config = run.config
    evaluation: Evaluation | None = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    console = run.records.console
    show = run.accelerator.is_main_process and console.is_terminal
    with (
        Progress(*columns, console=console, disable=not show) as progress,
        sigterm_noted() as stop_asked,
    ):
        if run.epoch >= config.epochs or (run.epoch and not run.seen):
            evaluation = _validate(run)  # the checkpoint at an epoch's end was written before
        bar = progress.add_task("train", total=config.epochs * run.steps, status="")
        while run.epoch < config.epochs:
            progress.update(bar, description=f"epoch {run.epoch + 1}/{config.epochs}")
            for line in _epoch(run, stop_asked):
                progress.update(bar, completed=run.total_step, status=_status(line))
            _save(run)  # first: a kill while it validates does not cost the epoch
            evaluation = _validate(run)
    return cast(Evaluation, evaluation)


def _epoch(run: _Run, stop_asked: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Train until the epoch's end; yields a line of numbers every `log_steps` steps.

    The line tells of its last step; speed, `data_wait` (the share of time spent waiting for
    images) and the watch for collapse are of all steps since the line before.
    """
    config = run.config
    batches = run.feed.batches(run.epoch, run.seen)
    run.task.train()
    clock = _Clock()
    inside = run.seen + run.layout.total <= run.feed.images
    while inside:
        numbers, stop = _step(run, clock.waiting(batches), stop_asked())
        if "kept" in numbers and not run.skips.in_row:  # what was left out may be no number
            run.watch.add(numbers["kept"])
        inside = run.seen + run.layout.total <= run.feed.images
        if (run.total_step - run.epoch * run.steps) % config.log_steps == 0 or not inside:
            line = {
                "kind": "train",
                "epoch": run.epoch,
                "step": run.total_step,
                **numbers,
                "lr": {group["name"]: group["lr"] for group in run.optimizer.param_groups},
                "temperature": _temperature(run),
                "skipped": run.skips.total,
                **clock.read(run.layout.total),
            }
            run.records.log(line)
            for stage, message in run.watch.check():
                run.records.warn(run.total_step, message, stage=stage)
            yield line
        if inside and config.validate_steps and run.total_step % config.validate_steps == 0:
            _validate(run)
            run.task.train()
            clock = _Clock()
        due = config.checkpoint_steps and run.total_step % config.checkpoint_steps == 0
        if stop or (inside and due):  # at the end, _fit saves
            _save(run)
        if stop:
            run.accelerator.wait_for_everyone()  # the first to go would have the others ended
            run.records.console.print(
                f"stopped by SIGTERM after step {run.total_step}; --resume goes on from there"
            )
            raise SystemExit(128 + signal.SIGTERM)
    for _ in batches:  # accelerate takes a loader for unfinished otherwise
        pass
    run.epoch, run.seen = run.epoch + 1, 0


def _step(
    run: _Run, batches: Iterator[tuple[Tensor, Tensor]], stop: bool
) -> tuple[dict[str, Any], bool]:
    """One step of the optimizer, on the next global batch.

    Processes agree on three things in one sum: the mean losses, whether all that was computed is
    finite, and whether one of them was told to stop.

    Returns:
        Mean losses, shares of tokens kept, and the gradient's norm; and whether to stop.
    """
    config, layout = run.config, run.layout
    _apply_learning_rates(run)
    draws: Draws | None = None
    total: dict[str, Tensor] = {}
    # To look for the bad micro-batch is to wait for the device: only where one ends the run.
    last_chance = run.skips.last_chance
    bad: tuple[Tensor, Tensor] | None = None
    for micro in range(layout.accumulate):
        images, targets = next(batches)
        if run.feed.data.class_names is None:  # then their count could not be checked before
            check_labels(targets, cast(Any, run.student).num_classes)
        draws = draws or _draw(run, images)
        if run.mixup is not None:
            images, targets = draws.mix(run.mixup, images, targets)
        # For convolutions, an LV-ViT's stem above all: weights stay as they are, which FSDP2 wants
        # contiguous.
        images = images.contiguous(memory_format=torch.channels_last)
        options = draws.apply(micro, run.drop_paths)
        if "noise" in options:
            options["temperature"] = _temperature(run)
        with gradients_summed(run.task, now=micro == layout.accumulate - 1):
            with run.accelerator.autocast():
                result = run.task(images, targets, **options)
            (result["loss"] / layout.accumulate).backward()
        if last_chance and bad is None and not result["loss"].isfinite():
            bad = images, targets
        for name, value in _vector(result).items():
            total[name] = total.get(name, 0.0) + value / layout.accumulate
    norm = clip_gradients(run.student, config.clip_grad)
    finite = total["loss"].isfinite() & norm.isfinite()
    flags = torch.stack([~finite, torch.full_like(finite, stop)]).float()
    # One sum over processes, and one wait for the device.
    sums = mean_over_processes(torch.cat([flags, *(value.flatten() for value in total.values())]))
    skip, stopped, *values = sums.tolist()
    numbers: dict[str, Any] = {}
    for name, value in total.items():
        numbers[name] = values[: value.numel()] if value.ndim else values[0]
        del values[: value.numel()]
    numbers["grad_norm"] = float(norm)
    run.seen += layout.total
    if skip:
        run.optimizer.zero_grad()
        run.skips.add(run.total_step, bad)
    else:
        run.skips.in_row = 0
        run.optimizer.step()
        run.optimizer.zero_grad()
        if run.ema is not None:
            run.ema.update(run.student, step=run.total_step)
    return numbers, stopped > 0


def _draw(run: _Run, images: Tensor) -> Draws:
    """What the step draws for its global batch."""
    stages, tokens = 0, 0
    if isinstance(run.student, SparseViT):
        height, width = images.shape[-2:]
        grid = run.student.backbone.patch_embed.dynamic_feat_size((height, width))
        stages, tokens = len(run.student.schedule.blocks), math.prod(grid)
    seed = seed_of(run.config.seed, "step", run.epoch, run.seen)
    return Draws.of_step(run.layout, seed, stages, tokens, len(run.drop_paths), images.device)


def _validate(run: _Run) -> Evaluation:
    """Evaluate, and save the best model."""
    model = _evaluated(run)
    evaluation = evaluate_model(model, run.val_loader, run.accelerator)
    line = {"kind": "validation", "epoch": run.epoch, "step": run.total_step, **asdict(evaluation)}
    run.records.log(line)
    epoch = run.epoch + run.seen / run.feed.images
    run.records.console.print(
        f"epoch {epoch:.4g}: top-1 {evaluation.top1:.2f}%  top-5 {evaluation.top5:.2f}%  "
        f"loss {evaluation.loss:.4f}"
    )
    if run.accelerator.is_main_process and evaluation.top1 > run.best:
        save_folder(model, run.output / BEST, run.feed.data.class_names)
    run.best = max(run.best, evaluation.top1)
    return evaluation


def _evaluated(run: _Run) -> nn.Module:
    model = run.ema.module if run.ema is not None else run.student
    if run.whole is None:
        return model
    run.whole.load_state_dict(full_weights(model))
    return run.whole


def _apply_learning_rates(run: _Run) -> None:
    run.scheduler.step_update(run.total_step)
    if run.epoch < cast(int, run.config.freeze_epochs):
        for group in run.optimizer.param_groups:
            if group["name"] == "backbone":
                group["lr"] = 0.0


def _temperature(run: _Run) -> float:
    """From 1 at the start to the config's at the end, exponentially."""
    return float(run.config.temperature ** (run.total_step / (run.config.epochs * run.steps)))


# Records.


class _Clock:
    """How fast steps are, and how much of that is waiting for images, since it was last read."""

    def __init__(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Give the batches of one more step, and note the time that they take to come."""
        self.steps += 1
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                raise DataError("the training images ended before as many as the data tells")
            self.waited += time.perf_counter() - start
            yield batch

    def read(self, batch: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = now - self.start
        speed = {
            "images_per_second": round(self.steps * batch / seconds, 2),
            "data_wait": round(self.waited / seconds, 4),
        }
        self.start, self.waited, self.steps = now, 0.0, 0
        return speed


def _vector(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a task tells in numbers, without gradient."""
    return {k: v.detach().float() for k, v in result.items() if k != "output"}


def _status(line: dict[str, Any]) -> str:
    parts = [f"{k} {v:.3f}" for k, v in line.items() if k in _SHOWN and isinstance(v, float)]
    if "kept" in line:
        parts.append("kept " + " ".join(f"{share:.2f}" for share in line["kept"]))
    parts.append(f"{line['images_per_second']:.0f} images/s")
    return "  ".join(parts)


_SHOWN = ("loss", "cross_entropy", "ratio", "logit_kl", "token")


# To go on.


def _save(run: _Run) -> None:
    place = {
        "config": asdict(run.config),
        "images": len(cast(Any, run.feed.data.dataset)),
        "class_names": run.feed.data.class_names,
        "batch": run.layout.total,
        "epoch": run.epoch,
        "seen": run.seen,
        "step": run.total_step,
        "best": run.best,
        "skipped": run.skips.total,
        "skipped_in_row": run.skips.in_row,
    }
    save_checkpoint(run.output, place, run.saved, run.config.keep_checkpoints)


def _check_same_run(
    path: Path, config: TrainConfig, class_names: list[str] | None, place: dict[str, Any]
) -> None:
    # Options that have come since the checkpoint had their default then.
    saved = asdict(TrainConfig(data="", output="")) | place["config"]
    ours = asdict(config)
    changed = [key for key in ours if key not in _FREE and ours[key] != saved[key]]
    if changed:
        raise ValueError(
            f"{path} belongs to a run with another config: "
            + "; ".join(f"{key} was {saved[key]!r}, got {ours[key]!r}" for key in changed)
        )
    if class_names != place["class_names"]:
        raise ValueError(
            f"{path} belongs to a run on data of the classes {place['class_names']}, "
            f"got {class_names}"
        )


def _restore(run: _Run, path: Path, place: dict[str, Any], state: dict[str, Any]) -> None:
    load_parts(path, state, run.saved)
    run.epoch, run.seen, run.best = place["epoch"], place["seen"], place["best"]
    run.skips.total, run.skips.in_row = place["skipped"], place["skipped_in_row"]
    images = len(cast(Any, run.feed.data.dataset))
    if place["images"] != images:
        run.records.warn(
            run.total_step,
            f"the training split had {place['images']} images, now it has {images}: the "
            f"run goes on after as many images of its epoch, but is another one",
        )
    if place["batch"] != run.layout.total:
        run.records.console.print(
            f"the global batch was {place['batch']} images, now it is {run.layout.total}: the run "
            f"goes on at the same image, with learning rates to match, but is another one",
            soft_wrap=True,
        )
