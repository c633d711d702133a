"""Train with the same seed in other processes and by other ways, and compare the bits.

    python benchmarks/reliability/determinism.py

Simulated cells (1,800 for training, 2,000 genes), both objectives with their default networks, 3
epochs, on the processor. Each run is a process of its own that trains, saves the model, and
predicts new cells with and without drawing latent vectors. Weights and predictions are compared
with those of the first run: to the last bit, dense and sparse expression to 1e-6. Runs have one
thread, but for two with two threads, compared with each other.

Writes `determinism.csv` beside this file, with the largest difference of each attack.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scvi
from common import make_cells, make_row, write

from spaperb import SpaPerbModel, read_mapped

CELLS = {"n_cells": 300, "n_genes": 2000}
DRAWS = {"give_mean": False, "n_samples": 2, "seed": 3}
CHUNKS = (1, 7, 100, 129, 512, 10_000)
TOLERANCE = 1e-6


def run(folder: Path, name: str, objective: str, dense: bool, **options: Any) -> None:
    """Train, or load a model, and keep weights and predictions."""
    adata = make_cells(**CELLS)
    query = make_cells(seed=1, **CELLS)[::2].copy()
    if dense:
        adata.X, query.X = adata.X.toarray(), query.X.toarray()
    if options.get("mapped"):
        adata.write_h5ad(folder / "cells.h5ad")
        adata = read_mapped(folder / "cells.h5ad")
    saved = folder / f"{objective} model"
    if options.get("load"):
        model = SpaPerbModel.load(saved, adata=False)
    else:
        scvi.settings.seed = 0
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, objective=objective)
        loader = {"num_workers": options.get("num_workers", 0)}
        quiet = {"enable_progress_bar": False, "accelerator": "cpu"}
        # Small, so that there are several minibatches of pairs; of episodes there always are.
        size = 64 if objective == "published" else None
        model.train(3, batch_size=size, datasplitter_kwargs=loader, **quiet)
        model.save(saved, overwrite=True)

    def predict(**kwargs: Any) -> np.ndarray:
        return model.predict_stimulated(query, inplace=False, **kwargs)

    if options.get("chunks"):
        results = {f"plain_{size}": predict(batch_size=size) for size in CHUNKS}
        results |= {f"drawn_{size}": predict(batch_size=size, **DRAWS) for size in CHUNKS}
    elif options.get("at_once"):
        with ThreadPoolExecutor(10) as pool:
            at_once = list(pool.map(lambda _: predict(**DRAWS), range(10)))
        results = {f"drawn_{i}": one for i, one in enumerate(at_once)}
    else:
        weights = [w.numpy().ravel() for w in model.module.state_dict().values()]
        results = {
            "weights": np.concatenate(weights),
            "plain": predict(),
            "drawn": predict(**DRAWS),
        }
    np.savez(folder / f"{name}.npz", **results)


def differences(first: Path, other: Path) -> list[float]:
    """Largest difference of each array from the first run's of its kind."""
    with np.load(first) as expected, np.load(other) as found:
        kinds = {name: name.split("_")[0] for name in found}
        return [
            0.0
            if np.array_equal(found[name], expected[kind])
            else float(np.abs(found[name] - expected[kind]).max())
            for name, kind in kinds.items()
        ]


def compared(attack: str, found: list[float], limit: float = 0.0, threads: int = 1) -> dict:
    """Row of an attack, of the differences that it made."""
    outcomes = [
        "same bits" if d == 0 else f"within {limit:g}" if d <= limit else "differs" for d in found
    ]
    good = {"same bits", f"within {limit:g}"}
    return make_row(attack, outcomes, good, largest_difference=max(found), threads=threads)


def main() -> None:
    """Run all ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        folder, options = args.run
        return run(Path(folder), **json.loads(options))

    ways: dict[str, list[dict[str, Any]]] = {
        "run to run, other hash seeds": [{"PYTHONHASHSEED": str(i)} for i in range(1, 4)],
        "saved, loaded in another process": [{"load": True}],
        "two loader processes": [{"num_workers": 2}],
        "training cells mapped from disk": [{"mapped": True}],
        "chunks of 1 to 10,000 cells": [{"load": True, "chunks": True}],
        "ten predictions at once from threads": [{"load": True, "at_once": True}],
        "dense instead of sparse": [{"dense": True}],
    }
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def start(
            name: str,
            objective: str,
            PYTHONHASHSEED: str = "0",
            threads: int = 1,
            **options: Any,
        ) -> Path:
            options = {"dense": False, "name": name, "objective": objective, **options}
            numbers = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
            subprocess.run(
                [sys.executable, __file__, "--run", folder, json.dumps(options)],
                check=True,
                env=os.environ | numbers | {"PYTHONHASHSEED": PYTHONHASHSEED},
            )
            return folder / f"{name}.npz"

        for objective in ("published", "in_context"):
            first = start("first", objective)
            for way, runs in ways.items():
                found = [
                    d
                    for options in runs
                    for d in differences(first, start("other", objective, **options))
                ]
                limit = TOLERANCE if way.startswith("dense") else 0.0
                rows.append(compared(f"{objective}: {way}", found, limit))
            first, again = (start(name, objective, threads=2) for name in ("first", "again"))
            attack = f"{objective}: run to run, two threads"
            rows.append(compared(attack, differences(first, again), threads=2))
    write("determinism", rows)


if __name__ == "__main__":
    main()
