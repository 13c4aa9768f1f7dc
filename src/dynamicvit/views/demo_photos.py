"""The photos that the demo's page offers: thumbnails, and copies that it may serve."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from dynamicvit.evaluation.console import track
from dynamicvit.io.embedded import embedded_images
from dynamicvit.io.images import IMAGE_SUFFIXES, convert_image

_THUMBNAIL = 128  # pixels of a photo's longer side, where it is offered
_MOST_PHOTOS = 100  # that are offered


class Photos:
    """Photos to pick from on the page.

    Args:
        folder: to write thumbnails to, and copies of what is picked; all of it is served.
        files: the photos; None for some that the package carries.
        quiet: show no progress.

    Attributes:
        thumbnails: of the photos, in order.
        label: what they are.
        first: the photo to begin with.

    Raises:
        ValueError: if none of them can be read.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None, quiet: bool = False) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self.first = 0
        self.label = "photos"
        if files is None:
            files = _write_embedded(folder)
            self.first = len(files) - 1  # an ankle boot
            self.label = "photos (Fashion-MNIST)"
        self._files: list[Path] = []
        self.thumbnails: list[Path] = []
        for file in track(files, "reading photos", quiet):
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
        """A copy of a photo, of its own name, that the page may serve.

        Raises:
            ValueError: if there is no such photo.
        """
        if type(index) is not int or not 0 <= index < len(self._files):
            raise ValueError(f"photo must be from 0 to {len(self._files) - 1}, got {index!r}")
        file = self._files[index]
        copy = self._folder / f"photo-{index}" / file.name
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        return copy


def find_photos(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"images must be a folder, got {str(folder)!r}")
    files = (item for item in folder.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES)
    found = sorted(item for item in files if item.is_file())[:_MOST_PHOTOS]
    if not found:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"images must hold {kinds} files, got the folder {folder} without any")
    return found


def _write_embedded(folder: Path) -> list[Path]:
    """One of the embedded images a class, as files."""
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
