"""Every notebook runs from top to bottom, is committed with its outputs, and says how to go on with a large model."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


def shown(notebook):
    """For each code cell what it drew or displayed, by kind."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[sorted(out.data) for out in cell.outputs if "data" in out] for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    committed = shown(notebook)
    assert any("image/png" in kinds for cell in committed for kinds in cell)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert shown(notebook) == committed, "it shows other things than are committed: `make notebooks`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_says_how_to_run_it_on_a_large_model(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    top = "\n".join(cell.source for cell in cells[:2] if cell.cell_type == "markdown")
    assert re.search(r"\*\*On (a 7B model|Stable Diffusion)\*\*", top), top
    assert "from_pretrained(" in top
