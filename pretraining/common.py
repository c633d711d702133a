"""The data sets of `data_sets.csv`: read, normalised and measured."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

from spaperb.data import Perturbations
from spaperb.evidence import Evidence

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
LEAST_CELLS = 20
"""Cells of a context in each condition."""
N_TOP_GENES = 2000
SEED = 0


def data_sets() -> pd.DataFrame:
    """List the data sets, a row each."""
    return pd.read_csv(HERE / "data_sets.csv")


def log_normalised(path: Path) -> ad.AnnData:
    """Read raw counts, give each cell 10,000, and take log1p."""
    cells = ad.read_h5ad(path)
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells


def read_set(folder: Path, row: pd.Series) -> Evidence:
    """Measure the contexts of a data set that have enough cells, in its most variable genes."""
    path = folder / f"{row['name']}.h5ad"
    cells = log_normalised(path) if row["log_normalised"] == "no" else ad.read_h5ad(path)
    context, condition = (cells.obs[row[k]].astype(str) for k in ("context", "condition"))
    enough = pd.crosstab(context, condition) >= LEAST_CELLS
    has_cells = [
        bool(enough.loc[k, p] and enough.loc[k, row["control"]])
        for k, p in zip(context, condition, strict=True)
    ]
    cells = cells[has_cells].copy()
    if cells.n_vars > N_TOP_GENES:
        chosen = sc.pp.highly_variable_genes(
            cells, flavor="seurat", n_top_genes=N_TOP_GENES, inplace=False
        )["highly_variable"].to_numpy()
        cells = cells[:, chosen].copy()
    return _measure(cells, row)


def _measure(cells: ad.AnnData, row: pd.Series) -> Evidence:
    """Measure all perturbations in all contexts."""
    values, of_cell = np.unique(cells.obs[row["condition"]].astype(str), return_inverse=True)
    separator = row["separator"] if isinstance(row["separator"], str) else None
    known = Perturbations.of(values, row["control"], None, separator)
    names, labels = np.unique(cells.obs[row["context"]].astype(str), return_inverse=True)
    return Evidence.of(
        cells.X, known.arms[of_cell], labels, names.tolist(), parts=known.parts, seed=SEED
    )
