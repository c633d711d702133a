"""Predictions that need no network, for a model to be measured against.

Each has the two calls of a method: ``fit(adata, ...)`` on training cells, and
``predict(adata_control)``, which returns predicted expression of those cells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData

from spaperb.metrics import mean_expression


class NoChange:
    """The control cells as they are: the floor of every score."""

    def fit(self, adata: AnnData, **setup: Any) -> NoChange:
        """Learn nothing."""
        return self

    def predict(self, adata_control: AnnData) -> np.ndarray:
        """Return the expression of the control cells, ``(n, G)``."""
        return _dense(adata_control)


class MeanShift:
    """Every control cell plus the mean change of the training cell types."""

    def fit(
        self,
        adata: AnnData,
        *,
        condition_key: str = "condition",
        control: Any = "control",
        stimulated: Any | None = None,
        labels_key: str = "cell_type",
    ) -> MeanShift:
        """Average the mean change, mean(stimulated) - mean(control), over cell types.

        Parameters
        ----------
        adata
            Training cells, log-normalised.
        condition_key
            Column of ``adata.obs`` that tells control from stimulated cells.
        control
            Value of control cells in that column.
        stimulated
            Value of stimulated cells; ``None`` takes every other value for stimulated.
        labels_key
            Column of ``adata.obs`` with the cell type.
        """
        condition = adata.obs[condition_key].to_numpy()
        is_control = condition == control
        is_stimulated = ~is_control if stimulated is None else condition == stimulated
        cell_type = adata.obs[labels_key].to_numpy()
        self.shift = np.mean(
            [
                mean_expression(adata.X[is_stimulated & (cell_type == label)])
                - mean_expression(adata.X[is_control & (cell_type == label)])
                for label in adata.obs[labels_key].unique()
                if set(is_control[cell_type == label]) >= {True, False}
            ],
            axis=0,
        )
        return self

    def predict(self, adata_control: AnnData) -> np.ndarray:
        """Add the shift to control cells, not below 0, ``(n, G)``."""
        return np.maximum(_dense(adata_control) + self.shift, 0.0)


def _dense(adata: AnnData) -> np.ndarray:
    return np.asarray(adata.to_df(), dtype=np.float64)
