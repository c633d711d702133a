"""Run tutorials from top to bottom and keep their outputs in them.

    SPAPERB_DATA=FOLDER python tutorials/run.py [quickstart ...]

FOLDER holds the real cells (`<name>.h5ad`); without names all are run.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def run(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in its folder, without noting when and by which Python."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main() -> None:
    """Run the tutorials named, or all."""
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{name}.ipynb"
        print(path.name, flush=True)
        nbformat.write(run(path), path)


if __name__ == "__main__":
    main()
