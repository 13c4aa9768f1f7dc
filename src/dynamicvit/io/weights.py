"""Weights: reading them from files, and fitting them into a model."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# Where files hold their weights, by precedence: what the DynamicViT authors evaluate, then timm's.
WRAPPERS = ("model", "state_dict_ema", "model_ema", "state_dict")
OWN_WEIGHTS = "weights of your own go with a timm name: --weights FILE, load_model(…, weights=FILE)"
_DEEPEST = 3  # levels of dicts in which weights are looked for
_LISTED = 5  # keys that an error names


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or torch file, without running code from it.

    The weights may lie under one of the names in `WRAPPERS`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds pickled objects other than tensors, or no weights.
    """
    weights = unwrap(_read(Path(path)))
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{path} must hold a state dict, got none; {OWN_WEIGHTS}")
    return weights


def unwrap(weights: Any) -> Any:
    """The dict that lies under the first of `WRAPPERS` that there is, or what was given."""
    if isinstance(weights, dict):
        for key in WRAPPERS:
            if isinstance(weights.get(key), dict):
                return weights[key]
    return weights


def find_weights(path: str | os.PathLike[str], expected: Collection[str]) -> dict[str, Tensor]:
    """A model's weights in a user's own file, wherever they lie in it.

    The file may be of timm, Lightning, accelerate or another training script. It may hold several
    dicts, and keys with prefixes (`model.`, `module.`, `net.backbone.`, …). The dict and the prefix
    with most of the model's keys are taken. Keys with another prefix (a loss, a metric, a second
    network) are left out. `torch.compile`'s `_orig_mod.` is removed everywhere.

    Args:
        path: a safetensors or torch file; read without running code from it.
        expected: the keys of the model's state dict.

    Returns:
        Keys without their prefix → tensors. Whether they all fit is not checked.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds no weights of this model, listing keys that it has.
    """
    wanted = set(expected)
    best: dict[str, Tensor] = {}
    most, seen = 0, list[str]()
    for found in _state_dicts(_read(Path(path))):
        tensors = {key.replace("_orig_mod.", ""): value for key, value in found.items()}
        seen = seen or list(tensors)
        prefixes: Counter[str] = Counter()
        for key in tensors:
            parts = key.split(".")
            for start in range(len(parts)):
                if ".".join(parts[start:]) in wanted:
                    prefixes[".".join([*parts[:start], ""]) if start else ""] += 1
        for prefix, count in prefixes.items():
            if count > most:
                most = count
                best = {
                    key.removeprefix(prefix): value
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
    if 2 * most < len(wanted):
        keys = ", ".join(seen[:_LISTED]) + (", …" if len(seen) > _LISTED else "")
        raise ValueError(
            f"weights must be those of the model, such as {next(iter(expected))}, got {path} with "
            f"{f'the {len(seen)} keys {keys}' if seen else 'no tensors'}"
        )
    return best


def _state_dicts(content: Any, depth: int = 0) -> Iterator[dict[str, Tensor]]:
    """The dicts in a file that hold tensors, those of `WRAPPERS` first."""
    if not isinstance(content, dict):
        return
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if tensors:
        yield tensors
    if depth < _DEEPEST:
        order = [key for key in WRAPPERS if key in content]
        for key in [*order, *(key for key in content if key not in order)]:
            yield from _state_dicts(content[key], depth + 1)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training scripts put their options beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make the readers raise nearly anything
        raise ValueError(
            f"{path} is damaged, not a weights file, or holds other objects than tensors, "
            f"which could run code and are refused"
        ) from error


def load_strictly(
    model: nn.Module,
    tensors: dict[str, Tensor],
    source: str,
    name: Callable[[str], str] = str,
) -> None:
    """Load weights into a model.

    Raises:
        ValueError: listing every key that does not match, and the first that holds a value that is
            not finite; named by `name`.
    """
    check_weights(model, tensors, source, name)
    for key, value in tensors.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise ValueError(f"{source} is damaged: {name(key)} holds NaN or infinity")
    model.load_state_dict(tensors)


def check_weights(
    model: nn.Module,
    tensors: dict[str, Tensor],
    source: str,
    name: Callable[[str], str] = str,
) -> None:
    """Raise ValueError listing every key of `tensors` that does not match the model's."""
    expected = model.state_dict()
    problems = [f"missing {name(key)}" for key in expected if key not in tensors]
    problems += [f"unexpected {name(key)}" for key in tensors if key not in expected]
    for key, value in expected.items():
        if key not in tensors:
            continue
        found = tensors[key]
        if found.shape != value.shape:
            problems.append(
                f"{name(key)} has shape {tuple(found.shape)}, expected {tuple(value.shape)}"
            )
        if found.is_floating_point() != value.is_floating_point() or found.is_complex():
            kind = "floating-point numbers" if value.is_floating_point() else "integers"
            problems.append(f"{name(key)} holds {found.dtype}, expected {kind}")
    if problems:
        raise ValueError(f"{source} does not fit the model: " + "; ".join(problems))
