"""The query: cells of any AnnData, with genes by name, cell types and control cells by value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scvi.utils import track

from spaperb._messages import format_list, warn
from spaperb._types import Expression
from spaperb.data._anndata import expression_matrix, missing_genes_hint
from spaperb.data._columns import check_named_once
from spaperb.data._conditions import control_cells
from spaperb.data._disk import in_memory, rows_of_block
from spaperb.data._labels import match_labels
from spaperb.data._scale import Scale, check_scale, log_base
from spaperb.populations import dense

MANY_BLOCKS = 5
"""So many blocks take more than a few seconds, and show a progress bar."""
CHUNK_VALUES = 1_000_000
"""Values of cells that are made dense at a time."""
NOT_YET = np.empty(0, dtype=np.int64)


class Cells(NamedTuple):
    """Some cells to predict, in memory."""

    rows: np.ndarray
    """Their rows in the query, ``(n,)``."""
    x: np.ndarray
    """Expression of the model's genes, float32, ``(n, G)``."""
    batches: np.ndarray | None
    """Shares of the model's batches, ``(n, n_batch)``; ``None`` without batches."""
    counts: np.ndarray | None
    """Raw counts of the model's genes, ``(n, G)``, where they are needed."""


class Query(NamedTuple):
    """Cells to predict, and all that is known of them.

    Attributes
    ----------
    x
        Expression, ``(n, n_vars)``.
    columns
        For every gene of the model its column in ``x``, ``(G,)``.
    labels
        Cell type of every cell, ``(n,)``, missing where not known; ``None`` if there are none.
    is_control
        Cells that are not known to be stimulated, ``(n,)``; all where conditions have no say.
    batches
        For every cell the shares of the model's batches, ``(n, n_batch)``; ``None`` without
        batches.
    counts
        Raw counts of the same cells and columns as ``x``, where they are needed.
    first
        Row of the first cell of ``x`` and ``counts``, which may be a part of the cells only.
    context
        Number of every cell's context, ``(n,)``, once these are known.
    context_names
        Their names, by that number.
    """

    x: Expression
    columns: np.ndarray
    labels: np.ndarray | None
    is_control: np.ndarray
    batches: np.ndarray | None = None
    counts: Expression = None
    first: int = 0
    context: np.ndarray = NOT_YET
    context_names: Sequence[Any] = ()

    @property
    def block_rows(self) -> int:
        """Rows of a block, which cells on disk are read by."""
        return rows_of_block(self.x.shape[1])

    def blocks(self, description: str) -> Iterable[int]:
        """Numbers of the blocks, with a progress bar where going through them takes long."""
        n_blocks = -(-self.x.shape[0] // self.block_rows)
        return track(range(n_blocks), description=description, disable=n_blocks < MANY_BLOCKS)

    @property
    def chunk_rows(self) -> int:
        """Rows that are made dense at a time."""
        return max(1, CHUNK_VALUES // self.x.shape[1])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Dense float32 expression of the model's genes, ``(len(rows), G)``."""
        x = dense(in_memory(self.x[rows - self.first]))
        return np.ascontiguousarray(x[:, self.columns], dtype=np.float32)

    def raw(self, rows: np.ndarray) -> np.ndarray:
        """Dense raw counts of the model's genes, ``(len(rows), G)``."""
        counts = dense(in_memory(self.counts[rows - self.first]))
        return counts[:, self.columns].astype(np.float64)

    def chunk(self, rows: np.ndarray) -> Cells:
        """Read some cells."""
        batches = None if self.batches is None else self.batches[rows]
        counts = None if self.counts is None else self.raw(rows)
        return Cells(rows, self.rows(rows), batches, counts)


def make_query(
    adata: AnnData,
    var_names: np.ndarray,
    setup: Mapping[str, Any],
    trained_on: Scale,
    perturbations: Sequence[Any] | None = None,
    known_batches: Sequence[Any] | None = None,
) -> Query:
    """Find the model's genes in an AnnData, what its columns say, and whether its expression fits.

    Parameters
    ----------
    adata
        Cells to predict, with at least the model's genes, in any order.
    var_names
        Gene names of the model, ``(G,)``.
    setup
        Arguments that the model's data were set up with.
    trained_on
        Scale of the training expression.
    perturbations
        Names of the model's perturbations; ``None`` where cell types and conditions have no say.
    known_batches
        The model's batches; ``None`` if it takes none.

    Raises
    ------
    ValueError
        If genes of the model are missing, a column is there twice, or expression is NaN, infinite,
        or negative where that of the training cells was not. There is a warning if it is on
        another scale.
    """
    for key in ("labels_key", "condition_key"):
        check_named_once(adata, key, setup[key])
    x, columns = _expression_of(adata, var_names, setup["layer"])
    batches = None
    if known_batches is not None:
        batches = batch_shares(adata, setup["batch_key"], known_batches)
    labels, is_control = None, np.ones(adata.n_obs, dtype=bool)
    if perturbations is not None:
        if (key := setup["labels_key"]) in adata.obs:
            labels = adata.obs[key].to_numpy()
        if (key := setup["condition_key"]) in adata.obs:
            is_control = control_cells(adata.obs[key], setup["control"], perturbations)
    check_scale(Scale.of(x, log_base(adata) or trained_on.base, columns), trained_on)
    return Query(x, columns, labels, is_control, batches)


def _expression_of(
    adata: AnnData, var_names: np.ndarray, layer: str | None
) -> tuple[Expression, np.ndarray]:
    """Expression, and the columns of the model's genes in it."""
    x = expression_matrix(adata, layer, lazy=True)
    columns = adata.var_names.get_indexer(var_names)
    if (columns < 0).any():
        missing = var_names[columns < 0]
        raise ValueError(
            f"{len(missing)} of the model's {len(var_names)} genes are missing in the AnnData: "
            f"{format_list(missing)}.{missing_genes_hint(adata, missing)} Add those that are not "
            "there (with zeros only if they were measured and not seen), or train a model on the "
            "genes that both have."
        )
    if n_extra := adata.n_vars - len(var_names):
        warn(
            f"{n_extra} of {adata.n_vars} genes are unknown to the model and ignored; their "
            "predictions are NaN."
        )
    if sparse.issparse(x) and x.format == "csc":
        x = x.tocsr()
    return x, columns


def batch_shares(adata: AnnData, batch_key: str, known: Sequence[Any]) -> np.ndarray:
    """Shares of the model's batches in every cell: one-hot, or all alike for an unknown batch.

    So a cell of an unknown batch, or of none, is taken for one of the average training batch.

    Parameters
    ----------
    adata
        Cells to predict, with or without the batch column.
    batch_key
        Column of ``adata.obs`` with the batch.
    known
        The model's batches.
    """
    shares = np.full((adata.n_obs, len(known)), 1 / len(known), dtype=np.float32)
    if batch_key in adata.obs:
        check_named_once(adata, "batch_key", batch_key)
        batches = adata.obs[batch_key].astype(object)
        found = list(batches.dropna().unique())
        numbers = match_labels(found, known)
        if new := [batch for batch in found if batch not in numbers]:
            none = "none" if len(new) == len(found) else f"{len(numbers)}"
            warn(
                f"The model knows {none} of the {len(found)} batches in adata.obs[{batch_key!r}]. "
                f"It takes cells of these for cells of an average batch: {format_list(new)}. "
                f"Batches of training: {format_list(known)}."
            )
        codes = batches.map(numbers).fillna(-1).to_numpy(dtype=np.int64)
        shares[codes >= 0] = np.eye(len(known), dtype=np.float32)[codes[codes >= 0]]
    return shares


def select_rows(indices: object, n_obs: int) -> np.ndarray:
    """Turn positions or a boolean mask into positions.

    Raises
    ------
    IndexError
        If a position is out of range or a mask has the wrong length.
    ValueError
        If they are neither positions nor a mask, have missing values, or could be both: 0 and 1
        only, as many as there are cells, which are more than two.
    """
    if indices is None:
        return np.arange(n_obs)
    # By pandas: NumPy has no boolean type with missing values.
    selected = pd.array(np.atleast_1d(np.asarray(indices)))
    if n_missing := int(selected.isna().sum()):
        raise ValueError(
            f"`indices` has no value for {n_missing} of {len(selected)} cells. Fill a mask in, "
            "`mask.fillna(False)`, and leave positions out that are missing."
        )
    is_mask = pd.api.types.is_bool_dtype(selected)
    if len(selected) and not (is_mask or pd.api.types.is_integer_dtype(selected)):
        raise ValueError(
            "`indices` must be positions (whole numbers) or a boolean mask; it has "
            f"{selected.dtype} values: {format_list(selected[:3])}. Names of cells become "
            "positions by `adata.obs_names.get_indexer(names)`, other numbers by `.astype(int)`."
        )
    rows = selected.to_numpy(dtype=bool if is_mask else int)
    if not is_mask and len(rows) == n_obs > 2 and set(rows) <= {0, 1}:
        raise ValueError(
            f"`indices` holds {n_obs} numbers, as many as there are cells, all of them 0 or 1: a "
            "mask, it seems, and as positions these would be the first two cells only. Pass a "
            "mask as `mask.astype(bool)`, positions each once."
        )
    return np.arange(n_obs)[rows]
