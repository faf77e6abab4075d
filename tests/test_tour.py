"""The notebook runs from its first cell to its last, here with few updates.

``python tests/test_tour.py`` runs it whole and writes its outputs into it.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "launch/tour.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def executed(source, names):
    """Runs a cell; its outputs, as a notebook keeps them."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        value = None
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    outputs = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    if value is not None:
        data = {"text/plain": [repr(value)]}
        if isinstance(value, Image.Image):
            file = io.BytesIO()
            value.save(file, format="PNG", optimize=True)
            picture = base64.b64encode(file.getvalue()).decode()
            size = "x".join(map(str, value.size))
            data = {"image/png": picture, "text/plain": [f"<picture of {size}>"]}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    return outputs


@pytest.mark.thorough
def test_the_tour_runs(monkeypatch):
    monkeypatch.setenv("TOUR_STEPS", "2")
    notebook, names = json.loads(NOTEBOOK.read_text()), {}
    outputs = [executed("".join(cell["source"]), names) for cell in code_cells(notebook)]
    kinds = [[sorted(o.get("data", {"text": 0}))[0] for o in found] for found in outputs]
    assert kinds == [
        [],
        ["image/png"],  # pairs
        ["text"],
        ["text"],  # losses
        ["image/png"],  # generated pairs
        ["text"],  # alignment
        ["text", "image/png"],  # those that were kept
    ]


def test_the_tour_uses_the_public_face_only():
    notebook = json.loads(NOTEBOOK.read_text())
    source = "\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    assert modules <= {"jointseg_jax", "jax", "jax.numpy", "numpy", "optax", "os", "PIL"}
    lines = [line for line in source.splitlines() if line.strip() and line.strip()[0] != "#"]
    assert len(lines) <= 80


def test_outputs_are_those_of_one_run_or_none():
    counts = [cell["execution_count"] for cell in code_cells(json.loads(NOTEBOOK.read_text()))]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))
    assert NOTEBOOK.stat().st_size < 400_000


def main():
    """Runs the notebook and writes its outputs."""
    notebook, names = json.loads(NOTEBOOK.read_text()), {}
    for count, cell in enumerate(code_cells(notebook), 1):
        cell["outputs"] = executed("".join(cell["source"]), names)
        cell["execution_count"] = count
        for output in cell["outputs"]:
            print(*output.get("text", output.get("data", {}).get("text/plain", ())), sep="", end="")
    NOTEBOOK.write_text(json.dumps(notebook, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(NOTEBOOK.parents[1]))
    main()
