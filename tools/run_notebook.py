"""Run a notebook's code and write its outputs into it, without Jupyter.

    python tools/run_notebook.py examples/explain.ipynb

What cells print, and the last value of each as text and picture, is kept; files that they write are
not.
"""

import ast
import base64
import contextlib
import copy
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from dynamicvit.io.files import write_text


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs that its code cells have now."""
    notebook = copy.deepcopy(notebook)
    names: dict[str, Any] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for number, cell in enumerate(cells, start=1):
            cell["execution_count"], cell["outputs"] = number, _run_cell(cell, names, number)
    return notebook


def _run_cell(cell: dict[str, Any], names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    *body, last = ast.parse("".join(cell["source"])).body
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        else:
            exec(compile(ast.Module([last], []), f"cell {number}", "exec"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append(
            {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}
        )
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_png_"):
            data["image/png"] = base64.b64encode(value._repr_png_()).decode()
        outputs.append(
            {
                "output_type": "execute_result",
                "execution_count": number,
                "metadata": {},
                "data": data,
            }
        )
    return outputs


if __name__ == "__main__":
    path = Path(sys.argv[1])
    write_text(
        path, json.dumps(run(json.loads(path.read_text())), indent=1, ensure_ascii=False) + "\n"
    )
