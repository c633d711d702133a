"""Episodes: a measured change is left out, and some of the rest is the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
MAX_PLANS = 100
"""Held-out changes of a fold at most: each plan lists all changes that it keeps."""
MIN_THIRDS = 2
"""Thirds that must have a change: one for the query, one to measure it in."""
N_TRIES = 20
"""Draws that may fail: with few cells the drawn third may hold no other change."""
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
        in the query, and none in what is kept. The change itself if fewer than two thirds have it.
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
        The left-out shift and its standard error, ``(G,)``: the mean over the target's changes,
        weighted by their cells.
    weight
        Weight of the target, n / (n + 30) of its n cells.
    is_expressed
        Genes that some cell of the query or of the target expresses, ``(G,)``.
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
        What was measured: at least two changes, or one in three thirds of its context.
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
    """Draw genes that some cells show, some twice if there are fewer; ``None`` for all genes."""
    if n_genes is None:
        return slice(None)
    shown = evidence.shown
    return np.sort(rng.choice(shown, n_genes, replace=n_genes > len(shown)))


def make_episode(evidence: Evidence, plan: Plan, genes: IntArray | slice = slice(None)) -> Episode:
    """Describe what was planned."""
    description = describe(evidence, plan.query, plan.kept, genes)
    changes, of = evidence.changes, plan.target
    n = changes.n[of].sum()
    weights = changes.n[of] / n

    def mean(moments: FloatArray) -> FloatArray:
        return weights @ moments[of][:, genes]

    def error_of_mean(errors: FloatArray) -> FloatArray:
        return np.sqrt(weights**2 @ errors[of][:, genes] ** 2)

    control = evidence.populations.detection[changes.population[of]][:, genes]
    detection = mean(changes.detection)
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
        (plan.query.detection[genes] > 0) | (detection > 0) | (control > 0).any(axis=0),
    )


def leave_out(evidence: Evidence, change: int, with_context: bool) -> Plan | None:
    """Leave out what was measured in a change's context, or its perturbation there.

    ``None`` if nothing of its perturbation, or of its parts, is left, and no features tell of it.
    """
    changes, whole = evidence.changes, evidence.whole
    is_gone = changes.population[whole] == changes.population[change]
    if not with_context:
        is_gone &= changes.perturbation[whole] == changes.perturbation[change]
    asked = int(changes.perturbation[change])
    targets = [asked, *evidence.parts[asked]]
    for plan in _of_thirds(evidence, change, whole[~is_gone], range(N_THIRDS)):
        if np.isin(changes.perturbation[plan.kept], targets).any() or (
            len(plan.kept) and evidence.has_features(asked)
        ):
            return plan
    return None


def forget_perturbation(evidence: Evidence, plan: Plan) -> Plan | None:
    """Leave out what was measured of a plan's perturbation, and of combinations with it.

    ``None`` if no features tell of it.
    """
    perturbation = evidence.changes.perturbation
    asked = int(perturbation[plan.change])
    others = [p for p, parts in enumerate(evidence.parts) if p != asked and asked not in parts]
    kept = plan.kept[np.isin(perturbation[plan.kept], others)]
    return plan._replace(kept=kept) if len(kept) and evidence.has_features(asked) else None


def is_told(evidence: Evidence, plan: Plan) -> bool:
    """Whether features alone tell of a plan's perturbation."""
    perturbation = evidence.changes.perturbation
    asked = int(perturbation[plan.change])
    return not np.isin(perturbation[plan.kept], [asked, *evidence.parts[asked]]).any()


def _of_thirds(
    evidence: Evidence, change: int, kept: IntArray, order: Iterable[int]
) -> Iterator[Plan]:
    """Ask one third of a change's context, each in turn, and measure the change in the others.

    If the change were measured against the query's own control cells, their noise would tell of
    it. For the same reason other changes of the context are those of the query's third. A change
    that fewer than two thirds have is asked for as a whole.
    """
    thirds, changes = evidence.thirds, evidence.changes
    if (thirds[change] >= 0).sum() < MIN_THIRDS:
        yield Plan(ContextQuery.of_change(evidence, change), kept, change, np.array([change]))
        return
    is_here = evidence.context[kept] == evidence.context[change]
    for i in order:
        asked, others = thirds[change, i], np.delete(thirds[change], i)
        here = thirds[kept[is_here], i]
        if asked >= 0:
            yield Plan(
                ContextQuery.of_change(evidence, change, int(changes.population[asked])),
                np.concatenate([kept[~is_here], here[here >= 0]]),
                change,
                others[others >= 0],
            )


def draw_plan(evidence: Evidence, rng: np.random.Generator) -> Plan:
    """Draw what is left out and what is kept."""
    for _ in range(N_TRIES if len(evidence.whole) else 0):
        is_twin = rng.random() < evidence.settings.twins
        for make in [_twin, _left_out] if is_twin else [_left_out, _twin]:
            plan = make(evidence, rng)
            if plan is not None:
                some = rng.permutation(len(plan.query.cells))[:MAX_QUERY_CELLS]
                return plan._replace(query=plan.query._replace(cells=plan.query.cells[some]))
    whole = evidence.whole
    if len(whole) > 1:
        # No third of a context tells of another change, so one is asked for as a whole.
        change = int(rng.choice(whole))
        query = ContextQuery.of_change(evidence, change)
        return Plan(query, whole[whole != change], change, np.array([change]))
    raise ValueError(
        "There is nothing to learn from: leaving a measured change out leaves no other one. "
        f"Measured changes: {len(evidence.whole)}; at least two contexts are needed, or one with "
        "several cells in each condition."
    )


def _left_out(evidence: Evidence, rng: np.random.Generator) -> Plan | None:
    """Leave a change of a whole context out."""
    changes, whole = evidence.changes, evidence.whole
    change = int(rng.choice(_with_thirds(evidence, MIN_THIRDS)))
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
    plans = _of_thirds(evidence, change, kept, rng.permutation(N_THIRDS))
    return next((plan for plan in plans if len(plan.kept)), None)


def _twin(evidence: Evidence, rng: np.random.Generator) -> Plan | None:
    """Ask for one third of a context where another third was measured."""
    whole, context = evidence.whole, evidence.context
    candidates = _with_thirds(evidence, N_THIRDS)
    if (evidence.thirds[candidates] < 0).any():
        return None
    change = int(rng.choice(candidates))
    measured, of_query, target = rng.permutation(evidence.thirds[change]).tolist()
    populations = evidence.changes.population
    twins = np.flatnonzero(populations == populations[measured])
    is_known = rng.random() < evidence.settings.measured
    asked = int(populations[measured if is_known else of_query])
    query = ContextQuery.of_change(evidence, change, asked, is_known=is_known)
    others = whole[context[whole] != context[change]]
    kept = np.concatenate([_some(evidence, others, rng), twins])
    return Plan(query, kept, change, np.array([target]))


def _with_thirds(evidence: Evidence, n: int) -> IntArray:
    """Changes of whole contexts that at least so many thirds have; all if there are none."""
    whole = evidence.whole
    has_thirds = (evidence.thirds[whole] >= 0).sum(axis=1) >= n
    return whole[has_thirds] if has_thirds.any() else whole


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
        Plans of the held-out changes, some of them if they are very many. They are described by
        all evidence but their own, and asked of a third of their context's control cells. Those
        that fewer than two thirds have are left out where there are others.
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
    return [
        Fold(evidence.keep(~is_held), plans) for is_held, plans in _held_out(evidence, n_folds)
    ]


def plan_held_out(evidence: Evidence, n_folds: int) -> list[list[Plan]]:
    """Plans of the held-out changes of each of :func:`make_folds`' folds."""
    return [plans for _, plans in _held_out(evidence, n_folds)]


def _held_out(
    evidence: Evidence, n_folds: int
) -> Iterator[tuple[npt.NDArray[np.bool_], list[Plan]]]:
    """Which changes each fold holds out, ``(S,)``, and plans of them."""
    whole, thirds = evidence.whole, evidence.thirds
    is_single = len(np.unique(evidence.changes.perturbation)) == 1
    of_change = evidence.context if is_single else _pairs(evidence)
    has_plan = [leave_out(evidence, s, is_single) is not None for s in whole.tolist()]
    known = whole[np.array(has_plan, dtype=bool)]
    units = np.unique(of_change[known])
    if len(units) < MIN_UNITS:
        return
    units = np.random.default_rng(0).permutation(units)
    # One change that is left teaches nothing: two contexts (or changes) always are.
    n_parts = min(max(n_folds, 3 if len(units) == MIN_UNITS else 2), len(units))
    for i in range(n_folds):
        is_held = np.isin(of_change, units[i % n_parts :: n_parts])
        # At random, so that the first few of many may stand for all.
        of_fold = np.random.default_rng(0).permutation(known[is_held[known]])
        has_thirds = (thirds[of_fold] >= 0).sum(axis=1) >= MIN_THIRDS
        of_fold = of_fold[has_thirds] if has_thirds.any() else of_fold
        plans = (leave_out(evidence, s, is_single) for s in of_fold[:MAX_PLANS].tolist())
        yield is_held, [plan for plan in plans if plan is not None]


def _pairs(evidence: Evidence) -> IntArray:
    """Number of the context and perturbation of each change, ``(S,)``."""
    return evidence.context * len(evidence.parts) + evidence.changes.perturbation
