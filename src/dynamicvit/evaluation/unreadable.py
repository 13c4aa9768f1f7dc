"""Images that cannot be read: the error that names one, and their count."""

from __future__ import annotations

import os

import torch


class DataError(ValueError):
    """The data is not what was promised; the message names the folder, class or file."""


class Unreadable:
    """Which images could not be read, in memory that loader processes share.

    Args:
        size: numbers that images may have.
    """

    _ROWS, _BYTES = 64, 512

    def __init__(self, size: int) -> None:
        self.flags = torch.zeros(size, dtype=torch.uint8).share_memory_()
        self._names = torch.zeros(self._ROWS, self._BYTES, dtype=torch.uint8).share_memory_()

    def add(self, number: int, name: str) -> None:
        """Note an image; once, however often it is met."""
        if not self.flags[number]:
            row = torch.zeros(self._BYTES, dtype=torch.uint8)
            text = os.fsencode(name)[-self._BYTES :]  # of a long path the end tells more
            row[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
            # A later name may replace an earlier one in a row: the names are examples.
            self._names[number % self._ROWS] = row
            self.flags[number] = 1

    def names(self) -> list[str]:
        """The names of some of the images."""
        texts = (bytes(row.tolist()).rstrip(b"\0") for row in self._names)
        return [text.decode(errors="backslashreplace") for text in texts if text]
