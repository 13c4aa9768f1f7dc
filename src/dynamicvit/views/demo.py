"""demo(): a web page that shows what a model keeps of an image at any keep ratio."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from functools import partial, wraps
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from dynamicvit.evaluation.launch import find_device
from dynamicvit.views.demo_answers import Answers
from dynamicvit.views.demo_photos import Photos, find_photos, write_embedded_photos

_LOCAL = ("127.0.0.1", "localhost", "::1")
# The page loads only its own files. Gradio has scripts and styles within the page.
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
    keep_ratio: float | None = None,
    per_image: bool = False,
    device: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload: float = 20.0,
    quiet: bool = False,
) -> None:
    """Serve a web page that shows what a model keeps of an image at any keep ratio.

    The page takes uploads and has a slider for the keep ratio. It shows which patches stay after
    each stage, the keep scores, the likeliest classes, GMACs and measured milliseconds, dense and
    pruned side by side. By default only this machine can open it. It needs no network, and runs
    until Ctrl-C. Needs the extra "demo".

    Args:
        models: model folders, hub ids or names of pretrained timm models to choose from. A dense
            model has no scorers: of it, the patches stay that its class token attends to most. By
            default the dense model in the package.
        images: folder of photos to offer on the page, the first 100 of them; by default photos in
            the package.
        keep_ratio: where the slider begins; by default at the first model's own.
        per_image: each image its own budget; the mean is that of the slider. `dynamicvit calibrate`
            prepares a model for it.
        device: where models run: cpu, cuda or cuda:NUMBER; by default a GPU if there is one.
        host: address to listen on; 0.0.0.0 lets others use the page. They can read only the page
            and its photos, but their requests use this machine's processor.
        port: port to listen on.
        max_upload: largest file that may be uploaded, in millions of bytes.
        quiet: print only the address.

    Raises:
        ValueError, FileNotFoundError, OSError: naming what is wrong with an option or a model, or
            if the port is taken.
    """
    if not 0 < max_upload < float("inf"):
        raise ValueError(f"max_upload must be above 0, got {max_upload}")
    if not 0 < port < 1 << 16:
        raise ValueError(f"port must lie between 1 and 65535, got {port}")
    files = None if images is None else find_photos(Path(images))
    where = find_device(device)
    console = Console(quiet=quiet, soft_wrap=True, highlight=False)
    # Gradio keeps uploads in files, which are deleted when the page ends.
    with tempfile.TemporaryDirectory(prefix="dynamicvit-demo-") as name:
        folder = Path(name)
        gradio = _import_gradio(folder / "uploads")
        answers = Answers(models or (), folder, where, keep_ratio, per_image)
        for model, note in answers.notes.items():
            if note:
                console.print(f"{model}: {note}", markup=False)
        photos = Photos(
            files or write_embedded_photos(folder / "embedded"), folder / "photos", quiet
        )
        page = _build(gradio, answers, photos, embedded=files is None)
        address = _start(gradio, page, host, port, max_upload)
        try:
            Console(soft_wrap=True).print(f"{address}  (Ctrl-C ends it)", markup=False)
            if host not in _LOCAL:
                console.print(f"others can reach this page, at {host}, port {port}", markup=False)
            _wait_for_the_end()
        finally:
            page.close(verbose=False)


def _start(gradio: Any, page: Any, host: str, port: int, max_upload: float) -> str:
    """Serve the page without anything that reaches beyond it, and give its address."""
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
        quiet=True,
        prevent_thread_lock=True,
    )
    return str(address)


def _wait_for_the_end() -> None:
    """Wait for Ctrl-C or SIGTERM, after which the caller cleans up."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(1):  # Windows sees no Ctrl-C in an endless wait
        pass


def _headers() -> Any:
    """Middleware that adds security headers to every answer."""
    from starlette.middleware import Middleware  # Gradio stands on Starlette
    from starlette.middleware.base import BaseHTTPMiddleware

    async def add(request: Any, answer: Callable[[Any], Any]) -> Any:
        response = await answer(request)
        response.headers.update(_HEADERS)
        return response

    return Middleware(BaseHTTPMiddleware, dispatch=add)


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


def _build(gradio: Any, answers: Answers, photos: Photos, embedded: bool) -> Any:
    """The page, not yet served."""
    first = len(photos.thumbnails) - 1 if embedded else 0  # the embedded ankle boot
    gradio.set_static_paths([photos.pick(first).parents[1]])  # served from there, and not deleted
    with gradio.Blocks(
        title="dynamicvit", analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        gradio.Markdown("# dynamicvit\nWhich patches leave, which stay, and what that saves.")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                label = "photos (Fashion-MNIST)" if embedded else "photos"
                image, offered = _add_images(gradio, photos, first, label)
                settings = _add_settings(gradio, answers)
            with gradio.Column(scale=3, min_width=300):
                note = gradio.Markdown(elem_id="note")
                kept = _add_gallery(
                    gradio, "What stays", "Striped: patches that have left.", "kept"
                )
                gradio.Markdown("### The likeliest classes")
                head = ["class", "dense", "pruned"]
                classes = _add_table(gradio, "classes", head, ["44%", "28%", "28%"])
                cost, again = _add_cost(gradio, answers.machine)
                legend = "Bright is high, grey had left before. Each stage has its own scale."
                scores = _add_gallery(gradio, "Keep scores", legend, "scores")
        # One call at a time, so that no other call disturbs what is timed. Inputs come as they are:
        # Gradio would read an image file itself, whatever is in it and however large it is. Of
        # changes made while one call runs, only the last is answered.
        options = {
            "trigger_mode": "always_last",
            "concurrency_limit": 1,
            "concurrency_id": "models",
            "preprocess": False,
        }
        told = partial(_tell_errors, gradio)
        changes = [page.load, *(setting.change for setting in settings)]
        shown = [kept, classes, scores, note]
        show, measure = told(answers.show), told(answers.cost)
        inputs = [image, *settings]
        gradio.on([*changes, image.change], show, inputs, shown, api_name="show", **options)
        gradio.on(changes, measure, settings, cost, api_name="cost", **options)
        options["api_visibility"] = "private"
        again.click(told(partial(answers.cost, again=True)), settings, cost, **options)
        offered.click(told(photos.pick), offered, image, **options)
    return page


def _add_images(gradio: Any, photos: Photos, first: int, label: str) -> tuple[Any, Any]:
    """The image that is shown, and the photos to pick from."""
    image = gradio.Image(
        photos.pick(first),
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
        label=label,
        elem_id="photos",
    )
    return image, offered


def _add_settings(gradio: Any, answers: Answers) -> list[Any]:
    """Model and keep ratio."""
    model = gradio.Dropdown(list(answers.models), label="model", elem_id="model", filterable=False)
    lowest = max(0.2, answers.lowest)
    slider = gradio.Slider(
        lowest,
        1,
        max(lowest, next(iter(answers.models.values())).schedule.ratios[0]),
        step=0.05,
        label="keep ratio",
        info="share of the patches that each stage keeps",
        elem_id="ratio",
    )
    return [model, slider]


def _add_gallery(gradio: Any, title: str, legend: str, name: str) -> Any:
    gradio.Markdown(f"### {title}\n{legend}")
    return gradio.Gallery(
        label=title,
        elem_id=name,
        format="png",
        columns=4,
        object_fit="contain",
        show_label=False,
        buttons=["fullscreen"],
        interactive=False,
        elem_classes="pictures",
    )


def _add_table(gradio: Any, name: str, head: list[str], widths: list[str]) -> Any:
    return gradio.Dataframe(
        headers=head,
        column_widths=widths,
        show_label=False,
        interactive=False,
        wrap=True,
        buttons=[],
        elem_id=name,
    )


def _add_cost(gradio: Any, machine: str) -> tuple[Any, Any]:
    """The table of what is saved, and the button that measures anew."""
    gradio.Markdown("### What it saves")
    head = ["an image", "dense", "pruned", "gain"]
    cost = _add_table(gradio, "cost", head, ["28%", "22%", "22%", "28%"])
    again = gradio.Button("Measure again", size="sm", elem_id="again")
    gradio.Markdown(
        "The times are medians, measured here in PyTorch and float32, one random image at a time, "
        "dense and pruned in turn. The gain is their quotient; the quartiles are those of the "
        "quotients of the rounds. Other programs disturb the measurement: if the quartiles lie far "
        f"apart, measure again. {escape(machine)}."
    )
    return cost, again


def _tell_errors(gradio: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors the page shows."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, TypeError, OSError) as error:
            raise gradio.Error(escape(str(error)), duration=None, print_exception=False) from error

    return call


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
