"""The tutorials: each runs from top to bottom, and shows what it made of real cells."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "tutorials"
NAMES = ["quickstart", "benchmark", "perturbations", "beyond", "large_data", "response"]
MAX_SIZE = 1_000_000


@pytest.fixture(params=NAMES)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{request.param}.ipynb", as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "\n".join(o.get("text", o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_these_are_all():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.slow
def test_it_runs_on_simulated_cells(notebook, tmp_path, monkeypatch):
    """A folder without the real cells makes it simulate some, and say so."""
    monkeypatch.setenv("SPAPERB_DATA", str(tmp_path))
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    assert "SIMULATED" in printed(notebook)


def test_its_outputs_were_made_in_order_and_of_real_cells(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert "Real cells" in printed(notebook)
    assert "SIMULATED" not in printed(notebook)


def test_it_is_small_and_shows_no_path(notebook):
    assert len(nbformat.writes(notebook)) < MAX_SIZE
    for part in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages"):
        assert part not in printed(notebook)
