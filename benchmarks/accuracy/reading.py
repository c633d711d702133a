"""Cells of a file of raw counts, normalised as in all benchmarks."""

from pathlib import Path

import anndata as ad
import scanpy as sc


def log_normalised(path: Path) -> ad.AnnData:
    """Read raw counts, give each cell 10,000, and take log1p."""
    cells = ad.read_h5ad(path)
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells
