"""What a model keeps of images, from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dynamicvit.core.model import SparseViT
from dynamicvit.io.files import written_whole
from dynamicvit.io.images import IMAGE_SUFFIXES
from dynamicvit.io.load import load_model
from dynamicvit.io.predictions import preprocessing, read_image
from dynamicvit.views import explanation, video
from dynamicvit.views.pictures import draw_sheet

_BATCH = 32  # images in memory at a time
_SHEET = 96  # images that a contact sheet holds: more are not looked at


def explain(
    images: list[str],
    model: str,
    output: str = "explain",
    dense: str | None = None,
    formats: list[str] | None = None,
) -> list[Path]:
    """Show which patches of images a model keeps, stage by stage, and what it takes them for.

    The picture of an image has the input as the model sees it, what is kept of it after each stage
    (what has left is dimmed), the keep scores as heat maps, and the five likeliest classes, dense
    and pruned. Where there are several images there is a contact sheet besides. Of a video there is
    a video, each frame beside what is kept of it (extra "video").

    Args:
        images: image files, video files, and folders of these.
        model: folder or hub id of a sparse model.
        output: folder to write, other than those of the images; files of earlier calls in it are
            replaced. Files are named after the images.
        dense: model folder, hub id or name of a pretrained timm model, to predict beside it; by
            default the model's own backbone with all patches kept, which after fine-tuning is not
            the dense model that it was made from.
        formats: of png (the picture), gif and webp (animations), npz (positions kept, scores and
            classes as arrays); by default png and npz.

    Returns:
        The files written.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an image, the model or an option,
            before anything is written; a video that breaks off after its first frame is told of
            when it is its turn, after the images.
    """
    kinds = ["png", "npz"] if formats is None else list(dict.fromkeys(formats))
    known = [suffix[1:] for suffix in explanation.SUFFIXES]
    if not kinds or set(kinds) - set(known):
        raise ValueError(f"formats must be of {', '.join(known)}, got {formats}")
    targets = _targets(_find(images, Path(output)), Path(output), kinds)
    sparse = load_model(model)
    if not isinstance(sparse, SparseViT):
        raise ValueError(
            f"model must be sparse, got the dense model {model}; `dynamicvit train` makes one "
            "sparse"
        )
    other = None if dense is None else load_model(dense)
    if isinstance(other, SparseViT):
        raise ValueError(f"dense must be a dense model, got the sparse model {dense}")
    films = [source for source in targets if _is_video(source)]
    stills = [source for source in targets if not _is_video(source)]
    # What cannot be read is told before anything is written.
    for source in films:
        video.check_video(source)
    mode, _ = preprocessing(sparse)
    for source in stills:
        read_image(source, mode, "image")

    written: list[Path] = []
    table = Table(Column("image", overflow="fold"), "dense", "pruned")
    sheet: list[explanation.Explanation] = []
    for start in range(0, len(stills), _BATCH):
        batch = stills[start : start + _BATCH]
        for source, found in zip(batch, explanation.explain(sparse, batch, other), strict=True):
            for kind in kinds:
                path = targets[source].with_name(f"{targets[source].name}.{kind}")
                found.save(path)
                written.append(path)
            table.add_row(escape(str(source)), _best(found.dense), _best(found.pruned))
            if len(sheet) < _SHEET:
                sheet.append(found)
    if len(stills) > 1:
        path = Path(output) / f"{_CONTACT_SHEET}.png"
        with written_whole(path) as temporary:
            draw_sheet(sheet).save(temporary, format="PNG")
        written.append(path)
    for source in films:
        path = targets[source].with_name(f"{targets[source].name}.mp4")
        frames = video.explain_video(sparse, source, path, other)
        table.add_row(escape(str(source)), f"{frames} frames", "")
        written.append(path)
    console = Console()
    console.print(table)
    if sheet:
        console.print(f"patches: {' → '.join(map(str, sheet[0].counts))}")
    if len(stills) > len(sheet):
        console.print(f"the contact sheet has the first {len(sheet)} images")
    console.print(f"files written to {output}: {len(written)}", markup=False)
    return written


_CONTACT_SHEET = "contact_sheet"


def _is_video(source: Path) -> bool:
    return source.suffix.lower() in video.SUFFIXES


def _find(images: list[str], output: Path) -> Iterator[tuple[Path, Path]]:
    """Each image or video file, and what it is to be called."""
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
    """File → the file to write for it, but for the suffix: its own name, numbered where several
    have it."""
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


def _best(found: list[Any]) -> str:
    return escape(f"{found[0].name} {found[0].probability:.1%}") if found else ""
