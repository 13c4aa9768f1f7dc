"""A model in the engines of this machine, each as a function from images to logits."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynamicvit.core.model import SparseViT
from dynamicvit.deploy import formats, writers
from dynamicvit.deploy.packed import can_pack, pack
from dynamicvit.evaluation.processor import has_bfloat16
from dynamicvit.evaluation.setup import token_counts
from dynamicvit.evaluation.timing import Engine
from dynamicvit.io.files import write_bytes

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Every engine has the first; the second is tried where engine and processor have it.
DEFAULT_PRECISIONS = ("float32", "bfloat16")
# The packages that an engine takes, and the precisions it computes in on a CPU.
ENGINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "eager": ((), ("float32", "bfloat16")),
    "packed": ((), ("float32", "bfloat16")),
    "compile": ((), ("float32", "bfloat16")),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), ("float32",)),
    "openvino": (("onnx", "onnxscript", "openvino"), ("float32", "bfloat16")),
}
GPU_ENGINES = ("eager", "compile")  # which compute on a GPU too, in every precision
TORCH_ENGINES = (*GPU_ENGINES, "packed")


def installed(engine: str) -> bool:
    """Whether the packages that an engine takes are there."""
    if engine == "packed" and not can_pack():
        return False
    return all(importlib.util.find_spec(package) for package in ENGINES[engine][0])


def check_engine(engine: str, precision: str, device: str = "cpu") -> None:
    """Raise ValueError unless this machine has the engine, and the engine the precision."""
    if engine not in ENGINES:
        raise ValueError(f"engines must be of {', '.join(ENGINES)}, got {engine!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precisions must be of {', '.join(PRECISIONS)}, got {precision!r}")
    gpu = device != "cpu"
    if gpu and engine not in GPU_ENGINES:
        raise ValueError(f"engine {engine!r} computes on the CPU here, got device {device!r}")
    if engine == "packed" and not can_pack():
        raise ValueError("engine 'packed' needs a torch with MKL and oneDNN")
    if not installed(engine):
        raise ValueError(f"engine {engine!r} needs the extra: pip install 'dynamicvit[export]'")
    if not gpu and precision not in ENGINES[engine][1]:
        raise ValueError(f"engine {engine!r} does not compute in {precision} here")
    if engine == "openvino":
        formats.check_openvino(precision)
    elif not gpu and precision == "bfloat16" and not has_bfloat16():
        raise ValueError(f"this processor has no bfloat16, got it for engine {engine!r}")


def available(engine: str, precision: str, device: str = "cpu") -> bool:
    """Whether `check_engine` raises nothing."""
    try:
        check_engine(engine, precision, device)
    except ValueError:
        return False
    return True


def check_engines(
    engines: Sequence[str] | None, precisions: Sequence[str] | None, device: str
) -> None:
    """Check what a user asks for: names that there are, and that go together on this machine.

    Args:
        engines: keys of `ENGINES`; None for all.
        precisions: keys of `PRECISIONS`; None for those of `DEFAULT_PRECISIONS` that there are.
        device: as for `check_engine`.

    Raises:
        TypeError: if either is not a list of names.
        ValueError: if either is empty; where an engine has none of the precisions, or a precision
            no engine.
    """
    for name, given, known in (
        ("engines", engines, ENGINES),
        ("precisions", precisions, PRECISIONS),
    ):
        if given is None:
            continue
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"{name} must be a list of names, got {given!r}")
        if not given:
            raise ValueError(f"{name} must be one or more of {', '.join(known)}, got {given!r}")
    wanted = precisions or DEFAULT_PRECISIONS[:1]
    for precision in wanted:
        if not any(available(engine, precision, device) for engine in engines or ENGINES):
            check_engine(engines[0] if engines else "eager", precision, device)
    for engine in engines or ():
        if not any(available(engine, precision, device) for precision in wanted):
            check_engine(engine, wanted[0], device)


def first_line(error: BaseException) -> str:
    """What an engine that failed said first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def build(model: nn.Module, engine: str, precision: str, fused_attention: bool = True) -> Engine:
    """The model, copied, in an engine: images [B, C, H, W] → logits [B, num_classes].

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
    if engine in TORCH_ENGINES:
        return _call(_convert(model, precision, fused_attention), engine, precision)
    with tempfile.TemporaryDirectory() as folder:  # the file does not stay
        return load(save(model, engine, precision, Path(folder)), engine, precision)


def save(
    model: nn.Module, engine: str, precision: str, folder: Path, fused_attention: bool = True
) -> Path:
    """Write what `load` makes an engine of, for another process. Arguments as for `build`."""
    if engine in TORCH_ENGINES:
        path = folder / "model.pt"
        buffer = io.BytesIO()  # torch's own writer ends the process where the disk is full
        torch.save(_convert(model, precision, fused_attention), buffer)
        write_bytes(path, buffer.getvalue())
        return path
    path = folder / f"model{formats.FORMATS[engine][0]}"
    reference = copy.deepcopy(model).cpu().float().eval()
    program = writers.trace(reference, torch.float32, free_counts=True)
    metadata = json.dumps({"precision": precision, "kept_counts": token_counts(model)[1:]})
    write = writers.write_onnx if engine == "onnx" else writers.write_openvino
    write(program, path, metadata)
    return path


def load(path: Path, engine: str, precision: str) -> Engine:
    """What `save` wrote, as `build` would give it. Runs the file's code: for files of `save`."""
    if engine in TORCH_ENGINES:
        return _call(torch.load(path, weights_only=False), engine, precision)
    return formats.LOADERS[engine](path, precision)


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
    if engine == "compile":
        return _compile(model, dtype, next(model.parameters()).device)
    if engine == "packed":
        model = pack(model)

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        logits: Tensor = model(images.to(dtype))
        return logits

    return run


def _compile(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Engine:
    """One program for each shape of images, compiled when it first comes.

    On a CPU it is frozen: weights are constants, packed once for the kernels that read them.
    """
    from torch._inductor import config  # not imported with torch, and not quickly

    gpu = device.type == "cuda"
    options: dict[str, Any] = {"triton.cudagraphs": True} if gpu else {}
    programs: dict[torch.Size, Engine] = {}

    def compile(shape: torch.Size) -> Engine:
        def forward(images: Tensor) -> Any:
            return model(images)

        # torch compiles the same code object eight times at most, and all models of a class
        # share theirs: so each program has one of its own.
        forward.__code__ = forward.__code__.replace()
        programs[shape] = torch.compile(forward, fullgraph=True, dynamic=False, options=options)
        return programs[shape]

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        inputs = images.to(dtype)
        if images.shape in programs:
            logits: Tensor = programs[images.shape](inputs)
        else:
            # Not one of the options: those do not reach the part of torch that decides whether
            # weights become constants or inputs.
            with config.patch(freezing=not gpu), writers.quiet():
                logits = compile(images.shape)(inputs)
        # The next replay of any CUDA graph writes where this one's output lies.
        return logits.clone() if gpu else logits

    return run
