"""Models as files for other engines, each run and compared with PyTorch before it is there."""

from __future__ import annotations

import copy
import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.deploy.engines import first_line
from dynamicvit.deploy.formats import (
    COUNTED,
    COUNTS,
    FORMATS,
    LOADERS,
    PRECISIONS,
    check_openvino,
    engine_name,
    require,
)
from dynamicvit.deploy.metadata import describe, read_metadata
from dynamicvit.deploy.samples import load_samples, pick_samples
from dynamicvit.deploy.verify import BATCH_SIZES, Agreement, measure_agreement
from dynamicvit.deploy.writers import (
    check_exports,
    quantize,
    trace,
    write_aoti,
    write_onnx,
    write_openvino,
    write_torch,
)
from dynamicvit.evaluation.console import cell, plain, show_steps
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.setup import token_counts
from dynamicvit.io.arguments import check_types
from dynamicvit.io.files import check_file, write_text
from dynamicvit.io.load import at_budget, load_model
from dynamicvit.io.predictions import class_names, preprocessing

__all__ = ["FORMATS", "Exported", "export", "export_model", "print_exported", "read_metadata"]

_ONNX_LIMIT = 2**31 - 2**20  # bytes in one ONNX file, some of them the graph's
# Images that int8 ranges are measured on, at most: NNCF passes over them several times.
_CALIBRATION = 128
# Models of fewer parameters are compared in one thread: they hardly gain from a second one, and
# where others use the cores, threads wait for each other several times as long as they compute.
_SMALL = 10_000_000


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how its engine did beside PyTorch.

    Attributes:
        path: of the file.
        format: "onnx", "openvino", "torch" or "aoti".
        precision: "float32", "float16", "bfloat16" or "int8".
        engine: that ran it, with its version.
        megabytes: size on disk (10⁶ bytes), weights included.
        agreement: the comparison.
        other_budgets: the same on fewer images with other counts, of formats that take these.
    """

    path: str
    format: str
    precision: str
    engine: str
    megabytes: float
    agreement: Agreement
    other_budgets: tuple[Agreement, ...] = ()


def export(
    model: str,
    output: str,
    /,
    format: str | None = None,
    precision: str = "float32",
    images: str | None = None,
    calibration: str | None = None,
    samples: int = 256,
    weights: str | None = None,
    keep_ratio: float | None = None,
    per_image: bool = False,
    results: str | None = None,
    quiet: bool = False,
) -> Exported:
    """Write a model as a file for ONNX Runtime, OpenVINO or PyTorch without Python.

    Args:
        model: model folder, hub id or name of a pretrained timm model; sparse or dense.
        output: file to write: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2.
        format: onnx, openvino, torch (a torch.export program) or aoti (an AOTInductor package,
            compiled for this machine's processor). By default the end of `output` says which; of
            .pt2 it is torch.
        precision: float32, float16, bfloat16 (not onnx) or int8 (onnx and openvino).
        images: folder of images on which the file is compared with PyTorch; by default 28 px
            pictures that the package carries. If they lie in folders of their classes, accuracy
            is reported too, of the model and of the file.
        calibration: for int8: folder of images to measure value ranges on, 128 at most; by
            default `images`.
        samples: how many images to compare on, at most. Each is run once: one alone, the next four
            together, the next 16, and so on.
        weights: for a timm name: file with a state dict of your own (safetensors or torch, also of
            Lightning) to load instead of timm's.
        keep_ratio: share of tokens that each stage of a sparse model keeps; by default its own.
            ONNX and OpenVINO files serve other budgets too.
        per_image: write the levels of a budget for each image into the metadata, for
            `dynamicvit.deploy.runtime`. `dynamicvit calibrate` prepares a model for it.
        results: JSON file to write the comparison to.
        quiet: print nothing, neither table nor progress.

    Returns:
        The comparison.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an option; or with the figures, if
            the file does not do what the model does. Then none is written.
    """
    # Before a model is downloaded. `export_model` checks again, for those who call it.
    _check_options(Path(output), format, precision, calibration, samples)
    if results:
        check_file("results", results)
    with show_steps(quiet) as report:
        report(f"loading {model}")
        loaded = load_model(model, weights=weights)
        loaded = at_budget(loaded, model, keep_ratio, per_image)
    done = export_model(
        loaded,
        output,
        format,
        precision,
        images=images,
        calibration=calibration,
        samples=samples,
        quiet=quiet,
    )
    if results:
        written = {**asdict(done), "environment": environment()}
        write_text(Path(results), json.dumps(written, indent=2) + "\n")
    if not quiet:
        print_exported(done)
        if results:
            print(f"the comparison is in {plain(results)}")
    return done


@check_types
def export_model(
    model: nn.Module,
    output: str | os.PathLike[str],
    format: str | None = None,
    precision: str = "float32",
    *,
    images: str | None = None,
    calibration: str | None = None,
    samples: int = 256,
    quiet: bool = False,
) -> Exported:
    """Write a SparseViT or dense timm model as a file, if its engine does what PyTorch does.

    The file takes `images`, float32 [B, C, H, W] of the model's size and normalised as its
    `pretrained_cfg` says, for any B; and gives `logits`, float32 [B, num_classes]. Of a sparse
    model it also gives `kept_1`, `kept_2` and so on, one a stage, int64 [B, K]: original positions
    of the patch tokens kept, in no particular order. Its ONNX and OpenVINO files serve every
    budget: they also take `counts`, int64 [S], how many patch tokens each stage keeps. ONNX files
    have the model's own counts as the default. torch and aoti files keep these. `read_metadata`
    gives how to prepare images, the class names, the schedule and its counts.

    Scorers are exported in their inference form. Weights are rounded to float16 and bfloat16, which
    the engine then computes in; but ONNX Runtime on a CPU computes in float32 with float16 weights,
    and an OpenVINO file carries float16 weights for both and computes in what it is compiled for
    (`INFERENCE_PRECISION_HINT`, written in the metadata). int8 is NNCF's static quantisation of
    weights and activations; scorers stay in float32.

    Args:
        model: not modified; moved to the CPU as a copy.
        output, format, precision, images, calibration, samples: as for `export`.
        quiet: show no progress.

    Raises:
        TypeError, ValueError: naming the argument and what was got; if a package or compiler is
            missing, or the engine cannot run the precision here; or with the figures, if outputs do
            not agree (`Agreement.check`). Then no file is written, and an older one is left as it
            was.
        OSError: if the disk is full.
    """
    target = Path(output)
    format = _check_options(target, format, precision, calibration, samples)
    check_exports(model)
    names = class_names(model)
    preprocessing(model)  # refuses a model that takes no pictures
    found = pick_samples(images, samples)
    reference = copy.deepcopy(model).cpu().float().eval()
    size = sum(parameter.numel() for parameter in reference.parameters())
    if format == "onnx" and size * PRECISIONS[precision].itemsize > _ONNX_LIMIT:
        raise ValueError(f"model must fit the 2 GiB of an ONNX file, got {size} parameters")
    metadata = json.dumps(describe(reference, names, format, precision))
    if isinstance(reference, SparseViT) and reference.levels is not None:
        # One call of the file has one budget. `runtime` calls it with each level's counts.
        reference = reference.at(schedule=reference.schedule)
    inputs = _calibration_inputs(reference, calibration or images) if precision == "int8" else []
    with show_steps(quiet) as report, _temporary_folder(target) as folder:
        path = folder / target.name
        calibrate = partial(quantize, inputs, report) if inputs else None
        report("tracing the model")
        # An OpenVINO graph is in float32, whatever it computes in.
        dtype = PRECISIONS["float32" if format == "openvino" else precision]
        program = trace(reference, dtype, free_counts=format in COUNTED)
        report(f"writing {target}")
        with _name_target(target):
            match format:
                case "onnx":
                    write_onnx(program, path, metadata, calibrate)
                case "openvino":
                    write_openvino(program, path, metadata, calibrate)
                case "torch":
                    write_torch(program, path, metadata)
                case "aoti":
                    write_aoti(program, path, metadata)
        with _threads(1 if size < _SMALL else torch.get_num_threads()):
            engine = _open(path, format, precision)
            agreement = measure_agreement(reference, engine, found, report=report)
            some = found[: sum(BATCH_SIZES)]
            others = tuple(
                measure_agreement(
                    model, partial(engine, counts=np.array(counts)), some, report=report
                )
                for counts, model in _other_budgets(reference, format).items()
            )
        for each in (agreement, *others):
            each.check(precision)
        del engine  # some systems do not move open files
        megabytes = _move(path, target)
    name = engine_name(format)
    if (format, precision) == ("onnx", "float16"):
        name += ", which computes in float32 on a CPU"
    return Exported(str(target), format, precision, name, megabytes, agreement, others)


def _calibration_inputs(model: nn.Module, folder: str | None) -> list[dict[str, np.ndarray]]:
    if folder is None:
        raise ValueError("calibration must be a folder of images for int8, got None")
    counts = token_counts(model)[1:]
    same = {COUNTS: np.array(counts)} if counts else {}
    images = load_samples(model, pick_samples(folder, _CALIBRATION, "calibration"), 1)
    return [{"images": image.numpy(), **same} for image in images]


def _other_budgets(model: nn.Module, format: str) -> dict[tuple[int, ...], SparseViT]:
    """Two choices of counts that a file takes beside its own, and the models that keep so many."""
    found: dict[tuple[int, ...], SparseViT] = {}
    if not isinstance(model, SparseViT) or format not in COUNTED:
        return found
    start, *own = token_counts(model)
    for counts in (
        (start,) * len(own),
        tuple(max(1, count // 2) for count in own),
        tuple(max(1, count // 4) for count in own),
    ):
        if counts != (*own,) and len(found) < 2:
            ratios = tuple(count / start for count in counts)
            found[counts] = model.at(schedule=KeepSchedule(model.schedule.blocks, ratios))
    return found


def _open(path: Path, format: str, precision: str) -> Callable[..., Any]:
    """What runs a file. Its errors name the engine and the precision."""
    with _name_engine(format, precision):
        engine: Any = LOADERS[format](path, precision)

    def run(images: Tensor, **counts: np.ndarray) -> Any:
        with _name_engine(format, precision):
            return engine(images, **counts)

    return run


@contextmanager
def _name_engine(format: str, precision: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each engine has its own
        # ONNX Runtime begins with codes and the file's temporary name.
        reason = first_line(error).rpartition("failed:")[2]
        raise ValueError(
            f"{engine_name(format)} cannot run precision {precision!r} here: {reason}"
        ) from error


def _move(path: Path, target: Path) -> float:
    """Move a file to its target, weights beside it too. Returns their size in 10⁶ bytes."""
    weights = path.with_suffix(".bin")  # of an OpenVINO graph
    parts = [weights, path] if weights.exists() else [path]
    megabytes = sum(part.stat().st_size for part in parts) / 1e6
    if len(parts) > 1:  # a kill in between must not leave an old graph with new weights
        target.unlink(missing_ok=True)
    for part in parts:
        os.replace(part, target.with_name(part.name))
    return megabytes


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads, in PyTorch and in engines that are loaded here."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _name_target(target: Path) -> Iterator[None]:
    """Make errors of writing name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {target}: {error}") from error


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside a file, to write into; what is left in it is removed, also on SIGTERM."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    with _name_target(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
        )
    with temporary as folder:
        # A handler of the caller's stays, and threads but the main one can set none.
        main = threading.current_thread() is threading.main_thread()
        ours = main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if ours:
            signal.signal(signal.SIGTERM, stop)
        try:
            yield Path(folder)
        finally:
            if ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


def print_exported(exported: Exported) -> None:
    """Print what an export is, and how it did beside PyTorch."""
    found = exported.agreement
    sizes = ", ".join(map(str, found.batch_sizes))
    difference = f"{found.max_difference:.2g}, the largest logit is {found.largest_logit:.2g}"
    rows = [
        ("file", f"{cell(exported.path)}, {exported.megabytes:.1f} MB"),
        ("engine", f"{exported.engine}, {exported.precision}"),
        ("compared with PyTorch", f"on {found.images} images, {sizes} at a time"),
        ("largest difference of logits", difference),
        ("same class", f"{found.top1_agreement:.2f}%"),
    ]
    if found.kept_agreement is not None:
        others = f", other tokens in {found.other_tokens} images" if found.other_tokens else ""
        rows.append(("same tokens kept", f"{found.kept_agreement:.2f}%{others}"))
    for other in exported.other_budgets:
        counts = ", ".join(map(str, other.kept_counts))
        rows.append((f"with {counts} tokens", f"difference of at most {other.max_difference:.2g}"))
    if found.accuracy is not None:
        rows.append(("accuracy", "PyTorch {:.2f}%, file {:.2f}%".format(*found.accuracy)))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


# What is asked for.


def _check_options(
    output: Path,
    format: str | None,
    precision: str,
    calibration: str | None,
    samples: int,
) -> str:
    """The format, by default what the end of the output's name says."""
    by_suffix = {suffix: name for name, (suffix, _) in reversed(FORMATS.items())}
    if format is None:
        if output.suffix not in by_suffix:
            raise ValueError(f"output must end in {', '.join(by_suffix)}, got {output}")
        format = by_suffix[output.suffix]
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    suffix, packages = FORMATS[format]
    if output.suffix != suffix:
        raise ValueError(f"output must end in {suffix} for format {format!r}, got {output}")
    check_file("output", output)
    if precision == "int8":
        if format not in ("onnx", "openvino"):
            raise ValueError(f"precision int8 is for formats onnx and openvino, got {format!r}")
        packages += ("nncf",)
    elif calibration is not None:
        raise ValueError(f"calibration is for precision int8, got it with {precision!r}")
    if (format, precision) == ("onnx", "bfloat16"):  # its opset has no such convolution
        raise ValueError(
            f"precision must be float32, float16 or int8 for format 'onnx', got {precision!r}"
        )
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    require(format, packages)
    if format == "openvino":
        check_openvino(precision)
    return format
