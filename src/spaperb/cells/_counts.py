"""Counts of stimulated cells, drawn from those of control cells so that each cell stays itself.

With the size factor l_c of a cell (its library over the mean library), a gene's rate p in cells of
a context, and the dispersion theta, counts are negative binomial, x_c ~ NB(mean l_c p, theta): a
Poisson draw around a gamma-distributed rate. The stimulus takes the rate from p_0 to p_1. A
control cell of x counts tells of its own rate, so that its stimulated counts are

    p_1 <= p_0:   y | x ~ Binomial(x, p_1 / p_0)
    p_1 >  p_0:   y | x = x + NB(mean l_c (p_1 - p_0) (theta + x) / (theta + l_c p_0), theta + x)

which are NB(mean l_c p_1, theta) over all cells: what the cell expresses it goes on to express,
and genes that vary together go on to. p_1 is where the mean of log1p of the re-normalised y is the
predicted one, as near as whole counts can come to it. Which values are drawn is decided by numbers
that are spread evenly over the cells (:mod:`spaperb.cells._order`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from spaperb._types import FloatArray
from spaperb.populations import scale_of, size_of

N_HALVINGS = 18
"""They leave rates that differ by 1 in 10,000."""
LEAST_RATE, MOST_FOLD = 1e-6, 300.0
NUDGE = 1.2
"""Factor on both sides of a rate that the slope of the mean is taken between.

Wide for its steps.
"""
CLOSE = 1e-5
"""A mean of less is that of cells without a count."""


class Sample(NamedTuple):
    """Control cells that rates are found on.

    ``x`` and ``counts``, log-normalised and raw, ``(n, G)``; numbers of each cell and gene on (0,
    1), ``order``, ``(n, G)``; and the rates of the population that they are of, ``before``,
    ``(G,)``.
    """

    x: npt.NDArray
    counts: npt.NDArray
    order: FloatArray
    before: FloatArray


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
    def of(cls, sample: Sample, change: FloatArray, theta: FloatArray) -> CountChange:
        """Find the rates that give the predicted change.

        Parameters
        ----------
        sample
            The cells.
        change
            Predicted change of the mean of ``x``, ``(G,)``.
        theta
            Dispersion of stimulated cells, ``(G,)``.
        """
        x, counts, order, before = sample
        scale = scale_of(x, counts)
        size = size_of(counts, scale)
        target = np.maximum(x.mean(axis=0, dtype=np.float64) + change, 0)
        found = np.where(change == 0, before, 0.0)
        missed = target.copy()  # by a rate of 0
        genes = np.flatnonzero((change != 0) & (target > CLOSE))
        low = np.full(len(genes), LEAST_RATE)
        high = np.maximum(before, np.quantile(before, 0.9) + LEAST_RATE)[genes] * MOST_FOLD
        some = counts[:, genes], size, order[:, genes]
        for _ in range(N_HALVINGS):
            after = np.sqrt(low * high)
            y = cls(before[genes], after, theta[genes]).apply(*some)
            error = np.log1p(y * scale[:, None]).mean(axis=0) - target[genes]
            # Counts are whole, so the mean takes steps, and the last rate need not be the best.
            better = np.abs(error) < missed[genes]
            found[genes[better]], missed[genes[better]] = after[better], np.abs(error[better])
            low, high = np.where(error < 0, after, low), np.where(error < 0, high, after)
        return cls(before, found, theta)

    def moved(
        self, by: FloatArray, low: FloatArray, high: FloatArray, sample: Sample
    ) -> CountChange:
        """Move the mean by so much, ``(G,)``: a step of Newton's method within bounds.

        Parameters
        ----------
        by
            What is to be added to the mean of each gene.
        low, high
            Rates that are known to be too low and too high, ``(G,)``; 0 and infinite where none
            is.
        sample
            Cells to take the slope from.
        """
        x, counts, order, _ = sample
        scale = scale_of(x, counts)
        size = size_of(counts, scale)
        means = [
            np.log1p(
                replace(self, after=self.after * f).apply(counts, size, order) * scale[:, None]
            ).mean(axis=0)
            for f in (1 / NUDGE, NUDGE)
        ]
        slope = (means[1] - means[0]) / (2 * np.log(NUDGE))
        is_changed = (self.after != self.before) & (slope > 0)
        step = np.divide(by, slope, where=is_changed, out=np.zeros_like(slope))
        after = self.after * np.exp(np.clip(step, -1, 1))
        is_out = ((after <= low) | (after >= high)) & (low > 0) & (high < np.inf)
        after[is_out] = np.sqrt(low[is_out] * high[is_out])
        return replace(self, after=after)

    def where(self, is_better: npt.NDArray[np.bool_], other: CountChange) -> CountChange:
        """Keep the rates of some genes, and take those of another for the rest."""
        return replace(self, after=np.where(is_better, self.after, other.after))

    def apply(self, counts: npt.NDArray, size: FloatArray, order: FloatArray) -> FloatArray:
        """Draw stimulated counts of control cells, ``(n, G)``.

        Parameters
        ----------
        counts
            Raw counts, ``(n, G)``.
        size
            Size factors, ``(n,)``.
        order
            Numbers of each cell and gene on (0, 1), ``(n, G)``.
        """
        y = np.array(counts, dtype=float)
        rises = self.after > self.before
        theta, x = self.theta[rises], y[:, rises]
        mean_before, mean_after = (size[:, None] * p[rises] for p in (self.before, self.after))
        y[:, rises] += stats.nbinom.ppf(
            order[:, rises], theta + x, (theta + mean_before) / (theta + mean_after)
        )
        falls = self.after < self.before
        kept = self.after[falls] / self.before[falls]
        y[:, falls] = stats.binom.ppf(order[:, falls], y[:, falls], kept)
        return y
