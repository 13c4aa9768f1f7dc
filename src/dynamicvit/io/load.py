"""Models by name: a folder, a hub id or a name of timm's."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from dynamicvit.io.folder import CONFIG, WEIGHTS, load_folder


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
