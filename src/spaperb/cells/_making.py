"""From the change of each population to its cells."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from spaperb._types import FloatArray, IntArray
from spaperb.cells._counts import CountChange, Sample
from spaperb.cells._detection import Detection
from spaperb.cells._order import GRID, Part, Survey, order_of, ranks_of
from spaperb.populations import TINY, Pseudobulk, scale_of, size_of

if TYPE_CHECKING:
    from spaperb.data import Cells, Query

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
    references: list[Pseudobulk]
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
        What becomes of a cell: the change is added to it (``"shift"``), split into zeros and the
        rest (``"detection"``), or drawn in its counts (``"counts"``).
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
        pseudobulks = self.survey.pseudobulks
        self._detections: dict[int, Detection] = {}
        self._counts: dict[int, CountChange] = {}
        if self.how == "detection":
            self._detections = {
                p: Detection.of(c.references, pseudobulks[p], c.mean, c.weights)
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
        p, x = part.population, cells.x[part.within]
        if self.how == "shift":
            shift = self.changes[p].mean.astype(np.float32)
            return np.maximum(x + shift, np.float32(self.minimum))
        if self.how == "detection":
            orders = (part.order(self.seed, draw) for draw in range(self.n_samples))
            return np.mean([self._detections[p].apply(x, order) for order in orders], axis=0)
        raw, size, _ = _counts_of(cells, part)
        return self._counts[p].apply(raw, size, part.order(self.seed, 0))

    def _settle_detections(self) -> None:
        """Scale each gene's cells to the exact mean, which their numbers meet to about a cell."""
        for p, mean in self._means(self._make, self.changes).items():
            self._detections[p].settle(mean)

    def _settle_counts(self) -> None:
        """Find the rates of each population on some cells, and correct them on all."""
        sizes = {p: self.survey.pseudobulks[p].n for p in self.changes}
        n_sampled = {p: n if n <= MAX_SOLVED else N_SOLVED for p, n in sizes.items()}
        batch = np.cumsum(list(n_sampled.values())) // MAX_HELD
        samples: dict[int, Sample] = {}
        for number in np.unique(batch):
            some = {
                p: n for (p, n), b in zip(n_sampled.items(), batch, strict=True) if b == number
            }
            for p, sample in self._sample(some).items():
                change = self.changes[p]
                theta = np.array([c.dispersion for c in change.references], dtype=float)
                theta = np.exp(change.weights @ np.log(theta) / change.weights.sum())
                self._counts[p] = CountChange.of(sample, change.mean, theta)
                if sizes[p] > MAX_SOLVED:
                    samples[p] = sample
        best, missed_least, low, high = {}, {}, {}, {}
        for p in samples:
            best[p], n_genes = self._counts[p], len(self.changes[p].mean)
            missed_least[p], low[p], high[p] = (np.full(n_genes, x) for x in (np.inf, 0, np.inf))
        for _ in range(N_SETTLED if samples else 0):
            for p, mean in self._means(self._normalised_counts, samples).items():
                wanted = self.survey.pseudobulks[p].mean + self.changes[p].mean
                missed, now = np.maximum(wanted, 0) - mean, self._counts[p]
                is_best = np.abs(missed) < missed_least[p]
                best[p] = now.where(is_best, best[p])
                missed_least[p] = np.minimum(np.abs(missed), missed_least[p])
                low[p] = np.where(missed > 0, now.after, low[p])
                high[p] = np.where(missed < 0, now.after, high[p])
                self._counts[p] = now.moved(missed, low[p], high[p], samples[p])
        self._counts |= best

    def _normalised_counts(self, cells: Cells, part: Part) -> npt.NDArray:
        return np.log1p(self._make(cells, part) * _counts_of(cells, part)[2][:, None])

    def _means(
        self, make: Callable[[Cells, Part], npt.NDArray], populations: Collection[int]
    ) -> dict[int, FloatArray]:
        """Mean of the cells made of some populations, the same in any order of cells."""
        sums = {p: np.zeros(len(self.survey.query.columns)) for p in populations}
        for cells, part in self._parts("Settling means", populations):
            made = make(cells, part).astype(np.float64)
            sums[part.population] += np.rint(made * GRID).sum(axis=0)
        return {p: total / GRID / self.survey.pseudobulks[p].n for p, total in sums.items()}

    def _sample(self, sizes: dict[int, int]) -> dict[int, Sample]:
        """Some cells of populations, at random, with numbers of these alone."""
        rng = np.random.default_rng(0)
        is_sampled = np.zeros(len(self.survey.populations), dtype=bool)
        for p, n in sizes.items():
            is_sampled[rng.permutation(np.flatnonzero(self.survey.populations == p))[:n]] = True
        found: dict[int, list[tuple[npt.NDArray, npt.NDArray]]] = {p: [] for p in sizes}
        total = {p: np.zeros(len(self.survey.query.columns)) for p in sizes}
        total_size = dict.fromkeys(sizes, 0.0)
        for cells, part in self._parts("Looking at counts", sizes):
            p, (raw, size, _) = part.population, _counts_of(cells, part)
            total[p] += raw.sum(axis=0)
            total_size[p] += size.sum()
            some = is_sampled[cells.rows[part.within]]
            found[p].append((cells.x[part.within][some], raw[some]))
        samples = {}
        for p, pieces in found.items():
            x, raw = map(np.concatenate, zip(*pieces, strict=True))
            order = order_of(*ranks_of(x != 0), self.seed, 0)
            samples[p] = Sample(x, raw, order, total[p] / max(total_size[p], TINY))
        return samples

    def _parts(
        self, description: str, populations: Collection[int]
    ) -> Iterator[tuple[Cells, Part]]:
        query = self.survey.query
        for block in query.blocks(description):
            for cells, parts in self.survey.parts(query, block):
                for part in parts:
                    if part.population in populations:
                        yield cells, part


def _counts_of(cells: Cells, part: Part) -> tuple[npt.NDArray, FloatArray, FloatArray]:
    """Raw counts ``(n, G)``, size factors and what counts were multiplied by, ``(n,)`` each."""
    if cells.counts is None:
        raise ValueError("Counts are drawn from cells that come with counts.")
    raw = cells.counts[part.within]
    scale = scale_of(cells.x[part.within], raw)
    return raw, size_of(raw, scale), scale
