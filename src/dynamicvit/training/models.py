"""Models by name: a folder, a hub id, or one of timm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm

from dynamicvit.checkpoint import load


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
