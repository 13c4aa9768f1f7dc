"""Results of benchmarks/accuracy.py as tables for docs/results.md and as diagrams."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dynamicvit.core.selectors import SELECTORS
from dynamicvit.io.files import write_bytes

STEP_BASELINES = ("random", "class_attention")  # with as few steps as the learned one
_UNTRAINED = ", not trained"


def summarise(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarise rows that differ only in the seed: means, and the range of top-1."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        name = result["row"].removesuffix(f"-seed{result['seed']}")
        groups.setdefault(name, []).append(result)
    return [
        {
            **{key: found[0][key] for key in ("table", "scorer", "keep_ratio", "stages", "steps")},
            "row": name,
            "warm_start": found[0]["warm_start"],
            "top1": statistics.mean(result["top1"] for result in found),
            "spread": (min(r["top1"] for r in found), max(r["top1"] for r in found)),
            "gmacs": found[0]["gmacs"],
            "seeds": len(found),
        }
        for name, found in groups.items()
    ]


def print_table(console: Console, rows: Iterable[dict[str, Any]]) -> None:
    table = Table("row", "top-1 %", "range", "seeds", "GMACs", "steps")
    for row in rows:
        low, high = row["spread"]
        table.add_row(
            row["row"],
            f"{row['top1']:.2f}",
            f"{low:.2f}–{high:.2f}" if row["seeds"] > 1 else "",
            str(row["seeds"]),
            f"{row['gmacs']:.4f}",
            str(row["steps"] + row["warm_start"]),
        )
    console.print(table)


def curves(rows: Sequence[dict[str, Any]], axis: str) -> dict[str, list[dict[str, Any]]]:
    """Named curves over `axis`: one for each method ("gmacs") or for each variant ("steps")."""
    found: dict[str, list[dict[str, Any]]] = {}
    full = max((_cost("steps")(row) for row in rows if row["table"] == "main"), default=0)
    # Rows of the main table that are the last point of a variant's curve.
    ends = {("random", 1.0): "all_kept", ("learned", 0.7): "learned_warm_at_ratio"}
    ends |= {(name, 0.7): name for name in STEP_BASELINES}
    for row in rows:
        if axis == "gmacs" and row["table"] == "main":
            name = _what_leaves(row) + (_UNTRAINED if row["steps"] == 0 else "")
        elif axis == "steps" and row["table"] == "steps":
            name = row["row"].split("-", 2)[2]
        elif (
            axis == "steps"
            and row["table"] == "main"
            and _cost("steps")(row) == full
            and (row["scorer"], row["keep_ratio"]) in ends
        ):
            name = ends[row["scorer"], row["keep_ratio"]]
        else:
            continue
        found.setdefault(name, []).append(row)
    return {name: sorted(points, key=_cost(axis)) for name, points in found.items()}


def _cost(axis: str) -> Any:
    if axis == "gmacs":
        return lambda row: row["gmacs"]
    return lambda row: row["steps"] + row["warm_start"]


def tables(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/results.md in Markdown, by name, from the rows that exist."""
    rows = summarise(results)
    dense = next(row for row in rows if row["table"] == "dense")
    main = [row for row in rows if row["table"] == "main"]
    kept = [row for row in main if (row["scorer"], row["keep_ratio"]) == ("learned", 0.7)]

    def of(table: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["table"] == table]

    def name(row: dict[str, Any], prefix: str, otherwise: str) -> str:
        return otherwise if row in kept else str(row["row"].removeprefix(prefix))

    return {
        "dense": markdown(
            ("model", "GMACs", "top-1", "training steps"),
            [["dense", f"{dense['gmacs']:.4f}", _top1(dense), str(dense["steps"])]],
        ),
        "main": markdown(
            ("keep ratio", "what decides", "GMACs", "not trained", "fine-tuned", "against dense"),
            _main(main, dense),
        ),
        "recipes": markdown(
            ("recipe", "training steps", "top-1", "against dense"),
            [
                [
                    name(row, "recipe-", "this table's"),
                    str(row["steps"] + row["warm_start"]),
                    *_result(row, dense),
                ]
                for row in [*of("recipes"), *kept]
            ],
        ),
        "steps": markdown(
            ("scorer", *(f"{steps} steps" for steps in _budgets(rows))), _steps(rows)
        ),
        "stages": markdown(
            ("stages", "keep ratio of each", "GMACs", "top-1", "against dense"),
            [
                [
                    str(row["stages"]),
                    str(row["keep_ratio"]),
                    _saved(row, dense),
                    *_result(row, dense),
                ]
                for row in [*of("stages"), *kept]
            ],
        ),
        "starts": markdown(
            ("what decides", "keep ratio", "with the warm start", "without it"),
            [
                [row["scorer"], str(row["keep_ratio"]), _top1(with_it), _top1(row)]
                for row in of("starts")
                for with_it in main
                if with_it["steps"]
                and all(with_it[key] == row[key] for key in ("scorer", "keep_ratio"))
            ],
        ),
        "budgets": markdown(
            ("keep ratio", "GMACs", "one model for all", "each image its own", "trained for it"),
            _one_for_all(results, main),
        ),
        "losses": markdown(
            ("loss left out", "top-1", "against dense"),
            [
                [name(row, "without-", "none"), *_result(row, dense)]
                for row in [*kept, *of("losses")]
            ],
        ),
    }


def _one_for_all(
    results: Sequence[dict[str, Any]], main: Sequence[dict[str, Any]]
) -> Iterator[list[str]]:
    found: dict[float, dict[bool, list[dict[str, Any]]]] = {}
    for result in results:
        for point in result.get("budgets", ()):
            at = found.setdefault(point["keep_ratio"], {True: [], False: []})
            at[point["per_image"]].append(point)
    for ratio, at in found.items():
        own = [row for row in main if (row["scorer"], row["keep_ratio"]) == ("learned", ratio)]
        yield [
            f"{ratio:g}",
            f"{statistics.mean(point['gmacs'] for point in at[False]):.4f}",
            *(_seeds([point["top1"] for point in at[per_image]]) for per_image in (False, True)),
            "".join(map(_top1, own)),
        ]


def _main(main: Sequence[dict[str, Any]], dense: dict[str, Any]) -> Iterator[list[str]]:
    rules = dict.fromkeys((row["keep_ratio"], row["scorer"]) for row in main)
    for ratio, scorer in sorted(rules, key=lambda rule: -rule[0]):
        same = [row for row in main if (row["keep_ratio"], row["scorer"]) == (ratio, scorer)]
        plain = "".join(_top1(row) for row in same if row["steps"] == 0)
        tuned = [_result(row, dense) for row in same if row["steps"]]
        of = [str(ratio), _what_leaves(same[0]), _saved(same[0], dense)]
        yield [*of, plain, *(tuned[0] if tuned else ("", ""))]


def _steps(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for name, points in curves(rows, "steps").items():
        at = {row["steps"] + row["warm_start"]: _top1(row) for row in points}
        yield [name, *(at.get(steps, "") for steps in _budgets(rows))]


def _what_leaves(row: dict[str, Any]) -> str:
    return "nothing leaves" if row["keep_ratio"] == 1.0 else str(row["scorer"])


def _budgets(rows: Sequence[dict[str, Any]]) -> list[int]:
    points = [row for curve in curves(rows, "steps").values() for row in curve]
    return sorted({row["steps"] + row["warm_start"] for row in points})


def _top1(row: dict[str, Any]) -> str:
    return _spread(row["top1"], row["spread"], row["seeds"])


def _seeds(top1: Sequence[float]) -> str:
    return _spread(statistics.mean(top1), (min(top1), max(top1)), len(top1))


def _spread(mean: float, spread: tuple[float, float], seeds: int) -> str:
    of = f" ({spread[0]:.2f}–{spread[1]:.2f}, {seeds} seeds)" if seeds > 1 else ""
    return f"{mean:.2f}{of}"


def _result(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """Top-1, and what that is against dense."""
    return [_top1(row), minus(row["top1"] - dense["top1"], "+.2f")]


def _saved(row: dict[str, Any], dense: dict[str, Any]) -> str:
    change = row["gmacs"] / dense["gmacs"] - 1
    return f"{row['gmacs']:.4f} ({minus(change, '.1%')})" if change else f"{row['gmacs']:.4f}"


def minus(value: float, form: str) -> str:
    """A formatted number, with a minus sign instead of a hyphen."""
    return format(value, form).replace("-", "−")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the diagrams that have a line, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure  # an extra

    dense = [row["top1"] for row in rows if row["table"] == "dense"]
    by_cost = curves(rows, "gmacs")
    panels = {
        "fine-tuned": ("gmacs", {k: v for k, v in by_cost.items() if not k.endswith(_UNTRAINED)}),
        "not trained": ("gmacs", {k: v for k, v in by_cost.items() if k.endswith(_UNTRAINED)}),
        "how much training it takes, at 0.7": ("steps", curves(rows, "steps")),
    }
    # Untrained rules lose so much that the other curves would overlap in the same diagram.
    shown = [title for title, (_, lines) in panels.items() if any(map(_is_line, lines.values()))]
    figure = Figure(figsize=(6 * max(1, len(shown)), 5.5), layout="constrained")
    for number, title in enumerate(shown):
        axis, lines = panels[title]
        axes = figure.add_subplot(1, len(shown), number + 1)
        for name, points in lines.items():
            top1 = [row["top1"] for row in points]
            below = [row["top1"] - row["spread"][0] for row in points]
            above = [row["spread"][1] - row["top1"] for row in points]
            axes.errorbar(
                [_cost(axis)(row) for row in points],
                top1,
                yerr=[below, above],
                label=name.removesuffix(_UNTRAINED),
                markersize=4,
                capsize=3,
                **_style(name, points[0]),
            )
        for value in dense:
            axes.axhline(value, color="grey", linewidth=0.8, label="dense")
        if axis == "steps":
            axes.set_xscale("log")
        axes.set_title(title)
        axes.set_xlabel("GMACs an image" if axis == "gmacs" else "training steps")
        axes.set_ylabel("top-1 %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_bytes(path, picture.getvalue())


def _is_line(points: Sequence[dict[str, Any]]) -> bool:
    return len(points) > 1


def _style(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A rule's colour and marker, the same in all diagrams. Its other starts have other lines."""
    index = [*SELECTORS, "nothing leaves"].index(_what_leaves(row))
    lines = {"learned_warm": "--", "learned_at_ratio": "-.", "learned": ":"}
    other = lines.get(name, "-") if row["table"] == "steps" else "-"
    return {"color": f"C{index}", "marker": "os^Dv<>P"[index], "linestyle": other}
