"""A page in the browser: what a model keeps of an image at any keep ratio, and what that saves."""

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
from dynamicvit.views.demo_photos import Photos, find_photos

_SLIDER = (0.2, 1.0, 0.05)  # lowest, highest and step of the keep ratio
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
    files = None if images is None else find_photos(Path(images))
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
