"""File formats: how a file of each must end, what it takes, and what runs it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamicvit.deploy.runtime import openvino_core
from dynamicvit.evaluation.processor import has_bfloat16
from dynamicvit.evaluation.timing import Engine

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
COUNTS = "counts"  # the input of how many tokens each stage keeps
CUT = ("tokens", "scores")  # tensors of the first stage, where `runtime` cuts a file in two
COUNTED = ("onnx", "openvino")  # formats whose file takes counts, and so serves every budget


# A file → what runs it. Engines of files that serve every budget take `counts` as well, an int64
# array.


def _open_onnx(path: Path, precision: str) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Threads that wait for the next call without sleeping would slow what else runs in between.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, **counts: np.ndarray) -> tuple[Tensor, ...]:
        return _tensors(session.run(None, {"images": images.numpy(), **counts}))

    return run


def _open_openvino(path: Path, precision: str) -> Engine:
    options = {
        "INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = openvino_core()
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", options)
    default = {}
    if len(model.inputs) > 1:  # OpenVINO's inputs have no default values
        default[COUNTS] = np.array(json.loads(model.get_rt_info(KEY).value)["kept_counts"])

    def run(images: Tensor, **counts: np.ndarray) -> tuple[Tensor, ...]:
        return _tensors(compiled({"images": images.numpy(), **default, **counts}).values())

    return run


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


def engine_name(format: str) -> str:
    """What runs a format, with its version."""
    names = {
        "onnx": ("ONNX Runtime", "onnxruntime"),
        "openvino": ("OpenVINO", "openvino"),
        "torch": ("torch.export", "torch"),
        "aoti": ("AOTInductor", "torch"),
    }
    name, package = names[format]
    return f"{name} {version(package)}"


def _tensors(arrays: Any) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array.copy()) for array in arrays)


def check_openvino(precision: str) -> None:
    """OpenVINO takes every hint, and computes in another precision where the device lacks it."""
    needed = {"float16": "FP16", "bfloat16": "BF16", "int8": "INT8"}.get(precision, "FP32")
    able = set(openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    if not has_bfloat16():  # OpenVINO names it even where ONEDNN_MAX_CPU_ISA takes it away
        able.discard("BF16")
    if needed not in able:
        raise ValueError(
            f"this processor has no {precision} for OpenVINO, which finds {', '.join(sorted(able))}"
        )


def require(format: str, packages: Sequence[str]) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"format {format!r} needs {package}: pip install 'dynamicvit[export]'")
