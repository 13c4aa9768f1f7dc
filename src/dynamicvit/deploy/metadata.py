"""What an exported file says of itself: how to prepare images, and what its outputs are."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import create_transform, resolve_input_data_config
from torch import nn

from dynamicvit import __version__
from dynamicvit.core.model import SparseViT
from dynamicvit.deploy.formats import KEY, OPENVINO_HINTS, require
from dynamicvit.evaluation.evaluate import backbone_of, token_counts
from dynamicvit.io.images import MODES

# How `resize` is reached, by timm's word for it.
_FITS = {"squash": "stretch", "border": "contain"}


def describe(model: nn.Module, names: list[str], format: str, precision: str) -> dict[str, Any]:
    """The metadata of a file, as `read_metadata` gives it."""
    backbone: Any = backbone_of(model)
    data = resolve_input_data_config(backbone)
    channels = data["input_size"][0]
    # The first step resizes. Its `size` is one number where the shorter side is made as long.
    resize = create_transform(**data, is_training=False).transforms[0].size
    described = {
        "version": __version__,
        "architecture": backbone.pretrained_cfg.get("architecture"),
        "precision": precision,
        "input_size": data["input_size"],
        "channels": MODES[channels],
        "resize": [resize, resize] if isinstance(resize, int) else list(resize),
        "fit": _FITS.get(data["crop_mode"], "cover"),
        "crop": data["input_size"][1:],
        "value_range": [0.0, 1.0],
        **{key: data[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
        "layout": "NCHW",
        "dtype": "float32",
        "class_names": names,
    }
    outputs = {"logits": "float32 [batch, classes], in the order of class_names; softmax of them "
               "gives probabilities"}
    if isinstance(model, SparseViT):
        counts = token_counts(model)
        described |= {
            "blocks": model.schedule.blocks,
            "ratios": model.schedule.ratios,
            "kept_counts": counts[1:],
        }
        for stage, (block, count) in enumerate(zip(model.schedule.blocks, counts[1:], strict=True), 1):
            outputs[f"kept_{stage}"] = (
                f"int64 [batch, {count}], which patch tokens go on before block {block}: their "
                f"positions among the image's {counts[0]}, row by row, in no particular order"
            )
    size = " × ".join(map(str, data["input_size"]))
    described["inputs"] = {
        "images": f"float32 [batch, {size.replace(' × ', ', ')}] ({MODES[channels]}), values from 0 "
        "to 1, minus mean, divided by std"
    }
    described["outputs"] = outputs
    if format == "openvino":
        described["inference_precision"] = OPENVINO_HINTS[precision]
    return described
