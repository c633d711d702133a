"""What to measure next: the changes that would leave the others nearest to a measured one.

What is measured of context l and perturbation q tells of context k and perturbation p to within a
squared error of about::

    cost = slope d(k, l)^2 + A(p, q)

where d is the distance of mean control expression, and slope and A are how far measured changes
differ that share their perturbation, or their context. Each step takes the change that lowers the
sum over all others of the cost of the nearest measured one most (the facility location problem,
whose greedy solution is near the best: Nemhauser, Wolsey and Fisher 1978).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import euclidean_distances

from spaperb._types import FloatArray, IntArray
from spaperb.evidence._measured import Evidence, distance
from spaperb.populations import Pseudobulk

N_PAIRS = 2000
"""Pairs of measured changes that costs are learned from, at random."""
BLOCK = 1_000_000
"""Costs that are in memory at a time."""
LEAST = 1e-3
"""Changes never differ by less, in squares of their size, whatever noise hides."""
TINY = 1e-12


class Choice(NamedTuple):
    """A change to measure, and the share of the costs so far that this takes away."""

    context: int
    perturbation: int
    gain: float


def suggest(
    evidence: Evidence,
    contexts: Sequence[Pseudobulk],
    numbers: Sequence[int | None],
    candidates: IntArray,
    n: int,
) -> list[Choice]:
    """Choose what to measure, the best first.

    Parameters
    ----------
    evidence
        What was measured.
    contexts
        Pseudobulks of the control cells of the contexts that may be measured, ``K`` of them.
    numbers
        Their numbers in the evidence, ``None`` for new ones.
    candidates
        What may be measured, and is asked for: numbers of the context and the perturbation,
        ``(C, 2)``.
    n
        How many to choose at most.
    """
    changes, whole = evidence.changes, evidence.whole
    k, p = candidates.T
    populations, place = np.unique(changes.population[whole], return_inverse=True)
    known = [evidence.populations.pseudobulk(q) for q in populations]
    # A context is no distance from itself, though the noise in that of two populations is taken
    # off its square only on average.
    to_measured = np.array([[distance(a, b) ** 2 for b in known] for a in contexts])
    to_measured[np.array([[number == q for q in populations] for number in numbers])] = 0
    among = np.array([[distance(a, b) ** 2 for b in contexts] for a in contexts])
    np.fill_diagonal(among, 0)

    slope, between = _costs(evidence, float(to_measured.mean()))
    measured, among = slope * to_measured, slope * among
    now = np.full(len(candidates), np.inf)
    for at, q in zip(place, changes.perturbation[whole], strict=True):
        now = np.minimum(now, measured[k, at] + between[p, q])
    total, chosen = max(now.sum(), TINY), []
    blocks = np.array_split(np.arange(len(k)), max(1, len(k) ** 2 // BLOCK))
    for _ in range(min(n, len(candidates))):
        gains = np.concatenate(
            [
                np.maximum(now - among[k[c, None], k] - between[p[c, None], p], 0).sum(axis=1)
                for c in blocks
            ]
        )
        best = int(gains.argmax())
        chosen.append(Choice(int(k[best]), int(p[best]), float(gains[best] / total)))
        now = np.minimum(now, among[k, k[best]] + between[p, p[best]])
    return chosen


def _costs(evidence: Evidence, usual: float) -> tuple[float, FloatArray]:
    """How far changes differ by a unit of squared distance; and by their perturbations, (P, P).

    Without two contexts of one perturbation they are taken to differ by their size at the usual
    squared distance.
    """
    changes, whole = evidence.changes, evidence.whole
    size = max(float((changes.shift[whole] ** 2).sum(axis=1).mean()), TINY)
    a, b = whole[np.random.default_rng(0).integers(len(whole), size=(2, N_PAIRS))]
    perturbation, context = changes.perturbation, evidence.context
    is_here = context[a] == context[b]
    noise = (changes.error[a] ** 2 + changes.error[b] ** 2).sum(axis=1)
    # Changes of one context share its control cells, whose noise is not in their difference.
    of_control = (evidence.populations.error[changes.population[a]] ** 2).sum(axis=1)
    noise -= 2 * is_here * of_control
    differ = ((changes.shift[a] - changes.shift[b]) ** 2).sum(axis=1) - noise
    is_same = perturbation[a] == perturbation[b]
    elsewhere, others = np.flatnonzero(is_same & ~is_here), np.flatnonzero(is_here & ~is_same)
    bulk = evidence.populations.pseudobulk
    apart = sum(distance(bulk(context[a[i]]), bulk(context[b[i]])) ** 2 for i in elsewhere)
    slope = size / max(usual, TINY)
    if apart > 0:
        slope = max(float(differ[elsewhere].sum()), LEAST * size * len(elsewhere)) / apart
    differs = differ[others].mean() if len(others) else size
    between = np.full((len(evidence.parts),) * 2, max(float(differs), LEAST * size))
    if evidence.features is not None and evidence.features.skill > 0:
        near = euclidean_distances(np.nan_to_num(evidence.features.values), squared=True)
        known = np.isfinite(evidence.features.values).all(axis=1)
        is_known = np.logical_and.outer(known, known)
        mean = near[is_known].mean()
        between *= np.where(is_known, np.minimum(near / mean, 1), 1)
    np.fill_diagonal(between, 0)
    return slope, between
