"""Count multiply-adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_gmacs(model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Billions of multiply-adds for one image: matrix products, convolutions and attention.

    What the literature on this method calls FLOPs. Norms and activations, about 0.2% of a ViT,
    are not counted. The model is run once, in eval mode, on zeros.

    Args:
        model: any classification model, on any device; on the meta device no arithmetic is done.
        input_size: (channels, height, width) of an image.

    Raises:
        TypeError: if `model` is not a module or `input_size` not three integers.
        ValueError: if the model does not take images of this size.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if not (
        isinstance(input_size, Sequence)
        and len(input_size) == 3
        and all(isinstance(side, int) and not isinstance(side, bool) for side in input_size)
    ):
        raise TypeError(f"input_size must be three integers (C, H, W), got {input_size!r}")
    if min(input_size) < 1:
        raise ValueError(f"input_size must be 1 or more, got {input_size!r}")
    if next(model.parameters(), None) is None:
        raise ValueError(f"model must have parameters, got {type(model).__name__} without any")
    like = next(model.parameters())
    image = torch.zeros(1, *input_size, device=like.device, dtype=like.dtype)
    # torch's counter follows what requires a gradient, and fails on an expanded parameter.
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        # Plain attention is made of operations that the counter knows on every device.
        with (
            in_eval_mode(model),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(image)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"input_size must be one that {type(model).__name__} takes, got {input_size!r}: {error}"
        ) from error
    finally:
        for parameter in learnt:
            parameter.requires_grad_()
    return counter.get_total_flops() / 2 / 1e9


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
