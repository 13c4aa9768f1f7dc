"""The notebooks in examples/ are what running them gives."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools.run_notebook import run

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


def _shown(notebook: dict[str, Any]) -> list[list[Any]]:
    """For each cell what it is and its texts, and of pictures, which no two processors make alike
    in every pixel, the size."""
    found = []
    for cell in notebook["cells"]:
        shown: list[Any] = [cell["source"]]
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            shown.append(output.get("text") or data["text/plain"])
            if "image/png" in data:
                with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as picture:
                    shown.append(picture.size)
        found.append(shown)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_shows_what_its_code_gives(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert path.stat().st_size < 200_000
    shown = _shown(notebook)
    assert any(isinstance(item, tuple) for cell in shown for item in cell), "no picture"
    assert _shown(run(notebook)) == shown
