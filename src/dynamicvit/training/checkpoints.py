"""Checkpoints of a run: atomic writes, a limited number, verified when read, any processes."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from dynamicvit.io.files import name_in_errors, read_checkpoint, write_checkpoint
from dynamicvit.io.weights import check_weights
from dynamicvit.training.distributed import on_first_process

FORMAT = "dynamicvit training checkpoint 3"
CHECKPOINTS = "checkpoints"
_PROGRESS = "place"  # the key in the file, as earlier versions wrote it

# Its path, the progress of the run, and the tensors (in the first process).
Checkpoint = tuple[Path, dict[str, Any], dict[str, Any]]


def find_checkpoints(output: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((output / CHECKPOINTS).glob("epoch-*.pt"))


def save_checkpoint(
    output: Path, progress: dict[str, Any], parts: dict[str, Any], keep: int
) -> None:
    """Write a checkpoint, whole or not at all, and remove all but the last `keep`.

    Call in every process: each gives its shard, the first one writes.

    Args:
        output: folder of the run.
        progress: where the run is: plain values, of which `epoch` and `seen` (images of it) name
            the file.
        parts: modules, and optimizers as (the module they train, optimizer); None is kept as None.
        keep: how many checkpoints stay.
    """
    state = {name: _gather(part) for name, part in parts.items()}
    if dist.is_initialized() and dist.get_rank():
        return
    for left in (output / CHECKPOINTS).glob(".epoch-*.tmp"):  # of a process that was killed
        left.unlink()
    path = output / CHECKPOINTS / f"epoch-{progress['epoch']:04}-image-{progress['seen']:010}.pt"
    with name_in_errors(path):
        write_checkpoint(path, {"format": FORMAT, _PROGRESS: progress, **state})
    for old in find_checkpoints(output)[:-keep]:
        old.unlink()


def load_checkpoint(output: Path) -> Checkpoint | None:
    """Read the last whole checkpoint. Call in every process: the first one reads.

    Returns:
        Its path, what `save_checkpoint` was given as `progress`, and what `load_parts` wants (in
        the first process; nothing in the others). None if there is no checkpoint.

    Raises:
        ValueError: if none is whole.
    """
    state: dict[str, Any] = {}

    def read() -> tuple[Path, dict[str, Any]] | None:
        if not find_checkpoints(output):
            return None
        path, found = _last_whole(output)
        state.update(found)
        return path, state.pop(_PROGRESS)

    found = on_first_process(read)
    return None if found is None else (*found, state)


def load_parts(path: Path, state: dict[str, Any], parts: dict[str, Any]) -> None:
    """Load what `load_checkpoint` gave into modules and optimizers, as `save_checkpoint` has them.

    Raises:
        ValueError: if it does not fit a module, naming each key.
    """
    several = dist.is_initialized() and dist.get_world_size() > 1
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    for name, part in parts.items():
        module, optimizer = part if isinstance(part, tuple) else (part, None)
        present: list[Any] = [state.get(name) is not None]
        if several:
            dist.broadcast_object_list(present)
        if module is None or not present[0]:
            continue
        tensors = state.get(name, {})
        if optimizer is not None:
            set_optimizer_state_dict(module, optimizer, optim_state_dict=tensors, options=options)
            continue
        problem: list[Any] = [None]
        if tensors:
            try:
                check_weights(module, tensors, str(path))
            except ValueError as error:
                problem = [error]
        if several:
            dist.broadcast_object_list(problem)
        if problem[0] is not None:
            raise problem[0]
        set_model_state_dict(module, tensors, options=options)


def full_weights(module: nn.Module) -> dict[str, Any]:
    """A module's weights in full, on its device, in every process."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))


def _gather(part: nn.Module | tuple[nn.Module, Optimizer] | None) -> dict[str, Any] | None:
    """In full, on the CPU, in the first process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if part is None:
        return None
    if isinstance(part, nn.Module):
        return get_model_state_dict(part, options=options)
    module, optimizer = part
    if not optimizer.state:  # asking for it would make a step
        return None
    return get_optimizer_state_dict(module, optimizer, options=options)


def _last_whole(output: Path) -> tuple[Path, dict[str, Any]]:
    damaged: list[tuple[Path, str]] = []
    for path in reversed(find_checkpoints(output)):
        try:
            state = _read(path)
        except ValueError as error:
            damaged.append((path, str(error).splitlines()[0]))
            continue
        for bad, message in damaged:
            # Under another name, so that no whole one is removed in its stead.
            bad.rename(bad.with_name(f"{bad.name}.damaged"))
            Console(stderr=True).print(
                f"warning: {message}; renamed to {bad.name}.damaged, going on from {path}",
                soft_wrap=True,
            )
        return path, state
    raise ValueError(
        f"no checkpoint of {output} is whole: " + "; ".join(message for _, message in damaged)
    )


def _read(path: Path) -> dict[str, Any]:
    """Read one, and compare each of its parts with the checksum that torch's writer put beside."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # a wrong header makes zipfile raise nearly anything
        raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from error
    if part is not None:
        raise ValueError(f"{path} is damaged: the checksum of {part} is wrong")
    state = read_checkpoint(path, FORMAT)
    if not isinstance(state.get(_PROGRESS), dict):
        raise ValueError(f"{path} is damaged: it does not say where the run was")
    return state
