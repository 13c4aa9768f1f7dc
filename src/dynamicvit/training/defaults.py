"""What a TrainConfig leaves open, filled in by the size of the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dynamicvit.core.selectors import SELECTORS
from dynamicvit.training.config import TrainConfig

# The paper's recipe is for the 1.28 million images of ImageNet. Thirty epochs of fewer than this
# many are so few steps that its learning rates, scaled by a small batch, teach the scorers nothing.
FEW_IMAGES = 100_000


def complete(
    config: TrainConfig, images: int, batch: int, earlier: dict[str, Any] | None = None
) -> TrainConfig:
    """Fill in `lr`, `freeze_epochs`, `warmup_epochs` and `start_at_ratio` where they are None.

    Frozen and warm-up epochs are a sixth of all: the paper's 5 of 30 (none are frozen for scorers
    with nothing to learn). With `FEW_IMAGES` or more the
    rest is the paper's too. With fewer, Adam's steps are few and so must not shrink with the batch:
    scorers learn at 1e-3 and a dense model at 1e-4 whatever the batch is, and scorers start at the
    keep ratio.

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
    found = {
        "lr": lr,
        "freeze_epochs": config.epochs // 6 if SELECTORS[config.scorer].learns else 0,
        "warmup_epochs": config.epochs // 6,
        "start_at_ratio": few,
    }
    earlier = earlier or {}
    return replace(
        config,
        **{
            name: earlier.get(name, value)
            for name, value in found.items()
            if getattr(config, name) is None
        },
    )
