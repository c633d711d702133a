"""Training on cells that are larger than the memory there is.

    python benchmarks/speed/out_of_core.py

Half a million simulated CSR cells of 2,000 genes, half of them expressed: 4 GB in memory, in a
zarr store. Training from disk, by `read_mapped`, runs in a control group of Linux that leaves the
process and the file pages that it maps 3.5 GB together; what is more the kernel takes back, and
pages of cells have to be read again. Training from memory runs without a limit. Each trains for
one epoch in a process of its own. Making a control group takes root, or a folder of the memory
controller that is one's own (`--group`). Writes `out_of_core.csv` beside this file.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from common import HERE, N_GENES, answer_of, write, write_cells

N_CELLS, DENSITY = 500_000, 0.5
FILES = {
    "v1": ("memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    "v2": ("memory.max", "memory.peak"),
}


def limited(group: Path, limit: int) -> tuple[Callable[[], None], Path]:
    """Make a control group; give what puts a process there, and the file that tells its peak."""
    group.mkdir(parents=True, exist_ok=True)
    limit_file, peak_file = FILES["v1" if (group / FILES["v1"][0]).exists() else "v2"]
    (group / limit_file).write_text(str(limit))
    return (
        lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None,
        group / peak_file,
    )


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=N_CELLS)
    parser.add_argument("--limit-gb", type=float, default=3.5)
    parser.add_argument("--group", type=Path, default=Path("/sys/fs/cgroup/memory/spaperb"))
    parser.add_argument("--folder", type=Path, help="folder for the store, on a local disk")
    args = parser.parse_args()
    limit = int(args.limit_gb * 1e9)
    enter, peak_file = limited(args.group, limit)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = Path(folder) / "cells.zarr"
        write_cells(store, args.cells, DENSITY)
        for way, before in (("disk", enter), ("memory", None)):
            measure = (HERE / "growth.py", "--measure", way, store, folder)
            row = {"cells": args.cells, "way": way, **answer_of(*measure, before=before)}
            row["data_mb"] = args.cells * DENSITY * N_GENES * 8 / 2**20
            if before:
                row |= {
                    "limit_mb": limit / 2**20,
                    "group_peak_mb": int(peak_file.read_text()) / 2**20,
                }
            rows.append(row)
            print(row, flush=True)
    table = pd.DataFrame(rows)
    write(table, "out_of_core")
    print(table.round(2).to_string(index=False))


if __name__ == "__main__":
    main()
