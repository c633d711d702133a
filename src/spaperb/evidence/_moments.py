"""What is measured of cells: moments of a context's control cells, and the shift a stimulus makes.

A context is *paired* if both conditions have at least five cells. Its *shift* is the mean of its
stimulated cells minus the mean of its control cells. Where batches are registered it is measured
within each batch, and averaged with the weights n m / (n + m) of n control and m stimulated cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from scvi.utils import track

from spaperb._types import CONTROL, STIMULATED, Expression, FloatArray, IntArray
from spaperb.evidence._settings import DEFAULT, Settings
from spaperb.populations import Pseudobulk

MANY_CELLS = 300_000
"""Measuring so many takes more than a few seconds, and shows progress."""
CLOSE = 1e-6
"""Doses of a smaller relative difference are the same: columns come in single precision too."""
TINY = 1e-9


class Measured(NamedTuple):
    """Cells of one context, by batch, and the share of each batch in the shift.

    Attributes
    ----------
    code
        Number of the context's label.
    perturbation
        Number of the perturbation.
    dose
        Its dose, NaN without doses.
    by_control, by_stimulated
        Pseudobulk of the cells of each batch.
    shares
        Share of each batch, ``(n_batches,)``.
    """

    code: int
    perturbation: int
    dose: float
    by_control: list[Pseudobulk]
    by_stimulated: list[Pseudobulk]
    shares: FloatArray

    @property
    def stimulated(self) -> Pseudobulk:
        """Pseudobulk of the stimulated cells."""
        return Pseudobulk.mixed(self.by_stimulated, self.shares)

    @property
    def control(self) -> Pseudobulk:
        """Pseudobulk of the control cells."""
        return Pseudobulk.mixed(self.by_control, self.shares)

    @property
    def shift(self) -> FloatArray:
        """Shift, ``(G,)``."""
        return self.stimulated.mean - self.control.mean

    @property
    def n(self) -> int:
        """Cells in the smaller condition."""
        arms = (self.by_control, self.by_stimulated)
        return min(sum(p.n for p in pseudobulks) for pseudobulks in arms)


class Noise(NamedTuple):
    """How the variance of a gene's cells goes with their mean.

    The variance of n cells is shrunk towards ``ratio`` times their mean, and that mean towards
    that of the control cells: as if ``prior_cells`` more had been seen. Few cells happen not to
    show many genes at all, and these are not certain. Where expression is negative, variance has
    nothing to do with the mean, and ``ratio`` is the variance itself.
    """

    ratio: FloatArray
    has_mean: bool
    prior_cells: float

    @classmethod
    def of(
        cls,
        pseudobulks: list[Pseudobulk],
        stimulated: list[Pseudobulk],
        unit: float = 1.0,
        settings: Settings = DEFAULT,
    ) -> Noise:
        """Pool the control cells of all contexts; ``unit`` as in :class:`Evidence`."""
        # The control cells' means may all be positive where expression is not.
        has_mean = all((p.mean >= 0).all() for p in [*pseudobulks, *stimulated])
        squares = np.sum([p.n * p.variance for p in pseudobulks], axis=0)
        degrees = np.array([max(p.n - 1, 0) for p in pseudobulks])
        levels = [p.mean if has_mean else np.ones_like(p.mean) for p in pseudobulks]
        total = degrees @ np.array(levels)
        # A gene that no control cell shows varies as the others do.
        usual = squares.sum() / max(total.sum(), TINY)
        tiny = settings.prior_cells * settings.tiny_mean * unit
        ratio = (squares + tiny * usual) / (total + tiny)
        return cls(ratio, has_mean, settings.prior_cells)

    def error_of_mean(self, pseudobulk: Pseudobulk) -> FloatArray:
        """Standard error of the mean of a population, ``(G,)``."""
        return np.sqrt(self._of_mean([pseudobulk], np.ones(1), pseudobulk.mean))

    def error_of_shift(self, measured: Measured) -> FloatArray:
        """Standard error of a measured shift, ``(G,)``."""
        of_arms = [
            self._of_mean(batches, measured.shares, measured.control.mean)
            for batches in (measured.by_control, measured.by_stimulated)
        ]
        return np.sqrt(np.sum(of_arms, axis=0))

    def _of_mean(
        self, batches: list[Pseudobulk], shares: FloatArray, expected: FloatArray
    ) -> FloatArray:
        """Sampling variance of the mean of cells in batches, whose cells vary alike, ``(G,)``."""
        n, more = np.array([p.n for p in batches]), self.prior_cells
        mean = (n @ np.array([p.mean for p in batches]) + more * expected) / (n.sum() + more)
        # Cells that were never measured may have negative means all the same.
        prior = self.ratio * (np.maximum(mean, 0) if self.has_mean else 1.0)
        squares = n @ np.array([p.variance for p in batches])
        variance = (squares + more * prior) / (max((n - 1).sum(), 0) + more)
        return (shares**2 / n).sum() * variance


class Measuring:
    """Measure training cells, context by context and within batches.

    Parameters
    ----------
    x
        Log-normalised expression, ``(n, G)``.
    arms
        For every cell CONTROL, NEITHER, or STIMULATED plus the number of its perturbation,
        ``(n,)``.
    labels
        For every cell the number of its context, ``(n,)``.
    batches
        For every cell the number of its batch, ``(n,)``.
    doses
        For every cell its dose, ``(n,)``.
    counts
        Raw counts, ``(n, G)``.
    settings
        Constants.
    """

    def __init__(
        self,
        x: Expression,
        arms: IntArray,
        labels: IntArray,
        batches: IntArray | None = None,
        doses: FloatArray | None = None,
        counts: Expression | None = None,
        settings: Settings = DEFAULT,
    ):
        self.settings = settings
        self.x, self.counts, self.arms, self.labels = x, counts, arms, labels
        self.batches = np.zeros_like(arms) if batches is None else batches
        self.doses = doses
        is_control = np.flatnonzero(arms == CONTROL)
        self.control = {
            group: is_control[rows]
            for group, rows in _groups(labels[is_control], self.batches[is_control])
        }
        self._pseudobulks: dict[tuple[int, int], Pseudobulk] = {}

    def shifts(
        self, is_asked: Callable[[int, int, float], bool] = lambda *_: True
    ) -> list[Measured]:
        """Measure every paired context of every perturbation and dose.

        Parameters
        ----------
        is_asked
            Whether a context, a perturbation and a dose are asked for.
        """
        todo = [
            (perturbation, dose, code, by_batch)
            for perturbation, dose, rows in _treatments(
                self.arms, self.doses, self.settings.max_doses
            )
            for code, by_batch in self._paired(rows).items()
            if is_asked(code, perturbation, dose)
        ]
        is_short = self.x.shape[0] < MANY_CELLS or len(todo) < 2
        return [
            self._measure(*one)
            for one in track(todo, description="Measuring contexts", disable=is_short)
        ]

    def rows(self, code: int) -> IntArray:
        """Control cells of a context."""
        return np.flatnonzero((self.labels == code) & (self.arms == CONTROL))

    def pseudobulk(self, rows: IntArray) -> Pseudobulk:
        """Pseudobulk of control cells, measured once.

        Without batches a context is its only batch.
        """
        key = int(rows[0]), len(rows)
        if key not in self._pseudobulks:
            self._pseudobulks[key] = Pseudobulk.of(self.x[rows])
        return self._pseudobulks[key]

    def _paired(self, stimulated: IntArray) -> dict[int, dict[int, IntArray]]:
        """Stimulated cells of each context, by batch, where there are control cells too."""
        by_context: dict[int, dict[int, IntArray]] = {}
        for group, rows in _groups(self.labels[stimulated], self.batches[stimulated]):
            if group in self.control:
                by_context.setdefault(group[0], {})[group[1]] = stimulated[rows]
        sizes = {
            code: min(
                sum(len(self.control[code, batch]) for batch in by_batch),
                sum(map(len, by_batch.values())),
            )
            for code, by_batch in by_context.items()
        }
        least = min(self.settings.min_cells, max(sizes.values(), default=0))
        return {code: rows for code, rows in by_context.items() if sizes[code] >= least}

    def _measure(
        self, perturbation: int, dose: float, code: int, by_batch: dict[int, IntArray]
    ) -> Measured:
        control = [self.pseudobulk(self.control[code, batch]) for batch in by_batch]
        stimulated = [
            Pseudobulk.of(self.x[rows], None if self.counts is None else self.counts[rows])
            for rows in by_batch.values()
        ]
        n_c, n_s = (np.array([p.n for p in pseudobulks]) for pseudobulks in (control, stimulated))
        shares = n_c * n_s / (n_c + n_s)
        return Measured(code, perturbation, dose, control, stimulated, shares / shares.sum())


def _groups(*keys: IntArray) -> Iterator[tuple[tuple[int, ...], IntArray]]:
    """Combinations of keys in ascending order, and the positions that have them."""
    groups = pd.DataFrame(dict(enumerate(keys))).groupby(list(range(len(keys)))).indices
    for group in sorted(groups):
        yield tuple(int(key) for key in group), groups[group]


def _treatments(
    arms: IntArray, doses: FloatArray | None, max_doses: int
) -> Iterator[tuple[int, float, IntArray]]:
    """Each perturbation, or each of its doses: its number, dose (NaN without), and cells.

    Cells at a dose of 0 tell of no stimulus, unless a perturbation has no other dose.
    """
    stimulated = np.flatnonzero(arms >= STIMULATED)
    for perturbation, of_perturbation in pd.Series(stimulated).groupby(
        arms[stimulated] - STIMULATED
    ):
        rows = of_perturbation.to_numpy()
        if doses is None:
            yield int(perturbation), np.nan, rows
            continue
        if (doses[rows] > 0).any():
            rows = rows[doses[rows] > 0]
        levels = merged(doses[rows])
        if len(np.unique(levels)) > max_doses:
            ranks = pd.qcut(levels, max_doses, labels=False, duplicates="drop")
            levels = pd.Series(levels).groupby(ranks).transform("median").to_numpy()
        for level in np.unique(levels):
            yield int(perturbation), float(level), rows[levels == level]


def merged(doses: FloatArray) -> FloatArray:
    """Doses, those that differ by rounding alone as the lowest of them."""
    levels, of_dose = np.unique(doses, return_inverse=True)
    is_new = np.r_[True, levels[1:] > levels[:-1] * (1 + CLOSE)]
    return levels[is_new][np.cumsum(is_new)[of_dose] - 1]
