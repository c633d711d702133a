"""Clusters that stand in for cell types where these are not known."""

from __future__ import annotations

import hashlib

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scanpy as sc
from scipy import sparse
from sklearn.metrics import pairwise_distances_argmin

from spaperb._types import CONTROL, STIMULATED, Expression, FloatArray, IntArray
from spaperb.data._disk import is_on_disk
from spaperb.populations import mean_expression

CLUSTERS = "spaperb_cluster"
"""Column of ``adata.obs`` with the clusters."""
CLUSTER_NAME = r"\d+_[0-9a-f]{6}"
"""What names of clusters look like."""
N_TOP_GENES, N_COMPONENTS, N_NEIGHBORS = 2000, 30, 15
"""Scanpy's usual numbers."""
MIN_CELLS, MIN_GENES = 30, 3
MAX_ROUNDS = 20
HALF_WEIGHT = 30.0
"""Cells of a cluster that give its shift half of the greatest weight."""


def name_clusters(clusters: IntArray, obs_names: pd.Index) -> pd.Categorical:
    """Names of clusters that those of other cells do not have: a number and a digest.

    Parameters
    ----------
    clusters
        Number of the cluster of every cell, ``(n,)``.
    obs_names
        Names of the cells.
    """
    digest = hashlib.sha256("\n".join(obs_names.astype(str)).encode() + clusters.tobytes())
    mark = digest.hexdigest()[:6]
    return pd.Categorical([f"{cluster}_{mark}" for cluster in clusters])


def find_clusters(x: Expression, arms: IntArray) -> IntArray:
    """Cluster control cells, and find the cluster that each stimulated cell was of before.

    Control cells are clustered by Leiden, as scanpy does. A stimulated cell is of the cluster
    whose centre is nearest once the shift of its perturbation is taken off, in the principal
    components of control cells. The shift follows from the cells of the clusters and the other way
    round, so both are found in turns. It is the mean over clusters, not over cells, since
    conditions may differ in how many cells of a type they have. A shift of each cluster's own was
    tried: it is no better on real cells and loses its way more often on simulated ones.

    Parameters
    ----------
    x
        Log-normalised expression, ``(n, G)``.
    arms
        For every cell CONTROL, NEITHER, or STIMULATED plus the number of its perturbation.

    Returns
    -------
    numpy.ndarray
        Number of the cluster of every cell, ``(n,)``. Cells that are neither are taken for control
        cells.

    Raises
    ------
    ValueError
        If there are fewer than 30 control cells, or expression is on disk or not finite.
    """
    is_control = arms == CONTROL
    if is_on_disk(x) or (n := int(is_control.sum())) < MIN_CELLS or x.shape[1] < MIN_GENES:
        what = "expression is on disk" if is_on_disk(x) else f"there are {n} of {x.shape[1]} genes"
        raise ValueError(
            f"`labels_key=None` clusters control cells, at least {MIN_CELLS} of {MIN_GENES} genes "
            f"in memory, and {what}. Name the column with cell types, or clusters of your own, as "
            "`labels_key=`."
        )
    if not np.isfinite(x.data if sparse.issparse(x) else x).all():
        raise ValueError("Expression is NaN or infinite for some cells. Leave these cells out.")
    control = ad.AnnData(sparse.csr_matrix(x[is_control], dtype=np.float32))
    if control.n_vars > N_TOP_GENES:
        sc.pp.highly_variable_genes(control, n_top_genes=N_TOP_GENES)
    sc.pp.pca(control, n_comps=max(1, min(N_COMPONENTS, min(control.shape) - 1)))
    sc.pp.neighbors(control, n_neighbors=min(N_NEIGHBORS, control.n_obs - 1), use_rep="X_pca")
    sc.tl.leiden(control, flavor="igraph", n_iterations=2, directed=False)
    of_control = control.obs["leiden"].astype(int).to_numpy()
    components = control.varm["PCs"]
    cells = np.asarray(x @ components) - mean_expression(x[is_control]) @ components
    centres = np.array(
        [cells[is_control][of_control == k].mean(axis=0) for k in range(of_control.max() + 1)]
    )
    clusters = pairwise_distances_argmin(cells, centres).astype(np.int64)
    clusters[is_control] = of_control
    sizes = np.bincount(of_control)
    for arm in np.unique(arms[arms >= STIMULATED]):
        clusters[arms == arm] = _before(cells[arms == arm], centres, sizes)
    return clusters


def _before(cells: FloatArray, centres: FloatArray, sizes: npt.NDArray) -> IntArray:
    """Cluster that each stimulated cell was of, ``(n,)``.

    Parameters
    ----------
    cells
        Components of the cells, ``(n, n_components)``.
    centres
        Centres of the control cells of each cluster, ``(n_clusters, n_components)``.
    sizes
        Their numbers.
    """
    numbers = np.arange(len(centres))
    shift = cells.mean(axis=0) - sizes @ centres / sizes.sum()
    clusters: IntArray = np.full(len(cells), -1)
    for _ in range(MAX_ROUNDS):
        before, clusters = clusters, pairwise_distances_argmin(cells - shift, centres)
        if (clusters == before).all():
            break
        here = (clusters == numbers[:, None]).astype(float)
        n = here.sum(axis=1)
        smaller = np.minimum(n, sizes)
        weights = smaller / (smaller + HALF_WEIGHT)
        shifts = here @ cells / np.maximum(n, 1)[:, None] - centres
        shift = weights @ shifts / weights.sum()
    return clusters
