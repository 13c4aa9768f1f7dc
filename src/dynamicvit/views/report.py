"""report(): a model, its training and what was measured of it, as one page, without a network."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from rich.console import Console
from timm.data import resolve_input_data_config
from torch.utils.data import IterableDataset

from dynamicvit import __version__
from dynamicvit.core.predict import Prediction, class_names
from dynamicvit.embedded import ASSETS
from dynamicvit.files import write_text
from dynamicvit.training.evaluate import input_size, open_images, start_evaluation
from dynamicvit.training.plot import MANY, METRICS, Panel, read_panels, running_mean
from dynamicvit.views import explanation, pictures
from dynamicvit.views.charts import draw_lines, draw_schedule
from dynamicvit.views.findings import BENCHMARK, COMPARE, SWEEP, Findings, Written, arrows, gather

_OWN = "own backbone"  # what is called dense where no other dense model was named
_PAGE = "report.html"  # what is written, and its template
_LOOKED_AT = 256  # images, from all over the split, of which examples are taken
_BATCH = 32
_EXAMPLES = 4  # shown of a kind
_DISAGREEMENTS = 6
_ROWS = 8  # of classes and of confusions
_SIDE = 112  # pixels of an example's shorter side, about


@dataclass(frozen=True)
class _Text:
    text: str
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class _Missing:
    """What is not there, why, and the commands that make it, unless an earlier section has them."""

    what: str
    why: str
    calls: Sequence[Sequence[str]]
    again: bool = False
    kind: Literal["missing"] = "missing"

    @property
    def text(self) -> str:
        return self.why + (
            " The command is in a section above." if self.again else " What adds it:"
        )

    @property
    def command(self) -> str:
        return "" if self.again else "\n".join(map(shlex.join, self.calls))


@dataclass(frozen=True)
class _Code:
    title: str
    text: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True)
class _Details:
    title: str
    text: str
    kind: Literal["details"] = "details"


@dataclass(frozen=True)
class _Table:
    """The first cell of a row is its header."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class _Figure:
    """An SVG, or an image as a data URI with its size in pixels; `pixels`: shown unsmoothed."""

    caption: str
    svg: Markup | None = None
    image: str = ""
    alt: str = ""
    size: tuple[int, int] = (0, 0)
    pixels: bool = False


@dataclass(frozen=True)
class _Gallery:
    layout: Literal["charts", "strips", "maps", "single"]
    figures: Sequence[_Figure]
    title: str = ""
    kind: Literal["gallery"] = "gallery"


_Block = _Text | _Missing | _Code | _Details | _Table | _Gallery


@dataclass(frozen=True)
class _Section:
    title: str
    blocks: Sequence[_Block]


@dataclass(frozen=True)
class _Card:
    name: str
    value: str
    note: str


def report(
    model: str,
    /,
    output: str | None = None,
    benchmark: str | None = None,
    compare: str | None = None,
    sweep: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    split: str = "val",
) -> Path:
    """Show a model, its training and what was measured of it, as one HTML file.

    It opens without a network. It is made of what other commands wrote; what is missing it names,
    with the command that makes it.

    Args:
        model: folder of a run (its best model is shown) or of a quickstart; or model folder or hub
            id of a sparse model.
        output: HTML file to write; by default report.html in the folder, or here for a hub id.
        benchmark: JSON file that `dynamicvit benchmark` wrote; by default benchmark.json in the
            folder of the run or model, if it is there and of this model.
        compare: folder that `dynamicvit compare` wrote; by default compare, likewise.
        sweep: JSON file that `dynamicvit sweep` wrote; by default sweep.json, likewise.
        data: image folder with split sub-folders, or a timm data set name such as torch/cifar10:
            run the model on some of its images, and show examples.
        data_dir: where a named data set lies.
        split: which split to take examples from.

    Returns:
        The file written.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an option, the model or the data;
            or if a file that is named is not what its command writes, or is of another model.
    """
    if output is not None and Path(output).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"output must end in .html, got {output!r}")
    found = gather(model, benchmark, compare, sweep)
    target = Path(output) if output is not None else (found.place.home or Path()) / _PAGE
    looked_at = None if data is None else _look_at(found, data, data_dir, split)
    sections = [
        _Section("The model", _describe_model(found)),
        _Section("Where tokens leave", _describe_schedule(found)),
        _Section("Accuracy and cost", _describe_accuracy(found)),
        _Section("Speed", _describe_speed(found)),
        _Section("Other budgets", _describe_sweep(found)),
        _Section("What is kept", _describe_maps(found)),
        _Section("Examples", _describe_examples(found, looked_at)),
        _Section("Where dense and pruned disagree", _describe_changes(found, looked_at)),
        _Section("Training", _describe_training(found)),
        _Section("Use and export", _describe_use(found)),
        _Section("Sources", _describe_sources(found)),
    ]
    missing = [
        block.what for section in sections for block in section.blocks if block.kind == "missing"
    ]
    write_text(target, _render(found, sections, missing))
    console = Console()
    for what in missing:
        console.print(f"missing: {what}", markup=False, soft_wrap=True)
    console.print(f"the report is in {target}", markup=False, soft_wrap=True)
    return target


def _missing(found: Findings, what: str, command: str, again: bool = False) -> _Missing:
    """Name what a command would add, and how to call it so that the next report finds it.

    Args:
        again: whether the command stands in an earlier section.
    """
    place = found.place
    why = f"Not measured: {what}."
    if command in found.refused:
        why = f"Left out: {found.refused[command]}."
    options: list[str] = []
    if command != "benchmark":  # the others compare, on images, best with the run's teacher
        options += ["--data", found.data]
        for option, setting in (("--data_dir", "data_dir"), ("--dense", "model")):
            if found.config.get(setting):
                options += [option, str(found.config[setting])]
    usual = {"benchmark": BENCHMARK, "sweep": SWEEP, "compare": COMPARE}[command]
    where = usual if place.home is None else str(place.home / usual)
    calls = [
        ["dynamicvit", command, place.model, *options, "--output", where],
        ["dynamicvit", "report", found.name, *([f"--{command}", where] * (place.home is None))],
    ]
    return _Missing(f"{what} (dynamicvit {command})", why, calls, again)


def _describe_model(found: Findings) -> list[_Block]:
    sparse = found.sparse
    backbone: Any = sparse.backbone
    data = resolve_input_data_config(backbone)
    channels, height, width = input_size(sparse)
    rows, columns = backbone.patch_embed.dynamic_feat_size((height, width))
    patch = backbone.patch_embed.feat_ratio(as_scalar=False)
    weights, scorers = _count(backbone), _count(sparse.scorers)
    names = class_names(sparse) if sparse.num_classes else []
    table = _Table(
        "Architecture and input",
        (),
        [
            ("architecture", str(backbone.pretrained_cfg.get("architecture"))),
            (
                "size",
                f"{len(backbone.blocks)} blocks, {backbone.embed_dim} channels, "
                f"{backbone.blocks[0].attn.num_heads} heads",
            ),
            (
                "parameters",
                f"{_millions(weights + scorers)}: {_millions(weights)} of the backbone, "
                f"{_millions(scorers)} of {len(sparse.scorers)} scorers",
            ),
            ("input", f"{width} × {height} pixels, channels: {channels}"),
            (
                "patches",
                f"{rows * columns} tokens: {columns} × {rows} of {patch[1]} × {patch[0]} pixels",
            ),
            ("other tokens", f"{backbone.num_prefix_tokens} (class, registers), which never leave"),
            (
                "preparation",
                f"{data['interpolation']} resizing, crop {data['crop_pct']:g}, "
                f"mean {_numbers(data['mean'])}, deviation {_numbers(data['std'])}",
            ),
            ("classes", str(sparse.num_classes)),
            ("model", found.place.model),
        ],
    )
    return [table, *([_Details("Names of the classes", ", ".join(names))] if names else [])]


def _describe_schedule(found: Findings) -> list[_Block]:
    schedule, start = found.sparse.schedule, found.tokens[0]
    depth = len(cast(Any, found.sparse.backbone).blocks)
    drawing = _Figure(
        "Each bar is a block (counted from 0), as high as patch tokens are present in it. At a "
        "dashed line a scorer looks at them, and those with the lowest scores leave.",
        svg=draw_schedule(schedule, start, depth),
    )
    rows = [
        (
            f"stage {stage}",
            f"before block {block}",
            str(before),
            str(after),
            f"{after / before:.1%}",
            f"{after / start:.1%}",
        )
        for stage, (block, before, after) in enumerate(
            zip(schedule.blocks, found.tokens, found.tokens[1:], strict=False), start=1
        )
    ]
    header = ("stage", "where", "tokens before", "kept", "of those before", "of all")
    return [
        _Gallery("single", [drawing]),
        _Table("The same in numbers, for every image", header, rows),
    ]


def _describe_accuracy(found: Findings) -> list[_Block]:
    dense, sparse = found.gmacs
    weights, scorers = _count(found.sparse.backbone), _count(found.sparse.scorers)
    blocks: list[_Block] = [
        _Table(
            "Cost of an image. GMACs are billions of multiply-adds.",
            ("of", "dense", "pruned", "change"),
            [
                ("GMACs", f"{dense:.3f}", f"{sparse:.3f}", f"{sparse / dense - 1:+.1%}"),
                (
                    "parameters",
                    _millions(weights),
                    _millions(weights + scorers),
                    f"{scorers / weights:+.1%}",
                ),
                (
                    "patch tokens at the end",
                    str(found.tokens[0]),
                    str(found.tokens[-1]),
                    f"{found.tokens[-1] / found.tokens[0] - 1:+.1%}",
                ),
            ],
        )
    ]
    rows = _accuracies(found)
    if rows:
        header = (
            *("measured by", "images", "dense", "pruned", "points lost", "95% interval"),
            *("dense model", "images of"),
        )
        blocks.append(_Table("Top-1 accuracy, in percent", header, rows))
        if any(row[6] == _OWN for row in rows) and found.config.get("model"):
            blocks.append(
                _Text(
                    "Where the dense model is the “own backbone”, it has this model's weights and "
                    "keeps all tokens. It is not the teacher that the training began with, "
                    f"{found.config['model']}; --dense names that."
                )
            )
    if found.quickstart is not None:
        with found.quickstart as result:
            chance = result["random_selection"]["top1"]
        blocks.append(
            _Text(
                "With tokens chosen at random instead of by the scorers, the quickstart found a "
                f"top-1 of {chance:.2f}%."
            )
        )
    if found.compare is None:
        what = "accuracy beside the dense model, image by image"
        blocks.append(_missing(found, what, "compare"))
    return blocks


def _accuracies(found: Findings) -> list[tuple[str, ...]]:
    """A row for each command that measured it, the surest first."""
    rows: list[tuple[str, ...]] = []

    def add(
        command: str, where: str, images: int, tops: Sequence[float], model: str | None, change: Any
    ) -> None:
        dense, pruned = (f"{top:.2f}" for top in tops)
        interval = change.get("interval")
        sure = "not computed" if interval is None else _interval(interval)
        lost = f"{change['points_lost']:.2f}"
        rows.append((command, f"{images:,}", dense, pruned, lost, sure, model or _OWN, where))

    if found.compare is not None:
        with found.compare as result:
            tops = result["dense_top1"], result["sparse_top1"]
            where = f"{result['data']}, {result['split']}"
            add("compare", where, result["images"], tops, result["dense"], result)
    if found.sweep is not None:
        with found.sweep as result:
            point, dense = _own_point(found, result), result["dense"]
            tops = dense["top1"], point["top1"]
            where = f"{result['data']}, {result['split']}"
            add("sweep", where, result["images"], tops, dense["model"], point["change"])
    if found.quickstart is not None:
        with found.quickstart as result:
            tops = result["dense"]["top1"], result["sparse"]["top1"]
            teacher, where = (f"{result['settings'][name]}" for name in ("model", "data"))
            add("quickstart", where, result["dense"]["images"], tops, teacher, result)
    return rows


def _speeds(found: Findings) -> tuple[list[dict[str, Any]], str]:
    """Measurements and what they were made on; those of a quickstart if there are no others."""
    if found.benchmark is not None:
        with found.benchmark as result:
            return list(result["measurements"]), _machine(result["environment"])
    if found.quickstart is not None:
        with found.quickstart as result:
            setting = {"engine": "eager", "precision": "float32"}
            return [setting | row for row in result["speed"]], _machine(result["environment"])
    return [], ""


def _describe_speed(found: Findings) -> list[_Block]:
    measured, machine = _speeds(found)
    blocks: list[_Block] = []
    if measured:
        with cast(Written, found.benchmark or found.quickstart):
            blocks += _draw_speed(found, measured, machine)
    if found.benchmark is None:
        what = "speed in every engine of the machine"
        return [*blocks, _missing(found, what, "benchmark")]
    with found.benchmark as result:
        spent = result["stages_ms"]
        whole = sum(spent.values()) or 1.0
        rows = [(name, f"{time:.2f}", f"{time / whole:.0%}") for name, time in spent.items()]
        caption = "Where the pruned model's time goes: eager, float32, the largest batch"
        blocks.append(_Table(caption, ("part", "ms", "share"), rows))
        blocks += [
            _Text(f"{item['engine']}, {item['precision']} failed: {item['reason']}")
            for item in result["failed"]
        ]
    return blocks


def _draw_speed(
    found: Findings, measured: Sequence[dict[str, Any]], machine: str
) -> Iterator[_Block]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for item in measured:
        points = lines.setdefault(f"{item['engine']}, {item['precision']}", [])
        points.append((item["batch_size"], item["speed_up"]))
    lines = {name: sorted(points) for name, points in lines.items()}
    ideal = found.gmacs[0] / found.gmacs[1]
    yield _Gallery(
        "single",
        [
            _Figure(
                "How many times as fast as the dense model, in the same engine and precision, "
                "against batch size. Time that followed the multiply-adds would give "
                f"{ideal:.2f}.",
                svg=draw_lines(
                    lines,
                    "Speed-up over the dense model against batch size: "
                    + "; ".join(f"{name} {_span(points)}" for name, points in lines.items())
                    + ". The table below has all figures.",
                    "images a call",
                    levels={"dense": 1.0, f"by multiply-adds, {ideal:.2f}": ideal},
                    x_ticks=sorted({point[0] for points in lines.values() for point in points}),
                    log=(True, False),
                ),
            )
        ],
    )
    rows = [
        (
            f"{item['engine']}, {item['precision']}",
            str(item["batch_size"]),
            f"{item['dense']:.1f}",
            f"{item['sparse']:.1f}",
            f"{item['speed_up']:.2f}×",
            "{:.2f} to {:.2f}".format(*item["spread"]),
            "{:.0f} → {:.0f}".format(*item["peak_mb"]) if item.get("peak_mb") else "not measured",
        )
        for item in measured
    ]
    header = (
        *("engine", "batch", "dense, images/s", "pruned, images/s", "speed-up"),
        *("quartiles", "peak MB, dense → pruned"),
    )
    yield _Table(f"Dense and pruned timed in turn on {machine}", header, rows)


def _describe_sweep(found: Findings) -> list[_Block]:
    if found.sweep is None:
        what = "accuracy and cost of the same weights at other keep ratios"
        return [_missing(found, what, "sweep")]
    with found.sweep as result:
        dense, points = result["dense"], result["points"]
        own, recommended = _own_point(found, result), result["recommended"]
        line = sorted((point["gmacs"], point["top1"]) for point in points)
        drawing = draw_lines(
            {"pruned": line, "dense": [(dense["gmacs"], dense["top1"])]},
            f"Top-1 against GMACs: {line[0][1]:.2f}% at {line[0][0]:.3f} to {line[-1][1]:.2f}% at "
            f"{line[-1][0]:.3f}; dense {dense['top1']:.2f}% at {dense['gmacs']:.3f}.",
            "GMACs an image",
        )
        rows = []
        for point in points:
            schedule = point["schedule"]
            notes = [
                *(["this model"] if point["tokens"] == own["tokens"] else []),
                *(["recommended"] if point == recommended else []),
                *(["on the frontier"] if point["frontier"] else []),
            ]
            rows.append(
                (
                    ", ".join(f"{ratio:.3g}" for ratio in schedule["ratios"]),
                    ", ".join(map(str, schedule["blocks"])),
                    f"{point['gmacs']:.3f}",
                    f"{point['top1']:.2f}",
                    f"{point['change']['points_lost']:.2f}",
                    _interval(point["change"]["interval"]),
                    f"{point['speed']['speed_up']:.2f}×" if point["speed"] else "not timed",
                    ", ".join(notes),
                )
            )
        budget = result["budget"]
        if budget["max_gmacs"] is not None:
            goal = f"at most {budget['max_gmacs']:g} GMACs"
        else:
            goal = f"at most {budget['max_loss']:g} points lost" + ", surely" * budget["sure"]
        header = (
            *("shares kept", "before blocks", "GMACs", "top-1", "points lost", "95% interval"),
            *("speed-up", "which"),
        )
        return [
            _Gallery("single", [_Figure("Top-1 in percent against GMACs.", svg=drawing)]),
            _Table(
                f"The same weights at other schedules, {result['images']:,} images, budget: {goal}",
                header,
                rows,
            ),
        ]


def _describe_maps(found: Findings) -> list[_Block]:
    if found.maps is None or found.compare is None:
        return [_missing(found, "keep maps over a data set", "compare", again=True)]
    with found.maps as maps, found.compare as result:
        keep, start = maps["keep"], found.tokens[0]
        ramp = pictures.heat_colours(np.linspace(0, 1, 256))[None].repeat(16, axis=0)
        legend = _Figure(
            "From 0% of the images (left) to 100% (right).",
            image=_data_uri(Image.fromarray(ramp)),
            alt="Colour scale from dark blue, 0%, to yellow, 100%.",
            size=(256, 16),
        )
        overall = [
            _map_figure(rates, f"Stage {stage}: {count} of {start} kept", f"After stage {stage}")
            for stage, (rates, count) in enumerate(
                zip(keep, found.tokens[1:], strict=True), start=1
            )
        ]
        last = maps["keep_by_class"][:, -1]
        there = np.flatnonzero(maps["images_by_class"])
        apart = np.abs(last[there] - keep[-1]).mean(axis=(1, 2))
        chosen = sorted(there[np.argsort(-apart, kind="stable")[:_ROWS]])
        names = [str(name) for name in maps["class_names"]]
        by_class = [
            _map_figure(last[index], names[index], f"Class {names[index]}, after the last stage")
            for index in chosen
        ]
        title = "By class, after the last stage"
        if len(chosen) < len(there):
            title += f": the {len(chosen)} of {len(there)} that differ most from the whole"
        shares = ", ".join(f"{share:.0f}%" for share in result["static_share"])
        return [
            _Text(
                f"How often each patch is kept, of {result['images']:,} images. Of what is kept, "
                f"{shares} (stage by stage) would be kept by a mask that is the same for all "
                "images; the rest follows the image."
            ),
            _Gallery("maps", [*overall, legend]),
            _Gallery("maps", by_class, title),
        ]


def _map_figure(rates: np.ndarray, caption: str, what: str) -> _Figure:
    rows, columns = rates.shape
    colours = pictures.heat_colours(rates.clip(0, 1).reshape(-1)).reshape(rows, columns, 3)
    alt = (
        f"{what}: patches are kept in {rates.min():.0%} to {rates.max():.0%} of the images, "
        f"most often that in row {rates.argmax() // columns + 1}, "
        f"column {rates.argmax() % columns + 1} of {rows} × {columns}."
    )
    image = _data_uri(Image.fromarray(colours))
    return _Figure(caption, image=image, alt=alt, size=(columns, rows), pixels=True)


@dataclass(frozen=True)
class _Example:
    """An image, and what it is."""

    found: explanation.Explanation
    target: int
    name: str

    @property
    def answers(self) -> tuple[int, int]:
        return self.found.dense[0].index, self.found.pruned[0].index


@dataclass(frozen=True)
class _LookedAt:
    """Images of which examples are taken."""

    examples: Sequence[_Example]
    where: str


def _look_at(found: Findings, data: str, data_dir: str | None, split: str) -> _LookedAt:
    """Run the model on images from all over a split. Errors as for `report`."""
    accelerator = start_evaluation("no")
    sparse = found.sparse.to(accelerator.device)
    images, loader = open_images(
        sparse, found.place.model, accelerator, data, data_dir, split, _BATCH, 0, True
    )
    names = images.class_names or class_names(sparse)
    read = (
        _first(loader)
        if isinstance(images.dataset, IterableDataset)
        else _spread(images.dataset, len(images.dataset))
    )
    examples: list[_Example] = []
    while batch := list(islice(read, _BATCH)):
        there = [(image, int(target)) for image, target in batch if int(target) >= 0]
        if not there:
            continue
        inputs = torch.stack([image for image, _ in there]).to(accelerator.device)
        for (_, target), item in zip(there, explanation.explain(sparse, inputs), strict=True):
            examples.append(_Example(item, target, names[target]))
    if not examples:
        raise ValueError(f"data must have readable images, got none in {data} ({split})")
    return _LookedAt(examples, f"{data}, {split}")


def _spread(dataset: Any, count: int) -> Iterator[tuple[torch.Tensor, int]]:
    for index in range(min(count, _LOOKED_AT)):
        yield dataset[index * count // min(count, _LOOKED_AT)]


def _first(loader: Any) -> Iterator[tuple[torch.Tensor, int]]:
    """Of a stream, which cannot be had from all over."""
    seen = 0
    for inputs, targets in loader:
        for image, target in zip(inputs.cpu(), targets.tolist(), strict=True):
            if seen == _LOOKED_AT:
                return
            seen += 1
            yield image, target


def _describe_examples(found: Findings, looked_at: _LookedAt | None) -> list[_Block]:
    if looked_at is None:
        return [_missing_examples(found)]
    right, wrong, apart = _sorted(looked_at)
    total = len(looked_at.examples)
    blocks: list[_Block] = [
        _Text(
            f"{total:,} images from all over {looked_at.where} were looked at: dense and pruned "
            f"agree and are right on {len(right):,}, agree and are wrong on {len(wrong):,}, and "
            f"differ on {len(apart):,}. Dense is this model's backbone with all tokens kept. "
            "Those shown are spread evenly, not chosen. Each image is shown as the model sees it, "
            "then what each stage keeps of it."
        )
    ]
    for title, examples in (("Right, dense and pruned", right), ("Wrong, both alike", wrong)):
        if examples:
            blocks.append(_gallery(title, examples, _EXAMPLES))
    return blocks


def _missing_examples(found: Findings, again: bool = False) -> _Missing:
    command = ["dynamicvit", "report", found.name, "--data", found.data]
    return _Missing("example images (--data)", "No images were given.", [command], again)


def _sorted(looked_at: _LookedAt) -> tuple[list[_Example], list[_Example], list[_Example]]:
    """Those that both take rightly, those that both take wrongly, and those where they differ."""
    kinds: tuple[list[_Example], ...] = ([], [], [])
    for example in looked_at.examples:
        dense, pruned = example.answers
        kinds[2 if dense != pruned else 0 if pruned == example.target else 1].append(example)
    return cast(Any, kinds)


def _gallery(title: str, examples: Sequence[_Example], most: int) -> _Gallery:
    count = min(most, len(examples))
    chosen = [examples[index * len(examples) // count] for index in range(count)]
    figures = []
    for example in chosen:
        found = example.found
        strip = _strip(pictures.draw_panels(found, _SIDE))
        figures.append(
            _Figure(
                f"{example.name}. Dense: {_answer(found.dense[0], example.target)}; "
                f"pruned: {_answer(found.pruned[0], example.target)}.",
                image=_data_uri(strip),
                alt=f"{example.name}: {repr(found).strip('<>')}",
                size=strip.size,
            )
        )
    return _Gallery("strips", figures, title)


def _strip(panels: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side; between them the page shows."""
    width, height = panels[0].size
    gap = max(2, width // 14)
    strip = Image.new("RGBA", (len(panels) * (width + gap) - gap, height), (0, 0, 0, 0))
    for index, panel in enumerate(panels):
        strip.paste(panel, (index * (width + gap), 0))
    return strip


def _describe_changes(found: Findings, looked_at: _LookedAt | None) -> list[_Block]:
    blocks: list[_Block] = []
    if found.compare is None:
        what = "which answers change over a data set"
        blocks.append(_missing(found, what, "compare", again=True))
    else:
        with found.compare as result:
            blocks += _list_changes(result)
    if looked_at is None:
        return [*blocks, _missing_examples(found, again=True)]
    apart = _sorted(looked_at)[2]
    if apart:
        blocks.append(
            _gallery("Images that they take for different classes", apart, _DISAGREEMENTS)
        )
    else:
        count = len(looked_at.examples)
        blocks.append(_Text(f"On the {count:,} images looked at, they agree everywhere."))
    return blocks


def _list_changes(result: dict[str, Any]) -> Iterator[_Block]:
    yield _Text(
        f"Of {result['images']:,} images, both take {result['agreement']:.2f}% for the same; "
        f"{result['right_to_wrong']:,} go from right to wrong, {result['wrong_to_right']:,} from "
        "wrong to right."
    )
    confusion, classes = result["confusion"], result["classes"]
    if confusion:
        rows = [(row["dense"], row["sparse"], f"{row['images']:,}") for row in confusion[:_ROWS]]
        caption = "What images that they do not agree on are taken for, the most frequent first"
        yield _Table(caption, ("dense", "pruned", "images"), rows)
    by_class = [
        (
            row["name"],
            f"{row['images']:,}",
            f"{row['dense_top1']:.1f}",
            f"{row['sparse_top1']:.1f}",
            f"{row['points_lost']:.1f}",
            _interval(row["interval"], 1),
            f"{row['right_to_wrong']}, {row['wrong_to_right']}",
        )
        for row in classes[:_ROWS]
    ]
    header = ("class", "images", "dense", "pruned", "points lost", "95% interval", "lost, won")
    yield _Table("Top-1 by class, in percent; those that lose most first", header, by_class)


def _describe_training(found: Findings) -> list[_Block]:
    run = found.place.run
    if run is None or not (run / METRICS).is_file():
        options = ["--data", "path/to/images", "--model", "deit_small_patch16_224"]
        command = ["dynamicvit", "train", *options, "--output", "run"]
        return [
            _Missing(
                what="training curves (dynamicvit train)",
                why="This model does not lie in the folder of a run, which keeps them beside it.",
                calls=[command, ["dynamicvit", "report", "run"]],
            )
        ]
    blocks: list[_Block] = []
    if found.config:
        names = (
            *("model", "data", "keep_ratio", "blocks", "ratios", "epochs", "batch_size", "lr"),
            *("backbone_lr", "warm_start", "precision", "seed"),
        )
        rows = [
            (name, str(found.config[name])) for name in names if found.config.get(name) is not None
        ]
        blocks.append(_Table("The run's main settings (model: the dense teacher)", (), rows))
        text = "\n".join(f"{name}: {value}" for name, value in found.config.items())
        blocks.append(_Details("All settings", text))
    panels = read_panels(run)
    steps = [step for panel in panels for line in panel.lines.values() for step, _ in line]
    figures = [_draw_panel(panel, (min(steps), max(steps))) for panel in panels]
    blocks.append(_Gallery("charts", figures))
    return blocks


def _draw_panel(panel: Panel, steps_shown: tuple[float, float]) -> _Figure:
    lines = {name: points for name, points in panel.lines.items() if points}
    means: dict[str, list[tuple[float, float]]] = {}
    if panel.smooth:
        for name, points in lines.items():
            if len(points) >= MANY:
                steps, values = zip(*points, strict=True)
                means[name] = list(zip(steps, running_mean(steps, values), strict=True))
    alt = f"{panel.title} against step: " + "; ".join(
        f"{name} {_span(points)}".strip() for name, points in lines.items()
    )
    caption = panel.title[:1].upper() + panel.title[1:] + (", logarithmic" if panel.log else "")
    if panel.targets:
        caption += "; level lines are the shares aimed at"
    return _Figure(
        f"{caption}.",
        svg=draw_lines(
            lines,
            alt,
            "step",
            means=means,
            levels={f"aimed at {target:.3g}": target for target in panel.targets},
            log=(False, panel.log),
            x_range=steps_shown,
            y_range=(0.0, 1.04) if panel.targets else None,
        ),
    )


def _describe_use(found: Findings) -> list[_Block]:
    model = found.place.model
    python = f"""import dynamicvit

model = dynamicvit.load({model!r})
for prediction in model.predict("image.jpg"):
    print(prediction.name, prediction.probability)
dynamicvit.explain(model, "image.jpg").save("kept.png")"""
    shape = ", ".join(map(str, input_size(found.sparse)))
    images = f"""# images: float32, [B, {shape}], normalised as above
output = model.pruned(images)
output.logits, output.keep  # and which tokens each stage kept"""

    def call(*words: str) -> str:
        return shlex.join(["dynamicvit", *words])

    return [
        _Code("In Python", python),
        _Code("On prepared images", images),
        _Code(
            "From the command line",
            "\n".join(
                [
                    call("predict", "image.jpg", "--model", model),
                    call("explain", "image.jpg", "--model", model),
                ]
            ),
        ),
        _Code(
            "Export, compared with PyTorch before the file is there",
            "\n".join(
                [
                    call("export", model, "model.onnx"),
                    call("export", model, "model.xml", "--format", "openvino"),
                    call("export", model, "model.pt2", "--format", "torch"),
                ]
            ),
        ),
    ]


def _describe_sources(found: Findings) -> list[_Block]:
    if not found.sources:
        return [_Text("Nothing that other commands write was found beside the model.")]
    note = "The model itself gave architecture, schedule, parameters and GMACs."
    return [_Text(note), _Table("What this page is made of", ("file", "written by"), found.sources)]


def _cards(found: Findings) -> list[_Card]:
    """The four figures that matter most; what was not measured says so."""
    dense, sparse = found.gmacs
    accuracy = _Card("Top-1, dense → pruned", "not measured", "see Accuracy and cost")
    if rows := _accuracies(found):
        _, images, before, after, lost, interval, *_ = rows[0]
        note = f"{images} images, points lost: {lost}"
        if " to " in interval:
            note += f" (95%: {interval})"
        accuracy = _Card("Top-1, dense → pruned", f"{before} → {after}%", note)
    speed = _Card("Speed-up", "not measured", "see Speed")
    measured, _ = _speeds(found)
    if measured:
        with cast(Written, found.benchmark or found.quickstart):
            best = max(measured, key=lambda item: item["dense"])
            speed = _Card(
                "Speed-up",
                f"{best['speed_up']:.2f}×",
                f"where dense is fastest: {best['engine']}, {best['precision']}, "
                f"batch {best['batch_size']}",
            )
    return [
        accuracy,
        _Card("GMACs an image", f"{dense:.3f} → {sparse:.3f}", f"{1 - sparse / dense:.1%} fewer"),
        speed,
        _Card("Patch tokens", f"{found.tokens[0]} → {found.tokens[-1]}", arrows(found.tokens)),
    ]


def _render(found: Findings, sections: Sequence[_Section], missing: Sequence[str]) -> str:
    # Class names, paths and settings are whatever somebody wrote: all of it is escaped.
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    backbone: Any = found.sparse.backbone
    summary = (
        f"A vision transformer, {backbone.pretrained_cfg.get('architecture')}, that lets patch "
        f"tokens leave on the way: {arrows(found.tokens)}."
    )
    date = datetime.now(UTC).isoformat(sep=" ", timespec="minutes")
    return environment.get_template(_PAGE).render(
        title=found.place.home.resolve().name if found.place.home else found.name,
        summary=summary,
        missing=list(dict.fromkeys(missing)),
        cards=_cards(found),
        sections=sections,
        made=f"Made by dynamicvit {__version__} on {date}, after arXiv 2106.02034.",
    )


def _own_point(found: Findings, result: dict[str, Any]) -> dict[str, Any]:
    """This model's schedule among those of a sweep."""
    return next(point for point in result["points"] if point["tokens"] == list(found.tokens))


def _machine(environment: dict[str, Any]) -> str:
    threads = environment["threads"]
    processor = f"{environment['processor']}, {threads} thread{'s' * (threads != 1)}"
    place = environment["gpu"] or processor
    return f"{place}, PyTorch {environment['torch']}, {environment['date'][:10]}"


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _millions(count: int) -> str:
    return f"{count / 1e6:.3f} M"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _interval(interval: Sequence[float], digits: int = 2) -> str:
    low, high = interval
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _span(points: Sequence[tuple[float, float]]) -> str:
    """First and last value of a line, in words."""
    first, last = points[0][1], points[-1][1]
    return f"{first:.3g}" if len(points) == 1 else f"from {first:.3g} to {last:.3g}"


def _answer(prediction: Prediction, target: int) -> str:
    verdict = "right" if prediction.index == target else "wrong"
    return f"{prediction.name} ({prediction.probability:.0%}), {verdict}"


def _data_uri(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
