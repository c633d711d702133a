"""A GPU beside the processor: seconds of training and of prediction, and whether they agree.

    OMP_NUM_THREADS=4 python benchmarks/speed/gpu.py

Simulated cells of four types, 2,000 genes. The published objective is trained and predicts on the
processor and on the GPU, in turns, one round after another to warm up. Then the weights that
were trained on the processor predict on the GPU: `difference` is the largest one of a gene's
predicted mean, over the largest predicted change. Writes `gpu.csv` beside this file: seconds, and
the ratio of the processor's seconds to the GPU's.
"""

import time
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from common import N_GENES, make_cells, write

from spaperb import SpaPerbModel

SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "published, 2 epochs of 4,096 cells": (65_536, {"max_epochs": 2, "batch_size": 2_048}),
    "published, 10 epochs of 512 cells": (8_192, {"max_epochs": 10, "batch_size": 256}),
}
"""Cells, and arguments of training, whose `batch_size` counts pairs."""


def trained(
    cells: ad.AnnData, training: dict[str, Any], device: str
) -> tuple[SpaPerbModel, float]:
    """Train a model, and tell the seconds that it took."""
    scvi.settings.seed = 0
    fresh = SpaPerbModel(cells, objective="published")
    start = time.perf_counter()
    fresh.train(accelerator=device, **training, enable_progress_bar=False)
    return fresh, time.perf_counter() - start


def predicted(model: SpaPerbModel, cells: ad.AnnData) -> tuple[np.ndarray, float]:
    """Predict the mean of each gene, and tell the seconds that it took."""
    start = time.perf_counter()
    mean = model.predict_stimulated(cells, inplace=False).mean(axis=0)
    return np.asarray(mean).ravel(), time.perf_counter() - start


def compare(setting: str) -> dict[str, Any]:
    """Train and predict in turns on both."""
    n_cells, of_training = SETTINGS[setting]
    cells = make_cells(n_cells, N_GENES)
    SpaPerbModel.setup_anndata(cells)
    control = cells[cells.obs["condition"] == "control"].copy()
    seconds: list[dict[str, Any]] = []
    for _ in range(2):
        for device in ("cpu", "gpu"):
            model, training = trained(cells, of_training, device)
            mean, prediction = predicted(model, control)
            seconds.append({"device": device, "training": training, "prediction": prediction})
            if device == "cpu":
                on_processor, expected = model, mean
    on_processor.to_device("cuda:0")
    moved, _ = predicted(on_processor, control)
    change = np.abs(expected - np.asarray(control.X.mean(axis=0)).ravel()).max()
    last = pd.DataFrame(seconds[2:]).set_index("device")
    row = {"setting": setting, "cells": n_cells}
    for what in ("training", "prediction"):
        cpu, gpu = last[what]["cpu"], last[what]["gpu"]
        row |= {f"{what}_cpu": cpu, f"{what}_gpu": gpu, f"{what}_ratio": cpu / gpu}
    return row | {"difference": np.abs(moved - expected).max() / change}


def main() -> None:
    """Compare all settings."""
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU that PyTorch can use here.")
    rows = []
    for setting in SETTINGS:
        rows.append(compare(setting))
        print(rows[-1], flush=True)
        write(pd.DataFrame(rows), "gpu")


if __name__ == "__main__":
    main()
