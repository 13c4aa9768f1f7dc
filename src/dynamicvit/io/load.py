"""Models by name: a folder, a hub id or a name of timm's."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from dynamicvit.core.backbones import UnsupportedBackbone
from dynamicvit.core.model import SparseViT
from dynamicvit.io.folder import CONFIG, WEIGHTS, load_folder
from dynamicvit.io.hub import offline_if_unreachable, one_line
from dynamicvit.io.weights import find_weights, load_strictly
from dynamicvit.models.names import why_unsupported


def load(folder_or_hub_id: str | os.PathLike[str]) -> SparseViT:
    """Load a saved sparse model, ready to classify: `dynamicvit.load(...)(images)`.

    Args:
        folder_or_hub_id: a folder written by `save_pretrained`, or a Hugging Face Hub id
            ("owner/name") holding the same two files.

    Returns:
        The model; float32, in eval mode.

    Raises:
        FileNotFoundError: if there is no such folder, it lacks a file, or the hub has no such model
            or is not reached.
        TypeError: if the argument is no path, or the model there is dense.
        ValueError: if a file is damaged or does not fit, saying what is wrong where.
    """
    model = _load(folder_or_hub_id)
    if not isinstance(model, SparseViT):
        raise TypeError(
            f"folder_or_hub_id must hold a sparse model, got the dense model {folder_or_hub_id}; "
            "dynamicvit.io.load.load_model loads it"
        )
    return model


def _load(folder_or_hub_id: str | os.PathLike[str]) -> nn.Module:
    if not isinstance(folder_or_hub_id, str | os.PathLike):
        raise TypeError(f"folder_or_hub_id must be a path or a hub id, got {folder_or_hub_id!r}")
    path, hub_id = Path(folder_or_hub_id), str(folder_or_hub_id)
    if _exists(path) or not is_hub_id(hub_id):
        return load_folder(path)
    try:
        with offline_if_unreachable():
            return load_folder(snapshot_download(hub_id, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no folder {hub_id!r} here, and nothing from the hub: {one_line(error)}"
            + _sparse_note(hub_id)
        ) from error


def check_backbone(name: str) -> None:
    """Refuse a timm model that cannot become sparse before its weights are downloaded.

    Raises:
        UnsupportedBackbone: saying why, and what is near in size.
    """
    why = _why_unsupported(name)
    if why is not None:
        raise UnsupportedBackbone(f"model {name!r}: {why}")


def _why_unsupported(name: str) -> str | None:
    """`why_unsupported` for one of timm's names, also as a hub id (timm/NAME)."""
    return None if _exists(Path(name)) else why_unsupported(name.removeprefix("timm/"))


def is_timm_name(name: str) -> bool:
    """Whether a model's name is one of timm's, and no folder here has it."""
    return timm.is_model(name) and not _exists(Path(name))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form "owner/name"."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def load_model(
    name: str | os.PathLike[str],
    pretrained: bool = True,
    weights: str | None = None,
    **model_kwargs: Any,
) -> Any:
    """A sparse or dense model: a model folder, a hub id "owner/name", or a timm model.

    Args:
        name: what to load.
        pretrained: for a timm name: load timm's pretrained weights.
        weights: for a timm name: file with a state dict to load instead (safetensors or torch; of
            timm, Lightning and others, see `find_weights`). The model gets as many classes as the
            file's head has; if `model_kwargs` say another `num_classes`, a new head of so many.
        model_kwargs: for a timm name: passed to `timm.create_model`.

    Raises:
        FileNotFoundError, ValueError: if nothing of that name exists, or it cannot be loaded.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"model must be a folder, a hub id or a timm name, got {name!r}")
    name = os.fspath(name)
    if not is_timm_name(name):
        if "/" not in name and not _exists(Path(name)):
            close = timm.list_models(f"*{name}*")[:3] if name else []
            close = close or difflib.get_close_matches(name, timm.list_models())
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"model must be a folder, a hub id or a timm name, got {name!r}{hint}")
        if weights is not None:
            raise ValueError(f"weights go with a timm name, not with {name}, got {weights}")
        if model_kwargs:
            raise ValueError(f"model_kwargs are for timm names, not for {name}: got {model_kwargs}")
        return _load(name)
    if weights is not None:
        return _load_weights(name, weights, model_kwargs)
    return _create(name, pretrained, model_kwargs)


def at_budget(
    model: Any, name: str, keep_ratio: float | None = None, per_image: bool = False
) -> Any:
    """A loaded model at the budget that a command was given; as it is, where none was given.

    Args:
        model: what `load_model` gave.
        name: what the user calls it.
        keep_ratio: share of tokens that each stage keeps.
        per_image: each image its own budget; the mean is that of `keep_ratio`, by default that of
            the model.

    Raises:
        TypeError, ValueError: as `SparseViT.at`, or if the model is dense or not calibrated.
    """
    if keep_ratio is None and not per_image:
        return model
    if not isinstance(model, SparseViT):
        asked = "per_image" if keep_ratio is None else "keep_ratio"
        raise ValueError(f"{asked} needs a sparse model, got the dense model {name}")
    if per_image and model.calibration is None:
        raise ValueError(f"per_image needs `dynamicvit calibrate {name}` before, got none")
    gmacs = model.budget().cost(model.schedule) if keep_ratio is None else None
    return model.at(keep_ratio=keep_ratio, gmacs=gmacs, per_image=per_image)


def _create(name: str, pretrained: bool, model_kwargs: dict[str, Any]) -> Any:
    try:
        with offline_if_unreachable(pretrained):
            model: Any = timm.create_model(name, pretrained=pretrained, **model_kwargs)
    except (TypeError, AssertionError, RuntimeError, OSError) as error:
        raise ValueError(
            f"timm cannot create {name!r} (pretrained={pretrained}): {one_line(error)}"
            + _sparse_note(name)
        ) from error
    if not pretrained:  # these describe timm's weights, which this model does not have
        for key in ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes"):
            model.pretrained_cfg.pop(key, None)
    return model


def _sparse_note(name: str) -> str:
    """For an error about a timm model: that it could not become sparse either."""
    why = _why_unsupported(name)
    return "" if why is None else f"; nor can it be made sparse: {why}"


def _load_weights(name: str, weights: str, model_kwargs: dict[str, Any]) -> Any:
    model = _create(name, False, model_kwargs)
    tensors = find_weights(weights, model.state_dict())
    asked = model_kwargs.get("num_classes")
    classifier = model.pretrained_cfg.get("classifier") or "head"
    head = classifier if isinstance(classifier, str) else classifier[0]
    if f"{head}.weight" in tensors:
        found = len(tensors[f"{head}.weight"])
    else:  # a backbone alone serves whoever asks for a new head
        found = model.num_classes if asked is None else 0
    if found != model.num_classes:
        model = _create(name, False, model_kwargs | {"num_classes": found})
    load_strictly(model, tensors, str(weights))
    if asked is not None and asked != found:
        model.reset_classifier(asked)
    return model.eval()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # such as a name that is too long, or with a null in it
        return False
