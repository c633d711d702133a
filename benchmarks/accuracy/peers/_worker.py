"""Run a peer in its own environment: `python -m peers._worker NAME FOLDER`.

FOLDER holds what `InEnvironment` wrote there, and gets `predicted.npy`. Old versions of Python and
of anndata run this file too.
"""

import importlib
import json
import sys
from pathlib import Path

import anndata as ad
import numpy as np

if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    module = importlib.import_module(f"peers.{name}")
    (method,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    )
    peer = method()
    peer.fit(
        ad.read_h5ad(folder / "train.h5ad"), **json.loads((folder / "setup.json").read_text())
    )
    np.save(folder / "predicted.npy", peer.predict(ad.read_h5ad(folder / "control.h5ad")))
