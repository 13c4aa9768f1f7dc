"""A run in memory: its parts, where it is, and how it is saved and restored."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import save_file
from timm.data import Mixup
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from dynamicvit.core.backbones import Backbone
from dynamicvit.evaluation.data import ImageData
from dynamicvit.io.files import name_in_errors
from dynamicvit.training.checkpoints import Checkpoint, load_parts, save_checkpoint
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.determinism import Feed, KeyedDropPath, Layout
from dynamicvit.training.distributed import on_first_process
from dynamicvit.training.metrics import CollapseWatch, Records
from dynamicvit.training.run_folder import BAD_BATCH, BEST, has_best

# What a resumed run may have otherwise than when it was saved.
_FREE = (
    *("data", "data_dir", "output", "epochs", "workers", "batch_size", "accumulate", "shard"),
    *("checkpoint_activations", "checkpoint_steps", "keep_checkpoints", "max_skipped"),
    *("validate_steps", "log_steps", "trackers", "dense_epochs", "patience", "device"),
)


@dataclass
class Session:
    """What all phases of a training share.

    Attributes:
        accelerator: of this process.
        console: quiet in all processes but the first.
        train_data, val_data: the images.
    """

    accelerator: Accelerator
    console: Console
    train_data: ImageData
    val_data: ImageData


@dataclass
class Skips:
    """Steps that were skipped because their loss or gradient was not finite.

    Attributes:
        most: so many in a row end the run.
        path: where the bad batch is saved then.
        total: how many there were.
        in_row: how many since the last one that was not skipped.
    """

    most: int
    path: Path
    total: int = 0
    in_row: int = 0

    @classmethod
    def of(cls, config: TrainConfig, rank: int) -> Skips:
        """With the limit and folder of a config, for one process."""
        return cls(config.max_skipped, Path(config.output) / f"{BAD_BATCH}_{rank}.safetensors")

    @property
    def last_chance(self) -> bool:
        """Whether one more ends the run."""
        return self.in_row + 1 >= self.most

    def add(self, step: int, bad: tuple[Tensor, Tensor] | None, of: str = "") -> None:
        """Count one.

        Args:
            step: its number, counted from 1.
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
            with name_in_errors(self.path):
                save_file(tensors, self.path)
            where = f"; the batch whose loss was not is in {self.path}"
        # A warm start has a learning rate of its own.
        advice = "" if of else "; a lower lr or a clip_grad may help"
        raise ValueError(
            f"{self.most} steps in a row (max_skipped) had a loss or gradient that was not finite, "
            f"up to step {step}{of}{where}{advice}"
        )


@dataclass(kw_only=True)
class Prepared:
    """A run before its first step: what a warm start uses too.

    Attributes:
        config: complete.
        session: processes and data.
        student: the model that learns.
        teacher: of sparse training.
        feed: the training images.
        val_loader: the validation images.
        mixup: of images and labels; None for none.
        class_weights: [classes], of the classification loss; None for none.
        drop_paths: the student's stochastic depth.
        records: what the run tells.
        skips: steps that were not finite.
        checkpoint: what `load_checkpoint` gave; None if the run starts.
    """

    config: TrainConfig
    session: Session
    student: nn.Module
    teacher: Backbone | None
    feed: Feed
    val_loader: DataLoader
    mixup: Mixup | None
    class_weights: Tensor | None
    drop_paths: list[KeyedDropPath]
    records: Records
    skips: Skips
    checkpoint: Checkpoint | None

    @property
    def accelerator(self) -> Accelerator:
        return self.session.accelerator

    @property
    def layout(self) -> Layout:
        return self.feed.layout

    @property
    def output(self) -> Path:
        return Path(self.config.output)


@dataclass(kw_only=True)
class Run(Prepared):
    """What the training loop uses. `epoch` and `seen` (images of it) say where the run is."""

    task: nn.Module  # as a step calls it: inside DDP, or sharded
    whole: nn.Module | None  # a copy of a sharded student, to be evaluated and saved
    ema: ModelEmaV3 | None
    optimizer: AdamW
    scheduler: CosineLRScheduler
    watch: CollapseWatch
    steps: int  # in an epoch
    epoch: int = 0
    seen: int = 0
    best: float = -1.0
    best_epoch: int = 0

    @property
    def total_step(self) -> int:
        """Steps since the start."""
        return self.epoch * self.steps + self.seen // self.layout.total

    @property
    def last_step(self) -> int:
        return self.config.epochs * self.steps

    @property
    def at_epoch_end(self) -> bool:
        """Whether the run is between two epochs, or after the last one."""
        return self.epoch > 0 and self.seen == 0

    @property
    def out_of_patience(self) -> bool:
        """Whether top-1 did not improve for `patience` epochs."""
        patience = self.config.patience
        return patience is not None and self.epoch - self.best_epoch >= patience

    @property
    def temperature(self) -> float:
        """Temperature of the keep decisions: it changes exponentially from 1 to the config's."""
        return float(self.config.temperature ** (self.total_step / self.last_step))

    @property
    def _parts(self) -> dict[str, Any]:
        """What a checkpoint holds beside the progress."""
        return {
            "student": self.student,
            "ema": self.ema.module if self.ema is not None else None,
            "optimizer": (self.student, self.optimizer),
        }

    def save(self) -> None:
        """Write a checkpoint."""
        progress = {
            "config": asdict(self.config),
            "images": len(cast(Any, self.feed.data.dataset)),
            "class_names": self.feed.data.class_names,
            "batch": self.layout.total,
            "epoch": self.epoch,
            "seen": self.seen,
            "step": self.total_step,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "skipped": self.skips.total,
            "skipped_in_row": self.skips.in_row,
        }
        save_checkpoint(self.output, progress, self._parts, self.config.keep_checkpoints)

    def restore(self, path: Path, progress: dict[str, Any], state: dict[str, Any]) -> None:
        """Take over a checkpoint, as `load_checkpoint` gives it, and tell where the run goes on."""
        load_parts(path, state, self._parts)
        self.epoch, self.seen, self.best = progress["epoch"], progress["seen"], progress["best"]
        # Older checkpoints do not have it: patience counts from here.
        self.best_epoch = progress.get("best_epoch", self.epoch)
        self.skips.total, self.skips.in_row = progress["skipped"], progress["skipped_in_row"]
        self._tell_where(path)
        if self.best >= 0 and not on_first_process(lambda: has_best(self.output)):
            self.records.console.print(
                f"{self.output / BEST} is missing; the next validation writes it again",
                soft_wrap=True,
            )
            self.best = -1.0
        self._tell_changes(progress)

    def _tell_where(self, path: Path) -> None:
        done = f"epoch {self.epoch} of {self.config.epochs}"
        if self.epoch >= self.config.epochs:
            text = (
                f"the run is complete, {done}: nothing is trained; the last weights are validated. "
                "Train longer with more epochs"
            )
        else:
            after = f"image {self.seen:,} of epoch {self.epoch + 1}" if self.seen else done
            text = f"going on after {after}, step {self.total_step:,} of {self.last_step:,}"
        self.records.console.print(f"resumed from {path}: {text}", highlight=False, soft_wrap=True)

    def _tell_changes(self, progress: dict[str, Any]) -> None:
        images = len(cast(Any, self.feed.data.dataset))
        if progress["images"] != images:
            self.records.warn(
                self.total_step,
                f"the training split had {progress['images']} images, now it has {images}: the "
                "run goes on after as many images of its epoch, but is another one",
            )
        if progress["batch"] != self.layout.total:
            self.records.console.print(
                f"the global batch was {progress['batch']} images, now it is {self.layout.total}: "
                "the run goes on at the same image, with learning rates to match, but is another "
                "one",
                soft_wrap=True,
            )


def check_same_run(
    path: Path, config: TrainConfig, class_names: list[str] | None, progress: dict[str, Any]
) -> None:
    """Raise ValueError unless a checkpoint at `path` is of the run with this config and classes."""
    ours = asdict(config)
    # Options that have come since the checkpoint had their default then.
    known = {name: value for name, value in progress["config"].items() if name in ours}
    saved = asdict(TrainConfig(**known))
    changed = [key for key in ours if key not in _FREE and ours[key] != saved[key]]
    if changed:
        raise ValueError(
            f"{path} belongs to a run with another config: "
            + "; ".join(f"{key} was {saved[key]!r}, got {ours[key]!r}" for key in changed)
        )
    if class_names != progress["class_names"]:
        raise ValueError(
            f"{path} belongs to a run on data of the classes {progress['class_names']}, "
            f"got {class_names}"
        )
