"""What every test shares: tiny models, one thread, repeatable random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from hypothesis import settings
from timm.models.vision_transformer import VisionTransformer

# Tiny matrices gain nothing from threads, and lose much where cores are shared.
torch.set_num_threads(1)

# Repeatable: the same examples each time. No deadline: a busy machine is not a failure.
settings.register_profile("repeatable", max_examples=30, deadline=None, derandomize=True)
settings.load_profile("repeatable")

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}


def tiny_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> VisionTransformer:
    """A small timm model (16 patch tokens by default), the same each time, in eval mode.

    Every parameter is moved away from timm's initial values: those are so small that a wrong
    forward pass would come close to the right logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **{**TINY, **options})
    assert isinstance(model, VisionTransformer)
    randomise(model)
    return model.eval()


def randomise(model: torch.nn.Module) -> None:
    """Add noise to every parameter, the same each time."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))


@pytest.fixture(autouse=True)
def _repeatable_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
