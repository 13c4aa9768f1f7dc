"""Models as files for other engines, each run and compared with PyTorch before it is there."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from timm.data import resolve_input_data_config
from torch import Tensor, nn

from dynamicvit import __version__
from dynamicvit.core.model import SparseViT
from dynamicvit.core.paths import Pruned
from dynamicvit.deploy.verify import Agreement, Engine, Found, compare, find_images, load_images
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.setup import backbone_of, input_size, token_counts
from dynamicvit.io.files import write_text
from dynamicvit.io.load import load_model
from dynamicvit.io.predictions import class_names, preprocessing

# How a file of each format must end, and the packages that it takes.
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": (".onnx", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": (".xml", ("onnx", "onnxscript", "openvino")),
    "torch": (".pt2", ()),
    "aoti": (".pt2", ()),
}
PRECISIONS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,
}
# OpenVINO's word for the precision that it is to compute in. Left to itself it takes bfloat16
# where the processor has it.
OPENVINO_HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "f32"}
KEY = "dynamicvit"  # under which the metadata lies
_OPSETS = range(18, 24)  # that torch's exporter gives
_ONNX_LIMIT = 2**31 - 2**20  # bytes in one ONNX file, some of them the graph's
_EXAMPLE = 2  # images in the example that is traced; at 0 or 1 the batch would become fixed
_CALIBRATION = 300  # images that int8 ranges are measured on, at most


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
    """

    path: str
    format: str
    precision: str
    engine: str
    megabytes: float
    agreement: Agreement


def export(
    model: str,
    output: str,
    /,
    format: str = "onnx",
    precision: str = "float32",
    images: str | None = None,
    calibration: str | None = None,
    samples: int = 256,
    opset: int = 18,
    results: str | None = None,
) -> Exported:
    """Write a model as a file for ONNX Runtime, OpenVINO or PyTorch without Python.

    Args:
        model: model folder, hub id or name of a pretrained timm model; sparse or dense.
        output: file to write: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2.
        format: onnx, openvino, torch (a torch.export program) or aoti (an AOTInductor package,
            compiled for this machine's processor).
        precision: float32, float16, bfloat16 or int8 (onnx and openvino).
        images: folder of images on which the file is compared with PyTorch; by default 28 px
            pictures that the package carries. If they lie in folders of their classes, accuracy
            is reported too, of the model and of the file.
        calibration: for int8: folder of images to measure value ranges on; by default `images`.
        samples: how many images to compare on.
        opset: of ONNX.
        results: JSON file to write the comparison to.

    Returns:
        The comparison.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an option; or with the figures, if
            the file does not do what the model does. Then none is written.
    """
    # Before a model is downloaded. `export_model` checks again, for those who call it.
    _check_options(Path(output), format, precision, calibration, samples, opset)
    done = export_model(
        load_model(model),
        output,
        format,
        precision,
        images=images,
        calibration=calibration,
        samples=samples,
        opset=opset,
    )
    print_exported([done])
    if results:
        report = {**asdict(done), "environment": environment()}
        write_text(Path(results), json.dumps(report, indent=2) + "\n")
    return done


def export_model(
    model: nn.Module,
    output: str | os.PathLike[str],
    format: str = "onnx",
    precision: str = "float32",
    *,
    images: str | None = None,
    calibration: str | None = None,
    samples: int = 256,
    opset: int = 18,
) -> Exported:
    """Write a SparseViT or dense timm model as a file, if its engine does what PyTorch does.

    The file takes `images`, float32 [B, C, H, W] of the model's size and normalised as its
    `pretrained_cfg` says, for any B; and gives `logits`, float32 [B, num_classes]. Of a sparse
    model it also gives `kept`, int64 [B, K1 + K2 + …]: original positions of the patch tokens kept,
    in no particular order, one stage after another. `read_metadata` gives how to prepare images,
    the class names, the schedule and how many tokens each stage keeps.

    Scorers are exported in their inference form. Weights are rounded to float16 and bfloat16, which
    the engine then computes in; but ONNX Runtime on a CPU computes in float32 with float16 weights,
    and an OpenVINO file carries float16 weights for both and computes in what it is compiled for
    (`INFERENCE_PRECISION_HINT`, written in the metadata). int8 is NNCF's static quantisation of
    weights and activations; scorers stay in float32.

    Args:
        model: not modified; moved to the CPU as a copy.
        output, format, precision, images, calibration, samples, opset: as for `export`.

    Raises:
        ValueError: naming the argument and what was got; if a package or compiler is missing, or
            the engine cannot run the precision here; or with the figures, if outputs do not agree
            (`Agreement.check`). Then no file is written, and an older one is left as it was.
        OSError: if the disk is full.
    """
    target = Path(output)
    _check_options(target, format, precision, calibration, samples, opset)
    names = class_names(model)
    preprocessing(model)  # refuses a model that takes no pictures
    found = find_images(images, samples)
    calibrating: list[Found] = []
    if precision == "int8":
        folder = images if calibration is None else calibration
        if folder is None:
            raise ValueError("calibration must be a folder of images for int8, got None")
        calibrating = find_images(folder, _CALIBRATION, "calibration", fewer=True)
    reference = copy.deepcopy(model).cpu().float().eval()
    size = sum(parameter.numel() for parameter in reference.parameters())
    if format == "onnx" and size * PRECISIONS[precision].itemsize > _ONNX_LIMIT:
        raise ValueError(f"model must fit the 2 GiB of an ONNX file, got {size} parameters")
    metadata = json.dumps(_describe(reference, names, format, precision))

    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target, then moved: what fails or is interrupted leaves no file.
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
    ) as temporary:
        path = Path(temporary) / target.name
        # An OpenVINO graph is in float32, whatever it computes in.
        program = trace(reference, PRECISIONS["float32" if format == "openvino" else precision])
        calibrate = _Calibration(reference, calibrating) if calibrating else None
        try:
            match format:
                case "onnx":
                    write_onnx(program, path, metadata, opset, calibrate)
                case "openvino":
                    write_openvino(program, path, metadata, opset, calibrate)
                case "torch":
                    _write_torch(program, path, metadata)
                case "aoti":
                    _write_aoti(program, path, metadata)
        except OSError as error:
            raise OSError(f"cannot write {target}: {error}") from error
        try:
            engine = LOADERS[format](path, precision)
        except Exception as error:  # each engine has its own
            raise _cannot_run(format, precision, error) from error
        agreement = compare(reference, _Named(engine, format, precision), found)
        agreement.check(precision)
        del engine  # some systems do not move open files
        weights = path.with_suffix(".bin")  # beside an OpenVINO graph
        parts = [path, weights] if weights.exists() else [path]
        megabytes = sum(part.stat().st_size for part in parts) / 1e6
        if len(parts) > 1:  # a kill in between must not leave an old graph with new weights
            target.unlink(missing_ok=True)
        for part in reversed(parts):
            os.replace(part, target.with_name(part.name))
    engine_name = _engine_name(format)
    if (format, precision) == ("onnx", "float16"):
        engine_name += ", which computes in float32 on a CPU"
    return Exported(str(target), format, precision, engine_name, megabytes, agreement)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `export_model` wrote into a file beside the model; no code of the file is run.

    Returns:
        `version` of this package, `architecture`, `precision`, `input_size` [C, H, W], `mean`,
        `std`, `interpolation`, `crop_pct`, `crop_mode`, `class_names`; of a sparse model `blocks`,
        `ratios` and `kept_counts`; for OpenVINO `inference_precision`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an export of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no exported model at {path}")
    _require(path.suffix, {".onnx": ["onnx"], ".xml": ["openvino"]}.get(path.suffix, []))
    try:
        if path.suffix == ".onnx":
            import onnx

            properties = onnx.load(str(path), load_external_data=False).metadata_props
            text = next(item.value for item in properties if item.key == KEY)
        elif path.suffix == ".xml":
            import openvino

            text = openvino.Core().read_model(path).get_rt_info(KEY).value
        else:
            with zipfile.ZipFile(path) as archive:
                text = _read_archive(archive)
        return cast(dict[str, Any], json.loads(text))
    except Exception as error:  # foreign bytes make parsers raise nearly anything
        raise ValueError(f"{path} is not a model that dynamicvit exported") from error


def print_exported(exported: Sequence[Exported]) -> None:
    """Print a table of exports, one row a file."""
    table = Table(
        Column("file", overflow="fold"),
        "MB",
        "largest difference",
        "top-1 same",
        "tokens same",
        "accuracy",
    )
    console = Console()
    for item in exported:
        found = item.agreement
        kept = "" if found.kept_agreement is None else f"{found.kept_agreement:.2f}%"
        table.add_row(
            escape(item.path),
            f"{item.megabytes:.1f}",
            f"{found.max_difference:.2g} of {found.largest_logit:.2g}",
            f"{found.top1_agreement:.2f}%",
            kept,
            "" if found.accuracy is None else "{:.2f}% → {:.2f}%".format(*found.accuracy),
        )
    console.print(table)
    for item in exported:
        found = item.agreement
        sizes = ", ".join(map(str, found.batch_sizes))
        console.print(
            f"{item.engine}, {item.precision}: {found.images} images at each of batch sizes {sizes}"
        )
        if found.other_tokens:
            console.print(f"other tokens kept in {found.other_tokens} images")


# What is exported.


class _Graph(nn.Module):
    """Images → logits, and of a sparse model the kept tokens; float32 outside, `dtype` inside."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        images = images.to(self.dtype)
        if not isinstance(self.model, SparseViT):
            return (self.model(images).float(),)
        final, choices = self.model.run(images, Pruned(trace=True))
        kept = torch.cat([cast(Tensor, choice.kept) for choice in choices], dim=1)
        return self.model.forward_head(final.x).float(), kept


def trace(model: nn.Module, dtype: torch.dtype) -> torch.export.ExportedProgram:
    for scorer in getattr(model, "scorers", ()):
        if scorer.merges or scorer.draws:
            raise ValueError(
                "model must have a deterministic selector that drops tokens to be exported, got "
                f"{type(scorer).__name__}"
            )
    inner = model.fuse() if isinstance(model, SparseViT) else copy.deepcopy(model)
    graph = _Graph(inner, dtype).eval().requires_grad_(False)
    example = torch.zeros(_EXAMPLE, *input_size(model))
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    with _quiet():
        program = torch.export.export(graph, (example,), dynamic_shapes=shapes, strict=True)
    for node in program.graph.nodes:  # where on this machine the source files lie
        node.meta.pop("stack_trace", None)
    return program


def _describe(model: nn.Module, names: list[str], format: str, precision: str) -> dict[str, Any]:
    backbone: Any = backbone_of(model)
    data = resolve_input_data_config(backbone)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    described = {
        "version": __version__,
        "architecture": backbone.pretrained_cfg.get("architecture"),
        "precision": precision,
        **{key: data[key] for key in keys},
        "class_names": names,
    }
    if isinstance(model, SparseViT):
        described |= {
            "blocks": model.schedule.blocks,
            "ratios": model.schedule.ratios,
            "kept_counts": token_counts(model)[1:],
        }
    if format == "openvino":
        described["inference_precision"] = OPENVINO_HINTS[precision]
    return described


# Writers. torch's own archive writer ends the process where the disk is full, so archives are made
# in memory.


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: str,
    opset: int,
    calibration: _Calibration | None,
) -> None:
    import onnx

    model = _to_onnx(program, opset).model_proto
    if calibration is not None:
        model = calibration.quantize(model, _scorer_nodes(model))
    for node in model.graph.node:
        del node.metadata_props[:]  # where in the source it came from
    onnx.helper.set_model_props(model, {KEY: metadata})
    path.write_bytes(model.SerializeToString())


def write_openvino(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: str,
    opset: int,
    calibration: _Calibration | None,
) -> None:
    import openvino

    # By way of ONNX, which keeps the fixed image size and the names of inputs and outputs.
    between = path.with_suffix(".onnx")
    converted = _to_onnx(program, opset)
    converted.save(str(between), external_data=True)
    model = openvino.convert_model(between)
    if calibration is not None:
        leave = set(_scorer_nodes(converted.model_proto))
        # Of one ONNX node it may make several: NODE, NODE/WithoutBiases.
        names = [operation.get_friendly_name() for operation in model.get_ops()]
        model = calibration.quantize(
            model, [name for name in names if name.partition("/")[0] in leave]
        )
    half = json.loads(metadata)["precision"] in ("float16", "bfloat16")
    model.set_rt_info(metadata, KEY)
    try:
        openvino.save_model(model, path, compress_to_fp16=half)
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _write_torch(program: torch.export.ExportedProgram, path: Path, metadata: str) -> None:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={KEY: metadata})
    path.write_bytes(buffer.getvalue())


def _write_aoti(program: torch.export.ExportedProgram, path: Path, metadata: str) -> None:
    from torch._inductor import aoti_compile_and_package, exc

    buffer = io.BytesIO()
    configs = {"aot_inductor.metadata": {KEY: metadata}}
    try:
        with _quiet():
            aoti_compile_and_package(program, package_path=buffer, inductor_configs=configs)
    except (exc.InvalidCxxCompiler, exc.CppCompileError) as error:
        raise ValueError(f"format 'aoti' needs a C++ compiler that works: {error}") from error
    path.write_bytes(buffer.getvalue())


def _to_onnx(program: torch.export.ExportedProgram, opset: int) -> Any:
    outputs = ["logits", "kept"][: len(program.graph_signature.user_outputs)]
    with _quiet():
        return torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=outputs,
            verbose=False,
        )


class _Calibration:
    """Static quantisation to int8 by NNCF, with ranges measured on images."""

    def __init__(self, model: nn.Module, images: Sequence[Found]) -> None:
        self.model = model
        self.images = images

    def quantize(self, model: Any, leave: list[str]) -> Any:
        """An ONNX or OpenVINO model, quantised but for the nodes of these names."""
        import nncf

        nncf.set_log_level(logging.ERROR)
        images = ({"images": batch.numpy()} for batch in load_images(self.model, self.images, 1))
        with _quiet():
            return nncf.quantize(
                model,
                nncf.Dataset(list(images)),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(self.images),
                ignored_scope=nncf.IgnoredScope(names=leave),
            )


def _scorer_nodes(model: Any) -> list[str]:
    """Names of the ONNX nodes that come from scorers."""
    return [
        node.name
        for node in model.graph.node
        if any(
            item.key == "namespace" and ".scorers." in item.value for item in node.metadata_props
        )
    ]


# Engines: a file → what runs it.


def _open_onnx(path: Path, precision: str) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Threads that wait for the next call without sleeping would slow what else runs in between.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: _tensors(session.run(None, {"images": images.numpy()}))


def _open_openvino(path: Path, precision: str) -> Engine:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda images: _tensors(compiled([images.numpy()]).values())


def _open_torch(path: Path, precision: str) -> Engine:
    module: Any = torch.export.load(path).module()
    return lambda images: tuple(module(images))


def _open_aoti(path: Path, precision: str) -> Engine:
    from torch._inductor import aoti_load_package

    package: Any = aoti_load_package(str(path))
    return lambda images: tuple(package(images))


LOADERS = {
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "torch": _open_torch,
    "aoti": _open_aoti,
}


class _Named:
    """An engine whose errors say what could not be run."""

    def __init__(self, engine: Engine, format: str, precision: str) -> None:
        self.engine = engine
        self.what = (format, precision)

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        try:
            return self.engine(images)
        except Exception as error:  # each engine has its own
            raise _cannot_run(*self.what, error) from error


def _cannot_run(format: str, precision: str, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # ONNX Runtime begins with codes and the file's temporary name.
    reason = reason.rpartition("failed:")[2]
    return ValueError(f"{_engine_name(format)} cannot run precision {precision!r} here: {reason}")


def _engine_name(format: str) -> str:
    match format:
        case "onnx":
            return f"ONNX Runtime {version('onnxruntime')}"
        case "openvino":
            return f"OpenVINO {version('openvino')}"
        case "torch":
            return f"torch.export {torch.__version__}"
    return f"AOTInductor {torch.__version__}"


def _tensors(arrays: Any) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array.copy()) for array in arrays)


# What is asked for.


def _check_options(
    output: Path, format: str, precision: str, calibration: str | None, samples: int, opset: int
) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    suffix, packages = FORMATS[format]
    if output.suffix != suffix:
        raise ValueError(f"output must end in {suffix} for format {format!r}, got {output}")
    if output.is_dir():
        raise ValueError(f"output must be a file, got the folder {output}")
    if precision == "int8":
        if format not in ("onnx", "openvino"):
            raise ValueError(f"precision int8 is for formats onnx and openvino, got {format!r}")
        packages += ("nncf",)
    elif calibration is not None:
        raise ValueError(f"calibration is for precision int8, got it with {precision!r}")
    for name, value in (("samples", samples), ("opset", opset)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    if opset not in _OPSETS:
        raise ValueError(f"opset must lie in {_OPSETS[0]}..{_OPSETS[-1]}, got {opset}")
    _require(format, packages)
    if format == "openvino":
        check_openvino(precision)


def check_openvino(precision: str) -> None:
    """OpenVINO takes every hint, and computes in another precision where the device lacks it."""
    import openvino

    needed = {"float16": "FP16", "bfloat16": "BF16", "int8": "INT8"}.get(precision, "FP32")
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if needed not in able:
        raise ValueError(
            f"this processor has no {precision} for OpenVINO, which finds {', '.join(sorted(able))}"
        )


def _require(format: str, packages: Sequence[str]) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"format {format!r} needs {package}: pip install 'dynamicvit[export]'")


def _read_archive(archive: zipfile.ZipFile) -> str:
    """The metadata of a torch.export program or an AOTInductor package."""
    for name in archive.namelist():
        if name.endswith(f"/extra/{KEY}"):
            return archive.read(name).decode()
        if "/aotinductor/" in name and name.endswith("_metadata.json"):
            return cast(str, json.loads(archive.read(name))[KEY])
    raise KeyError(KEY)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say to their own developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
