from __future__ import annotations

import gc
import importlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dynamicvit
from dynamicvit.deploy.search_data import search_data
from dynamicvit.evaluation.accuracy import evaluate_model
from dynamicvit.evaluation.data import open_data
from dynamicvit.evaluation.evaluate import evaluate
from dynamicvit.evaluation.loader import create_image_loader
from dynamicvit.evaluation.sources import EXTRAS
from dynamicvit.evaluation.unreadable import DataError, Unreadable
from dynamicvit.io.folder import save_folder
from dynamicvit.training.config import TrainConfig
from dynamicvit.training.run_folder import BEST
from dynamicvit.training.train import train
from tests.conftest import CLASSES, tiny_vit, write_images

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


def _batches(data: Any, workers: int = 0, batch_size: int = 8, **options: Any) -> list[Any]:
    loader = create_image_loader(
        data,
        batch_size,
        CONFIG,
        training=False,
        workers=workers,
        device=torch.device("cpu"),
        **options,
    )
    try:
        return list(loader)
    except Exception as error:
        # An error of a loader process refers to itself by its traceback. So the loader's iterator
        # would end in a garbage collection, which closes its queues while their threads do too:
        # then files that were opened in between are closed. Without its frames it ends here.
        traceback.clear_frames(error.__traceback__)
        raise


@pytest.mark.parametrize("split", ["val", "valid", "validation", "eval", "test"])
def test_the_validation_folder_may_have_any_usual_name(tmp_path: Path, split: str) -> None:
    write_images(tmp_path, {"train": 1, split: 3})
    data = open_data(str(tmp_path), "val")
    assert data.class_names == list(CLASSES)
    assert len(data.dataset) == 6


@pytest.mark.parametrize("split", ["test", "valid", "training"])
def test_another_split_is_not_answered_with_a_usual_one(tmp_path: Path, split: str) -> None:
    write_images(tmp_path, {"train": 1, "val": 3})
    with pytest.raises(DataError, match=rf"images in {split}/CLASS, got .* folders train, val"):
        open_data(str(tmp_path), split)
    write_images(tmp_path, {split: 2})
    assert len(open_data(str(tmp_path), split).dataset) == 4


def test_loader_gives_normalised_images_and_labels(images: Path) -> None:
    [(inputs, targets)] = _batches(open_data(str(images), "val"))
    assert inputs.shape == (8, 3, 32, 32)
    assert targets.tolist() == [0] * 4 + [1] * 4
    brightness = inputs.mean(dim=(1, 2, 3))  # 200 and 60 of 255, normalised to ±1
    torch.testing.assert_close(
        brightness, 2 * torch.tensor([200.0] * 4 + [60.0] * 4) / 255 - 1, atol=0.05, rtol=0
    )


def test_grey_images_for_a_model_of_one_channel(images: Path) -> None:
    image, _ = open_data(str(images), "val", in_chans=1).dataset[0]
    assert image.mode == "L"


def test_torchvision_sets_are_read_and_converted(tmp_path: Path) -> None:
    """The files of Fashion-MNIST, but with three images."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 28 * 28).astype(np.uint8)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 0x803, 3, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 3) + b"\0\1\2")
    data = open_data("torch/fashion_mnist", "val", data_dir=str(tmp_path), in_chans=3)
    image, label = data.dataset[2]
    assert (image.mode, label) == ("RGB", 2)
    assert data.class_names is not None
    assert data.class_names[0] == "T-shirt/top"


def _missing_split(root: Path) -> None:
    (root / "train").rename(root / "other")


def _empty_class(root: Path) -> None:
    (root / "train" / "empty").mkdir()


def _no_classes(root: Path) -> None:
    for folder in (root / "train").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def _nested(root: Path) -> None:
    (root / "train" / "dark" / "sub").mkdir()
    (root / "train" / "dark" / "00.png").rename(root / "train" / "dark" / "sub" / "00.png")


def _no_images(root: Path) -> None:
    for file in (root / "train").glob("*/*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing_split, r"data must .* train/CLASS, got .*images, .* folders other, val"),
        (_empty_class, "data must have images of each class, got none in .*train.empty"),
        (_no_classes, "data must have a folder for each class, got none in .*train"),
        (_nested, "data must have images right in .*train/CLASS, got 'sub' in one"),
        (_no_images, "data must have images .*.webp.* got none in the class folders of .*train"),
    ],
)
def test_a_folder_that_is_not_a_data_set_is_refused(
    images: Path, damage: Any, message: str
) -> None:
    damage(images)
    with pytest.raises(DataError, match=message):
        open_data(str(images), "train")


def test_data_of_a_hub_that_is_not_reached_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("dynamicvit.io.hub._reachable", lambda: False)
    with pytest.raises(DataError, match=r"cannot open 'hfds/a/b': the Hugging Face Hub cannot be"):
        open_data("hfds/a/b", "val")
    assert "Retrying" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "nowhere"}, "data must be a folder .*got nowhere"),
        ({"data": "torch/fashion_mnist", "data_dir": "nowhere"}, "cannot open 'torch/fashion_mn"),
        ({"data": "torch/no_such_set", "data_dir": "x"}, "cannot open 'torch/no_such_set'"),
        (
            {"data": "torch/cifar10"},
            "data_dir must be the folder where 'torch/cifar10' lies",
        ),
        ({"data": "nowhere", "in_chans": 7}, "in_chans must be 1, 3 or 4 to open image.*, got 7"),
    ],
)
def test_data_that_is_not_there_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(**arguments)


def test_other_classes_than_expected_are_named(images: Path) -> None:
    with pytest.raises(DataError, match=r"missing \['cat'\], unexpected \['dark'\]"):
        open_data(str(images), "val", class_names=["bright", "cat"])
    other = open_data(str(images), "val", class_names=["dark", "bright"])
    assert other.class_names == ["dark", "bright"], "in the order asked for"
    assert [int(other.dataset[index][1]) for index in range(8)] == [1] * 4 + [0] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(images: Path, workers: int) -> None:
    bad = images / "val" / "dark" / "01.png"
    bad.write_text("not an image")
    with pytest.raises(DataError, match=f"cannot read image {bad}"):
        _batches(open_data(str(images), "val"), workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_counted_on_request(images: Path, workers: int) -> None:
    (images / "val" / "dark" / "01.png").write_text("not an image")
    good = (images / "val" / "bright" / "00.png").read_bytes()
    (images / "val" / "bright" / "02.png").write_bytes(good[: len(good) // 2])
    data = open_data(str(images), "val", skip_unreadable=True)
    for _ in range(2):  # an image counts once, however often it is met
        batches = _batches(data, workers, batch_size=3)
        targets = torch.cat([targets for _, targets in batches])
        assert targets.tolist() == [0, 0, -1, 0, 1, -1, 1, 1]
        assert data.unreadable == 2
    data = open_data(str(images), "val", skip_unreadable=True, training=True)
    targets = torch.cat([targets for _, targets in _batches(data, workers)])
    assert targets.tolist() == [0] * 4 + [1] * 4, "in training the next image takes its place"


def test_a_data_set_without_a_readable_image_ends(images: Path) -> None:
    for file in images.glob("val/*/*"):
        file.write_text("not an image")
    with pytest.raises(DataError, match="data must have images that can be read, got none"):
        _batches(open_data(str(images), "val", skip_unreadable=True, training=True))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere any SIGTERM ends them")
def test_loader_processes_end_by_their_parent_s_sigterm_alone(images: Path) -> None:
    loader = create_image_loader(
        open_data(str(images), "train"),
        1,
        CONFIG,
        training=True,
        workers=1,
        device=torch.device("cpu"),
    )
    iterator: Any = iter(loader)
    next(iterator)
    [worker] = iterator._workers
    subprocess.run(["kill", str(worker.pid)], check=True)
    assert len(list(iterator)) == 15
    iterator = iter(loader)
    next(iterator)
    [worker] = iterator._workers
    worker.terminate()
    worker.join(timeout=3600)
    assert worker.exitcode == 0


def test_palette_and_alpha_images_are_converted(images: Path) -> None:
    file = images / "val" / "bright" / "00.png"
    with Image.open(file) as image:
        image.convert("RGBA").quantize(16).save(file)
    image, _ = open_data(str(images), "val").dataset[0]
    assert image.mode == "RGB"


def _hostile(root: Path) -> list[str]:
    """Every sort of image that users have in their folders, and every sort of file that is none.
    Gives the names of those that cannot be read."""
    numbers = np.random.default_rng(0)
    colour = Image.fromarray(numbers.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    folder = root / "train" / "odd"
    folder.mkdir()
    for mode in ("1", "L", "LA", "P", "RGBA"):
        colour.convert(mode).save(folder / f"{mode}.png")
    colour.convert("RGBA").quantize(16).save(folder / "transparent palette.png")
    for mode in ("CMYK", "L", "YCbCr"):
        colour.convert(mode).save(folder / f"{mode}.JPG")
    deep = Image.fromarray(numbers.integers(0, 2**16, (20, 20), dtype=np.uint16))
    for name in ("16 bits.png", "16 bits.tif"):
        deep.save(folder / name)
    for suffix in ("webp", "bmp", "gif", "tiff", "ppm"):
        colour.save(folder / f"other.{suffix}")
    colour.save(folder / "frames.gif", save_all=True, append_images=[colour.rotate(90)])
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("L", (20_000, 40)).save(folder / "wide.png")
    (folder / "notes.txt").write_text("not an image, and not called one")
    # From here on: what cannot be read.
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")  # 50 kB that unpack to 400 MB
    Image.new("L", (20_000, 1)).save(folder / "line.png")
    Image.new("F", (8, 8)).save(folder / "float.tif")
    colour.save(folder / "half.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:900])
    (folder / "._forks.jpg").write_bytes(b"\0\5\x16\7")
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("not an image")
    (folder / "broken link.png").symlink_to(root / "nowhere.png")
    # A class with one image; only some classes have images to validate on.
    (root / "train" / "rare").mkdir()
    colour.save(root / "train" / "rare" / "only.png")
    (root / "val" / "odd").mkdir()
    (root / "val" / "odd" / "bad.jpg").write_text("not an image")
    Image.new("L", (20_000, 40)).save(root / "val" / "odd" / "wide.png")
    return [
        *("bomb.png", "line.png", "float.tif", "half.png", "._forks.jpg", "empty.jpg", "text.png"),
        "broken link.png",
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hostile_folder_trains_to_the_end_and_is_reported(
    images: Path,
    options: dict[str, Any],
    workers: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = _hostile(images)
    save_folder(tiny_vit(num_classes=4), tmp_path / "four")
    options |= {"model": str(tmp_path / "four"), "workers": workers}
    evaluation = train(TrainConfig(**options, skip_unreadable=True))
    assert evaluation.images == 9
    report = capsys.readouterr().out
    started = (
        "training data: 44 images, 4 classes of 1 to 27; 1 with a single image: rare\n"
        "validation data: 10 images, 4 classes of 0 to 4; 1 without any: rare\n"
    )
    assert started in report
    kinds = "7 grey, 3 with an alpha channel, 1 with a side of 10,000 pixels or more"
    assert f"\ntraining images met: 36; of these {kinds}\n" in report
    kinds = "1 grey, 1 with a side of 10,000 pixels or more"
    assert f"\nvalidation images met: 9; of these {kinds}\n" in report
    folder = images / "train" / "odd"
    [met] = re.findall(r"unreadable training images met: 8: (.*), …\n", report)
    shown = met.split(", ")
    assert len(shown) == 5
    assert set(shown) <= {str(folder / name) for name in bad}
    assert f"unreadable validation images met: 1: {images / 'val' / 'odd' / 'bad.jpg'}\n" in report
    best = Path(options["output"]) / BEST
    model: Any = dynamicvit.load(best)
    assert model.pretrained_cfg["label_names"] == ["bright", "dark", "odd", "rare"]
    results = evaluate([str(best)], str(images), workers=0, skip_unreadable=True)
    assert results[str(best)]["top1"] == evaluation.top1, "the same classes are the same numbers"
    bad_image = f"unreadable images: 1: {images / 'val' / 'odd' / 'bad.jpg'}\n"
    assert f"evaluating {best}: {bad_image}" in capsys.readouterr().err
    search_data(str(best), str(images), workers=0, skip_unreadable=True, objective="gmacs")
    assert f"reading images: {bad_image}" in capsys.readouterr().err
    evaluate([str(best)], str(images), workers=0, skip_unreadable=True, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_without_skip_unreadable_the_file_is_named(images: Path) -> None:
    for name in _hostile(images):
        data = open_data(str(images), "train")
        [index] = [
            i
            for i, (file, _) in enumerate(data.dataset.source.reader.samples)
            if Path(file).name == name
        ]
        file = re.escape(str(images / "train" / "odd" / name))
        message = rf"cannot read image {file}: .*\S.* \(skip_unreadable goes on without it"
        with pytest.raises(DataError, match=message) as caught:
            data.dataset[index]
        assert "<_io" not in str(caught.value)


def test_all_that_can_be_read_has_the_model_s_channels(images: Path) -> None:
    bad = set(_hostile(images))
    data = open_data(str(images), "train")
    names = [Path(file).name for file, _ in data.dataset.source.reader.samples]
    assert len(names) == 2 * 8 + 19 + 8 + 1
    for channels, mode in ((3, "RGB"), (1, "L"), (4, "RGBA")):
        data.set_channels(channels)
        for index, name in enumerate(names):
            if name not in bad:
                assert data.dataset[index][0].mode == mode, name


def test_unreadable_images_count_once_and_are_named_in_part() -> None:
    found = Unreadable(1000)
    for _ in range(2):
        for number in range(1000):
            found.add(number, f"folder/é {number}.png" if number else "x" * 1000 + ".png")
    assert int(found.flags.sum()) == 1000
    names = found.names()
    assert len(names) == 64
    assert "folder/é 999.png" in names
    found = Unreadable(2)
    found.add(0, "x" * 1000 + ".png")
    assert found.names() == ["x" * 508 + ".png"]


def test_hidden_folders_are_not_classes(images: Path) -> None:
    (images / "train" / ".ipynb_checkpoints").mkdir()
    assert open_data(str(images), "train").class_names == list(CLASSES)


def test_the_paper_s_augmentation_takes_every_magnitude(images: Path) -> None:
    """At full magnitude timm's posterize keeps 0 bits, which Pillow may refuse."""
    data = open_data(str(images), "train", training=True)
    create_image_loader(
        data,
        4,
        CONFIG,
        training=True,
        workers=0,
        device=torch.device("cpu"),
        auto_augment="rand-m10-inc1",
    )
    # As loader processes get it that are spawned.
    transform = pickle.loads(pickle.dumps(data.dataset.transform))
    [augment] = [item for item in transform.transforms if hasattr(item, "ops")]
    image = Image.new("RGB", (32, 32), (200, 100, 50))
    for operation in augment.ops:
        operation.prob = 1.0
        assert operation(image).size == (32, 32)


def _write_shards(
    images: Path,
    root: Path,
    labels: dict[str, bytes] | None = None,
    renamed: tuple[str, str] = ("", ""),
) -> None:
    """The image folder as one WebDataset shard a split, with the index that timm reads."""
    root.mkdir()
    splits = {}
    for folder, split in (("train", "train"), ("val", "validation")):
        files = sorted((images / folder).glob("*/*.png"))
        shard = f"tiny-{split}-0000.tar"
        with tarfile.open(root / shard, "w") as tar:
            for index, file in enumerate(files):
                kind = file.parent.name
                label = labels[kind] if labels else str(CLASSES.index(kind)).encode()
                for suffix, content in (("png", file.read_bytes()), ("cls", label)):
                    info = tarfile.TarInfo(f"{index:04}.{suffix}".replace(*renamed))
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        splits[split] = {
            "name": split,
            "num_samples": len(files),
            "filenames": [shard],
            "shard_lengths": [len(files)],
        }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))


# webdataset leaves the closing of its files to the garbage collector: here, not in a later test.
@pytest.fixture
def collected() -> Iterator[None]:
    yield
    gc.collect()


def shard_files(test: Any) -> Any:
    for mark in (
        pytest.mark.filterwarnings("ignore::ResourceWarning"),
        pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
        pytest.mark.usefixtures("collected"),
    ):
        test = mark(test)
    return test


@shard_files
def test_webdataset_shards_are_trained_on(
    images: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    _write_shards(images, tmp_path / "shards")
    source = {"data": "wds/tiny", "data_dir": str(tmp_path / "shards")}
    evaluation = train(TrainConfig(**options | source))
    assert evaluation.images == 8
    with pytest.raises(DataError, match=r"data must have class indices below 1, .* got 1"):
        evaluate_model(
            tiny_vit(num_classes=1),
            create_image_loader(
                open_data("wds/tiny", "val", data_dir=source["data_dir"]),
                4,
                CONFIG,
                training=False,
                workers=2,
                device=torch.device("cpu"),
            ),
        )
    data = open_data("wds/tiny", "val", data_dir=source["data_dir"])
    assert sorted(target for _, target in data.dataset) == [0] * 4 + [1] * 4


@shard_files
@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_in_shards_is_named_or_counted(
    images: Path, tmp_path: Path, workers: int
) -> None:
    (images / "val" / "dark" / "01.png").write_text("not an image")
    good = (images / "val" / "bright" / "00.png").read_bytes()
    (images / "val" / "bright" / "02.png").write_bytes(good[: len(good) // 2])
    root = tmp_path / "shards"
    _write_shards(images, root)
    shard = root / "tiny-validation-0000.tar"
    for training in (False, True):
        data = open_data("wds/tiny", "val", data_dir=str(root), training=training)
        with pytest.raises(
            DataError, match=f"cannot read the image of sample 000[25] of {shard}: "
        ):
            _batches(data, workers)
        data = open_data(
            "wds/tiny", "val", data_dir=str(root), training=training, skip_unreadable=True
        )
        for _ in range(2):
            targets = torch.cat([targets for _, targets in _batches(data, workers)])
            if training:
                assert len(targets) == 8, "other images take their places"
            else:
                assert targets.bincount().tolist() == [3, 3]
            assert data.unreadable == 2
        told = data.describe_unreadable()
        assert told is not None
        assert re.fullmatch(rf"2: sample 0002 of {shard}, sample 0005 of {shard}", told)


@shard_files
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[: c.index(b"0005.png") + 600], "cannot read shard {}: unexpected end of data"),
        # A tar file cut off between two of its files, or inside a header, ends without an error.
        (lambda c: c[: c.index(b"0005.png")], "shard {} must hold 8 samples, .*, got 5"),
        (lambda c: c[: c.index(b"0005.png") + 100], "shard {} must hold 8 samples, .*, got 5"),
        (lambda c: b"\0" * len(c), "shard {} must hold 8 samples, as its index says, got 0"),
        (lambda c: b"not a tar file" * 100, "cannot read shard {}: "),
        (None, "cannot read shard {}: No such file or directory"),
        (("0006.", "0005."), "cannot read shard {}: 0005.png: duplicate"),
        (("0003.cls", "0003.txt"), "sample 0003 of {} has no class index, got None"),
        (("0003.png", "0003.tif"), "sample 0003 of {} has no image"),
    ],
)
def test_a_damaged_shard_is_named(
    images: Path,
    tmp_path: Path,
    damage: Callable[[bytes], bytes] | tuple[str, str] | None,
    message: str,
    workers: int,
) -> None:
    root = tmp_path / "shards"
    _write_shards(images, root, renamed=damage if isinstance(damage, tuple) else ("", ""))
    shard = root / "tiny-validation-0000.tar"
    if damage is None:
        shard.unlink()
    elif not isinstance(damage, tuple):
        shard.write_bytes(damage(shard.read_bytes()))
    data = open_data("wds/tiny", "val", data_dir=str(root), skip_unreadable=True)
    with pytest.raises(DataError, match=message.format(re.escape(str(shard)))):
        _batches(data, workers)


@shard_files
@pytest.mark.parametrize("label", [b"cat", b"", b"1.5", b"-1"])
def test_a_label_that_is_no_class_index_is_named(
    images: Path, tmp_path: Path, label: bytes
) -> None:
    root = tmp_path / "shards"
    _write_shards(images, root, labels={"bright": label, "dark": b"1"})
    data = open_data("wds/tiny", "val", data_dir=str(root), skip_unreadable=True)
    with pytest.raises(DataError, match=rf"sample 0000 of .* has no class index, got {label!r}"):
        _batches(data)


@shard_files
@pytest.mark.parametrize("workers", [0, 2])
def test_training_without_a_readable_image_ends(images: Path, tmp_path: Path, workers: int) -> None:
    for file in images.glob("*/*/*.png"):
        file.write_text("not an image")
    root = tmp_path / "shards"
    _write_shards(images, root)
    data = open_data("wds/tiny", "train", data_dir=str(root), training=True, skip_unreadable=True)
    with pytest.raises(DataError, match=r"no image in .*tiny-train-0000\.tar can be read"):
        _batches(data, workers)


@pytest.mark.parametrize(
    ("data", "index", "message"),
    [
        ("wds", {}, "data must name a data set after wds/, got 'wds'"),
        ("wds/", {}, "data must name a data set after wds/, got 'wds/'"),
        ("wds/tiny", None, "data_dir must hold _info.json, the index of WebDataset shards, got"),
        ("wds/tiny", [], "cannot open 'wds/tiny'"),
        ("wds/tiny", {"splits": {}}, "cannot open 'wds/tiny'.*split validation not found"),
        ("wds/tiny", {"splits": {"validation": {"num_samples": "x"}}}, "cannot open 'wds/tiny'"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    tmp_path: Path, data: str, index: Any, message: str
) -> None:
    if index is not None:
        (tmp_path / "_info.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=message):
        open_data(data, "val", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="data_dir must be a folder, got"):
        open_data("wds/tiny", "val", data_dir=str(tmp_path / "nowhere"))


def test_hugging_face_data_sets_are_trained_on(
    images: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    source = {"data": f"hfds/{images}", "data_dir": str(tmp_path / "cache")}
    evaluation = train(TrainConfig(**options | source))
    assert evaluation.images == 8
    assert open_data(source["data"], "val", data_dir=source["data_dir"]).class_names == [*CLASSES]


@pytest.mark.parametrize("name", [None, "image.png"])
def test_images_in_a_table_need_no_file(tmp_path: Path, name: str | None) -> None:
    datasets: Any = importlib.import_module("datasets")

    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    pictures = [{"bytes": data, "path": name} for data in (content.getvalue(), b"no picture")]
    table = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1]})
    table = table.cast_column("image", datasets.Image())
    (tmp_path / "table").mkdir()
    table.cast_column("label", datasets.ClassLabel(names=["a", "b"])).to_parquet(
        tmp_path / "table" / "validation.parquet"
    )
    cache = str(tmp_path / "cache")
    images = open_data(f"hfds/{tmp_path}/table", "val", data_dir=cache).dataset
    assert (images[0][0].size, images[0][1]) == ((4, 4), 0)
    with pytest.raises(DataError, match=f"cannot read image {name or 'number 1'}: "):
        images[1]


@pytest.mark.parametrize("prefix", EXTRAS)
def test_a_source_whose_package_is_missing_names_it(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, extra = EXTRAS[prefix]
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"'{prefix}/tiny' needs {package}: pip install 'dynamicvit\[{extra}\]'"
    with pytest.raises(DataError, match=message):
        open_data(f"{prefix}/tiny")


class _DecoderError(Exception):
    """What no list of Pillow's errors has."""


@pytest.mark.parametrize("workers", [0, 2])
def test_whatever_a_decoder_raises_is_an_unreadable_image(
    images: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(image: Image.Image, mode: str) -> Image.Image:
        raise _DecoderError("bad chunk")

    monkeypatch.setattr("dynamicvit.evaluation.data.convert_image", fail)
    with pytest.raises(DataError, match=r"cannot read image .*: bad chunk"):
        _batches(open_data(str(images), "val"), workers)
    data = open_data(str(images), "val", skip_unreadable=True)
    assert sum(len(targets) for _, targets in _batches(data, workers)) == 8
    assert data.unreadable == 8


def _damaged(name: str) -> bytes:
    """A picture of a rarer format, cut off or with its header changed."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    content = io.BytesIO()
    picture.save(content, name)
    damaged = bytearray(content.getvalue())
    if name == "DDS":
        damaged[12:20] = b"\xff" * 8
    return bytes(damaged[: len(damaged) // 2])


@pytest.mark.parametrize("name", ["AVIF", "QOI", "DDS"])
def test_damaged_files_of_rarer_formats_are_skipped(images: Path, name: str) -> None:
    Image.init()
    if name not in Image.SAVE:
        pytest.skip(f"Pillow here does not write {name}")
    (images / "val" / "dark" / "01.png").write_bytes(_damaged(name))
    with pytest.raises(DataError, match=r"cannot read image .*01\.png"):
        _batches(open_data(str(images), "val"))
    data = open_data(str(images), "val", skip_unreadable=True)
    _batches(data)
    assert data.unreadable == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_file_names_that_are_not_utf_8_are_counted_and_told(
    images: Path, dense_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.fsencode(images / "val" / "dark")
    os.rename(folder + b"/00.png", folder + b"/caf\xe9.png")
    assert sum(len(targets) for _, targets in _batches(open_data(str(images), "val"))) == 8
    with open(folder + b"/caf\xe9.png", "wb") as file:
        file.write(b"not an image")
    with pytest.raises(DataError, match=r"cannot read image .*caf\\xe9\.png"):
        _batches(open_data(str(images), "val"))
    data = open_data(str(images), "val", skip_unreadable=True)
    _batches(data)
    described = data.describe_unreadable()
    assert described is not None
    assert described.endswith("caf\\xe9.png")
    results = evaluate([str(dense_folder)], str(images), workers=0, skip_unreadable=True)
    assert results[str(dense_folder)]["unreadable"] == 1
    os.mkdir(os.fsencode(images / "val") + b"/\xe9")
    with pytest.raises(DataError, match=r"class folders named in UTF-8, got '\\udce9'"):
        open_data(str(images), "val")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_among_the_images_is_not_waited_for(images: Path) -> None:
    path = images / "val" / "dark" / "01.png"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"cannot read image {path}: it is not a regular file"):
        _batches(open_data(str(images), "val"))
    data = open_data(str(images), "val", skip_unreadable=True)
    _batches(data)
    assert data.unreadable == 1


def test_of_usual_images_nothing_is_told(images: Path) -> None:
    data = open_data(str(images), "val")
    _batches(data)
    assert data.describe_met() is None
    Image.new("L", (32, 32)).save(images / "val" / "dark" / "01.png")
    data = open_data(str(images), "val")
    _batches(data)
    assert data.describe_met() == "8; of these 1 grey"
