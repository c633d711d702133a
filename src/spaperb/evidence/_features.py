"""What features tell of a perturbation that was never measured: kernel ridge regression.

With features f, standardised, a kernel k and a penalty, the change of a perturbation p in a
context is a weighted sum of those that were measured there::

    Delta_p = sum_q w_q Delta_q,    w = (K + penalty / reliability)^-1 k(f, f_p)

The kernel (linear, or Gaussian) and the penalty are those that predict measured perturbations
best when each is left out. A constant is added to the kernel, so that a large penalty gives the
mean over perturbations. That mean is also taken unless features are better by more than a standard
error, and by more than chance explains.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.metrics.pairwise import linear_kernel, rbf_kernel

from spaperb._types import FloatArray, IntArray

PENALTIES = np.logspace(-2, 3, 11)
KERNELS = ("linear", "gaussian")
MAX_PERTURBATIONS = 300
"""Perturbations that are left out to choose by, and the most that one is told by: the nearest."""
MIN_PERTURBATIONS = 5
"""Fewer do not show how changes go with features."""
LEAST_SKILL = 0.02
"""A smaller share is what chance explains, of some penalty or other."""
CONSTANT = 1e5
"""Added to the kernel: the mean over perturbations is not shrunk."""
TINY = 1e-12


class Features(NamedTuple):
    """Features of the measured perturbations, and how changes go with them.

    Attributes
    ----------
    values
        Standardised features, ``(P, d)``; NaN for perturbations without any.
    mean, deviation
        What they are standardised by, ``(d,)``.
    kernel
        ``"linear"`` or ``"gaussian"``.
    penalty
        Penalty of the regression; infinite where features tell nothing.
    skill
        Share of the squared differences between perturbations that features tell of one that is
        left out, in [0, 1].
    error
        Error of such predictions, ``(G,)``: root mean square over perturbations.
    farthest
        Largest distance of a perturbation from its nearest one.
    """

    values: FloatArray
    mean: FloatArray
    deviation: FloatArray
    kernel: str
    penalty: float
    skill: float
    error: FloatArray
    farthest: float

    @classmethod
    def of(cls, features: FloatArray, changes: FloatArray, reliability: FloatArray) -> Features:
        """Learn how changes go with features.

        Parameters
        ----------
        features
            Features of each perturbation, ``(P, d)``; NaN for those without.
        changes
            Mean change of each over contexts, less the mean over perturbations there, ``(P, G)``.
        reliability
            Reliability of that change, in (0, 1], ``(P,)``; NaN where it was not measured.
        """
        some = np.flatnonzero(np.isfinite(features).all(axis=1) & np.isfinite(reliability))
        mean, deviation = features[some].mean(axis=0), features[some].std(axis=0)
        # A feature that all perturbations share tells of none.
        deviation = np.where(deviation > TINY, deviation, np.inf)
        values = (features - mean) / deviation
        learned = cls(values, mean, deviation, KERNELS[0], np.inf, 0.0, np.empty(0), np.inf)
        # At random, so that some of very many stand for all.
        some = np.sort(np.random.default_rng(0).permutation(some)[:MAX_PERTURBATIONS])
        left_out = list(learned._left_out(some, changes[some], reliability[some]))
        by_mean = left_out[0][1]
        best, errors = min(left_out, key=lambda choice: choice[1].mean())
        gain = by_mean.mean(axis=1) - errors.mean(axis=1)
        noise = gain.std(ddof=1) / np.sqrt(len(some)) if len(some) > 1 else np.inf
        skill = float(gain.mean() / max(by_mean.mean(), TINY))
        if len(some) < MIN_PERTURBATIONS or gain.mean() <= noise or skill < LEAST_SKILL:
            (best, errors), skill = left_out[0], 0.0
        nearest = _squares(values[some], values[some]) + np.diag(np.full(len(some), np.inf))
        return best._replace(
            skill=skill,
            error=np.sqrt(errors.mean(axis=0)),
            farthest=float(np.sqrt(nearest.min(axis=1).max())) if len(some) > 1 else np.inf,
        )

    def _left_out(
        self, some: IntArray, changes: FloatArray, reliability: FloatArray
    ) -> Iterator[tuple[Features, FloatArray]]:
        """Kernels and penalties, and squared errors of perturbations left out, the mean first."""
        for kernel in KERNELS:
            for penalty in (np.inf, *PENALTIES) if kernel == KERNELS[0] else PENALTIES:
                choice = self._replace(kernel=kernel, penalty=float(penalty))
                inverse = np.linalg.inv(choice._regularised(some, reliability))
                # What the others tell of each, in closed form.
                left = inverse @ changes / np.diag(inverse)[:, None]
                yield choice, left**2

    def standardised(self, features: FloatArray) -> FloatArray:
        """Standardise features ``(d,)`` as those of training."""
        return (features - self.mean) / self.deviation

    def weights(
        self, asked: FloatArray, among: IntArray, reliability: FloatArray
    ) -> tuple[IntArray, FloatArray]:
        """Weights of perturbations in the change of one that was never measured.

        Parameters
        ----------
        asked
            Its standardised features, ``(d,)``.
        among
            Numbers of measured perturbations, ``(n,)``.
        reliability
            Reliability of their changes, in (0, 1], ``(n,)``.

        Returns
        -------
        tuple
            Positions in ``among`` of those with features, the nearest if they are very many, and
            their weights.
        """
        known: IntArray = np.flatnonzero(np.isfinite(self.values[among]).all(axis=1))
        squares = _squares(asked[None], self.values[among[known]])[0]
        known = known[np.sort(np.argsort(squares, kind="stable")[:MAX_PERTURBATIONS])]
        some = among[known]
        of_asked = self._kernel(self.values[some], asked[None])[:, 0]
        regularised = self._regularised(some, reliability[known])
        return known, np.asarray(np.linalg.solve(regularised, of_asked), dtype=np.float64)

    def distance(self, asked: FloatArray) -> float:
        """Distance of features from the nearest ones, over the largest such distance in training.

        0 where none is known.
        """
        known = np.isfinite(self.values).all(axis=1)
        nearest = np.sqrt(_squares(asked[None], self.values[known]).min())
        return float(nearest / max(self.farthest, TINY))

    def _kernel(self, a: FloatArray, b: FloatArray) -> FloatArray:
        n_features = max(a.shape[1], 1)
        if np.isinf(self.penalty):
            return np.full((len(a), len(b)), CONSTANT)
        if self.kernel == "linear":
            return CONSTANT + linear_kernel(a, b) / n_features
        return CONSTANT + rbf_kernel(a, b, gamma=0.5 / n_features)

    def _regularised(self, some: IntArray, reliability: FloatArray) -> FloatArray:
        penalty = 1.0 if np.isinf(self.penalty) else self.penalty
        return self._kernel(self.values[some], self.values[some]) + np.diag(penalty / reliability)


def _squares(a: FloatArray, b: FloatArray) -> FloatArray:
    """Squared distances of the rows of two matrices."""
    return np.maximum(
        (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * linear_kernel(a, b), 0
    )
