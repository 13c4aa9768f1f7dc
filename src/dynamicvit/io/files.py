"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def check_folder(name: str, folder: str | Path) -> None:
    """Raise ValueError, which names the argument, if a folder cannot be made because a file has its
    name."""
    for path in (Path(folder), *Path(folder).parents):
        if path.is_dir():
            return
        if path.exists():
            raise ValueError(f"{name} must be a folder, got {folder}, and {path} is a file")


def check_file(name: str, file: str | Path) -> None:
    """Raise ValueError, which names the argument, if a file cannot be written because a folder has
    its name, or a file that of its folder."""
    if Path(file).is_dir():
        raise ValueError(f"{name} must be a file, got the folder {file}")
    check_folder(f"the folder of {name}", Path(file).parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`: to a temporary name first, then renamed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`: to a temporary name first, then renamed."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """`torch.save` to a temporary name, flushed to disk, then renamed."""
    with written_whole(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, to write to; moved there at the end, or removed on an error.

    Folders that are absent are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path, format_name: str) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, without running code from it.

    Raises:
        ValueError: if the file is truncated, holds other pickled objects than tensors and plain
            values, or is not of the format `state["format"] == format_name`.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make the unpickler raise nearly anything
        raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != format_name:
        raise ValueError(f"{path} is not a {format_name}")
    return state
