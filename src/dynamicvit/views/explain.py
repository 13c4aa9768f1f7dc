"""explain(): which patches of images a model keeps; and its command, which writes files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from timm.data import resolve_input_data_config
from timm.data.transforms import CenterCropOrPad
from torch import Tensor, nn
from torchvision.transforms import CenterCrop

from dynamicvit.core.model import SparseOutput, SparseViT
from dynamicvit.evaluation.console import cell, make_table, plain, track
from dynamicvit.evaluation.launch import find_device
from dynamicvit.io.files import check_folder, written_whole
from dynamicvit.io.images import IMAGE_SUFFIXES
from dynamicvit.io.load import at_budget, load_model
from dynamicvit.io.predictions import (
    ImageSource,
    Prediction,
    as_predictions,
    batches,
    check_sources,
    class_names,
    preprocessing,
    read_image,
    run,
)
from dynamicvit.views import video
from dynamicvit.views.explanation import SIDE, SUFFIXES, Explanation, draw_sheet

_TOP_K = 5
_BATCH = 32  # images in memory at a time
_SHEET = 96  # images in a contact sheet
_PRINTED = 50  # images in the table
_CONTACT_SHEET = "contact_sheet"


@overload  # a str is a sequence of str too, and read as a path
def explain(  # type: ignore[overload-overlap]
    model: SparseViT, images: ImageSource, dense: nn.Module | None = None
) -> Explanation: ...
@overload
def explain(
    model: SparseViT, images: Sequence[ImageSource] | Tensor, dense: nn.Module | None = None
) -> list[Explanation]: ...
def explain(
    model: SparseViT,
    images: ImageSource | Sequence[ImageSource] | Tensor,
    dense: nn.Module | None = None,
) -> Explanation | list[Explanation]:
    """Show in Python which patches of images a model keeps, and the classes it predicts.

    A notebook shows the result as a picture; `.save("x.png")` writes it. Files are resized, cropped
    and normalised as the model's `pretrained_cfg` says. The pictures show the result of that.
    Models run in eval mode, on their own device and in their own dtype; their mode is restored.
    The command `dynamicvit explain` is `explain_files`: it also takes folders and videos.

    Args:
        model: a sparse model.
        images: a path, a PIL image, or a sequence of these; or prepared images, a tensor
            [B, C, H, W], normalised as `pretrained_cfg` says.
        dense: a dense timm model to compare with; images are prepared as its own `pretrained_cfg`
            says. By default the model's own backbone with all patches kept. After fine-tuning this
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
    for inputs, visible, dense_inputs in _prepare(images, model, dense):
        found += _explain(model, inputs, visible, dense, dense_inputs)
    return found[0] if isinstance(images, str | os.PathLike | Image.Image) else found


def explain_files(
    images: list[str],
    model: str,
    output: str = "explain",
    dense: str | None = None,
    formats: list[str] | None = None,
    skip_unreadable: bool = False,
    keep_ratio: float | None = None,
    per_image: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> list[Path]:
    """Show which patches of images a model keeps at each stage, and the classes it predicts.

    This is the command `dynamicvit explain`; in Python, `dynamicvit.explain` gives objects.

    The picture of an image has the input as the model sees it, what each stage keeps of it (patches
    that have left are striped), the keep scores as heat maps, and the five likeliest classes, dense
    and pruned. Several images also give a contact sheet. A video gives a video: each frame beside
    what is kept of it (extra "video").

    Args:
        images: image files, video files, and folders of these.
        model: folder or hub id of a sparse model.
        output: folder to write, outside those of the images. Files are named after the images, and
            replace files of earlier calls.
        dense: model folder, hub id or name of a pretrained timm model to compare with. By default
            the model's own backbone with all patches kept. After fine-tuning this is not the dense
            model that it was made from.
        formats: of png (the picture), gif and webp (animations), npz (positions kept, scores and
            classes as arrays); by default png and npz.
        skip_unreadable: leave out and count images and videos that cannot be read, instead of
            stopping.
        keep_ratio: share of tokens that each stage of a sparse model keeps; by default its own.
        per_image: each image its own budget; the mean is that of `keep_ratio`. `dynamicvit
            calibrate` prepares a model for it.
        device: where models run: cpu, cuda or cuda:NUMBER; by default a GPU if there is one.
        quiet: print nothing.

    Returns:
        The files written.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an image, the model or an option,
            before anything is written. A video whose later frames cannot be read is named when it
            is its turn, after the images.
    """
    kinds = ["png", "npz"] if formats is None else list(dict.fromkeys(formats))
    known = [suffix[1:] for suffix in SUFFIXES]
    if not kinds or set(kinds) - set(known):
        raise ValueError(f"formats must be of {', '.join(known)}, got {formats}")
    check_folder("output", output)
    where = find_device(device)
    targets = _targets(_find(images, Path(output)), Path(output), kinds)
    sparse, other = _load(model, dense, keep_ratio, per_image, where)
    unreadable = _unreadable(targets, sparse, skip_unreadable, quiet)
    targets = {source: stem for source, stem in targets.items() if source not in unreadable}
    films = {source: stem for source, stem in targets.items() if _is_video(source)}
    stills = {source: stem for source, stem in targets.items() if source not in films}
    first, written = _explain_stills(stills, kinds, sparse, other, quiet)
    if len(stills) > 1:
        written.append(Path(output) / f"{_CONTACT_SHEET}.png")
        with written_whole(written[-1]) as temporary:
            draw_sheet(list(first.values())).save(temporary, format="PNG")
    frames = {}
    for source, stem in films.items():
        written.append(stem.with_name(f"{stem.name}.mp4"))
        frames[source] = _explain_film(source, written[-1], sparse, other, quiet)
    console = Console(quiet=quiet)
    _print_answers(console, first, len(stills), frames)
    if is_untrained(sparse):
        console.print("the scorers are not trained: they choose patches at random", style="bold")
    if unreadable:
        names = ", ".join(map(plain, unreadable))
        console.print(f"unreadable: {len(unreadable)}: {names}", markup=False, soft_wrap=True)
    console.print(f"files written to {plain(output)}: {len(written)}", markup=False, soft_wrap=True)
    return written


def _load(
    model: str,
    dense: str | None,
    keep_ratio: float | None,
    per_image: bool,
    device: torch.device,
) -> tuple[SparseViT, nn.Module | None]:
    sparse = load_model(model)
    if not isinstance(sparse, SparseViT):
        raise ValueError(
            f"model must be sparse, got the dense model {model}; `dynamicvit train` makes one "
            "sparse"
        )
    sparse = at_budget(sparse, model, keep_ratio, per_image)
    other = None if dense is None else load_model(dense).to(device)
    if isinstance(other, SparseViT):
        raise ValueError(f"dense must be a dense model, got the sparse model {dense}")
    return sparse.to(device), other


def _unreadable(sources: Iterable[Path], model: SparseViT, skip: bool, quiet: bool) -> list[Path]:
    """The images and videos that cannot be read, before anything is written: all are to be skipped,
    or the first is an error."""
    mode, _ = preprocessing(model)
    if any(map(_is_video, sources)):
        video.import_av()  # its absence is no fault of the files
    found, read = [], 0
    for source in track(sources, "reading", quiet, "images"):
        try:
            if _is_video(source):
                video.check_video(source)
            else:
                read_image(source, mode, "images")
            read += 1
        except (ValueError, FileNotFoundError) as error:
            if not skip:
                raise ValueError(f"{error} (skip_unreadable goes on without it)") from error
            found.append(source)
    if not read:
        raise ValueError(f"none of the {len(found)} images can be read: {plain(found[0])}, …")
    return found


def _explain_stills(
    stills: dict[Path, Path],
    kinds: list[str],
    sparse: SparseViT,
    dense: nn.Module | None,
    quiet: bool,
) -> tuple[dict[Path, Explanation], list[Path]]:
    """Write the files of each image. Gives the first explanations, and the files."""
    first: dict[Path, Explanation] = {}
    written = []
    sources = list(stills)
    explanations = (
        item
        for start in range(0, len(sources), _BATCH)
        for item in explain(sparse, sources[start : start + _BATCH], dense)
    )
    for source in track(sources, "explaining", quiet, "images"):
        found = next(explanations)
        for kind in kinds:
            written.append(stills[source].with_name(f"{stills[source].name}.{kind}"))
            found.save(written[-1])
        if len(first) < _SHEET:
            first[source] = found
    return first, written


def _explain_film(
    source: Path, target: Path, sparse: SparseViT, dense: nn.Module | None, quiet: bool
) -> int:
    """Write a video of what is kept of each frame. Gives the number of frames."""

    def draw(frames: Sequence[Image.Image]) -> list[Image.Image]:
        return [draw_sheet([item], side=SIDE) for item in explain(sparse, frames, dense)]

    frames = video.redraw_video(source, target, draw)
    *_, count = track(frames, f"explaining {source.name}", quiet, "frames")
    return count


def _print_answers(
    console: Console, first: dict[Path, Explanation], images: int, frames: dict[Path, int]
) -> None:
    """The likeliest class of the first images, the videos, and what the files leave out."""
    table = make_table("image")
    each = any(found.level for found in first.values())
    for title in ("dense", "pruned", *["patches"] * each):
        table.add_column(title, overflow="fold")
    for source, found in list(first.items())[:_PRINTED]:
        row = (cell(source), _best(found.dense), _best(found.pruned), found.patches)
        table.add_row(*row[: len(table.columns)])
    for source, count in frames.items():
        table.add_row(cell(source), f"{count} frames", "")
    console.print(table)
    if images > _PRINTED:
        console.print(f"{images - _PRINTED} more images: the files have their classes")
    if first:
        found = min(first.values(), key=lambda item: item.visible)
        if not each:
            console.print(f"patches: {found.patches}")
        if found.cropped:
            console.print(f"the pictures show the model's crop: at least {found.cropped}")
    if images > len(first):
        console.print(f"the contact sheet has the first {len(first)} images")


def is_untrained(model: SparseViT) -> bool:
    """Whether learned scorers are as created: training changes each of their parameters."""
    norms = [item for item in model.scorers.modules() if isinstance(item, nn.LayerNorm)]
    return bool(norms) and all(
        bool((item.weight == 1).all() and (item.bias == 0).all()) for item in norms
    )


def _prepare(
    images: Any, model: SparseViT, dense: nn.Module | None
) -> Iterator[tuple[Tensor, list[float], Tensor]]:
    """Batches of prepared images, the share of each picture that is in them, and the same images
    for the dense model."""
    if isinstance(images, Tensor):
        size = resolve_input_data_config(dense)["input_size"] if dense else images.shape[1:]
        if tuple(size) != tuple(images.shape[1:]):
            raise ValueError(
                f"dense must take the prepared images {tuple(images.shape[1:])}, got {tuple(size)}"
            )
        yield images, [1.0] * len(images), images
        return
    sources = check_sources(images, "images")
    mode, transform = preprocessing(model)
    others = None if dense is None else batches(sources, dense)
    labels = list(sources)
    for start in range(0, len(labels), _BATCH):
        prepared, visible = [], []
        for label in labels[start : start + _BATCH]:
            tensor, share = _transform(read_image(sources[label], mode, label), transform)
            prepared.append(tensor)
            visible.append(share)
        inputs = torch.stack(prepared)
        yield inputs, visible, inputs if others is None else next(others)


def _transform(picture: Image.Image, transform: Any) -> tuple[Tensor, float]:
    """A prepared image, and the share of the picture's area that no crop has cut off."""
    value: Any = picture
    visible = 1.0
    for step in transform.transforms:
        before = value
        value = step(value)
        if isinstance(step, CenterCrop | CenterCropOrPad):
            for new, old in zip(value.size, before.size, strict=True):
                visible *= min(1.0, new / old)
    return value, visible


def _explain(
    model: SparseViT,
    images: Tensor,
    visible: Sequence[float],
    dense: nn.Module | None,
    dense_images: Tensor,
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
            visible=visible[index],
            level=_level(model, [int(mask[index].sum()) for mask in keep]),
        )
        for index in range(len(images))
    ]


def _level(model: SparseViT, counts: list[int]) -> tuple[int, int] | None:
    """`Explanation.level` of an image of which the stages keep so many patches."""
    if model.levels is None:
        return None
    schedules = model.levels.schedules
    found = [list(each.counts(model.budget().num_patches)) for each in schedules]
    return found.index(counts) + 1, len(found)


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


def _is_video(source: Path) -> bool:
    return source.suffix.lower() in video.SUFFIXES


def _find(images: list[str], output: Path) -> Iterator[tuple[Path, Path]]:
    """Each image or video file, and the name for its result."""
    for name in images:
        path = Path(name)
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(f"images must be files or folders, got no file at {name}")
            yield path, Path(path.name)
            continue
        if output.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"output must lie outside of the images' folder {name}, got {output}")
        kinds = (*IMAGE_SUFFIXES, *video.SUFFIXES)
        found = sorted(
            file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in kinds
        )
        if not found:
            raise ValueError(
                f"images must hold {', '.join(IMAGE_SUFFIXES)} or video files, got the folder "
                f"{name} without any"
            )
        yield from ((file, file.relative_to(path)) for file in found)


def _targets(
    found: Iterator[tuple[Path, Path]], output: Path, kinds: list[str]
) -> dict[Path, Path]:
    """File → the file to write for it, without suffix: its own name, numbered where several files
    have the same."""
    targets: dict[Path, Path] = {}
    taken = {output / _CONTACT_SHEET}
    for source, name in found:
        if source in targets:
            continue
        stem = output / name.with_suffix("")
        number = 1
        while stem in taken:
            number += 1
            stem = output / name.with_name(f"{name.stem}-{number}")
        taken.add(stem)
        targets[source] = stem
    sources = {source.resolve() for source in targets}
    for stem in taken:
        for kind in (*kinds, "mp4"):
            path = stem.with_name(f"{stem.name}.{kind}")
            if path.resolve() in sources:
                raise ValueError(
                    f"output must be a folder where no image is overwritten, got {output} "
                    f"with the image {path}"
                )
    return targets


def _best(found: Sequence[Prediction]) -> str:
    return f"{cell(found[0].name)} {found[0].probability:.1%}" if found else ""
