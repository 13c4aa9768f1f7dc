from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dynamicvit import explain as explain_one
from dynamicvit import load, sparsify
from dynamicvit.views import video
from dynamicvit.views.explain import explain
from tests.conftest import tiny_vit


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
    written = explain([str(one), str(other), str(images / "train")], sparse_folder, str(output))
    expected = {"00", "00-2", "bright/01", "dark/00", "dark/01.ppm", "dark/07"}
    names = set(_files(output))
    assert {f"{name}.{kind}" for name in expected for kind in ("png", "npz")} <= names
    assert len(names) == 2 * (2 + 16) + 1
    assert {str(path.relative_to(output)) for path in written} == names
    sparse = load(sparse_folder)
    for name, source in (("00", one), ("00-2", other), ("dark/07", "train/dark/07.png")):
        found = explain_one(sparse, images / source)
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
    images: Path, sparse_folder: str, dense_folder: Path, tmp_path: Path
) -> None:
    name = str(images / "val" / "dark" / "00.png")
    explain([name, name], sparse_folder, str(tmp_path / "a" / "b"), str(dense_folder), ["webp"])
    assert _files(tmp_path / "a") == ["b/00.webp"]


def test_a_video_has_each_frame_beside_what_is_kept(sparse_folder: str, tmp_path: Path) -> None:
    _write_video(tmp_path / "film.avi")
    [path] = explain([str(tmp_path / "film.avi")], sparse_folder, str(tmp_path / "out"))
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
        explain([str(tmp_path / "film.mp4")], sparse_folder, str(tmp_path / "out"))


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
        explain(files, sparse_folder, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_video_that_fails_on_the_way_leaves_nothing(
    sparse_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_video(tmp_path / "film.mkv")
    times = iter([video.explain])

    def once(*arguments: Any) -> Any:
        for function in times:
            return function(*arguments)
        raise ValueError("the second time")

    monkeypatch.setattr(video, "explain", once)
    with pytest.raises(ValueError, match=r"cannot explain video .*film\.mkv: the second time"):
        explain([str(tmp_path / "film.mkv")], sparse_folder, str(tmp_path / "out"))
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
    ):
        arguments = {"images": files, "model": sparse_folder, "output": output, **options}
        with pytest.raises(ValueError, match=message):
            explain(**arguments)  # type: ignore[arg-type]
    assert not Path(output).exists()
