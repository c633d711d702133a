"""Episodes: a measured change is left out, and some of the rest is the evidence."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spaperb._types import FloatArray, IntArray
from spaperb.evidence._measured import WHOLE, Evidence
from spaperb.evidence._relations import (
    ContextQuery,
    Description,
    describe,
    state_after,
)

MIN_UNITS = 3
"""Fewer contexts (or changes) are all learned from, and none is held out."""
MAX_QUERY_CELLS = 200
"""Cells of a query whose neighbours are sought in an episode: more change little and cost time."""


class Plan(NamedTuple):
    """An episode before it is described: its query, and numbers of changes kept and to predict."""

    query: ContextQuery
    kept: IntArray
    target: int


class Episode(NamedTuple):
    """A left-out change and what the evidence says of it.

    Attributes
    ----------
    description
        The query, described by the evidence.
    after
        State once it is stimulated, ``(G, n_state)``.
    target, error
        The left-out shift and its standard error, ``(G,)``.
    weight
        Weight of the target, n / (n + 30) of its n cells.
    is_expressed
        Genes that some cell of the context expresses, ``(G,)``.
    """

    description: Description
    after: FloatArray
    target: FloatArray
    error: FloatArray
    weight: float
    is_expressed: npt.NDArray[np.bool_]


def draw(evidence: Evidence, rng: np.random.Generator, n_genes: int | None = None) -> Episode:
    """Draw an episode.

    Parameters
    ----------
    evidence
        What was measured, at least two changes.
    rng
        Source of randomness.
    n_genes
        Number of genes to draw, some twice if there are fewer; ``None`` for all.
    """
    plan = draw_plan(evidence, rng)
    return make_episode(evidence, plan, draw_genes(evidence, rng, n_genes))


def draw_genes(
    evidence: Evidence, rng: np.random.Generator, n_genes: int | None
) -> IntArray | slice:
    """Draw genes, some twice if there are fewer; ``None`` for all."""
    if n_genes is None:
        return slice(None)
    is_short = n_genes > evidence.n_genes
    return np.sort(rng.choice(evidence.n_genes, n_genes, replace=is_short))


def make_episode(evidence: Evidence, plan: Plan, genes: IntArray | slice = slice(None)) -> Episode:
    """Describe what was planned."""
    query, kept, target = plan
    description = describe(evidence, query, kept, genes)
    changes = evidence.changes
    mean, detection, error = (
        moments[target][genes] for moments in (changes.mean, changes.detection, changes.mean_error)
    )
    return Episode(
        description,
        state_after(description, mean, detection, error, evidence.unit),
        changes.shift[target][genes],
        changes.error[target][genes],
        float(changes.n[target] / (changes.n[target] + evidence.settings.half_weight)),
        (query.detection[genes] > 0) | (detection > 0),
    )


def leave_out(evidence: Evidence, target: int, with_context: bool) -> Plan | None:
    """Leave out what was measured in a change's context, or its perturbation there.

    ``None`` if nothing of its perturbation, or of its parts, is left.
    """
    changes, whole = evidence.changes, evidence.whole
    is_gone = changes.population[whole] == changes.population[target]
    if not with_context:
        is_gone &= changes.perturbation[whole] == changes.perturbation[target]
    kept = whole[~is_gone]
    asked = int(changes.perturbation[target])
    if not np.isin(changes.perturbation[kept], [asked, *evidence.parts[asked]]).any():
        return None
    return Plan(ContextQuery.of_change(evidence, target), kept, target)


def draw_plan(evidence: Evidence, rng: np.random.Generator) -> Plan:
    """Draw what is left out and what is kept."""
    plans = [_twin, _left_out] if rng.random() < evidence.settings.twins else [_left_out, _twin]
    for make in plans:
        plan = make(evidence, rng)
        if plan is not None:
            some = rng.permutation(len(plan.query.cells))[:MAX_QUERY_CELLS]
            return plan._replace(query=plan.query._replace(cells=plan.query.cells[some]))
    raise ValueError(
        "There is nothing to learn from: leaving a measured change out leaves no other one. "
        f"Measured changes: {len(evidence.whole)}; at least two contexts are needed, or one with "
        "several cells in each condition."
    )


def _left_out(evidence: Evidence, rng: np.random.Generator) -> Plan | None:
    """Leave a change of a whole context out."""
    changes, whole = evidence.changes, evidence.whole
    target = int(rng.choice(whole))
    others = whole[whole != target]
    is_here = changes.population[others] == changes.population[target]
    is_same = changes.perturbation[others] == changes.perturbation[target]
    ways = [others[~is_here], others[~is_same], others]
    # Left out with everything measured in its context, the usual question; with every measurement
    # of its perturbation; or alone. The last two need other measurements in that context.
    chances = np.array([1.0, 0.25, 0.5] if is_here.any() else [1.0, 0.0, 0.0])
    chances *= [len(kept) > 0 for kept in ways]
    if not chances.any():
        return None
    kept = ways[rng.choice(3, p=chances / chances.sum())]
    return Plan(ContextQuery.of_change(evidence, target), _some(evidence, kept, rng), target)


def _twin(evidence: Evidence, rng: np.random.Generator) -> Plan | None:
    """Ask for one half of a context where the other half was measured."""
    changes, populations = evidence.changes, evidence.populations
    half, context = populations.half[changes.population], populations.context[changes.population]

    def twins_of(s: int) -> IntArray:
        return np.flatnonzero((context == context[s]) & (half == 3 - half[s]))

    candidates = [s for s in np.flatnonzero(half != WHOLE).tolist() if len(twins_of(s))]
    if not candidates:
        return None
    target = int(rng.choice(candidates))
    twins = twins_of(target)
    others = evidence.whole[context[evidence.whole] != context[target]]
    is_measured = rng.random() < evidence.settings.measured
    asked = int(changes.population[twins[0] if is_measured else target])
    query = ContextQuery.of_change(evidence, target, asked, is_known=is_measured)
    kept = np.concatenate([_some(evidence, others, rng), twins])
    return Plan(query, kept, target)


def _some(evidence: Evidence, kept: IntArray, rng: np.random.Generator) -> IntArray:
    """All of the changes, or those of a random number of contexts."""
    if not len(kept) or rng.random() < evidence.settings.all_kept:
        return kept
    populations = evidence.changes.population[kept]
    names = np.unique(populations)
    some = rng.permutation(names)[: rng.integers(1, len(names) + 1)]
    return kept[np.isin(populations, some)]


class Fold(NamedTuple):
    """A part of the evidence to learn from, and the rest, which is predicted.

    Attributes
    ----------
    evidence
        What is left to learn from.
    held_out
        Plans of the held-out changes, to be described by all evidence but their own.
    """

    evidence: Evidence
    held_out: list[Plan]


def make_folds(evidence: Evidence, n_folds: int) -> list[Fold]:
    """Hold each measured change out of one fold, with all that was measured in its context.

    With several perturbations one of them in one context is held out, at all of its doses. A
    change is not held out if no other measurement is of its perturbation or its parts. With fewer
    than three contexts (or changes) to hold out there are no folds: what is left would not be
    worth learning from. Two or more are left in each fold; one fold holds half of them out. Where
    there are more folds than contexts, the last ones are as the first.
    """
    whole = evidence.whole
    is_single = len(np.unique(evidence.changes.perturbation)) == 1
    of_change = evidence.context if is_single else _pairs(evidence)
    plans = {int(s): leave_out(evidence, int(s), is_single) for s in whole}
    units = np.unique([of_change[s] for s, plan in plans.items() if plan is not None])
    if len(units) < MIN_UNITS:
        return []
    units = np.random.default_rng(0).permutation(units)
    # One change that is left teaches nothing: two contexts (or changes) always are.
    n_parts = min(max(n_folds, 3 if len(units) == MIN_UNITS else 2), len(units))
    folds = []
    for i in range(n_folds):
        is_held = np.isin(of_change, units[i % n_parts :: n_parts])
        # At random, so that the first few of many may stand for all.
        of_fold = np.random.default_rng(0).permutation(whole[is_held[whole]]).tolist()
        held_out = [plan for s in of_fold if (plan := plans[s]) is not None]
        folds.append(Fold(evidence.keep(~is_held), held_out))
    return folds


def _pairs(evidence: Evidence) -> IntArray:
    """Number of the context and perturbation of each change, ``(S,)``."""
    return evidence.context * len(evidence.parts) + evidence.changes.perturbation
