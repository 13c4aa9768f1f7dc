"""The model that learns: how it is made from the dense one, and how its step is set up."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

from dynamicvit.core.backbones import Backbone
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.selectors import SELECTORS
from dynamicvit.evaluation.class_names import check_classes
from dynamicvit.evaluation.launch import launched_with_fsdp
from dynamicvit.evaluation.setup import backbone_of
from dynamicvit.evaluation.unreadable import DataError
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.distributed import divide
from dynamicvit.training.losses import LossWeights
from dynamicvit.training.options import HardwareOptions
from dynamicvit.training.task import DenseTask, SparseTask

# From this width on, a CPU trains about as fast or faster without the gradients of dropped tokens.
# Narrower models were slower.
KEPT_GRADIENTS_WIDTH = 384


def has_other_classes(dense: Any, class_names: list[str] | None) -> bool:
    """Whether a model's number of classes is not that of the data."""
    return class_names is not None and dense.num_classes != len(class_names)


def create_student(
    config: TrainConfig, dense: Any, class_names: list[str] | None
) -> tuple[nn.Module, Backbone | None]:
    """The model to train and, in sparse training, its teacher.

    Raises:
        ValueError: if the dense model does not fit the data, or an option does not fit the model.
    """
    if not config.sparse and has_other_classes(dense, class_names):
        dense.reset_classifier(len(class_names or ()))
        dense.pretrained_cfg.pop("label_names", None)  # of the head that is gone
    try:
        check_classes(class_names, dense, f"the model {config.model}")
    except DataError as error:
        advice = "train a dense model on this data first (keep_ratio null, or dense_epochs)"
        raise DataError(f"{error}: {advice}") from error
    _set_preprocessing(config, dense)
    if not config.sparse:
        if config.drop_path:
            _set_drop_path(dense, config.drop_path)
        return dense, None
    schedule = None
    if config.blocks is not None and config.ratios is not None:
        schedule = KeepSchedule(tuple(config.blocks), tuple(config.ratios))
    keep_ratio = None if schedule else config.keep_ratio
    sparse = sparsify(
        dense,
        keep_ratio,
        schedule=schedule,
        align=config.align,
        scorer=config.scorer,
        squeeze=config.squeeze,
    )
    if config.drop_path:
        _set_drop_path(sparse.backbone, config.drop_path)
    if config.start_at_ratio and SELECTORS[config.scorer].learns:
        for scorer, ratio in zip(sparse.scorers, sparse.schedule.step_ratios(), strict=True):
            cast(Any, scorer).set_keep_prior(ratio)
    return sparse, cast(Backbone, dense)


def uses_kept_gradients(options: HardwareOptions, student: SparseViT, device: torch.device) -> bool:
    """Whether gradients of dropped tokens are left out: as asked for, or where that is faster."""
    if options.kept_gradients is not None:
        return options.kept_gradients
    otherwise = options.compile or options.checkpoint_activations
    wide = student.embed_dim >= KEPT_GRADIENTS_WIDTH
    return device.type == "cpu" and wide and not otherwise


def create_task(
    config: TrainConfig,
    accelerator: Accelerator,
    student: nn.Module,
    teacher: Backbone | None,
    ema: ModelEmaV3 | None,
) -> tuple[nn.Module, nn.Module | None]:
    """The task as a step calls it, and if the student is sharded a whole copy of the student.

    Raises:
        ValueError: if the student cannot be sharded as asked for.
    """
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
        several = accelerator.num_processes > 1
        mean = partial(accelerator.reduce, reduction="mean") if several else None
        gather = cast(Any, accelerator.gather) if several else None
        sparse = cast(SparseViT, student)
        task = SparseTask(
            sparse,
            teacher,
            weights,
            config.label_smoothing,
            mean,
            kept_gradients=uses_kept_gradients(config, sparse, accelerator.device),
            gather=gather,
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
        divide(ema.module, [])  # never called: only its weights are divided as the student's are
        ema.foreach = False  # its buffers are whole, and cannot be updated in one with its weights
    return task, whole


def parameter_groups(model: nn.Module, config: TrainConfig, lr: float) -> list[dict[str, Any]]:
    """AdamW groups at two speeds, each with and without weight decay.

    Args:
        model: a SparseViT, whose backbone learns at `config.backbone_lr` times `lr`, or a dense
            model, all of which learns at `lr`.
        config: of the run.
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


def _set_preprocessing(config: TrainConfig, dense: Any) -> None:
    for name in ("mean", "std"):
        value = getattr(config, name)
        if value is not None:
            if len(value) != dense.in_chans:
                raise ValueError(f"{name} must be one a channel, {dense.in_chans}, got {value}")
            dense.pretrained_cfg[name] = tuple(value)
    if config.crop_pct is not None:
        dense.pretrained_cfg["crop_pct"] = config.crop_pct


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
