"""A screen of many perturbations: set-up, training, predictions, tables, files and memory.

    python benchmarks/speed/screens.py

Simulated CSR cells of 2,000 genes, 5 % of them expressed: lines by perturbations, 60 cells of
each and 300 control cells a line, as many as `SIZES` says, each in a process of its own with the
default model. Seconds of: set-up, training, the first prediction of a perturbation (of the control
cells of one line), the same after loading, the predictions of all perturbations of a line (100 of
them at most, the others in proportion), their response tables with intervals, saving and loading;
the saved model's size; and peak memory beyond that of the AnnData and all imports. Writes
`screens.csv`. `--profile` prints where the time of training goes at the second size, as text.
"""

import argparse
import cProfile
import json
import pstats
import resource
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scvi
from common import DENSITY, N_GENES, answer_of, write
from scipy import sparse

SIZES = ((3, 10), (3, 100), (3, 200))
N_CELLS, N_CONTROL = 60, 300
MAX_ASKED = 100


def make_screen(n_lines: int, n_perturbations: int) -> ad.AnnData:
    """Make cells of a screen; each perturbation and line changes some genes."""
    rng = np.random.default_rng(0)
    sizes = np.full((n_lines, 1 + n_perturbations), N_CELLS)
    sizes[:, 0] = N_CONTROL
    line, arm = (np.repeat(axis.ravel(), sizes.ravel()) for axis in np.indices(sizes.shape))
    counts = sparse.random(
        len(line),
        N_GENES,
        DENSITY,
        format="csr",
        dtype=np.float32,
        random_state=rng,
        data_rvs=lambda size: 1 + rng.poisson(1.0, size),
    )
    names = ["control", *(f"p{i}" for i in range(n_perturbations))]
    obs = pd.DataFrame(
        {
            "condition": pd.Categorical.from_codes(arm, names),
            "cell_type": pd.Categorical.from_codes(line, [f"line_{i}" for i in range(n_lines)]),
        }
    )
    return ad.AnnData(counts.log1p().tocsr(), obs=obs.set_index(obs.index.astype(str)))


def peak_mb() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(n_lines: int, n_perturbations: int) -> dict[str, float]:
    """Take the times of one size."""
    from spaperb import SpaPerbModel

    adata = make_screen(n_lines, n_perturbations)
    is_asked = (adata.obs["cell_type"] == "line_0") & (adata.obs["condition"] == "control")
    query = adata[is_asked].copy()
    before, times = peak_mb(), {}
    asked = [f"p{i}" for i in range(min(n_perturbations, MAX_ASKED))]
    share = n_perturbations / len(asked)

    def clock(name: str, call, times_by: float = 1.0):
        start = time.perf_counter()
        result = call()
        times[name] = (time.perf_counter() - start) * times_by
        return result

    scvi.settings.seed = 0
    clock("set-up", lambda: SpaPerbModel.setup_anndata(adata))
    model = SpaPerbModel(adata)
    clock("training", lambda: model.train(enable_progress_bar=False))
    clock("first prediction", lambda: model.predict_stimulated(query, "p0", inplace=False))

    def predict_all() -> None:
        for name in asked:
            model.predict_stimulated(query, name, inplace=False)

    clock("all predictions", predict_all, share)
    clock("all tables", lambda: [model.predict_response(query, n) for n in asked], share)
    with tempfile.TemporaryDirectory() as folder:
        clock("save", lambda: model.save(folder, overwrite=True))
        times["file_mb"] = sum(f.stat().st_size for f in Path(folder).iterdir()) / 2**20
        loaded = clock("load", lambda: SpaPerbModel.load(folder))
        clock(
            "first prediction after loading",
            lambda: loaded.predict_stimulated(query, "p0", inplace=False),
        )
    return {
        "lines": n_lines,
        "perturbations": n_perturbations,
        "cells": adata.n_obs,
        **times,
        "peak_mb": peak_mb() - before,
    }


def profile(n_lines: int, n_perturbations: int) -> None:
    """Print where the time of training goes."""
    from spaperb import SpaPerbModel

    adata = make_screen(n_lines, n_perturbations)
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata)
    with cProfile.Profile() as profiler:
        model.train(enable_progress_bar=False)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)


def main() -> None:
    """Run all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if args.profile:
        profile(*SIZES[1])
    elif args.one:
        print(json.dumps(measure(*args.one)))
    else:
        rows = [answer_of(__file__, "--one", *size) for size in SIZES]
        write(pd.DataFrame(rows), "screens")


if __name__ == "__main__":
    main()
