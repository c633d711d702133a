"""Predictions that need no network, for a model to be measured against.

Each is a *method*: ``fit(adata, ...)`` on training cells, then ``predict(adata_control)``, which returns
the predicted expression of those control cells, ``(n, G)``. Contexts are the values of one obs column,
the one that a benchmark holds out (cell types, donors, ...). A context's *shift* is the mean of its
stimulated cells minus the mean of its control cells; contexts without cells in both conditions have
none. Predictions are clipped at 0 where the training cells hold no negative value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData
from scipy.special import softmax
from sklearn.decomposition import PCA

from spaperb._types import Expression, FloatArray
from spaperb.populations import dense, mean_expression, neighbour_shares


class NoChange:
    """The control cells as they are: the floor of every score."""

    def fit(self, adata: AnnData, **setup: Any) -> NoChange:
        """Learn nothing."""
        return self

    def predict(self, adata_control: AnnData) -> FloatArray:
        """Return the expression of the control cells, ``(n, G)``."""
        return _double(adata_control.X)


class ContextShifts:
    """Learn each context's control profile and shift; subclasses say which shift a cell gets.

    Attributes
    ----------
    contexts
        Contexts that have a shift, ``(n_contexts,)``.
    control_means
        Mean control expression of each, ``(n_contexts, G)``.
    shifts
        Shift of each context, ``(n_contexts, G)``.
    """

    def fit(
        self,
        adata: AnnData,
        *,
        held_out: str = "cell_type",
        condition_key: str = "condition",
        control: Any = "control",
        stimulated: Any | None = None,
        labels_key: str = "cell_type",
        **setup: Any,
    ) -> ContextShifts:
        """Learn from training cells.

        Parameters
        ----------
        adata
            Training cells, log-normalised.
        held_out
            Column of ``adata.obs`` with the contexts.
        condition_key
            Column of ``adata.obs`` that tells control from stimulated cells.
        control
            Value of control cells in that column.
        stimulated
            Value of stimulated cells; ``None`` takes every other value for stimulated.
        labels_key
            Column of ``adata.obs`` with the cell type; only :class:`OwnTypeShift` needs it.
        **setup
            Ignored: what a benchmark tells other methods.

        Raises
        ------
        ValueError
            If no context has control and stimulated cells.
        """
        context_key = self._context_key(held_out, labels_key)
        condition = adata.obs[condition_key].to_numpy()
        is_control = condition == control
        is_stimulated = ~is_control if stimulated is None else condition == stimulated
        codes, contexts = pd.factorize(adata.obs[context_key], sort=True)
        usable = [
            code
            for code in range(len(contexts))
            if is_control[codes == code].any() and is_stimulated[codes == code].any()
        ]
        if not usable:
            raise ValueError(
                f"No value of obs[{context_key!r}] has control and stimulated cells: there is no shift "
                "to learn."
            )
        self.contexts = contexts[usable]
        self.control_means = np.array(
            [mean_expression(adata.X[is_control & (codes == code)]) for code in usable]
        )
        stimulated_means = [
            mean_expression(adata.X[is_stimulated & (codes == code)]) for code in usable
        ]
        self.shifts = np.array(stimulated_means) - self.control_means
        self.minimum = 0.0 if adata.X.min() >= 0 else -np.inf
        self._fit_cells(adata, is_control, is_stimulated, codes, usable)
        return self

    def predict(self, adata_control: AnnData) -> FloatArray:
        """Add a shift to each control cell, ``(n, G)``."""
        x = _double(adata_control.X)
        return np.maximum(x + self.weights(x) @ self.shifts, self.minimum)

    def weights(self, x: FloatArray) -> FloatArray:
        """Weights of the contexts' shifts, ``(n_contexts,)``, or for each cell of ``x`` its own."""
        raise NotImplementedError

    def similarity(self, x: FloatArray) -> FloatArray:
        """Pearson correlation of the cells' mean with each context's control profile."""
        profile = x.mean(axis=0)
        return np.array([np.corrcoef(profile, mean)[0, 1] for mean in self.control_means])

    def _context_key(self, held_out: str, labels_key: str) -> str:
        """Column of the contexts."""
        return held_out

    def _fit_cells(
        self,
        adata: AnnData,
        is_control: npt.NDArray,
        is_stimulated: npt.NDArray,
        codes: npt.NDArray,
        usable: list[int],
    ) -> None:
        """Learn more than means, for methods that look at single cells."""


class MeanShift(ContextShifts):
    """Every cell gets the mean shift of the contexts."""

    def weights(self, x: FloatArray) -> FloatArray:
        """Weigh all contexts the same."""
        return np.full(len(self.shifts), 1 / len(self.shifts))


class NearestShift(ContextShifts):
    """Every cell gets the shift of the context whose control profile correlates most."""

    def weights(self, x: FloatArray) -> FloatArray:
        """Give the nearest context weight 1."""
        return np.eye(len(self.shifts))[np.argmax(self.similarity(x))]


class SimilarityShift(ContextShifts):
    """Every cell gets the mean of the shifts, weighted by a softmax of the profiles' correlations.

    Parameters
    ----------
    temperature
        Temperature of the softmax; small ones approach :class:`NearestShift`.
    """

    def __init__(self, temperature: float = 0.03):
        self.temperature = temperature

    def weights(self, x: FloatArray) -> FloatArray:
        """Weigh contexts by the softmax of their correlation."""
        return softmax(self.similarity(x) / self.temperature)


class PCAShift(MeanShift):
    """The mean shift in principal components, decoded: latent arithmetic with a linear decoder.

    Parameters
    ----------
    n_components
        Number of principal components of the training cells.
    """

    def __init__(self, n_components: int = 50):
        self.n_components = n_components

    def _fit_cells(self, adata: AnnData, *_: Any) -> None:
        n_components = min(self.n_components, min(adata.shape) - 1)
        self.pca = PCA(n_components, svd_solver="arpack", random_state=0).fit(adata.X)

    def predict(self, adata_control: AnnData) -> FloatArray:
        """Encode the cells, add the mean shift of the components, decode, ``(n, G)``."""
        shift = self.shifts.mean(axis=0) @ self.pca.components_.T
        z = self.pca.transform(_double(adata_control.X)) + shift
        return np.maximum(self.pca.inverse_transform(z), self.minimum)


class KNNShift(ContextShifts):
    """Each cell gets the mean shift of the contexts of its nearest training control cells.

    Parameters
    ----------
    n_neighbors
        Number of nearest control cells.
    n_components
        Number of principal components that nearness is measured in.
    """

    def __init__(self, n_neighbors: int = 50, n_components: int = 30):
        self.n_neighbors = n_neighbors
        self.n_components = n_components

    def _fit_cells(
        self,
        adata: AnnData,
        is_control: npt.NDArray,
        is_stimulated: npt.NDArray,
        codes: npt.NDArray,
        usable: list[int],
    ) -> None:
        neighbours = is_control & np.isin(codes, usable)
        x = adata.X[neighbours]
        n_components = min(self.n_components, min(x.shape) - 1)
        self.pca = PCA(n_components, svd_solver="arpack", random_state=0).fit(x)
        self.context_of = np.searchsorted(usable, codes[neighbours])
        self.z = self.pca.transform(x)

    def weights(self, x: FloatArray) -> FloatArray:
        """Weigh contexts by their share among each cell's neighbours, ``(n, n_contexts)``."""
        z = self.pca.transform(x)
        return neighbour_shares(z, self.z, self.context_of, len(self.shifts), self.n_neighbors)


class NearestCells(ContextShifts):
    """The stimulated cells of the context with the nearest control profile, as they are."""

    def _fit_cells(
        self,
        adata: AnnData,
        is_control: npt.NDArray,
        is_stimulated: npt.NDArray,
        codes: npt.NDArray,
        usable: list[int],
    ) -> None:
        self.cells = [_double(adata.X[is_stimulated & (codes == code)]) for code in usable]

    def predict(self, adata_control: AnnData) -> FloatArray:
        """Return the nearest context's stimulated cells, as many as there are control cells.

        They are taken in random order (of a fixed seed), and again from the start if they are few.
        """
        cells = self.cells[np.argmax(self.similarity(_double(adata_control.X)))]
        order = np.random.default_rng(0).permutation(len(cells))
        return cells[np.resize(order, adata_control.n_obs)]


class OwnTypeShift(ContextShifts):
    """Each cell gets the mean change of its own cell type; for contexts that are not cell types.

    Cells of a type without a change of its own get the mean of the types' changes.
    """

    def _context_key(self, held_out: str, labels_key: str) -> str:
        self.labels_key = labels_key
        return labels_key

    def predict(self, adata_control: AnnData) -> FloatArray:
        """Add its type's change to each control cell, ``(n, G)``."""
        shifts = dict(zip(self.contexts, self.shifts, strict=True))
        mean = self.shifts.mean(axis=0)
        own = np.array([shifts.get(label, mean) for label in adata_control.obs[self.labels_key]])
        return np.maximum(_double(adata_control.X) + own, self.minimum)


BASELINES: dict[str, NoChange | ContextShifts] = {
    "no_change": NoChange(),
    "mean_shift": MeanShift(),
    "nearest_shift": NearestShift(),
    "similarity_shift": SimilarityShift(),
    "pca_shift": PCAShift(),
    "knn_shift": KNNShift(),
    "nearest_cells": NearestCells(),
}
"""All baselines with their defaults, by the names that results use."""


def _double(x: Expression) -> FloatArray:
    return dense(x).astype(np.float64)
