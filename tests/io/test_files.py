from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from dynamicvit.io.files import (
    check_file,
    check_folder,
    write_checkpoint,
    write_text,
    written_whole,
)
from tests.io.limits import limited_file_size


def test_a_full_disk_is_said_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.json"
    write_text(path, "before")
    with limited_file_size(1000), pytest.raises(OSError, match=r"out.results\.json") as caught:
        write_text(path, "x" * 5000)
    assert caught.value.errno == errno.EFBIG
    with limited_file_size(1000), pytest.raises(OSError, match=r"out.state\.pt"):
        write_checkpoint(path.with_name("state.pt"), {"values": torch.zeros(5000)})
    assert path.read_text() == "before"
    assert os.listdir(path.parent) == ["results.json"]


def test_other_errors_keep_the_file_they_name(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="elsewhere"),
        written_whole(tmp_path / "file"),
    ):
        (tmp_path / "elsewhere").read_text()
    with (
        pytest.raises(RuntimeError, match="a defect"),
        written_whole(tmp_path / "file"),
    ):
        raise RuntimeError("a defect")


def test_names_that_are_not_utf_8_are_written_as_they_are(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write_text(tmp_path / "list.txt", f"{name} é")
    assert (tmp_path / "list.txt").read_bytes() == b"caf\xe9.png \xc3\xa9"


def test_where_nothing_can_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output must be a file, got the folder"):
        check_file("output", tmp_path)
    with pytest.raises(ValueError, match=r"output must be a folder, got .*, and .*file is a file"):
        check_folder("output", tmp_path / "file" / "in")


def test_a_link_stays_and_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"output must be a file, got .*pipe, a device or a pipe"):
        check_file("output", tmp_path / "pipe")
    with pytest.raises(OSError, match="a device or a pipe"):
        write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
