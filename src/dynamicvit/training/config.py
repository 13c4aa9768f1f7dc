"""TrainConfig: everything that defines a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from dynamicvit.core.selectors import SELECTORS
from dynamicvit.io.arguments import check_fields
from dynamicvit.training.options import (
    AugmentationOptions,
    DataOptions,
    HardwareOptions,
    LossOptions,
    ModelOptions,
    OptimizationOptions,
    PruningOptions,
    RunOptions,
)

# Options that differ from TrainConfig's defaults, which are the paper's. The warm start of the
# scorers and their start at the keep ratio are not in the paper.
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

# Images that a process computes at once, where the training split has so many.
USUAL_BATCH = 128

# The paper's recipe is for the 1.28 million images of ImageNet. Thirty epochs of fewer than this
# many are so few steps that its learning rates, scaled by a small batch, teach the scorers nothing.
FEW_IMAGES = 100_000


# Dataclasses take the fields of the last base first.
@dataclass(kw_only=True)
class TrainConfig(
    RunOptions,
    HardwareOptions,
    LossOptions,
    OptimizationOptions,
    AugmentationOptions,
    PruningOptions,
    ModelOptions,
    DataOptions,
):
    """Everything that defines a training run. Defaults are the paper's recipe for DeiT-S at 0.7.

    The options come in groups, each described and checked in its own class. All have names of their
    own, so the command line, YAML files and this class take them by name alone.

    Raises:
        TypeError, ValueError: naming the option that is wrong.
    """

    GROUPS: ClassVar = (
        DataOptions,
        ModelOptions,
        PruningOptions,
        AugmentationOptions,
        OptimizationOptions,
        LossOptions,
        HardwareOptions,
        RunOptions,
    )

    def __post_init__(self) -> None:
        for group in self.GROUPS:
            check_fields(self, group)
            if hasattr(group, "__post_init__"):
                group.__post_init__(self)
        self.check_learns("freeze_epochs", self.freeze_epochs)

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> Self:
        """A config from a YAML file, such as the config.yaml of a run.

        Args:
            path: the file.
            options: of this class; they replace those of the file.

        Raises:
            ValueError, TypeError, OSError: if the file cannot be read, or an option is wrong.
        """
        given = {**read_options(Path(path)), **options}
        unknown = sorted(given.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{path} has options that training does not have: {unknown}")
        return cls(**given)

    def to_yaml(self) -> str:
        """All options as YAML, with a heading for each group. `from_file` reads it."""
        values = asdict(self)
        parts = []
        for group in self.GROUPS:
            part = {field.name: values[field.name] for field in fields(group)}
            title = (group.__doc__ or "").partition(".")[0]
            parts.append(f"# {title}\n{yaml.safe_dump(part, sort_keys=False, allow_unicode=True)}")
        return "\n".join(parts)


def read_options(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is not UTF-8 text, not YAML, or does not hold options by name.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        got = "nothing in it" if content is None else "other YAML"
        raise ValueError(f"{path} must hold options, each as NAME: VALUE, got {got}")
    return content


def find_recipe(name: str) -> dict[str, Any]:
    """The options in which a recipe differs from TrainConfig's defaults."""
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


def choose_batch(config: TrainConfig, images: int, processes: int) -> TrainConfig:
    """Fill in `batch_size` if it is None, so that an epoch has a step.

    Args:
        config: what the user asked for.
        images: in the training split.
        processes: how many share a step.

    Raises:
        ValueError: if the training split does not fill an epoch, or an epoch a step.
    """
    length = images if config.epoch_images is None else config.epoch_images
    if length > images:
        raise ValueError(
            f"epoch_images must not exceed the training split's {images} images, got {length}"
        )
    of = "training split's" if config.epoch_images is None else "epoch's"
    several = processes * config.accumulate
    mixed = bool(config.mixup or config.cutmix)
    if config.batch_size is None:
        batch = min(USUAL_BATCH, length // several)
        batch -= batch % 2 if mixed else 0
        if batch < 1:
            raise ValueError(
                f"data must have at least {several * (1 + mixed)} training images, so that each "
                f"step has a batch{' of two, for Mixup' if mixed else ''}; the {of} are {length}, "
                f"got {config.data}"
            )
        return replace(config, batch_size=batch)
    if mixed and config.batch_size % 2:
        raise ValueError(f"batch_size must be even for Mixup, got {config.batch_size}")
    if length < config.batch_size * several:
        raise ValueError(
            f"batch_size must not exceed the {of} {length} images, got "
            f"{config.batch_size}" + (f" × {several} in a step" if several > 1 else "")
        )
    return config


def complete(
    config: TrainConfig, images: int, batch: int, earlier: dict[str, Any] | None = None
) -> TrainConfig:
    """Fill in `lr`, `freeze_epochs`, `warmup_epochs` and `start_at_ratio` where they are None.

    (`batch_size` is filled in before, by `choose_batch`.)

    Frozen and warm-up epochs are a sixth of all, the paper's 5 of 30 (none are frozen for scorers
    with nothing to learn). With `FEW_IMAGES` or more the rest is the paper's too. With fewer,
    Adam's steps are few, so they must not shrink with the batch: scorers learn at 1e-3 and a dense
    model at 1e-4 whatever the batch is, and scorers start at the keep ratio.

    Args:
        config: what the user asked for.
        images: in the training split.
        batch: images in a step, of all processes.
        earlier: the config of the run that is resumed: what it filled in stays.
    """
    few = images < FEW_IMAGES
    lr = 1e-3
    if few:
        lr = (1e-3 if config.sparse else 1e-4) * 1024 / batch  # it is multiplied by batch / 1024
    found: dict[str, Any] = {
        "lr": lr,
        "freeze_epochs": config.epochs // 6 if SELECTORS[config.scorer].learns else 0,
        "warmup_epochs": config.epochs // 6,
        "start_at_ratio": few,
    }
    earlier = earlier or {}
    return replace(
        config,
        **{
            name: value if earlier.get(name) is None else earlier[name]
            for name, value in found.items()
            if getattr(config, name) is None
        },
    )
