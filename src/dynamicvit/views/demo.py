"""A page in the browser: what a model keeps of an image at any keep ratio, and what that saves."""

from __future__ import annotations

import base64
import io
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from dynamicvit.core.backbones import UnsupportedBackbone
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT, sparsify
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.evaluate import input_size
from dynamicvit.evaluation.launch import find_device
from dynamicvit.evaluation.sweep import reschedule
from dynamicvit.evaluation.timing import compare_speed
from dynamicvit.io.embedded import ASSETS, embedded_images
from dynamicvit.io.load import load_model
from dynamicvit.io.predictions import Prediction
from dynamicvit.views.drawing import hatch, spread
from dynamicvit.views.explain import explain
from dynamicvit.views.explanation import Explanation

_EMBEDDED = "embedded"
_SLIDER = (0.2, 1.0, 0.05)  # lowest, highest and step of the keep ratio
_SMALL = 128  # images of fewer pixels than that are enlarged with sharp edges
_LOCAL = ("127.0.0.1", "localhost", "::1")


def demo(
    models: list[str] | None = None,
    /,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload: float = 20.0,
) -> None:
    """Serve a page where images are dropped in and the keep ratio is moved, on this machine alone.

    It shows which patches stay after each stage, the keep scores, the likeliest classes, GMACs and
    measured milliseconds, dense and pruned side by side. It asks nothing of the network, and goes
    on until it is interrupted. Needs the extra "demo".

    Args:
        models: model folders, hub ids or names of pretrained timm models to choose from. Of a dense
            one, the patches stay that its class token attends to most, since it has no trained
            scorers. By default the dense model that the package carries.
        host: address to listen on; 0.0.0.0 lets others use the page, who can then read nothing but
            it, but do make this machine work.
        port: to listen on.
        max_upload: largest file that may be uploaded, in millions of bytes.

    Raises:
        ValueError, FileNotFoundError, OSError: naming what is wrong with an option or a model, or
            if the port is taken.
    """
    if not 0 < max_upload < float("inf"):
        raise ValueError(f"max_upload must be above 0, got {max_upload}")
    if not 0 < port < 1 << 16:
        raise ValueError(f"port must lie between 1 and 65535, got {port}")
    console = Console()
    # Gradio keeps uploads in files, which are to go when the page does.
    with tempfile.TemporaryDirectory(prefix="dynamicvit-demo-") as folder:
        gradio = _import_gradio(Path(folder) / "uploads")
        answers = Answers(models or (), Path(folder))
        page = _build(gradio, answers, _write_photos(Path(folder) / "photos"))
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            max_file_size=round(max_upload * 1e6),
            theme=_theme(gradio),
            css=_CSS,
            footer_links=[],
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
            console.print(f"{address}  (Ctrl-C ends it)", markup=False)
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


class Answers:
    """What the page shows: HTML for a model and a keep ratio. To be asked one thing at a time.

    Args:
        names: as `demo`'s `models`.
        within: the folder that images may be read from; None for any. Who asks names a file of this
            machine, and should see none but uploads and photos.

    Attributes:
        models: name → the model, on a GPU if there is one.
        notes: name → HTML that tells where its choice of patches comes from, if untrained.

    Raises:
        ValueError, FileNotFoundError: as `demo`.
    """

    def __init__(self, names: Iterable[str] = (), within: Path | None = None) -> None:
        device = find_device(None)
        self._within = within
        self.models: dict[str, SparseViT] = {}
        self.notes: dict[str, str] = {}
        for name in list(names) or [_EMBEDDED]:
            model = load_model(str(ASSETS / "model") if name == _EMBEDDED else name)
            self.notes[name] = ""
            if not isinstance(model, SparseViT):
                try:
                    model = sparsify(model, keep_ratio=0.7, scorer="class_attention")
                except UnsupportedBackbone as error:
                    raise ValueError(
                        "models must be sparse, or have a class token whose attention chooses, "
                        f"got the dense model {name}: {error}"
                    ) from error
                self.notes[name] = _UNTRAINED
            if model.merges:
                kind = type(model.scorers[0]).__name__
                raise ValueError(f"models must choose tokens, got {name} with {kind}")
            self.models[name] = model.to(device).eval().requires_grad_(False)
        self._fused = {name: model.fuse() for name, model in self.models.items()}
        self._costs: dict[tuple[str, KeepSchedule], str] = {}
        around = environment()
        self._machine = (
            around["gpu"]
            if device.type == "cuda"
            else f"{around['processor']}, threads: {torch.get_num_threads()}"
        )

    def show(self, upload: dict[str, Any] | None, name: str, keep_ratio: float) -> tuple[str, str]:
        """What stays of an uploaded image and what it is taken for, or what is wrong with it; and
        its keep scores.

        Args:
            upload: with the file's `path`, and its original name as `orig_name`.
            name: of a model.
            keep_ratio: share of the patches that reach a stage which it keeps.
        """
        if not upload:
            return '<p class="dv-note">Drop an image, or take one of the photos.</p>', ""
        try:
            model = reschedule(*self._at(self.models, name, keep_ratio))
            found = _explain(model, self._find(upload["path"]), upload.get("orig_name"))
        except (ValueError, TypeError, OSError) as error:
            return _message(error), ""
        return _draw(found), _draw_scores(found) + self.notes[name]

    def _find(self, path: str) -> Path:
        found = Path(path).resolve()
        if self._within is not None and not found.is_relative_to(self._within.resolve()):
            raise ValueError("image must be an upload or one of the photos")
        return found

    def cost(self, name: str, keep_ratio: float, again: bool = False) -> str:
        """Operations and time of dense and pruned: a table. Each setting is measured once, unless
        `again` is asked for."""
        try:
            model, schedule = self._at(self._fused, name, keep_ratio)
            pruned = reschedule(model, schedule)
        except (ValueError, TypeError) as error:
            return _message(error)
        if again or (name, schedule) not in self._costs:
            self._costs[name, schedule] = self._measure(pruned, keep_ratio)
        return self._costs[name, schedule]

    def _at(
        self, models: dict[str, SparseViT], name: str, keep_ratio: float
    ) -> tuple[SparseViT, KeepSchedule]:
        if not isinstance(name, str) or name not in models:
            raise ValueError(f"model must be one of {', '.join(models)}, got {name!r}")
        blocks = models[name].schedule.blocks
        ratios = KeepSchedule.from_keep_ratio(keep_ratio, len(blocks) + 1, len(blocks)).ratios
        return models[name], KeepSchedule(blocks, ratios)

    def _measure(self, pruned: SparseViT, keep_ratio: float) -> str:
        dense, size = pruned.backbone, input_size(pruned)
        gmacs = [count_gmacs(model, size) for model in (dense, pruned)]
        [speed] = compare_speed(dense, pruned, size, batch_sizes=(1,), seconds=0.5)
        fewer = 100 * (1 - gmacs[1] / gmacs[0])
        low, high = speed.spread
        rows = [
            ("GMACs an image", *(f"{number:.3f}" for number in gmacs), f"{fewer:.0f}% fewer"),
            (
                "ms an image",
                *(f"{1e3 / rate:.1f}" for rate in (speed.dense, speed.sparse)),
                f"{speed.speed_up:.2f}× as fast ({low:.2f} to {high:.2f})",
            ),
        ]
        body = "".join(
            f'<tr><th scope="row">{row[0]}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in rows
        )
        return (
            '<div class="dv"><table class="dv-cost"><caption><b>What it saves</b> keep ratio '
            f'{keep_ratio:g}</caption><thead><tr><th scope="col">cost</th>'
            '<th scope="col">dense</th><th scope="col">pruned</th><th scope="col">gain</th></tr>'
            f"</thead><tbody>{body}</tbody></table>"
            '<p class="dv-note">Time was measured here, in PyTorch and float32, one random image '
            "after the other, dense and pruned in turn: medians of both and of the gain, whose "
            "quartiles are in brackets. What else this machine was doing is in it: where quartiles "
            f"lie far apart, measure again. {escape(self._machine)}.</p></div>"
        )


_UNTRAINED = (
    '<p class="dv-note">This is a dense model without trained scorers: the patches stay that its '
    "class token attends "
    "to most (EViT’s rule, not DynamicViT’s). Expect more answers to change than after training: "
    "“dynamicvit quickstart” trains a model, “dynamicvit demo quickstart/sparse” shows it.</p>"
)


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


def _write_photos(folder: Path) -> list[Path]:
    """One of the embedded images a class, as files; the last of them an ankle boot."""
    folder.mkdir()
    files = []
    for name, index, picture in embedded_images("val"):
        if index == 3:
            files.append(folder / f"{name[2:]}.png")
            picture.save(files[-1])
    return files


def _build(gradio: Any, answers: Answers, photos: Sequence[Path]) -> Any:
    """The page, not yet served."""
    gradio.set_static_paths([photos[0].parent])  # served from there, and not thrown away
    first = next(iter(answers.models.values()))
    lowest, highest, step = _SLIDER
    start = round(round(first.schedule.ratios[0] / step) * step, 2)
    with gradio.Blocks(
        title="dynamicvit", analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        gradio.HTML("<h1>What leaves, what stays, what it saves</h1>", padding=False)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                image = gradio.Image(
                    photos[-1],
                    label="picture",  # Gradio would translate "image"
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=260,
                    buttons=[],
                    elem_id="image",
                    alt_text="the image as it was given",
                )
                gradio.Examples(
                    [[str(path)] for path in photos],
                    image,
                    label="photos (Fashion-MNIST)",
                    cache_examples=False,
                    api_visibility="private",
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
                shown = gradio.HTML(elem_id="shown", padding=False)
                cost = gradio.HTML(elem_id="cost", padding=False)
                again = gradio.Button("Measure again", size="sm", elem_id="again")
                scores = gradio.HTML(elem_id="scores", padding=False)
        # One call at a time, so that nothing of ours disturbs what is timed. Inputs come as they
        # are: Gradio would read an image file itself, whatever is in it and however large it is.
        # Of moves made while one waits, the last is answered: what is shown is what is set.
        options = {
            "trigger_mode": "always_last",
            "concurrency_limit": 1,
            "concurrency_id": "models",
            "preprocess": False,
            "show_progress": "minimal",
        }
        gradio.on(
            [page.load, image.change, model.change, ratio.change],
            answers.show,
            [image, model, ratio],
            [shown, scores],
            api_name="show",
            **options,
        )
        gradio.on(
            [page.load, model.change, ratio.change],
            answers.cost,
            [model, ratio],
            cost,
            api_name="cost",
            **options,
        )
        again.click(
            partial(answers.cost, again=True),
            [model, ratio],
            cost,
            api_visibility="private",
            **options,
        )
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


def _explain(model: SparseViT, path: Path, name: str | None) -> Explanation:
    """ValueError, calling the file by the name that the user knows, if it is not to be read."""
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


# HTML. Everything that is not ours (class names, file names) is escaped.


def _message(error: Exception) -> str:
    return f'<p class="dv-error" role="alert">{escape(str(error))}</p>'


def _draw(found: Explanation) -> str:
    start, *counts = found.counts
    height, width = found.pixels.shape[:2]
    panels = [_figure(found.pixels, "input", f"{width} × {height} pixels", "the model’s input")]
    for stage, (block, count) in enumerate(zip(found.blocks, counts, strict=True)):
        title = f"stage {stage + 1}"
        below = f"{count} of {start} patches, before block {block}"
        gone = ~spread(found.masks[stage], found.patch_size, (height, width))
        dimmed = hatch(found.pixels, gone)
        panels.append(_figure(dimmed, title, below, f"{title}: {below}; the others dimmed"))
    sides = "<p>The model has no classes.</p>"
    if found.dense:
        sides = '<div class="dv-sides">{}{}</div>'.format(
            _predictions("dense", found.dense_model, found.dense),
            _predictions("pruned", " → ".join(map(str, counts)) + " patches", found.pruned),
        )
    return (
        f'<div class="dv"><h2>What stays</h2><div class="dv-panels">{"".join(panels)}</div>'
        f"<h2>What it is taken for</h2>{sides}</div>"
    )


def _draw_scores(found: Explanation) -> str:
    panels = []
    for stage in range(len(found.blocks)):
        heat, lowest, highest = found.heat_map(stage)
        title, below = f"stage {stage + 1}", f"{lowest:.3g} to {highest:.3g}"
        panels.append(_figure(heat, title, below, f"keep scores of {title}: {below}"))
    return (
        f'<div class="dv"><h2>Keep scores</h2><div class="dv-panels">{"".join(panels)}</div>'
        '<p class="dv-note">Bright is high, grey had left before; each stage on its own scale.'
        "</p></div>"
    )


def _figure(pixels: np.ndarray, title: str, below: str, alternative: str) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    data = base64.b64encode(content.getvalue()).decode()
    sharp = ' class="dv-sharp"' if min(pixels.shape[:2]) < _SMALL else ""
    return (
        f'<figure><img{sharp} alt="{alternative}" src="data:image/png;base64,{data}">'
        f"<figcaption><b>{title}</b> {below}</figcaption></figure>"
    )


def _predictions(side: str, note: str, found: Sequence[Prediction]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(item.name)}</th><td class="dv-bar">'
        f'<div style="width:{100 * item.probability:.1f}%"></div></td>'
        f"<td>{item.probability:.1%}</td></tr>"
        for item in found
    )
    return (
        f'<table class="dv-{side}"><caption><b>{side}</b> {escape(note)}</caption>'
        f"<tbody>{rows}</tbody></table>"
    )


_CSS = """
.dv h2 { font-size: 1.05rem; margin: 1rem 0 .4rem; }
.dv table, .dv tr, .dv th, .dv td { border: 0; }
.dv-panels { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); }
.dv-panels figure { margin: 0; max-width: 20rem; }
.dv-panels img { display: block; width: 100%; }
.dv-panels img.dv-sharp { image-rendering: pixelated; }
.dv figcaption, .dv-note { font-size: .875rem; color: var(--body-text-color-subdued); }
.dv figcaption b, .dv caption b { color: var(--body-text-color); }
.dv-note { margin: .5rem 0; max-width: 50rem; }
.dv-sides { display: grid; gap: .75rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
.dv table { width: 100%; border-collapse: collapse; font-size: .9375rem; }
.dv caption { text-align: start; color: var(--body-text-color-subdued); }
.dv th, .dv td { padding: .2rem .5rem .2rem 0; text-align: start; font-weight: normal; }
.dv tbody th { overflow-wrap: anywhere; }
.dv td { font-variant-numeric: tabular-nums; }
.dv .dv-bar { width: 45%; }
.dv .dv-bar div { height: .8rem; min-width: 1px; }
.dv-dense .dv-bar div { background: #7e869c; }
.dv-pruned .dv-bar div { background: #2f7fc4; }
.dv .dv-cost th, .dv .dv-cost td { border-bottom: 1px solid var(--border-color-primary); }
.dv-cost thead th { font-weight: bold; }
.dv-error { padding: .75rem 1rem; border-left: 4px solid #c62828; color: var(--body-text-color);
  background: var(--background-fill-secondary); overflow-wrap: anywhere; }
#image img { width: 100%; height: 100%; object-fit: contain; }
.gallery img { image-rendering: pixelated; }
"""
