"""What other commands wrote of a model, found beside it or named: what a report is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.compare import ARRAYS, JSON
from dynamicvit.evaluation.evaluate import input_size, token_counts
from dynamicvit.io.folder import WEIGHTS
from dynamicvit.io.load import load_model
from dynamicvit.views.plot import CONFIG, METRICS, find_best

# Where a report looks beside the model for what a command wrote.
USUAL = {
    "compare": "compare",
    "benchmark": "benchmark.json",
    "sweep": "sweep.json",
    "quickstart": "metrics.json",
}
_MODEL, _RUN = "sparse", "sparse_run"  # of a quickstart
_DENSE = "dense"  # of a run that trained its dense model first


class ForeignFile(ValueError):
    """A file is not what the command that it should be of writes."""

    def __init__(self, path: Path, command: str, reason: object) -> None:
        super().__init__(f"{path} is not what `dynamicvit {command}` writes: {reason}")


@dataclass(frozen=True)
class Findings:
    """A model and what its folders tell of it.

    What commands wrote is None where it was not found, and otherwise as it is in their files: to
    ask it for an entry that it lacks raises `ForeignFile`.
    """

    name: str  # as it was asked for
    model: str  # folder or hub id
    home: Path | None  # folder that is reported on; None for a model that is in none here
    run: Path | None  # folder of the run that the model is of
    sparse: SparseViT
    tokens: list[int]
    gmacs: tuple[float, float]  # dense, sparse
    config: dict[str, Any]  # of the run; empty if there is none
    trained_first: Path | None  # dense model that the run trained, to begin with
    compare: dict[str, Any] | None
    maps: dict[str, np.ndarray] | None  # arrays, beside what `compare` holds
    benchmark: dict[str, Any] | None
    sweep: dict[str, Any] | None
    quickstart: dict[str, Any] | None
    sources: list[tuple[str, str]]  # what the page is made from, and when that was measured
    refused: dict[str, str]  # what was found but is of another model → why
    earlier: set[str]  # what was measured before the model's file was written

    @property
    def teacher(self) -> str | None:
        """The dense model that the training began with."""
        return str(self.trained_first or self.config.get("model") or "") or None

    def is_own(self, point: dict[str, Any]) -> bool:
        """Whether a point of the sweep is of the model's own schedule."""
        return _shares(point["schedule"]) == _shares(asdict(self.sparse.schedule))


def gather(name: str, benchmark: str | None, compare: str | None, sweep: str | None) -> Findings:
    """Read what there is of a model. Arguments and errors as for `report`."""
    model, home, run = _locate(name)
    sparse = load_model(model)
    if not isinstance(sparse, SparseViT):
        raise ValueError(f"model must be sparse, got the dense model {model}")
    if sparse.merges:
        kind = type(sparse.scorers[0]).__name__
        raise ValueError(f"model must choose tokens, got {model} with {kind}, which merges them")
    tokens, size = list(token_counts(sparse)), input_size(sparse)
    gmacs = (count_gmacs(sparse.backbone, size), count_gmacs(sparse, size))
    own = _facts(tokens, asdict(sparse.schedule), size, gmacs[1])
    weights = Path(model) / WEIGHTS
    sources: list[tuple[str, str]] = []
    refused: dict[str, str] = {}
    earlier: set[str] = set()

    def find(command: str, given: str | None, inside: str = "") -> Path | None:
        """The file that is named, or lies in its usual place."""
        if given is not None:
            path = Path(given) / inside
            if not path.is_file():
                raise FileNotFoundError(
                    f"{command} must be what the command wrote, got no file {path}"
                )
            return path
        path = (home or Path()) / USUAL[command] / inside
        return path if home is not None and path.is_file() else None

    def read(command: str, path: Path | None, given: str | None = None) -> dict[str, Any] | None:
        if path is None:
            return None
        result = _read_json(path, command)
        try:
            theirs = _facts_of(command, result)
            date = result["environment"]["date"]
        except ForeignFile:
            raise
        except Exception as error:  # foreign content makes readers raise nearly anything
            raise ForeignFile(path, command, error) from error
        apart = [[kind for kind in facts if facts[kind] != own[kind]] for facts in theirs]
        if all(apart):
            nearest = min(range(len(apart)), key=lambda index: len(apart[index]))
            kind = apart[nearest][0]
            reason = (
                f"{path} is of another model, with {theirs[nearest][kind]}, where this one has "
                f"{own[kind]}"
            )
            if given is not None:
                raise ValueError(f"{command} must be of this model: {reason}")
            refused[command] = reason
            return None
        note = ""
        if weights.exists() and path.stat().st_mtime < weights.stat().st_mtime:
            note = ", before the model's file was"
            earlier.add(command)
        sources.append((str(path), f"dynamicvit {command}, {date}{note}"))
        return result

    compared_in = find("compare", compare, JSON)
    compared = read("compare", compared_in, compare)
    found = Findings(
        name=name,
        model=model,
        home=home,
        run=run,
        sparse=sparse,
        tokens=tokens,
        gmacs=gmacs,
        config=_read_config(run),
        trained_first=find_best(run / _DENSE) if run is not None else None,
        compare=compared,
        maps=_read_maps(compared_in.with_name(ARRAYS)) if compared and compared_in else None,
        benchmark=read("benchmark", find("benchmark", benchmark), benchmark),
        sweep=read("sweep", find("sweep", sweep), sweep),
        quickstart=(
            read("quickstart", find("quickstart", None))
            if home is not None and run == home / _RUN
            else None
        ),
        sources=sources,
        refused=refused,
        earlier=earlier,
    )
    for path in (run / CONFIG, run / METRICS) if run is not None else ():
        if path.is_file():
            sources.append((str(path), "dynamicvit train"))
    return found


def _locate(name: str) -> tuple[str, Path | None, Path | None]:
    """The model meant by a folder of a run, of a quickstart or of a model, or by a hub id; its home
    and its run as `Findings` has them."""
    folder = Path(name)
    if not folder.is_dir():
        return name, None, None
    if (folder / METRICS).is_file():
        best = find_best(folder)
        if best is None:
            raise ValueError(f"model must have finished an epoch, got the run {name!r} without one")
        return str(best), folder, folder
    figures = USUAL["quickstart"]
    if (folder / _MODEL).is_dir() and (folder / figures).is_file():
        return str(folder / _MODEL), folder, folder / _RUN
    above = folder.resolve().parent if folder.name in ("", "..") else folder.parent
    best = find_best(above)
    if best is not None and best.resolve() == folder.resolve():
        return name, above, above
    if folder.resolve() == (above / _MODEL).resolve() and (above / figures).is_file():
        return name, above, above / _RUN
    return name, folder, None


def _read_json(path: Path, command: str) -> dict[str, Any]:
    class Entries(dict[str, Any]):
        def __missing__(self, key: str) -> Any:
            raise ForeignFile(path, command, f"no {key!r}")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=Entries)
    except ValueError as error:
        raise ForeignFile(path, command, error) from error
    if not isinstance(content, Entries):
        raise ForeignFile(path, command, f"{str(content)[:40]!r}")
    return content


def _facts_of(command: str, result: dict[str, Any]) -> list[dict[str, str]]:
    """`_facts` of what a command measured, as far as its file tells: a sweep's are of many
    schedules."""
    if command == "sweep":
        if not result["points"]:
            raise ValueError("no points")
        return [
            _facts(point["tokens"], point["schedule"], None, point["gmacs"])
            for point in result["points"]
        ]
    if command == "quickstart":
        return [_facts(result["sparse"]["tokens"], None, None, result["sparse"]["gmacs"])]
    if command == "compare" and "gmacs" not in result:  # older files
        return [_facts(result["tokens"], None, None, None)]
    size = result["input_size"] if command == "benchmark" else None
    return [_facts(result["tokens"], None, size, result["gmacs"]["sparse"])]


def _facts(
    tokens: Sequence[int],
    schedule: dict[str, Any] | None,
    size: Sequence[int] | None,
    gmacs: float | None,
) -> dict[str, str]:
    """What tells models apart, in words; None is not known. GMACs to nine digits tell one class
    more or less."""
    facts = {"tokens": f"{arrows(tokens)} tokens"}
    if schedule is not None:
        facts["schedule"] = _shares(schedule)
    if size is not None:
        facts["size"] = f"input of {' × '.join(map(str, size))}"
    if gmacs is not None:
        facts["gmacs"] = f"{gmacs:.9g} GMACs"
    return facts


def _shares(schedule: dict[str, Any]) -> str:
    ratios = ", ".join(f"{ratio:.9g}" for ratio in schedule["ratios"])
    return f"shares {ratios} kept before blocks {', '.join(map(str, schedule['blocks']))}"


def _read_maps(path: Path) -> dict[str, np.ndarray]:
    names = ("keep", "keep_by_class", "images_by_class", "class_names")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            maps = {name: arrays[name] for name in names}
        if maps["keep_by_class"].shape[1:] != maps["keep"].shape:
            raise ValueError(f"keep has shape {maps['keep'].shape}")
    except Exception as error:  # foreign content makes readers raise nearly anything
        raise ForeignFile(path, "compare", error) from error
    return maps


def _read_config(run: Path | None) -> dict[str, Any]:
    if run is None or not (run / CONFIG).is_file():
        return {}
    try:
        return dict(yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ForeignFile(run / CONFIG, "train", error) from error


def arrows(counts: Sequence[int]) -> str:
    """196 → 137 → 96 → 67."""
    return " → ".join(map(str, counts))
