"""A budget for each image against fixed counts of the same mean cost, in turn.

    python benchmarks/per_image.py benchmarks/results/per_image.json

A quarter of the images gets each of four levels, the least even case: groups are as small as they
get. Weights are random, which costs the same as trained ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dynamicvit import KeepSchedule, SparseViT, sparsify
from dynamicvit.core.levels import Levels
from dynamicvit.core.paths import Pruned
from dynamicvit.deploy.engines import PRECISIONS, Engine, build
from dynamicvit.deploy.export import export_model
from dynamicvit.deploy.runtime import PerImage
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.launch import find_device
from dynamicvit.evaluation.setup import input_size
from dynamicvit.evaluation.timing import compare_times, interleave, medians
from dynamicvit.io.files import write_text

KEEP_RATIOS = (0.35, 0.5, 0.7, 1.0)
BATCHES = 8  # to rotate among: levels are set on all of their images


@torch.no_grad()
def create(
    name: str, kwargs: dict[str, Any], batches: Sequence[Tensor], precision: str
) -> tuple[SparseViT, SparseViT, float]:
    """Fixed counts and a budget for each image, of one model; and the share of the fixed GMACs that
    the other one takes for these batches.

    Args:
        name, kwargs: of `timm.create_model`.
        batches: images [B, C, H, W], on the device to use.
        precision: a key of PRECISIONS. Levels are decided in it.
    """
    torch.manual_seed(0)
    with batches[0].device:
        model = sparsify(timm.create_model(name, **kwargs)).eval()
        for parameter in model.parameters():  # fresh weights make all images look alike
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = model.to(PRECISIONS[precision])
    first = model.schedule.blocks[0]
    found = []
    for images in batches:
        embedded = model._embed(images.to(PRECISIONS[precision]))
        tokens, _ = model._run_blocks(embedded, Pruned(), (), 0, first)
        scorer: Any = model.scorers[0]
        found.append(scorer.difficulty(scorer(tokens.patches)).float())
    difficulty = torch.cat(found).sort().values
    count, levels = len(difficulty), len(KEEP_RATIOS)
    edges = [count * number // levels for number in range(1, levels)]
    bounds = tuple(float(difficulty[edge - 1 : edge + 1].mean()) for edge in edges)
    schedules: list[KeepSchedule] = [model.schedule.with_keep_ratio(r) for r in KEEP_RATIOS]
    each = model.at(keep_ratio=KEEP_RATIOS[1])
    each.levels = Levels(tuple(schedules), bounds)
    cost = model.budget().cost
    level = each.levels.of(difficulty)
    mean = sum(cost(schedule) for schedule in schedules) / levels
    fixed = model.at(gmacs=mean)
    taken = sum(int((level == n).sum()) * cost(s) for n, s in enumerate(schedules)) / count
    return fixed, each, taken / cost(fixed.schedule)


@torch.no_grad()
def compare(
    name: str,
    engine: str,
    precision: str,
    batch_size: int,
    device: torch.device,
    kwargs: dict[str, Any] | None = None,
    seconds: float = 4.0,
    rounds: int = 9,
) -> dict[str, Any]:
    """Time both ways in turn, in one engine.

    Args:
        name, kwargs: of `timm.create_model`.
        engine: "eager", or "openvino", "onnx": the file and `dynamicvit.deploy.runtime`.
        precision: a key of PRECISIONS.
        batch_size: images.
        device: where.
        seconds, rounds: at least.

    Returns:
        `speed`: images a second with a budget for each, as a share of those with fixed counts of
        the same cost; `spread`, its quartiles; `error`, the relative norm of the difference between
        the engine's logits and PyTorch's; and what was run.
    """
    size = input_size(timm.create_model(name, **(kwargs or {})))
    dtype = torch.float32 if device.type == "cpu" else PRECISIONS[precision]
    batches = [torch.randn(batch_size, *size, device=device, dtype=dtype) for _ in range(BATCHES)]
    fixed, each, cost = create(name, kwargs or {}, batches, precision)
    calls = [build(fixed, engine, precision)]
    if engine == "eager":
        calls.append(build(each, engine, precision))
    else:
        calls.append(_runtime(each, engine, precision))
    expected = each.to(PRECISIONS[precision])(batches[0].to(PRECISIONS[precision])).float()
    error = (torch.as_tensor(calls[1](batches[0])).float() - expected).norm() / expected.norm()
    times = interleave(calls, batches, seconds, rounds)
    speed, spread = compare_times(times)
    at_fixed, per_image = medians(times)
    return {
        "model": name,
        "engine": engine,
        "precision": precision,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "fixed": batch_size / at_fixed,
        "per_image": batch_size / per_image,
        "speed": speed * cost,
        "spread": [bound * cost for bound in spread],
        "cost": cost,
        "error": float(error),
        "rounds": len(times),
    }


def _runtime(model: SparseViT, engine: str, precision: str) -> Engine:
    """The file of a model, run as a user runs it."""
    if engine == "onnx":
        import onnxruntime

        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
    else:
        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:  # the file does not stay
        path = Path(folder) / ("model.onnx" if engine == "onnx" else "model.xml")
        export_model(model, path, precision=precision, quiet=True)
        run = PerImage(str(path), options)
    return lambda images: run(images.numpy())[0]


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """A table of `compare`'s results."""
    table = Table("model", "engine", "precision", "batch", "fixed", "per image", "of fixed")
    for row in rows:
        low, high = row["spread"]
        table.add_row(
            row["model"],
            row["engine"],
            row["precision"],
            str(row["batch_size"]),
            f"{row['fixed']:.1f}",
            f"{row['per_image']:.1f}",
            f"{row['speed']:.2f} ({low:.2f}–{high:.2f})",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", help="JSON file to write")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--device", help="cpu, cuda or cuda:NUMBER")
    parser.add_argument("--engines", nargs="+", default=["eager", "openvino"])
    parser.add_argument("--precisions", nargs="+", default=["float32"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each row, at least")
    options = parser.parse_args()
    device = find_device(options.device)
    rows = []
    for engine in options.engines:
        for precision in options.precisions:
            for batch_size in options.batch_sizes:
                rows.append(
                    compare(
                        options.model,
                        engine,
                        precision,
                        batch_size,
                        device,
                        seconds=options.seconds,
                    )
                )
                print_rows(rows[-1:])
                report = {"rows": rows, "environment": environment()}
                write_text(Path(options.results), json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
