"""timm's loader of images, with workers that end when they should."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from timm.data import IterableImageDataset, create_loader
from torch.utils.data import DataLoader

from dynamicvit.evaluation.data import ImageData

_LOADER_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def create_image_loader(
    data: ImageData,
    batch_size: int,
    data_config: dict[str, Any],
    *,
    training: bool,
    workers: int,
    device: torch.device,
    **augmentation: Any,
) -> DataLoader:
    """timm's loader, yielding normalised float32 images [B, C, H, W] and class indices [B].

    Args:
        data: what `open_data` gave.
        batch_size: images a batch (a training loader leaves out a last, smaller one).
        data_config: from `timm.data.resolve_input_data_config`: size, mean, std, interpolation.
        training: shuffle and augment.
        workers: loader processes; 0 loads in this one.
        device: where batches will go (memory is pinned for CUDA).
        augmentation: further arguments of `timm.data.create_loader`.
    """
    config = {k: v for k, v in data_config.items() if k in _LOADER_KEYS}
    shards = getattr(getattr(data.dataset, "reader", None), "split_info", None)
    if isinstance(data.dataset, IterableImageDataset) and shards is not None:
        # A worker without a shard reads nothing, and timm then ends the epoch early.
        workers = min(workers, len(getattr(shards, "filenames", range(workers))))
    loader = create_loader(
        data.dataset,
        batch_size=batch_size,
        is_training=training,
        use_prefetcher=False,  # accelerate moves batches, on any device
        num_workers=workers,
        persistent_workers=False,  # new workers are seeded in each epoch, so runs can resume
        pin_memory=device.type == "cuda",
        **config,
        **augmentation,
    )
    loader.worker_init_fn = partial(_start_worker, cast(Any, loader.worker_init_fn))
    _keep_one_bit(data.dataset.transform)
    return loader


def _start_worker(start: Callable[[int], None], number: int) -> None:
    """Start a loader process that survives a SIGTERM to the whole process group.

    The main process still needs its images, to end the step and save.
    """
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_told_by_parent, daemon=True).start()
    start(number)


def _end_when_told_by_parent() -> None:
    # A SIGTERM from the parent must end this process: Python sends it to the workers that are left
    # when it exits, and then waits for them. A signal handler does not learn who sent a signal.
    if sys.platform == "linux":
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)


def _keep_one_bit(transforms: Any) -> None:
    """Make timm's posterize keep at least one bit: at full magnitude it asks Pillow for none, which
    Pillow 13 refuses (older ones gave a black image)."""
    for transform in getattr(transforms, "transforms", []):
        policies = [getattr(transform, "ops", []), *getattr(transform, "policy", [])]
        for operation in (operation for policy in policies for operation in policy):
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_at_least_one_bit, operation.level_fn)


def _at_least_one_bit(level_to_bits: Callable[..., tuple[int]], *arguments: Any) -> tuple[int]:
    return (max(1, level_to_bits(*arguments)[0]),)
