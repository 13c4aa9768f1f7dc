"""Wall-clock speed of a pruned model against its dense one, measured fairly."""

from __future__ import annotations

import importlib.util
import io
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
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
from dynamicvit.deploy.part_times import part_times
from dynamicvit.evaluation.console import make_table, plain, show_steps
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.launch import find_device
from dynamicvit.evaluation.setup import input_size, token_counts
from dynamicvit.evaluation.timing import Engine, compare_times, interleave, medians
from dynamicvit.io.files import check_file, write_bytes, write_text
from dynamicvit.io.load import at_budget, check_backbone, load_model


def benchmark(
    model: str,
    /,
    keep_ratio: float | None = None,
    align: int | None = None,
    engines: list[str] | None = None,
    precisions: list[str] | None = None,
    batch_sizes: list[int] | None = None,
    pretrained: bool = True,
    weights: str | None = None,
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
        keep_ratio: share of tokens that each stage keeps; by default a sparse model's own, and 0.7
            for a dense one.
        align: for a dense model, round kept counts to multiples of this.
        engines: eager; packed (eager, with weights packed once for the kernels that read them);
            compile (torch.compile, on a CPU frozen: weights are constants, packed once too); onnx
            (ONNX Runtime); openvino. By default all that are installed; a GPU has eager and
            compile alone.
        precisions: float32, bfloat16, float16; by default the first two, where the engine has them.
        batch_sizes: images a call; by default 1, 8 and 32.
        pretrained: for a timm name, load timm's weights (they do not change the time).
        weights: for a timm name: file with a state dict of your own (safetensors or torch, also of
            Lightning) to load instead.
        img_size: for a timm name, input height and width in pixels, if other than the model's.
        device: cpu, cuda or cuda:NUMBER; by default a GPU if there is one.
        seconds: spent on each measurement, at least; at least 7 rounds are run.
        output: JSON file to write.
        plot: PNG or SVG file to write, speed-up against batch size (extra "plot").
        quiet: print nothing, neither tables nor progress.

    Returns:
        What the JSON file holds. Each of its measurements has engine, precision and batch_size;
        images a second of dense and sparse, and milliseconds a call (dense_ms, sparse_ms: median
        and 95th percentile); speed_up, the median over rounds of dense time / pruned time, and
        spread, the lower and upper quartile of those ratios; efficiency, the speed-up divided by
        the ratio of GMACs; dense_attention and sparse_attention, "fused" or "plain", whichever was
        found faster, None where the engine decides; and peak_mb, the most memory that both took
        (10⁶ bytes). On a CPU that is of a process with nothing but the model
        (`dynamicvit.deploy.memory`), at the largest batch size alone; on a GPU weights, images and
        what a call takes; None where it was not measured.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an option or the model.
    """
    sizes = [1, 8, 32] if batch_sizes is None else batch_sizes
    if not sizes or any(size < 1 for size in sizes):
        raise ValueError(f"batch_sizes must be 1 or more, got {batch_sizes}")
    if not seconds >= 0:
        raise ValueError(f"seconds must be 0 or more, got {seconds}")
    check_backbone(model)
    chosen = find_device(device)
    pairs = _list_pairs(engines, precisions, chosen.type)
    for name, file in (("output", output), ("plot", plot)):
        if file is not None:
            check_file(name, file)
    if plot is not None and Path(plot).suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"plot must end in .png or .svg, got {plot}")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot needs the extra: pip install 'dynamicvit[plot]'")
    with show_steps(quiet) as report:
        report(f"loading {model}")
        sparse = _load(model, keep_ratio, align, pretrained, weights, img_size).to(chosen)
        with torch.cuda.device(chosen) if chosen.type == "cuda" else nullcontext():
            result = {"model": model, **_run(sparse, pairs, sizes, seconds, report)}
    if output:
        write_text(Path(output), json.dumps(result, indent=2) + "\n")
    if plot:
        _plot(result, Path(plot))
    if not quiet:
        print_benchmark(result)
        for what, path in (("results are", output), ("plot is", plot)):
            if path:
                print(f"the {what} in {plain(path)}")
    return result


def _list_pairs(
    engines: list[str] | None, precisions: list[str] | None, device: str
) -> list[tuple[str, str]]:
    """Engines and precisions to run. A pair that was asked for by name must be there."""
    check_engines(engines, precisions, device)
    every = GPU_ENGINES if device == "cuda" else tuple(filter(installed, ENGINES))
    pairs = [
        (engine, precision)
        for engine in engines or every
        for precision in precisions or DEFAULT_PRECISIONS
    ]
    if not (engines and precisions):
        return [pair for pair in pairs if available(*pair, device)]
    for pair in pairs:
        check_engine(*pair, device)
    return pairs


def _load(
    name: str,
    keep_ratio: float | None,
    align: int | None,
    pretrained: bool,
    weights: str | None,
    img_size: int | None,
) -> SparseViT:
    """A sparse model. Arguments and errors as for `benchmark`."""
    if keep_ratio is not None:
        KeepSchedule.from_keep_ratio(keep_ratio, depth=12)  # refused here, not after a download
    if img_size is not None and not timm.is_model(name):
        raise ValueError(f"img_size is for timm's names, got it with {name}")
    size = {} if img_size is None else {"img_size": img_size}
    model = load_model(name, pretrained, weights, **size)
    if img_size is not None and token_counts(model)[0] < 1:
        raise ValueError(f"img_size must be at least the size of a patch, got {img_size}")
    if not isinstance(model, SparseViT):
        model = sparsify(model, keep_ratio=0.7 if keep_ratio is None else keep_ratio, align=align)
    elif align is not None:
        raise ValueError(f"align is for dense models, got {align} with the sparse model {name}")
    else:
        model = at_budget(model, name, keep_ratio)
        if model.levels is not None:  # speed is that of the mean budget
            model = model.at(schedule=model.schedule)
    return model.eval()


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
    models: list[nn.Module] = [sparse.backbone, sparse]
    dense_gmacs, gmacs = (count_gmacs(model, size) for model in models)
    ideal = dense_gmacs / gmacs
    measurements: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for engine, precision in pairs:
        name = f"{engine}, {precision}:"
        report(name, "building dense and pruned")
        try:
            forms = [_forms(model, engine, precision) for model in models]
            for batch_size in batch_sizes:
                report(f"{name} batch size {batch_size}")
                batches = random_batches(batch_size, size, precision, device)
                found = _measure(models, forms, precision, batches, seconds)
                if device.type == "cpu" and batch_size == max(batch_sizes):
                    report(name, "measuring memory")
                    found["peak_mb"] = _peaks(models, engine, precision, batches[0].shape, found)
                found["efficiency"] = found["speed_up"] / ideal
                measurements.append({"engine": engine, "precision": precision, **found})
        except Exception as error:  # each engine has its own; the others' figures stay
            failed.append({"engine": engine, "precision": precision, "reason": first_line(error)})
    if not measurements:
        raise ValueError("no engine runs the model here: {reason}".format(**failed[0]))
    report("timing the parts of the pruned model")
    parts = part_times(sparse, torch.randn(max(batch_sizes), *size, device=device))
    return {
        "device": str(device),
        "input_size": size,
        "tokens": token_counts(sparse),
        "gmacs": {"dense": dense_gmacs, "sparse": gmacs},
        "ideal_speed_up": ideal,
        "measurements": measurements,
        "failed": failed,
        "stages_ms": parts,
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


def _forms(model: nn.Module, engine: str, precision: str) -> dict[str | None, Engine]:
    """A model in an engine, by kind of attention; None where the engine decides."""
    if engine not in TORCH_ENGINES:
        return {None: build(model, engine, precision)}
    return {
        name: build(model, engine, precision, fused_attention=name == "fused")
        for name in ("fused", "plain")
    }


def _measure(
    models: list[nn.Module],
    forms: list[dict[str | None, Engine]],
    precision: str,
    batches: list[Tensor],
    seconds: float,
) -> dict[str, Any]:
    """Time the faster form of dense against that of pruned, in turn."""
    images = batches[0]
    attention: list[str | None] = []
    peaks: list[float] = []
    for model, calls in zip(models, forms, strict=True):
        bytes_taken = {}
        if images.is_cuda:  # asked before the engine runs images of this shape
            bytes_taken = {name: peak_bytes(call, images) for name, call in calls.items()}
        fastest = next(iter(calls))
        if len(calls) > 1:
            took = medians(interleave(list(calls.values()), [images], seconds=0))
            fastest = list(calls)[took.index(min(took))]
        attention.append(fastest)
        if bytes_taken:
            peaks.append((bytes_taken[fastest] + weight_bytes(model, precision)) / 1e6)
    chosen = [calls[name] for calls, name in zip(forms, attention, strict=True)]
    times = interleave(chosen, batches, seconds)
    speed_up, spread = compare_times(times)
    milliseconds = [
        (1e3 * median, 1e3 * statistics.quantiles(took, n=20, method="inclusive")[-1])
        for median, took in zip(medians(times), zip(*times, strict=True), strict=True)
    ]
    return {
        "batch_size": len(images),
        "dense": 1e3 * len(images) / milliseconds[0][0],
        "sparse": 1e3 * len(images) / milliseconds[1][0],
        "speed_up": speed_up,
        "spread": spread,
        "dense_ms": milliseconds[0],
        "sparse_ms": milliseconds[1],
        "dense_attention": attention[0],
        "sparse_attention": attention[1],
        "peak_mb": peaks or None,
    }


def _peaks(
    models: list[nn.Module],
    engine: str,
    precision: str,
    shape: tuple[int, ...],
    found: dict[str, Any],
) -> list[float | None] | None:
    """Peak memory of dense and pruned, each with the attention that was faster for it."""
    attention = found["dense_attention"], found["sparse_attention"]
    peaks = [
        peak_memory(model, engine, precision, tuple(shape), kind != "plain")
        for model, kind in zip(models, attention, strict=True)
    ]
    return None if None in peaks else peaks


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


def print_benchmark(result: dict[str, Any]) -> None:
    """Print what `benchmark` returns. The JSON file has more."""
    measurements = result["measurements"]
    first = "engine, precision"
    speeds = make_table(first, "batch", "dense", "pruned", "speed-up", "efficiency")
    times = make_table(first, "batch", "dense ms", "pruned ms", "peak MB")
    parts = make_table("part of the pruned model", "ms")
    for item in measurements:
        form = f"{item['engine']}, {item['precision']}", str(item["batch_size"])
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
        peaks = item["peak_mb"] or ()
        times.add_row(*form, *calls, " → ".join(f"{peak:.0f}" for peak in peaks))
    for name, spent in result["stages_ms"].items():
        parts.add_row(name, _number(spent))
    batch = max(item["batch_size"] for item in measurements)
    # A table that is cut says nothing: a narrower terminal wraps its lines.
    console = Console(width=max(80, Console().width))
    for caption, table in (
        ("images a second; speed-up: median of ratios (quartiles)", speeds),
        ("milliseconds a call: median (95th percentile); memory: dense → pruned", times),
        (f"eager, float32, batch {batch}", parts),
    ):
        console.print(caption)
        console.print(table)
    gmacs = "{dense:.4g} → {sparse:.4g} GMACs".format(**result["gmacs"])
    console.print(
        f"{gmacs}, so the ideal speed-up is {result['ideal_speed_up']:.2f}×; efficiency is the "
        "share of it that is reached"
    )
    slower = sum(item["speed_up"] < 1 for item in measurements)
    if slower:
        console.print(f"in {slower} of {len(measurements)} rows the dense model is faster")
    for pair in result["failed"]:
        console.print("{engine}, {precision} failed: {reason}".format(**pair), markup=False)


def _number(value: float) -> str:
    """Three digits, and whole numbers in full."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


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
    figure.savefig(buffer, format=path.suffix.lower().removeprefix("."), dpi=150)
    write_bytes(path, buffer.getvalue())
