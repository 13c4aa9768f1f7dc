"""What the demo's page shows of an image, a model and a keep ratio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from dynamicvit.core.backbones import UnsupportedBackbone
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.launch import find_device
from dynamicvit.evaluation.setup import input_size
from dynamicvit.evaluation.timing import compare_speed
from dynamicvit.io.embedded import ASSETS
from dynamicvit.io.load import at_budget, load_model
from dynamicvit.io.predictions import Prediction
from dynamicvit.views.explain import explain, is_untrained
from dynamicvit.views.explanation import Explanation

_EMBEDDED = "embedded"
_BY_ATTENTION = (
    "This is a dense model without trained scorers: the patches stay that its class token attends "
    "to most (EViT’s rule, not DynamicViT’s). More answers change than after training. "
    "“dynamicvit quickstart” trains a model, “dynamicvit demo quickstart/sparse” shows it."
)
_UNTRAINED = (
    "The scorers of this model are not trained: they choose patches at random. “dynamicvit train” "
    "trains them."
)

Pictures = list[tuple[Image.Image, str]]  # each with its caption
Rows = list[list[str]]  # of a table


class Answer(NamedTuple):
    """What the page shows of an image.

    Attributes:
        kept: the input, and what each stage keeps of it.
        classes: class, dense probability, pruned probability; empty where it is not among the
            five likeliest.
        scores: each stage's keep scores.
        note: what the user should know of it, in Markdown.
    """

    kept: Pictures
    classes: Rows
    scores: Pictures
    note: str


class Answers:
    """What the page shows for a model and a keep ratio. Make one call at a time.

    Args:
        names: as `demo`'s `models`.
        within: the folder that images may be read from; None for any. The client supplies a path,
            and must see no file but uploads and photos.
        device: where models run; by default a GPU if there is one.
        keep_ratio, per_image: as `demo`'s.

    Attributes:
        models: name → the model.
        lowest: the lowest keep ratio that all models have.
        notes: name → where its choice of patches comes from, if it is not trained.

    Raises:
        ValueError, FileNotFoundError: as `demo`.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        within: Path | None = None,
        device: torch.device | None = None,
        keep_ratio: float | None = None,
        per_image: bool = False,
    ) -> None:
        device = find_device(None) if device is None else device
        self._within = within
        self._per_image = per_image
        self.lowest = 0.0
        self.models: dict[str, SparseViT] = {}
        self.notes: dict[str, str] = {}
        for name in list(names) or [_EMBEDDED]:
            model, self.notes[name] = _load(name)
            model = at_budget(model, name, keep_ratio, per_image)
            if per_image:
                self.lowest = max(self.lowest, model.calibration.keep_ratios[0])
            self.models[name] = model.to(device).eval().requires_grad_(False)
        self._costs: dict[tuple[str, KeepSchedule], Rows] = {}
        around = environment()
        processor = f"{around['processor']}, threads: {torch.get_num_threads()}"
        self.machine = around["gpu"] if device.type == "cuda" else processor

    def show(self, upload: dict[str, Any] | None, name: str, keep_ratio: float) -> Answer:
        """What stays of an uploaded image, and its likeliest classes; nothing without an image.

        Args:
            upload: with the file's `path`, and its original name as `orig_name`.
            name: of a model.
            keep_ratio: share of the patches that each stage keeps.

        Raises:
            ValueError, TypeError, OSError: naming what is wrong with these.
        """
        model = self._at(name, keep_ratio, self._per_image)
        if not upload:
            return Answer([], [], [], "")
        path = Path(upload["path"]).resolve()
        if self._within is not None and not path.is_relative_to(self._within.resolve()):
            raise ValueError("image must be an upload or one of the photos")
        found = _explain(model, path, upload.get("orig_name") or path.name)
        notes = [self.notes[name]] if self.notes[name] else []
        if found.level is not None:
            notes.append(f"This image keeps {found.patches} patches.")
        if found.cropped:
            notes.append(f"The pictures show the model’s crop: {found.cropped}.")
        if not found.dense:
            notes.append("The model has no classes.")
        classes = _compare_classes(found.dense, found.pruned)
        return Answer(_kept(found), classes, _scores(found), "\n\n".join(notes))

    def cost(self, name: str, keep_ratio: float, again: bool = False) -> Rows:
        """Operations and time of dense and pruned. Each setting is measured once; `again` measures
        anew.

        Raises:
            ValueError, TypeError: naming what is wrong with an argument.
        """
        model = self._at(name, keep_ratio)
        key = (name, model.schedule)
        if again or key not in self._costs:
            self._costs[key] = _measure(model.fuse())
        return self._costs[key]

    def _at(self, name: str, keep_ratio: float, per_image: bool = False) -> SparseViT:
        if not isinstance(name, str) or name not in self.models:
            raise ValueError(f"model must be one of {', '.join(self.models)}, got {name!r}")
        model = self.models[name]
        model.schedule.with_keep_ratio(keep_ratio)  # refuses None too
        return model.at(keep_ratio=keep_ratio, per_image=per_image)


def _load(name: str) -> tuple[SparseViT, str]:
    """A model, and a note on its choice of patches if it is not trained."""
    model = load_model(str(ASSETS / "model") if name == _EMBEDDED else name)
    if not isinstance(model, SparseViT):
        try:
            return sparsify(model, keep_ratio=0.7, scorer="class_attention"), _BY_ATTENTION
        except UnsupportedBackbone as error:
            raise ValueError(
                "models must be sparse, or have a class token whose attention chooses, "
                f"got the dense model {name}: {error}"
            ) from error
    if model.merges:
        kind = type(model.scorers[0]).__name__
        raise ValueError(f"models must choose tokens, got {name} with {kind}")
    return model, _UNTRAINED if is_untrained(model) else ""


def _explain(model: SparseViT, path: Path, called: str) -> Explanation:
    """ValueError, calling the file by the name that the user knows, if it cannot be read."""
    try:
        return explain(model, path)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(str(error).replace(str(path), called)) from error


def _kept(found: Explanation) -> Pictures:
    height, width = found.pixels.shape[:2]
    start, *counts = found.counts
    captions = [f"input, {width} × {height} pixels"]
    captions += [
        f"stage {stage}, {count} of {start} patches" for stage, count in enumerate(counts, start=1)
    ]
    return list(zip(found.panels(), captions, strict=True))


def _scores(found: Explanation) -> Pictures:
    size, scores = found.panels()[0].size, []
    for stage in range(len(found.kept)):
        heat, lowest, highest = found.heat_map(stage)
        enlarged = Image.fromarray(heat).resize(size, Image.Resampling.NEAREST)
        scores.append((enlarged, f"stage {stage + 1}, {lowest:.3g} to {highest:.3g}"))
    return scores


def _compare_classes(dense: Sequence[Prediction], pruned: Sequence[Prediction]) -> Rows:
    """`Answer.classes`. Classes of the same name have their index beside it."""
    names = {item.index: item.name for item in (*dense, *pruned)}
    same = Counter(names.values())
    sides = [{item.index: f"{item.probability:.1%}" for item in side} for side in (dense, pruned)]
    return [
        [name if same[name] == 1 else f"{name} ({index})", *(side.get(index, "") for side in sides)]
        for index, name in names.items()
    ]


def _measure(pruned: SparseViT) -> Rows:
    dense, size = pruned.backbone, input_size(pruned)
    gmacs = [count_gmacs(model, size) for model in (dense, pruned)]
    [speed] = compare_speed(dense, pruned, size, batch_sizes=(1,), seconds=0.5)
    times = [f"{1e3 / rate:.2f}" for rate in (speed.dense, speed.sparse)]
    low, high = speed.spread
    return [
        ["GMACs", *(f"{number:.3f}" for number in gmacs), f"{gmacs[1] / gmacs[0] - 1:+.0%}"],
        # The quotient of the two times as they are shown, so that the row agrees with itself.
        ["ms", *times, f"{float(times[0]) / float(times[1]):.2f}×"],
        ["quartiles", "", "", f"{low:.2f}–{high:.2f}×"],
    ]
