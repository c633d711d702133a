"""What is prepared before a model is set up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.decomposition import PCA

from spaperb._messages import format_list, shown
from spaperb.data import check_anndata, check_categories, expression_matrix
from spaperb.populations import dense

MIN_CELLS = 10
"""Fewer control cells do not tell which genes go together."""
LEAST = 1e-4
"""Standard deviation of a gene that varies."""


def gene_features(
    adata: AnnData,
    genes: Sequence[str] | None = None,
    *,
    condition_key: str = "condition",
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
        Genes to describe; ``None`` for all.
    condition_key, control
        Column of ``adata.obs`` with the condition, and its value for control cells. Without such a
        column all cells are taken for control cells.
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
    """
    check_anndata(adata)
    if n_components < 1:
        raise ValueError(f"`n_components` must be at least 1; it is {n_components}.")
    genes = adata.var_names.tolist() if genes is None else list(genes)
    known = set(adata.var_names)
    if missing := [gene for gene in genes if gene not in known]:
        raise ValueError(
            f"{len(missing)} of {len(genes)} genes are not in the AnnData: "
            f"{format_list(missing)}. Take cells in which they were measured; other control cells "
            "of the same species will do."
        )
    is_control = np.ones(adata.n_obs, dtype=bool)
    if condition_key in adata.obs:
        is_control = (adata.obs[condition_key] == control).to_numpy(dtype=bool)
    if (n_cells := int(is_control.sum())) < MIN_CELLS:
        raise ValueError(
            f"There are {n_cells} control cells ({shown(control)} in "
            f"adata.obs[{condition_key!r}]), too few to tell which genes go together: at least "
            f"{MIN_CELLS} are needed."
        )
    x = pd.DataFrame(dense(expression_matrix(adata, layer)[is_control]).astype(np.float64))
    if labels_key is not None:
        check_categories(adata, "labels_key", labels_key)
        x -= x.groupby(adata.obs[labels_key].to_numpy()[is_control]).transform("mean")
    centred = (x - x.mean()).to_numpy()
    deviation = centred.std(axis=0)
    some = adata.var_names.get_indexer(genes)
    if silent := [gene for gene, s in zip(genes, deviation[some], strict=True) if s < LEAST]:
        raise ValueError(
            f"{len(silent)} of {len(genes)} genes do not vary among the control cells, so nothing "
            f"goes with them: {format_list(silent)}. Leave them out, `genes=[...]`."
        )
    n_components = min(n_components, n_cells - 1, adata.n_vars)
    scores = PCA(n_components, random_state=0).fit_transform(centred)
    scores /= scores.std(axis=0)
    features = centred[:, some].T @ scores / n_cells / deviation[some, None]
    columns = [f"PC{i + 1}" for i in range(n_components)]
    table = pd.DataFrame(features, index=genes, columns=columns)
    if not inplace:
        return table
    adata.uns[key_added] = table
    return None
