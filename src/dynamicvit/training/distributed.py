"""What a run of several processes needs: accelerate's setup, sums, shards, and their ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


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
