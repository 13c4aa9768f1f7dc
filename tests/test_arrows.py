"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dynamicvit

PACKAGE = Path(dynamicvit.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# A part imports itself and the parts of the rows above its own, no others.
LAYERS = (
    {"core"},
    {"models"},
    {"io"},
    {"evaluation"},
    {"training", "deploy"},
    {"views"},
    {"quickstart"},
    {"cli"},
    {"__main__"},
)
# `save_pretrained`, `push_to_hub` and `predict` are methods of the model, and import what they call
# when they are called.
EXCEPTIONS = {
    "dynamicvit.core.model": {
        "dynamicvit.io.folder",
        "dynamicvit.io.hub",
        "dynamicvit.io.predictions",
    }
}
# The package's own names: `dynamicvit.load`. Modules import from where a name is defined instead.
PUBLIC_USERS = {"dynamicvit.quickstart", "dynamicvit.cli"}


def _imports(module: str, source: str, is_package: bool = False) -> Iterator[str]:
    """Modules of ours that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -(node.level - is_package) or None]
                base = ".".join([*above, base] if base else above)
            names = [
                full if (full := f"{base}.{alias.name}") in SOURCES else base
                for alias in node.names
                if alias.name != "__version__"
            ]
        yield from (name for name in names if name.split(".")[0] == "dynamicvit")


def _at_import(module: str, source: str, is_package: bool) -> set[str]:
    """Those that are imported as soon as the module is."""
    body = [
        node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    return set(_imports(module, "\n".join(map(ast.unparse, body)), is_package))


def _layer(module: str) -> int:
    part = module.split(".")[1]
    for number, parts in enumerate(LAYERS):
        if part in parts:
            return number
    raise ValueError(f"{part} must be in LAYERS")


def _violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """Imports of our own that the arrows forbid."""
    wrong = []
    late = EXCEPTIONS.get(module, set()) - _at_import(module, source, is_package)
    for name in _imports(module, source, is_package):
        if name == "dynamicvit":
            allowed = module in PUBLIC_USERS
        elif module == "dynamicvit":
            allowed = True
        else:
            same = name.split(".")[1] == module.split(".")[1]
            allowed = same or _layer(name) < _layer(module)
        if not allowed and name not in late:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("module", SOURCES)
def test_imports_follow_the_arrows(module: str) -> None:
    path = SOURCES[module]
    source = path.read_text(encoding="utf-8")
    assert _violations(module, source, path.name == "__init__.py") == []


@pytest.mark.parametrize("module", [name for name in SOURCES if ".core" in name])
def test_the_core_imports_torch_and_timm_only(module: str) -> None:
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("dynamicvit" if node.level else (node.module or "").split(".")[0])
    assert found <= {*sys.stdlib_module_names, "torch", "timm", "dynamicvit"}


def _circle(imports: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    imports = {
        module: {
            name
            for name in _imports(module, path.read_text("utf-8"), path.name == "__init__.py")
            if name not in (*EXCEPTIONS.get(module, ()), module, "dynamicvit")
        }
        for module, path in SOURCES.items()
    }
    assert _circle(imports) == []
    assert _circle({"a": {"b"}, "b": {"a"}})


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("core.model", "from dynamicvit.core import tokens\nimport torch, timm", []),
        ("core.model", "from .tokens import topk_keep\nfrom . import schedule", []),
        ("core.model", "from dynamicvit.io.load import load", ["io.load"]),
        ("core.model", "def f():\n  from ..io.folder import save_folder", []),
        ("core.model", "from ..io.folder import save_folder", ["io.folder"]),
        ("core.tokens", "def f():\n  from ..io.folder import save_folder", ["io.folder"]),
        ("core.model", "from dynamicvit import __version__", []),
        ("core.model", "import dynamicvit", [""]),
        ("training.task", "from dynamicvit import sparsify", [""]),
        ("quickstart", "import dynamicvit\nfrom dynamicvit import sparsify", []),
        ("io.load", "from dynamicvit.io.folder import CONFIG", []),
        ("io.load", "from dynamicvit import training", ["training"]),
        ("training.task", "import dynamicvit.views.report as r", ["views.report"]),
        ("training.task", "from dynamicvit.deploy.export import export", ["deploy.export"]),
        ("views.report", "from dynamicvit.evaluation import evaluate", []),
        ("deploy.export", "from dynamicvit.views import demo", ["views.demo"]),
        ("quickstart", "from dynamicvit.cli import main", ["cli"]),
        ("training.task", "from dynamicvit import cli", ["cli"]),
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
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "dynamicvit.core.model" in loaded
    assert {name.split(".")[0] for name in loaded} & (heavy | {"yaml"}) == set()
    ours = {name.split(".")[1] for name in loaded if name.startswith("dynamicvit.")}
    assert ours <= {"core", "models", "io"}
