"""A model as a program, and the program as a file of each format."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dynamicvit.core.model import SparseViT
from dynamicvit.core.paths import Path as TokenPath
from dynamicvit.core.paths import Pruned, keep_tokens
from dynamicvit.core.selectors import Selector, Stage
from dynamicvit.core.tokens import Tokens, gather_tokens, squeeze
from dynamicvit.deploy.formats import COUNTS, CUT, KEY
from dynamicvit.evaluation.setup import input_size, token_counts

OPSET = 18  # of ONNX: the first that torch's exporter gives, which most engines read
_EXAMPLE = 2  # images in the example that is traced; at 0 or 1 the batch would become fixed
# Loggers of modules that compilers and exporters import, whose warnings no user can act on.
_TALKERS = ("torch.utils.cpp_extension", "onnxscript.optimizer._constant_folding")
Quantize = Callable[[Any, list[str]], Any]  # a model, names of nodes that stay → it in int8

# What a file says of itself in a viewer such as Netron.
_SUMMARY = (
    "A vision transformer, written by dynamicvit. How to prepare images, the class names and more "
    f"lie in the metadata under the key {KEY}, as JSON."
)


# A model → a program.


class _GivenCounts(TokenPath):
    """The pruned path with the counts to keep as a tensor, [S] int64: an input of the file.

    Attributes:
        first: tokens [B, P + N, C] and scores [B, N] at the first stage.
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts
        self.first: tuple[Tensor, ...] = ()

    def apply(self, stage: Stage, selector: Selector) -> tuple[Tokens, Tensor | None]:
        tokens = stage.tokens
        count = cast(int, self.counts[stage.number].item())
        torch._check(count >= 1)
        torch._check(count <= tokens.num_patches)
        scores = cast(Tensor, selector(tokens.patches, None, stage))
        self.first = self.first or (tokens.x, scores)
        if not stage.squeeze:
            return keep_tokens(stage, scores.topk(count, dim=1, sorted=False).indices), scores
        order = scores.topk(tokens.num_patches, dim=1).indices
        kept = tokens.take(order[:, :count], stage.adapter.depth(stage.model) - stage.block)
        leaving = gather_tokens(tokens.patches, order[:, count:])  # none, where all stay
        return kept.with_patches(squeeze(kept.patches, leaving)), scores


class _Graph(nn.Module):
    """Images → logits, and of a sparse model each stage's kept tokens; float32 outside, `dtype`
    inside."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor, counts: Tensor | None = None) -> tuple[Tensor, ...]:
        images = images.to(self.dtype)
        if not isinstance(self.model, SparseViT):
            return (self.model(images).float(),)
        path: Any = Pruned(trace=True) if counts is None else _GivenCounts(counts)
        final, choices = self.model.run(images, path)
        kept = (cast(Tensor, choice.kept) for choice in choices)
        between = () if counts is None else path.first
        return self.model.forward_head(final.x).float(), *kept, *between


def check_exports(model: nn.Module) -> None:
    """Raise ValueError if a model's selectors merge tokens or draw lots."""
    for scorer in getattr(model, "scorers", ()):
        if scorer.merges or scorer.random:
            raise ValueError(
                "model must have a deterministic selector that drops tokens to be exported, got "
                f"{type(scorer).__name__}"
            )


def trace(
    model: nn.Module, dtype: torch.dtype, free_counts: bool = False
) -> torch.export.ExportedProgram:
    """A copy of the model as a program with a free batch size.

    Args:
        model: sparse or dense.
        dtype: that it computes in.
        free_counts: of a sparse model, how many tokens each stage keeps is a second input.

    Raises:
        ValueError: as `check_exports`.
    """
    check_exports(model)
    inner = model.fuse() if isinstance(model, SparseViT) else copy.deepcopy(model)
    graph = _Graph(inner, dtype).eval().requires_grad_(False)
    example = [torch.zeros(_EXAMPLE, *input_size(model))]
    shapes: dict[str, Any] = {"images": {0: torch.export.Dim("batch", min=1)}}
    if free_counts and isinstance(model, SparseViT):
        example.append(torch.tensor(token_counts(model)[1:]))
        shapes[COUNTS] = None
    with quiet():
        try:
            # Running the model takes half the time that reading its code (strict) takes.
            program = torch.export.export(graph, (*example,), dynamic_shapes=shapes, strict=False)
        except Exception:  # such as len(images) in a model's code, which would fix the batch
            program = torch.export.export(graph, (*example,), dynamic_shapes=shapes, strict=True)
    for node in program.graph.nodes:  # where on this machine the source files lie
        node.meta.pop("stack_trace", None)
    return program


# A program → a file. torch's own archive writer ends the process where the disk is full, so it is
# given memory to write to.


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: str,
    quantize: Quantize | None = None,
) -> None:
    import onnx

    model = _to_onnx(program).model_proto
    if quantize is not None:
        model = quantize(model, _scorer_nodes(model))
    described = json.loads(metadata)
    if len(model.graph.input) > 1:  # a constant of an input's name is the input's default
        counts = np.array(described["kept_counts"], np.int64)
        model.graph.initializer.append(onnx.numpy_helper.from_array(counts, COUNTS))
        for value in model.graph.output[-len(CUT) :]:  # names inside the graph, not outputs
            model.graph.value_info.append(value)
            model.graph.output.remove(value)
    for node in model.graph.node:
        del node.metadata_props[:]  # where in the source it came from
    model.doc_string = _SUMMARY
    for name, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        for value in values:
            if value.name != COUNTS:
                value.type.tensor_type.shape.dim[0].dim_param = "batch"
            value.doc_string = described.get(name, {}).get(value.name, "")
    _name_axes(model.graph)
    onnx.helper.set_model_props(model, {KEY: metadata})
    path.write_bytes(model.SerializeToString())


def _name_axes(graph: Any) -> None:
    """Call the number of tokens kept by its output, kept_1_count, instead of the exporter's u0."""
    axes = {
        axis.dim_param: f"{value.name}_count"
        for value in graph.output
        for axis in value.type.tensor_type.shape.dim[1:2]
        if axis.dim_param
    }
    for value in (*graph.value_info, *graph.output):
        for axis in value.type.tensor_type.shape.dim:
            for symbol, name in axes.items():
                axis.dim_param = re.sub(rf"\b{symbol}\b", name, axis.dim_param)


def write_openvino(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: str,
    quantize: Quantize | None = None,
) -> None:
    import openvino

    # By way of ONNX, which keeps the fixed image size and the names of inputs and outputs.
    between = path.with_suffix(".onnx")
    converted = _to_onnx(program)
    converted.save(str(between), external_data=True)
    model = openvino.convert_model(between)
    if quantize is not None:
        leave = set(_scorer_nodes(converted.model_proto))
        # Of one ONNX node it may make several: NODE, NODE/WithoutBiases.
        names = [operation.get_friendly_name() for operation in model.get_ops()]
        model = quantize(model, [name for name in names if name.partition("/")[0] in leave])
    described = json.loads(metadata)
    half = described["precision"] in ("float16", "bfloat16")
    model.input("images").get_node().set_layout(openvino.Layout("NCHW"))
    if len(model.inputs) > 1:
        for name in CUT:  # it stays the name of a tensor
            model.remove_result(model.output(name).get_node())
    model.set_rt_info(metadata, KEY)
    model.set_rt_info(_SUMMARY, "description")
    for kind in ("inputs", "outputs"):
        for name, text in described.get(kind, {}).items():
            model.set_rt_info(text, [kind, name])
    try:
        openvino.save_model(model, path, compress_to_fp16=half)
    except RuntimeError as error:
        raise OSError(str(error)) from error


def write_torch(program: torch.export.ExportedProgram, path: Path, metadata: str) -> None:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={KEY: metadata})
    path.write_bytes(buffer.getvalue())


def write_aoti(program: torch.export.ExportedProgram, path: Path, metadata: str) -> None:
    from torch._inductor import aoti_compile_and_package, exc

    buffer = io.BytesIO()
    configs = {"aot_inductor.metadata": {KEY: metadata}}
    try:
        with quiet():
            aoti_compile_and_package(program, package_path=buffer, inductor_configs=configs)
    except (exc.InvalidCxxCompiler, exc.CppCompileError) as error:
        raise ValueError(f"format 'aoti' needs a C++ compiler that works: {error}") from error
    path.write_bytes(buffer.getvalue())


def _to_onnx(program: torch.export.ExportedProgram) -> Any:
    """A program as ONNX. One that takes counts also gives what is named in `CUT`."""
    inputs = ["images", COUNTS][: len(program.graph_signature.user_inputs)]
    cut = CUT if COUNTS in inputs else ()
    stages = range(1, len(program.graph_signature.user_outputs) - len(cut))
    outputs = ["logits", *(f"kept_{stage}" for stage in stages), *cut]
    with quiet():
        return torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        )


def quantize(
    inputs: Sequence[dict[str, np.ndarray]],
    report: Callable[..., None],
    model: Any,
    leave: list[str],
) -> Any:
    """Static quantisation to int8 by NNCF, with value ranges measured on images.

    Args:
        inputs: of the model by their names, with one image each.
        report: called with each step.
        model: an ONNX or OpenVINO model.
        leave: names of the nodes that stay as they are.
    """

    def take(index: int) -> dict[str, Any]:
        step = f"measuring value ranges on {len(inputs)} images"
        report(step, f"(image {index + 1}, in one of several passes)")
        return inputs[index]

    # NNCF's own bars would go to stdout.
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        import nncf

        nncf.set_log_level(logging.ERROR)
        return nncf.quantize(
            model,
            nncf.Dataset(range(len(inputs)), take),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(inputs),
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


@contextmanager
def quiet() -> Iterator[None]:
    """Without what compilers and exporters say to their own developers, and that there is no GPU to
    compile for."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
