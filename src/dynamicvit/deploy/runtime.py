"""Run an exported file with a budget for each image.

This module needs NumPy and the file's engine only, so it can be copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Part = Callable[..., list[np.ndarray]]


class PerImage:
    """An ONNX or OpenVINO file of a model with a budget for each image.

    The file is cut before its first stage. The first part gives the tokens that arrive there and
    their scores. These say which level an image gets, that is, how many patches each stage keeps of
    it. Images of one level go through the second part together.

    Args:
        path: the file, .onnx or .xml.
        options: as `onnxruntime.InferenceSession` or OpenVINO's `compile_model` takes them.

    Attributes:
        about: the file's metadata.

    Raises:
        ValueError: if the file's model has one budget for all images.
    """

    def __init__(self, path: str, options: Any = None) -> None:
        cut = cut_onnx if str(path).endswith(".onnx") else cut_openvino
        self.about, self._first, self._second = cut(str(path), options)
        if "levels" not in self.about:
            raise ValueError(f"path must be a file of a model with per_image=True, got {path}")

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classify.

        Args:
            images: [B, C, H, W] float32, prepared as the metadata says.

        Returns:
            Logits, [B, classes] float32, and the level of each image, [B] int64. Level 0 keeps the
            fewest patches.
        """
        tokens, scores = self._first({"images": images})
        levels = self.about["levels"]
        difficulty = (1 / (1 + np.exp(-scores.astype(np.float32)))).mean(axis=1)
        level = np.searchsorted(np.float32(levels["bounds"]), difficulty, side="right")
        logits = np.empty((len(images), len(self.about["class_names"])), np.float32)
        for number, counts in enumerate(levels["counts"]):
            rows = np.flatnonzero(level == number)
            if len(rows):
                inputs = {"tokens": tokens[rows], "scores": scores[rows]}
                # The second part reads only the number of these images.
                inputs |= {"images": images[: len(rows)], "counts": np.array(counts)}
                [logits[rows]] = self._second(inputs)
        return logits, level


def cut_onnx(path: str, options: Any = None) -> tuple[dict[str, Any], Part, Part]:
    """The metadata of an ONNX file, and its two parts."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    about = {item.key: item.value for item in model.metadata_props}["dynamicvit"]
    for item in [item for item in model.graph.initializer if item.name == "counts"]:
        model.graph.initializer.remove(item)  # the default: counts are always given here
    extract = onnx.utils.Extractor(model).extract_model

    def compile(inputs: list[str], outputs: list[str]) -> Part:
        part = extract(inputs, outputs).SerializeToString()
        session = onnxruntime.InferenceSession(part, options, providers=["CPUExecutionProvider"])
        return lambda given: session.run(outputs, given)

    first = compile(["images"], ["tokens", "scores"])
    second = compile(["images", "tokens", "scores", "counts"], ["logits"])
    return json.loads(about), first, second


@cache
def openvino_core() -> Any:
    """OpenVINO's core, the same one for the whole process.

    On processors with AMX a core moves the stack on which signals are handled. Cores that end may
    leave it in memory that was freed, and then the next signal ends the process
    (docs/openvino-signal-stack.md).
    """
    import openvino

    return openvino.Core()


def cut_openvino(path: str, options: Any = None) -> tuple[dict[str, Any], Part, Part]:
    """The metadata of an OpenVINO file, and its two parts."""
    import openvino

    core = openvino_core()
    model = core.read_model(path)
    about = json.loads(model.get_rt_info("dynamicvit").value)
    options = {"INFERENCE_PRECISION_HINT": about["inference_precision"]} | (options or {})
    ports = [port for node in model.get_ops() for port in node.outputs()]
    names = ("tokens", "scores")
    cut = [next(port for port in ports if name in port.get_names()) for name in names]

    def compile(outputs: list[Any], inputs: list[Any]) -> Part:
        compiled = core.compile_model(openvino.Model(outputs, inputs), "CPU", options)
        return lambda given: list(compiled(given).values())

    parameters = model.get_parameters()
    first = compile(cut, [model.input("images").get_node()])
    for port, name in zip(cut, names, strict=True):
        parameter = openvino.opset13.parameter(
            port.get_partial_shape(), port.get_element_type(), name
        )
        parameter.output(0).set_names({name})
        for target in port.get_target_inputs():
            target.replace_source_output(parameter.output(0))
        parameters.append(parameter)
    second = compile([model.output("logits").get_node().input_value(0)], parameters)
    return about, first, second
