"""What the scripts here share: cells, folds, weights that never saw them, and reports."""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi

from spaperb import SpaPerbModel, pl
from spaperb.evaluation.benchmark import CEILING, FLOOR, Fold, Task, make_fold, summary, tidy
from spaperb.evaluation.metrics import HIGHER_IS_BETTER
from spaperb.evidence import Evidence
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
    "by_fold",
    "chosen",
    "data_sets",
    "log_normalised",
    "make_parser",
    "networks_without",
    "paired_types",
    "read_folds",
    "read_set",
    "simulated_evidence",
    "split",
    "summaries",
    "task_of",
    "trained",
    "truth_of",
    "without",
    "write",
]

HERE = Path(__file__).parent
KANG = "kang_pbmc_ifnb"
MIN_CELLS = 50
"""Cells of a type in each condition, or it is not hidden."""
KEYS_OF_FOLD = ("data_set", "controls", "n_training_types", "context", "method", "seed")
NUMBERS = {name: [""] for name in ("seconds", *HIGHER_IS_BETTER)}
"""Columns whose empty fields are missing; a context may be called NA."""
NOT_OF_FOLD = ("metric", "value", "floor", "ceiling", "scaled")
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


def task_of(held_out: str = "cell_type", split_controls: bool = True) -> Task:
    """Name the columns of Kang et al. and of the simulated data sets."""
    return Task(
        held_out, "condition", "control", None, "cell_type", N_TOP_GENES, 0, split_controls
    )


def split(
    cells: ad.AnnData,
    hidden: str,
    held_out: str = "cell_type",
    seed: int = 0,
    split_controls: bool = True,
) -> Fold:
    """Hide the stimulated cells of a context, and half of its control cells."""
    return make_fold(cells, hidden, task_of(held_out, split_controls), seed)


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


def truth_of(evidence: Evidence, thirds: Sequence[int]) -> tuple[np.ndarray, float]:
    """Mean change over some thirds of a context, ``(G,)``, and its noise, summed over genes."""
    changes, of = evidence.changes, list(thirds)
    noise = (changes.error[of] ** 2).sum() / len(of) ** 2
    return changes.shift[of].mean(axis=0), float(noise)


def trained(
    cells: ad.AnnData, seed: int, pretrained: Path | bool = True, **setup: str
) -> SpaPerbModel:
    """Train the default model."""
    scvi.settings.seed = seed
    SpaPerbModel.setup_anndata(cells, **setup)
    model = SpaPerbModel(cells, pretrained=pretrained)
    model.train(enable_progress_bar=False)
    return model


def read_folds(path: Path) -> pd.DataFrame:
    """Read the results that :func:`write` wrote."""
    text = {"context": str, "method": str, "error": str}
    folds = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=NUMBERS)
    return tidy(folds.assign(error=folds["error"].replace("", None)))


def summaries(results: pd.DataFrame, key: str) -> pd.DataFrame:
    """Summarise the rows of each value of a column."""
    of_each = {value: summary(rows) for value, rows in results.groupby(key, sort=False)}
    return pd.concat(of_each, names=[key, None]).reset_index(level=0)


def by_fold(results: pd.DataFrame) -> pd.DataFrame:
    """Give each fold a row and each metric a column, floor and ceiling as two more methods."""
    fold = [name for name in results.columns if name not in NOT_OF_FOLD]
    limits = [
        results.assign(method=limit, value=results[limit], seconds=float("nan"), error=None)
        for limit in (FLOOR, CEILING)
    ]
    rows = pd.concat([*limits, results])
    rows = rows.drop_duplicates([*(key for key in KEYS_OF_FOLD if key in fold), "metric"])
    rows = rows.fillna({"error": ""})
    wide = rows.set_index([*fold, "metric"])["value"].unstack()
    return wide[list(dict.fromkeys(results["metric"]))].reset_index()


def write(
    results: pd.DataFrame, name: str, metrics: Sequence[str] = (), stay: Collection[str] = ()
) -> None:
    """Write `<name>.csv`, `<name>_summary.csv` and a figure for each of some metrics.

    The first has a row a fold (:func:`by_fold`). Rows of methods that `stay` are those of the
    file, if there is one.
    """
    path = HERE / f"{name}.csv"
    if stay and path.exists():
        before = read_folds(path)
        results = pd.concat([results, before[before["method"].isin(stay)]])
    by_fold(results).to_csv(path, index=False, float_format="%.7g")
    table = summary(results)
    table.to_csv(HERE / f"{name}_summary.csv", index=False, float_format="%.6g")
    for metric in metrics:
        pl.benchmark(results, metric, save=HERE / f"{name}_{metric}.png")
    print(table.pivot(index="method", columns="metric", values="mean").round(3).to_string())
