"""The page in the browser: its answers, its server, and in Chromium."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dynamicvit import sparsify
from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.io.folder import save_folder
from dynamicvit.io.predictions import Prediction
from dynamicvit.views.demo import _import_gradio, demo
from dynamicvit.views.demo_answers import Answers, Pictures, _compare_classes
from dynamicvit.views.demo_photos import Photos, find_photos
from dynamicvit.views.explain import explain
from tests.conftest import randomise, tiny_vit

CLASSES = ("a <b>bold</b> name", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model of 16 patches and two stages, whose class names look like HTML."""
    target = tmp_path_factory.mktemp("demo") / "sparse"
    schedule = KeepSchedule((1, 2), (0.75, 0.5))
    sparse = sparsify(tiny_vit(), schedule=schedule)
    randomise(sparse.scorers)
    save_folder(sparse, target, class_names=CLASSES)
    return target


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    return Answers([str(folder), "embedded"])


@pytest.fixture(scope="module")
def photo(folder: Path) -> Path:
    return _noise(folder.parent / "photo.png", 0)


def _noise(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _patches_left(shown: np.ndarray, given: np.ndarray, side: int) -> int:
    """How many patches of a picture are as they were."""
    same = (shown == given).all(axis=-1)
    rows, columns = (length // side for length in same.shape)
    return int(same.reshape(rows, side, columns, side).all(axis=(1, 3)).sum())


def _arrays(pictures: Pictures) -> list[np.ndarray]:
    return [np.asarray(picture) for picture, _ in pictures]


# What it answers.


@pytest.mark.parametrize("keep_ratio", [0.3, 0.7, 0.95, 1])
def test_the_pictures_show_what_the_schedule_keeps(
    answers: Answers, photo: Path, keep_ratio: float
) -> None:
    found = answers.show({"path": str(photo)}, "embedded", keep_ratio)
    counts = KeepSchedule.from_keep_ratio(keep_ratio, 12).counts(196)
    given, *stages = _arrays(found.kept)
    assert [_patches_left(stage, given, 16) for stage in stages] == list(counts)
    for count, (_, caption) in zip(counts, found.kept[1:], strict=True):
        assert f"{count} of 196 patches" in caption
    assert len(found.scores) == 3
    assert "without trained scorers" in found.note


def test_a_trained_model_answers_by_its_own_scorers(
    answers: Answers, photo: Path, folder: Path
) -> None:
    found = answers.show({"path": str(photo)}, str(folder), 0.5)
    model = answers.models[str(folder)]
    pruned = SparseViT(model.backbone, KeepSchedule((1, 2), (0.5, 0.25)), list(model.scorers))
    expected = explain(pruned, photo)
    for shown, panel in zip(_arrays(found.kept), expected.panels(), strict=True):
        assert (shown == np.asarray(panel)).all()
    for column, side in ((1, expected.dense), (2, expected.pruned)):
        listed = {row[0]: row[column] for row in found.classes if row[column]}
        assert listed == {item.name: f"{item.probability:.1%}" for item in side}
    assert "scorers" not in found.note


def test_dense_and_pruned_stand_side_by_side() -> None:
    dense = [Prediction("a", 0, 0.9), Prediction("b", 1, 0.0625)]
    pruned = [Prediction("b", 1, 0.5), Prediction("a", 2, 0.4321)]
    rows = [["a (0)", "90.0%", ""], ["b", "6.2%", "50.0%"], ["a (2)", "", "43.2%"]]
    assert _compare_classes(dense, pruned) == rows
    assert _compare_classes([], []) == []


def test_a_crop_and_untrained_scorers_are_announced(tmp_path: Path) -> None:
    sparsify(tiny_vit(num_classes=2), keep_ratio=0.5).save_pretrained(tmp_path / "new")
    answers = Answers([str(tmp_path / "new")])
    Image.new("RGB", (64, 32)).save(tmp_path / "wide.png")
    note = answers.show({"path": str(tmp_path / "wide.png")}, str(tmp_path / "new"), 0.7).note
    assert "not trained" in note
    assert "crop" in note


def test_costs_are_counted_and_measured(answers: Answers) -> None:
    rows = answers.cost("embedded", 0.5)
    (_, dense, pruned, fewer), (_, dense_ms, pruned_ms, gain), _ = rows
    assert fewer == f"{float(pruned) / float(dense) - 1:+.0%}"
    assert 0.1 < float(dense) < 0.3
    assert min(float(dense_ms), float(pruned_ms)) > 0
    assert gain == f"{float(dense_ms) / float(pruned_ms):.2f}×", "not their quotient"
    assert answers.cost("embedded", 0.5) is rows, "measured anew without being asked"
    assert answers.cost("embedded", 0.5, again=True) is not rows


def test_what_cannot_be_read_gives_a_message(answers: Answers, tmp_path: Path) -> None:
    text = tmp_path / "letter.jpg"
    text.write_text("not an image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(_noise(tmp_path / "whole.png", 1).read_bytes()[:900])
    empty = tmp_path / "empty.png"
    empty.touch()
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    thin = tmp_path / "thin.png"
    Image.new("L", (20_000, 2)).save(thin)
    for path, message in (
        (text, "cannot read image <x>.jpg: cannot identify image file"),
        (cut, "cannot read image <x>.jpg: "),
        (empty, "cannot read image <x>.jpg: cannot identify"),
        (bomb, "cannot read image <x>.jpg: Image size (400000000 pixels) exceeds limit"),
        (thin, "got 20000 × 2 pixels"),
        (tmp_path / "gone.png", "no image at <x>.jpg"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            answers.show({"path": str(path), "orig_name": "<x>.jpg"}, "embedded", 0.7)
        assert str(tmp_path) not in str(caught.value), "the server's folders are nobody's business"
    assert answers.show(None, "embedded", 0.7).kept == []


def test_a_large_image_is_read(answers: Answers, tmp_path: Path) -> None:
    Image.new("RGB", (20_000, 1_000), "teal").save(tmp_path / "wide.png", compress_level=1)
    found = answers.show({"path": str(tmp_path / "wide.png")}, "embedded", 0.7)
    assert len(found.kept) == 4


def test_photos_are_picked_by_number(tmp_path: Path) -> None:
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    Image.new("RGB", (900, 300), "teal").save(tmp_path / "mine" / "sub" / "b c.jpg")
    Image.new("L", (30, 60)).save(tmp_path / "mine" / "a.tiff")
    (tmp_path / "mine" / "bad.png").write_text("not an image")
    (tmp_path / "mine" / "notes.txt").write_text("not an image")
    photos = Photos(find_photos(tmp_path / "mine"), tmp_path / "served", quiet=True)
    sizes = []
    for path in photos.thumbnails:
        with Image.open(path) as thumbnail:
            sizes.append(thumbnail.size)
    assert sizes == [(30, 60), (128, 43)]
    copy = photos.pick(1)
    assert copy.name == "b c.jpg"
    assert copy.is_relative_to(tmp_path / "served")
    assert copy.read_bytes() == (tmp_path / "mine" / "sub" / "b c.jpg").read_bytes()
    for index in ("0", "../a.tiff", None):
        with pytest.raises(TypeError):
            photos.pick(index)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images must hold photos, got none that can be read"):
        Photos([tmp_path / "mine" / "bad.png"], tmp_path / "none", quiet=True)


@pytest.mark.parametrize(
    ("name", "keep_ratio", "message"),
    [
        ("nowhere", 0.7, "model must be one of "),
        (["embedded"], 0.7, "model must be one of "),
        ("embedded", 0.0, "keep_ratio must lie in (0, 1], got 0.0"),
        ("embedded", float("nan"), "keep_ratio must lie in (0, 1], got nan"),
        ("embedded", "0.7", "keep_ratio must be a number"),
        ("embedded", None, "keep_ratio must be a number"),
        ("embedded", 0.1, "ratios must leave at least one of the 196 patch tokens"),
    ],
)
def test_wrong_requests_get_a_message(
    answers: Answers, photo: Path, name: Any, keep_ratio: Any, message: str
) -> None:
    for call in (partial(answers.show, {"path": str(photo)}), answers.cost):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            call(name, keep_ratio)


def test_mistakes_of_the_one_who_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="max_upload must be above 0, got -1"):
        demo(max_upload=-1)
    with pytest.raises(ValueError, match="port must lie between 1 and 65535, got 70000"):
        demo(port=70000)
    with pytest.raises(ValueError, match=r"images must be a folder, got '.*nowhere'"):
        demo(images=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"images must hold .* files, got the folder .* without"):
        demo(images=str(tmp_path))
    with pytest.raises(ValueError, match=r"device must be one of cpu.* here, got 'tpu'"):
        demo(device="tpu")
    merging = sparsify(tiny_vit(), keep_ratio=0.5, scorer="similarity_merging")
    save_folder(merging, tmp_path / "merging")
    with pytest.raises(ValueError, match=r"models must choose tokens, got .*merging with Simil"):
        Answers([str(tmp_path / "merging")])
    pooled = tiny_vit(class_token=False, global_pool="avg")
    save_folder(pooled, tmp_path / "pooled")
    with pytest.raises(ValueError, match=r"or have a class token .*, got the dense model .*pooled"):
        Answers([str(tmp_path / "pooled")])
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # what demo sets is undone
    with pytest.raises(ValueError, match=r"demo needs the extra: pip install 'dynamicvit\[demo\]'"):
        demo()


# Its server.


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of the command, running."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs the extra demo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = folder.parent / "temporary"
    temporary.mkdir()
    # One thread, as here: sums are then the same to the bit.
    around = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "dynamicvit", "demo", "embedded", str(folder)]
    with subprocess.Popen(
        [*command, "--port", str(port), "--max-upload", "1", "--quiet"],
        stdout=subprocess.PIPE,
        text=True,
        env=around,
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[0]
            if sys.platform == "linux":  # nothing heavy is loaded that the page does not need
                loaded = Path(f"/proc/{process.pid}/maps").read_text()
                assert re.findall(r"/(onnx|onnxruntime|openvino|matplotlib|sklearn)/", loaded) == []
            assert address == f"http://127.0.0.1:{port}/"
            yield address
            process.send_signal(signal.SIGTERM)
            assert process.wait(3600) == 0
            assert list(temporary.iterdir()) == [], "uploads are left"
        finally:
            process.kill()


def test_80_requests_of_10_clients_get_their_own_answers(
    server: str, answers: Answers, folder: Path, tmp_path: Path
) -> None:
    from gradio_client import Client, handle_file

    photos = [_noise(tmp_path / f"{number}.png", number) for number in range(10)]
    settings = [("embedded", 0.5), (str(folder), 0.7), ("embedded", 0.9), (str(folder), 0.5)]

    expected = {}
    for photo in photos:
        for setting in settings:
            found = answers.show({"path": str(photo)}, *setting)
            captions = [caption for _, caption in (*found.kept, *found.scores)]
            expected[photo, *setting] = (captions, found.classes)
    assert len({str(answer) for answer in expected.values()}) == len(expected)

    def ask(photo: Path) -> list[bool]:
        client = Client(
            server,
            verbose=False,
            analytics_enabled=False,
            download_files=False,
            httpx_kwargs={"timeout": None},
        )
        right = []
        for setting in settings * 2:
            kept, classes, scores, _ = client.predict(
                handle_file(photo), *setting, api_name="/show"
            )
            captions = [item["caption"] for item in (*kept, *scores)]
            right.append((captions, classes["data"]) == expected[photo, *setting])
        return right

    with ThreadPoolExecutor(10) as clients:
        right = [item for found in clients.map(ask, photos) for item in found]
    assert right == [True] * 80


def test_it_listens_here_alone_and_gives_away_no_files(
    server: str, photo: Path, tmp_path: Path
) -> None:
    import httpx

    port = int(server.rstrip("/").rpartition(":")[2])
    if sys.platform == "linux":  # where all of 127.0.0.0/8 is this machine
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))
    large = tmp_path / "large.png"
    large.write_bytes(bytes(1_100_000))
    client = httpx.Client(base_url=f"{server}gradio_api/", timeout=None)
    with large.open("rb") as file:
        assert client.post("upload", files={"files": file}).status_code == 413
    assert client.get(f"file={photo}").status_code == 403
    body = {"data": [{"path": str(photo), "meta": {"_type": "gradio.FileData"}}, "embedded", 0.7]}
    event = client.post("call/show", json=body).json()["event_id"]
    answer = client.get(f"call/show/{event}").text
    assert "event: error" in answer
    assert "caption" not in answer
    # Without `meta` Gradio does not look at it.
    for path in (photo, tmp_path / "nowhere.png", "https://example.com/photo.png"):
        body = {"data": [{"path": str(path)}, "embedded", 0.7]}
        event = client.post("call/show", json=body).json()["event_id"]
        answer = client.get(f"call/show/{event}").text
        assert "event: error" in answer
        assert "image must be an upload or one of the photos" in answer
        assert "caption" not in answer
    for address in (server, f"{server}gradio_api/file={photo}", f"{server}config"):
        headers = httpx.get(address).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_what_lies_elsewhere_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason="needs the extra demo")
    import asyncio

    from gradio import processing_utils

    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    before = processing_utils.async_ssrf_protected_download
    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", before)
    image = _import_gradio(tmp_path).Image()
    with pytest.raises(ValueError, match="image must be an upload, not an address"):
        asyncio.run(image.async_move_resource_to_block_cache("https://example.com/photo.png"))


# In Chromium.


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[Any]:
    """The page, loaded. What it asks of others, errors of its scripts, and what its own policy
    forbids it are mistakes."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found = context.new_page()
    found.set_default_timeout(600_000)
    wrong: list[str] = []
    found.on("pageerror", lambda error: wrong.append(str(error)))

    def look(message: Any) -> None:
        if "Security Policy" in message.text:
            wrong.append(message.text)

    found.on("console", look)
    inside = (server, "data:", "blob:")
    asked: list[str] = []
    found.on("request", lambda request: asked.append(request.url))
    found.goto(server)
    found.locator("#kept img").nth(3).wait_for()
    yield found
    context.close()
    wrong += [url for url in asked if not url.startswith(inside)]
    assert wrong == []


def _upload(page: Any, path: Path) -> None:
    page.locator("#image button[aria-label='Remove Image']").click()
    page.locator("#kept img").first.wait_for(state="detached")
    page.locator("#image input[type=file]").set_input_files(path)


def _wait_for_class(page: Any, text: str | re.Pattern[str]) -> None:
    """Until the text stands in the table of classes, of which Gradio hides a copy."""
    page.locator("#classes").get_by_text(text).locator("visible=true").first.wait_for()


def _pictures(page: Any) -> list[np.ndarray]:
    urls = [image.get_attribute("src") for image in page.locator("#kept img").all()]
    found = [Image.open(io.BytesIO(page.request.get(url).body())) for url in urls]
    return [np.asarray(picture.convert("RGB")) for picture in found]


def test_the_page_shows_an_upload_and_follows_the_slider(page: Any, photo: Path) -> None:
    assert page.title() == "dynamicvit"
    page.locator("#cost", has_text="GMACs").wait_for()
    before = page.locator("#kept img").first.get_attribute("src")
    _upload(page, photo)
    page.locator("#kept img").nth(3).wait_for()
    assert page.locator("#kept img").first.get_attribute("src") != before
    _wait_for_class(page, re.compile(r"^\d+\.\d%$"))
    assert page.locator("#scores img").count() == 3

    def wait_for(keep_ratio: float) -> list[int]:
        counts = KeepSchedule.from_keep_ratio(keep_ratio, 12).counts(196)
        page.locator("#kept", has_text=f"{counts[0]} of 196 patches").wait_for()
        return list(counts)

    for keep_ratio in (0.5, 0.9):
        page.locator("#ratio input[type=range]").fill(str(keep_ratio))
        counts = wait_for(keep_ratio)
        given, *stages = _pictures(page)
        assert [_patches_left(stage, given, 16) for stage in stages] == counts
    # Moves made while others wait: the last one counts.
    for keep_ratio in (0.3, 0.6, 0.8):
        page.locator("#ratio input[type=range]").fill(str(keep_ratio))
    wait_for(0.8)
    page.locator("#photos button").first.click()
    _wait_for_class(page, "T-shirt/top")


def test_a_wrong_file_gives_a_message_and_the_page_lives_on(
    page: Any, photo: Path, tmp_path: Path
) -> None:
    text = tmp_path / "letter <b>.jpg"
    text.write_text("not an image")
    _upload(page, text)
    page.get_by_text("cannot read image letter <b>.jpg").wait_for()
    assert page.locator("#kept img").count() == 0
    _upload(page, photo)
    page.locator("#kept img").nth(3).wait_for()


def test_another_model_is_picked(page: Any, folder: Path) -> None:
    page.locator("#model input").click()
    page.get_by_role("option", name=str(folder)).click()
    page.locator("#kept", has_text="of 16 patches").wait_for()
    assert page.locator("#kept img").count() == 3
    _wait_for_class(page, "a <b>bold</b> name")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_screen_and_is_legible(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.reload()
    page.locator("#cost", has_text="GMACs").wait_for()
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")
    background = _luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    for part in ("#note p", "#kept .caption-label", "#classes td", "#cost td", "h3"):
        ink = page.locator(part).first.evaluate("part => getComputedStyle(part).color")
        low, high = sorted((background, _luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{part} is hard to read (WCAG 2, AA)"


def _luminance(colour: str) -> float:
    """Of "rgb(r, g, b)", relative, as WCAG 2 defines it."""
    shares = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
