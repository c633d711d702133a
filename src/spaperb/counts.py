"""Counts of stimulated cells, drawn from those of control cells so that each cell stays itself.

With the size factor l_c of a cell (its library over the mean library), a gene's rate p in cells of a context, and the dispersion
theta, counts are negative binomial, x_c ~ NB(mean l_c p, theta): a Poisson draw around a gamma-distributed rate. The stimulus
takes the rate from p_0 to p_1. A control cell of x counts tells of its own rate, so that its stimulated counts are

    p_1 <= p_0:   y | x ~ Binomial(x, p_1 / p_0)
    p_1 >  p_0:   y | x = x + NB(mean l_c (p_1 - p_0) (theta + x) / (theta + l_c p_0), theta + x)

which are NB(mean l_c p_1, theta) over all cells: what the cell expresses it goes on to express, and genes that vary together go on
to. p_1 is where the mean of log1p of the re-normalised y is the predicted one. Which values are drawn is decided by numbers that are spread
evenly over the cells (:func:`spaperb.detection.even_numbers`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from spaperb._types import FloatArray

MAX_SOLVED = 500
"""Cells that p_1 is found on."""
N_HALVINGS = 16
LEAST_RATE, MOST_FOLD = 1e-6, 300.0
LEAST_DISPERSION, MOST_DISPERSION = 0.2, 50.0
EDGE = 1e-6
"""Distance of the numbers from 0 and 1, where quantiles are infinite."""


def scale_of(x: npt.NDArray, counts: npt.NDArray) -> FloatArray:
    """What each cell's counts were multiplied by before ``log1p``, ``(n,)``; 1 for cells without counts."""
    totals = counts.sum(axis=1)
    return np.where(totals > 0, np.expm1(x).sum(axis=1) / np.maximum(totals, 1), 1.0)


def size_of(counts: npt.NDArray, scale: FloatArray) -> FloatArray:
    """Size factors of cells, libraries over 10,000, ``(n,)``; 0 for cells without counts."""
    return np.where(counts.sum(axis=1) > 0, 1 / scale, 0.0)


def rate(counts: npt.NDArray, size: FloatArray) -> FloatArray:
    """Rate of each gene, p, ``(G,)``."""
    return counts.sum(axis=0) / max(size.sum(), EDGE)


def dispersion(counts: npt.NDArray, size: FloatArray) -> FloatArray:
    """Dispersion theta of each gene by moments, var = mean + mean^2 / theta, ``(G,)``."""
    mean = size[:, None] * rate(counts, size)
    excess = ((counts - mean) ** 2 - mean).sum(axis=0)
    theta = (mean**2).sum(axis=0) / np.maximum(excess, EDGE)
    return np.clip(theta, LEAST_DISPERSION, MOST_DISPERSION)


@dataclass
class CountChange:
    """How counts of a context's cells change.

    Attributes
    ----------
    before, after
        Rates p_0 and p_1, ``(G,)``.
    theta
        Dispersion, ``(G,)``.
    """

    before: FloatArray
    after: FloatArray
    theta: FloatArray

    @classmethod
    def of(
        cls,
        x: npt.NDArray,
        counts: npt.NDArray,
        uniform: npt.NDArray,
        change: FloatArray,
        theta: FloatArray,
    ) -> CountChange:
        """Find the rates that give the predicted change.

        Parameters
        ----------
        x, counts
            Control cells of the context, log-normalised and raw, ``(n, G)``.
        uniform
            Numbers of each cell and gene on [0, 1), ``(n, G)``.
        change
            Predicted change of the mean of ``x``, ``(G,)``.
        theta
            Dispersion of stimulated cells, ``(G,)``.
        """
        scale = scale_of(x, counts)
        size = size_of(counts, scale)
        before = rate(counts, size)
        some = np.random.default_rng(0).permutation(len(x))[:MAX_SOLVED]
        target = np.maximum(x[some].mean(axis=0) + change, 0)
        low = np.full(len(change), LEAST_RATE)
        high = np.maximum(before, np.quantile(before, 0.9) + LEAST_RATE) * MOST_FOLD
        for _ in range(N_HALVINGS):
            after = np.sqrt(low * high)
            y = cls(before, after, theta).apply(counts[some], size[some], uniform[some])
            is_low = np.log1p(y * scale[some, None]).mean(axis=0) < target
            low, high = np.where(is_low, after, low), np.where(is_low, high, after)
        after = np.where(target > 0, np.sqrt(low * high), 0.0)
        return cls(before, np.where(change == 0, before, after), theta)

    def apply(self, counts: npt.NDArray, size: FloatArray, uniform: npt.NDArray) -> FloatArray:
        """Draw stimulated counts of control cells, ``(n, G)``.

        Parameters
        ----------
        counts
            Raw counts, ``(n, G)``.
        size
            Size factors, ``(n,)``.
        uniform
            Numbers of each cell and gene on [0, 1), ``(n, G)``.
        """
        u = np.clip(uniform, EDGE, 1 - EDGE)
        y = np.array(counts, dtype=float)
        rises = self.after > self.before
        theta, x = self.theta[rises], y[:, rises]
        mean_before, mean_after = (size[:, None] * p[rises] for p in (self.before, self.after))
        y[:, rises] += stats.nbinom.ppf(
            u[:, rises], theta + x, (theta + mean_before) / (theta + mean_after)
        )
        falls = self.after < self.before
        kept = self.after[falls] / self.before[falls]
        y[:, falls] = stats.binom.ppf(u[:, falls], y[:, falls], kept)
        return y
