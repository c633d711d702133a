"""What the scripts here share: cells, folds, weights that never saw them, and reports."""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import scvi

from spaperb import SpaPerbModel, pl
from spaperb.evaluation.benchmark import Fold, Task, make_fold, summary
from spaperb.module import InContextModule
from spaperb.nn import data_sets_of, read_weights

sys.path.append(str(Path(__file__).parents[2]))

from pretraining.common import (
    LEAST_CELLS,
    N_TOP_GENES,
    WEIGHTS,
    data_sets,
    log_normalised,
    read_set,
)
from pretraining.simulated import simulated_evidence

__all__ = [
    "HERE",
    "KANG",
    "LEAST_CELLS",
    "MIN_CELLS",
    "N_TOP_GENES",
    "chosen",
    "data_sets",
    "log_normalised",
    "make_parser",
    "networks_without",
    "paired_types",
    "read_set",
    "simulated_evidence",
    "split",
    "summaries",
    "trained",
    "without",
    "write",
]

HERE = Path(__file__).parent
KANG = "kang_pbmc_ifnb"
MIN_CELLS = 50
"""Cells of a type in each condition, or it is not hidden."""
OPTIONS: dict[str, dict[str, Any]] = {
    "file": {"type": Path, "help": "the cells, <name>.h5ad"},
    "folder": {"type": Path, "help": "folder of the data sets, <name>.h5ad"},
    "--seeds": {"type": int, "nargs": "+", "default": [0, 1, 2]},
    "--folds": {"type": Path, "help": "folder that keeps finished folds"},
    "--only": {"nargs": "+", "metavar": "METHOD"},
    "--n-jobs": {"type": int, "default": 2},
}


def make_parser(description: str | None, *options: str) -> argparse.ArgumentParser:
    """Read some of the options that several scripts have from the command line."""
    parser = argparse.ArgumentParser(description=description)
    for option in options:
        parser.add_argument(option, **OPTIONS[option])
    return parser


def chosen(methods: Mapping[str, Any], only: Sequence[str] | None) -> dict[str, Any]:
    """Pick the methods that were asked for, or all."""
    return {name: methods[name] for name in only or methods}


def paired_types(cells: ad.AnnData) -> list[str]:
    """List the cell types with enough cells in both conditions."""
    sizes = pd.crosstab(cells.obs["cell_type"], cells.obs["condition"])
    return list(sizes.index[sizes.min(axis=1) >= MIN_CELLS])


def split(cells: ad.AnnData, hidden: str, held_out: str = "cell_type") -> Fold:
    """Hide the stimulated cells of a context."""
    task = Task(held_out, "condition", "control", None, "cell_type", N_TOP_GENES, 0)
    return make_fold(cells, hidden, task)


def without(data_set: str) -> Path:
    """Return the file of weights that were trained on all data sets but one.

    Raises
    ------
    ValueError
        If the file says that they saw it.
    """
    path = WEIGHTS / f"without_{data_set}.safetensors"
    if data_set in data_sets_of(path):
        raise ValueError(f"The weights in {path} were trained on {data_set}.")
    return path


def networks_without(data_set: str) -> InContextModule:
    """Make a module of the networks that never saw a data set."""
    networks = read_weights(without(data_set))
    sizes = networks[0].n_latent, networks[0].n_hidden
    return InContextModule(*sizes, len(networks)).start_from(networks)


def trained(
    cells: ad.AnnData, seed: int, pretrained: Path | bool = True, **setup: str
) -> SpaPerbModel:
    """Train the default model."""
    scvi.settings.seed = seed
    SpaPerbModel.setup_anndata(cells, **setup)
    model = SpaPerbModel(cells, pretrained=pretrained)
    model.train(enable_progress_bar=False)
    return model


def summaries(results: pd.DataFrame, key: str) -> pd.DataFrame:
    """Summarise the rows of each value of a column."""
    of_each = {value: summary(rows) for value, rows in results.groupby(key, sort=False)}
    return pd.concat(of_each, names=[key, None]).reset_index(level=0)


def write(
    results: pd.DataFrame, name: str, metrics: Sequence[str] = (), stay: Collection[str] = ()
) -> None:
    """Write `<name>.csv`, `<name>_summary.csv` and a figure for each of some metrics.

    Rows of methods that `stay` are those of the file that is there.
    """
    if stay:
        before = pd.read_csv(HERE / f"{name}.csv", dtype={"context": str})
        results = pd.concat([results, before[before["method"].isin(stay)]])
    results.to_csv(HERE / f"{name}.csv", index=False, float_format="%.6g")
    table = summary(results)
    table.to_csv(HERE / f"{name}_summary.csv", index=False, float_format="%.6g")
    for metric in metrics:
        pl.benchmark(results, metric, save=HERE / f"{name}_{metric}.png")
    print(table.pivot(index="method", columns="metric", values="mean").round(3).to_string())
