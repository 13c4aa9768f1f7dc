"""accelerate's Accelerator, for whatever launched this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env

# A process that waits this long for another one has lost it. Longer than anything that one process
# does alone: reading a first batch, writing a checkpoint.
TIMEOUT = timedelta(minutes=10)
# Our names, and accelerate's.
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}
_UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def check_precision(precision: str) -> None:
    """Raise ValueError unless precision is one that training and evaluation have."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def check_device(device: str | None) -> None:
    """Raise ValueError unless this machine has the device (None: whatever it has)."""
    if device is None:
        return
    kinds = {"cpu": 1}
    if torch.accelerator.is_available():
        kinds[str(torch.accelerator.current_accelerator())] = torch.accelerator.device_count()
    try:
        asked = torch.device(device)
        usable = (asked.index or 0) < kinds.get(asked.type, 0)
    except RuntimeError:
        usable = False
    if not usable:
        raise ValueError(f"device must be one of {', '.join(kinds)} here, got {device!r}")


def start_processes(precision: str, device: str | None = None, **options: Any) -> Accelerator:
    """accelerate's Accelerator, for whatever launched this process.

    Args:
        precision: float32 or bfloat16.
        device: as torch names it; by default what accelerate finds.
        options: further ones of the Accelerator.

    Raises:
        ValueError: if the launcher asks for what training does not do, or the device does not have
            the precision.
    """
    check_device(device)
    precision = PRECISIONS.get(precision, precision)
    version = os.environ.get("FSDP_VERSION", "1")
    if launched_with_fsdp() and version != "2":
        raise ValueError(f"the launcher's fsdp_version must be 2, got {version}")
    # "no" is what accelerate's launcher says if it is told nothing.
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise ValueError(f"the launcher's mixed_precision must be {precision!r}, got {asked!r}")
    with _chosen(device):
        # Unless it is told that there is no device, accelerate takes launched processes for lone
        # ones.
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=device == "cpu" or not torch.accelerator.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
            **options,
        )
    wanted = accelerator.device if device is None else torch.device(device)
    if wanted.type != accelerator.device.type or wanted.index not in (
        None,
        accelerator.device.index,
    ):  # accelerate chooses once in a process
        raise ValueError(f"device must be {accelerator.device}, as before, got {device!r}")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {launched} processes, which accelerate cannot join on this "
            f"device, got {accelerator.num_processes}"
        )
    if accelerator.distributed_type in _UNSUPPORTED:
        raise ValueError(
            f"the launcher must ask for DDP or FSDP, got {accelerator.distributed_type.value}"
        )
    if precision == "bf16":
        check_bfloat16(accelerator.device)
    return accelerator


def launched_with_fsdp() -> bool:
    """Whether accelerate's launcher was configured for FSDP."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


@contextmanager
def _chosen(device: str | None) -> Iterator[None]:
    """Inside, accelerate takes this device. It chooses one when a process first asks."""
    if device is None or device == "cpu":  # which accelerate has an argument for
        yield
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.device(device).index is not None:
            raise ValueError(f"device must have no number with several processes, got {device!r}")
        yield
        return
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    try:
        yield
    finally:
        del os.environ["ACCELERATE_TORCH_DEVICE"]
        if before is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before


def check_bfloat16(device: torch.device) -> None:
    """Raise ValueError if the device cannot compute in bfloat16: some processors cannot."""
    try:
        x = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16, device=device, requires_grad=True)
        F.conv2d(x, x.detach()).sum().backward()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"precision must be float32 on this device ({device}), which has no bfloat16 "
            f"({reason}), got 'bfloat16'"
        ) from error
