"""accelerate's Accelerator, for whatever launched this process."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env
from rich.console import Console

from dynamicvit.evaluation.processor import has_bfloat16

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


def find_device(device: str | None) -> torch.device:
    """A device of this machine; by default its accelerator, or else its CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    there = {"cpu": 1}
    if torch.accelerator.is_available():
        there[str(torch.accelerator.current_accelerator())] = torch.accelerator.device_count()
    if device is None:
        return torch.device(list(there)[-1])
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if (found.index or 0) >= there.get(found.type, 0):
        raise ValueError(f"device must be one of {', '.join(there)} here, got {device!r}")
    return found


def start_processes(precision: str, device: str | None = None, **options: Any) -> Accelerator:
    """accelerate's Accelerator, for whatever launched this process.

    accelerate keeps one state for the whole process. A later call changes it: precision and device
    are those of the last call, also for an Accelerator that was made before.

    Warns where the processor computes bfloat16 slower than float32.

    Args:
        precision: float32 or bfloat16.
        device: such as cpu or cuda:1; by default the machine's accelerator, if it has one.
        options: further ones of the Accelerator.

    Raises:
        ValueError: if there is no such device, or the launcher asks for what training does not do.
    """
    check_precision(precision)
    chosen = None if device is None else find_device(device)
    mixed = PRECISIONS[precision]
    version = os.environ.get("FSDP_VERSION", "1")
    if launched_with_fsdp() and version != "2":
        raise ValueError(f"the launcher's fsdp_version must be 2, got {version}")
    # accelerate's launcher sets "no" by default.
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", mixed):
        raise ValueError(f"the launcher's mixed_precision must be {mixed!r}, got {asked!r}")
    # Without this, accelerate treats launched processes on a CPU as single ones.
    cpu = device == "cpu" or not torch.accelerator.is_available()
    if is_initialized():  # accelerate refuses to change its state
        AcceleratorState()._mixed_precision, cpu = mixed, False
    accelerator = Accelerator(
        mixed_precision=mixed,
        cpu=cpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        **options,
    )
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
    if chosen is not None and launched > 1 and chosen.index is not None:
        raise ValueError(f"device must have no number with several processes, got {device!r}")
    if launched == 1:
        accelerator.state.device = chosen or find_device(None)
    on_cpu = accelerator.device.type == "cpu"
    if mixed == "bf16" and on_cpu and accelerator.is_main_process and not has_bfloat16():
        message = "warning: this processor has no bfloat16, which is slower than float32 here"
        Console(stderr=True).print(message, soft_wrap=True)
    return accelerator


def launched_with_fsdp() -> bool:
    """Whether accelerate's launcher was configured for FSDP."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))
