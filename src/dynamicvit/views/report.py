"""report(): a model, its training and what was measured of it, as one page, without a network."""

from __future__ import annotations

import base64
import importlib.util
import io
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
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
from dynamicvit.io.images import pick_evenly
from dynamicvit.io.predictions import class_names
from dynamicvit.views.charts import Chart, draw_schedule, draw_search, draw_speed, draw_training
from dynamicvit.views.drawing import heat_colours, stack
from dynamicvit.views.explain import explain
from dynamicvit.views.plot import METRICS
from dynamicvit.views.result_files import USUAL, Findings, arrows, gather

_PAGE = "report.html"  # what is written, and its template
_LOOKED_AT = 256  # images, evenly spread over the split, from which examples are taken
_BATCH = 32
_ROWS = 8  # of classes and of confusions
_SIDE = 112  # approximate pixels of an example's shorter side
_Example = tuple[Any, int, str]  # Explanation, class index and class name


def report(
    model: str,
    /,
    output: str | None = None,
    benchmark: str | None = None,
    compare: str | None = None,
    search: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    split: str = "val",
    keep_ratio: float | None = None,
    per_image: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> Path:
    """Show a model, its training and its measured results as one HTML file.

    The file opens without a network. The results are those that other commands wrote. The page
    names what is missing, and the command that adds it. Needs the extra "plot".

    Args:
        model: folder of a run (its best model is shown) or of a quickstart; or model folder or hub
            id of a sparse model.
        output: HTML file to write; by default report.html in the folder, or here for a hub id.
        benchmark: JSON file that `dynamicvit benchmark` wrote; by default benchmark.json in the
            folder of the run or model, if it is there and of this model.
        compare: folder that `dynamicvit compare` wrote; by default compare, likewise.
        search: JSON file that `dynamicvit search` wrote; by default search.json, likewise.
        data: image folder with split sub-folders, or a timm data set name such as torch/cifar10:
            run the model on some of its images, and show examples.
        data_dir: where a named data set lies.
        split: which split to take examples from.
        keep_ratio: share of tokens that each stage keeps; by default the model's own.
        per_image: each image its own budget; the mean is that of `keep_ratio`. `dynamicvit
            calibrate` prepares a model for it.
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
    found = gather(model, benchmark, compare, search, keep_ratio, per_image)
    target = Path(output) if output is not None else (found.home or Path()) / _PAGE
    check_file("output", target)
    examples = None if data is None else _look_at(found, data, data_dir, split, where, quiet)
    missing = _missing(found, data is None)
    curves = draw_training(found.run) if found.run and "train" not in missing else []
    try:
        page = _render(found, missing, examples, curves)
    except Exception as error:  # foreign content makes readers raise nearly anything
        if not found.sources:
            raise
        files = ", ".join(file for file, _ in found.sources)
        raise ValueError(f"one of {files} is not what its command writes: {error!r}") from error
    write_text(target, page)
    console = Console(quiet=quiet)
    for gap in missing.values():
        console.print(f"missing: {gap['what']}", markup=False, soft_wrap=True)
    console.print(f"the report is in {plain(target)}", markup=False, soft_wrap=True)
    return target


def _missing(found: Findings, no_images: bool) -> dict[str, dict[str, Any]]:
    """For each command whose result is missing: what it is, why, and the command lines that make
    and show it."""
    again = ["report", found.name]
    data = ["--data", str(found.config.get("data") or "path/to/images")]
    images = list(data)  # to compare on, best with the run's teacher
    for option, value in (("--data_dir", found.config.get("data_dir")), ("--dense", found.teacher)):
        if value:
            images += [option, str(value)]
    missing = {}
    for command, what, options in (
        ("compare", "accuracy beside the dense model, keep maps, answers that change", images),
        ("benchmark", "speed in every engine of the machine", []),
        ("search", "accuracy, cost and speed of the same weights at other budgets", images),
    ):
        if getattr(found, command) is None:
            refused = found.refused.get(command)
            where = str((found.home or Path()) / USUAL[command])
            named = [] if found.home else [f"--{command}", where]
            missing[command] = {
                "what": f"{what} (dynamicvit {command})",
                "why": f"Left out: {refused}." if refused else f"Not measured: {what}.",
                "calls": [
                    [command, found.model, *options, "--output", where],
                    [*again, *named],
                ],
            }
    if no_images:
        missing["examples"] = {
            "what": "example images (--data)",
            "why": "No images were given.",
            "calls": [[*again, *data]],
        }
    if found.run is None or not (found.run / METRICS).is_file():
        options = ["--data", "path/to/images", "--model", "deit_small_patch16_224"]
        missing["train"] = {
            "what": "training curves (dynamicvit train)",
            "why": "The model is not in the folder of a training run, which holds the curves.",
            "calls": [["train", *options, "--output", "run"], ["report", "run"]],
        }
    return missing


def _render(
    found: Findings,
    missing: dict[str, dict[str, Any]],
    examples: dict[str, Any] | None,
    curves: list[tuple[str, Chart]],
) -> str:
    """The page. The template says where everything stands, and in which words."""
    sparse, size = found.sparse, input_size(found.sparse)
    backbone: Any = sparse.backbone
    speed = _speed(found)
    ideal = found.gmacs[0] / found.gmacs[1]
    return _template().render(
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
        levels=_levels(found),
        accuracies=_accuracies(found),
        speed=speed,
        speed_chart=draw_speed(speed["measurements"], ideal) if speed else None,
        search_chart=draw_search(found.search) if found.search is not None else None,
        scale=np.linspace(0, 1, 256)[None].repeat(16, axis=0),
        class_maps=_class_maps(found.maps) if found.maps is not None else [],
        curves=curves,
        examples=examples,
        rows=_ROWS,
    )


def _template() -> Template:
    # Class names, paths and settings come from others: all of them are escaped.
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
        "strip": lambda seen: stack(seen.panels(_SIDE), _SIDE // 14, transparent=True),
        "heat": lambda rates: Image.fromarray(heat_colours(rates.clip(0, 1))),
        "png_uri": lambda image: _uri("image/png", _png(image)),
        "svg_uri": lambda svg: _uri("image/svg+xml", svg),
        "spread": pick_evenly,
    }
    return environment.get_template(_PAGE)


def _levels(found: Findings) -> list[tuple[list[int], float]]:
    """Of a model with a budget for each image: tokens and share of images, for each level."""
    levels, calibration = found.sparse.levels, found.sparse.calibration
    if levels is None or calibration is None:
        return []
    start = found.tokens[0]
    counts = [[start, *schedule.counts(start)] for schedule in levels.schedules]
    return list(zip(counts, calibration.shares_at(levels), strict=True))


def _accuracies(found: Findings) -> list[dict[str, Any]]:
    """What was measured, the surest first. `model` is the dense one; None means the sparse model's
    own backbone."""
    measured = []
    if it := found.compare:
        where, tops = f"{it['data']}, {it['split']}", (it["dense_top1"], it["sparse_top1"])
        measured.append(("compare", where, it["images"], *tops, it["dense"], it))
    if it := found.search:
        where, dense = f"{it['data']}, {it['split']}", it["dense"]
        own = _own_point(found)
        tops = (dense["top1"], own["top1"])
        measured.append(("search", where, it["images"], *tops, dense["model"], own["change"]))
    if it := found.quickstart:
        where, dense, model = it["settings"]["data"], it["dense"], it["settings"]["model"]
        tops = dense["top1"], it["sparse"]["top1"]
        measured.append(("quickstart", where, dense["images"], *tops, model, it))
    names = ("by", "of", "images", "dense", "pruned", "model", "change")
    return [dict(zip(names, row, strict=True)) for row in measured]


def _speed(found: Findings) -> dict[str, Any]:
    """Measurements, the machine, and the command that measured: the benchmark, else the search,
    else the quickstart."""
    own = {} if found.search is None else _own_point(found)
    if found.benchmark is not None:
        by, result, measurements = "benchmark", found.benchmark, found.benchmark["measurements"]
    elif found.search is not None and own["speed"]:
        setting = {key: found.search[key] for key in ("engine", "precision")}
        by, result, measurements = "search", found.search, [setting | own["speed"]]
    elif found.quickstart is not None:
        setting = {"engine": "eager", "precision": "float32"}
        by, result = "quickstart", found.quickstart
        measurements = [setting | row for row in result["speed"]]
    else:
        return {}
    return {"by": by, "machine": result["environment"], "measurements": measurements}


def _own_point(found: Findings) -> dict[str, Any]:
    """The search's point with the model's own schedule."""
    points = (found.search or {})["points"]
    return next(point for point in points if found.is_own(point))


def _class_maps(maps: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Classes and how often the last stage keeps each patch of theirs: the classes that differ most
    from the mean over all images, in their own order."""
    last = maps["keep_by_class"][:, -1]
    there = np.flatnonzero(maps["images_by_class"])
    apart = np.abs(last[there] - maps["keep"][-1]).mean(axis=(1, 2))
    chosen = sorted(there[np.argsort(-apart, kind="stable")[:_ROWS]])
    return [(str(maps["class_names"][index]), last[index]) for index in chosen]


def _look_at(
    found: Findings,
    data: str,
    data_dir: str | None,
    split: str,
    device: torch.device,
    quiet: bool,
) -> dict[str, Any]:
    """Run the model on images from all over a split. Errors as for `report`.

    Returns:
        `where` the images are from, and three lists of examples: `right`, dense and pruned alike;
        `wrong`, alike; and `apart`, where they give different classes.
    """
    sparse = found.sparse.to(device)
    images, _ = open_images(
        sparse,
        found.model,
        start_processes("float32"),
        data,
        data_dir,
        split,
        batch_size=_BATCH,
        workers=0,
        crop_pct=None,
        skip_unreadable=True,
    )
    names = images.class_names or class_names(sparse)
    read: Iterator[tuple[torch.Tensor, int]]
    what = "looking at examples"
    if isinstance(images.dataset, IterableDataset):  # a stream: its first images
        read = track(islice(images.dataset, _LOOKED_AT), what, quiet, "images")
    else:
        chosen = pick_evenly(range(len(images.dataset)), _LOOKED_AT)
        read = (images.dataset[index] for index in track(chosen, what, quiet, "images"))
    examples: dict[str, list[_Example]] = {"right": [], "wrong": [], "apart": []}
    while batch := list(islice(read, _BATCH)):
        there = [(image, int(target)) for image, target in batch if int(target) >= 0]
        if not there:
            continue
        inputs = torch.stack([image for image, _ in there])
        for (_, target), seen in zip(there, explain(sparse, inputs), strict=True):
            dense, pruned = seen.dense[0].index, seen.pruned[0].index
            kind = "apart" if dense != pruned else "right" if pruned == target else "wrong"
            examples[kind].append((seen, target, names[target]))
    if not any(examples.values()):
        raise ValueError(f"data must have readable images, got none in {data} ({split})")
    return {"where": f"{data}, {split}", **examples}


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=True)
    return content.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
