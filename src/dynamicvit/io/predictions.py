"""From image files to class names, for sparse and dense models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, overload

import torch
from PIL import Image, ImageOps
from timm.data import (
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_input_data_config,
)
from torch import Tensor, nn

from dynamicvit.core.macs import in_eval_mode
from dynamicvit.io.images import MODES, check_regular, convert_image, why_unreadable

ImageSource = str | os.PathLike[str] | Image.Image

_BATCH = 32  # images in memory at a time


@dataclass(frozen=True)
class Prediction:
    """A class, and how likely the model thinks it is.

    Attributes:
        name: of the class.
        index: of the class, in the logits.
        probability: softmax of the logits, from 0 to 1.
    """

    name: str
    index: int
    probability: float


@overload  # a str is a sequence of str too, and read as a path
def predict(model: nn.Module, image: ImageSource, top_k: int = 5) -> list[Prediction]: ...  # type: ignore[overload-overlap]
@overload
def predict(
    model: nn.Module, image: Sequence[ImageSource], top_k: int = 5
) -> list[list[Prediction]]: ...
def predict(
    model: nn.Module, image: ImageSource | Sequence[ImageSource], top_k: int = 5
) -> list[Prediction] | list[list[Prediction]]:
    """Classify image files in Python, with a SparseViT or a dense timm model.

    The command `dynamicvit predict` is `dynamicvit.deploy.predict.predict_files`.

    Resizing, cropping and normalisation are those of the model's `pretrained_cfg`; pictures are
    turned upright as their EXIF says. The model runs in eval mode, on its own device and in its own
    dtype; its mode is restored.

    Args:
        model: with a classification head.
        image: a path, a PIL image, or a sequence of these.
        top_k: how many classes to give; all, if the model has fewer.

    Returns:
        The `top_k` likeliest classes, best first; for a sequence, a list of such lists. Their names
        are those the model carries, else ImageNet's where the number of classes is that of one of
        its sets, else the index.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an image cannot be read, `top_k` is below 1, or the model gives no classes.
        TypeError: naming the argument of a wrong type.
    """
    check_top_k(top_k)
    sources = check_sources(image)
    names = class_names(model)
    found: list[list[Prediction]] = []
    for batch in batches(sources, model):
        found += as_predictions(run(model, batch), names, top_k)
    return found[0] if _is_source(image) else found


def check_top_k(top_k: Any) -> None:
    """Raise TypeError or ValueError unless so many classes can be given."""
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an integer, got {top_k!r}")
    if top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")


def check_sources(image: Any, name: str = "image") -> dict[str, ImageSource]:
    """What to call each picture in an error, after the argument's name → the picture.

    Raises:
        TypeError: if `image` is neither a picture nor a sequence of pictures.
    """
    if _is_source(image):
        return {name: image}
    if not isinstance(image, Sequence) or isinstance(image, bytes | bytearray):
        raise TypeError(
            f"{name} must be a path, a PIL image or a sequence of these, got {_type(image)}"
        )
    sources = {f"{name}[{index}]": item for index, item in enumerate(image)}
    for label, item in sources.items():
        if not _is_source(item):
            raise TypeError(f"{label} must be a path or a PIL image, got {_type(item)}")
    return sources


def batches(sources: dict[str, ImageSource], model: Any, size: int = _BATCH) -> Iterator[Tensor]:
    """Pictures, as `check_sources` gives them, prepared for the model: [size, C, H, W] at a time.

    Raises:
        FileNotFoundError, ValueError: as `read_image` and `preprocessing` do.
    """
    mode, transform = preprocessing(model)
    for start in range(0, len(sources), size):
        batch = list(sources.items())[start : start + size]
        yield torch.stack([transform(read_image(item, mode, label)) for label, item in batch])


def as_predictions(logits: Tensor, names: Sequence[str], top_k: int) -> list[list[Prediction]]:
    """[B, num_classes] → the `top_k` likeliest classes of each image, best first."""
    best = logits.float().softmax(dim=-1).cpu().topk(min(top_k, len(names)))
    return [
        [
            Prediction(names[index], index, probability)
            for index, probability in zip(indices, probabilities, strict=True)
        ]
        for indices, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def class_names(model: Any) -> list[str]:
    """One name a class, as `predict` gives them.

    Raises:
        TypeError, ValueError: if the model is not timm's, or has no classification head.
    """
    count = getattr(model, "num_classes", None)
    if not isinstance(count, int) or not hasattr(model, "pretrained_cfg"):
        raise TypeError(f"model must be a SparseViT or a timm model, got {_type(model)}")
    if count < 1:
        raise ValueError(f"model must have a classification head, got num_classes={count}")
    given = (model.pretrained_cfg or {}).get("label_names")
    if isinstance(given, dict):  # timm's form for names with gaps; JSON makes the indices strings
        return [str(given.get(index, given.get(str(index), index))) for index in range(count)]
    if isinstance(given, list | tuple) and len(given) == count:  # else they are another head's
        return [str(name) for name in given]
    subset = infer_imagenet_subset(model)
    return list(map(str, range(count))) if subset is None else _imagenet_names(subset)


def preprocessing(model: Any) -> tuple[str, Callable[[Image.Image], Tensor]]:
    """The mode in which to open images, and what makes a [C, H, W] tensor of one.

    Raises:
        ValueError: if the `pretrained_cfg` cannot be used, or no picture has so many channels.
    """
    try:
        config = resolve_input_data_config(model)
        transform = create_transform(**config, is_training=False)
    except Exception as error:  # whatever a strange value makes timm stumble over
        raise ValueError(
            f"the preprocessing in the model's pretrained_cfg cannot be used: {error}"
        ) from error
    channels = config["input_size"][0]
    if channels not in MODES:
        raise ValueError(f"model must take 1, 3 or 4 channels to read image files, got {channels}")
    return MODES[channels], transform


def read_image(source: ImageSource, mode: str, label: str) -> Image.Image:
    """An upright picture with its pixels loaded.

    Args:
        source: a path, or a PIL image.
        mode: Pillow's name of the channels, as `preprocessing` gives it.
        label: what to call a PIL image that has no file name, in an error.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it cannot be read.
    """
    if isinstance(source, Image.Image):
        label = getattr(source, "filename", "") or label
    else:
        label = os.fspath(source)
    try:
        if isinstance(source, Image.Image):
            return _upright(source, mode)
        check_regular(source)
        with Image.open(source) as opened:
            return _upright(opened, mode)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image at {label}") from error
    except Exception as error:  # foreign bytes make Pillow raise nearly anything
        raise ValueError(f"cannot read image {label}: {why_unreadable(error)}") from error


@cache
def _imagenet_names(subset: str) -> list[str]:
    return list(ImageNetInfo(subset).label_descriptions())


def _upright(image: Image.Image, mode: str) -> Image.Image:
    return convert_image(ImageOps.exif_transpose(image), mode)


def run(model: nn.Module, images: Tensor, method: str = "__call__") -> Any:
    """What a method of the model gives for images [B, C, H, W], in eval mode, on the model's own
    device and in its dtype. The mode of each module is restored."""
    like = next(model.parameters())
    with in_eval_mode(model), torch.inference_mode():
        return getattr(model, method)(images.to(like.device, like.dtype))


def _is_source(value: object) -> bool:
    return isinstance(value, str | os.PathLike | Image.Image)


def _type(value: object) -> str:
    return type(value).__name__
