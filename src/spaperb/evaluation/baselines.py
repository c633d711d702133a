"""Predictions that need no network, for a model to be measured against.

Each is a *method*: ``fit(adata, ...)`` on training cells, then ``predict(adata_control)``, which
returns the predicted expression of those control cells, ``(n, G)``. Contexts are the values of one
obs column, the one that a benchmark holds out (cell types, donors, ...). A context's *shift* is
the mean of its stimulated cells minus the mean of its control cells; contexts without cells in
both conditions have none. Predictions are clipped at 0 where the training cells hold no negative
value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData
from scipy.optimize import nnls
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.ensemble import ExtraTreesRegressor

from spaperb._types import Expression, FloatArray, IntArray
from spaperb.populations import (
    Pseudobulk,
    dense,
    fit_projection,
    mean_expression,
    neighbour_shares,
    project,
)

TEMPERATURE = 0.03
"""Of the softmax over correlations of control pseudobulks."""
PULL = 0.5
"""Pull on the baseline estimates' weights, in units of the baseline estimates' mean square."""
MIN_RELIABILITY = 0.1
"""Shifts that are more than noise by a smaller share are taken for noise."""
MIN_LEARNABLE = 0.3
"""Where a smaller share of what the estimates leave is more than noise, there is no forest."""
MIN_LEAF = 10
"""Samples in a leaf of the forest at least; more where the samples are noisy."""
MAX_SAMPLES = 200_000
"""Samples that a forest learns from; of more, as many at random."""
FLOOR = 0.05
"""Added to a gene's scale and, before its logarithm, to its mean."""
MAX_CELLS = 1000
"""Control cells of a context that say which contexts are near."""
MIN_MEASURED = 3
"""Fewer cells in a condition measure no shift to learn from, unless no context has more."""
HALF_WEIGHT = 30
"""Cells in the smaller condition that give a shift half of the greatest weight."""
PRIOR_CELLS = 10
"""Cells that the usual variance of a gene counts as."""
TINY_MEAN = 0.01
"""Mean that the usual ratio of variance to mean counts as, in each of these cells."""


class NoChange:
    """The control cells as they are: the floor of every score."""

    def fit(self, adata: AnnData, **setup: Any) -> NoChange:
        """Learn nothing."""
        return self

    def predict(self, adata_control: AnnData) -> FloatArray:
        """Return the expression of the control cells, ``(n, G)``."""
        return _double(adata_control.X)


class ContextShifts:
    """Learn each context's control pseudobulk and shift; subclasses say which shift a cell gets.

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
                f"No value of obs[{context_key!r}] has control and stimulated cells: there is no "
                "shift to learn."
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
        """Add a change to each control cell, ``(n, G)``."""
        x = _double(adata_control.X)
        return np.maximum(x + self.change(x), self.minimum)

    def change(self, x: FloatArray) -> FloatArray:
        """Change of the cells ``x``, ``(G,)``, or of each its own, ``(n, G)``."""
        return self.weights(x) @ self.shifts

    def weights(self, x: FloatArray) -> FloatArray:
        """Weights of the contexts' shifts, ``(n_contexts,)``, or a row for each cell of ``x``."""
        raise NotImplementedError

    def similarity(self, x: FloatArray) -> FloatArray:
        """Pearson correlation of the cells' mean with each context's control pseudobulk."""
        return _correlations(x.mean(axis=0), self.control_means)

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
    """Every cell gets the shift of the context whose control pseudobulk correlates most."""

    def weights(self, x: FloatArray) -> FloatArray:
        """Give the nearest context weight 1."""
        return np.eye(len(self.shifts))[np.argmax(self.similarity(x))]


class SimilarityShift(ContextShifts):
    """Every cell gets the mean of the shifts, weighted by correlation.

    Parameters
    ----------
    temperature
        Temperature of the softmax; small ones approach :class:`NearestShift`.
    """

    def __init__(self, temperature: float = TEMPERATURE):
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
    """The stimulated cells of the context with the nearest control pseudobulk, as they are."""

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


class _Noise(NamedTuple):
    """How a gene's variance goes with its mean, for contexts too small to tell.

    Few cells happen not to show many genes at all, and these are not certain. Their variance is
    drawn to ``ratio``, ``(G,)``, times the mean or, where expression may be negative, to
    ``ratio``.
    """

    ratio: FloatArray
    has_mean: bool

    @classmethod
    def of(cls, control: list[Pseudobulk], has_mean: bool) -> _Noise:
        """Pool the control cells of contexts."""
        squares = np.sum([c.n * c.variance for c in control], axis=0)
        means = [c.mean if has_mean else np.ones_like(c.mean) for c in control]
        levels = np.sum([(c.n - 1) * mean for c, mean in zip(control, means, strict=True)], axis=0)
        # A gene that no control cell shows varies as the others do.
        usual = squares.sum() / max(levels.sum(), 1e-9)
        prior = PRIOR_CELLS * TINY_MEAN
        return cls((squares + prior * usual) / (levels + prior), has_mean)

    def of_shift(self, control: Pseudobulk, stimulated: Pseudobulk) -> FloatArray:
        """Sampling variance of a shift, ``(G,)``."""
        return self._of_mean(control, control.mean) + self._of_mean(stimulated, control.mean)

    def _of_mean(self, cells: Pseudobulk, expected: FloatArray) -> FloatArray:
        n = cells.n
        mean = (n * cells.mean + PRIOR_CELLS * expected) / (n + PRIOR_CELLS)
        usual = self.ratio * (mean if self.has_mean else 1)
        return (n * cells.variance + PRIOR_CELLS * usual) / (n - 1 + PRIOR_CELLS) / n


class Description(NamedTuple):
    """What other contexts say of the change of a context: what :class:`GeneForest` learns from."""

    estimates: FloatArray
    """Means of their shifts, weighted in four ways, ``(G, 4)``."""
    features: FloatArray
    """All features, in log-normalised units, ``(G, F)``."""
    scale: FloatArray
    """Largest change of each gene there, ``(G,)``."""


class GeneForest(ContextShifts):
    """Every cell gets a change that a forest learned, with every gene of every context a sample.

    Each context is left out in turn and described, gene by gene, by the others: by their shifts,
    averaged in four ways (the *baseline estimates*), and by the gene's expression here and there.
    Weights of the baseline estimates are fitted to the left-out shifts, and a forest to what they
    leave. The cells to predict are taken for one context, and described by all.

    The noisier the shifts are, the more the weights are pulled to 0. Shifts that are almost all
    noise give no change, and where what the baseline estimates leave is mostly noise there is no
    forest. With one context the change is its shift.

    Parameters
    ----------
    n_trees
        Number of trees in the forest.
    n_neighbors
        Number of nearest control cells that say which contexts are near.
    n_components
        Number of principal components of the control cells that nearness is measured in.
    """

    def __init__(self, n_trees: int = 100, n_neighbors: int = 50, n_components: int = 30):
        self.n_trees = n_trees
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
        # Contexts without stimulated cells say something of noise and of nearness too.
        rows = {k: np.flatnonzero(is_control & (codes == k)) for k in np.unique(codes[is_control])}
        pseudobulks = {k: Pseudobulk.of(adata.X[of_context]) for k, of_context in rows.items()}
        control = [pseudobulks[k] for k in usable]
        stimulated = [Pseudobulk.of(adata.X[is_stimulated & (codes == k)]) for k in usable]
        n = np.array([min(c.n, s.n) for c, s in zip(control, stimulated, strict=True)])
        measured = np.flatnonzero(n >= min(MIN_MEASURED, n.max()))
        self.contexts = self.contexts[measured]
        self.control_means, self.shifts = self.control_means[measured], self.shifts[measured]
        if len(measured) == 1:
            return
        noise = _Noise.of(list(pseudobulks.values()), has_mean=self.minimum == 0)
        self.variances = np.array([noise.of_shift(control[i], stimulated[i]) for i in measured])
        some = {k: _some(of_context, MAX_CELLS) for k, of_context in rows.items()}
        x = adata.X[np.concatenate(list(some.values()))].astype(np.float64)
        self.pca = fit_projection(x, self.n_components)
        self.cells = [project(adata.X[some[usable[i]]], self.pca) for i in measured]
        places = np.arange(len(measured))
        descriptions = [
            self._describe(control[i], self.cells[k], np.delete(places, k))
            for k, i in enumerate(measured)
        ]
        self._learn(descriptions, n[measured] / (n[measured] + HALF_WEIGHT))

    def change(self, x: FloatArray) -> FloatArray:
        """Change of the cells ``x``, ``(G,)``."""
        if len(self.shifts) == 1:
            return self.shifts[0]
        cells = project(x[_some(np.arange(len(x)), MAX_CELLS)], self.pca)
        description = self._describe(Pseudobulk.of(x), cells, np.arange(len(self.shifts)))
        change = description.estimates @ self.estimate_weights
        if self.forest is not None:
            change += description.scale * self.forest.predict(self._inputs(description))
        return change

    def _describe(
        self, pseudobulk: Pseudobulk, cells: FloatArray, others: IntArray
    ) -> Description:
        """Describe a context by others.

        Parameters
        ----------
        pseudobulk
            Pseudobulk of its control cells.
        cells
            Components of its control cells, ``(n, n_components)``.
        others
            Places of the contexts that may be used.
        """
        control, shifts, variances = (
            values[others] for values in (self.control_means, self.shifts, self.variances)
        )
        stimulated = control + shifts
        near = self._nearness(cells, others)
        alike = softmax(_correlations(pseudobulk.mean, control) / TEMPERATURE)
        precise = 1 / (variances + 1e-3)
        estimates = [
            near @ shifts,
            alike @ shifts,
            shifts.mean(axis=0),
            (precise * shifts).sum(axis=0) / precise.sum(axis=0),
        ]
        log_control, log_stimulated = (
            np.log(np.maximum(means, 0) + FLOOR) for means in (control, stimulated)
        )
        features = [
            *estimates[:3],
            shifts.min(axis=0),
            shifts.max(axis=0),
            pseudobulk.mean,
            pseudobulk.detection,
            near @ control,
            control.mean(axis=0),
            near @ stimulated,
            near @ (log_stimulated - log_control),
            np.sqrt(near @ variances),
        ]
        scale = np.abs(shifts).max(axis=0) + FLOOR
        return Description(np.column_stack(estimates), np.column_stack(features), scale)

    def _nearness(self, cells: FloatArray, others: IntArray) -> FloatArray:
        """Share of each of the others in the nearest control cells, ``(len(others),)``."""
        sizes = [len(self.cells[k]) for k in others]
        # No more neighbours than a usual context has cells, or small contexts drown in large ones.
        n_neighbors = max(1, min(self.n_neighbors, int(np.median(sizes))))
        reference = np.concatenate([self.cells[k] for k in others])
        owner = np.repeat(np.arange(len(others)), sizes)
        return neighbour_shares(cells, reference, owner, len(others), n_neighbors).mean(axis=0)

    def _learn(self, descriptions: list[Description], weights: FloatArray) -> None:
        """Fit the estimates' weights, and the forest, to shifts described without them."""
        estimates = np.array([d.estimates for d in descriptions])
        n_estimates = estimates.shape[-1]
        self.estimate_weights, self.forest = np.zeros(n_estimates), None
        reliability = _reliability(self.shifts, self.variances, weights)
        if reliability < MIN_RELIABILITY:
            return
        root = np.sqrt(weights)[:, None]
        x = (root[..., None] * estimates).reshape(-1, n_estimates)
        pull = np.sqrt(PULL * (x**2).sum() / n_estimates)
        self.estimate_weights, _ = nnls(
            np.concatenate([x, pull * np.eye(n_estimates)]),
            np.concatenate(
                [
                    (root * self.shifts).ravel(),
                    np.full(n_estimates, pull * reliability / n_estimates),
                ]
            ),
        )
        rest = self.shifts - estimates @ self.estimate_weights
        reliability = _reliability(rest, self.variances, weights)
        if reliability < MIN_LEARNABLE:
            return
        scale = np.array([d.scale for d in descriptions])
        x = np.concatenate([self._inputs(d) for d in descriptions])
        some = _some(np.arange(len(x)), MAX_SAMPLES)
        leaf = int(MIN_LEAF * max(1.0, (1 - reliability) / reliability))
        self.forest = ExtraTreesRegressor(
            self.n_trees,
            min_samples_leaf=min(leaf, max(1, len(some) // 2)),
            max_features=0.7,
            random_state=0,
        ).fit(x[some], (rest / scale).ravel()[some], (weights[:, None] * scale**2).ravel()[some])

    def _inputs(self, description: Description) -> FloatArray:
        """Features over the gene's scale, so that one forest serves weak and strong genes."""
        estimates, features, scale = description
        features = np.column_stack([features, estimates @ self.estimate_weights])
        return np.column_stack([features / scale[:, None], scale])


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
    "gene_forest": GeneForest(),
}
"""All baselines with their defaults, by the names that results use."""


def _double(x: Expression) -> FloatArray:
    return dense(x).astype(np.float64)


def _correlations(pseudobulk: FloatArray, means: FloatArray) -> FloatArray:
    """Pearson correlation of a pseudobulk with each of several, ``(n_contexts,)``."""
    return np.array([np.corrcoef(pseudobulk, mean)[0, 1] for mean in means])


def _some(rows: IntArray, n: int) -> IntArray:
    """Rows at random, ``n`` at most, in their order."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:n])


def _reliability(values: FloatArray, variances: FloatArray, weights: FloatArray) -> float:
    """Share of the squares of values ``(n_contexts, G)`` that sampling noise does not explain."""
    noise, total = (weights @ squares.sum(axis=1) for squares in (variances, values**2))
    return max(0.0, 1 - noise / max(total, 1e-12))
