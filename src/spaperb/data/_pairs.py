"""Which stimulated cell partners which control cell.

The published text pairs cells and does not say how. Here cells are partners only inside a
*stratum*: one cell type, one perturbation and, where a batch is registered, one batch.
Perturbations share the control cells of their type and batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spaperb._types import CONTROL, STIMULATED, IntArray


class Stratum(NamedTuple):
    """Positions of the control and of the stimulated cells that may become partners.

    ``allotted`` is the number of pairs in an epoch; ``None``: every cell of the larger arm once.
    """

    control: IntArray
    stimulated: IntArray
    allotted: int | None = None

    @property
    def n_pairs(self) -> int:
        """Pairs in an epoch, none if an arm is empty."""
        sizes = len(self.control), len(self.stimulated)
        if not min(sizes):
            return 0
        return max(sizes) if self.allotted is None else self.allotted


def split_strata(indices: IntArray, arms: IntArray, labels: IntArray) -> list[Stratum]:
    """Sort cells into strata, leaving out strata without a cell in one of the arms.

    A cell type (and batch) with n control cells and n_p cells of perturbation p, one or several,
    gives max(n, sum n_p) pairs. They go to the perturbations in proportion to the square root of
    n_p: a rare perturbation is seen more often than in proportion to its cells, and no cell of it
    as often as if all perturbations were seen alike.

    Parameters
    ----------
    indices
        Cells to sort, positions in ``arms`` and ``labels``.
    arms
        For every cell CONTROL, NEITHER, or STIMULATED plus the number of its perturbation,
        ``(n_obs,)``.
    labels
        For every cell the number of its cell type (and batch).
    """
    strata = []
    for label in np.unique(labels[indices]):
        cells = indices[labels[indices] == label]
        control, stimulated = (cells[arms[cells] == CONTROL], cells[arms[cells] >= STIMULATED])
        stimulated = stimulated[np.argsort(arms[stimulated], kind="stable")]
        if not (len(control) and len(stimulated)):
            continue
        _, starts = np.unique(arms[stimulated], return_index=True)
        of_perturbation = np.split(stimulated, starts[1:])
        pairs = _allot(max(len(control), len(stimulated)), [len(c) for c in of_perturbation])
        strata += [Stratum(control, c, n) for c, n in zip(of_perturbation, pairs, strict=True)]
    return strata


def random_pairs(strata: list[Stratum], rng: np.random.Generator) -> IntArray:
    """Draw random pairs within each stratum.

    Both arms are run through in random order, again and again if need be, so that no cell is used
    twice before all were used once. With one perturbation every cell of the larger arm is used
    once.

    Parameters
    ----------
    strata
        The strata to draw from.
    rng
        Source of randomness.

    Returns
    -------
    numpy.ndarray
        Control and stimulated positions, ``(n_pairs, 2)``, stratum after stratum.
    """
    pairs = [
        np.column_stack(
            [
                _run_through(arm, stratum.n_pairs, rng)
                for arm in (stratum.control, stratum.stimulated)
            ]
        )
        for stratum in strata
    ]
    return np.concatenate(pairs) if pairs else np.empty((0, 2), dtype=np.int64)


def _allot(n_pairs: int, sizes: list[int]) -> list[int]:
    """Share out pairs in proportion to the square roots of sizes, at least one to each."""
    roots = np.sqrt(sizes)
    bounds = np.rint((n_pairs - len(sizes)) * np.cumsum(roots) / roots.sum())
    return (1 + np.diff(bounds.astype(int), prepend=0)).tolist()


def _run_through(cells: IntArray, n: int, rng: np.random.Generator) -> IntArray:
    rounds = np.tile(cells, (-(-n // len(cells)), 1))
    return rng.permuted(rounds, axis=1).ravel()[:n]
