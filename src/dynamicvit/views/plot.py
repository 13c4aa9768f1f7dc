"""plot(): the curves of a training run, as one picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.evaluation.console import plain
from dynamicvit.io.files import check_file, write_bytes
from dynamicvit.training.config import read_options
from dynamicvit.training.metrics import METRICS
from dynamicvit.training.run_folder import BEST, CONFIG

_FORMATS = ("png", "svg", "pdf")
_LOSSES = {
    "loss": "total",
    "cross_entropy": "cross-entropy",
    "ratio": "keep ratio",
    "logit_kl": "KL of logits",
    "token": "token",
    "validation": "validation",
    "warm_start": "warm start",
}
# Colours that colour-blind people tell apart, dark enough for lines on white. Dashes and markers
# differ too, for prints in grey.
_COLOURS = ("#1c1e26", "#0b62a8", "#b34700", "#00704f", "#8f3c73", "#5c6b00", "#555b70")
_DASHES = ("-", (0, (6, 1)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (3, 2)), (0, (8, 2)), "-.")
_MARKERS = "os^Dv<>"
_MANY = 60  # a line with so many points is drawn pale, with its running mean over it


@dataclass
class Panel:
    """One chart: named lines of (step, value), and target values."""

    title: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    targets: Sequence[float] = ()
    log: bool = False
    markers: bool = False
    smooth: bool = True


def plot(run: str, /, output: str | None = None, quiet: bool = False) -> Path:
    """Draw the curves of a training run, finished or not: losses, accuracy, kept tokens, rates.

    Steps below 0 are those of a warm start. In the chart of kept tokens, dashed lines are the
    target ratios. Needs the extra "plot".

    Args:
        run: folder of a run.
        output: PNG, SVG or PDF file to write; by default plot.png in the run's folder.
        quiet: print nothing.

    Returns:
        The file written.

    Raises:
        ValueError: if there is no such run, it has logged nothing yet, or its files are not a
            run's.
    """
    folder = Path(run)
    path = folder / "plot.png" if output is None else Path(output)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _FORMATS:
        raise ValueError(f"output must end in .{', .'.join(_FORMATS)}, got {str(path)!r}")
    check_file("output", path)
    try:
        from matplotlib.figure import Figure  # an extra
    except ImportError as error:
        raise ValueError("plot needs the extra: pip install 'dynamicvit[plot]'") from error

    panels = read_panels(folder)
    rows = math.ceil(len(panels) / 2)
    picture = io.BytesIO()
    with use_style():
        figure = Figure(figsize=(12, 0.5 + 3.3 * rows), layout="constrained")
        figure.suptitle(folder.resolve().name)
        grid = list(figure.subplots(rows, 2, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            draw_panel(axes, panel)
            axes.set(title=panel.title, xlim=step_limits(panels))
            if any(panel.lines):
                axes.legend(fontsize="small", ncols=2)
        for axes in grid[len(panels) :]:
            axes.remove()
        figure.savefig(picture, format=kind, dpi=120)
    write_bytes(path, picture.getvalue())
    if not quiet:
        print(f"the picture is in {plain(path)}")
    return path


@contextmanager
def use_style(settings: dict[str, Any] | None = None) -> Iterator[None]:
    """Draw in matplotlib's own style, whatever the user's files say, with our colours."""
    from cycler import cycler
    from matplotlib import style  # an extra

    colours = {"axes.prop_cycle": cycler(color=_COLOURS)}
    with style.context(["default", colours, settings or {}]):
        yield


def find_best(run: Path) -> Path | None:
    """The best model's folder in that of a run; None if `run` is no run, or has no model yet."""
    best = run / BEST
    return best if (run / METRICS).is_file() and best.is_dir() else None


def read_panels(run: Path) -> list[Panel]:
    """The charts of a run, in order. What the run did not log has none.

    Raises:
        ValueError: as `plot` does.
    """
    return _panels(_read_metrics(run), _read_ratios(run))


def step_limits(panels: Sequence[Panel]) -> tuple[float, float]:
    """The first and the last step to show, the same in all charts of a run."""
    steps = [step for panel in panels for line in panel.lines.values() for step, _ in line]
    margin = 0.03 * (max(steps) - min(steps)) or 1
    return min(steps) - margin, max(steps) + margin


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise ValueError(f"run must be the folder of a run, got {str(folder)!r}")
    path = folder / METRICS
    if not path.is_file():
        raise ValueError(f"run must hold {METRICS}, which is not in {str(folder)!r}")
    texts = path.read_bytes().decode(errors="replace").splitlines()
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not (isinstance(line["kind"], str) and math.isfinite(line["step"])):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            if number == len(texts) and lines:
                break  # cut off: the run was killed, or is writing it
            raise ValueError(
                f"{path} is not a run's metrics: line {number} is {text[:60]!r}"
            ) from error
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} is empty: the run has logged nothing yet")
    return lines


def _read_ratios(folder: Path) -> Sequence[float]:
    """The target share of tokens after each stage; none for a dense run."""
    path = folder / CONFIG
    if not path.is_file():
        return ()
    config = read_options(path)
    try:
        if config["ratios"] is not None:
            return [float(ratio) for ratio in config["ratios"]]
        if config["keep_ratio"] is None:
            return ()
        # The ratios do not depend on the depth.
        return KeepSchedule.from_keep_ratio(config["keep_ratio"], depth=12).ratios
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a run's config: {error}") from error


def _panels(lines: list[dict[str, Any]], ratios: Sequence[float]) -> list[Panel]:
    """As `read_panels`."""
    warm_steps = max((line["step"] for line in lines if line["kind"] == "warm_start"), default=0)
    # The order is fixed, so that colours are the same in every run's picture.
    losses = Panel("loss", {name: [] for name in _LOSSES.values()}, log=True)
    top1 = Panel("validation top-1, %", markers=True)
    kept = Panel("share of tokens kept", targets=ratios)
    others = {"lr": Panel("learning rate", log=True, smooth=False)}
    for line in lines:
        step = line["step"]
        if line["kind"] == "validation":
            _add(top1, "", step, line.get("top1"))
            _add(losses, "validation", step, line.get("loss"))
            continue
        if line["kind"] not in ("train", "warm_start"):
            continue
        if line["kind"] == "warm_start":
            step -= warm_steps
        for key, value in line.items():
            if key in _LOSSES:
                name = "warm_start" if line["kind"] == "warm_start" else key
                _add(losses, _LOSSES[name], step, value)
            elif key == "kept":
                _add(kept, "stage", step, value)
            elif key not in ("kind", "step", "epoch"):
                title = key.replace("_", " ")
                panel = others.setdefault(key, Panel(title, log="norm" in key))
                _add(panel, "", step, value)
    rates, *rest = others.values()
    news = [panel for panel in rest if _changes(panel)]
    return [panel for panel in (losses, top1, kept, rates, *news) if any(panel.lines.values())]


def _changes(panel: Panel) -> bool:
    """Whether a value changes. A count of skipped steps that stays 0 is not worth a chart."""
    return any(len({value for _, value in points}) > 1 for points in panel.lines.values())


def _add(panel: Panel, name: str, step: float, value: Any) -> None:
    """Add a number, a list of them (one a stage), or a dict of them, to a panel's lines."""
    if isinstance(value, dict):
        for key, item in value.items():
            _add(panel, f"{name} {key}".strip(), step, item)
    elif isinstance(value, list):
        for stage, item in enumerate(value, start=1):
            _add(panel, f"{name} {stage}".strip(), step, item)
    elif isinstance(value, int | float | None):  # None: it was not finite
        number = math.nan if value is None else float(value)
        panel.lines.setdefault(name, []).append((step, number))


def draw_panel(axes: Any, panel: Panel) -> None:
    """Draw a panel's lines into matplotlib's axes, with neither title nor legend."""
    log = panel.log and any(value > 0 for points in panel.lines.values() for _, value in points)
    for index, (name, points) in enumerate(panel.lines.items()):
        if not points:
            continue
        # A logarithmic axis has no 0, such as the learning rate of a frozen backbone.
        steps = [step for step, _ in points]
        values = [value if value > 0 or not log else math.nan for _, value in points]
        style: dict[str, Any] = {
            "color": f"C{index}",  # counted through the colours in matplotlib's settings
            "linestyle": _DASHES[index % len(_DASHES)],
            "label": name,
        }
        if panel.markers or name == "validation" or len(points) == 1:
            style |= {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 4}
        elif len(points) >= _MANY and panel.smooth:
            axes.plot(steps, values, color=style["color"], linewidth=0.8, alpha=0.2)
            values = _running_mean(values)
        axes.plot(steps, values, **style)
        if index < len(panel.targets):
            axes.axhline(panel.targets[index], color=style["color"], linestyle="--", linewidth=1)
    if panel.targets:
        axes.plot([], [], color="grey", linestyle="--", linewidth=1, label="target")
        axes.set_ylim(0, 1.02)
    axes.set(xlabel="step", yscale="log" if log else "linear")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _running_mean(values: Sequence[float]) -> list[float]:
    """The mean of the finite values near each: a tenth of all."""
    width = len(values) // 20
    means = []
    for index in range(len(values)):
        near = values[max(0, index - width) : index + width + 1]
        finite = [value for value in near if math.isfinite(value)]
        means.append(fmean(finite) if finite else math.nan)
    return means
