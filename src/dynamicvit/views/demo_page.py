"""The demo's page: what it has, and what calls what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from html import escape
from typing import Any

from dynamicvit.views.demo_answers import Answers
from dynamicvit.views.demo_photos import Photos


def build_page(gradio: Any, answers: Answers, photos: Photos, embedded: bool) -> Any:
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


def create_theme(gradio: Any) -> Any:
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
CSS = """
#image img { width: 100%; height: 100%; object-fit: contain; }
.pictures img { image-rendering: pixelated; }
.pictures .grid-wrap { min-height: 6rem; max-height: none; }
.pictures .grid-container { padding-top: 0;
  grid-template-columns: repeat(auto-fill, minmax(min(11rem, 40%), 1fr)); }
.pictures .thumbnail-item { aspect-ratio: auto; height: auto; }
.pictures .caption-label { position: static; max-width: none; white-space: normal; border: 0; }
"""
