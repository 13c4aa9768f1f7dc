"""explain(): which patches of images a model keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, cast, overload

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_input_data_config
from timm.data.transforms import CenterCropOrPad
from torch import Tensor, nn
from torchvision.transforms import CenterCrop

from dynamicvit.core.model import SparseOutput, SparseViT
from dynamicvit.io.predictions import (
    ImageSource,
    Prediction,
    as_predictions,
    batches,
    check_sources,
    class_names,
    preprocessing,
    read_image,
    run,
)
from dynamicvit.views.explanation import Explanation

_TOP_K = 5
_BATCH = 32  # images in memory at a time


@overload  # a str is a sequence of str too, and read as a path
def explain(  # type: ignore[overload-overlap]
    model: SparseViT, images: ImageSource, dense: nn.Module | None = None
) -> Explanation: ...
@overload
def explain(
    model: SparseViT, images: Sequence[ImageSource] | Tensor, dense: nn.Module | None = None
) -> list[Explanation]: ...
def explain(
    model: SparseViT,
    images: ImageSource | Sequence[ImageSource] | Tensor,
    dense: nn.Module | None = None,
) -> Explanation | list[Explanation]:
    """Show in Python which patches of images a model keeps, and the classes it predicts.

    A notebook shows the result as a picture; `.save("x.png")` writes it. Files are resized, cropped
    and normalised as the model's `pretrained_cfg` says. The pictures show the result of that.
    Models run in eval mode, on their own device and in their own dtype; their mode is restored.
    The command `dynamicvit explain` is `explain_files`: it also takes folders and videos.

    Args:
        model: a sparse model.
        images: a path, a PIL image, or a sequence of these; or prepared images, a tensor
            [B, C, H, W], normalised as `pretrained_cfg` says.
        dense: a dense timm model to compare with; images are prepared as its own `pretrained_cfg`
            says. By default the model's own backbone with all patches kept. After fine-tuning this
            is not the dense model that it was made from.

    Returns:
        An Explanation; for a sequence or tensor, a list of them.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError, ValueError: if an image cannot be read, or naming a bad argument.
    """
    if not isinstance(model, SparseViT):
        raise TypeError(f"model must be a SparseViT, got {type(model).__name__}")
    if dense is not None and (isinstance(dense, SparseViT) or not hasattr(dense, "pretrained_cfg")):
        raise TypeError(f"dense must be a dense timm model, got {type(dense).__name__}")
    found: list[Explanation] = []
    for inputs, visible, dense_inputs in _prepare(images, model, dense):
        found += _explain(model, inputs, visible, dense, dense_inputs)
    return found[0] if isinstance(images, str | os.PathLike | Image.Image) else found


def is_untrained(model: SparseViT) -> bool:
    """Whether learned scorers are as created: training changes each of their parameters."""
    norms = [item for item in model.scorers.modules() if isinstance(item, nn.LayerNorm)]
    return bool(norms) and all(
        bool((item.weight == 1).all() and (item.bias == 0).all()) for item in norms
    )


def _prepare(
    images: Any, model: SparseViT, dense: nn.Module | None
) -> Iterator[tuple[Tensor, list[float], Tensor]]:
    """Batches of prepared images, the share of each picture that is in them, and the same images
    for the dense model."""
    if isinstance(images, Tensor):
        size = resolve_input_data_config(dense)["input_size"] if dense else images.shape[1:]
        if tuple(size) != tuple(images.shape[1:]):
            raise ValueError(
                f"dense must take the prepared images {tuple(images.shape[1:])}, got {tuple(size)}"
            )
        yield images, [1.0] * len(images), images
        return
    sources = check_sources(images, "images")
    mode, transform = preprocessing(model)
    others = None if dense is None else batches(sources, dense)
    labels = list(sources)
    for start in range(0, len(labels), _BATCH):
        prepared, visible = [], []
        for label in labels[start : start + _BATCH]:
            tensor, share = _transform(read_image(sources[label], mode, label), transform)
            prepared.append(tensor)
            visible.append(share)
        inputs = torch.stack(prepared)
        yield inputs, visible, inputs if others is None else next(others)


def _transform(picture: Image.Image, transform: Any) -> tuple[Tensor, float]:
    """A prepared image, and the share of the picture's area that no crop has cut off."""
    value: Any = picture
    visible = 1.0
    for step in transform.transforms:
        before = value
        value = step(value)
        if isinstance(step, CenterCrop | CenterCropOrPad):
            for new, old in zip(value.size, before.size, strict=True):
                visible *= min(1.0, new / old)
    return value, visible


def _explain(
    model: SparseViT,
    images: Tensor,
    visible: Sequence[float],
    dense: nn.Module | None,
    dense_images: Tensor,
) -> list[Explanation]:
    output: SparseOutput = run(model, images, "pruned")
    if not output.keep:
        kind = type(model.scorers[0]).__name__
        raise ValueError(f"model must choose tokens, got {kind}, which merges them")
    height, width = images.shape[-2:]
    embed: Any = model.backbone.patch_embed
    scores = torch.stack([score.float() for score in output.scores], dim=1).cpu().numpy()
    keep = [mask.cpu().numpy() > 0.5 for mask in output.keep]
    pixels = _to_pixels(images, resolve_input_data_config(model))
    pruned = _predictions(model, output.logits)
    if dense is None:
        teller: Any = model.backbone
        dense_model = "the same weights, all patches kept"
    else:
        teller = dense
        dense_model = str((teller.pretrained_cfg or {}).get("architecture") or type(dense).__name__)
    predictions = _predictions(teller, run(teller, dense_images))
    return [
        Explanation(
            pixels=pixels[index],
            patch_size=cast(tuple[int, int], tuple(embed.feat_ratio(as_scalar=False))),
            grid=cast(tuple[int, int], tuple(embed.dynamic_feat_size((height, width)))),
            blocks=model.schedule.blocks,
            kept=tuple(mask[index].nonzero()[0] for mask in keep),
            scores=scores[index],
            dense=predictions[index],
            pruned=pruned[index],
            dense_model=dense_model,
            visible=visible[index],
            level=_level(model, [int(mask[index].sum()) for mask in keep]),
        )
        for index in range(len(images))
    ]


def _level(model: SparseViT, counts: list[int]) -> tuple[int, int] | None:
    """`Explanation.level` of an image of which the stages keep so many patches."""
    if model.levels is None:
        return None
    schedules = model.levels.schedules
    found = [list(each.counts(model.budget().num_patches)) for each in schedules]
    return found.index(counts) + 1, len(found)


def _predictions(model: Any, logits: Tensor) -> list[list[Prediction]]:
    """The likeliest classes of each image; none, where the model has no head."""
    if model.num_classes < 1:
        return [[] for _ in logits]
    return as_predictions(logits, class_names(model), _TOP_K)


def _to_pixels(images: Tensor, config: dict[str, Any]) -> np.ndarray:
    """Undo the normalisation: [B, C, H, W] → [B, H, W, 3] uint8.

    With four channels the last one is opacity, and is left out. Otherwise, unless there are three,
    the first channel is shown in grey.
    """
    channels = images.shape[1]
    mean, std = (
        torch.tensor(config[name], device=images.device).view(1, -1, 1, 1)
        for name in ("mean", "std")
    )
    if channels not in (mean.shape[1], 1) and mean.shape[1] != 1:
        raise ValueError(
            f"model must have a mean and std a channel in its pretrained_cfg, {channels}, "
            f"got {mean.shape[1]}"
        )
    pixels = (images.float() * std + mean)[:, : min(channels, 3)]
    if channels not in (3, 4):
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    pixels = pixels.clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
