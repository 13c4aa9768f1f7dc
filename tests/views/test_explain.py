from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageSequence
from torch import Tensor, nn

from dynamicvit import KeepSchedule, SparseViT, load, sparsify
from dynamicvit.core.selectors import Selector, Stage
from dynamicvit.core.selectors.rules import RandomScorer
from dynamicvit.io.predictions import predict
from dynamicvit.views import explain_files as explain_files_module
from dynamicvit.views.explain import explain
from dynamicvit.views.explain_files import explain_files
from dynamicvit.views.explanation import Explanation
from dynamicvit.views.video import redraw_video
from tests.conftest import randomise, tiny_vit
from tests.io.limits import limited_file_size

SCHEDULE = KeepSchedule((1, 3), (0.6, 0.3))


class _Planted(Selector):
    """Scores that are known, whatever the tokens are."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order = torch.tensor(order, dtype=torch.float32)

    def forward(
        self, x_BNC: Tensor, keep_BN: Tensor | None = None, stage: Stage | None = None
    ) -> Tensor:
        return self.order[: x_BNC.shape[1]].expand(len(x_BNC), -1)


def _sparse(name: str = "vit_tiny_patch16_224", **options: Any) -> SparseViT:
    sparse = sparsify(tiny_vit(name, **options), schedule=SCHEDULE)
    randomise(sparse.scorers)
    channels = sparse.in_chans
    sparse.pretrained_cfg.update(crop_pct=1.0, mean=(0.4,) * channels, std=(0.2,) * channels)
    return sparse


def _picture(width: int = 32, height: int = 32, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(30, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("size", "patch"), [((32, 32), 8), ((224, 384), 32), ((224, 384), 14), ((28, 56), 14)]
)
def test_planted_decisions_are_what_is_striped(size: tuple[int, int], patch: int) -> None:
    """Also at a width of 384, which 14 does not divide: the model pads it."""
    padded = size[1] % patch > 0
    sparse = _sparse(
        img_size=size, patch_size=patch, dynamic_img_size=padded, dynamic_img_pad=padded
    )
    rows, columns = (-(-side // patch) for side in size)
    count = rows * columns
    numbers = np.random.default_rng(1)
    order = numbers.permutation(count)
    sparse.scorers[0] = _Planted(order.tolist())
    [found] = explain(sparse, torch.zeros(1, 3, *size))
    first, second = SCHEDULE.counts(count)
    expected = sorted(np.argsort(order)[-first:])
    assert found.kept[0].tolist() == expected
    assert set(found.kept[1]) < set(expected)
    assert found.counts == (count, first, second)
    y, x = np.mgrid[: size[0], : size[1]]
    position = y // patch * columns + x // patch
    input_, stage_1, stage_2 = (np.asarray(frame).astype(int) for frame in found.frames())
    scale = max(1, round(224 / min(size)))
    # where the frames differ from the input is where patches have gone
    for frame, kept in ((stage_1, found.kept[0]), (stage_2, found.kept[1])):
        changed = (frame != input_).any(axis=-1) & (input_ == 102).all(axis=-1)
        gone = ~np.isin(position, kept).repeat(scale, 0).repeat(scale, 1)
        assert changed.sum() == gone.sum()
        inside = np.argwhere((input_ == 102).all(axis=-1))
        (top, left), (bottom, right) = inside.min(axis=0), inside.max(axis=0) + 1
        assert (changed[top:bottom, left:right] == gone).all()


def test_it_says_what_pruned_says_and_shows_what_the_model_saw() -> None:
    sparse = _sparse()
    images = torch.rand(3, 3, 32, 32)
    found = explain(sparse, (images - 0.4) / 0.2)
    output = sparse.pruned((images - 0.4) / 0.2)
    for index, item in enumerate(found):
        assert np.abs(item.pixels / 255 - images[index].permute(1, 2, 0).numpy()).max() < 0.003
        for stage, (keep, scores) in enumerate(zip(output.keep, output.scores, strict=True)):
            assert item.kept[stage].tolist() == keep[index].nonzero().flatten().tolist()
            assert (item.masks[stage].ravel() == (keep[index] == 1).numpy()).all()
            assert item.scores[stage] == pytest.approx(scores[index].detach().numpy(), abs=1e-5)
        assert item.pruned[0].index == output.logits[index].argmax()


@pytest.mark.parametrize(
    ("name", "options", "picture"),
    [
        ("vit_tiny_patch16_224", {}, _picture()),
        ("vit_tiny_patch16_224", {"img_size": (28, 56), "patch_size": 14}, _picture(56, 28)),
        ("vit_tiny_patch16_224", {"in_chans": 1}, _picture(mode="L")),
        ("vit_tiny_patch16_224", {"in_chans": 4}, _picture(mode="RGBA")),
        ("vit_tiny_patch16_224", {"num_classes": 0}, _picture()),
        ("eva02_tiny_patch14_224", {}, _picture()),
        ("lvvit_tiny", {"stem_width": 8}, _picture()),
    ],
    ids=["vit", "wide", "grey", "rgba", "headless", "rotary", "lvvit"],
)
def test_every_kind_of_model(name: str, options: dict[str, Any], picture: Image.Image) -> None:
    sparse = _sparse(name, **options)
    found = explain(sparse, picture)
    assert isinstance(found, Explanation)
    assert (found.pixels == np.asarray(picture.convert("RGB"))).all()
    assert found.counts[1:] == SCHEDULE.counts(found.counts[0])
    rows, columns = found.grid
    assert rows * columns == found.counts[0]
    assert rows * found.patch_size[0] >= found.pixels.shape[0]
    if sparse.num_classes:
        assert found.pruned == sparse.predict(picture)
        assert found.dense == predict(sparse.backbone, picture)
    else:
        assert found.pruned == found.dense == []
    assert found._repr_png_().startswith(b"\x89PNG")


def test_a_model_that_pads_has_patches_that_reach_beyond_the_image() -> None:
    sparse = _sparse(dynamic_img_size=True, dynamic_img_pad=True)
    [found] = explain(sparse, torch.zeros(1, 3, 21, 30))
    assert (found.grid, found.patch_size) == ((3, 4), (8, 8))
    assert found.pixels.shape == (21, 30, 3)
    assert found.counts == (12, 7, 3)
    found.picture()


def test_it_saves_and_shows_itself(tmp_path: Path) -> None:
    found = explain(_sparse(), _picture())
    for suffix in ("png", "gif", "webp", "npz"):
        found.save(tmp_path / "new" / f"x.{suffix}")
    with Image.open(tmp_path / "new" / "x.png") as opened:
        assert opened.size == found.picture().size
    for suffix in ("gif", "webp"):
        with Image.open(tmp_path / "new" / f"x.{suffix}") as opened:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]
        for frame, expected in zip(frames, found.frames(), strict=True):
            error = np.abs(np.asarray(frame).astype(int) - np.asarray(expected))
            assert error.max() == 0 or (suffix == "gif" and error.mean() < 8)  # of 256 colours
    with np.load(tmp_path / "new" / "x.npz", allow_pickle=False) as arrays:
        assert arrays["pixels"].tolist() == found.pixels.tolist()
        for stage, kept in enumerate(found.kept, start=1):
            assert arrays[f"kept_{stage}"].tolist() == kept.tolist()
        assert arrays["scores"].tolist() == found.scores.tolist()
        assert arrays["grid"].tolist() == list(found.grid)
        assert arrays["pruned_name"].tolist() == [item.name for item in found.pruned]
        assert arrays["dense_probability"].tolist() == [item.probability for item in found.dense]
    assert repr(found).startswith("<Explanation, patches 16 → 9 → 4, dense: ")
    with pytest.raises(ValueError, match=r"path must end in .*, got 'x\.bmp'"):
        found.save("x.bmp")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        f"x.{suffix}" for suffix in ("gif", "npz", "png", "webp")
    ]


def test_another_dense_model_sees_the_image_its_own_way(tmp_path: Path) -> None:
    sparse = _sparse()
    dense = tiny_vit(img_size=16, num_classes=7)
    found = explain(sparse, [_picture(), _picture(50, 40)], dense)
    assert [item.dense for item in found] == predict(dense, [_picture(), _picture(50, 40)])
    assert found[0].dense_model == "vit_tiny_patch16_224"
    resnet = timm.create_model("test_resnet", num_classes=3).eval()
    assert len(explain(sparse, _picture(), resnet).dense) == 3


@pytest.mark.parametrize(
    ("mode", "crop_pct", "size", "visible"),
    [
        ("center", 1.0, (32, 32), 1.0),
        ("center", 1.0, (32, 64), 0.5),
        ("center", 0.8, (64, 32), 0.5 * 0.8**2),
        ("squash", 0.8, (64, 32), 0.8**2),
        ("border", 1.0, (64, 32), 1.0),
    ],
)
def test_what_is_cropped_off_is_announced(
    mode: str, crop_pct: float, size: tuple[int, int], visible: float
) -> None:
    sparse = _sparse()
    whole = explain(sparse, _picture())
    sparse.pretrained_cfg.update(crop_mode=mode, crop_pct=crop_pct)
    found = explain(sparse, _picture(*size))
    assert found.visible == pytest.approx(visible)
    cropped = visible < 1
    assert found.cropped == ("" if not cropped else f"{visible:.0%} of the picture")
    titles = [np.asarray(item.frames()[0])[:40] for item in (found, whole)]
    assert (titles[0].shape != titles[1].shape or (titles[0] != titles[1]).any()) == cropped
    assert explain(sparse, torch.zeros(1, 3, 32, 32))[0].visible == 1


def test_models_are_left_as_they_were() -> None:
    sparse = _sparse().train()
    sparse.backbone.blocks[0].eval()
    modes = [module.training for module in sparse.modules()]
    state = {key: value.clone() for key, value in sparse.state_dict().items()}
    first, second = explain(sparse, _picture()), explain(sparse.to(torch.float64), _picture())
    assert first.kept[0].tolist() == second.kept[0].tolist()
    assert [module.training for module in sparse.modules()] == modes
    assert all((state[key] == value).all() for key, value in sparse.state_dict().items())


@pytest.mark.parametrize(
    ("model", "image", "dense", "error", "message"),
    [
        (nn.Linear(2, 2), "x.png", None, TypeError, "model must be a SparseViT, got Linear"),
        (tiny_vit(), "x.png", None, TypeError, "model must be a SparseViT, got VisionTran"),
        (_sparse(), 7, None, TypeError, "images must be a path, a PIL image or .*, got int"),
        (_sparse(), [_picture(), 7], None, TypeError, r"images\[1\] must be .*, got int"),
        (_sparse(), "nowhere.png", None, FileNotFoundError, "no image at nowhere.png"),
        (_sparse(), __file__, None, ValueError, "cannot read image .*test_explain.py: "),
        (_sparse(), _picture(), _sparse(), TypeError, "dense must be a dense timm .*SparseViT"),
        (_sparse(), _picture(), nn.Linear(2, 2), TypeError, "dense must be .*, got Linear"),
        (_sparse(), torch.zeros(1, 3, 9, 9), None, ValueError, "images must be 32×32 pixels"),
        (
            _sparse(),
            torch.zeros(1, 3, 32, 32),
            tiny_vit(img_size=16),
            ValueError,
            r"dense must take the prepared images \(3, 32, 32\), got \(3, 16, 16\)",
        ),
    ],
)
def test_a_bad_call_is_refused(
    model: Any, image: Any, dense: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        explain(model, image, dense)


def test_a_model_that_keeps_no_account_of_patches_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sparse = _sparse()
    output = sparse.pruned(torch.zeros(1, 3, 32, 32))._replace(keep=(), scores=())
    monkeypatch.setattr(sparse, "pruned", lambda images: output)
    with pytest.raises(ValueError, match="model must choose tokens, got TokenScorer, which merges"):
        explain(sparse, _picture())


def test_keep_maps_follow_the_scorers() -> None:
    sparse = _sparse()
    kept = [explain(sparse, _picture()).kept[0].tolist() for _ in range(2)]
    assert kept[0] == kept[1]
    sparse.scorers = nn.ModuleList(RandomScorer() for _ in range(2))
    assert explain(sparse, _picture()).kept[0].tolist() != kept[0]


# The command.


@pytest.fixture
def sparse_folder(tmp_path: Path) -> str:
    sparsify(tiny_vit(num_classes=2), keep_ratio=0.5).save_pretrained(
        tmp_path / "sparse", ["bright", "dark"]
    )
    return str(tmp_path / "sparse")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _write_video(path: Path, count: int = 20, size: tuple[int, int] = (50, 34)) -> None:
    """Frames that grow brighter, 10 a second."""
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(count):
            picture = Image.new("RGB", size, (12 * index, 12 * index, 12 * index))
            film.mux(stream.encode(av.VideoFrame.from_image(picture)))
        film.mux(stream.encode(None))


def test_images_and_folders(
    images: Path, sparse_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    (images / "train" / "dark" / "notes.txt").write_text("not an image")
    (images / "train" / "dark" / "01.png").rename(images / "train" / "dark" / "01.ppm.png")
    one = images / "val" / "dark" / "00.png"
    other = images / "val" / "bright" / "00.png"
    written = explain_files(
        [str(one), str(other), str(images / "train")], sparse_folder, str(output)
    )
    expected = {"00", "00-2", "bright/01", "dark/00", "dark/01.ppm", "dark/07"}
    names = set(_files(output))
    assert {f"{name}.{kind}" for name in expected for kind in ("png", "npz")} <= names
    assert len(names) == 2 * (2 + 16) + 1
    assert {str(path.relative_to(output)) for path in written} == names
    sparse = load(sparse_folder)
    for name, source in (("00", one), ("00-2", other), ("dark/07", "train/dark/07.png")):
        found = explain(sparse, images / source)
        with np.load(output / f"{name}.npz") as arrays:
            assert arrays["kept_3"].tolist() == found.kept[2].tolist()
        with Image.open(output / f"{name}.png") as picture:
            assert (np.asarray(picture) == np.asarray(found.picture())).all()
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.width * sheet.height > 18 * 4 * 96 * 96
    text = capsys.readouterr().out
    assert "16 → 8 → 4 → 2" in text
    assert text.endswith(": 37\n")


def test_one_image_in_the_formats_asked_for(
    images: Path,
    sparse_folder: str,
    dense_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = str(images / "val" / "dark" / "00.png")
    explain_files(
        [name, name], sparse_folder, str(tmp_path / "a" / "b"), str(dense_folder), ["webp"]
    )
    assert _files(tmp_path / "a") == ["b/00.webp"]


def test_a_video_has_each_frame_beside_what_is_kept(sparse_folder: str, tmp_path: Path) -> None:
    _write_video(tmp_path / "film.avi")
    [path] = explain_files([str(tmp_path / "film.avi")], sparse_folder, str(tmp_path / "out"))
    assert _files(tmp_path / "out") == ["film.mp4"]
    with av.open(str(path)) as film:
        frames = list(film.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx([0.1 * i for i in range(20)])
    assert {(frame.width % 2, frame.height % 2) for frame in frames} == {(0, 0)}
    # the first picture of each, the input, is as bright as the frame was
    shown = [np.asarray(frame.to_image())[100:200, 50:200].mean() for frame in frames]
    assert shown == pytest.approx([12 * i for i in range(20)], abs=8)


def test_a_video_needs_the_extra(
    sparse_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "film.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'dynamicvit\[video\]'"):
        explain_files([str(tmp_path / "film.mp4")], sparse_folder, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("text.jpg", ValueError, "cannot read image .*text.jpg: "),
        ("text.mp4", ValueError, "cannot read video .*text.mp4: "),
        ("missing.png", FileNotFoundError, "images must be .*, got no file at .*missing.png"),
        ("empty", ValueError, "images must hold .*, got the folder .*empty without any"),
    ],
)
def test_nothing_is_written_where_something_cannot_be_read(
    bad: str, error: type[Exception], message: str, images: Path, sparse_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    files = [str(images / "val"), str(tmp_path / bad)]
    with pytest.raises(error, match=message):
        explain_files(files, sparse_folder, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_left_out_on_demand(
    images: Path, sparse_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [images / "val" / name for name in ("text.jpg", "text.mp4")]
    for file in bad:
        file.write_text("neither an image nor a video")
    written = explain_files(
        [str(images / "val")], sparse_folder, str(tmp_path / "out"), skip_unreadable=True
    )
    assert len(written) == 8 * 2 + 1
    text = capsys.readouterr().out
    assert "unreadable: 2: " in text
    assert all(str(file) in text for file in bad)
    with pytest.raises(ValueError, match=r"none of the 1 images can be read: .*text\.jpg"):
        explain_files([str(bad[0])], sparse_folder, str(tmp_path / "none"), skip_unreadable=True)


def test_a_video_that_fails_on_the_way_leaves_nothing(
    sparse_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_video(tmp_path / "film.mkv")
    times = iter([explain])

    def once(*arguments: Any) -> Any:
        for function in times:
            return function(*arguments)
        raise ValueError("the second time")

    monkeypatch.setattr(explain_files_module, "explain", once)
    with pytest.raises(ValueError, match=r"cannot explain video .*film\.mkv: the second time"):
        explain_files([str(tmp_path / "film.mkv")], sparse_folder, str(tmp_path / "out"))
    assert _files(tmp_path / "out") == []


def test_a_full_disk_is_told_with_the_file_s_name(tmp_path: Path) -> None:
    _write_video(tmp_path / "film.mkv")

    def draw(frames: Sequence[Image.Image]) -> list[Image.Image]:
        return [_picture(400, 400) for _ in frames]

    frames = redraw_video(tmp_path / "film.mkv", tmp_path / "out" / "film.mp4", draw)
    with (
        limited_file_size(50_000),
        pytest.raises(OSError, match=re.escape(f"'{tmp_path / 'out' / 'film.mp4'}'")),
    ):
        list(frames)
    assert _files(tmp_path / "out") == []


def test_bad_options_are_refused(
    images: Path, sparse_folder: str, dense_folder: Path, tmp_path: Path
) -> None:
    files, output = [str(images / "val")], str(tmp_path / "out")
    one = images / "val" / "dark" / "00.png"
    for options, message in (
        ({"formats": ["bmp"]}, r"formats must be of png, gif, .*, got \['bmp'\]"),
        ({"formats": []}, "formats must be of"),
        ({"model": str(dense_folder)}, "model must be sparse, got the dense model"),
        ({"dense": sparse_folder}, "dense must be a dense model, got the sparse"),
        ({"output": str(images / "val" / "dark" / "new")}, "output must lie outside of"),
        ({"images": [str(one)], "output": str(one.parent)}, "no image is overwritten, got"),
        ({"output": str(one)}, "output must be a folder, got .* is a file"),
        ({"device": "tpu"}, "device must be one of cpu.* here, got 'tpu'"),
    ):
        arguments = {"images": files, "model": sparse_folder, "output": output, **options}
        with pytest.raises(ValueError, match=message):
            explain_files(**arguments)  # type: ignore[arg-type]
    assert not Path(output).exists()
