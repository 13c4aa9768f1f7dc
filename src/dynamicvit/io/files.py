"""Atomic file writes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError


def check_folder(name: str, folder: str | Path) -> None:
    """Raise ValueError, which names the argument, if a file has the name of the folder or of one
    above it."""
    for path in (Path(folder), *Path(folder).parents):
        if path.is_dir():
            return
        if path.exists():
            raise ValueError(f"{name} must be a folder, got {folder}, and {path} is a file")


def check_file(name: str, file: str | Path) -> None:
    """Raise ValueError, which names the argument, if its name is that of a folder, a device or a
    pipe, or its folder cannot be made."""
    if Path(file).is_dir():
        raise ValueError(f"{name} must be a file, got the folder {file}")
    if Path(file).exists() and not Path(file).is_file():
        raise ValueError(f"{name} must be a file, got {file}, a device or a pipe")
    check_folder(f"the folder of {name}", Path(file).parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8: to a temporary name first, then renamed.

    File names that are not UTF-8, which Python holds with surrogates, are written as their bytes.
    """
    write_bytes(path, text.encode(errors="surrogateescape"))


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

    Folders that are absent are made. Where `path` is a link, the file that it points to is written.

    Raises:
        OSError: naming `path`, if it cannot be written (no space left, no permission), or is a
            device or a pipe, which a file would replace.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "is a device or a pipe", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with name_in_errors(path, temporary):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def name_in_errors(path: Path, *temporary: Path) -> Iterator[None]:
    """Make errors of writing name `path`, instead of a temporary file or none (a full disk)."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in temporary:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except (SafetensorError, RuntimeError) as error:
        # What safetensors and torch make of an error of the system.
        if isinstance(error.__context__, OSError):
            code, text = error.__context__.errno, error.__context__.strerror
        elif match := re.search(r"I/O error: (.*) \(os error (\d+)\)", str(error)):
            code, text = int(match[2]), match[1]
        else:
            raise
        raise OSError(code, text, str(path)) from error


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
