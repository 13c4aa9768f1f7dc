"""What is on a picture, from the command line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dynamicvit.io import predictions as core
from dynamicvit.io.files import write_text
from dynamicvit.io.load import load_model


def predict(
    images: list[str],
    model: str,
    top_k: int = 5,
    output: str | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Classify image files: a table, and JSON.

    Args:
        images: image files.
        model: model folder, hub id or name of a pretrained timm model.
        top_k: how many classes to give for an image; all, if the model has fewer.
        output: JSON file to write.

    Returns:
        For each image its classes with name, index and probability, best first.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with an image, the model or an option.
    """
    found = core.predict(load_model(model), images, top_k)
    print_predictions(images, found)
    results = {
        name: [asdict(prediction) for prediction in predictions]
        for name, predictions in zip(images, found, strict=True)
    }
    if output:
        write_text(Path(output), json.dumps(results, indent=2) + "\n")
    return results


def print_predictions(images: list[str], found: list[list[core.Prediction]]) -> None:
    """Print a table of predictions, one row an image."""
    table = Table("image", "class", "others")
    for name, (best, *others) in zip(images, found, strict=True):
        # Names are a user's, and might look like rich's markup.
        table.add_row(
            escape(name), escape(_text(best)), "\n".join(escape(_text(other)) for other in others)
        )
    Console().print(table)


def _text(prediction: core.Prediction) -> str:
    return f"{prediction.name} {prediction.probability:.1%}"
