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
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import linear_kernel, rbf_kernel

from spaperb._types import FloatArray, IntArray

PENALTIES = np.logspace(-2, 3, 11)
KERNELS = ("linear", "gaussian")
MAX_LEFT_OUT, MAX_PERTURBATIONS = 100, 300
"""Perturbations that are left out to choose by; and the most that one is told by, the nearest."""
SAME = 1e-6
"""Features that are less apart, in mean distances, are the same."""
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
        Largest distance of a perturbation from the nearest with other features.
    changes, reliability
        What it was learned from, as for :meth:`of`; ``(P, 0)`` after training.
    """

    values: FloatArray
    mean: FloatArray
    deviation: FloatArray
    kernel: str
    penalty: float
    skill: float
    error: FloatArray
    farthest: float
    changes: FloatArray
    reliability: FloatArray

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
        known = np.isfinite(features).all(axis=1)
        mean, deviation = features[known].mean(axis=0), features[known].std(axis=0)
        # A feature that all perturbations share tells of none.
        deviation = np.where(deviation > TINY * (1 + np.abs(mean)), deviation, np.inf)
        values = (features - mean) / deviation
        nothing = np.zeros(changes.shape[1])
        learned = cls(
            values,
            mean,
            deviation,
            KERNELS[0],
            np.inf,
            skill=0.0,
            error=nothing,
            farthest=np.inf,
            changes=changes,
            reliability=reliability,
        )
        some = np.flatnonzero(known & np.isfinite(reliability))
        if len(some) < 2:
            return learned
        # At random, so that some of very many stand for all.
        some = np.sort(np.random.default_rng(0).permutation(some)[:MAX_LEFT_OUT])
        left_out = list(learned._left_out(some, changes[some], reliability[some]))
        by_mean, best = left_out[0], min(left_out, key=lambda choice: choice[1].mean())
        gain = by_mean[1] - best[1]
        noise = gain.std(ddof=1) / np.sqrt(len(some))
        skill = float(gain.mean() / max(by_mean[1].mean(), TINY))
        if len(some) < MIN_PERTURBATIONS or gain.mean() <= noise or skill < LEAST_SKILL:
            best, skill = by_mean, 0.0
        errors = best[0]._errors(some, changes[some], reliability[some])
        apart = cdist(values[some], values[some])
        # Where each has a twin, one without is not far off for that.
        is_twin = apart < SAME * apart.mean()
        nearest = np.where(is_twin, np.inf, apart).min(axis=1)
        return best[0]._replace(
            skill=skill,
            error=np.sqrt((errors**2).mean(axis=0)),
            farthest=float(nearest.max()),
        )

    def without(self, perturbation: int) -> Features:
        """Learn the same without what was measured of a perturbation."""
        reliability = self.reliability.copy()
        reliability[perturbation] = np.nan
        return Features.of(self.values, self.changes, reliability)

    def _left_out(
        self, some: IntArray, changes: FloatArray, reliability: FloatArray
    ) -> Iterator[tuple[Features, FloatArray]]:
        """Kernels and penalties, the mean first, with mean squared errors of those left out."""
        products = changes @ changes.T / changes.shape[1]
        for kernel in KERNELS:
            for penalty in (np.inf, *PENALTIES) if kernel == KERNELS[0] else PENALTIES:
                choice = self._replace(kernel=kernel, penalty=float(penalty))
                weights = choice._leaving_out(some, reliability)
                yield choice, np.einsum("pq,qr,pr->p", weights, products, weights, optimize=True)

    def _errors(self, some: IntArray, changes: FloatArray, reliability: FloatArray) -> FloatArray:
        """Errors of perturbations that are left out, ``(n, G)``."""
        return self._leaving_out(some, reliability) @ changes

    def _leaving_out(self, some: IntArray, reliability: FloatArray) -> FloatArray:
        """Map changes to the errors of each, told by the others, in closed form, ``(n, n)``."""
        inverse = np.linalg.inv(self._regularised(some, reliability))
        return inverse / np.diag(inverse)[:, None]

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
        apart = cdist(asked[None], self.values[among[known]])[0]
        known = known[np.sort(np.argsort(apart, kind="stable")[:MAX_PERTURBATIONS])]
        some = among[known]
        of_asked = self._kernel(self.values[some], asked[None])[:, 0]
        regularised = self._regularised(some, reliability[known])
        return known, np.asarray(np.linalg.solve(regularised, of_asked), dtype=np.float64)

    def distance(self, asked: FloatArray) -> float:
        """Distance of features from the nearest ones, over the largest such distance in training.

        0 where fewer than two were measured in one context.
        """
        known = np.isfinite(self.values).all(axis=1)
        return float(cdist(asked[None], self.values[known]).min() / self.farthest)

    def _kernel(self, a: FloatArray, b: FloatArray) -> FloatArray:
        n_features = max(int(np.isfinite(self.deviation).sum()), 1)
        if np.isinf(self.penalty):
            return np.full((len(a), len(b)), CONSTANT)
        if self.kernel == "linear":
            return CONSTANT + linear_kernel(a, b) / n_features
        return CONSTANT + rbf_kernel(a, b, gamma=0.5 / n_features)

    def _regularised(self, some: IntArray, reliability: FloatArray) -> FloatArray:
        penalty = 1.0 if np.isinf(self.penalty) else self.penalty
        return self._kernel(self.values[some], self.values[some]) + np.diag(penalty / reliability)
