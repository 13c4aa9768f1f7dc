"""Sharing a model on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# timm imports the hub's client by itself, so here it is no further dependency and costs nothing.
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from timm.data import resolve_input_data_config

from dynamicvit.core.macs import count_gmacs
from dynamicvit.io.folder import save_folder

if TYPE_CHECKING:
    from dynamicvit.core.model import SparseViT

_CARD = "README.md"
# Licences of timm's models that the hub knows by this name; it refuses a card with another one.
_LICENSES = {
    "apache-2.0",
    "apple-amlr",
    "apple-ascl",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-sa-4.0",
    "gemma",
    "mit",
}


def push_to_hub(
    model: SparseViT,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    class_names: Sequence[str] | None = None,
) -> str:
    """Upload a model, for `dynamicvit.load(repo_id)`, with a model card if there is none yet.

    Args:
        model: the model; saved as `save_folder` does.
        repo_id: "owner/name"; created if absent.
        private: whether a new repository is to be private; one that exists stays as it is.
        token: of the hub; by default that of `hf auth login` or the HF_TOKEN variable.
        commit_message: of the upload.
        class_names: one name a class; by default those the model already carries, if any.

    Returns:
        The repository's address.

    Raises:
        TypeError, ValueError: if `repo_id` is malformed, the model cannot be saved, or the names do
            not fit it; nothing has been created on the hub then.
        huggingface_hub.errors.HfHubHTTPError, OSError: the hub's own, if it refuses or is not
            reached.
    """
    if not isinstance(repo_id, str):
        raise TypeError(f"repo_id must be a string 'owner/name', got {repo_id!r}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id must be 'owner/name', got {repo_id!r}: {error}") from error
    if "/" not in repo_id:  # the hub would add the owner, `load` would take it for a folder
        raise ValueError(f"repo_id must be 'owner/name', got {repo_id!r}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_folder(model, folder, class_names)
        card = _model_card(model, repo_id)
        api = HfApi(token=token, library_name="dynamicvit")
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if not api.file_exists(repo_id, _CARD):  # its owner may have written in the one there is
            (folder / _CARD).write_text(card, encoding="utf-8")
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload a model made with dynamicvit",
        )
    return str(repo)


def _model_card(model: SparseViT, repo_id: str) -> str:
    """What the model is and costs, and how to use it; no accuracy, which is not measured here."""
    schedule, backbone, config = model.schedule, model.backbone, model.pretrained_cfg
    name = config.get("license")
    if not isinstance(name, str) or name == "unknown":
        name = None
    known = name in _LICENSES
    data = ModelCardData(
        license=name if known or name is None else "other",
        license_name=None if known else name,
        library_name="dynamicvit",
        pipeline_tag="image-classification",
        tags=["image-classification", "dynamicvit", "timm"],
    )
    size = resolve_input_data_config(backbone)["input_size"]
    stages = "\n".join(
        f"- before block {block}: {ratio:.1%} of the image's tokens go on"
        for block, ratio in zip(schedule.blocks, schedule.ratios, strict=True)
    )
    return f"""---
{data.to_yaml()}
---

# {repo_id}

A vision transformer, timm's `{config["architecture"]}`, that lets uninformative patch tokens leave
on the way, after DynamicViT ([arXiv 2106.02034](https://arxiv.org/abs/2106.02034)).

```python
import dynamicvit

model = dynamicvit.load("{repo_id}")
model.predict("cat.jpg")
```

- input: {" × ".join(map(str, size))}, {model.num_classes} classes
{stages}
- {count_gmacs(model, size):.3f} GMACs (billions of multiply-adds) an image; the dense model:
  {count_gmacs(backbone, size):.3f}
"""
