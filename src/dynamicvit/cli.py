"""The command line, without its table of commands, which is in `dynamicvit_command`.

Options, types, defaults and help come from the functions' and dataclasses' own signatures and
docstrings; each function lives where its subject lives.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser

from dynamicvit.core.backbones import UnsupportedBackbone
from dynamicvit.evaluation.console import plain
from dynamicvit_command import COMMANDS, fail, main

# What a user can cause, as opposed to a defect of ours, which deserves its traceback.
USER_ERRORS = (ValueError, UnsupportedBackbone, OSError)

__all__ = ["COMMANDS", "build_parser", "find_function", "main", "run"]


# What jsonargparse says of a value of the wrong kind, over several lines.
_UNION = re.compile(
    r'Parser key "(\w+)".*?Subtypes: \[(.*?)\]\s+Errors:.*Given value: (.*)', re.DOTALL
)
_KIND = re.compile(
    r'Parser key "(\w+)":\s+Expected a <class \'(\w+)\'>\.\s+Got value: (.*)', re.DOTALL
)
_REQUIRED = "the following arguments are required: "
_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false"}


class _Parser(ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        union = _UNION.search(message)
        if union is not None:
            name, kinds, value = union.groups()
            kinds = re.sub(r"<class '(\w+)'>", r"\1", kinds).replace(", NoneType", " or null")
            example = ", such as [0.7]" if kinds.startswith("list[float]") else ""
            message = f"{name} must be {kinds}{example}, got {value}"
        elif kind := _KIND.search(message):
            name, wanted, value = kind.groups()
            message = f"{name} must be {_KINDS.get(wanted, wanted)}, got {value}"
        elif message.startswith(_REQUIRED):
            names = message.removeprefix(_REQUIRED).split(", ")
            options = {action.dest for action in self._actions if action.option_strings}
            message = _REQUIRED + ", ".join("--" * (name in options) + name for name in names)
        elif message.startswith("unrecognized arguments"):
            message += f"; {self.prog} --help lists its options"
        fail(self.prog, " ".join(message.split()))


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the command of this name with its arguments. Returns 0; exits as `main` does."""
    function = find_function(name)
    parser, configs = build_parser(name)
    try:
        given = [_underscored(item) for item in arguments]
        if name == "train":
            from dynamicvit.training.run_folder import resume_arguments

            given = [*resume_arguments(given), *given]
        _check_files(parser, given)
        values = _parse(parser, given)
        for parameter, kind in configs.items():
            fields = [item.name for item in dataclasses.fields(kind)]
            values[parameter] = kind(**{field: values.pop(field) for field in fields})
        # A quiet command that writes no named file gives its result, so that scripts can read it.
        alone = _has_optional_output(function) and values["quiet"] and values["output"] is None
        result = function(
            *[values.pop(name) for name in _positional_only(function) if name in values], **values
        )
        if alone and os.environ.get("RANK", "0") == "0":
            print(_as_text(result))
        sys.stdout.flush()
    except BrokenPipeError:  # such as `dynamicvit models | head`
        # Python flushes once more when it exits, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if os.environ.get("DYNAMICVIT_TRACEBACK"):
            raise
        fail(parser.prog, _one_line(error))
    except KeyboardInterrupt:
        fail(parser.prog, "interrupted", code=130)
    return 0


def _check_files(parser: ArgumentParser, arguments: list[str]) -> None:
    """Raise ValueError, which names the file, unless each --config holds options of the command."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # The command's own parser refuses an option without a value.
    finder.add_argument("--config", action="append", nargs="?", default=[])
    files = [Path(file) for file in finder.parse_known_args(arguments)[0].config if file]
    for file in filter(Path.is_file, files):
        from dynamicvit.training.config import read_options

        unknown = sorted(read_options(file).keys() - {action.dest for action in parser._actions})
        if unknown:
            raise ValueError(f"{file} has options that {parser.prog} does not have: {unknown}")


def _parse(parser: ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = parser.parse_args(arguments).as_dict()
    if "recipe" in values:  # what is given, also in a file, comes after it and so goes before
        from dynamicvit.training.config import find_recipe

        recipe = find_recipe(values.pop("recipe")).items()
        options = [f"--{option}={json.dumps(value)}" for option, value in recipe]
        values = parser.parse_args([*options, *arguments]).as_dict()
        del values["recipe"]
    values.pop("config_file", None)
    return values


def find_function(name: str) -> Callable[..., object]:
    """The function of a command."""
    module, _, function = COMMANDS[name][0].partition(":")
    found: Callable[..., object] = getattr(importlib.import_module(module), function)
    return found


def build_parser(name: str) -> tuple[ArgumentParser, dict[str, type]]:
    """The parser of a command, made from its function's parameters; and those of them that are
    dataclasses. A dataclass parameter contributes its fields as options; a required list of strings
    and positional-only parameters are positional."""
    function = find_function(name)
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
            if name == "train":
                from dynamicvit.training.config import RECIPES

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
        if action.dest == "quiet" and _has_optional_output(function):
            action.help = "print the result alone, and no progress; with output, nothing"
        if isinstance(action.default, bool):  # --resume alone means --resume true
            action.nargs, action.const = "?", True
    return parser, configs


def _has_optional_output(function: Callable[..., object]) -> bool:
    parameter = inspect.signature(function).parameters.get("output")
    return parameter is not None and parameter.default is None


def _positional_only(function: Callable[..., object]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [item.name for item in parameters if item.kind is item.POSITIONAL_ONLY]


def _underscored(argument: str) -> str:
    """--keep-ratio=0.7 → --keep_ratio=0.7: options may be typed either way."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


def _as_text(result: object) -> str:
    """What a command returns: the name of a file that it wrote, or figures as JSON."""
    if isinstance(result, Path):
        return plain(result)
    return json.dumps(result, indent=2, default=dataclasses.asdict)


def _one_line(error: BaseException) -> str:
    # An error that crossed from a data loading process carries that process's traceback before it.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = " ".join(map(str.strip, lines))
    return lines[-1].partition(": ")[2] if "Traceback" in message else message


if __name__ == "__main__":  # launch scripts of earlier versions
    sys.exit(main())
