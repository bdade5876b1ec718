"""The notebook: its cells call the library, run as they stand, and keep what they showed."""

import ast
import os
import re

import nbformat
import pytest
from documents import ROOT
from nbclient import NotebookClient

NOTEBOOK = nbformat.read(ROOT / "scripts/htfa_colab_tpu.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
# What needs a network, or a program that is no part of this package.
ELSEWHERE = {"install", "tensorboard"}
SMALL = """
NUM_TRAIN, NUM_TEST, EPOCHS = 8, 10, 1
MORE = ["--config.train.batch_size=2", "--config.eval.batch_size=2"]
"""


def tags(cell):
    return set(cell.metadata.get("tags", ()))


def images(cell):
    return [out for out in cell.outputs if "image/png" in out.get("data", {})]


def printed(cell):
    return "".join(out.get("text", "") for out in cell.outputs)


def test_cells_hold_no_logic_of_their_own():
    logic = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Try, ast.With, ast.Lambda)
    for cell in CODE:
        source = re.sub(r"(?m)^[%!].*$", "", cell.source)
        assert not [x for x in ast.walk(ast.parse(source)) if isinstance(x, logic)], cell.source


def test_it_shows_no_badge_and_no_machine():
    for cell in NOTEBOOK.cells:
        assert "badge" not in cell.source and "colab.research.google" not in cell.source
        for out in cell.get("outputs", ()):
            text = str(out.get("text", "")) + str(out.get("data", {}).get("text/plain", ""))
            assert not re.search(r"/(home|root|tmp|work)/", text), text


def test_it_was_run_as_it_stands():
    """In order, without an error, and with what it showed."""
    counts = [cell.execution_count for cell in CODE if not tags(cell) & ELSEWHERE]
    assert None not in counts and counts == sorted(counts)
    assert not [out for cell in CODE for out in cell.outputs if out.output_type == "error"]
    assert sum(len(images(cell)) for cell in CODE) >= 6


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    """At small scale on two devices, the cells of the hub and of `standard` skipped by default."""
    cells = []
    for cell in NOTEBOOK.cells:
        if tags(cell) & ELSEWHERE:
            continue
        cells.append(cell)
        if "parameters" in tags(cell):
            cells.append(nbformat.v4.new_code_cell(SMALL))
    small = nbformat.v4.new_notebook(cells=cells, metadata=NOTEBOOK.metadata)
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
    }
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(small, timeout=300, resources=folder).execute(env=env)
    code = [cell for cell in small.cells if cell.cell_type == "code"]
    said = "\n".join(map(printed, code))
    assert "mesh {'data': 1, 'fsdp': 2, 'tensor': 1}, zero2" in said
    assert "finished: runs/small" in said and "finished: runs/again" in said
    assert "training: steps 1 to 2 of 4 samples, 8 records" in said
    assert "resuming from step 2" in said and "copied to runs/again" in said
    assert sum(len(images(cell)) for cell in code) >= 6
    assert (tmp_path / "saved/small/checkpoints/2").is_dir()
