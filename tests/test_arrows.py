"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynamicvit

PACKAGE = Path(dynamicvit.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# The part of the package that a module lies in → the parts it may import. Every part may import
# itself. PUBLIC stands for the names that the package itself offers.
PUBLIC = ""
LAYER = {
    "environment",
    "core",
    "backbones",
    "checkpoint",
    "embedded",
    "files",
    "training.evaluate",
    "__version__",
}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "environment": set(),
    "files": set(),
    "embedded": set(),
    "backbones": {"core", "files"},
    "checkpoint": {"core", "backbones", "files"},
    "training": LAYER,
    "deploy": LAYER,
    "views": LAYER | {"training.plot"},  # a report has a run's diagrams
    "quickstart": LAYER | {PUBLIC, "training", "deploy", "views"},
    "demo": LAYER | {"deploy", "views"},
    "cli": LAYER | {PUBLIC, "training", "deploy", "views", "quickstart", "demo"},
    PUBLIC: {"core", "backbones", "checkpoint", "training", "deploy", "views"},
}


def _imports(module: str, is_package: bool, source: str) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - is_package
                above = module.split(".")[: -up or None]
                base = ".".join([*above, base] if base else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _part(name: str) -> str:
    """`dynamicvit.core.model` lies in `core`; the package and its names are PUBLIC."""
    part = name.split(".")[1] if "." in name else PUBLIC
    is_module = part in ALLOWED or f"dynamicvit.{part}" in SOURCES or part == "__version__"
    return part if is_module else PUBLIC


def _violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """Imports of our own that the arrows forbid."""
    part = _part(module)
    allowed = ALLOWED[part] | {part}
    wrong = []
    for name in _imports(module, is_package, source):
        if name.split(".")[0] != "dynamicvit":
            continue
        inside = any(f"{name}.".startswith(f"dynamicvit.{ok}.") for ok in allowed - {PUBLIC})
        if not inside and not (_part(name) == PUBLIC and PUBLIC in allowed):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("module", SOURCES)
def test_imports_follow_the_arrows(module: str) -> None:
    path = SOURCES[module]
    source = path.read_text(encoding="utf-8")
    assert _violations(module, source, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("core.model", "from dynamicvit.core import tokens\nimport torch, timm", []),
        ("core.model", "from .tokens import topk_keep\nfrom . import scorer", []),
        ("core.model", "from dynamicvit.checkpoint import load", ["checkpoint.load"]),
        ("core.model", "def f():\n  from ..training import fit", ["training.fit"]),
        ("core.model", "from dynamicvit import __version__", ["__version__"]),
        ("core.model", "import dynamicvit", [""]),
        ("training.fit", "from dynamicvit import sparsify", ["sparsify"]),
        ("quickstart", "import dynamicvit\nfrom dynamicvit import sparsify", []),
        ("checkpoint", "from dynamicvit.core.folder import CONFIG", []),
        ("checkpoint", "from dynamicvit import training", ["training"]),
        ("training.fit", "from dynamicvit.files import write_text", []),
        ("training.fit", "import dynamicvit.views.report as r", ["views.report"]),
        ("views.report", "from dynamicvit.training.evaluate import evaluate", []),
        ("views.report", "from dynamicvit.training import evaluate", []),
        ("views.report", "from dynamicvit.training.fit import train", ["training.fit.train"]),
        ("deploy.export", "from dynamicvit.views import demo", ["views.demo"]),
        ("quickstart", "from dynamicvit.training.fit import train", []),
        ("quickstart", "from dynamicvit.cli import main", ["cli.main"]),
        ("views.explain", "from dynamicvit.demo import demo", ["demo.demo"]),
        ("training.fit", "from dynamicvit import cli", ["cli"]),
    ],
)
def test_the_check_sees_what_it_should(module: str, source: str, wrong: list[str]) -> None:
    found = _violations(f"dynamicvit.{module}", source)
    assert found == [f"dynamicvit.{name}".rstrip(".") for name in wrong]


def test_importing_the_package_costs_no_more_than_its_foundations() -> None:
    """What timm, torch and the hub client load is theirs; nothing heavy comes on top."""
    heavy = {"accelerate", "rich", "jsonargparse", "tensorboard", "matplotlib", "torchvision"}
    script = (
        "import sys, timm, huggingface_hub.utils, safetensors.torch; before = set(sys.modules);"
        "import dynamicvit; print(*(set(sys.modules) - before))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=3600
    )
    loaded = set(run.stdout.split())
    assert "dynamicvit.core.model" in loaded
    assert {name.split(".")[0] for name in loaded} & (heavy | {"yaml"}) == set()
    above = {name for name in loaded if _part(name) in ("training", "deploy", "views", "cli")}
    assert above == set()
