"""What the scripts here share: simulated cells, clocks, processes of their own, and reports."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import lightning
import numpy as np
import pandas as pd
import torch
import zarr
from scipy import sparse

HERE = Path(__file__).parent
N_GENES, DENSITY, BLOCK = 2000, 0.05, 10_000


def conditions_and_types(n_cells: int) -> pd.DataFrame:
    """Obs of control and stimulated cells of four types."""
    i = np.arange(n_cells)
    return pd.DataFrame(
        {
            "condition": np.where(i % 2, "stimulated", "control"),
            "cell_type": (i // 2 % 4).astype(str),
        },
        index=i.astype(str),
    ).astype("category")


def make_cells(n_cells: int, n_genes: int) -> ad.AnnData:
    """Make cells of four types, CSR: log-normalised, with counts in a layer."""
    rng = np.random.default_rng(0)
    counts = sparse.random(
        n_cells,
        n_genes,
        DENSITY,
        format="csr",
        dtype=np.float32,
        random_state=rng,
        data_rvs=lambda size: 1 + rng.poisson(1.0, size),
    )
    return ad.AnnData(
        counts.log1p().tocsr(), obs=conditions_and_types(n_cells), layers={"counts": counts}
    )


def write_cells(path: Path, n_cells: int, density: float = DENSITY) -> None:
    """Write a store of cells block by block, so that writing them needs no memory."""
    rng = np.random.default_rng(0)
    per_cell = round(density * N_GENES)
    var = pd.DataFrame(index=[f"gene_{g}" for g in range(N_GENES)])

    def block(n: int) -> sparse.csr_matrix:
        # One gene of each of `per_cell` groups, in ascending order.
        width = N_GENES // per_cell
        genes = rng.integers(0, width, (n, per_cell)) + width * np.arange(per_cell)
        values = np.log1p(1 + rng.poisson(1.0, genes.size)).astype(np.float32)
        indptr = np.arange(0, n * per_cell + 1, per_cell)
        return sparse.csr_matrix(
            (values, genes.ravel().astype(np.int32), indptr), shape=(n, N_GENES)
        )

    store = zarr.open_group(path, mode="w", zarr_format=3)
    store.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    ad.io.write_elem(store, "obs", conditions_and_types(n_cells))
    ad.io.write_elem(store, "var", var)
    first = min(BLOCK, n_cells)
    ad.io.write_elem(store, "X", block(first))
    x = ad.io.sparse_dataset(store["X"])
    for start in range(first, n_cells, BLOCK):
        x.append(block(min(BLOCK, n_cells - start)))


class Clock(lightning.Callback):
    """Seconds of each epoch."""

    def __init__(self):
        self.marks = []

    def on_train_epoch_start(self, trainer, pl_module):
        """Note when an epoch begins."""
        self.marks.append(time.perf_counter())

    def on_train_end(self, trainer, pl_module):
        """Note when the last ends."""
        self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> np.ndarray:
        """Seconds of each epoch."""
        return np.diff(self.marks)


def answer_of(
    script: str | Path,
    *arguments: object,
    python: str = sys.executable,
    before: Callable[[], None] | None = None,
) -> Any:
    """Run a script in a process of its own; what the last line that it prints says.

    Parameters
    ----------
    script
        Its file.
    *arguments
        Its arguments.
    python
        The interpreter.
    before
        Is called in the new process first.
    """
    out = subprocess.run(
        [python, script, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    ).stdout
    return json.loads(out.splitlines()[-1])


def describe_machine() -> str:
    """Processor, cores that may be used, and versions, in one line."""
    info = Path("/proc/cpuinfo")
    models = (
        [x for x in info.read_text().splitlines() if x.startswith("model name")]
        if info.exists()
        else []
    )
    processor = models[0].split(": ")[1] if models else platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "scvi-tools"))
    return f"{processor}, {cores} cores{gpu}, Python {platform.python_version()}, {versions}"


def write(table: pd.DataFrame, name: str) -> None:
    """Write `<name>.csv` beside this file, with the machine."""
    table = table.assign(machine=describe_machine())
    table.to_csv(HERE / f"{name}.csv", index=False, float_format="%.4g")
