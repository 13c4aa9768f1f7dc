"""The options of a training run, in groups. Each group checks its own part when it is made.

`dynamicvit.training.config.TrainConfig` is all of these groups at once. A function that needs one
group says so in its signature, and takes a TrainConfig.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.selectors import SELECTORS, check_name
from dynamicvit.evaluation.launch import check_precision

# Precision was called so in runs of earlier versions.
OLD_PRECISIONS = {"no": "float32", "bf16": "bfloat16"}


@dataclass(kw_only=True)
class DataOptions:
    """Data.

    Args:
        data: image folder with the sub-folders train and val, or a timm data set name: torch/NAME
            (torchvision), hfds/NAME (Hugging Face), wds/NAME (WebDataset shards).
        data_dir: folder of a named data set.
        train_split: split to train on.
        val_split: split to validate on.
        workers: data loading processes; 0 loads images in the main process.
        skip_unreadable: count images that cannot be read, and go on. In training the next image is
            taken instead; in validation the image is left out. By default such an image ends the
            run.
        mean: normalisation mean of each channel; by default the model's.
        std: normalisation standard deviation of each channel; by default the model's.
        crop_pct: in validation, the share of the image's side that is kept; by default the model's.
    """

    data: str
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    workers: int = 2
    skip_unreadable: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = None

    def __post_init__(self) -> None:
        _check_integers(self, 0, "workers")
        _check_shares(self, "crop_pct")


@dataclass(kw_only=True)
class ModelOptions:
    """Model.

    Args:
        model: the dense model to start from: a timm name, a model folder or a hub id. In sparse
            training it is also the teacher.
        model_kwargs: for a timm name, further arguments of timm.create_model.
        pretrained: for a timm name, start from timm's pretrained weights.
        weights: for a timm name, a file with your own weights (a state dict) to start from.
    """

    model: str = "deit_small_patch16_224"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    weights: str | None = None


@dataclass(kw_only=True)
class PruningOptions:
    """Pruning.

    Args:
        keep_ratio: share of the tokens that each of three stages keeps; null trains the dense model
            itself.
        keep_ratios: the least and the largest keep ratio that the model is trained for: one model
            for every budget between them (`SparseViT.at`). Each step draws one. keep_ratio is then
            what is validated and saved.
        align: round the numbers of kept tokens, prefix tokens included, to multiples of this. Some
            engines are faster then (docs/speed.md).
        blocks: prune before these blocks (counted from 0), with ratios, instead of keep_ratio.
        ratios: for each stage, the share of the original tokens that is kept after it.
        scorer: what decides which tokens stay: learned; or, to compare with, random, static,
            class_attention, class_attention_merging, similarity_merging or pooling. The last three
            make new tokens. They are trained by the two losses on logits only.
        squeeze: merge each token that leaves into the most similar one that stays (arXiv
            2304.10716). Not with a scorer that makes new tokens.
        temperature: temperature of the sampled keep decisions at the end of training. It starts at
            1 and changes exponentially.
        start_at_ratio: start with scorers that keep tokens at the schedule's ratio, instead of half
            of the tokens. Not in the paper. By default on with fewer than 100,000 training images.
        warm_start: number of steps, before training, in which the scorers learn to keep what the
            teacher's class token attends to. Their learning rate falls from 1 / width to 0. Not in
            the paper; it helps short training.
    """

    keep_ratio: float | None = 0.7
    keep_ratios: list[float] | None = None
    align: int | None = None
    blocks: list[int] | None = None
    ratios: list[float] | None = None
    scorer: str = "learned"
    squeeze: bool = False
    temperature: float = 1.0
    start_at_ratio: bool | None = None
    warm_start: int = 0

    def __post_init__(self) -> None:
        if self.blocks is not None or self.ratios is not None:
            if self.blocks is None or self.ratios is None:
                raise ValueError(
                    f"blocks and ratios go together, got {self.blocks} and {self.ratios}"
                )
            KeepSchedule(tuple(self.blocks), tuple(self.ratios))
        elif self.keep_ratio is not None:
            KeepSchedule.from_keep_ratio(self.keep_ratio, depth=12)
        check_name(self.scorer)
        if self.squeeze and SELECTORS[self.scorer].merges:
            raise ValueError(f"squeeze must be false with scorer {self.scorer}, got true")
        _check_numbers(self, "temperature")
        if self.temperature == 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        _check_integers(self, 0, "warm_start")
        self.check_learns("warm_start", self.warm_start)
        if self.keep_ratios is not None:
            self._check_keep_ratios(self.keep_ratios)

    def _check_keep_ratios(self, given: Any) -> None:
        growing = isinstance(given, list) and len(given) == 2 and all(map(_is_number, given))
        if not growing or not 0 < given[0] < given[1] <= 1:
            raise ValueError(f"keep_ratios must be two growing numbers in (0, 1], got {given!r}")
        if not self.sparse or not SELECTORS[self.scorer].learns:
            raise ValueError(
                f"keep_ratios needs sparse training of a scorer that learns, got scorer "
                f"{self.scorer} and keep_ratio {self.keep_ratio}"
            )

    def check_learns(self, name: str, value: int | None) -> None:
        """Raise ValueError if an option is set that is about what the scorers learn, and they do
        not learn."""
        if self.sparse and value and not SELECTORS[self.scorer].learns:
            raise ValueError(
                f"{name} must be 0 with scorer {self.scorer}, which has nothing to learn, "
                f"got {value}"
            )

    @property
    def sparse(self) -> bool:
        """Whether a sparse model is trained, and not a dense one."""
        return self.keep_ratio is not None or self.blocks is not None


@dataclass(kw_only=True)
class AugmentationOptions:
    """Augmentation.

    Args:
        crop_scale: random resized crop: range of the area that is taken; null takes the centred
            square.
        crop_ratio: random resized crop: range of the aspect ratio.
        hflip: probability of a horizontal flip.
        color_jitter: strength of colour jitter; used where auto_augment is null.
        auto_augment: timm's augmentation policy; null for none.
        random_erasing: probability that a rectangle is erased.
        mixup: Mixup alpha; 0 for none.
        cutmix: CutMix alpha; 0 for none.
        label_smoothing: share of the target that is spread over all classes.
    """

    crop_scale: list[float] | None = field(default_factory=lambda: [0.08, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            value = getattr(self, name)
            if value is not None and not (len(value) == 2 and 0 < value[0] <= value[1]):
                raise ValueError(f"{name} must be two growing numbers above 0, got {value}")
        _check_shares(self, "hflip", "random_erasing", "label_smoothing")
        _check_numbers(self, "color_jitter", "mixup", "cutmix")


@dataclass(kw_only=True)
class OptimizationOptions:
    """Optimization.

    Args:
        epochs: passes over the training split. With 0 nothing is trained (except by dense_epochs
            and warm_start); the model is evaluated and written.
        dense_epochs: where the data has other classes than the model, sparse training starts with
            this many epochs of dense training with a new head, in output/dense. The best model of
            these becomes sparse, and is the teacher. 0 refuses such data.
        epoch_images: images in an epoch, other ones each time; null for the whole split.
        patience: stop after this many epochs without a better top-1; null never stops early.
        batch_size: images that each process computes at once; by default 128, or as many as the
            training split fills.
        accumulate: such batches in a step. The global batch, batch_size × processes × accumulate,
            defines a run: divided over another number of processes it is the same run. With another
            accumulate it is nearly the same: the token loss is the mean over the kept tokens of
            each micro-batch (of all processes), and the mean of these means is not the mean over
            all tokens, because images keep different numbers of them.
        lr: learning rate of the scorers (dense training: of everything; also of the dense training
            that dense_epochs puts first), for a global batch of 1024; scaled in proportion. By
            default the paper's 1e-3. With fewer than 100,000 training images the default is what
            gives 1e-3 (dense training: 1e-4) at the batch that is used.
        backbone_lr: learning rate of the backbone, as a multiple of that of the scorers, from
            warm-up to the end. Dense training ignores it.
        freeze_epochs: epochs in which only the scorers learn; by default a sixth of all, or none
            if the scorer has nothing to learn. Dense training ignores it.
        warmup_epochs: epochs in which learning rates rise from min_lr; by default a sixth of all.
        min_lr: learning rate at the start and at the end, for a global batch of 1024.
        weight_decay: AdamW's; none on biases, norms, position embeddings and prefix tokens.
        clip_grad: largest norm of the gradient; null for no limit.
        drop_path: stochastic depth of the model that learns, sparse or dense.
        ema: decay of the moving average of the weights. The average is what is validated and saved
            as best; null for none. The decay rises to this value over the first steps.
    """

    epochs: int = 30
    dense_epochs: int = 30
    epoch_images: int | None = None
    patience: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    lr: float | None = None
    backbone_lr: float = 0.01
    freeze_epochs: int | None = None
    warmup_epochs: int | None = None
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    clip_grad: float | None = None
    drop_path: float = 0.0
    ema: float | None = 0.9999

    def __post_init__(self) -> None:
        _check_integers(self, 0, "epochs", "dense_epochs", "freeze_epochs", "warmup_epochs")
        _check_integers(self, 1, "epoch_images", "patience", "batch_size", "accumulate")
        _check_numbers(self, "lr", "backbone_lr", "min_lr", "weight_decay", "clip_grad")
        for name in ("drop_path", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")


@dataclass(kw_only=True)
class LossOptions:
    """Losses.

    Args:
        cross_entropy_weight: weight of the classification loss.
        ratio_weight: weight of the keep-ratio loss (the paper's DeiT-B uses 5).
        logit_kl_weight: weight of the KL divergence from the teacher's logits.
        token_weight: weight of the distance to the teacher's kept tokens.
        class_weights: weights of the classes in the classification loss: balanced (each class
            counts the same, however few images it has), or one number for each class, in the order
            of the classes; null weighs all images the same.
    """

    cross_entropy_weight: float = 1.0
    ratio_weight: float = 2.0
    logit_kl_weight: float = 0.5
    token_weight: float = 0.5
    class_weights: list[float] | str | None = None

    def __post_init__(self) -> None:
        names = ("cross_entropy_weight", "ratio_weight", "logit_kl_weight", "token_weight")
        _check_numbers(self, *names)
        given = self.class_weights
        if isinstance(given, list):
            right = bool(given) and all(_is_number(item) and item >= 0 for item in given)
            right = right and sum(given) > 0
        else:
            right = given in (None, "balanced")
        if not right:
            raise ValueError(
                f"class_weights must be balanced or a list of numbers 0 or more, got {given!r}"
            )


@dataclass(kw_only=True)
class HardwareOptions:
    """Hardware.

    Args:
        device: cpu, cuda, cuda:1, mps, …; by default what accelerate finds.
        precision: float32, or bfloat16 for mixed bfloat16.
        compile: compile the training step with torch.compile.
        checkpoint_activations: compute the student's activations a second time in the backward
            pass, instead of keeping them: less memory, more time.
        kept_gradients: leave out the gradients of dropped tokens, which are next to nothing
            (docs/training.md): less time and memory for wide models on a CPU. By default it is on
            for models of width 384 or more on a CPU. It does not work with compile or
            checkpoint_activations. Training of dense models ignores it.
        shard: divide weights, gradients and optimizer over the processes (FSDP2), where they do not
            fit into each. A launcher's own FSDP setting asks for the same.
    """

    device: str | None = None
    precision: str = "float32"
    compile: bool = False
    checkpoint_activations: bool = False
    kept_gradients: bool | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        self.precision = OLD_PRECISIONS.get(self.precision, self.precision)
        check_precision(self.precision)
        for name in ("compile", "checkpoint_activations"):
            if self.kept_gradients and getattr(self, name):
                raise ValueError(f"kept_gradients must be false with {name}, got true")


@dataclass(kw_only=True)
class RunOptions:
    """Run.

    Args:
        output: folder of the run: config.yaml, metrics.jsonl, checkpoints/ (everything that a
            resumed run needs) and best/ (the model folder with the highest validation top-1).
        seed: seed of data order, augmentation, sampling noise and new weights.
        checkpoint_steps: also write a checkpoint each time after this many steps; 0 writes one at
            each epoch's end only, before validation. A run that is resumed from there validates
            first.
        keep_checkpoints: number of checkpoints that stay, the last ones.
        max_skipped: stop after this many steps in a row whose loss or gradient was not finite. Each
            such step is skipped and counted. The first batch of the last one whose own loss was not
            finite is saved in the run's folder, by the process that had it.
        validate_steps: also validate each time after this many steps; 0 validates at each epoch's
            end only.
        log_steps: steps between lines of metrics.jsonl.
        trackers: also log to these, by accelerate's names: tensorboard, wandb, mlflow, …; by
            default to TensorBoard if it is installed (extra "tensorboard").
    """

    output: str
    seed: int = 0
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    max_skipped: int = 10
    validate_steps: int = 0
    log_steps: int = 20
    trackers: list[str] | None = None

    def __post_init__(self) -> None:
        _check_integers(self, 1, "keep_checkpoints", "max_skipped", "log_steps")
        _check_integers(self, 0, "seed", "checkpoint_steps", "validate_steps")


def _check_integers(options: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if int(value) < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")


def _check_numbers(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        if not _is_number(value):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be 0 or more, got {value}")


def _check_shares(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not (_is_number(value) and 0 <= value <= 1):
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
