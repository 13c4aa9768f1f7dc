"""Where images come from: folders of class folders, and data sets that timm knows by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, IterableImageDataset, create_dataset

from dynamicvit.evaluation.unreadable import DataError
from dynamicvit.io.hub import offline_if_unreachable, one_line
from dynamicvit.io.images import IMAGE_SUFFIXES

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "test")}
_FACTORIES = ("torch", "hfds", "hfids", "wds", "tfds")
# The package that a source needs, and the extra of ours that it comes with.
EXTRAS = {
    "hfds": ("datasets", "hf"),
    "hfids": ("datasets", "hf"),
    "wds": ("webdataset", "webdataset"),
}


def is_named(data: str) -> bool:
    """Whether this is timm's name of a data set, such as torch/cifar10, and not a folder."""
    return data.partition("/")[0].lower() in _FACTORIES and not Path(data).exists()


def _split_folder(root: Path, split: str) -> Path:
    """The folder of a split, whatever its usual spelling."""
    if not root.is_dir():
        raise DataError(
            f"data must be a folder of images, or a data set name such as torch/cifar10, "
            f"got {root}, which is no folder"
        )
    # Other names are taken as they are: "test" must not open the split that chose a model.
    for name in _SPLITS.get(split, (split,)):
        if (root / name).is_dir():
            return root / name
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    raise DataError(
        f"data must be a folder with images in {split}/CLASS, got {root}, which has "
        + (f"the folders {', '.join(found)}" if found else "no folders")
    )


def open_folder(root: Path, split: str, mode: str, expected: Sequence[str] | None) -> ImageDataset:
    """timm's data set of a split, root/SPLIT/CLASS/IMAGE, with classes in the order expected."""
    folder = _split_folder(root, split)
    classes = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not classes:
        raise DataError(f"data must have a folder for each class, got none in {folder}")
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"data must have class folders named in UTF-8, got {name!r}") from error
    try:
        dataset = create_dataset(
            "",
            root=str(folder),
            search_split=False,
            input_img_mode=mode,
            input_key=";".join(IMAGE_SUFFIXES),
        )
    except RuntimeError as error:
        raise DataError(
            f"data must have images ({', '.join(IMAGE_SUFFIXES)}), got none in the class folders "
            f"of {folder}"
        ) from error
    reader = dataset.reader
    nested = sorted(set(reader.class_to_idx) - set(classes))
    if nested:
        raise DataError(f"data must have images right in {folder}/CLASS, got {nested[0]!r} in one")
    if expected is None:
        for name in classes:
            if name not in reader.class_to_idx:
                raise DataError(f"data must have images of each class, got none in {folder / name}")
    elif set(reader.class_to_idx) <= set(expected):  # of others the caller complains
        names = class_names_of(dataset) or []
        indices = {name: index for index, name in enumerate(expected)}
        reader.samples = [(file, indices[names[index]]) for file, index in reader.samples]
        reader.class_to_idx = indices
    return dataset


def open_named(
    data: str, split: str, data_dir: str | None, *, skip_unreadable: bool, **options: Any
) -> Any:
    """timm's data set of a name, from the source that its prefix tells. `options` are of timm's
    `create_dataset`."""
    prefix, _, name = data.partition("/")
    prefix = prefix.lower()
    if not name:
        raise DataError(f"data must name a data set after {prefix}/, got {data!r}")
    package, extra = EXTRAS.get(prefix, ("torch", ""))
    if importlib.util.find_spec(package) is None:
        raise DataError(f"{data!r} needs {package}: pip install 'dynamicvit[{extra}]'")
    if data_dir is None and prefix != "hfds":
        raise DataError(f"data_dir must be the folder where {data!r} lies, got None")
    # timm spells the usual two splits "train" and "validation" for every source.
    split = "validation" if split == "val" else split
    try:
        if prefix == "wds":
            # An extra, and the module needs this one.
            from dynamicvit.evaluation.shards import Shards

            _check_index(str(data_dir), split)
            reader = Shards(
                name=name, root=data_dir, split=split, skip_unreadable=skip_unreadable, **options
            )
            return IterableImageDataset(data_dir, reader=reader)
        with offline_if_unreachable(prefix in ("hfds", "hfids")):
            return create_dataset(data, root=data_dir, split=split, **options)
    except DataError:
        raise
    except Exception as error:  # each source stumbles in its own way
        where = "" if data_dir is None else f" in {data_dir!r}"
        raise DataError(f"cannot open {data!r}{where}: {one_line(error)}") from error


def _check_index(folder: str, split: str) -> None:
    """Raise DataError unless a folder of WebDataset shards has the index that says what they hold.

    timm goes on without, and finds no split in it.
    """
    if "://" in folder or "tar" in split:  # on another machine, or files named one by one
        return
    if not Path(folder).is_dir():
        raise DataError(f"data_dir must be a folder, got {folder}, which is none")
    if not any((Path(folder) / name).is_file() for name in ("_info.json", "info.json")):
        raise DataError(
            f"data_dir must hold _info.json, the index of WebDataset shards, got {folder} without"
        )


def class_names_of(dataset: Any) -> list[str] | None:
    """In the order of their indices; None where the source does not tell."""
    if isinstance(dataset, ImageDataset | IterableImageDataset):
        index = getattr(dataset.reader, "class_to_idx", None)
        return sorted(index, key=index.__getitem__) if index else None
    return list(dataset.classes) if hasattr(dataset, "classes") else None


def describe_difference(found: list[str], expected: list[str]) -> str:
    """How class names differ from those expected, in words."""
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    if missing or extra:
        return f"missing {missing}, unexpected {extra}"
    return f"got the order {found}, expected {expected}"
