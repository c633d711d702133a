"""Which stimulated cell partners which control cell.

The published text pairs cells and does not say how. Here cells are partners only inside a *stratum*:
one cell type and, where a batch is registered, one batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spaperb._types import IntArray

CONTROL, STIMULATED, NEITHER = 0, 1, -1
"""What a cell's condition makes of it (its *arm*): the values of the ``arms`` arrays."""


class Stratum(NamedTuple):
    """Positions of the control and of the stimulated cells that may become partners."""

    control: IntArray
    stimulated: IntArray

    @property
    def n_pairs(self) -> int:
        """Pairs in an epoch: every cell of the larger arm once, none if an arm is empty."""
        sizes = len(self.control), len(self.stimulated)
        return max(sizes) if min(sizes) else 0


def split_strata(indices: IntArray, arms: IntArray, labels: IntArray) -> list[Stratum]:
    """Sort cells into strata, leaving out strata without a cell in one of the arms.

    Parameters
    ----------
    indices
        Cells to sort, positions in ``arms`` and ``labels``.
    arms
        For every cell CONTROL, STIMULATED or NEITHER, ``(n_obs,)``.
    labels
        For every cell the number of its stratum, ``(n_obs,)``.
    """
    strata = (
        Stratum(cells[arms[cells] == CONTROL], cells[arms[cells] == STIMULATED])
        for cells in (indices[labels[indices] == label] for label in np.unique(labels[indices]))
    )
    return [stratum for stratum in strata if stratum.n_pairs]


def unpaired_strata(indices: IntArray, arms: IntArray, labels: IntArray) -> list[Stratum]:
    """Sort the control cells that :func:`split_strata` leaves out into strata of their own.

    Each halves its cells, so that a "pair" is two control cells of one type, and every cell is
    visited once in an epoch. Such pairs teach the auto-encoder and say nothing of the stimulus.

    Parameters
    ----------
    indices
        Cells to sort, positions in ``arms`` and ``labels``.
    arms
        For every cell CONTROL, STIMULATED or NEITHER, ``(n_obs,)``.
    labels
        For every cell the number of its stratum, ``(n_obs,)``.
    """
    stimulated = np.unique(labels[indices[arms[indices] == STIMULATED]])
    left = indices[(arms[indices] == CONTROL) & ~np.isin(labels[indices], stimulated)]
    by_label = (left[labels[left] == label] for label in np.unique(labels[left]))
    strata = (Stratum(cells[::2], cells[1::2]) for cells in by_label)
    return [stratum for stratum in strata if stratum.n_pairs]


def random_pairs(strata: list[Stratum], rng: np.random.Generator) -> IntArray:
    """Draw random pairs within each stratum.

    Every cell of a stratum's larger arm is used once. Its partners run through the smaller arm in
    random order, again and again, so that no cell is used twice before all were used once.

    Parameters
    ----------
    strata
        The strata to draw from.
    rng
        Source of randomness.

    Returns
    -------
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


def _run_through(cells: IntArray, n: int, rng: np.random.Generator) -> IntArray:
    rounds = np.tile(cells, (-(-n // len(cells)), 1))
    return rng.permuted(rounds, axis=1).ravel()[:n]
