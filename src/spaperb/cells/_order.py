"""Numbers that are spread evenly over the cells of a population, for each gene in another order.

Whether a silent cell turns on is decided by a number on [0, 1). Numbers that are drawn give a
mean that is off by as much as that of as many real cells. Here each gene puts the n silent cells
of a population into a random order, and so its expressing cells; the cell at place i gets
(i + 1/2) / n. So any share p of these cells is met to half a cell, and genes are not in step.

The order is not drawn and kept but computed: a cell's place is a function of its rank (how many
cells before it are silent too), n, the gene and a seed. Cells can be predicted in any chunks, and
each is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from spaperb._types import FloatArray, IntArray
from spaperb.populations import Pseudobulk

if TYPE_CHECKING:
    from spaperb.data import Cells, Query

N_ROUNDS = 4
"""Rounds of mixing. With two the orders of two genes still go together in small populations."""
GRID = 2.0**24
"""Values are summed as whole multiples of its inverse, which is exact in any order of cells."""

Ranks = npt.NDArray[np.uint32]


def order_of(ranks: Ranks, sizes: Ranks, seed: int, draw: int) -> FloatArray:
    """Numbers on (0, 1) of cells by rank, ``(n, G)``: (i + 1/2) / size with i a permuted rank.

    Parameters
    ----------
    ranks
        Rank of each cell among the silent, or among the expressing, cells of each gene, ``(n,
        G)``.
    sizes
        How many there are of these, ``(n, G)``.
    seed, draw
        What the orders follow from. One order serves the silent and the expressing cells of a
        gene.
    """
    rng = np.random.default_rng([seed, draw])
    keys = rng.integers(0, 2**32, (N_ROUNDS, 2, ranks.shape[1]), dtype=np.uint32)
    # A power of two that holds all ranks is permuted by steps that can each be undone.
    bits = np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.uint32)
    mask = (np.uint32(1) << bits) - np.uint32(1)
    shift = (bits + np.uint32(1)) >> np.uint32(1)
    places = _mixed(ranks, keys, mask, shift)
    # Places beyond the last are mixed again until they are none: a permutation of those that are
    # left.
    beyond = np.nonzero((places >= sizes) & (sizes > 0))
    while len(beyond[0]):
        some = places[beyond], keys[..., beyond[1]], mask[beyond], shift[beyond]
        places[beyond] = again = _mixed(*some)
        beyond = tuple(axis[again >= sizes[beyond]] for axis in beyond)
    return (places + 0.5) / np.maximum(sizes, 1)


def ranks_of(is_on: npt.NDArray[np.bool_]) -> tuple[Ranks, Ranks]:
    """Rank of each cell among its gene's silent or expressing cells, and their number."""
    on = np.cumsum(is_on, axis=0, dtype=np.uint32)
    return _ranks(is_on, on, np.arange(len(on), dtype=np.uint32)), _sizes(is_on, on[-1], len(on))


def _ranks(is_on: npt.NDArray[np.bool_], on: Ranks, places: Ranks) -> Ranks:
    """Ranks, from the expressing cells so far and each cell's place among all."""
    # An expressing cell is counted in `on` itself.
    return np.where(is_on, on - np.uint32(1), places[:, None] - on)


def _sizes(is_on: npt.NDArray[np.bool_], n_on: Ranks, n: int) -> Ranks:
    return np.where(is_on, n_on, np.uint32(n) - n_on)


def _mixed(x: Ranks, keys: Ranks, mask: Ranks, shift: Ranks) -> Ranks:
    """Permute the numbers up to ``mask``.

    Multiply by an odd number, add, fold the high bits down.
    """
    for factor, addend in keys:
        x = (x * (factor | np.uint32(1)) + addend) & mask
        x = x ^ (x >> shift)
    return x


class Part(NamedTuple):
    """Some consecutive cells of a query, of one population."""

    population: int
    within: IntArray
    """Their places in the cells that were read together."""
    ranks: Ranks
    """Rank of each among the silent, or among the expressing, cells of each gene, ``(n, G)``."""
    sizes: Ranks
    """How many there are of these in the whole population, ``(n, G)``."""

    def order(self, seed: int, draw: int) -> FloatArray:
        """Numbers of the cells, ``(n, G)``."""
        return order_of(self.ranks, self.sizes, seed, draw)


@dataclass
class Survey:
    """What one look at all cells of a query tells of its populations.

    Attributes
    ----------
    query
        The cells.
    populations
        Number of each cell's population, -1 for cells that are not wanted, ``(n_obs,)``.
    pseudobulks
        Moments of each population.
    n_expressing
        How many of its cells express each gene, ``(G,)`` each.
    expressing
        For the start of each block of the query, how many cells before it express each gene, by
        population, ``(G,)`` each.
    """

    query: Query
    populations: IntArray
    pseudobulks: dict[int, Pseudobulk]
    n_expressing: dict[int, Ranks]
    expressing: list[dict[int, Ranks]]

    def __post_init__(self) -> None:
        of_population = pd.Series(self.populations).groupby(self.populations)
        self.places = of_population.cumcount().to_numpy(dtype=np.uint32)

    @classmethod
    def of(cls, query: Query, populations: IntArray) -> Survey:
        """Look at all cells, with a progress bar where that takes long."""
        n_genes = len(query.columns)
        numbers = np.unique(populations[populations >= 0])
        sums = {int(p): np.zeros((2, n_genes)) for p in numbers}
        n_on = {int(p): np.zeros(n_genes, dtype=np.uint32) for p in numbers}
        survey = cls(query, populations, {}, n_on, [])
        for block in query.blocks("Looking at cells"):
            survey.expressing.append({p: n.copy() for p, n in n_on.items()})
            for cells in survey.read(query, block):
                of_cells = populations[cells.rows]
                for p in np.unique(of_cells[of_cells >= 0]):
                    x = cells.x[of_cells == p].astype(np.float64)
                    n_on[int(p)] += np.count_nonzero(x, axis=0).astype(np.uint32)
                    sums[int(p)] += [np.rint(y * GRID).sum(axis=0) for y in (x, x**2)]
        for p, (total, squares) in sums.items():
            n = int((populations == p).sum())
            mean = total / GRID / n
            variance = np.maximum(squares / GRID / n - mean**2, 0)
            survey.pseudobulks[p] = Pseudobulk(mean, variance, n_on[p] / n, n)
        return survey

    def read(self, query: Query, block: int) -> Iterator[Cells]:
        """Read the wanted cells of a block in their order, a part of the block at a time.

        Parameters
        ----------
        query
            The query of the survey, or one that holds the block alone.
        block
            Number of the block.
        """
        start = block * query.block_rows
        rows = start + np.flatnonzero(self.populations[start : start + query.block_rows] >= 0)
        for first in range(0, len(rows), query.chunk_rows):
            yield query.chunk(rows[first : first + query.chunk_rows])

    def parts(self, query: Query, block: int) -> Iterator[tuple[Cells, list[Part]]]:
        """Read the wanted cells of a block, and split them by population."""
        expressing = dict(self.expressing[block])
        for cells in self.read(query, block):
            of_cells = self.populations[cells.rows]
            parts = []
            for p in map(int, np.unique(of_cells)):
                within = np.flatnonzero(of_cells == p)
                is_on = cells.x[within] != 0
                on = expressing[p] + np.cumsum(is_on, axis=0, dtype=np.uint32)
                expressing[p] = on[-1]
                ranks = _ranks(is_on, on, self.places[cells.rows[within]])
                sizes = _sizes(is_on, self.n_expressing[p], self.pseudobulks[p].n)
                if (ranks >= sizes).any():
                    # Without this the search for a place would never end.
                    raise RuntimeError(
                        "The cells changed since their prediction was set up (a file on disk that "
                        "was written anew, say). Predict them again."
                    )
                parts.append(Part(p, within, ranks, sizes))
            yield cells, parts
