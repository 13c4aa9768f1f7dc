"""Sharing a model on the Hugging Face Hub."""

from __future__ import annotations

import socket
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

# timm imports the hub's client by itself, so here it is no further dependency and costs nothing.
from huggingface_hub import HfApi, ModelCardData, constants
from huggingface_hub.errors import LocalEntryNotFoundError
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
        OSError: on one line, if the hub refuses or is not reached; from the hub's own error.
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
        try:
            with offline_if_unreachable():
                repo = api.create_repo(repo_id, private=private, exist_ok=True)
                if not api.file_exists(repo_id, _CARD):  # its owner may have written in it
                    (folder / _CARD).write_text(card, encoding="utf-8")
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message or "Upload a model made with dynamicvit",
                )
        except Exception as error:  # the client's HTTP library has its own, another from 1 to 2
            raise OSError(f"cannot upload to {repo_id}: {one_line(error)}") from error
    return str(repo)


@contextmanager
def offline_if_unreachable(asked: bool = True) -> Iterator[None]:
    """If the hub cannot be reached, make its client use the cache only.

    Without this, the client retries for a minute.

    Args:
        asked: whether the hub will be asked at all.
    """
    before = constants.HF_HUB_OFFLINE
    if asked and not before and not _reachable():
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable() -> bool:
    if urllib.request.getproxies():  # a proxy knows names that this machine does not
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5.0).close()
    except OSError:
        return False
    return True


def one_line(error: BaseException) -> str:
    """An error's message on one line; that the hub cannot be reached, in few words."""
    texts = [str(item) for item in (error, error.__cause__, error.__context__) if item is not None]
    offline = (
        *("offline mode is enabled", "outgoing traffic has been disabled"),
        *("OfflineModeIsEnabled", "LocalEntryNotFoundError"),  # datasets puts names into a message
    )
    if isinstance(error, LocalEntryNotFoundError) or any(
        phrase in text for text in texts for phrase in offline
    ):
        return "the Hugging Face Hub cannot be reached (or HF_HUB_OFFLINE is set)"
    return " ".join(texts[0].split()) or type(error).__name__


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
