"""The photos that the demo's page offers: thumbnails, and copies that it may serve."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from dynamicvit.evaluation.console import track
from dynamicvit.io.embedded import embedded_images
from dynamicvit.io.images import IMAGE_SUFFIXES, convert_image

_THUMBNAIL = 128  # pixels of a thumbnail's longer side
_MOST_PHOTOS = 100


class Photos:
    """Photos to pick from on the page. Those that cannot be read are left out.

    Args:
        files: the photos.
        folder: for thumbnails and for copies of what is picked. The page serves all of it.
        quiet: show no progress.

    Attributes:
        thumbnails: of the photos, in order.

    Raises:
        ValueError: if no photo can be read.
    """

    def __init__(self, files: Sequence[Path], folder: Path, quiet: bool = False) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._files: list[Path] = []
        self.thumbnails: list[Path] = []
        for file in track(files, "reading", quiet, "photos"):
            try:
                picture = _read_thumbnail(file)
            except Exception:  # foreign bytes make Pillow raise nearly anything
                continue
            self.thumbnails.append(folder / f"thumbnail-{len(self._files)}.png")
            picture.save(self.thumbnails[-1])
            self._files.append(file)
        if not self._files:
            raise ValueError(f"images must hold photos, got none that can be read in {len(files)}")

    def pick(self, index: int) -> Path:
        """A copy of a photo, with its own name, that the page may serve."""
        file = self._files[index]
        copy = self._folder / f"photo-{index}" / file.name
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        return copy


def find_photos(folder: Path) -> list[Path]:
    """The first 100 image files below a folder.

    Raises:
        ValueError: if it is no folder, or holds none.
    """
    if not folder.is_dir():
        raise ValueError(f"images must be a folder, got {str(folder)!r}")
    files = (item for item in folder.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES)
    found = sorted(item for item in files if item.is_file())[:_MOST_PHOTOS]
    if not found:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"images must hold {kinds} files, got the folder {folder} without any")
    return found


def write_embedded_photos(folder: Path) -> list[Path]:
    """One embedded image of each class, as files."""
    folder.mkdir()
    files = []
    for name, index, picture in embedded_images("val"):
        if index == 3:
            files.append(folder / f"{name[2:]}.png")
            picture.save(files[-1])
    return files


def _read_thumbnail(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        opened.draft("RGB", (2 * _THUMBNAIL, 2 * _THUMBNAIL))  # fast, where the format allows it
        picture = convert_image(ImageOps.exif_transpose(opened), "RGB")
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture
