from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dynamicvit import KeepSchedule, SparseViT, load, sparsify
from dynamicvit.io.predictions import ImageSource, Prediction, class_names, predict
from tests.conftest import randomise, tiny_vit

NAMES = ["ant", "bee", "cat", "dog", "élan"]


def _sparse(**options: Any) -> SparseViT:
    """A tiny model that takes 32 px pictures as they are, not resized."""
    sparse = sparsify(tiny_vit(**options), schedule=KeepSchedule((1, 3), (0.7, 0.3)))
    randomise(sparse.scorers)
    sparse.pretrained_cfg["crop_pct"] = 1.0
    return sparse


def _picture(width: int = 32, height: int = 32, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def _same(actual: list[Prediction], expected: list[Prediction]) -> None:
    assert [(item.name, item.index) for item in actual] == [
        (item.name, item.index) for item in expected
    ]
    for one, two in zip(actual, expected, strict=True):
        assert one.probability == pytest.approx(two.probability, abs=1e-5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    _picture().save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_a_loaded_model_needs_nothing_else(tmp_path: Path, file: Path) -> None:
    sparse = _sparse()
    sparse.save_pretrained(tmp_path / "model", NAMES)
    loaded = load(tmp_path / "model")
    assert isinstance(loaded, SparseViT)
    found = loaded.predict(file, top_k=3)

    # prepared by hand: from 0…255 to [0, 1], then mean and deviation one half
    images = torch.tensor(np.asarray(_picture())).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        probabilities = sparse((images - 0.5) / 0.5).softmax(dim=-1)[0]
    order = probabilities.argsort(descending=True)[:3].tolist()
    expected = [Prediction(NAMES[i], i, float(probabilities[i])) for i in order]
    _same(found, expected)
    assert probabilities.std() > 0.01, "the classes could hardly be told apart"


def test_every_form_of_an_image_gives_the_same(file: Path) -> None:
    sparse = _sparse()
    expected = sparse.predict(file)
    assert [item.index for item in expected] != list(range(5))
    with Image.open(file) as opened:
        for form in (str(file), _picture(), opened):
            _same(sparse.predict(form), expected)
    other = sparse.predict(_picture(40, 50))
    sequences: list[Sequence[ImageSource]] = [
        [file, _picture(40, 50), str(file)],
        (file, _picture(40, 50), _picture()),
    ]
    for several in sequences:
        first, second, third = sparse.predict(several)
        _same(first, expected)
        _same(second, other)
        _same(third, expected)
    [alone] = sparse.predict([file])
    _same(alone, expected)
    assert sparse.predict([]) == sparse.predict(()) == []


def test_more_images_than_one_batch() -> None:
    sparse = _sparse()
    pictures = [Image.new("RGB", (32, 32), (7 * index, 255 - 7 * index, 0)) for index in range(35)]
    found = sparse.predict(pictures, top_k=1)
    assert len(found) == 35
    for index in (0, 31, 32, 34):
        _same(found[index], sparse.predict(pictures[index], top_k=1))


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_picture_of_any_mode_suits_any_model(in_chans: int, mode: str, tmp_path: Path) -> None:
    picture = _picture().convert("I").convert("I;16") if mode == "I;16" else _picture()
    picture = picture.convert(mode)
    suffix = "jpg" if mode == "CMYK" else "png"
    picture.save(tmp_path / f"picture.{suffix}")
    found = _sparse(in_chans=in_chans).predict(tmp_path / f"picture.{suffix}")
    assert sum(item.probability for item in found) == pytest.approx(1.0, abs=1e-5)


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 32 * 32).astype(np.uint8).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "8.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(ramp.astype(np.int32) * 257).save(tmp_path / "16.tiff")
    sparse = _sparse()
    for name in ("16.png", "16.tiff"):
        _same(sparse.predict(tmp_path / name), sparse.predict(tmp_path / "8.png"))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((32, 32), 0.5, np.float32), "floating point"),
        (np.full((32, 32), 1 << 20, np.int32), "32 bits"),
        (np.full((32, 32), -1, np.int32), "32 bits"),
    ],
)
def test_pixels_whose_white_is_not_known_are_refused(
    pixels: np.ndarray, message: str, tmp_path: Path
) -> None:
    Image.fromarray(pixels).save(tmp_path / "picture.tiff")
    with pytest.raises(ValueError, match=rf"cannot read image .*picture\.tiff: .*{message}"):
        _sparse().predict(tmp_path / "picture.tiff")


def test_transparent_palettes_are_read_without_a_warning(tmp_path: Path) -> None:
    """As in training: warnings are errors here, and Pillow warns of the direct way."""
    picture = _picture().quantize(16)
    picture.save(tmp_path / "palette.png", transparency=bytes(range(0, 160, 10)))
    assert len(_sparse().predict(tmp_path / "palette.png")) == 5


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    sparse, upright = _sparse(), _picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.png", exif=exif)
    _same(sparse.predict(tmp_path / "turned.png"), sparse.predict(upright))
    assert sparse.predict(turned) != sparse.predict(upright)


def test_a_picture_is_resized_and_cropped() -> None:
    """Its middle counts, whatever its size."""
    sparse = _sparse()
    wide = Image.new("RGB", (96, 32))
    wide.paste(_picture(), (32, 0))
    _same(sparse.predict(wide), sparse.predict(_picture()))
    sparse = _sparse(img_size=(32, 48))
    assert len(sparse.predict(_picture(500, 20))) == 5
    assert len(_sparse(dynamic_img_size=True).predict(_picture(1, 1))) == 5


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (2, 2), (5, 5), (6, 5), (10**9, 5)])
def test_top_k(top_k: int, count: int) -> None:
    found = _sparse().predict(_picture(), top_k)
    assert len({item.index for item in found}) == count
    values = [item.probability for item in found]
    assert values == sorted(values, reverse=True)
    assert sum(values) <= 1 + 1e-6
    assert values[0] > 1 / 5


def test_the_model_is_left_as_it_was() -> None:
    sparse = _sparse(proj_drop_rate=0.5).train()
    sparse.backbone.blocks[0].eval()
    modes = [module.training for module in sparse.modules()]
    first = sparse.predict(_picture())
    assert first == sparse.predict(_picture()), "dropout was on"
    assert [module.training for module in sparse.modules()] == modes
    sparse.masked(torch.randn(2, 3, 32, 32)).logits.sum().backward()  # it still learns

    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    sparse.backbone.norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sparse.predict(_picture())
    assert [module.training for module in sparse.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_model_s_own_dtype_is_used(dtype: torch.dtype) -> None:
    expected = _sparse().predict(_picture())
    found = _sparse().to(dtype).predict(_picture())
    assert found[0].index == expected[0].index
    assert found[0].probability == pytest.approx(expected[0].probability, abs=0.05)


def test_dense_models_are_served_too() -> None:
    dense = tiny_vit()
    sparse = sparsify(dense, keep_ratio=1.0)
    _same(predict(dense, _picture()), sparse.predict(_picture()))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (NAMES, NAMES),
        (tuple(NAMES), NAMES),
        ({"1": "bee", 3: "dog"}, ["0", "bee", "2", "dog", "4"]),
        (NAMES[:2], list("01234")),  # another head's
        ("abcde", list("01234")),
        (None, list("01234")),
    ],
    ids=str,
)
def test_names_are_those_the_model_carries(given: Any, names: list[str]) -> None:
    sparse = _sparse()
    sparse.pretrained_cfg["label_names"] = given
    assert class_names(sparse) == names
    assert sorted(item.name for item in sparse.predict(_picture())) == sorted(names)


@pytest.mark.parametrize(
    ("num_classes", "index", "name"),
    [(1000, 1, "goldfish, Carassius auratus"), (21843, 2, "plant, flora, plant life")],
)
def test_imagenet_s_names_are_known(num_classes: int, index: int, name: str) -> None:
    model = _sparse(num_classes=num_classes)
    names = class_names(model)
    assert len(names) == num_classes
    assert name in names
    [best] = model.predict(_picture(), top_k=1)
    assert best.name == names[best.index]


@pytest.mark.parametrize(
    ("image", "top_k", "error", "message"),
    [
        (5, 5, TypeError, "image must be a path, a PIL image or a sequence of these, got int"),
        (None, 5, TypeError, "image must be a path, .* got NoneType"),
        (b"cat.png", 5, TypeError, "image must be a path, .* got bytes"),
        (torch.zeros(3, 32, 32), 5, TypeError, "image must be a path, .* got Tensor"),
        ({"cat.png"}, 5, TypeError, "image must be a path, .* got set"),
        ([_picture(), 5], 5, TypeError, r"image\[1\] must be a path or a PIL image, got int"),
        ([["cat.png"]], 5, TypeError, r"image\[0\] must be a path or a PIL image, got list"),
        (_picture(), 0, ValueError, "top_k must be 1 or more, got 0"),
        ([], -1, ValueError, "top_k must be 1 or more, got -1"),
        (_picture(), "5", TypeError, "top_k must be an integer, got '5'"),
        (_picture(), 2.0, TypeError, r"top_k must be an integer, got 2\.0"),
        (_picture(), True, TypeError, "top_k must be an integer, got True"),
        (_picture(), None, TypeError, "top_k must be an integer, got None"),
        ("no/where.png", 5, FileNotFoundError, r"no image at no/where\.png"),
        (Path("no/where.png"), 5, FileNotFoundError, r"no image at no/where\.png"),
        ([_picture(), "nowhere.png"], 5, FileNotFoundError, r"no image at nowhere\.png"),
        (Image.new("RGB", (0, 9)), 5, ValueError, "cannot read image image: .* got 0 × 9 pixels"),
        ([Image.new("1", (1, 9999))], 5, ValueError, r"image image\[0\]: .* got 1 × 9999 pixels"),
        ("a\0b", 5, ValueError, "cannot read image a\0b: embedded null"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_call_is_refused(
    image: Any, top_k: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _sparse().predict(image, top_k)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif"])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cat.{suffix}"
    _picture().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"cannot read image {path}: "):
        _sparse().predict([_picture(), path])


def test_what_is_no_picture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("not an image")
    _picture().save(tmp_path / "large.png")
    sparse = _sparse()
    for name in ("text.png", ""):  # the second is a folder
        with pytest.raises(ValueError, match=f"cannot read image {tmp_path / name}: "):
            sparse.predict(tmp_path / name)
    opened = Image.open(tmp_path / "large.png")
    opened.close()
    with pytest.raises(ValueError, match=r"cannot read image .*large\.png: .*closed"):
        sparse.predict(opened)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"cannot read image .*large\.png: .*decompression bomb"):
        sparse.predict(tmp_path / "large.png")


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"num_classes": 0}, {}, "must have a classification head, got num_classes=0"),
        ({"in_chans": 2}, {}, "model must take 1, 3 or 4 channels to read image files, got 2"),
        ({}, {"interpolation": "magic"}, "preprocessing in the model's pretrained_cfg"),
        ({}, {"mean": "red"}, "preprocessing in the model's pretrained_cfg"),
    ],
)
def test_a_model_that_cannot_take_pictures_is_refused(
    options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    sparse = _sparse(**options)
    sparse.pretrained_cfg.update(changes)
    with pytest.raises(ValueError, match=message):
        sparse.predict(_picture())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be a SparseViT or a timm model, got Linear"):
        predict(nn.Linear(2, 2), _picture())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(
        ValueError, match=r"cannot read image .*pipe\.png: it is not a regular file"
    ):
        _sparse().predict(tmp_path / "pipe.png")
