"""Diagrams as inline SVG, for `report`: they take the page's colours, light and dark, and its text
stays text. The classes are those of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from xml.etree import ElementTree

from markupsafe import Markup

from dynamicvit.core.schedule import KeepSchedule

Points = Sequence[tuple[float, float]]

# Units are pixels where the page is as narrow as a telephone; on wider ones all of it grows.
_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 350, 12, 172
_LINE = 15  # between lines of text
# Lines differ in dash and mark too, so that colour is not all that tells them apart.
_DASHES = ("", "7 2", "2 2", "5 2 1 2", "10 3", "1 1", "4 4")
_MARKS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "M-3-3h6v6h-6z",
    "M0-4l4 7h-8z",
    "M0-4l4 4-4 4-4-4z",
    "M0 4l4-7h-8z",
    "M-4-1h3v-3h2v3h3v2h-3v3h-2v-3h-3z",
    "M-3-1h6v2h-6z",
)
_MOST_POINTS = 300  # of a line: more are not seen at this size
_FEW_POINTS = 25  # of a line with a mark at each


def draw_lines(
    lines: Mapping[str, Points],
    alt: str,
    x_label: str,
    *,
    means: Mapping[str, Points] | None = None,
    levels: Mapping[str, float] | None = None,
    x_ticks: Sequence[float] = (),
    log: tuple[bool, bool] = (False, False),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """A line diagram.

    Args:
        lines: name → (x, y) in order of x; y may be NaN. A nameless line has no legend.
        alt: what it shows, for who does not see it.
        x_label: what x is.
        means: of lines, by their names: drawn, over the pale line, in its place.
        levels: name → y, thin lines straight across.
        x_ticks: where to write x; by default at round numbers.
        log: whether x, and y, are logarithmic. What is not above 0 has no place on such an axis.
        x_range, y_range: lowest and highest shown; by default what the lines and levels need.
    """
    levels = levels or {}
    shown = {name: _placed(points, log) for name, points in lines.items()}
    xs = [x for points in shown.values() for x, _ in points]
    finite = [y for points in shown.values() for _, y in points if math.isfinite(y)]
    log = (log[0], log[1] and bool(finite))
    low_x, high_x = _widened(*(x_range or (min(xs, default=0.0), max(xs, default=1.0))), 0.02)
    ys = [*finite, *(_log(level) if log[1] else level for level in levels.values())]
    low_y, high_y = y_range or _widened(min(ys, default=0.0), max(ys, default=1.0), 0.06)

    def x_of(value: float) -> float:
        return _LEFT + (value - low_x) / (high_x - low_x) * (_RIGHT - _LEFT)

    def y_of(value: float) -> float:
        return _BOTTOM - (value - low_y) / (high_y - low_y) * (_BOTTOM - _TOP)

    entries = [name for name in (*lines, *levels) if name]
    columns = 2 if all(len(name) <= 22 for name in entries) else 1
    svg = _start(_HEIGHT + _LINE * math.ceil(len(entries) / columns), alt)
    for value, text in _ticks(low_y, high_y, log[1]):
        _add(svg, "line", "grid", x1=_LEFT, x2=_RIGHT, y1=y_of(value), y2=y_of(value))
        _write(svg, text, _LEFT - 6, y_of(value) + 4, "end")
    for value, text in [
        (_log(tick) if log[0] else tick, f"{tick:g}") for tick in x_ticks
    ] or _ticks(low_x, high_x, log[0]):
        _add(svg, "line", "axis", x1=x_of(value), x2=x_of(value), y1=_BOTTOM, y2=_BOTTOM + 4)
        _write(svg, text, x_of(value), _BOTTOM + 16, "middle")
    _add(svg, "line", "axis", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM)
    _write(svg, x_label, (_LEFT + _RIGHT) / 2, _BOTTOM + 31, "middle", "pale")

    for index, (name, points) in enumerate(shown.items()):
        mean = (means or {}).get(name)
        if mean is not None:
            _draw_path(svg, points, x_of, y_of, f"line raw s{index % 7}", "")
            points = _placed(mean, log)
        _draw_path(svg, points, x_of, y_of, f"line s{index % 7}", _DASHES[index % 7])
        if len(points) <= _FEW_POINTS:
            for x, y in points:
                if math.isfinite(y):
                    _mark(svg, index, x_of(x), y_of(y))
    for index, level in enumerate(levels.values()):
        y = y_of(_log(level) if log[1] else level)
        _add(svg, "line", f"level level{index % 3}", x1=_LEFT, x2=_RIGHT, y1=y, y2=y)

    for place, name in enumerate(entries):
        row, column = divmod(place, columns)
        x, y = 14 + column * 174, _HEIGHT + 8 + row * _LINE
        if place < len(entries) - len(levels):
            index = list(lines).index(name)
            dash = {"stroke-dasharray": _DASHES[index % 7]} if _DASHES[index % 7] else {}
            _add(svg, "line", f"line s{index % 7}", x1=x, x2=x + 26, y1=y, y2=y, **dash)
            if len((means or {}).get(name, shown[name])) <= _FEW_POINTS:
                _mark(svg, index, x + 13, y)
        else:
            index = place - len(entries) + len(levels)
            _add(svg, "line", f"level level{index % 3}", x1=x, x2=x + 26, y1=y, y2=y)
        _write(svg, name, x + 32, y + 4)
    return _markup(svg)


def draw_schedule(schedule: KeepSchedule, num_tokens: int, depth: int) -> Markup:
    """A bar a block, as high as tokens are present in it; a dashed line where tokens leave."""
    counts = (num_tokens, *schedule.counts(num_tokens))
    edges = (0, *schedule.blocks, depth)
    alt = f"Patch tokens in each of {depth} blocks: " + "; ".join(
        f"{count} in blocks {start} to {end - 1}"
        for count, (start, end) in zip(counts, pairwise(edges), strict=True)
        if end > start
    )
    svg = _start(176, alt)
    left, bottom, height = 8, 138, 104
    step = (_RIGHT - left) / depth
    for stage, (count, (start, end)) in enumerate(zip(counts, pairwise(edges), strict=True)):
        top = bottom - height * count / num_tokens
        for block in range(start, end):
            x = left + block * step + 0.08 * step
            _add(svg, "rect", "bar", x=x, y=top, width=0.84 * step, height=bottom - top)
        x = left + start * step
        if stage:
            _add(svg, "line", "leave", x1=x, x2=x, y1=20, y2=bottom)
            if step * (end - start) >= 34:
                _write(svg, f"−{counts[stage - 1] - count}", x, 14, "middle")
        if step * (end - start) >= 30:
            _write(svg, str(count), x + step * (end - start) / 2, top - 5, "middle")
        if end > start and (step * (end - start) >= 16 or stage == 0):
            _write(svg, str(start), x + step / 2, bottom + 15, "middle")
    if depth - 1 > edges[-2]:
        _write(svg, str(depth - 1), left + (depth - 0.5) * step, bottom + 15, "middle")
    _write(svg, "block", (left + _RIGHT) / 2, bottom + 31, "middle", "pale")
    return _markup(svg)


def _log(value: float) -> float:
    return math.log10(value) if value > 0 else math.nan


def _placed(points: Points, log: tuple[bool, bool]) -> list[tuple[float, float]]:
    """At most so many points that they can be told apart, and logarithms where asked for."""
    every = max(1, math.ceil(len(points) / _MOST_POINTS))
    thinned = [*points[::every], *(points[-1:] if (len(points) - 1) % every else ())]
    return [(_log(x) if log[0] else x, _log(y) if log[1] else y) for x, y in thinned]


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    margin = share * (high - low) or max(abs(high) * 0.1, 1e-6)
    return low - margin, high + margin


def _ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """About five places from low to high, and what to write there."""
    if log and high - low >= 1:
        every = math.ceil((high - low) / 5)
        decades = range(math.ceil(low), math.floor(high) + 1, every)
        if len(decades) > 1:
            return [(exponent, f"{10.0**exponent:g}") for exponent in decades]
    first, last = (10**low, 10**high) if log else (low, high)
    size = 10 ** math.floor(math.log10((last - first) / 5))
    step = next(size * times for times in (1, 2, 5, 10) if (last - first) / (size * times) <= 5.5)
    values = [step * count for count in range(math.ceil(first / step), math.floor(last / step) + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    return [
        (_log(value) if log else value, f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:g}")
        for value in values
        if not log or value > 0
    ]


def _draw_path(
    svg: ElementTree.Element,
    points: Points,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    kind: str,
    dash: str,
) -> None:
    text, pen = "", "M"
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        text += f"{pen}{x_of(x):.1f} {y_of(y):.1f}"
        pen = "L"
    if text:
        _add(svg, "path", kind, d=text, **({"stroke-dasharray": dash} if dash else {}))


def _mark(svg: ElementTree.Element, index: int, x: float, y: float) -> None:
    place = f"translate({x:.1f} {y:.1f})"
    _add(svg, "path", f"mark m{index % 7}", d=_MARKS[index % 7], transform=place)


def _start(height: float, alt: str) -> ElementTree.Element:
    box = f"0 0 {_WIDTH} {height:g}"
    return ElementTree.Element("svg", {"viewBox": box, "role": "img", "aria-label": alt})


def _add(svg: ElementTree.Element, tag: str, kind: str, **attributes: float | str) -> None:
    texts = {
        name: value if isinstance(value, str) else f"{value:.1f}"
        for name, value in attributes.items()
    }
    ElementTree.SubElement(svg, tag, {"class": kind, **texts})


def _write(
    svg: ElementTree.Element, text: str, x: float, y: float, anchor: str = "start", kind: str = ""
) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ElementTree.SubElement(svg, "text", place | ({"class": kind} if kind else {})).text = text


def _markup(svg: ElementTree.Element) -> Markup:
    # ElementTree has escaped every text and attribute.
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
