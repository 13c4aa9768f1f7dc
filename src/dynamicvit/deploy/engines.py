"""A model in the engines of this machine, each as a function from images to logits."""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynamicvit.core.model import SparseViT
from dynamicvit.deploy import export

Engine = Callable[[Tensor], Any]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The packages that an engine takes, and the precisions it computes in on a CPU.
ENGINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "eager": ((), ("float32", "bfloat16")),
    "compile": ((), ("float32", "bfloat16")),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), ("float32",)),
    "openvino": (("onnx", "onnxscript", "openvino"), ("float32", "bfloat16")),
}


def installed(engine: str) -> bool:
    """Whether the packages that an engine takes are there."""
    return all(importlib.util.find_spec(package) for package in ENGINES[engine][0])


def check_engine(engine: str, precision: str, device: str = "cpu") -> None:
    """Raise ValueError unless this machine has the engine, and the engine the precision."""
    if engine not in ENGINES:
        raise ValueError(f"engines must be of {', '.join(ENGINES)}, got {engine!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precisions must be of {', '.join(PRECISIONS)}, got {precision!r}")
    if not installed(engine):
        raise ValueError(f"engine {engine!r} needs the extra: pip install 'dynamicvit[export]'")
    gpu = device != "cpu" and engine in ("eager", "compile")
    if not gpu and precision not in ENGINES[engine][1]:
        raise ValueError(f"engine {engine!r} does not compute in {precision} here")


def build(model: nn.Module, engine: str, precision: str, fused_attention: bool = True) -> Engine:
    """The model, copied, in an engine: images [B, C, H, W] float32 → logits.

    Args:
        model: a SparseViT, whose scorers then take their inference form, or a dense timm model.
        engine: a key of `ENGINES`.
        precision: a key of `PRECISIONS`; weights and computation.
        fused_attention: torch's fused kernel, or attention as plain operations. ONNX Runtime and
            OpenVINO find their own form.

    Raises:
        ValueError: as `check_engine`.
    """
    device = next(model.parameters()).device
    check_engine(engine, precision, device.type)
    if engine in ("onnx", "openvino"):
        return _load(model, engine, precision)
    dtype = PRECISIONS[precision]
    copied = model.fuse() if isinstance(model, SparseViT) else copy.deepcopy(model)
    copied = copied.to(dtype).eval()
    module: Any
    for module in copied.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused_attention
    call: Engine = copied
    if engine == "compile":
        # Weights become constants of the program, laid out as its kernels like them.
        options: dict[str, Any] = {"triton.cudagraphs": True}
        if device.type == "cpu":
            options = {"freezing": True}
        call = torch.compile(copied, fullgraph=True, dynamic=False, options=options)

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        logits: Tensor = call(images.to(dtype))
        return logits

    return run


def _load(model: nn.Module, engine: str, precision: str) -> Engine:
    """By way of a file, which does not stay."""
    suffix, _ = export.FORMATS[engine]
    reference = copy.deepcopy(model).cpu().float().eval()
    program = export.trace(reference, torch.float32)
    metadata = json.dumps({"precision": precision})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        write = export.write_onnx if engine == "onnx" else export.write_openvino
        write(program, path, metadata, 18, None)
        return export.LOADERS[engine](path, precision)
