"""Tools that cannot share an environment with this package, as methods of its benchmark."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from scipy import sparse

PEERS = Path(__file__).parent


class InEnvironment:
    """A peer that learns and predicts in a process of its own environment.

    Cells go there as h5ad files and come back as one array; the folder in which they lie is the
    process's working directory and is removed afterwards, with all that the tool leaves there.

    Parameters
    ----------
    name
        Name of the file of ``peers/`` that has the adapter.
    python
        Interpreter of the environment.
    """

    def __init__(self, name: str, python: str | Path):
        self.name = name
        self.python = str(python)
        # A benchmark keeps finished folds of equal methods: with other code it is another one.
        files = PEERS / f"{name}.py", PEERS / "requirements" / f"{name}.txt"
        self.code = [file.read_text() for file in files if file.exists()]

    def fit(self, adata: ad.AnnData, **setup: Any) -> InEnvironment:
        """Keep the cells: training is left to :meth:`predict`."""
        keys = sorted({setup[key] for key in ("held_out", "condition_key", "labels_key")})
        self.train = _bare(adata, keys)
        # Columns are text there, and so are their values.
        self.setup = {k: v if k == "seed" else str(v) for k, v in setup.items()}
        self.keys = keys
        return self

    def predict(self, adata_control: ad.AnnData) -> np.ndarray:
        """Train and predict over there.

        Raises
        ------
        RuntimeError
            If the process fails; the message ends with its last words.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.train.write_h5ad(Path(folder) / "train.h5ad")
            _bare(adata_control, self.keys).write_h5ad(Path(folder) / "control.h5ad")
            (Path(folder) / "setup.json").write_text(json.dumps(self.setup))
            done = subprocess.run(
                [self.python, "-m", "peers._worker", self.name, folder],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(PEERS.parent)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                last = done.stdout.strip().splitlines()[-1:]
                raise RuntimeError(f"{self.name} ended with {done.returncode}: {' '.join(last)}")
            return np.load(Path(folder) / "predicted.npy")


def environment(name: str, version: str, folder: Path) -> Path:
    """Return the interpreter of a peer's environment, which is made where it is missing.

    Parameters
    ----------
    name
        Name of a file of ``peers/requirements/``.
    version
        Version of Python, as in the name of its command.
    folder
        Folder of the environments.

    Raises
    ------
    RuntimeError
        If that Python is not on the path.
    subprocess.CalledProcessError
        If pip fails.
    """
    of_peer = folder.absolute() / name
    python = of_peer / "bin" / "python"
    # Written last, so that an installation that was broken off is done again.
    finished = of_peer / "finished"
    if finished.exists():
        return python
    command = shutil.which(f"python{version}")
    if command is None:
        raise RuntimeError(f"{name} needs Python {version}, and there is no python{version} here.")
    subprocess.run([command, "-m", "venv", "--clear", of_peer], check=True)
    requirements = PEERS / "requirements" / f"{name}.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
    finished.touch()
    return python


def _bare(adata: ad.AnnData, keys: list[str]) -> ad.AnnData:
    """Copy expression (CSR) and some columns (text), which old versions of anndata can read."""
    obs = adata.obs[keys].astype(str).astype("category")
    x = sparse.csr_matrix(adata.X, dtype=np.float32)
    return ad.AnnData(x, obs=obs, var=adata.var[[]])
