"""The console script `dynamicvit`.

It stands outside the package, because importing the package imports torch and timm, which takes
seconds: `--help`, `--version` and a misspelt command answer without them.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

# Command → "module:function", and the first line of the function's docstring.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "dynamicvit.quickstart:quickstart",
        "Make a dense model sparse, fine-tune it, and measure accuracy and speed before and after.",
    ),
    "train": (
        "dynamicvit.training.train:train",
        "Train a sparse model from a dense one, or a dense model.",
    ),
    "evaluate": (
        "dynamicvit.evaluation.evaluate:evaluate",
        "Evaluate dense and sparse models on a data set: a table, and JSON.",
    ),
    "calibrate": (
        "dynamicvit.evaluation.calibrate:calibrate",
        "Prepare a model folder for --per_image: a budget for each image.",
    ),
    "search": (
        "dynamicvit.deploy.search_data:search_data",
        "Find the fastest form of a model within a limit on lost accuracy or changed answers.",
    ),
    "compare": (
        "dynamicvit.evaluation.compare:compare",
        "Compare a sparse model with a dense one over a data set: tokens kept, changed answers.",
    ),
    "plot": (
        "dynamicvit.views.plot:plot",
        "Draw the curves of a training run, finished or not: losses, accuracy, kept tokens, rates.",
    ),
    "report": (
        "dynamicvit.views.report:report",
        "Show a model, its training and its measured results as one HTML file.",
    ),
    "predict": (
        "dynamicvit.deploy.predict:predict_files",
        "Classify image files: a table, and JSON or CSV.",
    ),
    "explain": (
        "dynamicvit.views.explain_files:explain_files",
        "Show which patches of images a model keeps at each stage, and the classes it predicts.",
    ),
    "demo": (
        "dynamicvit.views.demo:demo",
        "Serve a web page that shows what a model keeps of an image at any keep ratio.",
    ),
    "export": (
        "dynamicvit.deploy.export:export",
        "Write a model as a file for ONNX Runtime, OpenVINO or PyTorch without Python.",
    ),
    "benchmark": (
        "dynamicvit.deploy.benchmark:benchmark",
        "Time a pruned model against its dense one on this machine: a table, JSON and a plot.",
    ),
    "convert": (
        "dynamicvit.io.released:convert",
        "Write released weights as a model folder: a DynamicViT file, or an official or timm one.",
    ),
    "models": (
        "dynamicvit.evaluation.supported_models:models",
        "List the timm models that can be made sparse: parameters, and GMACs dense and pruned.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0; a user's mistake exits with 2 and one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"dynamicvit {version('dynamicvit')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        fail("dynamicvit", f"no command {name!r}; commands are {', '.join(COMMANDS)}")
    from dynamicvit.cli import run

    return run(name, rest)


def fail(prog: str, message: str, code: int = 2) -> NoReturn:
    """Print an error on one line and exit."""
    print(f"{prog}: error: {message}", file=sys.stderr)
    sys.exit(code)


def _overview() -> str:
    indent = 2 + max(map(len, COMMANDS)) + 2
    width = max(shutil.get_terminal_size().columns, indent + 20)
    lines = ["usage: dynamicvit COMMAND [options]", ""]
    for name, (_, summary) in COMMANDS.items():
        text = textwrap.fill(
            summary, width, initial_indent=" " * indent, subsequent_indent=" " * indent
        )
        lines.append(f"  {name}".ljust(indent) + text[indent:])
    lines += ["", "dynamicvit COMMAND --help lists the options of a command."]
    lines += ["With DYNAMICVIT_TRACEBACK=1 in the environment, errors come with their traceback."]
    return "\n".join(lines)
