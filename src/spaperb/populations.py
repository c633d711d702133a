"""What is computed of a population of cells by genes: moments, ranks, components, distances.

Populations may be dense or sparse and of any precision. Sums run in double precision and over
blocks, so that memory stays small next to the arrays themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scanpy as sc
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors

from spaperb._types import Expression, FloatArray, IntArray

N_PCS = 50
BLOCK_VALUES = 10_000_000
"""Values made dense or double at a time: 80 MB."""
MAX_COUNTED = 1000
"""Cells that the dispersion of counts is taken from."""
LEAST_DISPERSION, MOST_DISPERSION = 0.2, 50.0
TINY = 1e-6


class Projection(Protocol):
    """Anything that maps cells by genes to cells by components: a fitted scikit-learn PCA."""

    def transform(self, x: npt.NDArray) -> npt.NDArray:
        """Map ``(n, G)`` to ``(n, n_components)``."""


def mean_expression(x: Expression) -> FloatArray:
    """Mean over cells, ``(G,)``."""
    return _mean(x, lambda values, genes: values)


def variance(x: Expression) -> FloatArray:
    """Variance over cells (divided by their number), ``(G,)``."""
    mean = mean_expression(x)
    return _mean(x, lambda values, genes: (values - mean[genes]) ** 2)


def zero_fraction(x: Expression) -> FloatArray:
    """Fraction of cells in which each gene is exactly 0, ``(G,)``."""
    return _mean(x, lambda values, genes: values == 0)


def scale_of(x: npt.NDArray, counts: npt.NDArray) -> FloatArray:
    """What each cell's counts were multiplied by before ``log1p``, ``(n,)``.

    1 for cells without counts.
    """
    totals = counts.sum(axis=1)
    return np.where(totals > 0, np.expm1(x).sum(axis=1) / np.maximum(totals, 1), 1.0)


def size_of(counts: npt.NDArray, scale: FloatArray) -> FloatArray:
    """Size factors of cells, libraries over 10,000, ``(n,)``; 0 for cells without counts."""
    return np.where(counts.sum(axis=1) > 0, 1 / scale, 0.0)


def rate(counts: npt.NDArray, size: FloatArray) -> FloatArray:
    """Rate of each gene, p, ``(G,)``."""
    return counts.sum(axis=0) / max(size.sum(), TINY)


def dispersion(counts: npt.NDArray, size: FloatArray) -> FloatArray:
    """Dispersion theta of each gene by moments, var = mean + mean^2 / theta, ``(G,)``."""
    mean = size[:, None] * rate(counts, size)
    excess = ((counts - mean) ** 2 - mean).sum(axis=0)
    theta = (mean**2).sum(axis=0) / np.maximum(excess, TINY)
    return np.clip(theta, LEAST_DISPERSION, MOST_DISPERSION)


class Pseudobulk(NamedTuple):
    """Moments of one population of ``n`` cells.

    They are ``mean``, ``variance`` and ``detection``, each ``(G,)``. Detection is the fraction of
    cells in which a gene is not 0. With raw counts there is their ``dispersion`` too.
    """

    mean: FloatArray
    variance: FloatArray
    detection: FloatArray
    n: int
    dispersion: FloatArray | None = None

    @classmethod
    def of(cls, cells: Expression, counts: Expression | None = None) -> Pseudobulk:
        """Measure cells ``(n, G)``, log-normalised and raw."""
        theta = None
        if counts is not None:
            some = np.linspace(0, cells.shape[0] - 1, min(cells.shape[0], MAX_COUNTED)).astype(int)
            raw = dense(counts[some]).astype(float)
            theta = dispersion(raw, size_of(raw, scale_of(dense(cells[some]), raw)))
        mean, detection = mean_expression(cells), 1 - zero_fraction(cells)
        return cls(mean, variance(cells), detection, cells.shape[0], theta)

    @classmethod
    def mixed(cls, pseudobulks: list[Pseudobulk], shares: FloatArray) -> Pseudobulk:
        """Moments of a mixture of populations."""
        mean, detection = (
            shares @ np.array(moments)
            for moments in zip(*((p.mean, p.detection) for p in pseudobulks), strict=True)
        )
        # Not as a difference of squares, which may round to less than 0.
        variance = shares @ np.array([p.variance + (p.mean - mean) ** 2 for p in pseudobulks])
        theta = [p.dispersion for p in pseudobulks if p.dispersion is not None]
        mixed = np.exp(shares @ np.log(theta)) if theta else None
        return cls(mean, variance, detection, sum(p.n for p in pseudobulks), mixed)


def wilcoxon_scores(cells: Expression, control: Expression) -> FloatArray:
    """Rank each gene's expression in cells against control cells: Wilcoxon z scores, ``(G,)``.

    Scanpy's rank-sum test with correction for ties, which the many zeros of single cells are.
    Positive scores are higher in ``cells``; genes without any difference in rank get 0.
    """
    scores = np.empty(cells.shape[1])
    for genes in blocks(cells.shape[1], cells.shape[0] + control.shape[0]):
        both = ad.AnnData(np.concatenate([dense(cells[:, genes]), dense(control[:, genes])]))
        both.obs["of"] = pd.Categorical(
            ["cells"] * cells.shape[0] + ["control"] * control.shape[0]
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            sc.tl.rank_genes_groups(
                both,
                "of",
                groups=["cells"],
                reference="control",
                method="wilcoxon",
                tie_correct=True,
            )
        result = both.uns["rank_genes_groups"]
        in_order = both.var_names.get_indexer(result["names"]["cells"])
        scores[np.arange(cells.shape[1])[genes][in_order]] = result["scores"]["cells"]
    return np.nan_to_num(scores)


def fit_projection(train: Expression, n_components: int = N_PCS) -> PCA:
    """Fit principal components to training cells ``(n, G)``, for distances between populations."""
    n_components = min(n_components, min(train.shape) - 1)
    return PCA(n_components, svd_solver="arpack", random_state=0).fit(train)


def project(x: Expression, projection: Projection) -> FloatArray:
    """Map cells to components, block by block, ``(n, n_components)``."""
    projected = [
        projection.transform(dense(x[rows]).astype(np.float64))
        for rows in blocks(x.shape[0], x.shape[1])
    ]
    return np.concatenate(projected)


def neighbour_shares(
    cells: npt.NDArray,
    reference: npt.NDArray,
    group_of: IntArray,
    n_groups: int,
    n_neighbors: int,
) -> FloatArray:
    """Share of each group of reference cells among the nearest ones of every cell.

    Parameters
    ----------
    cells
        Cells whose neighbours are sought, ``(n, n_dims)``.
    reference
        Cells that may be neighbours, ``(n_reference, n_dims)``.
    group_of
        Group of each reference cell, ``(n_reference,)``.
    n_groups
        Number of groups.
    n_neighbors
        Number of neighbours, all reference cells if they are fewer.

    Returns
    -------
    numpy.ndarray
        Shares, ``(n, n_groups)``, each row of which adds up to 1.
    """
    index = NearestNeighbors(n_neighbors=min(n_neighbors, len(reference))).fit(reference)
    nearest = group_of[index.kneighbors(cells, return_distance=False)]
    return np.stack([(nearest == i).mean(axis=1) for i in range(n_groups)], axis=1)


def median_distance(a: npt.NDArray, b: npt.NDArray, n_cells: int = 2000, seed: int = 0) -> float:
    """Median Euclidean distance between cells of two populations, of ``n_cells`` each at most."""
    rng = np.random.default_rng(seed)
    some = (x[rng.permutation(len(x))[:n_cells]] for x in (a, b))
    return float(np.median(np.concatenate(list(pairwise_distances_chunked(*some)))))


def mean_of_pairs(
    a: npt.NDArray, b: npt.NDArray, function: Callable[[FloatArray], FloatArray]
) -> float:
    """Mean over all pairs of a function of their Euclidean distance, in blocks."""
    row_sums = pairwise_distances_chunked(
        np.asarray(a, dtype=np.float64),
        # The same object tells scikit-learn that a cell's distance to itself is exactly 0.
        None if a is b else np.asarray(b, dtype=np.float64),
        reduce_func=lambda distances, _: function(distances).sum(axis=1),
        working_memory=BLOCK_VALUES * 8 / 2**20,
    )
    return float(np.concatenate(list(row_sums)).sum() / (len(a) * len(b)))


def dense(x: Expression) -> npt.NDArray:
    """Dense array of the same values."""
    return x.toarray() if sparse.issparse(x) else np.asarray(x)


def _mean(x: Expression, function: Callable[[FloatArray, Any], npt.NDArray]) -> FloatArray:
    """Mean over cells of a function of double-precision values and their genes, ``(G,)``."""
    n, n_genes = x.shape
    total, n_stored = np.zeros((2, n_genes))
    if sparse.issparse(x):
        x = x.tocsr()
        if not x.has_canonical_format:
            x = x.copy()
            x.sum_duplicates()
        for stored in blocks(x.nnz, 1):
            values, genes = x.data[stored].astype(np.float64), x.indices[stored]
            total += np.bincount(genes, function(values, genes), n_genes)
            n_stored += np.bincount(genes, minlength=n_genes)
    else:
        # Cell after cell and without the zeros, so that sums are rounded as those of sparse cells.
        for rows in blocks(n, n_genes):
            block = np.ascontiguousarray(x[rows], dtype=np.float64)
            is_stored = block != 0
            total += np.where(is_stored, function(block, slice(None)), 0.0).sum(axis=0)
            n_stored += is_stored.sum(axis=0)
    # All values that are not stored are 0.
    return (total + (n - n_stored) * function(np.zeros(n_genes), slice(None))) / n


def blocks(n: int, width: int) -> Iterator[slice]:
    """Slices of ``n`` rows (or columns) of ``width`` values that hold BLOCK_VALUES at most."""
    step = max(1, BLOCK_VALUES // max(1, width))
    for start in range(0, n, step):
        yield slice(start, start + step)
