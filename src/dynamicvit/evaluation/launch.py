"""accelerate's Accelerator, for whatever launched this process."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env
from rich.console import Console

from dynamicvit.evaluation.processor import has_bfloat16

# A process that waits this long for another one has lost it. Longer than anything that one process
# does alone: reading a first batch, writing a checkpoint.
TIMEOUT = timedelta(minutes=10)
_ACCELERATES = {"float32": "no", "bfloat16": "bf16"}  # accelerate's words for precisions
_UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def start_processes(precision: str, **options: Any) -> Accelerator:
    """accelerate's Accelerator, for whatever launched this process.

    Warns where the processor computes bfloat16 slower than float32.

    Args:
        precision: "float32" or "bfloat16".
        options: further ones of the Accelerator.

    Raises:
        ValueError: if the launcher asks for what training does not do.
    """
    precision = _ACCELERATES.get(precision, precision)
    version = os.environ.get("FSDP_VERSION", "1")
    if launched_with_fsdp() and version != "2":
        raise ValueError(f"the launcher's fsdp_version must be 2, got {version}")
    # "no" is what accelerate's launcher says if it is told nothing.
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise ValueError(f"the launcher's mixed_precision must be {precision!r}, got {asked!r}")
    # Unless it is told that there is no device, accelerate takes launched processes for lone ones.
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not torch.accelerator.is_available(),
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
    on_cpu = accelerator.device.type == "cpu"
    if precision == "bf16" and on_cpu and accelerator.is_main_process and not has_bfloat16():
        message = "warning: this processor has no bfloat16; precision bf16 is slower than float32"
        Console(stderr=True).print(message, soft_wrap=True)
    return accelerator


def launched_with_fsdp() -> bool:
    """Whether accelerate's launcher was configured for FSDP."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))
