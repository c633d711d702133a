"""What is known of a context (a cell type, say): moments of its cells, and its neighbours in control space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA

from spaperb._types import Expression, FloatArray, IntArray
from spaperb.pairing import CONTROL, STIMULATED
from spaperb.populations import (
    dense,
    mean_expression,
    neighbour_shares,
    variance,
    zero_fraction,
)

N_COMPONENTS = 30
N_NEIGHBORS = 50
MIN_MEASURED = 3
"""Fewer cells in a condition measure no shift, unless there are no better contexts: one has no variance at all."""
MAX_CELLS = 1000
"""Control cells of a context that nearness is judged by: more change nothing and cost time."""


class Profile(NamedTuple):
    """Moments of one population: ``mean``, ``variance`` and ``detection``, each ``(G,)``, and ``n``.

    Detection is the fraction of cells in which a gene is not 0.
    """

    mean: FloatArray
    variance: FloatArray
    detection: FloatArray
    n: int

    @classmethod
    def of(cls, cells: Expression) -> Profile:
        """Measure cells ``(n, G)``."""
        return cls(
            mean_expression(cells), variance(cells), 1 - zero_fraction(cells), cells.shape[0]
        )


@dataclass
class Contexts:
    """Contexts of the training cells that have control cells, K of them; P are paired, and first.

    A *paired* context has stimulated cells too, at least three cells in each condition, and so a
    measured shift: the mean of its stimulated cells minus the mean of its control cells.

    Attributes
    ----------
    names
        Names of the contexts, the paired ones first, ``(K,)``.
    control
        Profile of each context's control cells, ``K`` of them.
    stimulated
        Profile of each paired context's stimulated cells, ``P`` of them.
    center, components
        Mean and principal components of the control cells, ``(G,)`` and ``(n_components, G)``.
    cells
        Components of the control cells of each context, ``K`` arrays ``(n, n_components)``.
    """

    names: list[Any]
    control: list[Profile]
    stimulated: list[Profile]
    center: FloatArray
    components: FloatArray
    cells: list[FloatArray]

    @classmethod
    def of(cls, x: Expression, arms: IntArray, labels: IntArray, names: list[Any]) -> Contexts:
        """Measure the contexts of training cells.

        Parameters
        ----------
        x
            Log-normalised expression, ``(n, G)``.
        arms
            For every cell CONTROL, STIMULATED or NEITHER, ``(n,)``.
        labels
            For every cell the number of its context, ``(n,)``.
        names
            Names of the contexts by that number.
        """
        with_control = np.unique(labels[arms == CONTROL])
        sizes = np.array(
            [
                min(((labels == code) & (arms == arm)).sum() for arm in (CONTROL, STIMULATED))
                for code in with_control
            ]
        )
        is_paired = sizes >= min(MIN_MEASURED, sizes.max())
        paired = with_control[is_paired]
        codes = np.concatenate([paired, with_control[~is_paired]])

        def profile(code: int, arm: int) -> Profile:
            return Profile.of(x[(labels == code) & (arms == arm)])

        rng = np.random.default_rng(0)
        rows = [np.flatnonzero((labels == c) & (arms == CONTROL)) for c in codes]
        rows = [np.sort(rng.permutation(r)[:MAX_CELLS]) for r in rows]
        some = x[np.concatenate(rows)]
        # No more components than the data have, so that tiny data have at least one.
        n_components = max(1, min(N_COMPONENTS, min(some.shape) - 1))
        solver = "arpack" if n_components < min(some.shape) else "full"
        pca = PCA(n_components, svd_solver=solver, random_state=0)
        pca.fit(some if solver == "arpack" else dense(some))
        return cls(
            names=[names[c] for c in codes],
            control=[profile(c, CONTROL) for c in codes],
            stimulated=[profile(c, STIMULATED) for c in paired],
            center=pca.mean_,
            components=pca.components_,
            cells=[pca.transform(x[r]) for r in rows],
        )

    @property
    def n_paired(self) -> int:
        """Number of paired contexts, P."""
        return len(self.stimulated)

    @property
    def shifts(self) -> FloatArray:
        """Measured shift of each paired context, ``(P, G)``."""
        return np.array(
            [s.mean - c.mean for c, s in zip(self.control, self.stimulated, strict=False)]
        )

    @property
    def shift_variances(self) -> FloatArray:
        """Sampling variance of each measured shift, ``(P, G)``."""
        return np.array(
            [
                c.variance / c.n + s.variance / s.n
                for c, s in zip(self.control, self.stimulated, strict=False)
            ]
        )

    def project(self, cells: Expression) -> FloatArray:
        """Components of cells ``(n, G)``, ``(n, n_components)``."""
        return (dense(cells) - self.center) @ self.components.T

    def neighbours(self, cells: npt.NDArray, among: IntArray) -> FloatArray:
        """Share of each context ``among`` some in the nearest control cells, ``(len(among),)``.

        Parameters
        ----------
        cells
            Components of the cells whose neighbours are sought, ``(n, n_components)``.
        among
            Numbers of the contexts that may be neighbours.
        """
        return self._shares(cells, among).mean(axis=0)

    def assign(self, cells: npt.NDArray) -> IntArray:
        """Context that most of each cell's nearest control cells belong to, ``(n,)``."""
        return self._shares(cells, np.arange(len(self.cells))).argmax(axis=1)

    def _shares(self, cells: npt.NDArray, among: IntArray) -> FloatArray:
        reference = [self.cells[k] for k in among]
        sizes = [len(cells) for cells in reference]
        # No more neighbours than a usual context has cells, or small contexts drown in large ones.
        n_neighbors = max(1, min(N_NEIGHBORS, int(np.median(sizes))))
        owner = np.repeat(np.arange(len(among)), sizes)
        return neighbour_shares(cells, np.concatenate(reference), owner, len(among), n_neighbors)

    def to_state(self) -> dict[str, Any]:
        """Arrays and lists that :meth:`from_state` takes, to be saved with a model."""
        return {
            **vars(self),
            "control": [tuple(profile) for profile in self.control],
            "stimulated": [tuple(profile) for profile in self.stimulated],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Contexts:
        """Restore what :meth:`to_state` gave."""
        profiles = {
            key: [Profile(*profile) for profile in state[key]] for key in ("control", "stimulated")
        }
        return cls(**{**state, **profiles})
