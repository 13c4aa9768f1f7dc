"""What an exported file says of itself: how to prepare images, and what its outputs are."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any, cast

from timm.data import create_transform, resolve_input_data_config
from torch import nn

from dynamicvit import __version__
from dynamicvit.core.model import SparseViT
from dynamicvit.deploy.formats import COUNTED, COUNTS, KEY, OPENVINO_HINTS, require
from dynamicvit.deploy.runtime import openvino_core
from dynamicvit.evaluation.setup import token_counts
from dynamicvit.io.images import MODES

# How `resize` is reached, by timm's word for it.
_FITS = {"squash": "stretch", "border": "contain"}


def describe(model: nn.Module, names: list[str], format: str, precision: str) -> dict[str, Any]:
    """The metadata of a file, as `read_metadata` gives it."""
    data = resolve_input_data_config(model)
    size = ", ".join(map(str, data["input_size"]))
    images = (
        f"float32 [batch, {size}] ({MODES[data['input_size'][0]]}), values from 0 "
        "to 1, minus mean, divided by std"
    )
    logits = (
        "float32 [batch, classes], in the order of class_names; softmax of them gives probabilities"
    )
    described = {
        "version": __version__,
        "architecture": cast(Any, model).pretrained_cfg.get("architecture"),
        "precision": precision,
        **_describe_preparation(data),
        "class_names": names,
        "inputs": {"images": images},
        "outputs": {"logits": logits},
    }
    if isinstance(model, SparseViT):
        described |= _describe_schedule(model)
        described["inputs"] |= _describe_counts(model, format)
        described["outputs"] |= _describe_kept(model, format)
    if format == "openvino":
        described["inference_precision"] = OPENVINO_HINTS[precision]
    return described


def _describe_preparation(data: dict[str, Any]) -> dict[str, Any]:
    """How to prepare an image, from timm's data config."""
    # The first step resizes. Its `size` is one number where the shorter side is made as long.
    resize = create_transform(**data, is_training=False).transforms[0].size
    return {
        "input_size": data["input_size"],
        "channels": MODES[data["input_size"][0]],
        "resize": [resize, resize] if isinstance(resize, int) else list(resize),
        "fit": _FITS.get(data["crop_mode"], "cover"),
        "crop": data["input_size"][1:],
        "value_range": [0.0, 1.0],
        **{key: data[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
        "layout": "NCHW",
        "dtype": "float32",
    }


def _describe_schedule(model: SparseViT) -> dict[str, Any]:
    """Which stages keep how many tokens, and the levels where each image has its own budget."""
    start, *kept = token_counts(model)
    described: dict[str, Any] = {
        "blocks": model.schedule.blocks,
        "ratios": model.schedule.ratios,
        "kept_counts": kept,
    }
    if model.levels is not None:
        described["levels"] = {
            "bounds": model.levels.bounds,
            "counts": [schedule.counts(start) for schedule in model.levels.schedules],
            "difficulty": "the mean over an image's scores of 1 / (1 + exp(-score))",
            "rule": "an image's level is how many bounds are not above its difficulty",
        }
    return described


def _describe_counts(model: SparseViT, format: str) -> dict[str, str]:
    """The input `counts`, of files that have it."""
    if format not in COUNTED:
        return {}
    default = "by default kept_counts" if format == "onnx" else "kept_counts is what it is for"
    return {
        COUNTS: f"int64 [{len(model.schedule.blocks)}], how many patch tokens each stage keeps: "
        f"from 1 to {token_counts(model)[0]}, not growing; {default}"
    }


def _describe_kept(model: SparseViT, format: str) -> dict[str, str]:
    """The outputs `kept_1`, `kept_2` and so on, one a stage."""
    start, *counts = token_counts(model)
    described = {}
    for stage, (block, count) in enumerate(zip(model.schedule.blocks, counts, strict=True), 1):
        kept = f"{COUNTS}[{stage - 1}]" if format in COUNTED else count
        described[f"kept_{stage}"] = (
            f"int64 [batch, {kept}], which patch tokens go on before block {block}: their "
            f"positions among the image's {start}, row by row, in no particular order"
        )
    return described


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `export_model` wrote into a file beside the model; no code of the file is run.

    Returns:
        - `version` of this package, `architecture`, `precision`, `input_size` [C, H, W],
          `class_names`; of a sparse model `blocks`, `ratios` and `kept_counts`; for OpenVINO
          `inference_precision`.
        - `levels`, if each image has its own budget: `bounds` of difficulty between levels,
          `counts` of each, and in words `difficulty` and `rule`.
        - How to prepare an image, in this order: `channels` (Pillow's mode), `resize` [H, W] with
          `fit` (cover: the sides keep their ratio and are at least as long; contain: at most as
          long; stretch: just as long) and `interpolation`, `crop` [H, W] of the centre,
          `value_range`, `mean`, `std`, `layout`, `dtype`. timm's names `crop_pct` and `crop_mode`
          say the same.
        - `inputs` and `outputs`: name → what it is. `kept_counts` is the default of the input
          `counts`: ONNX files hold it, OpenVINO files must be given it. Files of earlier versions
          have no such descriptions, and one output `kept` with all stages in a row.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an export of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no exported model at {path}")
    require(path.suffix, {".onnx": ["onnx"], ".xml": ["openvino"]}.get(path.suffix, []))
    try:
        if path.suffix == ".onnx":
            import onnx

            properties = onnx.load(str(path), load_external_data=False).metadata_props
            text = next(item.value for item in properties if item.key == KEY)
        elif path.suffix == ".xml":
            text = openvino_core().read_model(path).get_rt_info(KEY).value
        else:
            with zipfile.ZipFile(path) as archive:
                text = _read_archive(archive)
        return cast(dict[str, Any], json.loads(text))
    except Exception as error:  # foreign bytes make parsers raise nearly anything
        raise ValueError(f"{path} is not a model that dynamicvit exported") from error


def _read_archive(archive: zipfile.ZipFile) -> str:
    """The metadata of a torch.export program or an AOTInductor package."""
    for name in archive.namelist():
        if name.endswith(f"/extra/{KEY}"):
            return archive.read(name).decode()
        if "/aotinductor/" in name and name.endswith("_metadata.json"):
            return cast(str, json.loads(archive.read(name))[KEY])
    raise KeyError(KEY)
