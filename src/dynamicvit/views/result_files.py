"""What a report is made of: a model, and the results that other commands wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.compare import ARRAYS, JSON
from dynamicvit.evaluation.setup import input_size, token_counts
from dynamicvit.io.folder import WEIGHTS
from dynamicvit.io.load import at_budget, load_model
from dynamicvit.training.config import read_options
from dynamicvit.views.plot import CONFIG, METRICS, find_best

# Where a report looks beside the model for what a command wrote.
USUAL = {
    "compare": "compare",
    "benchmark": "benchmark.json",
    "search": "search.json",
    "quickstart": "metrics.json",
}
_MODEL, _RUN = "sparse", "sparse_run"  # of a quickstart
_DENSE = "dense"  # of a run that trained its dense model first


@dataclass
class Findings:
    """A model and the results in its folder. A result is None where none was found."""

    name: str  # as the caller gave it
    model: str  # folder or hub id
    home: Path | None  # folder to report on; None for a hub id
    run: Path | None  # folder of the model's training run
    sparse: SparseViT
    tokens: list[int]
    gmacs: tuple[float, float]  # dense, sparse
    config: dict[str, Any] = field(default_factory=dict)  # of the run
    trained_first: Path | None = None  # the dense model that the run trained first
    compare: dict[str, Any] | None = None
    maps: dict[str, np.ndarray] | None = None  # arrays that belong to `compare`
    benchmark: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    quickstart: dict[str, Any] | None = None
    sources: list[tuple[str, str]] = field(default_factory=list)  # file, its command and date
    refused: dict[str, str] = field(default_factory=dict)  # command → why its file is left out
    earlier: set[str] = field(default_factory=set)  # commands that ran before the model was written

    @property
    def teacher(self) -> str | None:
        """The dense model that training began with."""
        return str(self.trained_first or self.config.get("model") or "") or None

    def is_own(self, point: dict[str, Any]) -> bool:
        """Whether a point of a search has the model's own schedule."""
        return _identity(point["tokens"], point["gmacs"]) == _identity(self.tokens, self.gmacs[1])


def gather(
    name: str,
    benchmark: str | None,
    compare: str | None,
    search: str | None,
    keep_ratio: float | None = None,
    per_image: bool = False,
) -> Findings:
    """Read what there is of a model. Arguments and errors as for `report`."""
    model, home, run = _locate(name)
    sparse = load_model(model)
    if not isinstance(sparse, SparseViT):
        raise ValueError(f"model must be sparse, got the dense model {model}")
    if sparse.merges:
        kind = type(sparse.scorers[0]).__name__
        raise ValueError(f"model must choose tokens, got {model} with {kind}, which merges them")
    sparse = at_budget(sparse, model, keep_ratio, per_image)
    size = input_size(sparse)
    # Where each image has its own budget, the mean is that of the schedule.
    fixed = sparse.at(schedule=sparse.schedule)
    gmacs = (count_gmacs(sparse.backbone, size), count_gmacs(fixed, size))
    found = Findings(name, model, home, run, sparse, list(token_counts(sparse)), gmacs)
    for command, given in (("compare", compare), ("benchmark", benchmark), ("search", search)):
        _add_result(found, command, given)
    if home is not None and run == home / _RUN:
        _add_result(found, "quickstart", None)
    if run is not None:
        _add_run(found, run)
    return found


def _locate(name: str) -> tuple[str, Path | None, Path | None]:
    """The model, its home and its run (see `Findings`), of the folder of a run, of a quickstart or
    of a model, or of a hub id."""
    folder = Path(name)
    if not folder.is_dir():
        return name, None, None
    if (folder / METRICS).is_file():
        best = find_best(folder)
        if best is None:
            raise ValueError(f"model must have finished an epoch, got the run {name!r} without one")
        return str(best), folder, folder
    if _is_quickstart(folder):
        return str(folder / _MODEL), folder, folder / _RUN
    above = folder.resolve().parent if folder.name in ("", "..") else folder.parent
    best = find_best(above)
    if best is not None and best.resolve() == folder.resolve():
        return name, above, above
    if _is_quickstart(above) and folder.resolve() == (above / _MODEL).resolve():
        return name, above, above / _RUN
    return name, folder, None


def _is_quickstart(folder: Path) -> bool:
    return (folder / _MODEL).is_dir() and (folder / USUAL["quickstart"]).is_file()


def _add_result(found: Findings, command: str, given: str | None) -> None:
    """Read what a command wrote, from the file that is given or from its usual path."""
    if given is None and found.home is None:
        return
    path = Path(given) if given is not None else (found.home or Path()) / USUAL[command]
    if command == "compare":
        path /= JSON
    if not path.is_file():
        if given is not None:
            raise FileNotFoundError(
                f"{command} must be what `dynamicvit {command}` wrote, got {given}, and "
                f"{path} is no file"
            )
        return
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        first, *others = _identities(command, result)
        date = result["environment"]["date"]
    except Exception as error:  # foreign content makes readers raise nearly anything
        raise _foreign(path, command, error) from error
    own = _identity(found.tokens, found.gmacs[1])
    if own not in (first, *others):
        reason = f"{path} is of another model, with {first}, where this one has {own}"
        if given is not None:
            raise ValueError(f"{command} must be of this model: {reason}")
        found.refused[command] = reason
        return
    setattr(found, command, result)
    if command == "compare":
        found.maps = _read_maps(path.with_name(ARRAYS))
    weights = Path(found.model) / WEIGHTS
    note = ""
    if weights.exists() and path.stat().st_mtime < weights.stat().st_mtime:
        note = ", before the model's file was written"
        found.earlier.add(command)
    found.sources.append((str(path), f"dynamicvit {command}, {date}{note}"))


def _identities(command: str, result: dict[str, Any]) -> list[str]:
    """The models that a command measured: a search measures many."""
    if command == "search":
        if "data" not in result:  # written from Python, perhaps without labels
            raise ValueError("it does not say which data it is of")
        return [_identity(point["tokens"], point["gmacs"]) for point in result["points"]]
    if command == "quickstart":
        return [_identity(result["sparse"]["tokens"], result["sparse"]["gmacs"])]
    return [_identity(result["tokens"], result["gmacs"]["sparse"])]


def _identity(tokens: Sequence[int], gmacs: float) -> str:
    """What tells models apart. GMACs to nine digits differ even by one class."""
    return f"{arrows(tokens)} tokens, {gmacs:.9g} GMACs"


def _read_maps(path: Path) -> dict[str, np.ndarray]:
    names = ("keep", "keep_by_class", "images_by_class", "class_names")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            maps = {name: arrays[name] for name in names}
        if maps["keep_by_class"].shape[1:] != maps["keep"].shape:
            raise ValueError(f"keep has shape {maps['keep'].shape}")
    except Exception as error:  # foreign content makes readers raise nearly anything
        raise _foreign(path, "compare", error) from error
    return maps


def _add_run(found: Findings, run: Path) -> None:
    """Read the training run's files."""
    found.trained_first = find_best(run / _DENSE)
    config = run / CONFIG
    if config.is_file():
        found.config = read_options(config)
    files = [path for path in (config, run / METRICS) if path.is_file()]
    found.sources += [(str(path), "dynamicvit train") for path in files]


def _foreign(path: Path, command: str, error: Exception) -> ValueError:
    reason = str(error)
    if isinstance(error, KeyError):
        reason = f"it has no {reason}"
    elif isinstance(error, json.JSONDecodeError):
        reason = f"it is not JSON ({reason})"
    return ValueError(f"{path} is not what `dynamicvit {command}` writes: {reason}")


def arrows(counts: Sequence[int]) -> str:
    """196 → 137 → 96 → 67."""
    return " → ".join(map(str, counts))
