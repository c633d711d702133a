"""What is prepared before a model is set up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.decomposition import PCA

from spaperb._messages import format_list, shown
from spaperb.data import (
    Scale,
    check_anndata,
    check_categories,
    expression_matrix,
    log_base,
    warn_of_unusual_expression,
)
from spaperb.populations import dense

MIN_CELLS = 10
"""Fewer control cells do not tell which genes go together."""
LEAST = 1e-4
"""Standard deviation of a gene that varies."""


def gene_features(
    adata: AnnData,
    genes: Sequence[str] | None = None,
    *,
    condition_key: str | None = "condition",
    control: Any = "control",
    labels_key: str | None = "cell_type",
    layer: str | None = None,
    n_components: int = 30,
    key_added: str = "gene_features",
    inplace: bool = True,
) -> pd.DataFrame | None:
    """Describe genes by how they go with the others in control cells.

    For screens of genes: as ``perturbation_features`` of
    :meth:`spaperb.SpaPerbModel.setup_anndata` they let the model predict genes that were never
    perturbed. The features of a gene are its correlations with the principal components of control
    cells, within cell types. The cells may be of another study, if they are of the same species.

    Parameters
    ----------
    adata
        Log-normalised cells.
    genes
        Genes to describe; ``None`` for all that vary among control cells.
    condition_key, control
        Column of ``adata.obs`` with the condition, and its value for control cells. ``None`` if
        all cells are control cells.
    labels_key
        Column with the cell type, whose means are taken off; ``None`` for none.
    layer
        Layer with the expression; ``None`` for ``adata.X``.
    n_components
        Number of principal components, fewer if there are fewer cells or genes.
    key_added
        Key in ``adata.uns``.
    inplace
        Whether to write to ``adata``, or to return the features.

    Returns
    -------
    None or pandas.DataFrame
        ``None``, or if ``inplace=False`` a table with a row a gene, ``(n_genes, n_components)``.
        Sets ``adata.uns[key_added]``, that table.

    Raises
    ------
    ValueError
        If genes are not in ``adata`` or do not vary among its control cells, there are fewer than
        ten of these, ``n_components`` is below 1, or a column is absent or has missing values.
    TypeError
        If ``genes`` is a text.
    """
    check_anndata(adata)
    if n_components < 1:
        raise ValueError(f"`n_components` must be at least 1; it is {n_components}.")
    if isinstance(genes, str):
        raise TypeError(f"`genes` must be a list of names; it is {genes!r}. Pass [{genes!r}].")
    is_all = genes is None
    genes = adata.var_names.tolist() if genes is None else list(genes)
    known = set(adata.var_names)
    if missing := [gene for gene in genes if gene not in known]:
        raise ValueError(
            f"{len(missing)} of {len(genes)} genes are not in the AnnData: "
            f"{format_list(missing)}. Take cells in which they were measured, before genes are "
            "chosen; other control cells of the same species will do."
        )
    is_control = np.ones(adata.n_obs, dtype=bool)
    if condition_key is not None:
        check_categories(adata, "condition_key", condition_key)
        is_control = (adata.obs[condition_key] == control).to_numpy(dtype=bool)
    if (n_cells := int(is_control.sum())) < MIN_CELLS:
        values = "" if condition_key is None else format_list(adata.obs[condition_key].unique())
        raise ValueError(
            f"There are {n_cells} control cells ({shown(control)}), too few to tell which genes "
            f"go together: at least {MIN_CELLS} are needed. Values of "
            f"adata.obs[{condition_key!r}]: {values or 'not looked at'}."
        )
    matrix = expression_matrix(adata, layer)
    warn_of_unusual_expression(matrix, Scale.of(matrix, log_base(adata) or math.e))
    x = pd.DataFrame(dense(matrix[is_control]).astype(np.float64))
    n_types = 1
    if labels_key is not None:
        check_categories(adata, "labels_key", labels_key)
        types = adata.obs[labels_key].to_numpy()[is_control]
        n_types = len(pd.unique(types))
        x -= x.groupby(types).transform("mean")
    centred = (x - x.mean()).to_numpy()
    deviation = centred.std(axis=0)
    if is_all:
        genes = adata.var_names[deviation >= LEAST].tolist()
    some = adata.var_names.get_indexer(genes)
    if silent := [gene for gene, s in zip(genes, deviation[some], strict=True) if s < LEAST]:
        raise ValueError(
            f"{len(silent)} of {len(genes)} genes do not vary among the control cells, so nothing "
            f"goes with them: {format_list(silent)}. Leave them out of `genes`."
        )
    n_components = max(1, min(n_components, n_cells - n_types, int((deviation >= LEAST).sum())))
    scores = PCA(n_components, random_state=0).fit_transform(centred)
    scores /= scores.std(axis=0)
    features = centred[:, some].T @ scores / n_cells / deviation[some, None]
    columns = [f"PC{i + 1}" for i in range(n_components)]
    table = pd.DataFrame(features, index=genes, columns=columns)
    if not inplace:
        return table
    adata.uns[key_added] = table
    return None
