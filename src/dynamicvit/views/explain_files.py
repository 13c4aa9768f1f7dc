"""explain_files(): the command `dynamicvit explain`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from torch import nn

from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.console import cell, make_table, plain, track
from dynamicvit.evaluation.launch import find_device
from dynamicvit.io.files import check_folder, written_whole
from dynamicvit.io.images import IMAGE_SUFFIXES
from dynamicvit.io.load import at_budget, load_model
from dynamicvit.io.predictions import (
    Prediction,
    preprocessing,
    read_image,
)
from dynamicvit.views import video
from dynamicvit.views.explain import explain, is_untrained
from dynamicvit.views.explanation import SIDE, SUFFIXES, Explanation, draw_sheet

_BATCH = 32  # images in memory at a time
_SHEET = 96  # images in a contact sheet
_PRINTED = 50  # images in the table
_CONTACT_SHEET = "contact_sheet"


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
