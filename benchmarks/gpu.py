"""The GPU benchmark in one command, in under seven minutes on one H100.

    PYTHONPATH=src python benchmarks/gpu.py benchmarks/results/gpu.json

Four parts: the published outputs on the device (correct), dense against pruned (inference), a
budget for each image against fixed counts (per_image), and a training step against a plain one
(training). The most important rows run first, as long as time is left. The JSON file names the
rows that did not fit. It is written after each row, so a killed run leaves its results.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

START = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script's own folder is what Python puts there

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import per_image
from benchmarks.training_step import (
    SIDES,
    Setting,
    Step,
    compare_gradients,
    compare_steps,
    print_steps,
)
from dynamicvit import SparseViT, count_gmacs, sparsify
from dynamicvit.deploy.benchmark import peak_bytes, random_batches, weight_bytes
from dynamicvit.deploy.engines import Engine, build
from dynamicvit.deploy.verify import TIE
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.launch import find_device
from dynamicvit.evaluation.setup import input_size, token_counts
from dynamicvit.evaluation.timing import compare_times, interleave, medians
from dynamicvit.io.files import write_text
from tests import parity

PARTS = ("correct", "inference", "per_image", "training")
PRECISION = "bfloat16"
# Relative norm of the difference between the logits of a compiled and an eager model: rounding in
# bfloat16, and untrained scorers' near-tied tokens that change places.
COMPILED_ERROR = 0.1
GRADIENT_ERROR = 1e-4  # between both training steps, in float32


@dataclass(frozen=True)
class Variant:
    """A way to prune: keep ratio, and the multiple that kept counts are rounded to, if any."""

    keep_ratio: float
    align: int | None = None


@dataclass(frozen=True)
class Model:
    """A timm model with fresh weights, which take as long as trained ones."""

    name: str
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Row:
    """Dense and variants of one model in turn, in one engine, at one batch size."""

    model: Model
    engine: str
    batch_size: int
    variants: tuple[Variant, ...]

    def __str__(self) -> str:
        ratios = ", ".join(
            f"{variant.keep_ratio}" + (f" align {variant.align}" if variant.align else "")
            for variant in self.variants
        )
        return f"{self.model.name}, {self.engine}, batch {self.batch_size}, keep ratio {ratios}"


@dataclass(frozen=True)
class Scale:
    """What is run. The most important models and batch sizes come first."""

    models: tuple[Model, ...]
    batch_sizes: tuple[int, ...]
    align: int
    seconds: float  # spent on timing a row, at least
    rounds: int
    step: Setting
    step_batches: tuple[int, ...]
    token_images: int  # on which devices must keep the same tokens
    per_image_batches: tuple[int, ...]
    ratios: tuple[float, ...] = (0.7, 0.5, 0.9)


FULL = Scale(
    models=(
        Model("deit_small_patch16_224"),
        Model("deit_base_patch16_224"),
        Model("lvvit_small"),
        Model("vit_large_patch16_384"),
    ),
    batch_sizes=(32, 1, 256),
    align=16,
    seconds=0.5,
    rounds=7,
    step=Setting(precision=PRECISION),
    step_batches=(128, 256),
    token_images=32,
    per_image_batches=(32, 256),
)
_TINY: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
}
TINY = Scale(
    models=(
        Model("vit_tiny_patch16_224", tuple(_TINY.items())),
        Model("lvvit_tiny", tuple(_TINY.items())),
    ),
    batch_sizes=(2,),
    align=1,
    seconds=0.0,
    rounds=3,
    step=Setting("vit_tiny_patch16_224", tuple(_TINY.items()), precision=PRECISION),
    step_batches=(2,),
    token_images=2,
    per_image_batches=(4,),
    ratios=(0.7, 0.8),
)

# Estimated seconds of a part's first row, and the seconds that earlier parts leave for later ones.
GUESS = {"eager": 2.0, "compile": 15.0, "per_image": 5.0, "training": 60.0}
RESERVE = {"per_image": 15.0, "training": 100.0}


@dataclass
class Run:
    """A run of this command: its options, clock and report."""

    path: Path
    device: torch.device
    scale: Scale
    end: float
    report: dict[str, Any]
    costs: dict[Any, float] = field(default_factory=dict)  # seconds a side, by model and engine
    gmacs: dict[Any, float] = field(default_factory=dict)  # by model and variant
    console: Console = field(default_factory=lambda: Console(width=120))

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        return self.end - time.perf_counter()

    def save(self) -> None:
        self.report["seconds"] = round(time.perf_counter() - START, 1)
        write_text(self.path, json.dumps(self.report, indent=2) + "\n")

    def fails(self, what: str) -> None:
        self.report["failed"].append(what)
        self.console.print(f"[bold red]wrong[/]: {what}", highlight=False)

    def skips(self, part: str, row: object, reason: str) -> None:
        self.report["skipped"].append({"part": part, "row": str(row), "reason": reason})
        self.console.print(f"skipped: {part}: {row}: {reason}", style="dim", highlight=False)

    def attempt(
        self, part: str, row: object, needed: float, until: float, work: Callable[[], None]
    ) -> float | None:
        """Do a row's work if it can end before only `until` seconds are left.

        An error in one row is recorded, and the other rows go on.

        Returns:
            The seconds it took. None if it was not done.
        """
        left = self.left() - until
        if needed > left:
            self.skips(part, row, f"no time: {left:.0f} s left of its part, {needed:.0f} s needed")
            return None
        start = time.perf_counter()
        try:
            work()
        except torch.OutOfMemoryError as error:
            self.skips(part, row, _one_line(error))
        except Exception as error:  # a defect of a compiler, say
            self.fails(f"{part}: {row}: {_one_line(error)}")
        release(self.device)
        self.save()
        return time.perf_counter() - start


def release(device: torch.device) -> None:
    """Free a row's programs, CUDA graphs and memory."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# Correct.


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, which torch uses for convolutions by default."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def correct(run: Run) -> None:
    """The published outputs on the device, and whether it keeps the same tokens as the CPU."""
    part: dict[str, Any] = run.report.setdefault("correct", {})
    with exact_float32():
        for name in parity.NAMES:
            golden = parity.load_golden(name, run.device)
            errors = parity.inference_errors(golden) | parity.training_errors(golden)
            for precision, found in (
                ("float32", errors),
                ("bfloat16", parity.bfloat16_errors(golden)),
            ):
                part[f"{name}, {precision}"] = {key: e._asdict() for key, e in found.items()}
                for key, error in found.items():
                    if not error.fits:
                        run.fails(f"{name}, {precision}: {key} is {error}")
            images = golden.expected["images"].float().cpu()
            part[f"{name}, tokens"] = same_tokens(golden.student, images, run.device)
        model = run.scale.models[0]
        torch.manual_seed(0)
        sparse = sparsify(timm.create_model(model.name, **dict(model.kwargs)), keep_ratio=0.7)
        with torch.no_grad():  # far from fresh weights, which make all images look alike
            for parameter in sparse.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        images = torch.randn(run.scale.token_images, *input_size(sparse))
        part[f"{model.name}, tokens"] = same_tokens(sparse, images, run.device)
        for key, found in part.items():
            if key.endswith("tokens") and not found["largest_gap"] <= TIE:
                run.fails(f"{key}: the device keeps other tokens than the CPU, {found}")
    table = Table("correct", "quantities", "nearest to its limit", "error", "limit")
    for key, found in part.items():
        if key.endswith("tokens"):
            same = f"{found['same']} of {found['images']} images keep the CPU's tokens"
            table.add_row(key, "", same, f"{found['largest_gap']:.1g}", f"{TIE:g}")
            continue
        worst = max(found, key=lambda name: found[name]["value"] / (found[name]["limit"] or 1e-12))
        value, limit = found[worst]["value"], found[worst]["limit"]
        table.add_row(key, str(len(found)), worst, f"{value:.1e}", f"{limit:g}")
    run.console.print(table)


@torch.no_grad()
def same_tokens(model: SparseViT, images: Tensor, device: torch.device) -> dict[str, Any]:
    """Whether a device keeps the CPU's tokens, in float32.

    Returns:
        `images`; `same`, the number of images whose tokens are all the same; and `largest_gap`. The
        gap is that between the CPU's scores of a token which only the CPU kept and of one which
        only the device kept, as a share of the largest score. Rounding decides between ties.
    """
    model = copy.deepcopy(model).eval()
    here = model.cpu().pruned(images.cpu())
    there = model.to(device).pruned(images.to(device))
    same, largest = 0, 0.0
    for image in range(len(images)):
        for ours, theirs, scores in zip(here.keep, there.keep, here.scores, strict=True):
            kept, other = ours[image].bool(), theirs[image].cpu().bool()
            if not torch.equal(kept, other):
                score = scores[image]
                lead = score[kept & ~other].max() - score[other & ~kept].min()
                largest = max(largest, float(lead / score[score.isfinite()].abs().max()))
                break  # later stages follow from this one
        else:
            same += 1
    return {"images": len(images), "same": same, "largest_gap": largest}


# Inference.


def inference_rows(scale: Scale) -> deque[Row]:
    """All rows. Eager rows are quick. A compiled row costs far more, because each side is its own
    program: keep ratio 0.7 comes first, at the most useful batch sizes of each model."""
    plain = [Variant(ratio) for ratio in scale.ratios]
    aligned = Variant(scale.ratios[0], scale.align)
    rows = [
        Row(model, "eager", batch_size, (*plain, aligned))
        for model in scale.models
        for batch_size in scale.batch_sizes
    ]
    for batch_size in scale.batch_sizes:
        rows.extend(Row(model, "compile", batch_size, (plain[0],)) for model in scale.models)
    for batch_size in scale.batch_sizes:
        rows.extend(Row(model, "compile", batch_size, tuple(plain[1:])) for model in scale.models)
    return deque(rows)


def create(model: Model, device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return timm.create_model(model.name, **dict(model.kwargs)).eval()


def inference(run: Run, rows: deque[Row], until: float, last: bool) -> None:
    """Run rows in order, while `until` seconds are left. Other rows stay in `rows`, in case later
    parts are quicker than estimated, unless this is the last call."""
    waiting: deque[Row] = deque()
    while rows:
        row = rows.popleft()
        per_side = run.costs.get((row.model, row.engine)) or max(
            (cost for (_, engine), cost in run.costs.items() if engine == row.engine),
            default=GUESS[row.engine],
        )
        sides = 1 + len(row.variants)
        needed = 1.2 * per_side * sides * run.gpu  # on a CPU, tiny models: no time is watched
        if needed > run.left() - until and not last:
            waiting.append(row)
            continue
        took = run.attempt("inference", row, needed, until, partial(measure, run, row))
        if took is not None:
            run.costs[row.model, row.engine] = took / sides
    rows.extend(waiting)
    run.report["inference_best"] = best_settings(run.report["inference"])
    run.save()


@torch.no_grad()
def measure(run: Run, row: Row) -> None:
    """Add each variant's speed, compared with the dense model, to the report."""
    dense = create(row.model, run.device)
    models: list[nn.Module] = [dense]
    for variant in row.variants:
        models.append(sparsify(dense, keep_ratio=variant.keep_ratio, align=variant.align).eval())
    size = input_size(dense)
    gmacs = []
    for key, model in zip([(row.model, v) for v in (None, *row.variants)], models, strict=True):
        if key not in run.gmacs:
            run.gmacs[key] = count_gmacs(model, size)
        gmacs.append(run.gmacs[key])
    torch.manual_seed(1)
    batches = random_batches(row.batch_size, size, PRECISION, run.device)
    calls: list[Engine] = []
    peaks: list[float | None] = []
    errors: list[float | None] = []
    for model in models:
        call = build(model, row.engine, PRECISION)
        peak = peak_bytes(call, batches[0]) + weight_bytes(model, PRECISION) if run.gpu else None
        calls.append(call)
        peaks.append(peak and peak / 1e6)
        errors.append(_check(model, call, batches, row.engine))
    times = interleave(calls, batches, run.scale.seconds, run.scale.rounds)
    seconds = medians(times)
    for side, variant in enumerate(row.variants, 1):
        speed_up, (low, high) = compare_times(times, 0, side)
        ideal = gmacs[0] / gmacs[side]
        record: dict[str, Any] = {
            "model": row.model.name,
            "input_size": size,
            "keep_ratio": variant.keep_ratio,
            "align": variant.align,
            "tokens": token_counts(models[side]),
            "engine": row.engine,
            "precision": PRECISION,
            "batch_size": row.batch_size,
            "dense": row.batch_size / seconds[0],
            "sparse": row.batch_size / seconds[side],
            "dense_ms": 1e3 * seconds[0],
            "sparse_ms": 1e3 * seconds[side],
            "speed_up": speed_up,
            "spread": (low, high),
            "gmacs": (gmacs[0], gmacs[side]),
            "efficiency": speed_up / ideal,
            "peak_mb": (peaks[0], peaks[side]),
            "rounds": len(times),
            "errors": (errors[0], errors[side]),
        }
        run.report["inference"].append(record)
        for error in record["errors"]:
            if error is not None and not error <= COMPILED_ERROR:
                run.fails(f"{row}: compiled logits are {error} from eager ones")
        ratio = f"{variant.keep_ratio}" + (f" align {variant.align}" if variant.align else "")
        run.console.print(
            f"{row.model.name:22} {ratio:12} {row.engine:7} batch {row.batch_size:<3} "
            f"{record['dense']:7.0f} → {record['sparse']:7.0f} images/s "
            f"{record['speed_up']:.2f}× ({low:.2f}–{high:.2f}), "
            f"efficiency {record['efficiency']:.2f}",
            highlight=False,
        )


def _check(model: nn.Module, call: Engine, batches: Sequence[Tensor], engine: str) -> float | None:
    """Raise ValueError unless logits are finite. For a compiled model, return how far they are from
    the eager ones, after replays with other images."""
    outputs = [call(images) for images in (batches if engine == "compile" else batches[:1])]
    if not all(logits.isfinite().all() for logits in outputs):
        raise ValueError("logits are not finite")
    if engine != "compile":
        return None
    eager = build(model, "eager", PRECISION)
    expected = [eager(images).float() for images in batches]
    return max(
        float((logits.float() - right).norm() / right.norm())
        for logits, right in zip(outputs, expected, strict=True)
    )


def best_settings(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model, variant and batch size: dense and pruned, each in its faster engine.

    Different engines were not timed in turn, so these are ratios of medians.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for record in records:
        key = tuple(record[name] for name in ("model", "keep_ratio", "align", "batch_size"))
        groups.setdefault(key, []).append(record)
    best = []
    for found in groups.values():
        same = [r for r in records if r["model"] == found[0]["model"]]
        same = [r for r in same if r["batch_size"] == found[0]["batch_size"]]
        dense = min(same, key=lambda r: r["dense_ms"])
        sparse = min(found, key=lambda r: r["sparse_ms"])
        speed_up = dense["dense_ms"] / sparse["sparse_ms"]
        best.append(
            {
                **{name: sparse[name] for name in ("model", "keep_ratio", "align", "batch_size")},
                "dense_engine": dense["engine"],
                "sparse_engine": sparse["engine"],
                "dense": dense["dense"],
                "sparse": sparse["sparse"],
                "speed_up": speed_up,
                "efficiency": speed_up * sparse["gmacs"][1] / sparse["gmacs"][0],
            }
        )
    return best


def print_inference(run: Run) -> None:
    headers = ("model", "ratio", "batch", "dense", "pruned", "speed-up", "efficiency")
    table = Table(*headers, title="each in its faster engine, images/s")
    for row in run.report["inference_best"]:
        align = f", align {row['align']}" if row["align"] else ""
        table.add_row(
            row["model"],
            f"{row['keep_ratio']}{align}",
            str(row["batch_size"]),
            f"{row['dense']:.0f} ({row['dense_engine']})",
            f"{row['sparse']:.0f} ({row['sparse_engine']})",
            f"{row['speed_up']:.2f}×",
            f"{row['efficiency']:.2f}",
        )
    run.console.print(table)


# A budget for each image.


def compare_per_image(run: Run, until: float) -> None:
    """Speed with a budget for each image, beside that of fixed counts of the same cost."""
    part: list[dict[str, Any]] = run.report.setdefault("per_image", [])
    needed = GUESS["per_image"] * run.gpu
    for model in run.scale.models[:2]:
        for batch_size in run.scale.per_image_batches:

            def work(model: Model = model, batch_size: int = batch_size) -> None:
                seconds, rounds = run.scale.seconds, run.scale.rounds
                kwargs = dict(model.kwargs)
                setting = (model.name, "eager", PRECISION, batch_size, run.device, kwargs)
                part.append(per_image.compare(*setting, seconds, rounds))

            run.attempt("per_image", f"{model.name}, batch {batch_size}", needed, until, work)
    per_image.print_rows(part)


# Compilation ahead of time.


def precompile(
    run: Run, processes: int, parts: Sequence[str], seconds: float
) -> tuple[ProcessPoolExecutor, list[Future[bool]]]:
    """Begin to compile the rows' programs in other processes, into torch's cache on disk.

    Compiling, which a process does on one core, is what most of the time would go to. After so many
    seconds none is begun any more: nothing else may run on the device when it is timed.
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    until = time.time() + seconds
    jobs = []
    if "training" in parts:
        for batch_size in run.scale.step_batches:
            jobs.append(pool.submit(_compile_step, _step_setting(run, batch_size), until))
    if "inference" in parts:
        for row in inference_rows(run.scale):
            if row.engine == "compile":
                jobs.append(pool.submit(_compile_row, row, str(run.device), until))
    return pool, jobs


def _compile_row(row: Row, device: str, until: float) -> bool:
    """Whether there was time for it."""
    if time.time() > until:
        return False
    place = _prepare_to_compile(device)
    dense = create(row.model, place)
    batch = random_batches(row.batch_size, input_size(dense), PRECISION, place)[0]
    build(dense, row.engine, PRECISION)(batch)
    for variant in row.variants:
        sparse = sparsify(dense, keep_ratio=variant.keep_ratio, align=variant.align).eval()
        build(sparse, row.engine, PRECISION)(batch)
    return True


def _compile_step(setting: Setting, until: float) -> bool:
    if time.time() > until:
        return False
    _prepare_to_compile(setting.device)
    step = Step("ours compiled", setting)
    step(step.batches()[0])
    return True


def _prepare_to_compile(device: str) -> torch.device:
    """Run in a process of `precompile`."""
    from torch._inductor import config  # slow to import

    config.compile_threads = 2  # by default each of us would start as many as there are cores
    place = torch.device(device)
    release(place)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return place


def finish_compilation(run: Run, pool: ProcessPoolExecutor, jobs: list[Future[bool]]) -> None:
    """Wait until all compilation has ended, and record it."""
    pool.shutdown(wait=True)
    errors = [job.exception() for job in jobs]
    run.report["precompiled"] = {
        "rows": sum(
            1 for job, error in zip(jobs, errors, strict=True) if not error and job.result()
        ),
        "of": len(jobs),
        "errors": [_one_line(error) for error in errors if error],
        "until_seconds": round(time.perf_counter() - START, 1),
    }


# Training.


def _step_setting(run: Run, batch_size: int) -> Setting:
    step = run.scale.step
    return Setting(
        step.model, step.model_kwargs, step.keep_ratio, batch_size, step.precision, str(run.device)
    )


def training(run: Run, until: float) -> None:
    """Times, memory and gradients of both training steps."""
    part: dict[str, Any] = run.report.setdefault("training", {"steps": []})
    step = run.scale.step

    def gradients() -> None:
        setting = Setting(step.model, step.model_kwargs, batch_size=8, device=str(run.device))
        with exact_float32():
            part["gradients"] = compare_gradients(setting)
        if not part["gradients"]["largest_error"] <= GRADIENT_ERROR:
            run.fails(f"training: gradients differ, {part['gradients']}")

    run.attempt("training", "gradients", 0.0, until, gradients)
    needed = GUESS["training"] * run.gpu
    # The compiled reference is not a plain implementation. It shows what fusion alone gains.
    sides = (*SIDES[:3], SIDES[4])
    settings: list[tuple[int, tuple[str, ...]]] = [
        (batch, sides) for batch in run.scale.step_batches
    ]
    settings.append((run.scale.step_batches[0], ("reference", "ours compiled", SIDES[3])))
    for batch_size, compared in settings:

        def steps(batch_size: int = batch_size, sides: Sequence[str] = compared) -> None:
            setting = _step_setting(run, batch_size)
            seconds, rounds = 4 * run.scale.seconds, run.scale.rounds
            found = compare_steps(setting, sides, seconds, rounds, memory=False)
            part["steps"].extend(asdict(speed) for speed in found)

        row = f"batch {batch_size}: {', '.join(compared)}"
        took = run.attempt("training", row, needed, until, steps)
        needed = 1.2 * took * run.gpu if took else needed
    if part["steps"]:
        print_steps(part["steps"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts. Returns 1 if the device computes something wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", help="JSON file to write")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", help="cpu, cuda or cuda:NUMBER; by default a GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds, for all of it")
    parser.add_argument(
        "--precompile", type=int, help="processes that compile ahead; by default half the cores"
    )
    options = parser.parse_args(arguments)
    try:
        device = find_device(options.device or "cuda")
    except ValueError as error:
        parser.error(str(error))
    if device.type == "cpu" and not options.tiny:
        parser.error("on a CPU only --tiny models are run")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        # Its first choice for the patch embedding took a fifth of a pruned DeiT-S's time.
        torch.backends.cudnn.benchmark = True
    run = Run(
        path=Path(options.results),
        device=device,
        scale=TINY if options.tiny else FULL,
        end=START + options.budget,
        report={
            "environment": environment(),
            "settings": {**vars(options), "device": str(device), "precision": PRECISION},
            "failed": [],
            "skipped": [],
            "inference": [],
        },
    )
    del run.report["settings"]["results"]
    processes = options.precompile
    if processes is None:
        processes = max(1, (os.cpu_count() or 2) // 2) if run.gpu else 0
    pool: ProcessPoolExecutor | None = None
    if processes and {"inference", "training"} & set(options.parts):
        pool, jobs = precompile(run, processes, options.parts, 0.25 * options.budget)
    rows = inference_rows(run.scale) if "inference" in options.parts else deque()
    parts = [part for part in PARTS if part in options.parts]
    try:
        for index, part in enumerate(parts):
            run.console.rule(part)
            until = sum(RESERVE.get(later, 0.0) for later in parts[index + 1 :]) * run.gpu
            if part != "correct" and pool is not None:
                finish_compilation(run, pool, jobs)
                pool = None
            if part == "correct":
                run.attempt(part, part, 0.0, until, lambda: correct(run))
            elif part == "inference":
                inference(run, rows, until, last=False)
            elif part == "per_image":
                compare_per_image(run, until)
            elif part == "training":
                training(run, until)
            run.save()
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
    if "inference" in parts:
        inference(run, rows, 0.0, last=True)
        print_inference(run)
    run.save()
    report = run.report
    run.console.print(
        f"{report['environment']['gpu'] or 'CPU'}, {report['seconds']} s; "
        f"{len(report['skipped'])} rows skipped, {len(report['failed'])} wrong; {run.path}"
    )
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
