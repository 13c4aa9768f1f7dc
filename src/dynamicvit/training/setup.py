"""Setting up a run: processes, data, models, loaders, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from rich.console import Console
from timm.data import Mixup, resolve_input_data_config
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, IterableDataset

from dynamicvit.core.backbones import UnsupportedBackbone, adapter_of
from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.class_names import warn_of_names
from dynamicvit.evaluation.data import ImageData, open_data
from dynamicvit.evaluation.launch import start_processes
from dynamicvit.evaluation.loader import create_image_loader
from dynamicvit.io.files import check_folder, write_text
from dynamicvit.io.load import check_backbone, load_model
from dynamicvit.training.checkpoints import Checkpoint, find_checkpoints, load_checkpoint
from dynamicvit.training.config import USUAL_BATCH, TrainConfig, complete
from dynamicvit.training.determinism import EpochOrder, Feed, Layout, key_drop_paths
from dynamicvit.training.metrics import METRICS, CollapseWatch, Records, check_trackers
from dynamicvit.training.run import Prepared, Run, Session, Skips, check_same_run
from dynamicvit.training.run_folder import CONFIG, DENSE, check_unlocked, own_config
from dynamicvit.training.student import (
    create_student,
    create_task,
    parameter_groups,
)


def open_session(config: TrainConfig, quiet: bool = False) -> Session:
    """Start the processes and open the data.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with the config or the data.
    """
    check_folder("output", config.output)
    trackers = check_trackers(config.trackers)
    # Gradients of tokens that are dropped fade into denormals, which x86 computes many times
    # slower.
    torch.set_flush_denormal(True)
    accelerator = start_processes(
        config.precision, config.device, log_with=trackers or None, project_dir=config.output
    )
    set_seed(config.seed)
    # Before any model: a mistake in the data is told before weights are downloaded.
    train_data, val_data = _open_images(config)
    if train_data.class_names is not None:
        _class_weights(config, train_data, len(train_data.class_names))
    console = Console(quiet=quiet or not accelerator.is_main_process)
    for name, images in (("training", train_data), ("validation", val_data)):
        console.print(f"{name} data: {images.describe()}", markup=False, soft_wrap=True)
    return Session(accelerator, console, train_data, val_data)


def _open_images(
    config: TrainConfig, class_names: Sequence[str] | None = None
) -> tuple[ImageData, ImageData]:
    """The images for training and for validation, with classes in the order of `class_names`."""
    shared: dict[str, Any] = {
        "data_dir": config.data_dir,
        "skip_unreadable": config.skip_unreadable,
        "batch_size": config.batch_size or USUAL_BATCH,
    }
    train = open_data(
        config.data, config.train_split, class_names=class_names, training=True, **shared
    )
    return train, open_data(config.data, config.val_split, class_names=train.class_names, **shared)


def _follow_classes(config: TrainConfig, session: Session, dense: Any) -> None:
    """Take the data's classes in the model's order, if they are the same."""
    names, known = session.train_data.class_names, dense.pretrained_cfg.get("label_names")
    if names and known and names != list(known) and sorted(names) == sorted(known):
        session.train_data, session.val_data = _open_images(config, known)


def load_dense(config: TrainConfig) -> Any:
    """The dense model that a config starts from.

    Raises:
        ValueError, FileNotFoundError: if there is none, or it is not one to start from.
    """
    if config.sparse:
        check_backbone(config.model)
    kwargs = config.model_kwargs
    if config.weights is not None:
        kwargs = kwargs | {"weights": config.weights}
    dense = load_model(config.model, config.pretrained, **kwargs)
    if isinstance(dense, SparseViT):
        raise ValueError(f"model must be dense to start from, got the sparse model {config.model}")
    if config.sparse:
        try:
            adapter_of(dense)
        except UnsupportedBackbone as error:
            raise UnsupportedBackbone(f"model {config.model!r}: {error}") from error
    return dense


def has_begun(output: Path) -> bool:
    """Whether a folder holds a run."""
    return (output / METRICS).exists() or bool(find_checkpoints(output))


def check_new_run(output: Path) -> None:
    """Raise ValueError if a folder holds a run, or the dense training that comes before one."""
    if has_begun(output) or has_begun(output / DENSE):
        check_unlocked(output)
        raise ValueError(
            f"output must be a folder without a run, or --resume given to go on with it, "
            f"got {output}, which holds a run"
        )


def prepare(config: TrainConfig, session: Session, dense: Any, resume: bool) -> Prepared:
    """Make models and loaders, and start the run's records.

    Args:
        config: of the run.
        session: what `open_session` gave.
        dense: the model to start from. It becomes the student or, in sparse training, the teacher.
        resume: go on from the last checkpoint in the run's folder, if there is one.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with the config, model or checkpoint.
    """
    _follow_classes(config, session, dense)
    accelerator, data, output = session.accelerator, session.train_data, Path(config.output)
    for images_of in (data, session.val_data):
        images_of.set_channels(dense.in_chans)
    layout = Layout(
        cast(int, config.batch_size),
        accelerator.num_processes,
        config.accumulate,
        accelerator.process_index,
    )
    images = len(cast(Any, data.dataset))
    config = complete(config, images, layout.total, own_config(output) if resume else None)
    student, teacher = create_student(config, dense, data.class_names)
    warn_of_names(data.class_names, student, config.model, session.console)
    feed, val_loader = _create_loaders(config, session, student, layout)
    mixup = _create_mixup(config, student)
    class_weights = _class_weights(config, data, cast(Any, student).num_classes)
    drop_paths = key_drop_paths(student)
    if config.checkpoint_activations:
        cast(Any, student).set_grad_checkpointing()
    student.to(accelerator.device)
    checkpoint = _find_checkpoint(config, session) if resume else None
    records = Records(config, accelerator, session.console, checkpoint and checkpoint[1])
    phase = "dense training"
    if isinstance(student, SparseViT):
        kept = " ".join(f"{ratio:.2f}" for ratio in student.schedule.ratios)
        phase = f"sparse training ({config.scorer}, ratios {kept})"
    session.console.print(
        f"{phase}\nepochs {config.epochs}, images {feed.images}, batch {layout.total}",
        highlight=False,
    )
    if accelerator.is_main_process:
        write_text(output / CONFIG, config.to_yaml())
    return Prepared(
        config=config,
        session=session,
        student=student,
        teacher=teacher,
        feed=feed,
        val_loader=val_loader,
        mixup=mixup,
        class_weights=None if class_weights is None else class_weights.to(accelerator.device),
        drop_paths=drop_paths,
        records=records,
        skips=Skips.of(config, layout.rank),
        checkpoint=checkpoint,
    )


def _find_checkpoint(config: TrainConfig, session: Session) -> Checkpoint | None:
    """The last whole checkpoint of the run, which must be one of this config and data."""
    output = Path(config.output)
    found = load_checkpoint(output)
    if found is not None:
        check_same_run(found[0], config, session.train_data.class_names, found[1])
    elif (output / METRICS).exists() and (output / METRICS).stat().st_size:
        session.console.print(
            f"{output} has no checkpoint yet: the run starts from the beginning", soft_wrap=True
        )
    return found


def start(ready: Prepared) -> Run:
    """Add what learns: the average, the task over all processes, the optimizer; and restore.

    A warm start comes before: the average begins with what it taught.
    """
    config, student, layout = ready.config, ready.student, ready.layout
    ema = ModelEmaV3(student, decay=config.ema, use_warmup=True) if config.ema else None
    task, whole = create_task(config, ready.accelerator, student, ready.teacher, ema)
    scale = layout.total / 1024
    # fused: one kernel for all parameters, on the CPU too
    optimizer = AdamW(parameter_groups(student, config, cast(float, config.lr) * scale), fused=True)
    steps = ready.feed.images // layout.total
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=max(2, config.epochs * steps),  # timm takes no less
        lr_min=config.min_lr * scale,
        warmup_t=min(cast(int, config.warmup_epochs), config.epochs) * steps,
        warmup_lr_init=config.min_lr * scale,
        t_in_epochs=False,
    )
    ratios = student.schedule.step_ratios() if isinstance(student, SparseViT) else ()
    run = Run(
        **vars(ready),
        task=task,
        whole=whole,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        watch=CollapseWatch(ratios),
        steps=steps,
    )
    if ready.checkpoint is not None:
        run.restore(*ready.checkpoint)
        run.checkpoint = ready.checkpoint = None  # its tensors are not needed twice
    return run


def _create_loaders(
    config: TrainConfig, session: Session, student: nn.Module, layout: Layout
) -> tuple[Feed, DataLoader]:
    """The training images as steps take them, and a loader of the validation images."""
    data = session.train_data
    shared: dict[str, Any] = {
        "data_config": resolve_input_data_config(student),
        "workers": config.workers,
        "device": session.accelerator.device,
    }
    try:
        loader = create_image_loader(
            data,
            layout.batch,
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
    val_loader = create_image_loader(session.val_data, layout.batch, training=False, **shared)
    images = len(cast(Any, data.dataset))
    length = images if config.epoch_images is None else config.epoch_images
    order = None
    if not isinstance(data.dataset, IterableDataset):
        order = EpochOrder(images, config.seed, length)
        cast(Any, loader.batch_sampler).sampler = order
    elif length < images:
        raise ValueError(f"epoch_images must be null for data read as a stream, got {length}")
    loader, val_loader = session.accelerator.prepare(loader, val_loader)
    return Feed(data, loader, order, layout, config.seed), val_loader


def _create_mixup(config: TrainConfig, student: Any) -> Mixup | None:
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.label_smoothing,
        num_classes=student.num_classes,
    )


def _class_weights(config: TrainConfig, data: ImageData, classes: int) -> Tensor | None:
    """A weight for each class, [classes], if the config asks for them."""
    given = config.class_weights
    if given is None:
        return None
    if given == "balanced":
        counts = data.class_counts()
        if counts is None:
            raise ValueError(
                f"class_weights must be a list for {config.data}, which does not tell the classes "
                "of its images before it is read, got 'balanced'"
            )
        # So that the mean over all images is 1.
        weights = torch.tensor(counts.sum() / (len(counts) * counts.clip(min=1)))
    else:
        weights = torch.tensor(given)
    if len(weights) != classes:
        raise ValueError(f"class_weights must be one a class, {classes}, got {len(weights)}")
    return weights.float()
