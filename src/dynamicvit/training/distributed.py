"""What a run of several processes needs beside accelerate: shards, agreement, and how it ends."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def divide(module: nn.Module, units: list[nn.Module]) -> None:
    """Divide a module's weights over the processes (FSDP2), gathered unit by unit when used.

    torch's own function, which accelerate's plugin wraps: the plugin works on GPUs only, casts
    inputs and all weights where precision is mixed, and needs the names of the units.
    """
    for unit in units:
        fully_shard(unit)
    fully_shard(module)


@contextmanager
def gradients_summed(accelerator: Accelerator, model: nn.Module, now: bool) -> Iterator[None]:
    """Inside, a backward pass sums gradients over processes only if `now`."""
    if isinstance(model, FSDPModule):
        cast(Any, model).set_requires_gradient_sync(now)
        yield
        return
    with nullcontext() if now else accelerator.no_sync(model):
        yield


def clip_gradients(model: nn.Module, limit: float | None) -> Tensor:
    """The norm of the whole gradient, a scalar, the same in every process; if a limit is given, the
    gradient is scaled down to it."""
    norm = nn.utils.clip_grad_norm_(list(model.parameters()), math.inf if limit is None else limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def on_first_process(function: Callable[[], T]) -> T:
    """What a function gives in the first process, or raises there, in each process.

    To be called in all processes together. Only what a user can cause crosses to the others:
    ValueError and OSError.
    """
    found: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found[0] = function()
        except (ValueError, OSError) as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return cast(T, found[0])


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM does not end the process: the given function says whether it came. A second
    one ends it at once."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # no other may ask for signals
        yield noted.is_set
        return

    def note(number: int, frame: object) -> None:
        if noted.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        noted.set()

    before = signal.signal(signal.SIGTERM, note)
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
