"""The folder of a run: the names of its files, its own config, and the lock on it."""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dynamicvit.io.folder import CONFIG as MODEL_CONFIG
from dynamicvit.training.config import read_options

BEST, DENSE, CONFIG, BAD_BATCH, LOCK = "best", "dense", "config.yaml", "bad_batch", "train.lock"


def own_config(output: Path) -> dict[str, Any] | None:
    """The options of the run in a folder, as they were filled in; None if it has none yet.

    Raises:
        ValueError: if the file is damaged.
    """
    path = output / CONFIG
    if not path.exists():
        return None
    try:
        return read_options(path)
    except ValueError as error:
        raise ValueError(f"{error} (without this file, give all options again)") from error


def resume_arguments(arguments: list[str]) -> list[str]:
    """What comes before the arguments of a command line with --resume: the run's own options.

    Raises:
        ValueError, OSError: if a config file cannot be read, or there is neither a run nor data.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", nargs="?", const="true", default="false")
    # The command's own parser refuses an option without a value.
    finder.add_argument("--output", nargs="?")
    finder.add_argument("--data", nargs="?")
    finder.add_argument("--config", action="append", nargs="?", default=[])
    found, _ = finder.parse_known_args(arguments)
    output, data = found.output, found.data
    for file in filter(None, found.config):
        if Path(file).is_file():
            options = read_options(Path(file))
            output, data = output or options.get("output"), data or options.get("data")
    if found.resume.lower() != "true" or not output:
        return []
    if own_config(Path(output)) is None:
        if not data:
            raise ValueError(
                f"output must be the folder of a run to resume, got {output}, which has no {CONFIG}"
            )
        return []
    return [f"--config={Path(output) / CONFIG}"]


def has_best(output: Path) -> bool:
    """Whether a run's folder holds a best model."""
    return (output / BEST / MODEL_CONFIG).is_file()


@contextmanager
def folder_locked(output: Path) -> Iterator[None]:
    """Inside, no other process can train into this folder.

    The lock belongs to the process: it ends with it, however the process ends. A folder that is
    empty afterwards is removed.

    Raises:
        ValueError: if another process has the lock, naming it.
    """
    path = output / LOCK
    output.mkdir(parents=True, exist_ok=True)
    file = _lock(path)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with suppress(OSError):
            output.rmdir()


def check_unlocked(output: Path) -> None:
    """Raise ValueError if another process trains into this folder, naming it."""
    if (output / LOCK).exists():
        _lock(output / LOCK).close()


def _lock(path: Path) -> IO[str]:
    """The locked file.

    Raises:
        ValueError: if another process has it.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            # Not flock: loader processes inherit that, and may outlive this process by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            holder = ""
            with suppress(OSError):
                holder = path.read_text(encoding="utf-8", errors="replace").strip()
            raise ValueError(
                f"output must be a folder that no other training uses, got {path.parent}, in use "
                f"by {holder or 'an unknown process'}: wait for it or stop it"
            ) from error
        except OSError:  # a file system without locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the process that had it has just removed it
