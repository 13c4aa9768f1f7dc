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
    if engine not in _FILES:
        return _call(_convert(model, precision, fused_attention), engine, precision)
    with tempfile.TemporaryDirectory() as folder:  # the file does not stay
        return load(save(model, engine, precision, Path(folder)), engine, precision)


def save(
    model: nn.Module, engine: str, precision: str, folder: Path, fused_attention: bool = True
) -> Path:
    """Write what `load` makes an engine of, for another process. Arguments as for `build`."""
    if engine not in _FILES:
        path = folder / "model.pt"
        torch.save(_convert(model, precision, fused_attention), path)
        return path
    path = folder / f"model{export.FORMATS[engine][0]}"
    reference = copy.deepcopy(model).cpu().float().eval()
    program = export.trace(reference, torch.float32)
    metadata = json.dumps({"precision": precision})
    write = export.write_onnx if engine == "onnx" else export.write_openvino
    write(program, path, metadata, 18, None)
    return path


def load(path: Path, engine: str, precision: str) -> Engine:
    """What `save` wrote, as `build` would give it. Runs the file's code: for files of `save`."""
    if engine in _FILES:
        return export.LOADERS[engine](path, precision)
    return _call(torch.load(path, weights_only=False), engine, precision)


_FILES = ("onnx", "openvino")


def _convert(model: nn.Module, precision: str, fused_attention: bool) -> nn.Module:
    copied = model.fuse() if isinstance(model, SparseViT) else copy.deepcopy(model)
    copied = copied.to(PRECISIONS[precision]).eval()
    module: Any
    for module in copied.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused_attention
    return copied


def _call(model: nn.Module, engine: str, precision: str) -> Engine:
    dtype = PRECISIONS[precision]
    call: Engine = model
    if engine == "compile":
        # Weights become constants of the program, laid out as its kernels like them.
        options: dict[str, Any] = {"triton.cudagraphs": True}
        if next(model.parameters()).device.type == "cpu":
            options = {"freezing": True}
        call = torch.compile(model, fullgraph=True, dynamic=False, options=options)

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        logits: Tensor = call(images.to(dtype))
        return logits

    return run
