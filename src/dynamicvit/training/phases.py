"""What comes before sparse training, where it is asked for: a dense training, a warm start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from torch.optim import AdamW

from dynamicvit.core.backbones import Backbone
from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.data import seed_of
from dynamicvit.io.files import write_text
from dynamicvit.io.load import load_model
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.distributed import clip_gradients
from dynamicvit.training.loop import Batch, Means, fit
from dynamicvit.training.metrics import METRICS
from dynamicvit.training.progress import Status
from dynamicvit.training.run import Prepared, Session
from dynamicvit.training.run_folder import BEST, CONFIG, DENSE, has_best, own_config
from dynamicvit.training.setup import has_begun, prepare, start
from dynamicvit.training.student import has_other_classes
from dynamicvit.training.task import WarmStartTask


def needs_dense_training(config: TrainConfig, dense: Any, class_names: list[str] | None) -> bool:
    """Whether the dense model is to be trained before it becomes sparse."""
    return config.sparse and config.dense_epochs > 0 and has_other_classes(dense, class_names)


def train_dense(config: TrainConfig, session: Session, dense: Any, resume: bool) -> Any:
    """Train the dense model, with a head for the data's classes, unless that is done.

    It is a run of its own, in the folder dense/ of the run.

    Returns:
        The best model of that training.
    """
    output = Path(config.output)
    folder = output / DENSE
    # Where the sparse run has begun, the dense one is complete.
    if not (has_begun(output) and has_best(folder)):
        if session.accelerator.is_main_process:  # --resume finds the options there
            write_text(output / CONFIG, config.to_yaml())
        session.console.print(
            f"{config.model} has {dense.num_classes} classes, the data "
            f"{len(session.train_data.class_names or ())}: first the dense model is trained on it, "
            f"in {folder}",
            soft_wrap=True,
            highlight=False,
        )
        fit(start(prepare(_dense_config(config, folder, resume), session, dense, resume)))
        if session.accelerator.is_main_process:
            (output / METRICS).touch()  # the sparse run has begun
        session.accelerator.wait_for_everyone()
    found = load_model(str(folder / BEST))
    set_seed(config.seed)
    return found


def _dense_config(config: TrainConfig, folder: Path, resume: bool) -> TrainConfig:
    earlier = (own_config(folder) if resume else None) or {}
    return replace(
        config,
        output=str(folder),
        epochs=config.dense_epochs,
        keep_ratio=None,
        blocks=None,
        ratios=None,
        # Earlier versions chose it here, whatever was asked for: such a run goes on with that.
        lr=earlier.get("lr", config.lr),
    )


def warm_start(ready: Prepared) -> None:
    """Fit the scorers to the teacher's attention for `warm_start` steps of the config.

    Their learning rate falls from 1 / width to 0: higher than in the training that follows, because
    targets have no noise and steps are few; the wider a model, the smaller the steps it bears.
    """
    config, accelerator, student = ready.config, ready.accelerator, ready.student
    if not config.warm_start or not isinstance(student, SparseViT):
        return
    task = WarmStartTask(student, cast(Backbone, ready.teacher).to(accelerator.device)).train()
    student.backbone.requires_grad_(False).eval()  # nothing of it learns, nothing of it is dropped
    lr = 1 / student.embed_dim
    optimizer = AdamW(
        student.scorers.parameters(), lr=lr, weight_decay=config.weight_decay, fused=True
    )
    batches = _endless(ready)
    status = Status(ready.session.console, config.warm_start, 0)
    with status.shown():
        for done in range(1, config.warm_start + 1):
            numbers = _warm_start_step(ready, done, task, optimizer, batches)
            optimizer.param_groups[0]["lr"] = lr * (1 - done / config.warm_start)
            status.step(done, "warm start", numbers)
            if done % config.log_steps == 0 or done == config.warm_start:
                skipped = {"skipped": ready.skips.total}
                ready.records.log({"kind": "warm_start", "step": done, **numbers, **skipped})
    student.backbone.requires_grad_(True)
    optimizer.zero_grad()
    ready.skips.in_row = 0


def _warm_start_step(
    ready: Prepared, number: int, task: WarmStartTask, optimizer: AdamW, batches: Iterator[Batch]
) -> dict[str, Any]:
    """One step, counted from 1; returns its mean numbers.

    The scorers are small: their gradients are averaged over processes one by one. With them a loss
    that is not finite in one process makes all of them skip the step.
    """
    config, accelerator = ready.config, ready.accelerator
    means = Means(config.accumulate, ready.skips.last_chance)
    for micro in range(config.accumulate):
        images, targets = next(batches)
        images = images.contiguous(memory_format=torch.channels_last)
        set_seed(seed_of(config.seed, "warm start", number - 1, micro, accelerator.process_index))
        with accelerator.autocast():
            result = task(images, targets)
        (result["loss"] / config.accumulate).backward()
        means.add(result, (images, targets))
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = accelerator.reduce(parameter.grad, "mean")
    numbers = accelerator.reduce(means.total, "mean")
    norm = clip_gradients(task.student.scorers, None)
    if numbers["loss"].isfinite() and norm.isfinite():  # means over processes: they agree
        ready.skips.in_row = 0
        optimizer.step()
    else:
        ready.skips.add(number, means.bad, of=" of the warm start")
    optimizer.zero_grad()
    return {name: value.tolist() for name, value in numbers.items()}


def _endless(ready: Prepared) -> Iterator[Batch]:
    """The warm start's micro-batches: an epoch's, as often as needed."""
    return chain.from_iterable(ready.feed.batches(-1, 0) for _ in count())
