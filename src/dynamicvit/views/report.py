"""report(): a model, its training and what was measured of it, as one page, without a network."""

from __future__ import annotations

import base64
import importlib.util
import io
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from rich.console import Console
from timm.data import resolve_input_data_config
from torch.utils.data import IterableDataset

from dynamicvit import __version__
from dynamicvit.evaluation.console import plain, track
from dynamicvit.evaluation.launch import find_device, start_processes
from dynamicvit.evaluation.setup import input_size, open_images
from dynamicvit.io.embedded import ASSETS
from dynamicvit.io.files import check_file, write_text
from dynamicvit.io.predictions import class_names
from dynamicvit.views.charts import Chart, draw_schedule, draw_speed, draw_sweep, draw_training
from dynamicvit.views.drawing import heat_colours
from dynamicvit.views.explain import explain
from dynamicvit.views.explanation import Explanation
from dynamicvit.views.plot import METRICS
from dynamicvit.views.result_files import USUAL, Findings, ForeignFile, arrows, gather

_PAGE = "report.html"  # what is written, and its template
_LOOKED_AT = 256  # images, from all over the split, of which examples are taken
_BATCH = 32
_PRECISIONS = {"no": "float32", "bf16": "bfloat16"}  # in files of earlier versions
_ROWS = 8  # of classes and of confusions
_SIDE = 112  # pixels of an example's shorter side, about


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
    device: str | None = None,
    quiet: bool = False,
) -> Path:
    """Show a model, its training and what was measured of it, as one HTML file.

    It opens without a network. It is made of what other commands wrote; what is missing it names,
    with the command that makes it. Needs the extra "plot".

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
        device: where the model runs on examples: cpu, cuda or cuda:NUMBER; by default a GPU if
            there is one.
        quiet: print nothing.

    Returns:
        The file written.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an option, the model or the data;
            or if the model merges tokens, so that none is kept, or a file that is named is not
            what its command writes, or is of another model.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("report needs the extra: pip install 'dynamicvit[plot]'")
    if output is not None and Path(output).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"output must end in .html, got {output!r}")
    if output is not None:
        check_file("output", output)
    where = find_device(device)
    found = gather(model, benchmark, compare, sweep)
    target = Path(output) if output is not None else (found.home or Path()) / _PAGE
    check_file("output", target)
    examples = None if data is None else _look_at(found, data, data_dir, split, where, quiet)
    missing = _missing(found, examples)
    curves = draw_training(found.run) if found.run and "train" not in missing else []
    try:
        page = _render(found, missing, examples, curves)
    except ForeignFile:
        raise
    except Exception as error:  # foreign content makes readers raise nearly anything
        if not found.sources:
            raise
        files = ", ".join(file for file, _ in found.sources)
        raise ValueError(f"one of {files} is not what its command writes: {error}") from error
    write_text(target, page)
    console = Console(quiet=quiet)
    for gap in missing.values():
        console.print(f"missing: {gap.what}", markup=False, soft_wrap=True)
    console.print(f"the report is in {plain(target)}", markup=False, soft_wrap=True)
    return target


@dataclass(frozen=True)
class _Missing:
    """What is not there, why, and the commands that make and show it."""

    what: str
    why: str
    calls: Sequence[Sequence[str]]


def _missing(found: Findings, examples: _Examples | None) -> dict[str, _Missing]:
    """What is not there, by the command that makes it."""
    again = ["report", found.name]
    data = ["--data", str(found.config.get("data") or "path/to/images")]
    images = list(data)  # to compare on, best with the run's teacher
    for option, value in (("--data_dir", found.config.get("data_dir")), ("--dense", found.teacher)):
        if value:
            images += [option, str(value)]
    missing: dict[str, _Missing] = {}
    for command, what, options in (
        ("compare", "accuracy beside the dense model, keep maps, answers that change", images),
        ("benchmark", "speed in every engine of the machine", []),
        ("sweep", "accuracy and cost of the same weights at other keep ratios", images),
    ):
        if getattr(found, command) is None:
            other = found.refused.get(command)
            why = f"Left out: {other}." if other else f"Not measured: {what}."
            where = str((found.home or Path()) / USUAL[command])
            call = [command, found.model, *options, "--output", where]
            named = [] if found.home else [f"--{command}", where]
            missing[command] = _Missing(
                f"{what} (dynamicvit {command})", why, [call, [*again, *named]]
            )
    if examples is None:
        what, why = "example images (--data)", "No images were given."
        missing["examples"] = _Missing(what, why, [[*again, *data]])
    if found.run is None or not (found.run / METRICS).is_file():
        what = "training curves (dynamicvit train)"
        why = "This model does not lie in the folder of a run, which keeps them beside it."
        options = ["--data", "path/to/images", "--model", "deit_small_patch16_224"]
        call = ["train", *options, "--output", "run"]
        missing["train"] = _Missing(what, why, [call, ["report", "run"]])
    return missing


def _render(
    found: Findings,
    missing: dict[str, _Missing],
    examples: _Examples | None,
    curves: list[tuple[str, Chart]],
) -> str:
    """The page: the template says what of all this stands where, and in which words."""
    # Class names, paths and settings are whatever somebody wrote: all of it is escaped.
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "f": format,  # {{ x | f(".2f") }}, as in an f-string
        "million": lambda count: f"{count / 1e6:.3f} M",
        "interval": lambda ends, digits=2: " to ".join(f"{end:.{digits}f}" for end in ends),
        "arrows": arrows,
        "shell": lambda words: shlex.join(["dynamicvit", *words]),
        "repr": repr,
        "strip": _strip,
        "heat": _heat,
        "data_uri": _data_uri,
        "svg_uri": lambda svg: _uri("image/svg+xml", svg),
        "spread": _spread,
    }
    sparse, size = found.sparse, input_size(found.sparse)
    backbone: Any = sparse.backbone
    measured, machine, timed_by = _speeds(found)
    return environment.get_template(_PAGE).render(
        version=__version__,
        date=datetime.now(UTC).isoformat(sep=" ", timespec="minutes"),
        title=found.home.resolve().name if found.home else found.name,
        found=found,
        missing=missing,
        backbone=backbone,
        data=resolve_input_data_config(backbone),
        size=size,
        grid=backbone.patch_embed.dynamic_feat_size(size[1:]),
        patch=backbone.patch_embed.feat_ratio(as_scalar=False),
        weights=_count(backbone),
        scorers=_count(sparse.scorers),
        class_names=class_names(sparse) if sparse.num_classes else [],
        schedule_chart=draw_schedule(sparse.schedule, found.tokens[0], len(backbone.blocks)),
        accuracies=_accuracies(found),
        measured=measured,
        machine=machine,
        timed_by=timed_by,
        speed_chart=draw_speed(measured, found.gmacs[0] / found.gmacs[1]) if measured else None,
        sweep_chart=draw_sweep(found.sweep) if found.sweep is not None else None,
        scale=np.linspace(0, 1, 256)[None].repeat(16, axis=0),
        class_maps=_class_maps(found.maps) if found.maps is not None else [],
        curves=curves,
        examples=examples,
        rows=_ROWS,
    )


class _Accuracy(NamedTuple):
    by: str  # the command that measured it
    of: str  # the images
    images: int
    dense: float
    pruned: float
    model: str | None  # the dense one; None for the sparse model's backbone
    change: dict[str, Any]


def _accuracies(found: Findings) -> list[_Accuracy]:
    """What was measured, the surest first."""
    measured = []
    if it := found.compare:
        where, tops = f"{it['data']}, {it['split']}", (it["dense_top1"], it["sparse_top1"])
        measured.append(_Accuracy("compare", where, it["images"], *tops, it["dense"], it))
    if it := found.sweep:
        where, dense = f"{it['data']}, {it['split']}", it["dense"]
        own = next(point for point in it["points"] if found.is_own(point))
        tops, change = (dense["top1"], own["top1"]), own["change"]
        measured.append(_Accuracy("sweep", where, it["images"], *tops, dense["model"], change))
    if it := found.quickstart:
        where, dense, model = it["settings"]["data"], it["dense"], it["settings"]["model"]
        tops = dense["top1"], it["sparse"]["top1"]
        measured.append(_Accuracy("quickstart", where, dense["images"], *tops, model, it))
    return measured


def _speeds(found: Findings) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Measurements, what they were made on, and the command that made them: the benchmark, or else
    the sweep, or else the quickstart."""
    if found.benchmark is not None:
        return found.benchmark["measurements"], found.benchmark["environment"], "benchmark"
    if found.sweep is not None:
        own = next(point for point in found.sweep["points"] if found.is_own(point))
        if own["speed"]:
            given = found.sweep["precision"]
            setting = {"engine": "eager", "precision": _PRECISIONS.get(given, given)}
            return [setting | own["speed"]], found.sweep["environment"], "sweep"
    if found.quickstart is not None:
        setting = {"engine": "eager", "precision": "float32"}
        speeds = [setting | row for row in found.quickstart["speed"]]
        return speeds, found.quickstart["environment"], "quickstart"
    return [], {}, ""


def _class_maps(maps: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Classes and how often each patch is left of them in the end: those that differ most from
    the whole, in their own order."""
    last = maps["keep_by_class"][:, -1]
    there = np.flatnonzero(maps["images_by_class"])
    apart = np.abs(last[there] - maps["keep"][-1]).mean(axis=(1, 2))
    chosen = sorted(there[np.argsort(-apart, kind="stable")[:_ROWS]])
    return [(str(maps["class_names"][index]), last[index]) for index in chosen]


@dataclass(frozen=True)
class _Example:
    """An image, and the class that it is of."""

    explanation: Explanation
    target: int
    name: str


@dataclass(frozen=True)
class _Examples:
    """What models answer on images: dense and pruned alike right, alike wrong, or apart."""

    where: str
    right: list[_Example]
    wrong: list[_Example]
    apart: list[_Example]


def _look_at(
    found: Findings,
    data: str,
    data_dir: str | None,
    split: str,
    device: torch.device,
    quiet: bool,
) -> _Examples:
    """Run the model on images from all over a split. Errors as for `report`."""
    accelerator = start_processes("float32")
    sparse = found.sparse.to(device)
    images, loader = open_images(
        sparse, found.model, accelerator, data, data_dir, split, _BATCH, 0, None, True
    )
    names = images.class_names or class_names(sparse)
    read: Iterator[tuple[torch.Tensor, int]]
    what = "looking at examples"
    if isinstance(images.dataset, IterableDataset):  # from all over cannot be had of a stream
        read = track(islice(_each(loader), _LOOKED_AT), what, quiet)
    else:
        chosen = _spread(range(len(images.dataset)), _LOOKED_AT)
        read = (images.dataset[index] for index in track(chosen, what, quiet))
    examples = _Examples(f"{data}, {split}", [], [], [])
    while batch := list(islice(read, _BATCH)):
        there = [(image, int(target)) for image, target in batch if int(target) >= 0]
        if not there:
            continue
        inputs = torch.stack([image for image, _ in there])
        for (_, target), seen in zip(there, explain(sparse, inputs), strict=True):
            dense, pruned = seen.dense[0].index, seen.pruned[0].index
            alike = examples.right if pruned == target else examples.wrong
            kind = alike if dense == pruned else examples.apart
            kind.append(_Example(seen, target, names[target]))
    if not (examples.right or examples.wrong or examples.apart):
        raise ValueError(f"data must have readable images, got none in {data} ({split})")
    return examples


def _each(loader: Any) -> Iterator[tuple[torch.Tensor, int]]:
    for inputs, targets in loader:
        yield from zip(inputs.cpu(), targets.tolist(), strict=True)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """So many of them, from all over."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _strip(explanation: Explanation) -> Image.Image:
    """The input and what each stage keeps, side by side; between them the page shows."""
    panels = explanation.panels(_SIDE)
    width, height = panels[0].size
    gap = max(2, width // 14)
    strip = Image.new("RGBA", (len(panels) * (width + gap) - gap, height), (0, 0, 0, 0))
    for index, panel in enumerate(panels):
        strip.paste(panel, (index * (width + gap), 0))
    return strip


def _heat(rates: np.ndarray) -> Image.Image:
    """Numbers from 0 to 1, [h, w], each as a pixel."""
    colours = heat_colours(rates.clip(0, 1).reshape(-1))
    return Image.fromarray(colours.reshape(*rates.shape, 3))


def _data_uri(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=True)
    return _uri("image/png", content.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
