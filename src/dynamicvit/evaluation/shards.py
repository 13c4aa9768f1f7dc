"""WebDataset shards that tell what cannot be read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

from timm.data.readers.reader_wds import ReaderWds

from dynamicvit.evaluation.unreadable import DataError, Unreadable
from dynamicvit.io.images import why_unreadable

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
        # One process reads, and accelerate gives each process its part of a batch. In timm each
        # process reads its share of the shards, but shards have different numbers of images.
        self.dist_rank, self.dist_num_replicas = 0, 1
        # Samples of a stream have no number. The hash of a name tells whether the sample was
        # counted before, in memory that loader processes share. Two of very many may be alike.
        self.unreadable = Unreadable(_FLAGS) if skip_unreadable else None
        self._lengths = {
            os.path.join(self.root, name): length
            for name, length in zip(
                self.split_info.filenames, self.split_info.shard_lengths, strict=False
            )
        }
        self._url, self._read = "", 0
        self._sample: dict[str, Any] = {}

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        count = 0
        for item in super().__iter__():
            count += 1
            yield item
        # timm's reader repeats its shards until the epoch is full or a pass gives no image.
        if self.is_training and count < self._num_samples_per_worker():
            raise DataError(f"no image in {', '.join(self._lengths) or self.root} can be read")

    def _lazy_init(self) -> None:
        super()._lazy_init()
        pipeline: Any = self.ds
        stages = pipeline.pipeline
        reading, decode = _stage(stages, "tarfile_samples"), _stage(stages, "_map")
        stages[reading].kw["handler"] = self._refuse_shard
        stages[decode].kw["handler"] = self._refuse_image
        stages.insert(decode, self._check_sample)
        stages.insert(reading + 1, self._count)
        stages.insert(reading, self._check_length)

    # The pipeline takes one item through all of its stages before the next. So what a stage
    # remembers still holds when a later stage fails.

    def _check_length(self, sources: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for source in sources:
            self._url, self._read = source["url"], 0
            yield source
            # Reading goes on to the next shard. A tar file cut off between two of its files ends
            # without an error.
            length = self._lengths.get(self._url, self._read)
            if self._read != length:
                raise DataError(
                    f"shard {self._url} must hold {length} samples, as its index says, "
                    f"got {self._read}"
                )

    def _count(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            self._read += 1
            yield sample

    def _check_sample(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        suffixes = self.input_key.split(";")
        for self._sample in samples:
            if not any(suffix in self._sample for suffix in suffixes):
                raise DataError(f"{self._name()} has no image ({', '.join(suffixes)})")
            try:
                # Samples labelled -1 in a json file are left out by design.
                lowest, label = 0, self._sample.get("cls")
                if self.split_info.alt_label:
                    lowest = -1
                    label = json.loads(self._sample["json"])[self.split_info.alt_label]
                if int(label) < lowest:  # type: ignore[arg-type]
                    raise ValueError
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{self._name()} has no class index, got {label!r}") from error
            yield self._sample

    def _name(self) -> str:
        return f"sample {self._sample['__key__']} of {self._sample['__url__']}"

    def _refuse_image(self, error: Exception) -> bool:
        """Raise, or count the sample that was decoded last and have it left out."""
        if self.unreadable is None:
            raise DataError(
                f"cannot read the image of {self._name()}: {why_unreadable(error)} "
                "(skip_unreadable goes on without it)"
            ) from error
        name = self._name()
        self.unreadable.add(zlib.crc32(name.encode()) % _FLAGS, name)
        return True

    def _refuse_shard(self, error: Exception) -> NoReturn:
        # webdataset appends to an error's arguments, and asks again with what is raised here.
        if isinstance(error, DataError):
            raise DataError(error.args[0]) from error
        reason = getattr(error, "strerror", None) or error.args[0]
        raise DataError(f"cannot read shard {self._url}: {reason}") from error


def _stage(stages: list[Any], function: str) -> int:
    """Where the pipeline has this function of webdataset's."""
    [position] = [
        index
        for index, stage in enumerate(stages)
        if getattr(getattr(stage, "f", None), "__name__", None) == function
    ]
    return position
