"""Episodes: a measured change is left out, and some of the rest is the evidence."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spaperb._types import FloatArray, IntArray
from spaperb.evidence._measured import N_THIRDS, Evidence
from spaperb.evidence._relations import (
    ContextQuery,
    Description,
    describe,
    state_after,
)

MIN_UNITS = 3
"""Fewer contexts (or changes) are all learned from, and none is held out."""
MIN_THIRDS = 2
"""Thirds of a context that tell the query's cells from those that its change is measured in."""
MAX_QUERY_CELLS = 200
"""Cells of a query whose neighbours are sought in an episode: more change little and cost time."""


class Plan(NamedTuple):
    """An episode before it is described.

    Attributes
    ----------
    query
        What is asked for.
    kept
        Numbers of the changes that it may be predicted from.
    change
        Number of the change that is left out, of a whole context.
    target
        Numbers of the changes that it is measured by: in thirds of the context that have no cell
        in the query, and none in what is kept.
    """

    query: ContextQuery
    kept: IntArray
    change: int
    target: IntArray


class Episode(NamedTuple):
    """A left-out change and what the evidence says of it.

    Attributes
    ----------
    description
        The query, described by the evidence.
    after
        State once it is stimulated, ``(G, n_state)``.
    target, error
        The left-out shift and its standard error, ``(G,)``, measured in other cells.
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
    description = describe(evidence, plan.query, plan.kept, genes)
    changes, of = evidence.changes, plan.target

    def mean(moments: FloatArray) -> FloatArray:
        return moments[of][:, genes].mean(axis=0)

    def error_of_mean(errors: FloatArray) -> FloatArray:
        return np.sqrt((errors[of][:, genes] ** 2).sum(axis=0)) / len(of)

    detection, n = mean(changes.detection), changes.n[of].sum()
    return Episode(
        description,
        state_after(
            description,
            mean(changes.mean),
            detection,
            error_of_mean(changes.mean_error),
            evidence.unit,
        ),
        mean(changes.shift),
        error_of_mean(changes.error),
        float(n / (n + evidence.settings.half_weight)),
        (plan.query.detection[genes] > 0) | (detection > 0),
    )


def leave_out(evidence: Evidence, change: int, with_context: bool) -> Plan | None:
    """Leave out what was measured in a change's context, or its perturbation there.

    ``None`` if nothing of its perturbation, or of its parts, is left.
    """
    changes, whole = evidence.changes, evidence.whole
    is_gone = changes.population[whole] == changes.population[change]
    if not with_context:
        is_gone &= changes.perturbation[whole] == changes.perturbation[change]
    kept = whole[~is_gone]
    asked = int(changes.perturbation[change])
    if not np.isin(changes.perturbation[kept], [asked, *evidence.parts[asked]]).any():
        return None
    return _ask_one_third(evidence, change, kept, evidence.thirds_of(change))


def _ask_one_third(evidence: Evidence, change: int, kept: IntArray, thirds: IntArray) -> Plan:
    """Ask the first third of a change's context, and measure the change in the others.

    Control cells of the query tell of its change by their noise alone if the change is measured
    with them too. So whatever else was measured in the context is that of the first third.
    """
    if len(thirds) < MIN_THIRDS:
        return Plan(ContextQuery.of_change(evidence, change), kept, change, np.array([change]))
    population = int(evidence.changes.population[thirds[0]])
    is_here = evidence.context[kept] == evidence.context[change]
    here = [evidence.thirds_of(s, population) for s in kept[is_here].tolist()]
    kept = np.concatenate([kept[~is_here], *here]).astype(np.int64)
    return Plan(
        ContextQuery.of_change(evidence, change, population), kept, change, np.sort(thirds[1:])
    )


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
    change = int(rng.choice(whole))
    others = whole[whole != change]
    is_here = changes.population[others] == changes.population[change]
    is_same = changes.perturbation[others] == changes.perturbation[change]
    ways = [others[~is_here], others[~is_same], others]
    # Left out with everything measured in its context, the usual question; with every measurement
    # of its perturbation; or alone. The last two need other measurements in that context.
    chances = np.array([1.0, 0.25, 0.5] if is_here.any() else [1.0, 0.0, 0.0])
    chances *= [len(kept) > 0 for kept in ways]
    if not chances.any():
        return None
    kept = _some(evidence, ways[rng.choice(3, p=chances / chances.sum())], rng)
    thirds = rng.permutation(evidence.thirds_of(change))
    plan = _ask_one_third(evidence, change, kept, thirds)
    return plan if len(plan.kept) else None


def _twin(evidence: Evidence, rng: np.random.Generator) -> Plan | None:
    """Ask for one third of a context where another third was measured."""
    whole, context = evidence.whole, evidence.context
    change = int(rng.choice(whole))
    thirds = rng.permutation(evidence.thirds_of(change))
    if len(thirds) < N_THIRDS:
        return None
    of_measured, of_query = evidence.changes.population[thirds[:2]].tolist()
    twins = np.flatnonzero(evidence.changes.population == of_measured)
    is_told = rng.random() < evidence.settings.measured
    asked = of_measured if is_told else of_query
    query = ContextQuery.of_change(evidence, change, asked, is_known=is_told)
    others = whole[context[whole] != context[change]]
    kept = np.concatenate([_some(evidence, others, rng), twins])
    return Plan(query, kept, change, thirds[2:])


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
