"""README and docs: numbers are up to date; commands, links, paths and code work."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import mypy.api
import pytest
import timm
import torch
from huggingface_hub import HfApi, RepoUrl
from PIL import Image

from dynamicvit import cli
from dynamicvit.deploy.optimize import optimize
from dynamicvit.deploy.search import search
from dynamicvit.evaluation.evaluate import evaluate
from dynamicvit.training.run_folder import resume_arguments
from tools import write_numbers

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md")
}
GUIDES = [text for name, text in PAGES.items() if name not in ("CHANGELOG.md", "CONTRIBUTING.md")]
TEXT = "\n".join(GUIDES).replace("\\\n", " ")


def test_numbers_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_numbers.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "marked", ["a <!-- {0} -->{1}<!-- /{0} -->.", "a <!-- {0} -->x<!-- /{0} -->."]
)
def test_a_figure_is_written_between_its_markers(marked: str) -> None:
    figure = write_numbers.embedded_model()
    right = f"a <!-- embedded model -->{figure}<!-- /embedded model -->."
    assert write_numbers.written(marked.format("embedded model", figure)) == right


def test_a_table_is_written_between_empty_lines() -> None:
    page = write_numbers.written("a\n\n<!-- deit --><!-- /deit -->\n")
    assert page.startswith("a\n\n<!-- deit -->\n\n| DeiT-S |")
    assert page.endswith("|\n\n<!-- /deit -->\n")
    assert write_numbers.written(page) == page


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("a <!-- nothing -->1<!-- /nothing -->", "markers must name one of .*, got 'nothing'"),
        ("a <!-- deit -->", "markers must be pairs, got '<!-- deit -->' alone"),
        ("<!-- deit -->1<!-- /speed -->", "markers must be pairs, got '<!-- deit -->' alone"),
        ("a\n<!-- embedded model --><!-- /embedded model -->", "must not begin a line"),
    ],
)
def test_wrong_markers_are_refused(page: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_numbers.written(page)


def test_a_page_out_of_date_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("a <!-- embedded model -->99.99%<!-- /embedded model -->")
    monkeypatch.setattr(write_numbers, "PAGES", (page,))
    monkeypatch.setattr(write_numbers, "ROOT", tmp_path)
    assert write_numbers.main(["--check"]) == 1
    assert "page.md" in capsys.readouterr().out
    assert "99.99%" in page.read_text()
    assert write_numbers.main([]) == 0
    assert "99.99%" not in page.read_text()
    assert write_numbers.main(["--check"]) == 0


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[name])
    wrong = []
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        if not path.exists() or (anchor and anchor not in _anchors(path.read_text("utf-8"))):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name: str) -> None:
    """Paths of this repository, as `tests/test_golden.py`."""
    named = re.findall(
        r"`((?:benchmarks|configs|docs|examples|src|tests|tools)/[\w./-]+)`", PAGES[name]
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "line",
    dict.fromkeys(
        re.findall(r"^ {4,}(?:torchrun .* -m )?(dynamicvit(?:\.cli)? .+)$", TEXT, re.MULTILINE)
        + re.findall(r"`(dynamicvit [a-z]+ [^`]+)(?<!--help)`", TEXT)
    ),
)
def test_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "run").mkdir()  # with --resume, options come from here
    shutil.copy(ROOT / "configs" / "fashion_mnist_56px.yaml", tmp_path / "run" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    _, name, *arguments = shlex.split(line, comments=True)
    if name == "train":
        arguments = [*resume_arguments(arguments), *arguments]
    parser, _ = cli.build_parser(name)
    parser.parse_args(arguments)


def test_make_targets_exist() -> None:
    named = set(re.findall(r"(?:^    |`)make ([\w-]+)", "\n".join(PAGES.values()), re.MULTILINE))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named
    assert named <= set(targets)


# What the code in the pages takes for granted.
GIVEN = """\
import dynamicvit
import torch
from dynamicvit import SparseViT

images = torch.rand(1, 3, 224, 224)
photos, labels = torch.rand(4, 3, 224, 224), [0, 1, 2, 3]
"""


def _code(name: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", PAGES[name], re.DOTALL))


def test_readme_s_code_passes_mypy(tmp_path: Path) -> None:
    file = tmp_path / "readme_code.py"
    file.write_text(GIVEN + _code("README.md"), encoding="utf-8")
    options = ["--config-file", str(ROOT / "pyproject.toml")]
    options += ["--cache-dir", str(ROOT / ".mypy_cache")]
    out, _, status = mypy.api.run([*options, str(file)])
    assert status == 0, out


def test_readme_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With narrow models, fresh weights and PyTorch as the only engine, and without the hub."""
    create = timm.create_model

    def narrow(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        return create(name, **{"embed_dim": 24, "num_heads": 2, **options})

    def create_repo(api: HfApi, repo_id: str, **options: Any) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    uploads = []
    monkeypatch.setattr(timm, "create_model", narrow)
    monkeypatch.setattr("dynamicvit.optimize", partial(optimize, engines=["eager"]), raising=False)
    quick = partial(search, objective="gmacs", quiet=True)
    monkeypatch.setattr("dynamicvit.search", quick, raising=False)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "file_exists", lambda api, *args, **options: False)
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **options: uploads.append(options))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 200), "orange").save("cat.jpg")
    torch.save({"model": create("deit_tiny_patch16_224").state_dict()}, "dynamic-vit_384_r0.7.pth")
    names: dict[str, Any] = {}
    exec(GIVEN + _code("README.md"), names)
    assert (tmp_path / "cat.png").exists()
    assert len(uploads) == 1
    assert names["logits"].shape == (1, 1000)


@pytest.mark.skipif("FASHION_MNIST" not in os.environ, reason="needs the data set's folder")
def test_a_committed_checkpoint_s_row_is_reproduced() -> None:
    results = write_numbers.RESULTS
    rows = json.loads((results / "accuracy.json").read_text())["rows"]
    for name in ("dense", "learned-0.7"):
        [row] = [row for row in rows if row["row"] == name]
        [found] = evaluate(
            [str(results / "small" / name)],
            data="torch/fashion_mnist",
            data_dir=os.environ["FASHION_MNIST"],
            workers=0,
        ).values()
        assert found["images"] == row["images"] == 10_000
        assert (found["top1"], found["top5"]) == (row["top1"], row["top5"])
