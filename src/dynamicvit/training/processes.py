"""What a run of several processes needs: accelerate's setup, sums, shards, and their ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from dynamicvit.core.processor import has_bfloat16

# A process that waits this long for another one has lost it. Longer than anything that one process
# does alone: reading a first batch, writing a checkpoint.
TIMEOUT = timedelta(minutes=10)
_UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def start_processes(precision: str, **options: Any) -> Accelerator:
    """accelerate's Accelerator, for whatever launched this process.

    Warns where the processor computes bfloat16 slower than float32.

    Args:
        precision: "no" or "bf16".
        options: further ones of the Accelerator.

    Raises:
        ValueError: if the launcher asks for what training does not do.
    """
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


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor without gradient over all processes, in each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def divide(module: nn.Module, units: list[nn.Module]) -> None:
    """Divide a module's weights over the processes (FSDP2), gathered unit by unit when used.

    torch's own function, which accelerate's plugin wraps: that works on GPUs alone, casts inputs
    and all weights where precision is mixed, and has to be told the names of the units.
    """
    for unit in units:
        fully_shard(unit)
    fully_shard(module)


@contextmanager
def gradients_summed(model: nn.Module, now: bool) -> Iterator[None]:
    """Inside, a backward pass sums gradients over processes only if `now`."""
    if isinstance(model, FSDPModule):
        cast(Any, model).set_requires_gradient_sync(now)
        yield
    elif not now and hasattr(model, "no_sync"):  # DDP
        with cast(Any, model).no_sync():
            yield
    else:
        yield


def clip_gradients(model: nn.Module, limit: float | None) -> Tensor:
    """The norm of the whole gradient, a scalar, the same in every process; if a limit is given, the
    gradient is scaled down to it."""
    learnt = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in learnt])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(learnt, limit, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM does not end the process: the function given tells whether it came."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # no other may ask for signals
        yield noted.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noted.set())
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def lost_process_named(advice: str) -> Iterator[None]:
    """Turn what a collective raises when a process is gone into a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        several = dist.is_initialized() and dist.get_world_size() > 1
        if several and (isinstance(error, dist.DistError) or _from_backend(str(error))):
            reason = str(error).strip().splitlines()[0]
            raise ConnectionError(f"a process of this run was lost; {advice} ({reason})") from error
        raise


def _from_backend(message: str) -> bool:
    return any(name in message for name in ("gloo", "NCCL", "closed by peer", "reset by peer"))
