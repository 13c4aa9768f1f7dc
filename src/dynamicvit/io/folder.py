"""A model as a folder: `config.json` (timm's own format) and `model.safetensors`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from dynamicvit.core.levels import Calibration
from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.selectors import check_name, name_of
from dynamicvit.io.files import check_folder, name_in_errors, write_text
from dynamicvit.io.weights import OWN_WEIGHTS, load_strictly

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_folder(
    model: nn.Module,
    folder: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a dense timm model or a SparseViT to `folder`, whole or not at all.

    `config.json` holds architecture, preprocessing, class names and, for a SparseViT, the schedule
    and what decides (`dynamicvit.core.selectors.SELECTORS`).
    A dense folder is one that `timm.create_model("local-dir:…", pretrained=True)` reads too.

    Args:
        model: a SparseViT or a model that `timm.create_model` made (others leave no record of how
            to build them again).
        folder: created with its parents if absent; files of these two names in it are replaced.
        class_names: one name a class; by default those the model already carries, if any.
        dtype: store floating-point weights in this type; by default as they are.

    Raises:
        TypeError, ValueError: if the model cannot be described, or the names do not fit it.
    """
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {folder!r}")
    check_folder("folder", Path(folder))
    backbone, extra = _describe(model, class_names)
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target, then moved: an interrupted or failed save leaves no half model.
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with name_in_errors(target / CONFIG, temporary / CONFIG):
            save_config_for_hf(backbone, str(temporary / CONFIG), model_config=extra)
        tensors = {
            key: (value.to(dtype) if dtype and value.is_floating_point() else value)
            .contiguous()
            .cpu()
            for key, value in model.state_dict().items()
        }
        with name_in_errors(target / WEIGHTS, temporary / WEIGHTS):
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        target.mkdir(exist_ok=True)
        # Without its config a folder is refused, so a kill in between leaves no mixed model.
        (target / CONFIG).unlink(missing_ok=True)
        for name in (WEIGHTS, CONFIG):
            os.chmod(temporary / name, 0o644)
            os.replace(temporary / name, target / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_calibration(model: SparseViT, folder: str | os.PathLike[str]) -> None:
    """Write a model's calibration into the folder that it was loaded from, and no weights."""
    path = Path(folder) / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dynamicvit"] = _describe_sparse(model, name_of(model.scorers))
    write_text(path, json.dumps(config, indent=2) + "\n")


def _describe(
    model: nn.Module, class_names: Sequence[str] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The timm model in a model, and what its config says beside timm's own entries."""
    schedule = getattr(model, "schedule", None)
    backbone: Any = model if schedule is None else model.backbone
    cfg = getattr(backbone, "pretrained_cfg", None)
    if not cfg or not cfg.get("architecture"):
        raise TypeError(
            "model must come from timm.create_model, so that it can be built again; "
            f"got {type(backbone).__name__} without an architecture name"
        )
    scorers: Any = getattr(model, "scorers", ())
    scorer = name_of(scorers)
    if schedule is not None and scorer is None:
        kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in scorers))
        raise TypeError(
            f"model must hold scorers of one known kind to be saved, got {kinds}; "
            "of a fused model, save the one it was made from"
        )
    num_classes = backbone.num_classes
    if isinstance(class_names, str):
        raise TypeError(f"class_names must be a sequence of names, got {class_names!r}")
    names = list(class_names) if class_names is not None else cfg.get("label_names")
    if names is not None and len(names) != num_classes:
        if class_names is not None:
            raise ValueError(
                f"class_names must be one a class, {num_classes}, got {len(class_names)}"
            )
        names = None  # those of another head
    extra: dict[str, Any] = {"label_names": names} if names else {}
    if isinstance(model, SparseViT):
        extra["dynamicvit"] = _describe_sparse(model, scorer)
    return backbone, extra


def _describe_sparse(model: SparseViT, scorer: str | None) -> dict[str, Any]:
    """What makes a backbone this model, for its config."""
    schedule = model.schedule
    found: dict[str, Any] = {"blocks": schedule.blocks, "ratios": schedule.ratios, "scorer": scorer}
    if model.squeeze:
        found["squeeze"] = True
    if model.calibration is not None:
        found["calibration"] = model.calibration._asdict()
        found["per_image"] = model.levels is not None
    return found


def _build(backbone: nn.Module, found: Any) -> SparseViT:
    """The model that `_describe_sparse` described. Raises TypeError or ValueError if it did not."""
    if not isinstance(found, dict) or not {"blocks", "ratios"} <= found.keys():
        raise ValueError(f"'dynamicvit' must hold blocks and ratios, got {found!r:.200}")
    scorer = found.get("scorer", "learned")  # older folders do not name it
    check_name(scorer)
    schedule = KeepSchedule(found["blocks"], found["ratios"])
    model = SparseViT(backbone, schedule, scorer, found.get("squeeze", False))
    if "calibration" in found:
        model.calibration = Calibration.read(found["calibration"])
    if found.get("per_image", False):
        model = model.at(keep_ratio=schedule.ratios[0], per_image=True)
    return model


def load_folder(folder: str | os.PathLike[str]) -> nn.Module:
    """Read what `save_folder` wrote: a SparseViT, or the dense timm model; in eval mode.

    Weights are read with safetensors, into float32.

    Raises:
        FileNotFoundError: if the folder or one of its two files is missing.
        ValueError: if a file is damaged or the two do not fit, saying what is wrong where; or if
            torch's default device is "meta".
    """
    if torch.get_default_device().type == "meta":
        raise ValueError("the default device must hold values to load weights, got 'meta'")
    folder = Path(folder)
    try:
        exists = folder.is_dir()
    except (OSError, ValueError):  # such as a name that is too long
        exists = False
    if not exists:
        hint = f", which is a file; {OWN_WEIGHTS}" if os.path.isfile(folder) else ""
        raise FileNotFoundError(f"no model folder at {folder}{hint}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            # Of a training run, the model is inside.
            hint = f"; {folder / 'best'} is one" if (folder / "best" / CONFIG).is_file() else ""
            raise FileNotFoundError(f"{folder} is not a model folder: it has no {name}{hint}")
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
        try:
            model = _build(model, config["dynamicvit"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or not safetensors: {error}") from error
    load_strictly(model, tensors, str(folder / WEIGHTS))
    return model.eval()
