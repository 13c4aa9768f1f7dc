"""What a search found: points, a frontier, a recommendation, and the model to save."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from torch import nn

from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.evaluation.accuracy import POINTS_LOST, Change
from dynamicvit.evaluation.console import make_table
from dynamicvit.evaluation.timing import Speed
from dynamicvit.io.files import check_file, check_folder, write_text
from dynamicvit.io.folder import save_folder


@dataclass(frozen=True)
class Point:
    """One form of a model, and what it does on the images that judge.

    Attributes:
        name: in words.
        schedule: where tokens leave and how many stay.
        scorer, squeeze: as `sparsify` takes them; None for the selectors that the model has.
        per_image: whether each image has its own budget.
        own: whether the model came with this schedule.
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
    own: bool = False
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
        constraint: max_loss, min_agreement and sure.
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
    constraint: dict[str, Any]
    source: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The points that no other one beats."""
        return tuple(point for point in self.points if point.frontier)

    @property
    def recommended(self) -> Point | None:
        """The fastest or cheapest point within the constraint; None if that is the dense model."""
        holding = [point for point in self.points if _holds(point, **self.constraint)]
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
        labelled = self.dense["top1"] is not None
        constraint = check_constraint(max_loss, min_agreement, sure, labelled)
        return replace(self, constraint=constraint)

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
        return build_form(self.model, point)

    def save(self, folder: str | Path) -> None:
        """Write the recommended model as a folder, for `dynamicvit.load`.

        Raises:
            ValueError: as `build`; or if this is the folder that the model was loaded from.
        """
        check_folder("folder", folder)
        built = self.build()
        read = built.pretrained_cfg.get("file")  # timm notes it
        if read and Path(folder).exists() and Path(folder).resolve() == Path(read).resolve():
            raise ValueError(f"folder must not be the one that the model is from, got {folder}")
        save_folder(built, folder)

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
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
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
        best = self.recommended
        for point in self.points:
            mark = "→ " if point == best else "• " if point.frontier else "  "
            row = [mark + point.name + " (own)" * point.own]
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
            table.add_row(*row, style="bold" if point == best else None)
        return table

    def __str__(self) -> str:
        notes = []
        own = self.dense["model"] is None and not any(point.scorer for point in self.points)
        dense = "dense (the model's own backbone with all tokens): " if own else "dense: "
        if self.dense["top1"] is not None:
            notes.append(POINTS_LOST)
            dense += f"top-1 {self.dense['top1']:.2f}%, "
        notes.append(f"{dense}{self.dense['gmacs']:.4g} GMACs")
        notes.append("→: recommended; •: no cheaper form is as good")
        chosen = f"; {self.chosen_on} others chose what to judge" if self.chosen_on else ""
        notes.append(f"judged on {self.images} images{chosen}")
        if any(point.speed is not None for point in self.points):
            notes.append(
                f"timed in turn: {self.engine}, {self.precision}, batch size {self.batch_size}"
            )
        max_loss, _, sure = self.constraint.values()
        best = self.recommended
        if best is not None and best.change is not None and max_loss is not None and not sure:
            most = best.change.interval[1]
            if most > max_loss:
                notes.append(
                    f"{self.images} images are too few to be sure: "
                    f"it may lose up to {most:.2f} points"
                )
        console = Console(width=100, force_terminal=False)  # names of candidates are long
        with console.capture() as capture:
            console.print(self.table)
            width = min(console.width, Console().width)
            console.print("\n".join(notes), markup=False, highlight=False, width=width)
        return f"{capture.get()}{self._verdict()}"

    def _verdict(self) -> str:
        """In one line what was gained."""
        max_loss, min_agreement, sure = self.constraint.values()
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


def build_form(model: nn.Module, point: Point) -> SparseViT:
    """The form of a model that a point is of. Weights are shared."""
    if not isinstance(model, SparseViT):
        return SparseViT(model, point.schedule, cast(str, point.scorer), point.squeeze)
    if point.per_image:
        return model.at(keep_ratio=point.schedule.ratios[0], per_image=True)
    return model.at(schedule=point.schedule)


def is_near(point: Point, points: Sequence[Point], slack: float = 0.03) -> bool:
    """Whether none of the points is as good and costs less by more than a share `slack`; without
    slack, also none better for as much."""
    return not any(
        other.gmacs <= (1 - slack) * point.gmacs
        and other.quality >= point.quality
        and (other.gmacs, other.quality) != (point.gmacs, point.quality)
        for other in points
    )


def check_constraint(
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
