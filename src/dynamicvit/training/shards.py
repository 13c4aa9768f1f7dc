"""WebDataset shards that tell what cannot be read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from PIL import Image
from timm.data.readers.reader_wds import ReaderWds, WdsTargetKeyError

from dynamicvit.training.data import DataError

_FLAGS = 1 << 20


class Shards(ReaderWds):
    """timm's reader of WebDataset shards, which by itself logs and drops what cannot be read.

    Args:
        skip_unreadable: count unreadable images, and go on, instead of raising.
        options: of timm's reader.

    Raises:
        DataError: when reading, naming the shard or the sample that cannot be read.
    """

    def __init__(self, *, skip_unreadable: bool, **options: Any) -> None:
        super().__init__(**options)
        # The number of a sample is not known in a stream: its name's hash says whether it was
        # counted before, in memory that loader processes share.
        self.unreadable = (
            torch.zeros(_FLAGS, dtype=torch.uint8).share_memory_() if skip_unreadable else None
        )
        self._sample: dict[str, Any] = {}

    def _lazy_init(self) -> None:
        super()._lazy_init()
        pipeline: Any = self.ds
        *reading, decode, _ = stages = pipeline.pipeline
        for stage in reading:
            if "handler" in getattr(stage, "kw", {}):
                stage.kw["handler"] = _refuse_shard
        decode.kw["handler"] = self._refuse_sample
        stages.insert(len(reading), self._remember)

    def _remember(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for self._sample in samples:
            yield self._sample

    def _refuse_sample(self, error: Exception) -> bool:
        """Raise, or count the sample that `decode` was given last and have it left out."""
        name = f"{self._sample['__key__']} of {self._sample['__url__']}"
        if isinstance(error, KeyError | WdsTargetKeyError):
            raise DataError(f"sample {name} has no label: {error}") from error
        if self.unreadable is None or not isinstance(
            error, OSError | SyntaxError | ValueError | Image.DecompressionBombError
        ):
            raise DataError(f"cannot read image {name}: {error}") from error
        self.unreadable[zlib.crc32(name.encode()) % _FLAGS] = 1
        return True


def _refuse_shard(error: Exception) -> NoReturn:
    # webdataset tells the shard among the error's arguments, and appends to them on the way up.
    if isinstance(error, DataError):
        raise DataError(error.args[0]) from error
    raise DataError(f"cannot read a shard: {', '.join(map(str, error.args))}") from error
