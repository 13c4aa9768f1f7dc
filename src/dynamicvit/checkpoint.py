"""Weights from elsewhere: model folders and hub ids, and the released DynamicViT files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dynamicvit.core.folder import CONFIG, WEIGHTS
from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule


def load(folder_or_hub_id: str | os.PathLike[str]) -> nn.Module:
    """Load a saved model, ready to classify: `dynamicvit.load(...)(images)`.

    Args:
        folder_or_hub_id: a folder written by `save_pretrained`, or a Hugging Face Hub id
            ("owner/name") holding the same two files.

    Returns:
        A SparseViT, or the dense timm model if the folder holds one; float32, in eval mode.

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks a file.
        ValueError: if a file is damaged or does not fit, saying what is wrong where.
    """
    path = Path(folder_or_hub_id)
    hub_id = str(folder_or_hub_id)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) or hub_id.startswith("."):
        return load_folder(path)
    try:
        return load_folder(snapshot_download(hub_id, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no folder {hub_id!r} here, and the hub has no such model or cannot be reached: "
            f"{error}"
        ) from error


def load_model(name: str, pretrained: bool = True, **model_kwargs: Any) -> Any:
    """A model folder, a hub id "owner/name", or a timm model.

    Args:
        name: what to load.
        pretrained: for a timm name: load timm's pretrained weights.
        model_kwargs: for a timm name: passed to `timm.create_model`.

    Raises:
        FileNotFoundError, ValueError: if nothing of that name exists, or it cannot be loaded.
    """
    if not timm.is_model(name) or Path(name).exists():
        if "/" not in name and not Path(name).exists():
            close = timm.list_models(f"*{name}*")[:3]
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"model must be a folder, a hub id or a timm name, got {name!r}{hint}")
        if model_kwargs:
            raise ValueError(f"model_kwargs are for timm names, not for {name}: got {model_kwargs}")
        return load(name)
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, **model_kwargs)
    except (TypeError, AssertionError, RuntimeError, OSError) as error:
        raise ValueError(
            f"timm cannot create {name!r} (pretrained={pretrained}): {error}"
        ) from error
    if not pretrained:  # these describe timm's weights, which this model does not have
        for key in ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes"):
            model.pretrained_cfg.pop(key, None)
    return model


def load_folder(folder: str | os.PathLike[str]) -> nn.Module:
    """Read what `save_folder` wrote: a SparseViT, or the dense timm model; in eval mode.

    Weights are read with safetensors, into float32.

    Raises:
        FileNotFoundError: if the folder or one of its two files is missing.
        ValueError: if a file is damaged or the two do not fit, saying what is wrong where.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a model folder: it has no {name}")
    where = folder / CONFIG
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{where} names no architecture")
    if not timm.is_model(config["architecture"]):
        raise ValueError(f"{where}: timm has no architecture {config['architecture']!r}")
    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}")
    except Exception as error:  # whatever a strange value makes timm stumble over
        raise ValueError(f"{where}: timm cannot build this model: {error}") from error
    if "dynamicvit" in config:
        sparse = config["dynamicvit"]
        if not isinstance(sparse, dict) or not {"blocks", "ratios"} <= sparse.keys():
            raise ValueError(f"{where}: 'dynamicvit' must hold blocks and ratios, got {sparse!r}")
        try:
            model = SparseViT(model, KeepSchedule(sparse["blocks"], sparse["ratios"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or not safetensors: {error}") from error
    load_strictly(model, tensors, str(folder / WEIGHTS))
    return model.eval()


def load_strictly(
    model: nn.Module,
    tensors: dict[str, Tensor],
    source: str,
    name: Callable[[str], str] = str,
) -> None:
    """Load weights, or raise ValueError listing every key that does not match, named by `name`."""
    expected = model.state_dict()
    problems = [f"missing {name(key)}" for key in expected if key not in tensors]
    problems += [f"unexpected {name(key)}" for key in tensors if key not in expected]
    problems += [
        f"{name(key)} has shape {tuple(tensors[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model: " + "; ".join(problems))
    model.load_state_dict(tensors)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or torch file, without running code from it.

    The weights may lie under `state_dict_ema`, `model_ema`, `state_dict` or `model`, in this order.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds pickled objects other than tensors, or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        weights: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # foreign bytes make the readers raise nearly anything
        raise ValueError(
            f"{path} is damaged, not a weights file, or holds other objects than tensors, "
            f"which could run code and are refused"
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
            break
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{path} holds no state dict")
    return weights


def from_released(
    state_dict: dict[str, Any] | str | os.PathLike[str],
    schedule: KeepSchedule | None = None,
    num_heads: int | None = None,
) -> SparseViT:
    """A SparseViT from the weights that the DynamicViT authors released (arXiv 2106.02034).

    Architecture sizes are read from the weights.

    Args:
        state_dict: the released state dict, or one that holds it under `model`, or a file of it.
            Scorer keys are `score_predictor.{stage}.in_conv.*` and `.out_conv.*`.
        schedule: the stages; by default the paper's at keep ratio 0.7.
        num_heads: attention heads, which weights do not tell; by default width // 64.

    Returns:
        The model, float32, in eval mode.

    Raises:
        FileNotFoundError: if a file is named and absent.
        TypeError, ValueError: if the weights are not of this format, listing each key.
    """
    source, released = "state_dict", state_dict
    if isinstance(released, str | os.PathLike):
        source, released = str(released), read_weights(released)
    if not isinstance(released, dict):
        raise TypeError(f"state_dict must be a dict or a path, got {type(released).__name__}")
    if isinstance(released.get("model"), dict):
        released = released["model"]
    not_tensors = [
        str(key)
        for key, value in released.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if not_tensors:
        raise ValueError(f"{source} must hold tensors alone, got others at {not_tensors[:5]}")
    weights = {_rename(key): value.float() for key, value in released.items()}
    needed = {"patch_embed.proj.weight": 4, "pos_embed": 3, "cls_token": 3, "head.weight": 2}
    needed |= {"blocks.0.attn.qkv.weight": 2, "blocks.0.mlp.fc1.weight": 2}
    missing = [key for key in needed if f"backbone.{key}" not in weights]
    if missing:
        raise ValueError(f"{source} is not a released DeiT-like DynamicViT: it has no {missing}")

    def shape(key: str) -> torch.Size:
        return weights[f"backbone.{key}"].shape

    for key, axes in needed.items():
        if len(shape(key)) != axes or 0 in shape(key):
            raise ValueError(f"{source}: {key} must have {axes} axes, got {tuple(shape(key))}")

    width, channels, patch_h, patch_w = shape("patch_embed.proj.weight")
    distilled = "backbone.dist_token" in weights
    positions = shape("pos_embed")[1] - 1 - distilled
    grid = math.isqrt(max(positions, 0))
    if grid == 0 or grid * grid != positions:
        raise ValueError(f"{source}: pos_embed {tuple(shape('pos_embed'))} is not a square grid")
    depth = 1
    while any(key.startswith(f"backbone.blocks.{depth}.") for key in weights):
        depth += 1
    heads = num_heads if num_heads is not None else max(1, width // 64)
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(f"num_heads must be an integer, got {heads!r}")
    if heads < 1 or width % heads:
        raise ValueError(f"num_heads must divide the width {width}, got {heads}")
    backbone = timm.create_model(
        f"deit_small_{'distilled_' if distilled else ''}patch16_224",
        img_size=(grid * patch_h, grid * patch_w),
        patch_size=(patch_h, patch_w),
        in_chans=channels,
        num_classes=shape("head.weight")[0],
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=shape("blocks.0.mlp.fc1.weight")[0] / width,
        qkv_bias="backbone.blocks.0.attn.qkv.bias" in weights,
    )
    if schedule is None:
        schedule = KeepSchedule.from_keep_ratio(0.7, depth=depth)
    sparse = SparseViT(backbone, schedule)
    load_strictly(sparse, weights, source, _released_name)
    return sparse.eval()


_SCORER_PARTS = {"in_conv.0": "norm", "in_conv.1": "embed", "out_conv": "head"}


def _rename(key: str) -> str:
    """A released key in this project's words: `score_predictor.0.in_conv.1.bias` is the bias of
    `scorers.0.embed`; everything else is the backbone's."""
    match = re.fullmatch(r"score_predictor\.(\d+)\.(in_conv\.[01]|out_conv)\.(.+)", key)
    if match is None:
        return f"backbone.{key}"
    return f"scorers.{match[1]}.{_SCORER_PARTS[match[2]]}.{match[3]}"


def _released_name(key: str) -> str:
    """The inverse of `_rename`."""
    match = re.fullmatch(r"scorers\.(\d+)\.(norm|embed|head)\.(.+)", key)
    if match is None:
        return key.removeprefix("backbone.")
    part = {ours: theirs for theirs, ours in _SCORER_PARTS.items()}[match[2]]
    return f"score_predictor.{match[1]}.{part}.{match[3]}"
