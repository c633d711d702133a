"""Cells whose mean changes as predicted, and whose zeros and variance stay those of real cells.

A constant added to every cell puts a value into every silent gene, and clipping at 0 loses part of
every decrease. Here a change of the mean m = q l, with the detection q (the fraction of cells that
express a gene) and l (the mean of these expressing cells), is split into more or fewer cells that
express the gene and more or less in each::

    m1 = max(m0 + change, 0)     l1 between l0 (all in detection) and m1 / q0 (all in l)
    q1 = m1 / l1

l1 is that of the stimulated cells of similar training contexts, as far as it lies between
these two. Of the silent cells the fraction (q1 - q0) / (1 - q0) turns on, of the expressing ones
q1 / q0 stays on. Which ones is decided by numbers that are spread evenly over the cells rather
than drawn (:mod:`spaperb.cells._order`), and what they still miss of m1 is made up for by a
factor, so that the mean of the cells is m1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from spaperb._types import FloatArray
from spaperb.populations import Pseudobulk

LEVEL_CHANGE = 0.1
"""Smaller changes of the mean of expressing cells do not make a cell a responding one."""
BACKGROUND = 0.02
"""Weight of all contexts together in a mean, for genes that the near ones never express."""
NEGLIGIBLE = 5e-4
"""A mean of less may be that of no cell at all."""


@dataclass
class Detection:
    """How zeros, and the mean of expressing cells, change, gene by gene.

    Attributes
    ----------
    turns_on
        Probability that a silent cell expresses the gene, ``(G,)``.
    stays_on
        Probability that an expressing cell goes on expressing it, ``(G,)``.
    expressed_mean, spread
        Mean and standard deviation of the expression of cells that turned on, ``(G,)``.
    added, factor
        Expressing cells become ``factor * x + added``, ``(G,)``: a rise adds, a fall multiplies.
    mean
        Mean of the cells after the change, ``(G,)``.
    exact
        What all values are multiplied by, so that their mean is that, ``(G,)``.
    """

    turns_on: FloatArray
    stays_on: FloatArray
    expressed_mean: FloatArray
    spread: FloatArray
    added: FloatArray
    factor: FloatArray
    mean: FloatArray
    exact: npt.NDArray[np.float32]

    @classmethod
    def of(
        cls,
        references: list[Pseudobulk],
        control: Pseudobulk,
        change: FloatArray,
        weights: FloatArray,
    ) -> Detection:
        """Split the change of a context's mean.

        Parameters
        ----------
        references
            Pseudobulks of stimulated cells, whose means it takes, ``P`` of them.
        control
            Moments of the cells to change.
        change
            Their mean change, ``(G,)``.
        weights
            Weights of the references, ``(P,)``.
        """
        weights = weights + BACKGROUND / len(weights)
        mean, variance, detection = (
            weights @ np.array([getattr(s, name) for s in references])
            for name in ("mean", "variance", "detection")
        )
        q0, m0 = control.detection, control.mean
        m1 = np.maximum(m0 + change, 0)
        l0 = _ratio(m0, q0, np.nan)
        expressed = _ratio(mean, detection, np.where(q0 > 0, l0, 1.0))
        squares = _ratio(variance + weights @ _squares(references), detection, expressed**2)
        all_in_l = _ratio(m1, q0, np.nan)
        l1 = np.where(
            q0 > 0,
            np.clip(expressed, np.fmin(l0, all_in_l), np.fmax(l0, all_in_l)),
            expressed,
        )
        l1 = np.maximum(l1, m1)  # more than all cells cannot express it
        # One cell at least, where there is a mean; it has to have all of it.
        q1 = np.maximum(_ratio(m1, l1, 0.0), np.where(m1 > NEGLIGIBLE, 1 / control.n, 0.0))
        rises = (q0 > 0) & (l1 > l0)
        return cls(
            turns_on=np.clip(_ratio(q1 - q0, 1 - q0, 0.0), 0, 1),
            stays_on=np.clip(_ratio(q1, q0, 0.0), 0, 1),
            expressed_mean=l1,
            spread=np.sqrt(np.maximum(squares - expressed**2, 0)),
            added=np.where(rises, l1 - l0, 0.0),
            factor=np.where((q0 > 0) & ~rises, _ratio(l1, l0, 1.0), 1.0),
            mean=m1,
            exact=np.ones(len(m1), dtype=np.float32),
        )

    def settle(self, mean: FloatArray) -> None:
        """Make the mean that :meth:`apply` gives all cells, ``(G,)``, the predicted one."""
        self.exact = _ratio(self.mean, mean, 1.0).astype(np.float32)

    def responding(self, control: Pseudobulk) -> FloatArray:
        """Fraction of cells whose expression of each gene changes, ``(G,)``.

        Cells that begin to express it, cells that cease to, and, if their mean changes by more
        than 0.1 in log-normalised units, all that go on.
        """
        q0 = control.detection
        l0 = _ratio(control.mean, q0, 0.0)
        is_shifted = np.abs(self.factor * l0 + self.added - l0) > LEVEL_CHANGE
        return (1 - q0) * self.turns_on + q0 * np.where(is_shifted, 1.0, 1 - self.stays_on)

    def apply(self, x: npt.NDArray, order: FloatArray) -> npt.NDArray:
        """Turn control cells into stimulated ones.

        Parameters
        ----------
        x
            Control cells, ``(n, G)``, without negative values.
        order
            Numbers of each cell and gene on (0, 1), ``(n, G)``: the silent cells with the lowest
            turn on, and the expressing ones with the lowest stay on.
        """
        is_on = x > 0
        stays = is_on & (order < self.stays_on)
        stimulated = np.where(stays, self.factor * x + self.added, 0.0)
        # Few turn on, and quantiles take time.
        cell, gene = np.nonzero(~is_on & (order < self.turns_on))
        expressed = self.expressed_mean[gene]
        # Among those that turn on the numbers are uniform too.
        new = expressed + self.spread[gene] * ndtri(order[cell, gene] / self.turns_on[gene])
        # Symmetric bounds keep the mean, and no cell that turned on is silent.
        stimulated[cell, gene] = np.clip(new, 0.3 * expressed, 1.7 * expressed)
        return stimulated.astype(np.float32) * self.exact


def _squares(references: list[Pseudobulk]) -> FloatArray:
    """Squared means of the stimulated cells, ``(P, G)``."""
    return np.array([s.mean for s in references]) ** 2


def _ratio(a: FloatArray, b: FloatArray, otherwise: FloatArray | float) -> FloatArray:
    """Quotient where ``b`` is positive, else another value."""
    return np.where(b > 0, np.divide(a, b, where=b > 0, out=np.zeros_like(a)), otherwise)
