"""A training step of a DeiT-S at keep ratio 0.7, timed against a straightforward one.

    python benchmarks/training_step.py benchmarks/results/training_step.json

Both steps are the paper's (arXiv 2106.02034): a student with blocked tokens, its dense teacher,
four losses, backward, AdamW. They differ in the blocks alone. This project's gives timm's own an
additive bias, so that they run fused attention, and can leave out of the backward pass what dropped
tokens receive (`KeptMasked`). The reference writes the paper's formula down,
A = exp(a) G / Σ exp(a) G, with matrices of scores in memory and a softmax in float32.

Axes: B images, H heads, N tokens (prefix tokens included), C channels.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dynamicvit import SparseViT, sparsify
from dynamicvit.core.model import SparseOutput
from dynamicvit.core.paths import Masked
from dynamicvit.core.tokens import Tokens
from dynamicvit.deploy.benchmark import random_batches
from dynamicvit.deploy.memory import resident
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.launch import find_device
from dynamicvit.evaluation.setup import input_size
from dynamicvit.evaluation.timing import compare_times, interleave, medians
from dynamicvit.io.embedded import ASSETS
from dynamicvit.io.files import write_text
from dynamicvit.io.load import load_model
from dynamicvit.training.task import SparseTask

# "kept gradients": as TrainConfig.kept_gradients does.
# "compiled": by torch.compile, as TrainConfig.compile does. The reference is what others are
# measured against.
SIDES = ("reference", "ours", "ours compiled", "reference compiled", "ours, kept gradients")
CPU_SIDES = ("reference", "ours", "ours, kept gradients")
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}  # of autocast


# The reference.


class MaskedAttention(nn.Module):
    """Multi-head attention that a keep mask blocks tokens in, written as the paper writes it.

    Args:
        attention: timm's, whose weights it takes over.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.scale: float = attention.scale
        self.qkv: nn.Module = attention.qkv
        self.proj: nn.Module = attention.proj

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x [B, N, C] → [B, N, C]. `attn_mask` is not a bias but `keep_matrix`'s G, or None before
        the first stage. (The names are those that timm's blocks use.)"""
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = ((q @ k.transpose(-2, -1)) * self.scale).float()  # [B, H, N, N]
        if attn_mask is None:
            weights = scores.softmax(dim=-1)
        else:
            largest = scores.detach().amax(dim=-1, keepdim=True)  # so that exp does not overflow
            weights = (scores - largest).exp() * attn_mask
            weights = weights / weights.sum(dim=-1, keepdim=True)
        x = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(batch, tokens, channels)
        y: Tensor = self.proj(x)
        return y


def keep_matrix(keep: Tensor, num_prefix: int) -> Tensor:
    """The paper's G from a keep mask of the patch tokens: G_ij = 1 if i = j else keep_j.

    keep [B, patch tokens] → [B, 1, N, N]; prefix tokens stay.
    """
    keep = F.pad(keep, (num_prefix, 0), value=1.0)
    itself = torch.eye(keep.shape[1], device=keep.device)
    return keep[:, None, None, :] * (1 - itself) + itself


class Reference(Masked):
    """The masked path with `MaskedAttention`, which takes the matrix G."""

    def bias(self, keep: Tensor, tokens: Tokens) -> Tensor:
        return keep_matrix(keep, tokens.num_prefix)


class ReferenceViT(SparseViT):
    """A SparseViT whose masked path runs `MaskedAttention`: the same weights and decisions.

    Args:
        sparse: what to copy.
    """

    def __init__(self, sparse: SparseViT) -> None:
        copied = copy.deepcopy(sparse)
        super().__init__(copied.backbone, copied.schedule, copied.scorers)
        block: Any
        for block in self.backbone.blocks:
            block.attn = MaskedAttention(block.attn)

    def masked(self, *args: Any, path: type[Masked] = Masked, **options: Any) -> SparseOutput:
        """As `SparseViT.masked`, always by way of `Reference`."""
        return super().masked(*args, path=Reference, **options)


# The step.


@dataclass(frozen=True)
class Setting:
    """What a step is run on.

    Attributes:
        model: timm name of the dense model, whose weights are then fresh, or a folder. Its scorers
            are set to keep the schedule's shares.
        model_kwargs: of timm.create_model.
        keep_ratio: of each of three stages.
        batch_size: images a step.
        precision: a key of DTYPES; the weights are float32 in both.
        device: where.
    """

    model: str = "deit_small_patch16_224"
    model_kwargs: tuple[tuple[str, Any], ...] = ()
    keep_ratio: float = 0.7
    batch_size: int = 16
    precision: str = "float32"
    device: str = "cpu"


class Step:
    """One side's training step; the weights are the same on every side.

    Args:
        side: of SIDES.
        setting: what to run.
    """

    def __init__(self, side: str, setting: Setting) -> None:
        self.device = torch.device(setting.device)
        self.dtype = DTYPES[setting.precision]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teacher: Any = (
                load_model(setting.model)
                if Path(setting.model).is_dir()
                else timm.create_model(setting.model, **dict(setting.model_kwargs))
            )
            self.student = sparsify(teacher, keep_ratio=setting.keep_ratio)
        scorer: Any
        for scorer, ratio in zip(
            self.student.scorers, self.student.schedule.step_ratios(), strict=True
        ):
            scorer.set_keep_prior(ratio)  # what is kept decides what a step costs
        if side.startswith("reference"):
            self.student = ReferenceViT(self.student)
        kept = side.endswith("kept gradients")
        task = SparseTask(self.student, teacher, kept_gradients=kept)
        self.task: nn.Module = task.to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=True)
        self.labels = torch.arange(setting.batch_size, device=self.device) % teacher.num_classes
        self.loss = torch.zeros(())
        self.kept: list[float] = []
        if side.endswith("compiled"):
            self.task.compile(dynamic=False)

    def backward(self, images: Tensor) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            result = self.task(images, self.labels)
        result["loss"].backward()
        self.loss, self.kept = result["loss"].detach(), result["kept"].tolist()

    def __call__(self, images: Tensor) -> None:
        self.backward(images)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def batches(self) -> list[Tensor]:
        """Random images [B, 3, H, W]."""
        size = input_size(self.student)
        return random_batches(len(self.labels), size, "float32", self.device)


# What is measured.


@dataclass(frozen=True)
class StepSpeed:
    """One side's step in one setting.

    Attributes:
        side: of SIDES.
        images_per_second, step_ms: medians over rounds.
        speed_up: median over rounds of the reference's time / this side's.
        spread: lower and upper quartile of those ratios.
        peak_mb: most memory (10⁶ bytes). On a GPU of all but the images: weights, teacher and
            optimizer too; on a CPU what the step adds to what the process held before its first
            one. None where the system does not tell.
        memory_ratio: the reference's peak / this side's.
        loss: of the last step.
        kept: share of tokens kept at each stage, in the last step.
    """

    side: str
    precision: str
    batch_size: int
    images_per_second: float
    step_ms: float
    speed_up: float
    spread: tuple[float, float]
    peak_mb: float | None
    memory_ratio: float | None
    loss: float
    kept: list[float]


def compare_steps(
    setting: Setting,
    sides: Sequence[str] = SIDES[:2],
    seconds: float = 4.0,
    rounds: int = 7,
    memory: bool = True,
) -> list[StepSpeed]:
    """Time the sides' steps in turn, A B B A …, on the same images.

    Args:
        setting: what to run.
        sides: of SIDES, the reference first.
        seconds: spent, at least.
        rounds: run, at least.
        memory: also measure it on a CPU, in a process for each side.

    Raises:
        ValueError: if `sides` is not as said, or a side's loss is not finite.
    """
    if not sides or sides[0] != SIDES[0] or not set(sides) <= set(SIDES):
        raise ValueError(f"sides must be of {SIDES}, that one first, got {tuple(sides)}")
    gpu = torch.device(setting.device).type == "cuda"
    steps: list[Step] = []
    weights: list[int] = []  # bytes of student and teacher
    for side in sides:
        before = torch.cuda.memory_allocated() if gpu else 0
        steps.append(Step(side, setting))
        weights.append(torch.cuda.memory_allocated() - before if gpu else 0)
    batches = steps[0].batches()
    peaks: list[float | None] = []
    for side, step, size in zip(sides, steps, weights, strict=True):
        if gpu:
            before = torch.cuda.memory_allocated()
            for _ in range(2):  # compile, allocate what stays: the optimizer's state
                step(batches[0])
            torch.cuda.reset_peak_memory_stats()
            step(batches[0])
            peaks.append((torch.cuda.max_memory_allocated() - before + size) / 1e6)
        else:
            peaks.append(_peak_in_a_process(side, setting) if memory else None)
    times = interleave(steps, batches, seconds, rounds)
    seconds_a_step = medians(times)
    results = []
    for index, side in enumerate(sides):
        loss = float(steps[index].loss)
        if not math.isfinite(loss):
            raise ValueError(f"the loss of {side!r} must be finite, got {loss}")
        speed_up, spread = compare_times(times, 0, index)
        peak, reference = peaks[index], peaks[0]
        results.append(
            StepSpeed(
                side=side,
                precision=setting.precision,
                batch_size=setting.batch_size,
                images_per_second=setting.batch_size / seconds_a_step[index],
                step_ms=1e3 * seconds_a_step[index],
                speed_up=speed_up,
                spread=spread,
                peak_mb=peak,
                memory_ratio=reference / peak if reference and peak else None,
                loss=loss,
                kept=steps[index].kept,
            )
        )
    return results


def compare_gradients(setting: Setting, sides: Sequence[str] = SIDES[:2]) -> dict[str, Any]:
    """Gradients of two sides' losses, on the same images and with the same noise.

    Returns:
        `parameters` (how many), `largest_error` (relative norm of the difference, of one
        parameter's gradient) and `of` (its name).

    Raises:
        ValueError: if a parameter has a gradient on one side alone.
    """
    gradients: list[dict[str, Tensor]] = []
    batch: Tensor | None = None
    for side in sides:
        step = Step(side, setting)
        batch = step.batches()[0] if batch is None else batch
        with torch.random.fork_rng():
            torch.manual_seed(2)
            step.backward(batch)
        named = step.student.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    expected, actual = gradients
    if expected.keys() != actual.keys():
        raise ValueError(f"sides must learn the same, got {expected.keys() ^ actual.keys()}")
    errors = {
        name: float((actual[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.items()
    }
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    return {"parameters": len(errors), "largest_error": errors[worst], "of": worst}


def _peak_in_a_process(side: str, setting: Setting) -> float | None:
    """A process of its own for each side: memory that one side gave back would serve the other."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_growth, side, setting, torch.get_num_threads()).result()


def _peak_growth(side: str, setting: Setting, threads: int) -> float | None:
    """Megabytes by which the resident set grows, at most, in two steps."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    step = Step(side, setting)
    [images] = step.batches()
    with suppress(OSError):  # forget the peak of making the model, where the system lets us
        Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(2):
        step(images)
    peak = resident()
    return None if before is None or peak is None else peak - before


def print_steps(rows: Sequence[dict[str, Any]]) -> None:
    """A table of StepSpeeds."""
    table = Table("step", "precision", "batch", "images/s", "speed-up", "peak MB", "memory")
    for row in rows:
        known = row["peak_mb"] is not None
        table.add_row(
            row["side"],
            row["precision"],
            str(row["batch_size"]),
            f"{row['images_per_second']:.1f}",
            f"{row['speed_up']:.2f}× ({row['spread'][0]:.2f}–{row['spread'][1]:.2f})",
            f"{row['peak_mb']:.0f}" if known else "",
            f"÷ {row['memory_ratio']:.2f}" if known else "",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", help="JSON file to write")
    parser.add_argument("--device", help="cpu, cuda or cuda:NUMBER")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--sides", nargs="+", default=list(CPU_SIDES), choices=SIDES)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each setting, at least")
    options = parser.parse_args()
    device = str(find_device(options.device))
    torch.set_flush_denormal(True)  # as training does
    gradients = {
        of: {
            side: compare_gradients(
                Setting(model=model, batch_size=8, device=device), (SIDES[0], side)
            )
            for side in options.sides[1:]
            if "compiled" not in side
        }
        for of, model in {"fresh": Setting.model, "trained": str(ASSETS / "model")}.items()
    }
    rows = [
        asdict(row)
        for precision in options.precisions
        for batch_size in options.batch_sizes
        for row in compare_steps(
            Setting(batch_size=batch_size, precision=precision, device=device),
            options.sides,
            options.seconds,
        )
    ]
    print_steps(rows)
    setting = Setting(device=device)
    report = {
        "settings": {
            "model": setting.model,
            "keep_ratio": setting.keep_ratio,
            "device": device,
            "seconds": options.seconds,
        },
        "steps": rows,
        "gradients": gradients,
        "environment": environment(),
    }
    write_text(Path(options.results), json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
