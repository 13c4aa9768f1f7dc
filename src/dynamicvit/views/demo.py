"""demo(): a web page that shows what a model keeps of an image at any keep ratio."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from dynamicvit.evaluation.launch import find_device
from dynamicvit.views.demo_answers import Answers
from dynamicvit.views.demo_page import CSS, build_page, create_theme
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
        page = build_page(gradio, answers, photos, embedded=files is None)
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
        theme=create_theme(gradio),
        css=CSS,
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
