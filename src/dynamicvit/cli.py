"""The command line: one dict of command → function.

Options, types, defaults and help come from the functions' and dataclasses' own signatures and
docstrings; each function lives where its subject lives.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser

from dynamicvit import __version__
from dynamicvit.core.backbone import UnsupportedBackbone
from dynamicvit.deploy.benchmark import benchmark
from dynamicvit.deploy.export import export
from dynamicvit.deploy.predict import predict
from dynamicvit.evaluation.compare import compare
from dynamicvit.evaluation.evaluate import evaluate
from dynamicvit.evaluation.support import models
from dynamicvit.evaluation.sweep import sweep
from dynamicvit.io.released import convert
from dynamicvit.quickstart import quickstart
from dynamicvit.training.config import RECIPES, TrainConfig, find_recipe
from dynamicvit.training.fit import train
from dynamicvit.training.run_folder import resume_arguments
from dynamicvit.views.demo import demo
from dynamicvit.views.explain import explain
from dynamicvit.views.plot import plot
from dynamicvit.views.report import report

COMMANDS: dict[str, Callable[..., object]] = {
    "quickstart": quickstart,
    "train": train,
    "evaluate": evaluate,
    "sweep": sweep,
    "compare": compare,
    "plot": plot,
    "report": report,
    "predict": predict,
    "explain": explain,
    "demo": demo,
    "export": export,
    "benchmark": benchmark,
    "convert": convert,
    "models": models,
}

# What a user can cause, as opposed to a defect of ours, which deserves its traceback.
USER_ERRORS = (ValueError, UnsupportedBackbone, OSError)


# What jsonargparse says of a value of the wrong kind, over several lines.
_UNION = re.compile(
    r'Parser key "(\w+)".*?Subtypes: \[(.*?)\]\s+Errors:.*Given value: (.*)', re.DOTALL
)


class _Parser(ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        union = _UNION.search(message)
        if union is not None:
            name, kinds, value = union.groups()
            kinds = re.sub(r"<class '(\w+)'>", r"\1", kinds).replace(", NoneType", " or null")
            example = ", such as [0.7]" if kinds.startswith("list[float]") else ""
            message = f"{name} must be {kinds}{example}, got {value}"
        _fail(self.prog, message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0; a user's mistake exits with 2 and one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"dynamicvit {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        _fail("dynamicvit", f"no command {name!r}; commands are {', '.join(COMMANDS)}")
    function = COMMANDS[name]
    parser, configs = _build_parser(name, function)
    given = [_underscored(item) for item in rest]
    if name == "train":
        try:
            given = [*resume_arguments(given), *given]
        except USER_ERRORS as error:
            _fail(parser.prog, error)
    values = parser.parse_args(given).as_dict()
    if "recipe" in values:  # what is given, also in a file, comes after it and so goes before it
        recipe = find_recipe(values["recipe"]).items()
        options = [f"--{option}={json.dumps(value)}" for option, value in recipe]
        values = parser.parse_args([*options, *given]).as_dict()
        del values["recipe"]
    values.pop("config_file", None)
    try:
        for parameter, kind in configs.items():
            fields = [item.name for item in dataclasses.fields(kind)]
            values[parameter] = kind(**{field: values.pop(field) for field in fields})
        function(
            *[values.pop(name) for name in _positional_only(function) if name in values], **values
        )
    except USER_ERRORS as error:
        if os.environ.get("DYNAMICVIT_TRACEBACK"):
            raise
        _fail(parser.prog, error)
    except KeyboardInterrupt:
        _fail(parser.prog, "interrupted", code=130)
    return 0


def _build_parser(
    name: str, function: Callable[..., object]
) -> tuple[ArgumentParser, dict[str, type]]:
    """The parser of a function's parameters. A dataclass parameter contributes its fields as
    options; a required list of strings and positional-only parameters are positional."""
    doc = docstring_parser.parse(function.__doc__ or "")
    helps = {item.arg_name: item.description for item in doc.params}
    parser = _Parser(prog=f"dynamicvit {name}", description=doc.short_description)
    parser.add_argument(
        "--config", dest="config_file", action="config", help="YAML file with any of these options"
    )
    hints = typing.get_type_hints(function)
    configs: dict[str, type] = {}
    for parameter in inspect.signature(function).parameters.values():
        kind: Any = hints[parameter.name]
        required = parameter.default is inspect.Parameter.empty
        if dataclasses.is_dataclass(kind):
            configs[parameter.name] = typing.cast(type, kind)
            for group in getattr(kind, "GROUPS", (kind,)):
                parser.add_class_arguments(group)
            if kind is TrainConfig:
                parser.add_argument(
                    "--recipe",
                    choices=list(RECIPES),
                    default="paper",
                    help="what options are by default: the paper's, or fast: "
                    + ", ".join(f"{option} {value}" for option, value in RECIPES["fast"].items()),
                )
        elif required and kind == list[str]:
            parser.add_argument(parameter.name, nargs="+", help=helps[parameter.name])
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            # No default here: it would go before a config file's value.
            several = kind == list[str] | None
            optional: dict[str, Any] = (
                {} if required else {"nargs": "*" if several else "?", "default": argparse.SUPPRESS}
            )
            kind = str if several else kind
            parser.add_argument(parameter.name, type=kind, help=helps[parameter.name], **optional)
    skip: set[str | int] = {*configs, *(action.dest for action in parser._actions)}
    parser.add_function_arguments(function, skip=skip)
    for action in parser._actions:
        if isinstance(action.default, bool):  # --resume alone means --resume true
            action.nargs, action.const = "?", True
    return parser, configs


def _positional_only(function: Callable[..., object]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [item.name for item in parameters if item.kind is item.POSITIONAL_ONLY]


def _underscored(argument: str) -> str:
    """--keep-ratio=0.7 → --keep_ratio=0.7: options may be typed either way."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: dynamicvit COMMAND [options]", ""]
    for name, function in COMMANDS.items():
        summary = docstring_parser.parse(function.__doc__ or "").short_description
        lines.append(f"  {name:<{width}}  {summary}")
    lines += ["", "dynamicvit COMMAND --help lists the options of a command."]
    lines += ["With DYNAMICVIT_TRACEBACK=1 in the environment, errors come with their traceback."]
    return "\n".join(lines)


def _fail(prog: str, error: object, code: int = 2) -> NoReturn:
    # An error that crossed from a data loading process carries that process's traceback before it.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = " ".join(map(str.strip, lines))
    if "Traceback" in message:
        message = lines[-1].partition(": ")[2]
    print(f"{prog}: error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
