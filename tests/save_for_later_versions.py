"""Save a small model of this version, with cells and what it predicts of them, for `test_saving.py` of every later version.

    python tests/save_for_later_versions.py

Run once at each release, and commit the folder of `tests/data/` that it makes.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
from helpers import small_cells, train_small

if __name__ == "__main__":
    folder = Path(__file__).parent / "data" / version("spaperb")
    model = train_small(small_cells(), objective="residual")
    model.calibrate()
    folder.mkdir(parents=True)
    model.save(folder / "saved")
    model.export(folder / "model.safetensors")
    cells = small_cells(seed=1)
    cells.write_h5ad(folder / "cells.h5ad")
    predicted = model.predict_stimulated(cells, inplace=False)
    table = model.predict_response(cells)
    np.savez_compressed(folder / "predicted.npz", predicted=predicted, upper=table["upper"])
