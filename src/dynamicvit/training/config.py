"""TrainConfig: everything that defines a training run, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.selectors import SELECTORS, check_name
from dynamicvit.evaluation.setup import check_precision

# Options that differ from TrainConfig's defaults, which are the paper's. The warm start of the
# scorers and their start at the keep ratio are not in it.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "fast": {
        "epochs": 7,
        "freeze_epochs": 0,
        "warmup_epochs": 0,
        "start_at_ratio": True,
        "warm_start": 60,
        "backbone_lr": 0.1,
    },
}


@dataclass
class TrainConfig:
    """Everything that defines a training run. Defaults are the paper's recipe for DeiT-S at 0.7.

    Args:
        data: image folder with train and val sub-folders, or a timm data set name: torch/NAME
            (torchvision), hfds/NAME (Hugging Face), wds/NAME (WebDataset shards).
        output: folder of the run: config.yaml, metrics.jsonl, checkpoints/ (everything needed to
            go on) and best/ (the model folder with the highest validation top-1).
        model: what to start from: a timm name, a model folder or a hub id. In sparse training it is
            also the teacher.
        model_kwargs: for a timm name, further arguments of timm.create_model.
        pretrained: for a timm name, start from timm's pretrained weights.
        keep_ratio: share of tokens each of three stages keeps; null trains the dense model itself.
        align: round kept counts, prefix tokens included, to multiples of this; some engines are
            faster then (docs/speed.md).
        blocks: prune before these blocks (0-based), with ratios, instead of keep_ratio.
        ratios: for each stage, the share of the original tokens kept after it.
        scorer: what decides which tokens go on: learned; or, to compare with, random, static,
            class_attention, class_attention_merging, similarity_merging or pooling. The last three
            make new tokens, and are trained by the two losses on logits alone.
        data_dir: where a named data set lies.
        train_split: split to learn from.
        val_split: split to validate on.
        workers: data loading processes; 0 loads in the main one.
        skip_unreadable: count images that cannot be read, instead of stopping: in training the next
            one takes their place, in validation they are left out.
        mean: normalisation mean a channel; by default the model's.
        std: normalisation standard deviation a channel; by default the model's.
        crop_pct: in validation, the share of the image's side that is kept; by default the model's.
        crop_scale: random resized crop, range of the area taken; null takes the centred square.
        crop_ratio: random resized crop, range of the aspect ratio.
        hflip: probability of a horizontal flip.
        color_jitter: strength of colour jitter, used where auto_augment is null.
        auto_augment: timm's augmentation policy; null for none.
        random_erasing: probability of erasing a rectangle.
        mixup: Mixup alpha; 0 for none.
        cutmix: CutMix alpha; 0 for none.
        label_smoothing: share of the target spread over all classes.
        dense_epochs: where the data has other classes than the model, sparse training is preceded
            by so many epochs of dense training, with a new head, in output/dense; its best model is
            what then becomes sparse, and the teacher. 0 refuses such data.
        epochs: passes over the training split; 0 trains nothing (but for warm_start and
            dense_epochs), and evaluates and writes the model.
        epoch_images: how many images an epoch takes, other ones each time; null for the whole
            split.
        batch_size: images that each process computes on at once.
        accumulate: such batches a step. The global batch, batch_size × processes × accumulate, is
            what defines a run: divided over another number of processes it is the same run.
            Accumulated in another way it nearly is: the token loss is the mean over the tokens kept
            of each micro-batch (of all processes), and the mean of these means is not that over all
            tokens, as images keep different numbers of them.
        lr: learning rate of the scorers (dense training: of everything), for a global batch of
            1024; scaled in proportion. By default the paper's 1e-3; with fewer than 100,000
            training images, what gives 1e-3 (dense training: 1e-4) at the batch there is.
        backbone_lr: learning rate of the backbone, as a multiple of that of the scorers, from
            warm-up to the end. Dense training ignores it.
        freeze_epochs: epochs for which only the scorers learn; by default a sixth of all, or none
            if they have nothing to learn. Dense training ignores it.
        warmup_epochs: epochs over which learning rates rise from min_lr; by default a sixth of all.
        min_lr: learning rate at the start and at the end, for a global batch of 1024.
        weight_decay: AdamW's; none on biases, norms, position embeddings and prefix tokens.
        clip_grad: greatest norm of the gradient; null for no limit.
        drop_path: stochastic depth of the model that learns, sparse or dense.
        ema: decay of the weights' moving average, which is what is validated and saved as best;
            null for none. It rises towards this value over the first steps.
        cross_entropy_weight: weight of the classification loss.
        ratio_weight: weight of the keep-ratio loss (the paper's DeiT-B uses 5).
        logit_kl_weight: weight of the KL divergence from the teacher's logits.
        token_weight: weight of the distance to the teacher's kept tokens.
        temperature: of the sampled keep decisions at the end of training; from 1 at the start it
            falls (or rises) to it exponentially.
        start_at_ratio: begin with scorers that keep tokens at the schedule's ratio, not half of
            them. Not in the paper; by default with fewer than 100,000 training images.
        warm_start: steps in which scorers first learn to keep what the teacher's class token
            attends to, at a learning rate that falls from 1 / width to 0. Not in the paper; helps
            short training.
        precision: "no" for float32, or "bf16" for mixed bfloat16.
        compile: compile the training step with torch.compile.
        checkpoint_activations: compute the student's activations a second time in the backward
            pass, instead of keeping them: less memory, more time.
        kept_gradients: leave out of the backward pass what dropped tokens receive, which is next to
            nothing (`SparseViT.set_kept_gradients`): less time and memory on a CPU, where null is
            true but with compile or checkpoint_activations, which it does not go with. Training of
            dense models ignores it.
        shard: divide weights, gradients and optimizer over the processes (FSDP2), where they do not
            fit into each. A launcher's own FSDP setting asks for the same.
        checkpoint_steps: also write a checkpoint every so many steps; 0 for at each epoch's end
            alone, before it is validated: a run that goes on from there validates first.
        keep_checkpoints: how many checkpoints stay, the last ones.
        max_skipped: stop after so many steps in a row whose loss or gradient was not finite (each
            is left out, and counted). The first batch of the last one whose own loss was not is
            saved in the run's folder, by the process that had it.
        validate_steps: also validate every so many steps, for an early look; 0 for at each epoch's
            end alone.
        log_steps: steps between lines of metrics.jsonl.
        trackers: also log to these, by accelerate's names: tensorboard, wandb, mlflow, …; by
            default to TensorBoard if it is installed (extra "tensorboard").
        seed: of data order, augmentation, sampling noise and new weights.
    """

    data: str
    output: str
    model: str = "deit_small_patch16_224"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    keep_ratio: float | None = 0.7
    align: int | None = None
    blocks: list[int] | None = None
    ratios: list[float] | None = None
    scorer: str = "learned"
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    workers: int = 2
    skip_unreadable: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = None
    crop_scale: list[float] | None = field(default_factory=lambda: [0.08, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    dense_epochs: int = 30
    epochs: int = 30
    epoch_images: int | None = None
    batch_size: int = 128
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
    cross_entropy_weight: float = 1.0
    ratio_weight: float = 2.0
    logit_kl_weight: float = 0.5
    token_weight: float = 0.5
    temperature: float = 1.0
    start_at_ratio: bool | None = None
    warm_start: int = 0
    precision: str = "no"
    compile: bool = False
    checkpoint_activations: bool = False
    kept_gradients: bool | None = None
    shard: bool = False
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    max_skipped: int = 10
    validate_steps: int = 0
    log_steps: int = 20
    trackers: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_precision({"no": "float32", "bf16": "bfloat16"}.get(self.precision, self.precision))
        if self.blocks is not None or self.ratios is not None:
            if self.blocks is None or self.ratios is None:
                raise ValueError(
                    f"blocks and ratios go together, got {self.blocks} and {self.ratios}"
                )
            KeepSchedule(tuple(self.blocks), tuple(self.ratios))
        elif self.keep_ratio is not None:
            KeepSchedule.from_keep_ratio(self.keep_ratio, depth=12)
        check_name(self.scorer)
        for name in ("warm_start", "freeze_epochs"):
            if self.sparse and getattr(self, name) and not SELECTORS[self.scorer].learns:
                raise ValueError(
                    f"{name} must be 0 with scorer {self.scorer}, which has nothing to learn, "
                    f"got {getattr(self, name)}"
                )
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        for name in ("compile", "checkpoint_activations"):
            if self.kept_gradients and getattr(self, name):
                raise ValueError(f"kept_gradients must be false with {name}, got true")
        for name in ("hflip", "random_erasing", "label_smoothing", "crop_pct"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        for name in ("drop_path", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        for name in ("crop_scale", "crop_ratio"):
            value = getattr(self, name)
            if value is not None and not (len(value) == 2 and 0 < value[0] <= value[1]):
                raise ValueError(f"{name} must be two growing numbers above 0, got {value}")

    @classmethod
    def from_recipe(cls, recipe: str, **options: Any) -> TrainConfig:
        """A config whose defaults are those of a recipe; the command line's --recipe.

        Args:
            recipe: paper, or fast: fewer epochs, for which scorers begin with the teacher's
                attention and at the keep ratio, and everything learns from the first step.
            options: of this class.

        Raises:
            ValueError: if there is no such recipe, or an option is wrong.
        """
        return cls(**{**find_recipe(recipe), **options})

    @property
    def sparse(self) -> bool:
        return self.keep_ratio is not None or self.blocks is not None


def find_recipe(name: str) -> dict[str, Any]:
    """The options in which a recipe differs from TrainConfig's defaults."""
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


_AT_LEAST_ONE = (
    "batch_size",
    "epoch_images",
    "accumulate",
    "keep_checkpoints",
    "max_skipped",
    "log_steps",
)
_NOT_NEGATIVE = (
    *("workers", "lr", "backbone_lr", "freeze_epochs", "warmup_epochs", "min_lr", "weight_decay"),
    *("clip_grad", "mixup", "cutmix", "color_jitter", "cross_entropy_weight", "ratio_weight"),
    *("logit_kl_weight", "token_weight", "warm_start", "checkpoint_steps"),
    *("epochs", "dense_epochs", "validate_steps"),
)
