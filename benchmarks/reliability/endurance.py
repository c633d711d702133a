"""Train, predict, save and load again and again in one process, and count what stays behind.

    python benchmarks/reliability/endurance.py

200 cycles of each way, in a process of its own: one epoch of training the default model, with a
loader process; prediction into the AnnData; saving; loading with the training data, and the
prediction of that. Simulated cells (1,200 of 1,000 genes, CSR), on the processor. The first 20
cycles are warm-up. Nothing is done for memory that a user would not do: the garbage collector runs
when it likes.

- one AnnData for all cycles
- a new AnnData in each cycle, and `model.deregister_manager(adata)` when done with it
- a new AnnData in each cycle, and nothing else: scvi-tools keeps every AnnData that was set up, so
  this cannot pass

Writes `endurance.csv` (one row a way) and `endurance_cycles.csv` (counts after each cycle) beside
this file.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import psutil
import scvi
from common import HERE, answer_of, make_cells, make_row, write

from spaperb import SpaPerbModel

N_CYCLES, WARM_UP = 200, 20
MAX_GROWTH = 0.05
WAYS = {
    "one": "one AnnData",
    "released": "a new AnnData in each cycle, deregistered",
    "kept": "a new AnnData in each cycle",
}
KNOWN = {"kept": "scvi-tools keeps every AnnData that was set up"}


def cycle(adata: ad.AnnData, folder: Path) -> SpaPerbModel:
    """Train, predict, save and load."""
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata)
    model.train(
        1,
        accelerator="cpu",
        enable_progress_bar=False,
        datasplitter_kwargs={"num_workers": 1},
    )
    model.predict_stimulated(adata)
    model.save(folder / "model", overwrite=True)
    return SpaPerbModel.load(folder / "model", adata)


def measure(way: str, n_cycles: int) -> list[dict[str, Any]]:
    """Run the cycles, and count after each."""
    cells = make_cells(200, 1000)
    process = psutil.Process()
    rows: list[dict[str, Any]] = []
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for number in range(n_cycles):
            adata = cells if way == "one" else cells.copy()
            model = cycle(adata, Path(folder))
            predicted = model.predict_stimulated(inplace=False)
            if way == "released":
                model.deregister_manager(adata)
            first = predicted if first is None else first
            rows.append(
                {
                    "cycle": number + 1,
                    "rss_mb": process.memory_info().rss / 2**20,
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                    "children": len(process.children(recursive=True)),
                    "same": bool(np.array_equal(predicted, first)),
                }
            )
    return rows


def main() -> None:
    """Run all ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=N_CYCLES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.measure, args.cycles)))

    rows, tables = [], []
    for way in args.ways:
        answer = answer_of(__file__, "--measure", way, "--cycles", args.cycles)
        table = pd.DataFrame(answer)
        tables.append(table.assign(way=way))
        warm, last = table.iloc[WARM_UP - 1], table.iloc[-1]
        growth = last["rss_mb"] / warm["rss_mb"] - 1
        grows = f"memory grows by less than {MAX_GROWTH:.0%}"
        outcomes = {
            grows: growth < MAX_GROWTH,
            "no more open files": last["files"] <= warm["files"],
            "no more threads": last["threads"] <= warm["threads"],
            "no loader processes": not table["children"].any(),
            "same predictions": table["same"].all(),
        }
        passed = [name for name, is_so in outcomes.items() if is_so]
        failed = [f"NOT {name}" for name, is_so in outcomes.items() if not is_so]
        more: dict[str, Any] = {
            "known": KNOWN.get(way) if failed == [f"NOT {grows}"] else None,
            "warm_mb": warm["rss_mb"],
            "last_mb": last["rss_mb"],
            "growth": growth,
        }
        attack = f"{args.cycles} cycles, {WAYS[way]}"
        rows.append(make_row(attack, passed + failed, passed, **more))
    pd.concat(tables).to_csv(HERE / "endurance_cycles.csv", index=False, float_format="%.6g")
    write("endurance", rows)


if __name__ == "__main__":
    main()
