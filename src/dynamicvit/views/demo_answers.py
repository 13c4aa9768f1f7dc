"""What the demo's page shows of an image, a model and a keep ratio."""

from __future__ import annotations

import warnings
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
from dynamicvit.io.load import load_model
from dynamicvit.io.predictions import Prediction
from dynamicvit.views.explain import explain, is_untrained
from dynamicvit.views.explanation import Explanation

_EMBEDDED = "embedded"


Pictures = list[tuple[Image.Image, str]]  # each with its caption


class Answer(NamedTuple):
    """What the page shows of an image.

    Attributes:
        kept: the input, and what each stage keeps of it.
        dense, pruned: class → probability.
        scores: each stage's keep scores.
        note: what the user should know of it, in Markdown.
    """

    kept: Pictures
    dense: dict[str, float] | None
    pruned: dict[str, float] | None
    scores: Pictures
    note: str


class Answers:
    """What the page shows for a model and a keep ratio. It answers one call at a time.

    Args:
        names: as `demo`'s `models`.
        within: the folder that images may be read from; None for any. The client supplies a path,
            and must see no file but uploads and photos.
        device: where models run; by default a GPU if there is one.

    Attributes:
        models: name → the model.
        notes: name → where its choice of patches comes from, if it is not trained.

    Raises:
        ValueError, FileNotFoundError: as `demo`.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        within: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        device = find_device(None) if device is None else device
        self._within = within
        self.models: dict[str, SparseViT] = {}
        self.notes: dict[str, str] = {}
        for name in list(names) or [_EMBEDDED]:
            model = load_model(str(ASSETS / "model") if name == _EMBEDDED else name)
            note = ""
            if not isinstance(model, SparseViT):
                try:
                    model = sparsify(model, keep_ratio=0.7, scorer="class_attention")
                except UnsupportedBackbone as error:
                    raise ValueError(
                        "models must be sparse, or have a class token whose attention chooses, "
                        f"got the dense model {name}: {error}"
                    ) from error
                note = _BY_ATTENTION
            elif is_untrained(model):
                note = _UNTRAINED
            if model.merges:
                kind = type(model.scorers[0]).__name__
                raise ValueError(f"models must choose tokens, got {name} with {kind}")
            self.notes[name] = note
            self.models[name] = model.to(device).eval().requires_grad_(False)
        self._fused = {name: model.fuse() for name, model in self.models.items()}
        self._costs: dict[tuple[str, KeepSchedule], list[list[str]]] = {}
        around = environment()
        self.machine = (
            around["gpu"]
            if device.type == "cuda"
            else f"{around['processor']}, threads: {torch.get_num_threads()}"
        )

    def show(self, upload: dict[str, Any] | None, name: str, keep_ratio: float) -> Answer:
        """What stays of an uploaded image, and what it is taken for; nothing without an image.

        Args:
            upload: with the file's `path`, and its original name as `orig_name`.
            name: of a model.
            keep_ratio: share of the patches that reach a stage which it keeps.

        Raises:
            ValueError, TypeError, OSError: naming what is wrong with these.
        """
        model, schedule = self._at(self.models, name, keep_ratio)
        model = model.at(schedule=schedule)
        if not upload:
            return Answer([], None, None, [], "")
        found = _explain(model, self._find(upload["path"]), upload.get("orig_name"))
        start, *counts = found.counts
        height, width = found.pixels.shape[:2]
        first, *stages = found.panels()
        kept = [(first, f"input, {width} × {height} pixels")]
        scores = []
        for stage, (count, panel) in enumerate(zip(counts, stages, strict=True)):
            kept.append((panel, f"stage {stage + 1}, {count} of {start} patches"))
            heat, lowest, highest = found.heat_map(stage)
            enlarged = Image.fromarray(heat).resize(panel.size, Image.Resampling.NEAREST)
            scores.append((enlarged, f"stage {stage + 1}, {lowest:.3g} to {highest:.3g}"))
        notes = [self.notes[name]]
        if found.cropped:
            notes.append(f"The pictures show the model’s crop: {found.cropped}.")
        if not found.dense:
            notes.append("The model has no classes.")
        note = "\n\n".join(filter(None, notes))
        return Answer(kept, _confidences(found.dense), _confidences(found.pruned), scores, note)

    def _find(self, path: str) -> Path:
        found = Path(path).resolve()
        if self._within is not None and not found.is_relative_to(self._within.resolve()):
            raise ValueError("image must be an upload or one of the photos")
        return found

    def cost(self, name: str, keep_ratio: float, again: bool = False) -> list[list[str]]:
        """Operations and time of dense and pruned: the rows of a table. Each setting is measured
        once, unless `again` is asked for.

        Raises:
            ValueError, TypeError: naming what is wrong with an argument.
        """
        model, schedule = self._at(self._fused, name, keep_ratio)
        pruned = model.at(schedule=schedule)
        if again or (name, schedule) not in self._costs:
            self._costs[name, schedule] = _measure(pruned)
        return self._costs[name, schedule]

    def _at(
        self, models: dict[str, SparseViT], name: str, keep_ratio: float
    ) -> tuple[SparseViT, KeepSchedule]:
        if not isinstance(name, str) or name not in models:
            raise ValueError(f"model must be one of {', '.join(models)}, got {name!r}")
        blocks = models[name].schedule.blocks
        ratios = KeepSchedule.from_keep_ratio(keep_ratio, len(blocks) + 1, len(blocks)).ratios
        return models[name], KeepSchedule(blocks, ratios)


_BY_ATTENTION = (
    "This is a dense model without trained scorers: the patches stay that its class token attends "
    "to most (EViT’s rule, not DynamicViT’s). Expect more answers to change than after training. "
    "“dynamicvit quickstart” trains a model, “dynamicvit demo quickstart/sparse” shows it."
)
_UNTRAINED = (
    "The scorers of this model are not trained: they choose patches at random. “dynamicvit train” "
    "trains them."
)


def _measure(pruned: SparseViT) -> list[list[str]]:
    dense, size = pruned.backbone, input_size(pruned)
    gmacs = [count_gmacs(model, size) for model in (dense, pruned)]
    [speed] = compare_speed(dense, pruned, size, batch_sizes=(1,), seconds=0.5)
    times = [f"{1e3 / rate:.2f}" for rate in (speed.dense, speed.sparse)]
    low, high = speed.spread
    return [
        ["GMACs", *(f"{number:.3f}" for number in gmacs), f"{gmacs[1] / gmacs[0] - 1:+.0%}"],
        # The quotient of the two times as they are shown, so that nobody finds another.
        ["ms", *times, f"{float(times[0]) / float(times[1]):.2f}×"],
        ["quartiles", "", "", f"{low:.2f}–{high:.2f}×"],
    ]


def _confidences(found: Sequence[Prediction]) -> dict[str, float] | None:
    """As Gradio's Label takes them. Classes of the same name have their index beside it."""
    names = Counter(item.name for item in found)
    return {
        item.name if names[item.name] == 1 else f"{item.name} ({item.index})": item.probability
        for item in found
    } or None


def _explain(model: SparseViT, path: Path, name: str | None) -> Explanation:
    """ValueError, calling the file by the name that the user knows, if it cannot be read."""
    called = name or path.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return explain(model, path)
    except (ValueError, FileNotFoundError) as error:
        bomb = Image.DecompressionBombWarning | Image.DecompressionBombError
        if isinstance(error.__cause__, bomb):
            most = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
            raise ValueError(
                f"cannot read image {called}: it has more than {most} million pixels"
            ) from error
        raise ValueError(str(error).replace(str(path), called)) from error
