"""States: neighbourhoods among the control cells of a context, which may respond differently."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances_argmin

from spaperb._types import CONTROL, STIMULATED, FloatArray, IntArray
from spaperb.evidence._settings import Settings

MAX_STATE_CELLS = 5000
"""Control cells of a context that states are found among."""


def find_states(cells: FloatArray, settings: Settings) -> FloatArray:
    """Centres of the states of control cells, by k-means, ``(n_states, n_components)``.

    Parameters
    ----------
    cells
        Components of the control cells of a context, ``(n, n_components)``.
    settings
        How many cells a state should have.
    """
    n_states = int(np.clip(len(cells) // settings.state_cells, 1, settings.max_states))
    # In an order of their own, so that the states do not depend on that of the cells.
    cells = cells[np.lexsort(cells.T)]
    some = np.random.default_rng(0).permutation(len(cells))[:MAX_STATE_CELLS]
    return KMeans(n_states, n_init=3, random_state=0).fit(cells[np.sort(some)]).cluster_centers_


def nearest_state(cells: FloatArray, centres: FloatArray) -> IntArray:
    """Number of the nearest state of each cell, ``(n,)``."""
    return pairwise_distances_argmin(cells, centres).astype(np.int64)


def states_of(
    cells: FloatArray,
    arms: IntArray,
    labels: IntArray,
    doses: FloatArray | None,
    settings: Settings,
) -> tuple[IntArray, IntArray]:
    """Find the state of each training cell.

    Stimulated cells are of the nearest state once the mean change of their context, perturbation
    and dose is taken off.

    Parameters
    ----------
    cells
        Components of all cells, ``(n, n_components)``.
    arms
        For every cell CONTROL, NEITHER, or STIMULATED plus the number of its perturbation.
    labels
        For every cell the number of its context.
    doses
        For every cell its dose; ``None`` without doses.
    settings
        How many cells a state should have.

    Returns
    -------
    tuple of numpy.ndarray
        For every cell the number of its state, -1 for those that take no part, ``(n,)``; for every
        state the number of its context.
    """
    states: IntArray = np.full(len(arms), -1)
    contexts: list[int] = []
    for k in np.unique(labels[arms == CONTROL]):
        control = np.flatnonzero((labels == k) & (arms == CONTROL))
        centres = find_states(cells[control], settings)
        first = len(contexts)
        states[control] = first + nearest_state(cells[control], centres)
        treated = np.flatnonzero((labels == k) & (arms >= STIMULATED))
        of = [arms[treated]] if doses is None else [arms[treated], doses[treated]]
        for places in (
            pd.DataFrame(dict(enumerate(of))).groupby([*range(len(of))]).indices.values()
        ):
            stimulated = treated[places]
            moved = cells[stimulated] - cells[stimulated].mean(axis=0)
            moved += cells[control].mean(axis=0)
            states[stimulated] = first + nearest_state(moved, centres)
        contexts += [k] * len(centres)
    return states, np.array(contexts)
