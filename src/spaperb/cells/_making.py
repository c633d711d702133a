"""From the change of each population to its cells."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from spaperb._types import FloatArray, IntArray
from spaperb.cells._counts import CountChange
from spaperb.cells._detection import Detection
from spaperb.cells._order import GRID, Part, Survey, order_of, ranks_of
from spaperb.populations import TINY, Profile, scale_of, size_of

if TYPE_CHECKING:
    from spaperb.prediction import Cells, Query

MAX_SOLVED, N_SOLVED = 2000, 500
"""The rates of counts are found on all cells of a population, or on so many of a larger one."""
MAX_HELD = 4000
"""Cells that are held in memory for that."""
N_SETTLED = 6
"""Looks at what rates that were found on some cells give all of them."""

How = Literal["shift", "detection", "counts"]


class PopulationChange(NamedTuple):
    """What is predicted of a population.

    ``mean`` is the change of the mean of each gene, ``(G,)``. ``references`` are stimulated
    populations that it resembles, and ``weights`` say how much.
    """

    mean: FloatArray
    references: list[Profile]
    weights: FloatArray


@dataclass
class CellMaker:
    """Turns control cells into stimulated ones that have the predicted mean.

    Attributes
    ----------
    survey
        What is known of the cells to predict.
    changes
        What is predicted of each population.
    how
        What becomes of a cell: the change is added to it (``"shift"``), split into detection and
        level (``"detection"``), or drawn in its counts (``"counts"``).
    seed
        Seed of the orders that cells change in.
    n_samples
        How many such orders to average over.
    minimum
        Lower bound that shifted values are clipped at.
    """

    survey: Survey
    changes: dict[int, PopulationChange]
    how: How
    seed: int = 0
    n_samples: int = 1
    minimum: float = -np.inf

    def __post_init__(self) -> None:
        profiles = self.survey.profiles
        self._detections: dict[int, Detection] = {}
        self._counts: dict[int, CountChange] = {}
        if self.how == "detection":
            self._detections = {
                p: Detection.of(c.references, profiles[p], c.mean, c.weights)
                for p, c in self.changes.items()
            }
            self._settle_detections()
        elif self.how == "counts":
            self._settle_counts()

    def make(self, query: Query, rows: IntArray) -> Iterator[tuple[IntArray, npt.NDArray]]:
        """Make some cells.

        Parameters
        ----------
        query
            The query of the survey, or one that holds a block of it alone.
        rows
            Rows of the survey's query.

        Yields
        ------
        tuple of numpy.ndarray
            Some of the rows and their predicted expression, ``(n, G)``.
        """
        for block in np.unique(rows // query.block_rows):
            for cells, parts in self.survey.parts(query, int(block)):
                made = np.empty_like(cells.x)
                for part in parts:
                    made[part.within] = self._make(cells, part)
                wanted = np.isin(cells.rows, rows)
                yield cells.rows[wanted], made[wanted]

    def _make(self, cells: Cells, part: Part) -> npt.NDArray:
        x = cells.x[part.within]
        if self.how == "shift":
            shift = self.changes[part.population].mean.astype(np.float32)
            return np.maximum(x + shift, np.float32(self.minimum))
        if self.how == "detection":
            detection = self._detections[part.population]
            draws = (
                detection.apply(x, part.order(self.seed, draw)) for draw in range(self.n_samples)
            )
            return sum(draws) / np.float32(self.n_samples)
        raw = cells.counts[part.within]
        change = self._counts[part.population]
        return change.apply(raw, size_of(raw, scale_of(x, raw)), part.order(self.seed, 0))

    def _settle_detections(self) -> None:
        """Scale each gene's cells to the exact mean, which their numbers meet to about a cell."""
        sums = {p: np.zeros(len(self.survey.query.columns)) for p in self.changes}
        for cells, part in self._parts("Settling means", self.changes):
            made = self._make(cells, part).astype(np.float64)
            sums[part.population] += np.rint(made * GRID).sum(axis=0)
        for p, detection in self._detections.items():
            detection.settle(sums[p] / GRID / self.survey.profiles[p].n)

    def _settle_counts(self) -> None:
        """Find the rates of each population on some of its cells, and again by what all of them give."""
        sampled: dict[int, tuple[npt.NDArray, ...]] = {}
        survey = self.survey
        sizes = {p: survey.profiles[p].n for p in self.changes}
        n_sampled = {p: n if n <= MAX_SOLVED else N_SOLVED for p, n in sizes.items()}
        batch = np.cumsum(list(n_sampled.values())) // MAX_HELD
        for number in np.unique(batch):
            some = {
                p: n for (p, n), b in zip(n_sampled.items(), batch, strict=True) if b == number
            }
            for p, cells in self._sample(some).items():
                change = self.changes[p]
                theta = np.array([c.dispersion for c in change.references], dtype=float)
                theta = np.exp(change.weights @ np.log(theta) / change.weights.sum())
                self._counts[p] = CountChange.of(*cells, change.mean, theta)
                if sizes[p] > MAX_SOLVED:
                    sampled[p] = cells
        n_genes = len(survey.query.columns)
        best = {p: (self._counts[p], np.full(n_genes, np.inf)) for p in sampled}
        bounds = {p: (np.zeros(n_genes), np.full(n_genes, np.inf)) for p in sampled}
        for _ in range(N_SETTLED if sampled else 0):
            sums = {p: np.zeros(n_genes) for p in sampled}
            for cells, part in self._parts("Settling means", sampled):
                x, raw = cells.x[part.within], cells.counts[part.within]
                made = np.log1p(self._make(cells, part) * scale_of(x, raw)[:, None])
                sums[part.population] += np.rint(made * GRID).sum(axis=0)
            for p, (counts, least) in best.items():
                mean = survey.profiles[p].mean + self.changes[p].mean
                missed = np.maximum(mean, 0) - sums[p] / GRID / sizes[p]
                best[p] = (
                    counts.where(np.abs(missed) >= least, self._counts[p]),
                    np.minimum(np.abs(missed), least),
                )
                rate, (low, high) = self._counts[p].after, bounds[p]
                bounds[p] = np.where(missed > 0, rate, low), np.where(missed < 0, rate, high)
                self._counts[p] = self._counts[p].moved(missed, *bounds[p], *sampled[p][:3])
        self._counts |= {p: counts for p, (counts, _) in best.items()}

    def _sample(self, sizes: dict[int, int]) -> dict[int, tuple[npt.NDArray, ...]]:
        """For :meth:`CountChange.of`: some cells of populations, at random, numbers of these alone, and the rates of all."""
        rng = np.random.default_rng(0)
        is_sampled = np.zeros(len(self.survey.populations), dtype=bool)
        for p, n in sizes.items():
            is_sampled[rng.permutation(np.flatnonzero(self.survey.populations == p))[:n]] = True
        found: dict[int, list[tuple[npt.NDArray, ...]]] = {p: [] for p in sizes}
        totals = {p: [np.zeros(len(self.survey.query.columns)), 0.0] for p in sizes}
        for cells, part in self._parts("Looking at counts", sizes):
            x, counts = cells.x[part.within], cells.counts[part.within]
            totals[part.population][0] += counts.sum(axis=0)
            totals[part.population][1] += size_of(counts, scale_of(x, counts)).sum()
            within = part.within[is_sampled[cells.rows[part.within]]]
            found[part.population].append((cells.x[within], cells.counts[within]))
        sampled = {}
        for p, pieces in found.items():
            x, counts = map(np.concatenate, zip(*pieces, strict=True))
            total, size = totals[p]
            order = order_of(*ranks_of(x != 0), self.seed, 0)
            sampled[p] = x, counts, order, total / max(size, TINY)
        return sampled

    def _parts(
        self, description: str, populations: Collection[int]
    ) -> Iterator[tuple[Cells, Part]]:
        query = self.survey.query
        for block in query.blocks(description):
            for cells, parts in self.survey.parts(query, block):
                for part in parts:
                    if part.population in populations:
                        yield cells, part
