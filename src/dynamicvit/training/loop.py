"""The training loop: epochs, steps, validation."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.accuracy import Evaluation, evaluate_model
from dynamicvit.evaluation.data import check_labels, seed_of
from dynamicvit.io.files import name_in_errors
from dynamicvit.io.folder import save_folder
from dynamicvit.training.checkpoints import full_weights
from dynamicvit.training.determinism import Draws
from dynamicvit.training.distributed import clip_gradients, gradients_summed, sigterm_noted
from dynamicvit.training.losses import weigh_targets
from dynamicvit.training.progress import Clock, Status
from dynamicvit.training.run import Run
from dynamicvit.training.run_folder import BEST

Batch = tuple[Tensor, Tensor]  # images [B, C, H, W] and targets, [B] or [B, K]


def fit(run: Run) -> Evaluation:
    """Train until the last epoch, or until patience ends; validate after each epoch.

    Returns:
        The last evaluation.
    """
    config, console = run.config, run.session.console
    evaluation: Evaluation | None = None
    status = Status(console, run.last_step, run.total_step)
    try:
        with status.shown(), sigterm_noted() as stop_asked:
            if run.epoch >= config.epochs or run.at_epoch_end:
                # The checkpoint at an epoch's end was written before its validation.
                evaluation = validate(run, status)
            while run.epoch < config.epochs and not (run.at_epoch_end and run.out_of_patience):
                train_epoch(run, status, stop_asked)
                run.save()  # first: a kill while it validates does not cost the epoch
                evaluation = validate(run, status)
                status.restart()
        if run.epoch < config.epochs:
            console.print(
                f"stopped early after epoch {run.epoch} of {config.epochs}: "
                f"no better top-1 for {config.patience} epochs (patience)",
                highlight=False,
            )
        if left_out := run.skips.total:
            console.print(f"steps left out, their loss or gradient not being finite: {left_out}")
    finally:
        run.records.close()
    return cast(Evaluation, evaluation)


def train_epoch(run: Run, status: Status, stop_asked: Callable[[], bool]) -> None:
    """Train until the epoch's end.

    Each `log_steps` steps a line goes to the records. It tells of the last step; speed, `data_wait`
    (the share of time spent waiting for images) and the watch for collapse are of all steps since
    the line before.
    """
    config = run.config
    batches = run.feed.batches(run.epoch, run.seen)
    run.task.train()
    clock = Clock()
    while run.seen + run.layout.total <= run.feed.images:
        numbers, stop = step(run, clock.waiting(batches), stop_asked())
        status.step(run.total_step, f"epoch {run.epoch + 1}/{config.epochs}", numbers)
        if "kept" in numbers and not run.skips.in_row:  # what was skipped may be no number
            run.watch.add(numbers["kept"])
        inside = run.seen + run.layout.total <= run.feed.images
        if (run.total_step - run.epoch * run.steps) % config.log_steps == 0 or not inside:
            _record(run, numbers, clock)
        if inside and config.validate_steps and run.total_step % config.validate_steps == 0:
            validate(run, status)
            run.task.train()
            clock = Clock()
            status.restart()
        due = config.checkpoint_steps and run.total_step % config.checkpoint_steps == 0
        if stop or (inside and due):  # at the end, fit saves
            run.save()
        if stop:
            _end_on_sigterm(run)
    for _ in batches:  # accelerate takes a loader for unfinished otherwise
        pass
    run.epoch, run.seen = run.epoch + 1, 0


def step(run: Run, batches: Iterator[Batch], stop: bool) -> tuple[dict[str, Any], bool]:
    """One step of the optimizer, on the next global batch.

    Returns:
        Mean losses, shares of tokens kept, and the gradient's norm; and whether to stop.
    """
    layout = run.layout
    set_learning_rates(run)
    means = Means(layout.accumulate, run.skips.last_chance)
    draws: Draws | None = None
    for micro in range(layout.accumulate):
        images, targets = next(batches)
        draws = draws or _draw(run, images)
        images, targets = _augment(run, draws, images, targets)
        options = draws.apply(micro, run.drop_paths)
        if "noise" in options:
            options["temperature"] = run.temperature
        if run.config.keep_ratios is not None:
            options["ratios"] = _ratios(run.config.keep_ratios, draws)
        with gradients_summed(run.accelerator, run.task, now=micro == layout.accumulate - 1):
            with run.accelerator.autocast():
                result = run.task(images, targets, **options)
            (result["loss"] / layout.accumulate).backward()
        means.add(result, (images, targets))
    norm = clip_gradients(run.student, run.config.clip_grad)
    numbers, skip, stop = _agree(run, means.total, norm, stop)
    run.seen += layout.total
    if skip:
        run.optimizer.zero_grad()
        run.skips.add(run.total_step, means.bad)
    else:
        run.skips.in_row = 0
        run.optimizer.step()
        run.optimizer.zero_grad()
        if run.ema is not None:
            run.ema.update(run.student, step=run.total_step)
    return numbers, stop


def set_learning_rates(run: Run) -> None:
    """Set the learning rates of the next step."""
    run.scheduler.step_update(run.total_step)
    if run.epoch < cast(int, run.config.freeze_epochs):
        for group in run.optimizer.param_groups:
            if group["name"] == "backbone":
                group["lr"] = 0.0


class Means:
    """What a task tells of the micro-batches of a step, as means.

    Args:
        count: micro-batches in a step.
        find_bad: look for the first micro-batch whose own loss is not finite. To look is to wait
            for the device, so only where such a step ends the run.
    """

    def __init__(self, count: int, find_bad: bool) -> None:
        self.count, self.find_bad = count, find_bad
        self.total: dict[str, Tensor] = {}
        self.bad: Batch | None = None

    def add(self, result: dict[str, Tensor], batch: Batch) -> None:
        """Add a micro-batch: what the task gave, and what it was given."""
        if self.find_bad and self.bad is None and not result["loss"].isfinite():
            self.bad = batch
        for name, value in result.items():
            if name != "output":
                part = value.detach().float() / self.count
                self.total[name] = self.total[name] + part if name in self.total else part


def validate(run: Run, status: Status) -> Evaluation:
    """Evaluate, and save the best model."""
    model = run.ema.module if run.ema is not None else run.student
    if run.whole is not None:
        run.whole.load_state_dict(full_weights(model))
        model = run.whole
    evaluation = evaluate_model(model, status.validating(run.val_loader), run.accelerator)
    line = {"kind": "validation", "epoch": run.epoch, "step": run.total_step, **asdict(evaluation)}
    run.records.log(line)
    epoch = run.epoch + run.seen / run.feed.images
    run.session.console.print(
        f"epoch {epoch:.4g}: top-1 {evaluation.top1:.2f}%  top-5 {evaluation.top5:.2f}%  "
        f"loss {evaluation.loss:.4f}"
    )
    if evaluation.top1 > run.best:
        run.best, run.best_epoch = evaluation.top1, run.epoch
        if run.accelerator.is_main_process:
            with name_in_errors(run.output / BEST):
                save_folder(model, run.output / BEST, run.feed.data.class_names)
    return evaluation


def _augment(run: Run, draws: Draws, images: Tensor, targets: Tensor) -> Batch:
    """Mixup, class weights, and the memory layout that is fastest."""
    if run.feed.data.class_names is None:  # then their count could not be checked before
        check_labels(targets, cast(Any, run.student).num_classes)
    if run.mixup is not None:
        images, targets = draws.mix(run.mixup, images, targets)
    if run.class_weights is not None:
        targets = weigh_targets(targets, run.class_weights, run.config.label_smoothing)
    # For convolutions, an LV-ViT's stem above all: weights stay as they are, which FSDP2 wants
    # contiguous.
    return images.contiguous(memory_format=torch.channels_last), targets


def _draw(run: Run, images: Tensor) -> Draws:
    """What the step draws for its global batch."""
    stages, tokens = 0, 0
    if isinstance(run.student, SparseViT):
        grid = run.student.adapter.grid(run.student.backbone, images.shape)
        stages, tokens = len(run.student.schedule.blocks), math.prod(grid)
    seed = seed_of(run.config.seed, "step", run.epoch, run.seen)
    return Draws.of_step(run.layout, seed, stages, tokens, len(run.drop_paths), images.device)


def _ratios(keep_ratios: list[float], draws: Draws) -> Tensor:
    """The budget of a step: for each stage, the share of tokens that it keeps, [S].

    A tenth of the steps have the largest ratio, a tenth the least, the others one in between.
    """
    least, most = keep_ratios
    share = min(max((draws.budget - 0.1) / 0.8, 0.0), 1.0)
    ratio = least + (most - least) * share
    stages = draws.keep.shape[1]
    return torch.tensor([ratio**stage for stage in range(1, stages + 1)], device=draws.keep.device)


def _agree(
    run: Run, total: dict[str, Tensor], norm: Tensor, stop: bool
) -> tuple[dict[str, Any], bool, bool]:
    """The means over processes of a step's numbers, whether to skip the step, and whether to stop.

    Processes agree on all of it in one sum, with one wait for the device.
    """
    finite = total["loss"].isfinite() & norm.isfinite()
    flags = torch.stack([~finite, torch.full_like(finite, stop)]).float()
    flat = torch.cat([flags, *(value.flatten() for value in total.values())])
    skip, stopped, *values = run.accelerator.reduce(flat, "mean").tolist()
    numbers: dict[str, Any] = {}
    for name, value in total.items():
        numbers[name] = values[: value.numel()] if value.ndim else values[0]
        del values[: value.numel()]
    numbers["grad_norm"] = float(norm)
    return numbers, skip > 0, stopped > 0


def _record(run: Run, numbers: dict[str, Any], clock: Clock) -> None:
    line = {
        "kind": "train",
        "epoch": run.epoch,
        "step": run.total_step,
        **numbers,
        "lr": {group["name"]: group["lr"] for group in run.optimizer.param_groups},
        "temperature": run.temperature,
        "skipped": run.skips.total,
        **clock.read(run.layout.total),
    }
    run.records.log(line)
    for stage, message in run.watch.check():
        run.records.warn(run.total_step, message, stage=stage)


def _end_on_sigterm(run: Run) -> NoReturn:
    run.accelerator.wait_for_everyone()  # torchrun kills the other ranks once one exits
    run.session.console.print(
        f"stopped by SIGTERM after step {run.total_step}; --resume goes on from there"
    )
    raise SystemExit(128 + signal.SIGTERM)
