"""Diagrams of a report: drawn by matplotlib as SVG, once in light and once in dark colours."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.views.plot import Panel, draw_panel, read_panels, step_limits

_WIDTH, _HEIGHT, _LINE = 5.0, 2.7, 0.2  # inches: of a diagram, and a line of its legend


@dataclass(frozen=True)
class _Colours:
    """Of text, of axes, and of lines, in an order that colour-blind people tell apart."""

    ink: str
    pale: str
    lines: tuple[str, ...]


# Those of the page, in assets/report.html.
LIGHT = _Colours(
    "#1c1e26",
    "#565b6b",
    ("#1c1e26", "#0b62a8", "#b34700", "#00704f", "#8f3c73", "#5c6b00", "#555b70"),
)
DARK = _Colours(
    "#e6e8ee",
    "#a3a9b9",
    ("#e6e8ee", "#6db3ee", "#f0965a", "#4fc49a", "#dd8fc2", "#c3cf5a", "#a3a9b9"),
)


@dataclass(frozen=True)
class Chart:
    """A diagram.

    Attributes:
        alt: what it shows, for those who do not see it.
        light, dark: the SVG file, for light and for dark pages.
        size: width and height, in CSS pixels.
    """

    alt: str
    light: bytes
    dark: bytes
    size: tuple[int, int]


def draw_schedule(schedule: KeepSchedule, num_tokens: int, depth: int) -> Chart:
    """A bar a block, as high as tokens are present in it; a dashed line where tokens leave."""
    counts = (num_tokens, *schedule.counts(num_tokens))
    stages = list(zip(counts, pairwise((0, *schedule.blocks, depth)), strict=True))
    alt = f"Patch tokens in each of {depth} blocks: " + "; ".join(
        f"{count} in blocks {start} to {end - 1}" for count, (start, end) in stages if end > start
    )

    def paint(axes: Any) -> None:
        present = [count for count, (start, end) in stages for _ in range(start, end)]
        axes.bar(range(depth), present, color="C1", alpha=0.6)
        for stage, (count, (start, end)) in enumerate(stages):
            room = end - start >= depth / 12  # for text
            if room:
                axes.text((start + end - 1) / 2, count, count, ha="center", va="bottom")
            if stage:
                left, top = start - 0.5, 1.15 * num_tokens
                axes.vlines(left, 0, top, color="C2", linestyle="--", linewidth=1)
                if room:
                    axes.text(left, top, f"−{counts[stage - 1] - count}", ha="center", va="bottom")
        axes.set(xlabel="block", xticks=sorted({0, *schedule.blocks, depth - 1}), yticks=[])
        axes.set_ylim(0, 1.3 * num_tokens)
        axes.spines[["top", "left", "right"]].set_visible(False)

    return _draw("schedule", alt, paint)


def draw_speed(measured: Sequence[dict[str, Any]], ideal: float) -> Chart:
    """Speed-up against batch size, a line for each engine and precision.

    Args:
        measured: measurements as `benchmark` writes them, at least one.
        ideal: speed-up if time followed the multiply-adds.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for item in measured:
        points = lines.setdefault(f"{item['engine']}, {item['precision']}", [])
        points.append((item["batch_size"], item["speed_up"]))
    lines = {name: sorted(points) for name, points in lines.items()}
    panel = Panel("speed-up", lines, markers=True)
    sizes = sorted({item["batch_size"] for item in measured})
    alt = f"Speed-up over the dense model against batch size: {_tell(panel)}."

    def paint(axes: Any) -> None:
        draw_panel(axes, panel)
        for level, name, dash in (
            (1.0, "dense", "--"),
            (ideal, f"by multiply-adds, {ideal:.2f}", ":"),
        ):
            axes.axhline(level, color="grey", linestyle=dash, linewidth=1.2, label=name)
        axes.set(xlabel="images a call", xscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xticks([], minor=True)

    return _draw("speed", f"{alt} The table below has all figures.", paint)


def draw_sweep(result: dict[str, Any]) -> Chart:
    """Top-1 against GMACs, of what `sweep` writes."""
    line = sorted((point["gmacs"], point["top1"]) for point in result["points"])
    dense = result["dense"]["gmacs"], result["dense"]["top1"]
    panel = Panel("top-1", {"pruned": line, "dense": [dense]}, markers=True)
    (low, worst), (high, best) = line[0], line[-1]
    alt = (
        f"Top-1 against GMACs: {worst:.2f}% at {low:.3f} to {best:.2f}% at {high:.3f}; "
        f"dense {dense[1]:.2f}% at {dense[0]:.3f}."
    )

    def paint(axes: Any) -> None:
        draw_panel(axes, panel)
        axes.set_xlabel("GMACs an image")
        axes.locator_params(axis="x", nbins=6)

    return _draw("sweep", alt, paint)


def draw_training(run: Path) -> list[tuple[str, Chart]]:
    """A run's curves, as `plot` draws them, each with its caption. Errors as of `plot`."""
    panels = read_panels(run)
    limits = step_limits(panels)

    def paint(panel: Panel, axes: Any) -> None:
        draw_panel(axes, panel)
        axes.set_xlim(limits)

    charts = []
    for index, panel in enumerate(panels):
        caption = panel.title[:1].upper() + panel.title[1:] + ", logarithmic" * panel.log
        if panel.targets:
            caption += "; level lines are the shares aimed at"
        alt = f"{panel.title} against step: {_tell(panel)}"
        charts.append((f"{caption}.", _draw(f"curve{index}", alt, partial(paint, panel))))
    return charts


def _tell(panel: Panel) -> str:
    """First and last value of each line."""
    told = []
    for name, points in panel.lines.items():
        if points:
            first, last = points[0][1], points[-1][1]
            span = f"{first:.3g}" if len(points) == 1 else f"from {first:.3g} to {last:.3g}"
            told.append(f"{name} {span}".strip())
    return "; ".join(told)


def _draw(name: str, alt: str, paint: Callable[[Any], None]) -> Chart:
    """A diagram.

    Args:
        name: of this diagram and no other of the page, so that ids in the SVG are the same each
            time.
        alt: as `Chart` has it.
        paint: draws into matplotlib's axes.
    """
    light, size = _render(name, paint, LIGHT)
    dark, _ = _render(name, paint, DARK)
    return Chart(alt, light, dark, size)


def _render(
    name: str, paint: Callable[[Any], None], colours: _Colours
) -> tuple[bytes, tuple[int, int]]:
    from cycler import cycler
    from matplotlib import style  # an extra
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # text stays text, which is small, in a font of the reader's
        "svg.hashsalt": name,
        "font.size": 11,
        "text.color": colours.ink,
        "axes.labelcolor": colours.ink,
        "axes.edgecolor": colours.pale,
        "axes.prop_cycle": cycler(color=colours.lines),
        "xtick.color": colours.pale,
        "xtick.labelcolor": colours.ink,
        "ytick.color": colours.pale,
        "ytick.labelcolor": colours.ink,
        "grid.color": colours.pale,
        "legend.frameon": False,
        "path.simplify_threshold": 0.5,  # pixels: a long run's curves have more points than those
    }
    with style.context(["default", settings]):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        paint(axes)
        names = axes.get_legend_handles_labels()[1]
        if names:
            columns = 2 if max(map(len, names)) <= 22 else 1
            legend = figure.legend(loc="outside lower center", ncols=columns)
            figure.set_figheight(_HEIGHT + _LINE * math.ceil(len(names) / columns))
            for text in legend.get_texts():
                text.set_parse_math(False)
        written = io.BytesIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return written.getvalue(), (width, height)
