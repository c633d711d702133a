"""How time and memory grow with cells, in memory and on disk.

    python benchmarks/speed/growth.py

Simulated CSR cells of 2,000 genes, 5 % of them expressed, in four types and two conditions: 10
thousand, 100 thousand, 1 million. Each size and way runs in a process of its own:

- memory: the AnnData in memory; the default model: an epoch (the second; with a million cells the
  first), and all of training but epochs, which is measuring the contexts
- disk: the same from a zarr store, by `read_mapped`
- published memory, published disk: the same of the published objective, whose epochs go through
  all cells; and drawing an epoch's pairs
- predict: the default model, from the store to a new one, lazily

Peak memory is of the process, and less what it held with everything imported and (memory) the
AnnData read. Writes `growth.csv` beside this file, and prints the exponent of each growth in time,
and the line that fits each growth in memory. `--fit` prints them of the CSV that is there.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import zarr
from common import BLOCK, HERE, N_GENES, Clock, answer_of, write, write_cells

SIZES = (10_000, 100_000, 1_000_000)
WAYS = ("memory", "disk", "published memory", "published disk", "predict")


def peak_mb() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def train(adata: ad.AnnData, epochs: int, objective: str = "in_context"):
    """Train; seconds of the last epoch, and of all but epochs."""
    from spaperb import SpaPerbModel

    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, objective=objective)
    clock = Clock()
    start = time.perf_counter()
    model.train(epochs, early_stopping=False, enable_progress_bar=False, callbacks=[clock])
    rest = time.perf_counter() - start - clock.seconds.sum()
    return model, clock.seconds[-1], rest


def measure(way: str, store: Path, scratch: Path) -> dict[str, float]:
    """Run one way in this process."""
    from spaperb import SpaPerbModel, read_mapped
    from spaperb.data import PairedDataSplitter

    if way == "predict":
        from anndata.experimental import read_elem_lazy

        some = read_mapped(store, scratch)[:20_000]
        some = ad.AnnData(some.X.copy(), obs=some.obs.copy(), var=some.var.copy())
        model, _, _ = train(some, 2)
        group = zarr.open_group(store, mode="r")
        adata = ad.AnnData(
            read_elem_lazy(group["X"], chunks=(BLOCK, N_GENES)),
            obs=ad.io.read_elem(group["obs"]),
            var=ad.io.read_elem(group["var"]),
        )
        start = time.perf_counter()
        model.predict_stimulated(adata)
        with ad.settings.override(zarr_write_format=3):
            adata.write_zarr(scratch / "predicted.zarr")
        return {"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}
    adata = ad.read_zarr(store) if way.endswith("memory") else read_mapped(store, scratch)
    held = now_mb()
    objective = "published" if way.startswith("published") else "in_context"
    _, epoch, rest = train(adata, 2 if adata.n_obs < 500_000 else 1, objective)
    row = {"seconds": epoch, "other_seconds": rest}
    if objective == "published":
        splitter = PairedDataSplitter(SpaPerbModel._get_most_recent_anndata_manager(adata))
        splitter.setup()
        start = time.perf_counter()
        for _ in splitter.train_dataloader().sampler:
            pass
        row["pairing_seconds"] = time.perf_counter() - start
    return {**row, "peak_mb": peak_mb(), "peak_mb_beyond_anndata": peak_mb() - held}


def main() -> None:
    """Run all sizes and ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--folder", type=Path, help="folder for the stores, on a local disk")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        way, store, scratch = args.measure
        print(json.dumps(measure(way, Path(store), Path(scratch))))
        return
    if args.fit:
        fit(pd.read_csv(HERE / "growth.csv").drop(columns="machine"))
        return
    rows = []
    for n_cells in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            store = Path(folder) / "cells.zarr"
            write_cells(store, n_cells)
            for way in args.ways:
                answer = answer_of(__file__, "--measure", way, store, folder)
                rows.append({"cells": n_cells, "way": way, **answer})
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    write(table, "growth")
    print(table.round(2).to_string(index=False))
    fit(table)


def fit(table: pd.DataFrame) -> None:
    """Print how time and memory grow with cells."""
    for way, of_way in table.groupby("way", sort=False):
        for name in table.columns[2:]:
            known = of_way.dropna(subset=name)
            if len(known) < 2:
                continue
            if "seconds" in name:
                slope = np.polyfit(np.log(known["cells"]), np.log(known[name]), 1)[0]
                print(f"{way}, {name}: grows with cells to the power of {slope:.2f}")
            else:
                # Relative errors count, so that the small sizes do too.
                slope, constant = np.polyfit(known["cells"], known[name], 1, w=1 / known[name])
                worst = (constant + slope * known["cells"]) / known[name] - 1
                print(
                    f"{way}, {name}: {constant:.0f} MB and {1e3 * slope:.2f} kB a cell, "
                    f"off by {worst.abs().max():.0%} at most"
                )


if __name__ == "__main__":
    main()
