"""What other commands wrote of a model, found beside it or named: what a report is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from dynamicvit.checkpoint import load_model
from dynamicvit.core.folder import WEIGHTS
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT
from dynamicvit.training.evaluate import input_size, token_counts
from dynamicvit.training.plot import CONFIG, METRICS, find_best
from dynamicvit.views.compare import ARRAYS, JSON

# Where a report looks beside the model, and what the commands that it names write.
BENCHMARK, SWEEP, COMPARE = "benchmark.json", "sweep.json", "compare"
_QUICKSTART = ("sparse", "sparse_run", "metrics.json")  # of a quickstart: model, run, figures


@dataclass(frozen=True)
class Place:
    """A model, and where what belongs to it lies: None for a model that is in no folder here."""

    model: str
    home: Path | None
    run: Path | None


@dataclass(frozen=True)
class Written:
    """What a command wrote; `with` it, errors that its content causes name the file."""

    path: Path
    command: str
    content: Any

    def __enter__(self) -> Any:
        return self.content

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):  # foreign content makes readers raise nearly anything
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{self.path} is not what `dynamicvit {self.command}` writes: {reason}"
            ) from error


@dataclass(frozen=True)
class Findings:
    """A model and what its folders tell of it, found or not."""

    name: str  # as it was asked for
    place: Place
    sparse: SparseViT
    tokens: tuple[int, ...]
    gmacs: tuple[float, float]  # dense, sparse
    config: dict[str, Any]  # of the run; empty if there is none
    benchmark: Written | None
    compare: Written | None
    maps: Written | None  # arrays, beside what `compare` holds
    sweep: Written | None
    quickstart: Written | None
    sources: list[tuple[str, str]]  # what a part is made from, and when that was measured
    refused: dict[str, str]  # what was found but is of another model → why

    @property
    def data(self) -> str:
        return str(self.config.get("data") or "path/to/images")


def locate(name: str) -> Place:
    """The model meant by a folder of a run, of a quickstart or of a model; or by a hub id."""
    folder = Path(name)
    model, run, figures = _QUICKSTART
    if not folder.is_dir():
        return Place(name, None, None)
    if (folder / METRICS).is_file():
        best = find_best(folder)
        if best is None:
            raise ValueError(f"model must have finished an epoch, got the run {name!r} without one")
        return Place(str(best), folder, folder)
    if (folder / model).is_dir() and (folder / figures).is_file():
        return Place(str(folder / model), folder, folder / run)
    above = folder.resolve().parent if folder.name in ("", "..") else folder.parent
    best = find_best(above)
    if best is not None and best.resolve() == folder.resolve():
        return Place(name, above, above)
    if folder.resolve() == (above / model).resolve() and (above / figures).is_file():
        return Place(name, above, above / run)
    return Place(name, folder, None)


def gather(name: str, benchmark: str | None, compare: str | None, sweep: str | None) -> Findings:
    """Read what there is of a model. Arguments and errors as for `report`."""
    place = locate(name)
    sparse = load_model(place.model)
    if not isinstance(sparse, SparseViT):
        raise ValueError(f"model must be sparse, got the dense model {place.model}")
    tokens, size = token_counts(sparse), input_size(sparse)
    gmacs = count_gmacs(sparse.backbone, size), count_gmacs(sparse, size)
    sources: list[tuple[str, str]] = []
    refused: dict[str, str] = {}

    def read(command: str, given: str | None, usual: str, inside: str = "") -> Written | None:
        if given is None and (place.home is None or not (place.home / usual / inside).exists()):
            return None
        path = (Path(given) if given is not None else cast(Path, place.home) / usual) / inside
        if not path.is_file():
            raise FileNotFoundError(f"{command} must be what the command wrote, got no file {path}")
        with Written(path, command, None):
            content = json.loads(path.read_text(encoding="utf-8"))
        found = Written(path, command, content)
        with found as result:
            theirs = _tokens_of(command, result)
            first = arrows(theirs[0])
            date = result["environment"]["date"]
        if list(tokens) not in theirs:
            reason = (
                f"{path} is of another model, with {first} tokens, where this one has "
                f"{arrows(tokens)}"
            )
            if given is not None:
                raise ValueError(f"{command} must be of this model: {reason}")
            refused[command] = reason
            return None
        weights = Path(place.model) / WEIGHTS
        old = weights.exists() and path.stat().st_mtime < weights.stat().st_mtime
        note = ", before the model's file was" if old else ""
        sources.append((str(path), f"dynamicvit {command}, {date}{note}"))
        return found

    measured = {
        "benchmark": read("benchmark", benchmark, BENCHMARK),
        "compare": read("compare", compare, COMPARE, JSON),
        "sweep": read("sweep", sweep, SWEEP),
    }
    if place.home is not None and place.run == place.home / _QUICKSTART[1]:
        measured["quickstart"] = read("quickstart", None, _QUICKSTART[2])
    if (comparison := measured["compare"]) is not None:
        measured["maps"] = _read_maps(comparison.path.with_name(ARRAYS))
    config: dict[str, Any] = {}
    for usual in (CONFIG, METRICS) if place.run is not None else ():
        path = cast(Path, place.run) / usual
        if path.is_file():
            sources.append((str(path), "dynamicvit train"))
        if path.is_file() and usual == CONFIG:
            with Written(path, "train", None):
                config = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    return Findings(
        name=name,
        place=place,
        sparse=sparse,
        tokens=tokens,
        gmacs=gmacs,
        config=config,
        sources=sources,
        refused=refused,
        **{"maps": None, "quickstart": None, **measured},
    )


def _tokens_of(command: str, result: dict[str, Any]) -> list[list[int]]:
    """The token counts of what a command measured: a sweep's are of many schedules."""
    if command == "sweep":
        return [list(point["tokens"]) for point in result["points"]]
    return [list(result["sparse"]["tokens"] if command == "quickstart" else result["tokens"])]


def _read_maps(path: Path) -> Written:
    found = Written(path, "compare", {})
    with found as content, np.load(path, allow_pickle=False) as arrays:
        for name in ("keep", "keep_by_class", "images_by_class", "class_names"):
            content[name] = arrays[name]
        if content["keep_by_class"].shape[1:] != content["keep"].shape:
            raise ValueError(f"keep has shape {content['keep'].shape}")
    return found


def arrows(counts: Sequence[int]) -> str:
    """196 → 137 → 96 → 67."""
    return " → ".join(map(str, counts))
