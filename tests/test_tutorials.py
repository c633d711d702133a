"""The tutorials: each runs from top to bottom, and what it shows was made by running it on real cells."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs/tutorials"
NAMES = ["quickstart", "benchmark", "perturbations", "large_data", "response"]
LIMIT = 1_000_000


@pytest.fixture(params=NAMES)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{request.param}.ipynb", as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    texts = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs]
    return "\n".join(texts)


def test_these_are_all():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


def test_it_runs_on_simulated_cells(notebook, tmp_path):
    """A folder without the real cells makes it simulate some, and say so."""
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env={**os.environ, "SPAPERB_DATA": str(tmp_path)})
    assert "SIMULATED" in printed(notebook)


def test_what_it_shows_was_run_in_order_on_real_cells(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert "Real cells" in printed(notebook)
    assert "SIMULATED" not in printed(notebook)


def test_what_it_shows_is_small_and_names_no_local_path(notebook):
    shown = nbformat.writes(notebook)
    assert len(shown) < LIMIT
    for root in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages", "src/spaperb"):
        assert root not in printed(notebook)
