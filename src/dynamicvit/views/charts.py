"""Charts of a report, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.views.plot import Panel, draw_panel, read_panels, step_limits, use_style

_WIDTH, _HEIGHT, _LINE = 5.0, 2.7, 0.2  # inches: of a chart, and a line of its legend


class Chart(NamedTuple):
    """A chart.

    Attributes:
        alt: what it shows, for those who do not see it.
        figure: matplotlib's.
    """

    alt: str
    figure: Any

    @property
    def svg(self) -> bytes:
        """The same bytes each time, with text as text, in the reader's font."""
        settings = {
            "svg.fonttype": "none",
            "svg.hashsalt": "dynamicvit",
            "path.simplify_threshold": 0.5,  # pixels: a long run's curves have more points
        }
        written = io.BytesIO()
        with use_style(settings):
            self.figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        return written.getvalue()


def draw_schedule(schedule: KeepSchedule, num_tokens: int, depth: int) -> Chart:
    """A bar for each block, as high as tokens are present; a dashed line where tokens leave."""
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

    return _draw(alt, paint)


def draw_speed(measured: Sequence[dict[str, Any]], ideal: float) -> Chart:
    """Speed-up against batch size, a line for each engine and precision.

    Args:
        measured: measurements as `benchmark` writes them, at least one.
        ideal: speed-up if time followed the multiply-adds.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for item in sorted(measured, key=lambda item: item["batch_size"]):
        points = lines.setdefault(f"{item['engine']}, {item['precision']}", [])
        points.append((item["batch_size"], item["speed_up"]))
    panel = Panel("speed-up", lines, markers=True)
    sizes = sorted({item["batch_size"] for item in measured})
    alt = f"Speed-up over the dense model against batch size: {_tell(panel)}."

    def paint(axes: Any) -> None:
        draw_panel(axes, panel)
        axes.axhline(1, color="grey", linestyle="--", linewidth=1.2, label="dense")
        name = f"by multiply-adds, {ideal:.2f}"
        axes.axhline(ideal, color="grey", linestyle=":", linewidth=1.2, label=name)
        axes.set(xlabel="images a call", xscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xticks([], minor=True)

    return _draw(f"{alt} The table below has all figures.", paint)


def draw_search(result: dict[str, Any]) -> Chart:
    """Top-1 against GMACs, of what `search` writes."""
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

    return _draw(alt, paint)


def draw_training(run: Path) -> list[tuple[str, Chart]]:
    """A run's curves, as `plot` draws them, each with its caption. Errors as of `plot`."""
    panels = read_panels(run)
    limits = step_limits(panels)

    def paint(panel: Panel, axes: Any) -> None:
        draw_panel(axes, panel)
        axes.set_xlim(limits)

    charts = []
    for panel in panels:
        caption = panel.title[:1].upper() + panel.title[1:] + ", logarithmic" * panel.log
        if panel.targets:
            caption += "; dashed lines are the target ratios"
        alt = f"{panel.title} against step: {_tell(panel)}"
        charts.append((f"{caption}.", _draw(alt, partial(paint, panel))))
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


def _draw(alt: str, paint: Callable[[Any], None]) -> Chart:
    """A chart: `paint` draws into matplotlib's axes, and the legend stands below."""
    from matplotlib.figure import Figure  # an extra

    with use_style({"font.size": 11}):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        paint(axes)
        names = axes.get_legend_handles_labels()[1]
        if names:
            columns = 2 if max(map(len, names)) <= 22 else 1
            legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False)
            figure.set_figheight(_HEIGHT + _LINE * math.ceil(len(names) / columns))
            for text in legend.get_texts():
                text.set_parse_math(False)
    return Chart(alt, figure)
