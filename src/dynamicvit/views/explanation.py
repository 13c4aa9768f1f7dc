"""explain(): which patches of an image a SparseViT keeps, and what it takes the image for."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_input_data_config
from torch import Tensor, nn

from dynamicvit.core.model import SparseOutput, SparseViT
from dynamicvit.io.files import write_bytes
from dynamicvit.io.predictions import (
    ImageSource,
    Prediction,
    as_predictions,
    batches,
    check_sources,
    class_names,
    run,
)
from dynamicvit.views import pictures

SUFFIXES = (".png", ".gif", ".webp", ".npz")  # what `Explanation.save` writes
_TOP_K = 5


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What a SparseViT kept of an image, and took it for. `explain` makes it; a notebook shows it.

    Attributes:
        pixels: [H, W, 3] uint8: what the model saw, after resizing and cropping.
        patch_size: height and width of a patch in pixels.
        grid: rows and columns of patches. The patch at position p is in row `p // columns`.
        blocks: for each of the S stages, the (0-based) block before which patches leave.
        kept: for each stage, the positions of the patches kept after it, ascending: [K] int64.
        scores: [S, N] float32: log-odds of keeping; -inf for patches that had left before.
        dense: the likeliest five classes with all patches kept, best first; none where the model
            has no classification head.
        pruned: the same, with tokens leaving.
        dense_model: whose predictions `dense` are, in words.
    """

    pixels: np.ndarray
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    blocks: tuple[int, ...]
    kept: tuple[np.ndarray, ...]
    scores: np.ndarray
    dense: list[Prediction]
    pruned: list[Prediction]
    dense_model: str

    @property
    def masks(self) -> np.ndarray:
        """[S, rows, columns] bool: True where a patch is kept after a stage."""
        flat = np.zeros(self.scores.shape, dtype=bool)
        for mask, positions in zip(flat, self.kept, strict=True):
            mask[positions] = True
        return flat.reshape(-1, *self.grid)

    @property
    def counts(self) -> tuple[int, ...]:
        """Patches at the start and after each stage."""
        return (self.scores.shape[1], *map(len, self.kept))

    def picture(self) -> Image.Image:
        """The input and what each stage keeps of it, its scores, and the predictions: RGB."""
        return pictures.draw_explanation(self)

    def frames(self) -> list[Image.Image]:
        """The input, then what each stage keeps of it: RGB pictures of one size."""
        return pictures.draw_frames(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all.

        Args:
            path: ends in .png (the picture), .gif or .webp (an animation: the input, then each
                stage), or .npz (the attributes as arrays; `kept_1` and so on hold the positions,
                classes are `dense_index`, `dense_name`, `dense_probability`, and so for `pruned_`).
                Folders that are absent are made.

        Raises:
            ValueError: if it ends in something else.
        """
        target = Path(path)
        kind = target.suffix.lower()
        if kind not in SUFFIXES:
            raise ValueError(f"path must end in {', '.join(SUFFIXES)}, got {str(target)!r}")
        content = io.BytesIO()
        if kind == ".npz":
            np.savez_compressed(content, **self._arrays())
        elif kind == ".png":
            self.picture().save(content, format="PNG")
        else:
            first, *rest = self.frames()
            times = [1000] * len(rest) + [2500]  # milliseconds
            options: dict[str, Any] = {"lossless": True} if kind == ".webp" else {}
            first.save(
                content,
                format=kind[1:].upper(),
                save_all=True,
                append_images=rest,
                duration=times,
                loop=0,
                **options,
            )
        write_bytes(target, content.getvalue())

    def _arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {
            f"kept_{stage}": positions for stage, positions in enumerate(self.kept, start=1)
        }
        for side, found in (("dense", self.dense), ("pruned", self.pruned)):
            arrays[f"{side}_index"] = np.array([item.index for item in found], dtype=np.int64)
            arrays[f"{side}_name"] = np.array([item.name for item in found], dtype=np.str_)
            arrays[f"{side}_probability"] = np.array([item.probability for item in found])
        for name in ("pixels", "patch_size", "grid", "blocks", "scores", "dense_model"):
            arrays[name] = np.asarray(getattr(self, name))
        return arrays

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.picture().save(content, format="PNG")
        return content.getvalue()

    def __repr__(self) -> str:
        parts = [f"patches {' → '.join(map(str, self.counts))}"]
        for side, found in (("dense", self.dense), ("pruned", self.pruned)):
            parts += [f"{side}: {found[0].name}"] if found else []
        return f"<Explanation, {', '.join(parts)}>"


@overload  # a str is a sequence of str too, and read as a path
def explain(  # type: ignore[overload-overlap]
    model: SparseViT, image: ImageSource, dense: nn.Module | None = None
) -> Explanation: ...
@overload
def explain(
    model: SparseViT, image: Sequence[ImageSource] | Tensor, dense: nn.Module | None = None
) -> list[Explanation]: ...
def explain(
    model: SparseViT,
    image: ImageSource | Sequence[ImageSource] | Tensor,
    dense: nn.Module | None = None,
) -> Explanation | list[Explanation]:
    """Show which patches of an image a model keeps, stage by stage, and what it takes it for.

    In a notebook the result shows itself; `.save("x.png")` writes it. Files are resized, cropped
    and normalised as the model's `pretrained_cfg` says; the pictures show what the model then saw.
    Models run in eval mode, on their own device and in their own dtype; their mode is restored.

    Args:
        model: the model.
        image: a path, a PIL image, or a sequence of these; or prepared images, a tensor
            [B, C, H, W], normalised as `pretrained_cfg` says.
        dense: a dense timm model to predict beside it, prepared for as its own `pretrained_cfg`
            says. By default the model's own backbone with all tokens kept, which after fine-tuning
            is not the dense model that it was made from.

    Returns:
        An Explanation; for a sequence or tensor, a list of them.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError, ValueError: if an image cannot be read, or naming a bad argument.
    """
    if not isinstance(model, SparseViT):
        raise TypeError(f"model must be a SparseViT, got {type(model).__name__}")
    if dense is not None and (isinstance(dense, SparseViT) or not hasattr(dense, "pretrained_cfg")):
        raise TypeError(f"dense must be a dense timm model, got {type(dense).__name__}")
    found: list[Explanation] = []
    for inputs, dense_inputs in _inputs(image, model, dense):
        found += _explain(model, inputs, dense, dense_inputs)
    return found[0] if isinstance(image, str | os.PathLike | Image.Image) else found


def _inputs(
    image: Any, model: SparseViT, dense: nn.Module | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of prepared images, for the model and for the dense one."""
    if isinstance(image, Tensor):
        size = resolve_input_data_config(dense)["input_size"] if dense else image.shape[1:]
        if tuple(size) != tuple(image.shape[1:]):
            raise ValueError(
                f"dense must take the prepared images {tuple(image.shape[1:])}, got {tuple(size)}"
            )
        yield image, image
        return
    sources = check_sources(image)
    if dense is None:
        yield from ((images, images) for images in batches(sources, model))
    else:
        yield from zip(batches(sources, model), batches(sources, dense), strict=True)


def _explain(
    model: SparseViT, images: Tensor, dense: nn.Module | None, dense_images: Tensor
) -> list[Explanation]:
    output: SparseOutput = run(model, images, "pruned")
    if not output.keep:
        kind = type(model.scorers[0]).__name__
        raise ValueError(f"model must choose tokens, got {kind}, which merges them")
    height, width = images.shape[-2:]
    embed: Any = model.backbone.patch_embed
    scores = torch.stack([score.float() for score in output.scores], dim=1).cpu().numpy()
    keep = [mask.cpu().numpy() > 0.5 for mask in output.keep]
    pixels = _to_pixels(images, resolve_input_data_config(model.backbone))
    pruned = _predictions(model, output.logits)
    if dense is None:
        teller: Any = model.backbone
        dense_model = "the same weights, all patches kept"
    else:
        teller = dense
        dense_model = str((teller.pretrained_cfg or {}).get("architecture") or type(dense).__name__)
    predictions = _predictions(teller, run(teller, dense_images))
    return [
        Explanation(
            pixels=pixels[index],
            patch_size=cast(tuple[int, int], tuple(embed.feat_ratio(as_scalar=False))),
            grid=cast(tuple[int, int], tuple(embed.dynamic_feat_size((height, width)))),
            blocks=model.schedule.blocks,
            kept=tuple(mask[index].nonzero()[0] for mask in keep),
            scores=scores[index],
            dense=predictions[index],
            pruned=pruned[index],
            dense_model=dense_model,
        )
        for index in range(len(images))
    ]


def _predictions(model: Any, logits: Tensor) -> list[list[Prediction]]:
    """The likeliest classes of each image; none, where the model has no head."""
    if model.num_classes < 1:
        return [[] for _ in logits]
    return as_predictions(logits, class_names(model), _TOP_K)


def _to_pixels(images: Tensor, config: dict[str, Any]) -> np.ndarray:
    """Undo the normalisation: [B, C, H, W] → [B, H, W, 3] uint8. Of other than three channels,
    four are colours and opacity, and otherwise the first is shown in grey."""
    channels = images.shape[1]
    mean, std = (
        torch.tensor(config[name], device=images.device).view(1, -1, 1, 1)
        for name in ("mean", "std")
    )
    if channels not in (mean.shape[1], 1) and mean.shape[1] != 1:
        raise ValueError(
            f"model must have a mean and std a channel in its pretrained_cfg, {channels}, "
            f"got {mean.shape[1]}"
        )
    pixels = (images.float() * std + mean)[:, : min(channels, 3)]
    if channels not in (3, 4):
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    pixels = pixels.clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
