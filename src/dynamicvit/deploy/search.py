"""search(): the cheapest form of a model that still gives the answers that are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, permutations
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from dynamicvit.core.backbones import Backbone, UnsupportedBackbone, adapter_of
from dynamicvit.core.budget import Budget
from dynamicvit.core.levels import KEEP_RATIOS as LEVELS
from dynamicvit.core.macs import count_gmacs, in_eval_mode
from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.selectors import SELECTORS
from dynamicvit.deploy.engines import ENGINES, TORCH_ENGINES, build, check_engine
from dynamicvit.evaluation.console import make_table, plain, track
from dynamicvit.evaluation.data import ImageData, check_labels
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.evaluate import (
    POINTS_LOST,
    Change,
    compare_answers,
    count_unreadable,
)
from dynamicvit.evaluation.launch import start_processes
from dynamicvit.evaluation.setup import check_loading, input_size, load_pair, open_images
from dynamicvit.evaluation.timing import (
    Engine,
    Speed,
    compare_times,
    medians,
    take_turns,
)
from dynamicvit.io.arguments import check_types
from dynamicvit.io.files import check_file, check_folder, write_text
from dynamicvit.io.folder import save_folder
from dynamicvit.io.load import check_backbone, load_model

KEEP_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
_ENDS = (0.7, 0.5, 0.35, 0.25, 0.15)  # shares that reach the end, where every block takes some
# Selectors that need no training, and whether what leaves is squeezed into what stays.
_RULES = {
    "class_attention": True,
    "class_attention_merging": False,
    "similarity_merging": False,
    "pooling": False,
}
_CHOOSING = 512  # images that choose, at most: a choice takes fewer than a judgement
_READ = 64  # images a batch, where nothing is timed
_STARTS = 3  # schedules whose stages are refined
_TIMED = 16  # images a round of timing, at least


@dataclass(frozen=True)
class Point:
    """One form of a model, and what it does on the images that judge.

    Attributes:
        name: in words.
        schedule: where tokens leave and how many stay.
        scorer, squeeze: as `sparsify` takes them; None for the selectors that the model has.
        per_image: whether each image has its own budget.
        trained: whether the model came with this schedule.
        tokens: patch tokens at the start, then after each stage: means, where images differ.
        gmacs: billions of multiply-adds an image.
        agreement: share of the images with the dense model's answer.
        top1: percent of images classified rightly; None without labels.
        change: against the dense model, on the same images; None without labels.
        frontier: whether no other point is as good for less, or better for as much.
        speed: against the dense model, timed in turn; None where it was not timed.
    """

    name: str
    schedule: KeepSchedule
    scorer: str | None = None
    squeeze: bool = False
    per_image: bool = False
    trained: bool = False
    tokens: tuple[float, ...] = ()
    gmacs: float = math.nan
    agreement: float = math.nan
    top1: float | None = None
    change: Change | None = None
    frontier: bool = False
    speed: Speed | None = None

    @property
    def quality(self) -> float:
        """Top-1 in percent, or without labels the agreement."""
        return self.agreement if self.top1 is None else self.top1


@dataclass(frozen=True)
class Search:
    """What `search` found. `print(result)` shows it.

    Attributes:
        points: what was judged, the dearest first.
        dense: top1 (None without labels) and gmacs of the dense model, and model, its name.
        images, chosen_on: how many images judged, and how many others chose what to judge.
        objective, engine, precision, batch_size: as for `search`.
        budget: the constraint: max_loss, min_agreement and sure.
        source: what else stands in the file: the machine, and where the images are from.
        model: what the points are forms of; None where it was not given to `from_json`.
    """

    points: tuple[Point, ...]
    dense: dict[str, Any]
    images: int
    chosen_on: int
    objective: str
    engine: str
    precision: str
    batch_size: int
    budget: dict[str, Any]
    source: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The points that no other one beats."""
        return tuple(point for point in self.points if point.frontier)

    @property
    def recommended(self) -> Point | None:
        """The fastest or cheapest point within the constraint; None if that is the dense model."""
        holding = [point for point in self.points if _holds(point, **self.budget)]
        if self.objective == "gmacs":
            cheaper = [point for point in holding if point.gmacs < self.dense["gmacs"]]
            return min(cheaper, key=lambda point: (point.gmacs, -point.quality), default=None)
        faster = [(point.speed.speed_up, point) for point in holding if point.speed is not None]
        faster = [(speed_up, point) for speed_up, point in faster if speed_up > 1]
        return max(faster, key=lambda pair: pair[0], default=(None, None))[1]

    def recommend(
        self,
        *,
        max_loss: float | None = None,
        min_agreement: float | None = None,
        sure: bool = False,
    ) -> Search:
        """The same measurements with another constraint. Nothing is measured anew.

        Arguments and errors as for `search`.
        """
        budget = _budget(max_loss, min_agreement, sure, self.dense["top1"] is not None)
        return replace(self, budget=budget)

    def build(self, point: Point | None = None) -> SparseViT:
        """The recommended model, or that of another point. Its weights are those of `model`.

        Raises:
            ValueError: if nothing is recommended, or the model was not given to `from_json`.
        """
        point = point or self.recommended
        if point is None:
            raise ValueError(f"there is no model to build or save: {self._verdict()}")
        if self.model is None:
            raise ValueError("model must be given to from_json to build or save, got None")
        return _build(self.model, point)

    def save(self, folder: str | Path) -> None:
        """Write the recommended model as a folder, for `dynamicvit.load`. Errors as of `build`."""
        check_folder("folder", folder)
        save_folder(self.build(), folder)

    def to_json(self, file: str | Path) -> None:
        """Write all of it, but for the model, for `from_json`."""
        check_file("file", file)
        write_text(Path(file), json.dumps(self.as_dict(), indent=2) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """What `to_json` writes."""
        own = {key: value for key, value in vars(self).items() if key not in ("source", "model")}
        chosen = self.recommended
        return {
            **self.source,
            **own,
            "recommended": None if chosen is None else asdict(chosen),
            "points": [asdict(point) for point in self.points],
        }

    @classmethod
    def from_json(cls, file: str | Path, model: nn.Module | None = None) -> Search:
        """Read what `to_json` wrote.

        Args:
            file: the file.
            model: the one that was searched, for `build` and `save`.

        Raises:
            FileNotFoundError, ValueError: if there is no such file, or it is of something else.
        """
        text = Path(file).read_text(encoding="utf-8")
        try:
            found = json.loads(text)
            del found["recommended"]
            points = tuple(map(_read_point, found.pop("points")))
            names = [name for name in cls.__dataclass_fields__ if name in found]
            own = {name: found.pop(name) for name in names if name not in ("source", "model")}
            return cls(points=points, source=found, model=model, **own)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"file must be what search wrote, got {file}: {error!r}") from error

    @property
    def table(self) -> Table:
        """A row a point."""
        labelled = self.dense["top1"] is not None
        timed = any(point.speed is not None for point in self.points)
        titles = ["top-1 %", "points lost (95%)"] if labelled else ["answers as dense"]
        table = make_table("model", *titles, "GMACs", *["speed-up (quartiles)"] * timed)
        for point in self.points:
            row = [("• " if point.frontier else "  ") + point.name + " (trained)" * point.trained]
            if point.change is not None:
                low, high = point.change.interval
                row.append(f"{point.top1:.2f}")
                row.append(f"{point.change.points_lost:.2f} ({low:.1f} to {high:.1f})")
            else:
                row.append(f"{point.agreement:.2%}")
            row.append(f"{point.gmacs:#.4g}")
            if timed and point.speed is not None:
                low, high = point.speed.spread
                row.append(f"{point.speed.speed_up:.2f}× ({low:.2f}–{high:.2f})")
            table.add_row(*row, style="bold" if point == self.recommended else None)
        return table

    def __str__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self.table)
        notes = []
        if self.dense["top1"] is not None:
            notes.append(POINTS_LOST)
            dense = f"dense: top-1 {self.dense['top1']:.2f}%, {self.dense['gmacs']:.4g} GMACs"
        else:
            dense = f"dense: {self.dense['gmacs']:.4g} GMACs"
        notes.append(f"•: no other is as good for less. {dense}")
        chosen = f"; {self.chosen_on} others chose what to judge" if self.chosen_on else ""
        notes.append(f"judged on {self.images} images{chosen}")
        if any(point.speed is not None for point in self.points):
            notes.append(
                f"timed in turn: {self.engine}, {self.precision}, batch size {self.batch_size}"
            )
        max_loss, _, sure = self.budget.values()
        best = self.recommended
        if best is not None and best.change is not None and max_loss is not None and not sure:
            most = best.change.interval[1]
            if most > max_loss:
                notes.append(f"{self.images} images are too few to be sure: it may lose {most:.2f}")
        return "\n".join([capture.get().rstrip(), *notes, self._verdict()])

    def _verdict(self) -> str:
        """In one line what was gained."""
        max_loss, min_agreement, sure = self.budget.values()
        if max_loss is not None:
            goal = f"at most {max_loss:g} points lost{' with 95% confidence' if sure else ''}"
        else:
            goal = f"at least {min_agreement:.4g} of the answers as dense"
        best = self.recommended
        if best is None:
            better = "cheaper" if self.objective == "gmacs" else "faster"
            return f"nothing with {goal} is {better} than the dense model"
        gained = [
            f"{best.agreement:.2%} of the answers as dense"
            if best.change is None or max_loss is None
            else f"{best.change.points_lost:.2f} points lost"
        ]
        if best.speed is not None:
            gained.append(f"{best.speed.speed_up:.2f}× faster than dense")
        fewer = 100 * (1 - best.gmacs / self.dense["gmacs"])
        return f"{best.name}: {', '.join(gained)}, {fewer:.0f}% fewer GMACs"


@check_types
@torch.no_grad()
def search(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    labels: Tensor | Sequence[int] | None = None,
    *,
    max_loss: float | None = None,
    min_agreement: float | None = None,
    sure: bool = False,
    objective: str = "latency",
    engine: str = "eager",
    precision: str = "float32",
    batch_size: int = 1,
    seconds: float = 10.0,
    dense: nn.Module | None = None,
    keep_ratios: list[float] | None = None,
    blocks: list[list[int]] | None = None,
    ratios: list[list[float]] | None = None,
    quiet: bool = False,
) -> Search:
    """Find the fastest form of a model whose answers stay as good as is asked. Nothing is trained.

    Of a sparse model its budgets are tried, with the same weights, also with a budget for each
    image where its scorers tell images apart. Of a dense model selectors that need no training are
    tried: in three stages, in every block from the second on, and in stages whose ratios are
    refined. Some of the images choose what is worth judging, the others judge it.

    Ctrl-C ends the refinement, and then the timing, with what was found so far.

    Args:
        model: a SparseViT, or a dense timm model.
        images: [M, C, H, W] as the model takes them, or batches of such. More than 1,000 make a
            difference of a point sure.
        labels: [M] class indices. Without them, answers are compared with the dense model's.
        max_loss: percentage points of top-1 that may be lost, with labels. By default 0.5.
        min_agreement: share of the images that must have the dense model's answer, instead. By
            default 0.99 where there are no labels.
        sure: count a loss as held only if the upper end of its 95% interval is within max_loss.
        objective: "latency" times those on or near the frontier in turn, and recommends the
            fastest. "gmacs" times nothing, and recommends the cheapest.
        engine, precision: what to time in, as in `dynamicvit.deploy.engines`.
        batch_size: images a call that is timed.
        seconds: spent on timing, at least; at least 7 rounds are run.
        dense: what a sparse model is compared with. By default its own backbone with all tokens.
        keep_ratios: for a sparse model: shares of the tokens that each stage keeps. By default 0.9,
            0.8, 0.7, 0.6 and 0.5, unless ratios are given.
        blocks: for a sparse model: where tokens leave, each a list of blocks, with each of the
            ratios: some of the blocks that the model prunes before, or as many others.
        ratios: for a sparse model: shares of the original tokens kept after each stage, each a
            list, one a stage.
        quiet: show no progress.

    Raises:
        UnsupportedBackbone: if a dense model is not understood.
        TypeError, ValueError: naming the argument and what was got.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a SparseViT or a timm model, got {type(model).__name__}")
    budget = _budget(max_loss, min_agreement, sure, labels is not None)
    device = next(model.parameters()).device
    _check(objective, engine, precision, batch_size, seconds, device)
    if isinstance(model, SparseViT):
        model = model.at(schedule=model.schedule)  # the caller's model is not calibrated
        schedules = list_schedules(model, keep_ratios, blocks, ratios)
        reference: nn.Module = dense or cast(nn.Module, model.backbone)
    else:
        adapter_of(model)  # refuses what is not understood
        given = {"dense": dense, "keep_ratios": keep_ratios, "blocks": blocks, "ratios": ratios}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} goes with a sparse model, got it with a dense one")
        reference = model
    pixels, targets = _check_images(images, labels, cast(Any, reference).num_classes)
    choosing = torch.tensor([], dtype=torch.long)
    # Random selection draws the same each time.
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        in_eval_mode(model),
        in_eval_mode(reference),
    ):
        torch.manual_seed(0)
        if isinstance(model, SparseViT):
            points = [
                Point(_name(each, schedules), each, trained=each == model.schedule)
                for each in schedules
            ]
            if engine in ("eager", "packed"):  # the others have one program for all images
                if model.calibration is None:
                    choosing = _calibrate(model, pixels)
                points += _per_image(model, keep_ratios or KEEP_RATIOS)
        else:
            choosing = _spread(len(pixels))
            # About every second answer that changes was right.
            limit = 2 * (budget["max_loss"] or 0) / 100
            if budget["min_agreement"] is not None:
                limit = 1 - budget["min_agreement"]
            points = _choose(model, pixels[choosing], limit, engine, quiet)
        judging = torch.ones(len(pixels), dtype=torch.bool).index_fill(0, choosing, False)
        pixels, targets = pixels[judging], None if targets is None else targets[judging]
        top1, points = _judge(model, reference, points, pixels, targets, quiet)
        if objective == "latency":
            near = [point for point in points if point.trained or _is_near(point, points)]
            models = [reference, *(_build(model, point) for point in near)]
            speeds = _time(models, pixels, engine, precision, batch_size, seconds, quiet)
            for point, speed in zip(near, speeds, strict=True):
                points[points.index(point)] = replace(point, speed=speed)
        gmacs = count_gmacs(reference, input_size(reference))
    return Search(
        points=tuple(points),
        dense={"model": None, "top1": top1, "gmacs": gmacs},
        images=len(pixels),
        chosen_on=len(choosing),
        objective=objective,
        engine=engine,
        precision=precision,
        batch_size=batch_size,
        budget=budget,
        source={"environment": environment()},
        model=model,
    )


@check_types
def search_data(
    model: str,
    /,
    data: str,
    data_dir: str | None = None,
    split: str = "val",
    images: int = 2000,
    max_loss: float | None = None,
    min_agreement: float | None = None,
    sure: bool = False,
    objective: str = "latency",
    engine: str = "eager",
    precision: str = "float32",
    batch_size: int = 1,
    seconds: float = 10.0,
    dense: str | None = None,
    keep_ratios: list[float] | None = None,
    blocks: list[list[int]] | None = None,
    ratios: list[list[float]] | None = None,
    workers: int = 2,
    crop_pct: float | None = None,
    skip_unreadable: bool = False,
    output: str | None = None,
    save: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Find the fastest form of a model whose answers stay as good as is asked.

    Args:
        model: model folder, hub id or timm name, of a sparse model or a dense one. Nothing is
            trained. A sparse model is tried at other budgets. A dense one is tried with selectors
            that need no training.
        data: image folder with split sub-folders, or a timm data set name such as torch/cifar10.
        data_dir: where a named data set lies.
        split: which split to use; best one that has served for nothing yet. Another name than
            "train" and "val" is taken as it is.
        images: how many images of the split, spread evenly over it. They are held in memory.
        max_loss: percentage points of top-1 that may be lost; by default 0.5, unless min_agreement
            is given.
        min_agreement: share of the images that must have the dense model's answer.
        sure: count a loss as held only if it is so with confidence: if the upper end of its 95%
            interval is within max_loss.
        objective: latency (the fastest is recommended) or gmacs (the cheapest; nothing is timed).
        engine: what to time in: eager, packed, compile, onnx or openvino.
        precision: what to time in: float32, bfloat16 or float16. Accuracy is measured in float32.
        batch_size: images a call that is timed.
        seconds: spent on timing, at least.
        dense: the dense model to compare a sparse one with: model folder, hub id or timm name. By
            default its own backbone with all tokens, which after fine-tuning is not the dense model
            that it came from.
        keep_ratios: for a sparse model: shares of the tokens that each stage keeps; by default 0.9,
            0.8, 0.7, 0.6 and 0.5, unless ratios are given.
        blocks: for a sparse model: where tokens leave, each a list of blocks, with each of the
            ratios: some of the blocks that the model prunes before, or as many others. By default
            its own.
        ratios: for a sparse model: shares of the original tokens kept after each stage, each a
            list, one a stage.
        workers: data loading processes.
        crop_pct: the share of the image's side that is kept; by default the model's own.
        skip_unreadable: leave out and count images that cannot be read, instead of stopping.
        output: JSON file to write.
        save: folder to write the recommended model to, ready for use.
        device: such as cpu or cuda:1; by default a GPU if there is one.
        quiet: print nothing, neither tables nor progress.

    Returns:
        What the JSON file holds: dense, points, and the recommended one, or None.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an option, the model or the data,
            or if there is nothing to save.
    """
    if output:
        check_file("output", output)
    if save:
        check_folder("save", save)
    check_loading(batch_size, workers, crop_pct)
    if images < 4:
        raise ValueError(f"images must be 4 or more, got {images}")
    _budget(max_loss, min_agreement, sure, True)
    accelerator = start_processes("float32", device)
    _check(objective, engine, precision, batch_size, seconds, accelerator.device)
    if accelerator.num_processes > 1:
        raise ValueError(f"search runs in one process, got {accelerator.num_processes}")
    check_backbone(model)
    loaded = load_model(model)
    reference = None
    if isinstance(loaded, SparseViT):
        loaded, reference = load_pair(model, dense)
        reference.to(accelerator.device)
    elif dense is not None:
        raise ValueError(f"dense goes with a sparse model, got {dense} with the dense {model}")
    loaded.to(accelerator.device)
    reading = (data, data_dir, split, _READ, workers, crop_pct, skip_unreadable)
    found, loader = open_images(loaded, model, accelerator, *reading)
    pixels, labels = _read(found, loader, images, workers, quiet)
    result = search(
        loaded,
        pixels,
        labels,
        max_loss=max_loss,
        min_agreement=min_agreement,
        sure=sure,
        objective=objective,
        engine=engine,
        precision=precision,
        batch_size=batch_size,
        seconds=seconds,
        dense=reference,
        keep_ratios=keep_ratios,
        blocks=blocks,
        ratios=ratios,
        quiet=quiet,
    )
    source = {"data": data, "split": split, "crop_pct": crop_pct, **count_unreadable(found)}
    result = replace(
        result,
        dense=result.dense | {"model": dense},
        source={"name": model, **source, **result.source},
    )
    if output:
        result.to_json(output)
    if not quiet:
        print(result)
        if output:
            print(f"the results are in {plain(output)}")
    if save:
        result.save(save)
        if not quiet:
            print(f"the recommended model is in {plain(save)}")
    return result.as_dict()


def _check(
    objective: str,
    engine: str,
    precision: str,
    batch_size: int,
    seconds: float,
    device: torch.device,
) -> None:
    if objective not in ("latency", "gmacs"):
        raise ValueError(f"objective must be latency or gmacs, got {objective!r}")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    check_engine(engine, precision, device.type)
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be 0 or more, got {seconds}")


def _budget(
    max_loss: float | None, min_agreement: float | None, sure: bool, labelled: bool
) -> dict[str, Any]:
    """The constraint. Arguments and errors as for `search`."""
    if max_loss is not None and min_agreement is not None:
        got = f"{max_loss} and {min_agreement}"
        raise ValueError(f"give max_loss or min_agreement, not both, got {got}")
    if max_loss is not None and not labelled:
        raise ValueError(f"max_loss needs labels, got {max_loss} without")
    if max_loss is None and min_agreement is None:
        max_loss, min_agreement = (0.5, None) if labelled else (None, 0.99)
    if max_loss is not None and not 0 <= max_loss < math.inf:
        raise ValueError(f"max_loss must be 0 or more, got {max_loss}")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise ValueError(f"min_agreement must lie in [0, 1], got {min_agreement}")
    if sure and max_loss is None:
        raise ValueError(f"sure goes with max_loss, got it with min_agreement={min_agreement}")
    return {"max_loss": max_loss, "min_agreement": min_agreement, "sure": sure}


def _check_images(images: Any, labels: Any, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """Images [M, C, H, W] and class indices [M]. Arguments and errors as for `search`."""
    if not isinstance(images, Tensor):
        batches = list(images) if isinstance(images, Iterable) else [images]
        if not all(isinstance(batch, Tensor) for batch in batches):
            raise TypeError(f"images must be a tensor or batches of them, got {images!r:.200}")
        images = torch.cat(batches) if batches else torch.empty(0)
    if images.ndim != 4 or len(images) < 4:
        raise ValueError(
            f"images must have shape [M, C, H, W] with M of 4 or more, got {list(images.shape)}"
        )
    if num_classes == 0:
        raise ValueError("model must have classes, got num_classes 0")
    if labels is None:
        return images, None
    targets = torch.as_tensor(labels).cpu()
    if targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise TypeError(f"labels must be class indices, got {targets.dtype}")
    if targets.shape != images.shape[:1]:
        raise ValueError(f"labels must be one an image, {len(images)}, got {list(targets.shape)}")
    check_labels(targets, num_classes)
    return images, targets


def _read(
    images: ImageData, loader: DataLoader, most: int, workers: int, quiet: bool
) -> tuple[Tensor, Tensor]:
    """So many images of a split, spread evenly; of a stream, its first."""
    if not isinstance(images.dataset, IterableDataset):
        chosen = _spread(len(images.dataset), most)
        loader = DataLoader(Subset(images.dataset, chosen.tolist()), _READ, num_workers=workers)
    pixels, labels = [], []
    for batch, targets in track(loader, "reading images", quiet, "batches"):
        pixels.append(batch[targets >= 0])  # -1: could not be read
        labels.append(targets[targets >= 0])
        if sum(map(len, labels)) >= most:
            break
    return torch.cat(pixels)[:most], torch.cat(labels)[:most]


def _spread(count: int, most: int | None = None) -> Tensor:
    """Indices of so many of `count` items, spread evenly; by default of those that choose."""
    most = min(count // 2, _CHOOSING) if most is None else min(count, most)
    return torch.arange(most) * count // max(most, 1)


# Candidates.


def list_schedules(
    model: SparseViT,
    keep_ratios: Sequence[float] | None = None,
    blocks: Sequence[Sequence[int]] | None = None,
    ratios: Sequence[Sequence[float]] | None = None,
) -> list[KeepSchedule]:
    """The model's own schedule, then every combination of blocks and ratios, once each.

    Arguments and errors as for `search`.
    """
    num_tokens = _num_tokens(model)
    places = [model.schedule.blocks] if blocks is None else [tuple(item) for item in blocks]
    for ratio in keep_ratios or ():
        if not 0 < ratio <= 1:
            raise ValueError(f"keep_ratios must lie in (0, 1], got {ratio}")
    if keep_ratios is None:
        stages = max(map(len, places), default=0)
        usual = KEEP_RATIOS if ratios is None else ()
        # Of few tokens a small share is none: not what was asked for, then, so not an error.
        keep_ratios = [ratio for ratio in usual if ratio**stages * num_tokens >= 1]
    for shares in ratios or ():
        if all(len(shares) != len(place) for place in places):
            raise ValueError(f"ratios must be one a stage for blocks {places}, got {shares}")
    found = {_key(model.schedule, num_tokens): model.schedule}
    for place in places:
        for shares in (
            *([ratio**stage for stage in range(1, len(place) + 1)] for ratio in keep_ratios),
            *(shares for shares in ratios or () if len(shares) == len(place)),
        ):
            schedule = KeepSchedule(place, tuple(shares))
            model.at(schedule=schedule)  # refuses what does not fit
            found.setdefault(_key(schedule, num_tokens), schedule)
    return list(found.values())


def _key(schedule: KeepSchedule, num_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a schedule does: those of the same key prune alike."""
    return schedule.blocks, schedule.counts(num_tokens)


def _num_tokens(model: SparseViT) -> int:
    _, height, width = input_size(model)
    rows, columns = model.backbone.patch_embed.dynamic_feat_size((height, width))
    return int(rows * columns)


def _name(schedule: KeepSchedule, others: Sequence[KeepSchedule] = ()) -> str:
    """0.7, or where stages differ 0.9, 0.6, 0.3; with the blocks too, if they tell them apart."""
    ratios = schedule.ratios
    powers = [ratios[0] ** stage for stage in range(1, len(ratios) + 1)]
    shares = ratios[:1] if all(map(math.isclose, ratios, powers)) else ratios
    text = ", ".join(f"{share:.3g}" for share in shares)
    if any(other.blocks != schedule.blocks for other in others):
        text += f" before {', '.join(map(str, schedule.blocks))}"
    return text


def _calibrate(model: SparseViT, pixels: Tensor) -> Tensor:
    """Calibrate, if the scorers tell images apart. Gives the images that served."""
    used = _spread(len(pixels), min(len(pixels) // 4, _CHOOSING))
    stages, tokens = len(model.schedule.blocks), _num_tokens(model)
    levels = [ratio for ratio in LEVELS if ratio**stages * tokens >= 1]
    try:
        model.calibrate(_batches(model, pixels[used]), levels)
    except (TypeError, ValueError):  # such as merging, or images of any size
        return used[:0]
    return used


def _per_image(model: SparseViT, keep_ratios: Sequence[float]) -> list[Point]:
    """Budgets for each image, as far as the levels of the model's calibration go."""
    found = []
    for ratio in keep_ratios:
        try:
            schedule = model.at(keep_ratio=ratio, per_image=True).schedule
        except ValueError:
            continue
        found.append(Point(f"{ratio:g} per image", schedule, per_image=True))
    return found


def _choose(
    model: nn.Module, pixels: Tensor, limit: float, engine: str, quiet: bool
) -> list[Point]:
    """Forms of a dense model that are worth judging: those near the frontier.

    Args:
        limit: share of answers that may change. Forms that change many more are not looked for.
    """
    expected = _logits(model, pixels)
    dense = count_gmacs(model, input_size(model))
    found: dict[Point, float] = {}

    def measure(point: Point) -> tuple[Point, float] | None:
        """The point with its cost and agreement, and how far its answers are from the dense ones.
        None if it does not fit the model, or saves nothing."""
        try:
            sparse = _build(model, point)
            gmacs = sparse.budget().cost(point.schedule)
        except (UnsupportedBackbone, ValueError):
            return None
        if gmacs >= dense:
            return None
        logits = _logits(sparse, pixels)
        agreement = _share(logits.argmax(1) == expected.argmax(1))
        return replace(point, gmacs=gmacs, agreement=agreement), _distance(logits, expected)

    rules = [
        (rule, spread)
        for rule in _RULES
        if engine in TORCH_ENGINES or not SELECTORS[rule].merges  # merging is not exported
        for spread in (False, True)
    ]
    with suppress(KeyboardInterrupt):
        for rule, spread in track(rules, "choosing", quiet, "families"):
            for point in _family(model, rule, spread):
                measured = measure(point)
                if measured is not None:
                    found[measured[0]] = measured[1]
                    if 1 - measured[0].agreement > max(4 * limit, 0.05):
                        break  # the next ones keep less
        starts = [point for point in found if 1 - point.agreement <= 2 * limit]
        starts = [point for point in starts or found if len(point.schedule.blocks) <= 3]
        starts = sorted(starts, key=lambda point: point.gmacs)[:_STARTS]
        for start in track(starts, "refining", quiet, "schedules"):
            end, distance = _refine(start, found[start], _build(model, start).budget(), measure)
            found[end] = distance
    return [point for point in found if _is_near(point, list(found))]


def _family(model: nn.Module, rule: str, spread: bool) -> Iterator[Point]:
    """A selector in three stages, or in every block from the second on, the dearest first."""
    depth = adapter_of(model).depth(cast(Backbone, model))
    stages = min(3, depth - 1)
    title = f"{rule} with squeeze" if _RULES[rule] else rule
    if not spread:
        for ratio in KEEP_RATIOS:
            schedule = KeepSchedule.from_keep_ratio(ratio, depth, stages)
            yield Point(f"{title}, {stages} stages of {ratio:g}", schedule, rule, _RULES[rule])
        return
    for end in _ENDS:
        shares = tuple(1 - (1 - end) * step / (depth - 1) for step in range(1, depth))
        name = f"{title}, every block, {end:g} at the end"
        yield Point(name, KeepSchedule(tuple(range(1, depth)), shares), rule, _RULES[rule])


def _refine(
    point: Point,
    distance: float,
    budget: Budget,
    measure: Callable[[Point], tuple[Point, float] | None],
) -> tuple[Point, float]:
    """Move tokens from one stage to another, as long as answers come nearer to the dense model's
    at no greater cost."""
    title, tokens, allowed = point.name.partition(",")[0], budget.num_patches, point.gmacs
    for step in (max(1, tokens // 10), max(1, tokens // 20)):
        before = None
        while before != point:
            before = point
            for up, down in permutations(range(len(point.schedule.blocks)), 2):
                schedule = _exchange(point.schedule, up, down, step, allowed, budget)
                if schedule is None:
                    continue
                name = f"{title}, stages of {_name(schedule)}"
                found = measure(replace(point, name=name, schedule=schedule))
                if found is not None and found[1] < distance:
                    point, distance = found
    return point, distance


def _exchange(
    schedule: KeepSchedule, up: int, down: int, step: int, allowed: float, budget: Budget
) -> KeepSchedule | None:
    """More tokens in stage `up`, and as few less in stage `down` as the allowed cost takes."""
    tokens = budget.num_patches
    counts = list(schedule.counts(tokens))
    counts[up] += step
    for count in range(counts[down] - 1, 0, -1):
        counts[down] = count
        if tokens >= counts[0] and counts == sorted(counts, reverse=True):
            moved = KeepSchedule(schedule.blocks, tuple(count / tokens for count in counts))
            if budget.cost(moved) <= allowed:
                return moved
    return None


# Measurements.


def _build(model: nn.Module, point: Point) -> SparseViT:
    """The form of a model that a point is of. Weights are shared."""
    if not isinstance(model, SparseViT):
        return SparseViT(model, point.schedule, cast(str, point.scorer), point.squeeze)
    if point.per_image:
        return model.at(keep_ratio=point.schedule.ratios[0], per_image=True)
    return model.at(schedule=point.schedule)


def _judge(
    model: nn.Module,
    dense: nn.Module,
    points: Sequence[Point],
    pixels: Tensor,
    labels: Tensor | None,
    quiet: bool,
) -> tuple[float | None, list[Point]]:
    """The dense model's top-1, and the points with what they do on these images, the dearest
    first."""
    answers = _logits(dense, pixels).argmax(1)
    right = None if labels is None else answers == labels
    judged = []
    for point in track(points, "judging", quiet, "candidates"):
        sparse = _build(model, point)
        found = _logits(sparse, pixels).argmax(1)
        tokens, gmacs = _cost(sparse, pixels)
        point = replace(point, tokens=tokens, gmacs=gmacs, agreement=_share(found == answers))
        if labels is not None and right is not None:
            point = replace(
                point,
                top1=100.0 * _share(found == labels),
                change=compare_answers(right, found == labels),
            )
        judged.append(point)
    judged = [replace(point, frontier=_is_near(point, judged, slack=0.0)) for point in judged]
    top1 = None if right is None else 100.0 * _share(right)
    return top1, sorted(judged, key=lambda point: -point.gmacs)


def _cost(model: SparseViT, pixels: Tensor) -> tuple[tuple[float, ...], float]:
    """Tokens and GMACs of an image; their means where each image has its own budget."""
    start = _num_tokens(model)
    if model.levels is None:
        return (start, *model.schedule.counts(start)), count_gmacs(model, input_size(model))
    kept = [torch.stack(model.pruned(batch).keep).sum(2).T for batch in _batches(model, pixels)]
    counts = torch.cat(kept).cpu()
    budget, blocks = model.budget(), model.schedule.blocks
    each, number = counts.unique(dim=0, return_counts=True)
    costs = [
        budget.cost(KeepSchedule(blocks, tuple(count / start for count in row)))
        for row in each.tolist()
    ]
    mean = sum(map(math.prod, zip(costs, number.tolist(), strict=True))) / len(counts)
    return (float(start), *counts.mean(0).tolist()), mean


def _is_near(point: Point, points: Sequence[Point], slack: float = 0.03) -> bool:
    """Whether none of the points is as good and costs less by more than a share `slack`; without
    slack, also none better for as much."""
    return not any(
        other.gmacs <= (1 - slack) * point.gmacs
        and other.quality >= point.quality
        and (other.gmacs, other.quality) != (point.gmacs, point.quality)
        for other in points
    )


def _time(
    models: Sequence[nn.Module],
    pixels: Tensor,
    engine: str,
    precision: str,
    batch_size: int,
    seconds: float,
    quiet: bool,
) -> list[Speed]:
    """The speed of each model but the first against the first, in turn on real images: where each
    has its own budget, noise would not do."""
    count = max(1, _TIMED // batch_size) * batch_size
    device = next(models[0].parameters()).device
    chosen = torch.arange(count) * max(1, len(pixels) // count) % len(pixels)
    batches = pixels[chosen].to(device).split(batch_size)

    def on_all(run: Engine) -> Engine:
        return lambda _: [run(batch) for batch in batches]

    building = track(models, f"building for {engine}", quiet, "models")
    turns = take_turns([on_all(build(each, engine, precision)) for each in building], batches[:1])
    times = [next(turns)]
    rounds = max(7, math.ceil(seconds / sum(times[0]))) - 1
    with suppress(KeyboardInterrupt):  # those that were finished stay
        times += track(islice(turns, rounds), "timing", quiet, "rounds")
    first, *others = medians(times)
    return [
        Speed(batch_size, count / first, count / median, *compare_times(times, 0, index + 1))
        for index, median in enumerate(others)
    ]


def _batches(model: nn.Module, pixels: Tensor) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    return (batch.to(device) for batch in pixels.split(_READ))


def _logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """[M, num_classes] on the CPU."""
    return torch.cat([model(batch).float().cpu() for batch in _batches(model, pixels)])


def _distance(logits: Tensor, expected: Tensor) -> float:
    """Mean KL divergence in nats: a finer measure of agreement than the share of equal answers."""
    target = expected.log_softmax(1)
    return float((target.exp() * (target - logits.log_softmax(1))).sum(1).mean())


def _share(which: Tensor) -> float:
    return int(which.sum()) / len(which)


def _holds(point: Point, max_loss: float | None, min_agreement: float | None, sure: bool) -> bool:
    if max_loss is None or point.change is None:
        return point.agreement >= cast(float, min_agreement)
    return (point.change.interval[1] if sure else point.change.points_lost) <= max_loss


def _read_point(values: dict[str, Any]) -> Point:
    """A point from what JSON gives for one."""
    schedule = KeepSchedule(**values["schedule"])
    change, speed = values["change"], values["speed"]
    if change is not None:
        change = Change(**change | {"interval": tuple(change["interval"])})
    if speed is not None:
        speed = Speed(**speed | {"spread": tuple(speed["spread"])})
    tokens = tuple(values["tokens"])
    return Point(
        **values | {"schedule": schedule, "change": change, "speed": speed, "tokens": tokens}
    )
