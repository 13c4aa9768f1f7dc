"""A page in the browser: what a model keeps of an image at any keep ratio, and what that saves."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from rich.console import Console

from dynamicvit.core.backbones import UnsupportedBackbone
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.evaluation.console import track
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.evaluate import input_size
from dynamicvit.evaluation.launch import find_device
from dynamicvit.evaluation.timing import compare_speed
from dynamicvit.io.embedded import ASSETS, embedded_images
from dynamicvit.io.images import IMAGE_SUFFIXES, convert_image
from dynamicvit.io.load import load_model
from dynamicvit.io.predictions import Prediction
from dynamicvit.views.explain import explain, is_untrained
from dynamicvit.views.explanation import Explanation

_EMBEDDED = "embedded"
_SLIDER = (0.2, 1.0, 0.05)  # lowest, highest and step of the keep ratio
_THUMBNAIL = 128  # pixels of a photo's longer side, where it is offered
_MOST_PHOTOS = 100  # that are offered
_LOCAL = ("127.0.0.1", "localhost", "::1")
# The page needs no more than this: its own files, and what is in it. Gradio has scripts and styles
# within the page.
_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}


def demo(
    models: list[str] | None = None,
    /,
    images: str | None = None,
    device: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload: float = 20.0,
    quiet: bool = False,
) -> None:
    """Serve a page where images are dropped in and the keep ratio is moved, on this machine alone.

    It shows which patches stay after each stage, the keep scores, the likeliest classes, GMACs and
    measured milliseconds, dense and pruned side by side. It asks nothing of the network, and goes
    on until it is interrupted. Needs the extra "demo".

    Args:
        models: model folders, hub ids or names of pretrained timm models to choose from. Of a dense
            one, the patches stay that its class token attends to most, since it has no trained
            scorers. By default the dense model that the package carries.
        images: folder of photos to offer on the page, the first 100 of them; by default some that
            the package carries.
        device: where models run: cpu, cuda or cuda:NUMBER; by default a GPU if there is one.
        host: address to listen on; 0.0.0.0 lets others use the page. They can read nothing but the
            page and the photos on it, but they make this machine work.
        port: to listen on.
        max_upload: largest file that may be uploaded, in millions of bytes.
        quiet: print the address, and nothing else.

    Raises:
        ValueError, FileNotFoundError, OSError: naming what is wrong with an option or a model, or
            if the port is taken.
    """
    if not 0 < max_upload < float("inf"):
        raise ValueError(f"max_upload must be above 0, got {max_upload}")
    if not 0 < port < 1 << 16:
        raise ValueError(f"port must lie between 1 and 65535, got {port}")
    files = None if images is None else _find_photos(Path(images))
    where = find_device(device)
    console = Console(quiet=quiet, soft_wrap=True, highlight=False)
    # Gradio keeps uploads in files, which are deleted when the page ends.
    with tempfile.TemporaryDirectory(prefix="dynamicvit-demo-") as folder:
        gradio = _import_gradio(Path(folder) / "uploads")
        answers = Answers(models or (), Path(folder), where)
        for name, note in answers.notes.items():
            if note:
                console.print(f"{name}: {note}", markup=False)
        photos = Photos(Path(folder) / "photos", files, quiet)
        page = _build(gradio, answers, photos)
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            max_file_size=round(max_upload * 1e6),
            theme=_theme(gradio),
            css=_CSS,
            footer_links=[],
            app_kwargs={"middleware": [_headers()]},
            run_history=False,  # it would keep what users uploaded
            enable_monitoring=False,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            quiet=True,
            inline=False,
            prevent_thread_lock=True,
        )
        try:
            Console(soft_wrap=True).print(f"{address}  (Ctrl-C ends it)", markup=False)
            if host not in _LOCAL:
                console.print(f"others can reach this page, at {host}, port {port}", markup=False)
            _wait_for_the_end()
        finally:
            page.close(verbose=False)


def _wait_for_the_end() -> None:
    """Until Ctrl-C or SIGTERM, after which there is something to clean up."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(1):  # Windows sees no Ctrl-C in an endless wait
        pass


Pictures = list[tuple[Image.Image, str]]  # each with its caption


class Answer(NamedTuple):
    """What the page shows of an image.

    Attributes:
        kept: the input, and what each stage keeps of it.
        dense, pruned: class → probability.
        scores: each stage's keep scores.
        note: what the user should know of it, in Markdown.
    """

    kept: Pictures
    dense: dict[str, float] | None
    pruned: dict[str, float] | None
    scores: Pictures
    note: str


class Answers:
    """What the page shows for a model and a keep ratio. It answers one call at a time.

    Args:
        names: as `demo`'s `models`.
        within: the folder that images may be read from; None for any. The client supplies a path,
            and must see no file but uploads and photos.
        device: where models run; by default a GPU if there is one.

    Attributes:
        models: name → the model.
        notes: name → where its choice of patches comes from, if it is not trained.

    Raises:
        ValueError, FileNotFoundError: as `demo`.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        within: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        device = find_device(None) if device is None else device
        self._within = within
        self.models: dict[str, SparseViT] = {}
        self.notes: dict[str, str] = {}
        for name in list(names) or [_EMBEDDED]:
            model = load_model(str(ASSETS / "model") if name == _EMBEDDED else name)
            note = ""
            if not isinstance(model, SparseViT):
                try:
                    model = sparsify(model, keep_ratio=0.7, scorer="class_attention")
                except UnsupportedBackbone as error:
                    raise ValueError(
                        "models must be sparse, or have a class token whose attention chooses, "
                        f"got the dense model {name}: {error}"
                    ) from error
                note = _BY_ATTENTION
            elif is_untrained(model):
                note = _UNTRAINED
            if model.merges:
                kind = type(model.scorers[0]).__name__
                raise ValueError(f"models must choose tokens, got {name} with {kind}")
            self.notes[name] = note
            self.models[name] = model.to(device).eval().requires_grad_(False)
        self._fused = {name: model.fuse() for name, model in self.models.items()}
        self._costs: dict[tuple[str, KeepSchedule], list[list[str]]] = {}
        around = environment()
        self.machine = (
            around["gpu"]
            if device.type == "cuda"
            else f"{around['processor']}, threads: {torch.get_num_threads()}"
        )

    def show(self, upload: dict[str, Any] | None, name: str, keep_ratio: float) -> Answer:
        """What stays of an uploaded image, and what it is taken for; nothing without an image.

        Args:
            upload: with the file's `path`, and its original name as `orig_name`.
            name: of a model.
            keep_ratio: share of the patches that reach a stage which it keeps.

        Raises:
            ValueError, TypeError, OSError: naming what is wrong with these.
        """
        model, schedule = self._at(self.models, name, keep_ratio)
        model = model.at(schedule=schedule)
        if not upload:
            return Answer([], None, None, [], "")
        found = _explain(model, self._find(upload["path"]), upload.get("orig_name"))
        start, *counts = found.counts
        height, width = found.pixels.shape[:2]
        first, *stages = found.panels()
        kept = [(first, f"input, {width} × {height} pixels")]
        scores = []
        for stage, (count, panel) in enumerate(zip(counts, stages, strict=True)):
            kept.append((panel, f"stage {stage + 1}, {count} of {start} patches"))
            heat, lowest, highest = found.heat_map(stage)
            enlarged = Image.fromarray(heat).resize(panel.size, Image.Resampling.NEAREST)
            scores.append((enlarged, f"stage {stage + 1}, {lowest:.3g} to {highest:.3g}"))
        notes = [self.notes[name]]
        if found.cropped:
            notes.append(f"The pictures show the model’s crop: {found.cropped}.")
        if not found.dense:
            notes.append("The model has no classes.")
        note = "\n\n".join(filter(None, notes))
        return Answer(kept, _confidences(found.dense), _confidences(found.pruned), scores, note)

    def _find(self, path: str) -> Path:
        found = Path(path).resolve()
        if self._within is not None and not found.is_relative_to(self._within.resolve()):
            raise ValueError("image must be an upload or one of the photos")
        return found

    def cost(self, name: str, keep_ratio: float, again: bool = False) -> list[list[str]]:
        """Operations and time of dense and pruned: the rows of a table. Each setting is measured
        once, unless `again` is asked for.

        Raises:
            ValueError, TypeError: naming what is wrong with an argument.
        """
        model, schedule = self._at(self._fused, name, keep_ratio)
        pruned = model.at(schedule=schedule)
        if again or (name, schedule) not in self._costs:
            self._costs[name, schedule] = _measure(pruned)
        return self._costs[name, schedule]

    def _at(
        self, models: dict[str, SparseViT], name: str, keep_ratio: float
    ) -> tuple[SparseViT, KeepSchedule]:
        if not isinstance(name, str) or name not in models:
            raise ValueError(f"model must be one of {', '.join(models)}, got {name!r}")
        blocks = models[name].schedule.blocks
        ratios = KeepSchedule.from_keep_ratio(keep_ratio, len(blocks) + 1, len(blocks)).ratios
        return models[name], KeepSchedule(blocks, ratios)


_BY_ATTENTION = (
    "This is a dense model without trained scorers: the patches stay that its class token attends "
    "to most (EViT’s rule, not DynamicViT’s). Expect more answers to change than after training. "
    "“dynamicvit quickstart” trains a model, “dynamicvit demo quickstart/sparse” shows it."
)
_UNTRAINED = (
    "The scorers of this model are not trained: they choose patches at random. “dynamicvit train” "
    "trains them."
)


def _measure(pruned: SparseViT) -> list[list[str]]:
    dense, size = pruned.backbone, input_size(pruned)
    gmacs = [count_gmacs(model, size) for model in (dense, pruned)]
    [speed] = compare_speed(dense, pruned, size, batch_sizes=(1,), seconds=0.5)
    times = [f"{1e3 / rate:.2f}" for rate in (speed.dense, speed.sparse)]
    low, high = speed.spread
    return [
        ["GMACs", *(f"{number:.3f}" for number in gmacs), f"{gmacs[1] / gmacs[0] - 1:+.0%}"],
        # The quotient of the two times as they are shown, so that nobody finds another.
        ["ms", *times, f"{float(times[0]) / float(times[1]):.2f}×"],
        ["quartiles", "", "", f"{low:.2f}–{high:.2f}×"],
    ]


def _confidences(found: Sequence[Prediction]) -> dict[str, float] | None:
    """As Gradio's Label takes them. Classes of the same name have their index beside it."""
    names = Counter(item.name for item in found)
    return {
        item.name if names[item.name] == 1 else f"{item.name} ({item.index})": item.probability
        for item in found
    } or None


def _explain(model: SparseViT, path: Path, name: str | None) -> Explanation:
    """ValueError, calling the file by the name that the user knows, if it cannot be read."""
    called = name or path.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return explain(model, path)
    except (ValueError, FileNotFoundError) as error:
        bomb = Image.DecompressionBombWarning | Image.DecompressionBombError
        if isinstance(error.__cause__, bomb):
            most = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
            raise ValueError(
                f"cannot read image {called}: it has more than {most} million pixels"
            ) from error
        raise ValueError(str(error).replace(str(path), called)) from error


class Photos:
    """Photos to pick from on the page.

    Args:
        folder: to write thumbnails to, and copies of what is picked; all of it is served.
        files: the photos; None for some that the package carries.
        quiet: show no progress.

    Attributes:
        thumbnails: of the photos, in order.
        label: what they are.
        first: the photo to begin with.

    Raises:
        ValueError: if none of them can be read.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None, quiet: bool = False) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self.first = 0
        self.label = "photos"
        if files is None:
            files = _write_embedded(folder)
            self.first = len(files) - 1  # an ankle boot
            self.label = "photos (Fashion-MNIST)"
        self._files: list[Path] = []
        self.thumbnails: list[Path] = []
        for file in track(files, "reading photos", quiet):
            try:
                picture = _read_thumbnail(file)
            except Exception:  # foreign bytes make Pillow raise nearly anything
                continue
            self.thumbnails.append(folder / f"thumbnail-{len(self._files)}.png")
            picture.save(self.thumbnails[-1])
            self._files.append(file)
        if not self._files:
            raise ValueError(f"images must hold photos, got none that can be read in {len(files)}")

    def pick(self, index: int) -> Path:
        """A copy of a photo, of its own name, that the page may serve.

        Raises:
            ValueError: if there is no such photo.
        """
        if type(index) is not int or not 0 <= index < len(self._files):
            raise ValueError(f"photo must be from 0 to {len(self._files) - 1}, got {index!r}")
        file = self._files[index]
        copy = self._folder / f"photo-{index}" / file.name
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        return copy


def _find_photos(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"images must be a folder, got {str(folder)!r}")
    files = (item for item in folder.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES)
    found = sorted(item for item in files if item.is_file())[:_MOST_PHOTOS]
    if not found:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"images must hold {kinds} files, got the folder {folder} without any")
    return found


def _write_embedded(folder: Path) -> list[Path]:
    """One of the embedded images a class, as files."""
    files = []
    for name, index, picture in embedded_images("val"):
        if index == 3:
            files.append(folder / f"{name[2:]}.png")
            picture.save(files[-1])
    return files


def _read_thumbnail(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        opened.draft("RGB", (2 * _THUMBNAIL, 2 * _THUMBNAIL))  # fast, where the format allows it
        picture = convert_image(ImageOps.exif_transpose(opened), "RGB")
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture


def _headers() -> Any:
    """Middleware of Starlette's that adds security headers to every answer."""
    from starlette.datastructures import MutableHeaders  # Gradio's own foundation
    from starlette.middleware import Middleware

    class Headers:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def add(message: Any) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(_HEADERS)
                await send(message)

            await self.app(scope, receive, add)

    return Middleware(Headers)


def _import_gradio(uploads: Path) -> Any:
    # Before the import: this is when Gradio looks at them.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    try:
        import gradio  # an extra
    except ImportError as error:
        raise ValueError("demo needs the extra: pip install 'dynamicvit[demo]'") from error

    async def refuse(url: str, cache_dir: str) -> str:
        raise ValueError("image must be an upload, not an address")

    # It would fetch an address that is given for a file, however large what lies there is.
    gradio.processing_utils.async_ssrf_protected_download = refuse
    return gradio


def _build(gradio: Any, answers: Answers, photos: Photos) -> Any:
    """The page, not yet served."""
    gradio.set_static_paths([photos.pick(0).parents[1]])  # served from there, and not thrown away
    first = next(iter(answers.models.values()))
    lowest, highest, step = _SLIDER
    start = round(round(first.schedule.ratios[0] / step) * step, 2)
    pictures = {
        "format": "png",
        "columns": 4,
        "object_fit": "contain",
        "show_label": False,
        "buttons": ["fullscreen"],
        "interactive": False,
        "elem_classes": "pictures",
    }
    with gradio.Blocks(
        title="dynamicvit", analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        gradio.Markdown("# dynamicvit\nWhich patches leave, which stay, and what that saves.")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                image = gradio.Image(
                    photos.pick(photos.first),
                    label="picture",  # Gradio would translate "image"
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=260,
                    buttons=[],
                    elem_id="image",
                    alt_text="the image as it was given",
                )
                offered = gradio.Dataset(
                    components=[gradio.Image(render=False)],
                    samples=[[str(path)] for path in photos.thumbnails],
                    samples_per_page=12,
                    type="index",
                    label=photos.label,
                    elem_id="photos",
                )
                model = gradio.Dropdown(
                    list(answers.models), label="model", elem_id="model", filterable=False
                )
                ratio = gradio.Slider(
                    lowest,
                    highest,
                    min(max(start, lowest), highest),
                    step=step,
                    label="keep ratio",
                    info="share of the patches reaching a stage that it keeps",
                    elem_id="ratio",
                )
            with gradio.Column(scale=3, min_width=300):
                note = gradio.Markdown(elem_id="note")
                gradio.Markdown("### What stays\nStriped: patches that have left.")
                kept = gradio.Gallery(label="what stays", elem_id="kept", **pictures)
                gradio.Markdown("### What it is taken for")
                with gradio.Row():
                    dense = gradio.Label(label="dense", min_width=260, elem_id="dense")
                    pruned = gradio.Label(label="pruned", min_width=260, elem_id="pruned")
                gradio.Markdown("### What it saves")
                cost = gradio.Dataframe(
                    headers=["an image", "dense", "pruned", "gain"],
                    column_widths=["28%", "22%", "22%", "28%"],
                    show_label=False,
                    interactive=False,
                    wrap=True,
                    buttons=[],
                    elem_id="cost",
                )
                again = gradio.Button("Measure again", size="sm", elem_id="again")
                gradio.Markdown(
                    "Time was measured here, in PyTorch and float32, one random image after the "
                    "other, dense and pruned in turn: medians, their quotient, and the quartiles "
                    "of the quotients of the rounds. Other work of this machine is in it: where "
                    f"quartiles lie far apart, measure again. {escape(answers.machine)}."
                )
                gradio.Markdown(
                    "### Keep scores\nBright is high, grey had left before; each stage has its own "
                    "scale."
                )
                scores = gradio.Gallery(label="keep scores", elem_id="scores", **pictures)

        def told(function: Callable[..., Any]) -> Callable[..., Any]:
            """The function, whose errors the page shows."""

            @wraps(function)
            def call(*arguments: Any) -> Any:
                try:
                    return function(*arguments)
                except (ValueError, TypeError, OSError) as error:
                    raise gradio.Error(
                        escape(str(error)), duration=None, print_exception=False
                    ) from error

            return call

        # One call at a time, so that nothing of ours disturbs what is timed. Inputs come as they
        # are: Gradio would read an image file itself, whatever is in it and however large it is.
        # Of moves made while one waits, the last is answered: what is shown is what is set.
        options = {
            "trigger_mode": "always_last",
            "concurrency_limit": 1,
            "concurrency_id": "models",
            "preprocess": False,
        }
        gradio.on(
            [page.load, image.change, model.change, ratio.change],
            told(answers.show),
            [image, model, ratio],
            [kept, dense, pruned, scores, note],
            api_name="show",
            **options,
        )
        gradio.on(
            [page.load, model.change, ratio.change],
            told(answers.cost),
            [model, ratio],
            cost,
            api_name="cost",
            **options,
        )
        again.click(
            told(partial(answers.cost, again=True)),
            [model, ratio],
            cost,
            api_visibility="private",
            **options,
        )
        offered.click(told(photos.pick), offered, image, api_visibility="private", **options)
    return page


def _theme(gradio: Any) -> Any:
    """Fonts that the system has: others would come from the network."""
    theme = gradio.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    pale, pale_dark = "*neutral_600", "*neutral_300"  # Gradio's own are hard to read
    return theme.set(
        body_text_color_subdued=pale,
        body_text_color_subdued_dark=pale_dark,
        block_info_text_color=pale,
        block_info_text_color_dark=pale_dark,
    )


# Gradio's gallery has room for two rows, squares of one size, and captions over the pictures.
_CSS = """
#image img { width: 100%; height: 100%; object-fit: contain; }
.pictures img { image-rendering: pixelated; }
.pictures .grid-wrap { min-height: 6rem; max-height: none; }
.pictures .grid-container { padding-top: 0;
  grid-template-columns: repeat(auto-fill, minmax(min(11rem, 40%), 1fr)); }
.pictures .thumbnail-item { aspect-ratio: auto; height: auto; }
.pictures .caption-label { position: static; max-width: none; white-space: normal; border: 0; }
"""
