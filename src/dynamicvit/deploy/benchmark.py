"""Wall-clock speed of a pruned model against its dense one, measured fairly."""

from __future__ import annotations

import importlib.util
import io
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.deploy.engines import (
    DEFAULT_PRECISIONS,
    ENGINES,
    GPU_ENGINES,
    PRECISIONS,
    TORCH_ENGINES,
    available,
    build,
    check_engine,
    check_engines,
    first_line,
    installed,
)
from dynamicvit.deploy.memory import peak_memory
from dynamicvit.evaluation.console import show_steps
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.launch import find_device
from dynamicvit.evaluation.setup import input_size, token_counts
from dynamicvit.evaluation.timing import Engine, compare_times, interleave, medians, time_call
from dynamicvit.io.files import check_file, write_bytes, write_text
from dynamicvit.io.load import load_model


@dataclass(frozen=True)
class Measurement:
    """Dense against pruned in one engine and precision, at one batch size.

    Attributes:
        engine, precision, batch_size: what was run.
        dense, sparse: images a second, medians over the rounds.
        speed_up: median over rounds of dense time / pruned time.
        spread: the lower and upper quartile of those ratios.
        efficiency: speed-up divided by the ratio of GMACs; 1 where time follows operations.
        dense_ms, sparse_ms: milliseconds a call, median and 95th percentile.
        dense_attention, sparse_attention: "fused" or "plain", whichever was found faster for each;
            None where the engine decides.
        peak_mb: most memory that dense and pruned took (10⁶ bytes). On a CPU that of a process with
            nothing but the model (`dynamicvit.deploy.memory`), at the largest batch size alone; on
            a GPU weights, images and what a call takes. None where it was not measured.
    """

    engine: str
    precision: str
    batch_size: int
    dense: float
    sparse: float
    speed_up: float
    spread: tuple[float, float]
    efficiency: float
    dense_ms: tuple[float, float]
    sparse_ms: tuple[float, float]
    dense_attention: str | None
    sparse_attention: str | None
    peak_mb: tuple[float, float] | None


def benchmark(
    model: str,
    /,
    keep_ratio: float | None = None,
    align: int | None = None,
    engines: list[str] | None = None,
    precisions: list[str] | None = None,
    batch_sizes: list[int] | None = None,
    pretrained: bool = True,
    img_size: int | None = None,
    device: str | None = None,
    seconds: float = 4.0,
    output: str | None = None,
    plot: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Time a pruned model against its dense one on this machine: a table, JSON and a plot.

    Both run in the same engine and precision, in turn, on the same random images; the dense model
    has fused attention or not, whichever is faster.

    Args:
        model: model folder, hub id or timm name; a dense one is made sparse, its scorers untrained
            (they take as long as trained ones).
        keep_ratio: for a dense model; by default 0.7.
        align: for a dense model, round kept counts to multiples of this.
        engines: eager; packed (eager, with weights packed once for the kernels that read them);
            compile (torch.compile, on a CPU frozen: weights are constants, packed once too); onnx
            (ONNX Runtime); openvino. By default all that are installed; a GPU has eager and
            compile alone.
        precisions: float32, bfloat16, float16; by default the first two, where the engine has them.
        batch_sizes: images a call; by default 1, 8 and 32.
        pretrained: for a timm name, load timm's weights (they do not change the time).
        img_size: for a timm name, input height and width in pixels, if other than the model's.
        device: cpu, cuda or cuda:NUMBER; by default a GPU if there is one.
        seconds: spent on each measurement, at least; at least 7 rounds are run.
        output: JSON file to write.
        plot: PNG or SVG file to write, speed-up against batch size (extra "plot").
        quiet: print nothing, neither tables nor progress.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an option or the model.
    """
    sizes = [1, 8, 32] if batch_sizes is None else batch_sizes
    if not sizes or any(size < 1 for size in sizes):
        raise ValueError(f"batch_sizes must be 1 or more, got {batch_sizes}")
    if not seconds >= 0:
        raise ValueError(f"seconds must be 0 or more, got {seconds}")
    place = find_device(device)
    gpu = place.type == "cuda"
    check_engines(engines, precisions, place.type)
    pairs = [
        (engine, precision)
        for engine in engines or (GPU_ENGINES if gpu else filter(installed, ENGINES))
        for precision in precisions or DEFAULT_PRECISIONS
        # What was asked for by name and cannot be had is an error, below.
        if (engines and precisions) or available(engine, precision, place.type)
    ]
    for engine, precision in pairs:
        check_engine(engine, precision, place.type)
    for name, file in (("output", output), ("plot", plot)):
        if file is not None:
            check_file(name, file)
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot needs the extra: pip install 'dynamicvit[plot]'")
    if keep_ratio is not None:
        KeepSchedule.from_keep_ratio(keep_ratio, depth=12)  # refused here, not after a download
    options: dict[str, Any] = {} if pretrained else {"pretrained": False}
    if img_size is not None:
        if not timm.is_model(model):
            raise ValueError(f"img_size is for timm's names, got it with {model}")
        options["img_size"] = img_size
    sparse = load_model(model, **options)
    if not isinstance(sparse, SparseViT):
        sparse = sparsify(sparse, keep_ratio=0.7 if keep_ratio is None else keep_ratio, align=align)
    elif keep_ratio is not None or align is not None:
        raise ValueError(
            f"keep_ratio and align are for dense models, got {keep_ratio} and {align} "
            f"with the sparse model {model}"
        )
    with torch.cuda.device(place) if gpu else nullcontext(), show_steps(quiet) as report:
        result = {
            "model": model,
            **_run(sparse.eval().to(place), pairs, sizes, seconds, report),
        }
    if not quiet:
        print_benchmark(result)
    if output:
        write_text(Path(output), json.dumps(result, indent=2) + "\n")
    if plot:
        _plot(result, Path(plot))
    return result


def _run(
    sparse: SparseViT,
    pairs: list[tuple[str, str]],
    batch_sizes: list[int],
    seconds: float,
    report: Callable[..., None],
) -> dict[str, Any]:
    """What `benchmark` returns, but for the model's name; on the model's device."""
    device = next(sparse.parameters()).device
    size = input_size(sparse)
    gmacs = {
        "dense": count_gmacs(sparse.backbone, size),
        "sparse": count_gmacs(sparse, size),
    }
    ideal = gmacs["dense"] / gmacs["sparse"]
    measurements: list[Measurement] = []
    failed: list[dict[str, str]] = []
    models = [sparse.backbone, sparse]
    for engine, precision in pairs:
        name = f"{engine}, {precision}:"
        report(name, "building dense and pruned")
        try:
            candidates = [_candidates(model, engine, precision) for model in models]
            weights = [weight_bytes(model, precision) for model in models]
            for batch_size in batch_sizes:
                report(f"{name} batch size {batch_size}")
                batches = random_batches(batch_size, size, precision, device)
                found = _measure(candidates, weights, engine, precision, batches, seconds, ideal)
                if device.type == "cpu" and batch_size == max(batch_sizes):
                    report(name, "measuring memory")
                    found = replace(found, peak_mb=_peaks(sparse, found, tuple(batches[0].shape)))
                measurements.append(found)
        except Exception as error:  # each engine has its own; the others' figures stay
            failed.append({"engine": engine, "precision": precision, "reason": first_line(error)})
    if not measurements:
        raise ValueError("no engine runs the model here: {reason}".format(**failed[0]))
    return {
        "device": str(device),
        "input_size": size,
        "tokens": token_counts(sparse),
        "gmacs": gmacs,
        "ideal_speed_up": ideal,
        "measurements": [asdict(item) for item in measurements],
        "failed": failed,
        "stages_ms": stage_times(sparse, torch.randn(max(batch_sizes), *size, device=device)),
        "environment": environment(),
    }


def random_batches(
    batch_size: int, size: tuple[int, int, int], precision: str, device: torch.device
) -> list[Tensor]:
    """Random images to time calls on, [B, C, H, W] each.

    On a GPU several batches, in the precision of the computation; on a CPU one, in float32.
    """
    if device.type == "cpu":
        return [torch.randn(batch_size, *size)]
    dtype = PRECISIONS[precision]
    return [torch.randn(batch_size, *size, device=device, dtype=dtype) for _ in range(4)]


def _peaks(
    sparse: SparseViT, found: Measurement, shape: tuple[int, ...]
) -> tuple[float, float] | None:
    """Of dense and pruned, with the attention that was found faster for each."""
    models = ((sparse.backbone, found.dense_attention), (sparse, found.sparse_attention))
    dense, pruned = (
        peak_memory(model, found.engine, found.precision, shape, attention != "plain")
        for model, attention in models
    )
    return None if dense is None or pruned is None else (dense, pruned)


def _candidates(model: nn.Module, engine: str, precision: str) -> dict[str | None, Engine]:
    if engine not in TORCH_ENGINES:
        return {None: build(model, engine, precision)}
    return {
        name: build(model, engine, precision, fused_attention=name == "fused")
        for name in ("fused", "plain")
    }


def _measure(
    candidates: list[dict[str | None, Engine]],
    weights: list[int],
    engine: str,
    precision: str,
    batches: list[Tensor],
    seconds: float,
    ideal: float,
) -> Measurement:
    """`candidates` and `weights` (bytes) of dense and pruned."""
    images = batches[0]
    peaks = None
    if images.is_cuda:
        peaks = [
            {name: size + peak_bytes(call, images) for name, call in options.items()}
            for options, size in zip(candidates, weights, strict=True)
        ]
    chosen = [_fastest(options, images) for options in candidates]
    peak_mb = None
    if peaks is not None:
        peak_mb = (peaks[0][chosen[0][0]] / 1e6, peaks[1][chosen[1][0]] / 1e6)
    times = interleave([call for _, call in chosen], batches, seconds)
    speed_up, spread = compare_times(times)
    dense_ms, sparse_ms = (
        (
            1e3 * statistics.median(column),
            1e3 * statistics.quantiles(column, n=20, method="inclusive")[-1],
        )
        for column in zip(*times, strict=True)
    )
    return Measurement(
        engine=engine,
        precision=precision,
        batch_size=len(images),
        dense=1e3 * len(images) / dense_ms[0],
        sparse=1e3 * len(images) / sparse_ms[0],
        speed_up=speed_up,
        spread=spread,
        efficiency=speed_up / ideal,
        dense_ms=dense_ms,
        sparse_ms=sparse_ms,
        dense_attention=chosen[0][0],
        sparse_attention=chosen[1][0],
        peak_mb=peak_mb,
    )


def weight_bytes(model: nn.Module, precision: str) -> int:
    """Bytes of a model's parameters and buffers in a precision."""
    count = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    return count * PRECISIONS[precision].itemsize


def peak_bytes(call: Engine, images: Tensor) -> int:
    """Most bytes of GPU memory that a call takes, its images included, beside what lies there.

    To be asked before the engine runs images of this shape: a compiled model allocates in its first
    two calls (it compiles, and records a CUDA graph), and from then on only replays.
    """
    call(images)
    torch.cuda.synchronize(images.device)
    before = torch.cuda.memory_allocated(images.device)
    torch.cuda.reset_peak_memory_stats(images.device)
    call(images)
    torch.cuda.synchronize(images.device)
    return torch.cuda.max_memory_allocated(images.device) - before + images.nbytes


def _fastest(options: dict[str | None, Engine], images: Tensor) -> tuple[str | None, Engine]:
    """Of several forms of a model the one with the lowest median of a few calls."""
    names, calls = list(options), list(options.values())
    took = medians(interleave(calls, [images], seconds=0)) if len(calls) > 1 else [0.0]
    best = took.index(min(took))
    return names[best], calls[best]


@torch.inference_mode()
def stage_times(model: SparseViT, images: Tensor, rounds: int = 5) -> dict[str, float]:
    """Where time goes, eager and in float32: milliseconds of the embedding, of each stage's scorer
    and blocks, and of norm and head; medians over rounds. The rest is selection and gathering."""
    fused = model.fuse()
    backbone = fused.backbone
    edges = (0, *fused.schedule.blocks, len(backbone.blocks))
    parts: dict[str, list[nn.Module]] = {"embed": [backbone.patch_embed]}
    for stage, (start, end) in enumerate(pairwise(edges)):
        if stage:
            parts[f"scorer {stage}"] = [fused.scorers[stage - 1]]
        parts[f"blocks {start}–{end - 1}"] = list(backbone.blocks[start:end])
    parts["norm and head"] = [backbone.norm, backbone.head]
    spent: dict[str, float] = {}
    started: list[float] = []

    def before(*_: Any) -> None:
        _wait(images.device)
        started.append(time.perf_counter())

    totals: dict[str, list[float]] = {name: [] for name in (*parts, "other")}
    for name, modules in parts.items():

        def after(*_: Any, name: str = name) -> None:
            _wait(images.device)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started.pop()

        for module in modules:
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    fused(images)
    for _ in range(rounds):
        spent.clear()
        whole = time_call(fused, images)
        for name in parts:
            totals[name].append(spent.get(name, 0.0))
        totals["other"].append(whole - sum(spent.values()))
    return {name: 1e3 * statistics.median(values) for name, values in totals.items()}


def print_benchmark(result: dict[str, Any]) -> None:
    """Print what `benchmark` returns. The JSON file has more."""
    speeds = _table("engine", "precision", "batch", "dense", "pruned", "speed-up", "efficiency")
    times = _table("engine", "precision", "batch", "dense ms", "pruned ms", "peak MB")
    for item in result["measurements"]:
        form = item["engine"], item["precision"], str(item["batch_size"])
        low, high = item["spread"]
        speeds.add_row(
            *form,
            _number(item["dense"]),
            _number(item["sparse"]),
            f"{item['speed_up']:.2f}× ({low:.2f}–{high:.2f})",
            f"{item['efficiency']:.2f}",
        )
        calls = (
            f"{_number(m)} ({_number(late)})" for m, late in (item["dense_ms"], item["sparse_ms"])
        )
        peaks = item["peak_mb"]
        times.add_row(*form, *calls, "→".join(f"{peak:.0f}" for peak in peaks) if peaks else "")
    stages = _table("part of the pruned model", "ms")
    for name, spent in result["stages_ms"].items():
        stages.add_row(name, f"{spent:.1f}")
    speeds.title = "images a second; speed-up: median of ratios (quartiles)"
    times.title = "milliseconds a call: median (95th percentile); memory: dense→pruned"
    stages.title = f"eager, float32, batch {max(m['batch_size'] for m in result['measurements'])}"
    # A table that is cut says nothing: a narrower terminal wraps its lines.
    console = Console(width=max(80, Console().width))
    for table in (speeds, times, stages):
        console.print(table)
        console.print()
    gmacs = "{dense:.2f} → {sparse:.2f} GMACs".format(**result["gmacs"])
    console.print(
        f"{gmacs}, so the ideal speed-up is {result['ideal_speed_up']:.2f}×; efficiency is the "
        "share of it that is reached"
    )
    slower = [item for item in result["measurements"] if item["speed_up"] < 1]
    if slower:
        console.print(
            f"in {len(slower)} of {len(result['measurements'])} rows the dense model is faster"
        )
    for pair in result["failed"]:
        console.print("{engine}, {precision} failed: {reason}".format(**pair), markup=False)


def _table(*titles: str) -> Table:
    """Narrow enough for 80 columns, each cell on one line."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.title_justify, table.title_style = "left", ""
    for title in titles:
        table.add_column(title, no_wrap=True, justify="left" if len(table.columns) < 2 else "right")
    return table


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for item in result["measurements"]:
        key = item["engine"], item["precision"]
        lines.setdefault(key, []).append((item["batch_size"], item["speed_up"]))
    for (engine, precision), points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{engine}, {precision}")
    axes.axhline(result["ideal_speed_up"], color="black", linestyle="--", label="ideal, by GMACs")
    axes.axhline(1.0, color="grey", linewidth=1)
    batches = sorted({item["batch_size"] for item in result["measurements"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="batch size", ylabel="speed-up over dense", title=str(result["model"]))
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix(".") or "png", dpi=150)
    write_bytes(path, buffer.getvalue())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
