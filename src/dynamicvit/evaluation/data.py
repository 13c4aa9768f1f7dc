"""Images for training and evaluation, through timm's datasets and loaders."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset

from dynamicvit.evaluation.sources import (
    class_names_of,
    describe_difference,
    is_named,
    open_folder,
    open_named,
)
from dynamicvit.evaluation.unreadable import DataError, Unreadable
from dynamicvit.io.images import MODES, check_regular, convert_image, why_unreadable

# What is told of images met, beside those that cannot be read.
_HUGE = 10_000
_KINDS = ("grey", "with an alpha channel", f"with a side of {_HUGE:,} pixels or more")


@dataclass
class ImageData:
    """A split of a data set.

    Attributes:
        dataset: yields (image, class index); transforms are set by the loader.
        class_names: in the order of their indices; None where the source does not tell.
    """

    dataset: Any
    class_names: list[str] | None

    def describe(self, most: int = 5) -> str:
        """How many images and classes there are, and as far as the source tells without reading
        images, how many images a class has, with up to `most` names of those with one or none."""
        text = f"{len(self.dataset):,} images"
        names = self.class_names
        if names is None:
            return text
        text += f", {len(names):,} classes"
        counts = self.class_counts()
        if counts is None:
            return text
        fewest, most_images = int(counts.min()), int(counts.max())
        text += f" of {fewest:,}" + (f" to {most_images:,}" if fewest < most_images else "")
        for count, what in ((1, "with a single image"), (0, "without any")):
            found = [names[index] for index in np.flatnonzero(counts == count)]
            if found:
                text += f"; {len(found):,} {what}: {_some(found, most, of=len(found))}"
        return text

    def class_counts(self) -> np.ndarray[Any, Any] | None:
        """How many images each class has; None if the source does not tell before it is read."""
        labels, names = self._labels, self.class_names
        if labels is None or names is None:
            return None
        known = labels[labels >= 0]  # some readers say -1 for no label
        return np.bincount(known, minlength=len(names))[: len(names)]

    def describe_met(self) -> str | None:
        """How many images met so far, in all processes of a run, can be read, and how many of them
        are of an unusual kind; None if none is, or they are not counted. To be called in all
        processes together."""
        if not isinstance(self.dataset, _Images):
            return None
        met = reduce(torch.bitwise_or, gather_object([self.dataset.kinds]))
        counts = [int((met >> bit & 1).sum()) for bit in range(len(_KINDS) + 1)]
        found = zip(counts[1:], _KINDS, strict=True)
        parts = [f"{count:,} {kind}" for count, kind in found if count]
        return f"{counts[0]:,}; of these {', '.join(parts)}" if parts else None

    @property
    def unreadable(self) -> int | None:
        """Images met so far, by any loader process, that cannot be read; None if not counted."""
        found = self._unreadable
        return None if found is None else int(found.flags.sum())

    def describe_unreadable(self, most: int = 5) -> str | None:
        """How many images met so far, in all processes of a run, cannot be read, and the names of
        up to `most` of them; None if not counted. To be called in all processes together."""
        found = self._unreadable
        if found is None:
            return None
        numbers, names = set[int](), set[str]()
        for ours in gather_object([(found.flags.nonzero().flatten().tolist(), found.names())]):
            numbers.update(ours[0])
            names.update(ours[1])
        if not numbers:
            return "0"
        return f"{len(numbers)}: {_some(sorted(names), most, of=len(numbers))}"

    @property
    def _unreadable(self) -> Unreadable | None:
        found = getattr(getattr(self.dataset, "reader", self.dataset), "unreadable", None)
        return cast(Unreadable | None, found)

    @property
    def _labels(self) -> np.ndarray[Any, Any] | None:
        """The class index of each image, where they are at hand."""
        source = getattr(self.dataset, "source", None)
        samples = getattr(getattr(source, "reader", None), "samples", None)
        found = np.asarray(
            getattr(source, "targets", []) if samples is None else [label for _, label in samples]
        )
        known = len(found) == len(self.dataset) and found.ndim == 1 and found.dtype.kind in "iu"
        return found if known else None

    def set_channels(self, in_chans: int) -> None:
        """Open images as a model of so many channels takes them, whatever `open_data` was told."""
        if isinstance(self.dataset, _Images):
            self.dataset.mode = _mode(in_chans)
        else:
            self.dataset.reader.input_img_mode = _mode(in_chans)

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Make augmentation follow from seed, epoch and image alone, whoever loads the image."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if isinstance(self.dataset, _Images):
            self.dataset.key = (seed, epoch)


def _some(names: Sequence[str], most: int, of: int) -> str:
    """Up to `most` of the names that are known of so many things."""
    some = names[:most]
    return ", ".join(some) + (", …" if of > len(some) else "")


def open_data(
    data: str,
    split: str = "train",
    *,
    data_dir: str | None = None,
    in_chans: int = 3,
    class_names: Sequence[str] | None = None,
    skip_unreadable: bool = False,
    batch_size: int = 1,
    training: bool = False,
) -> ImageData:
    """Open one split of a data set.

    Args:
        data: a folder of images, `data/{train,val}/CLASS/IMAGE`; or a timm data set name:
            `torch/NAME` (torchvision), `hfds/NAME` (Hugging Face), `wds/NAME` (WebDataset), …
        split: "train" or "val", whatever their usual spelling in the source, or the source's own
            name of a split.
        data_dir: where a named data set lies.
        in_chans: 1 opens images as grey, 3 as RGB.
        class_names: the classes expected, in order (those of the training split). A folder need
            not have images of all of them.
        skip_unreadable: count images that cannot be read, instead of raising: in training the next
            image is taken instead, else their class index is -1, and `evaluate_model` leaves
            them out. WebDataset shards give the next image in both. hfids and tfds ignore this
            option.
        batch_size: hint for sources that are read as a stream.
        training: the images are for training: shuffle sources that are read as a stream.

    Raises:
        DataError: naming what is missing, empty, unreadable or of the wrong classes.
    """
    mode = _mode(in_chans)
    if is_named(data):
        dataset = open_named(
            data,
            split,
            data_dir,
            is_training=training,
            batch_size=batch_size,
            input_img_mode=mode,
            skip_unreadable=skip_unreadable,
        )
    else:
        dataset = open_folder(Path(data), split, mode, class_names)
    found = class_names_of(dataset)
    if class_names is not None and found is not None and found != list(class_names):
        raise DataError(
            f"data must have the classes expected, got {data} with others: "
            f"{describe_difference(found, list(class_names))}"
        )
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return ImageData(dataset, found)
    images = _Images(dataset, mode, skip_unreadable, replace=training)
    if len(images) == 0:
        raise DataError(f"data must have images in the split {split!r}, got {data} with none")
    return ImageData(images, found)


def _mode(in_chans: int) -> str:
    if in_chans not in MODES:
        raise DataError(f"in_chans must be 1, 3 or 4 to open image files, got {in_chans}")
    return MODES[in_chans]


def seed_of(*key: int | str) -> int:
    """A 32-bit seed that follows from a key, such as (seed, epoch, image)."""
    return zlib.crc32(repr(key).encode())


def check_labels(targets: torch.Tensor, num_classes: int) -> None:
    """Raise DataError if class indices [B] are not below `num_classes` (-1: no image)."""
    if targets.numel() and int(targets.max()) >= num_classes:
        raise DataError(
            f"data must have class indices below {num_classes}, the model's number of classes, "
            f"got {int(targets.max())}"
        )


class _Images(Dataset):
    """A map-style source whose unreadable images are named, or counted and skipped."""

    def __init__(self, source: Any, mode: str, skip_unreadable: bool, replace: bool) -> None:
        self.source = source
        self.mode = mode
        self.replace = replace
        self.transform: Any = None  # set by timm's loader
        self.key: tuple[int, int] | None = None  # (seed, epoch); None leaves generators alone
        self.unreadable = Unreadable(len(source)) if skip_unreadable else None
        # For each image, in memory that loader processes share: bit 0 if it was read, then _KINDS.
        self.kinds = torch.zeros(len(source), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for step in range(len(self)):
            at = (index + step) % len(self)
            try:
                image, target = self._read(at)
                break
            except Exception as error:  # foreign bytes make decoders raise nearly anything
                name = self._name(at)
                if self.unreadable is None:
                    raise DataError(
                        f"cannot read image {name}: {why_unreadable(error)} "
                        "(skip_unreadable goes on without it)"
                    ) from error
                self.unreadable.add(at, name)
                if not self.replace:
                    image, target = Image.new(self.mode, (64, 64)), -1
                    break
        else:
            raise DataError("data must have images that can be read, got none")
        if self.key is not None:
            # timm's transforms draw from all three generators.
            seed = seed_of(*self.key, index)
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        if self.transform is not None:
            image = self.transform(image)
        return image, int(target)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if isinstance(self.source, ImageDataset):
            name = self._file(index)
            if name is not None:
                with suppress(FileNotFoundError):  # the name of bytes in a table
                    check_regular(name)
            # timm's own __getitem__ would replace an unreadable image and go on.
            image, target, *_ = self.source.reader[index]
            if not isinstance(image, Image.Image):
                with image:
                    return self._convert(Image.open(image), index), target
        else:
            image, target = self.source[index]
        return self._convert(image, index), target

    def _convert(self, image: Image.Image, index: int) -> Image.Image:
        converted = convert_image(image, self.mode)
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        kinds = (True, grey, image.has_transparency_data, max(image.size) >= _HUGE)
        self.kinds[index] = sum(is_one << bit for bit, is_one in enumerate(kinds))
        return converted

    def _file(self, index: int) -> str | None:
        """An image's file; a name alone or None, where the image's bytes lie in a table."""
        if isinstance(self.source, ImageDataset):
            name: str | None = self.source.reader.filename(index, absolute=True)
            return name
        return None

    def _name(self, index: int) -> str:
        name = self._file(index)
        if name is None:
            return f"number {index}"
        return os.fsencode(name).decode(errors="backslashreplace")
