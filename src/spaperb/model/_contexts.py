"""From contexts to cells: the change that each context of a query gets, and its cells.

A context of the query is described by its own control cells and by what training measured; the
networks say its change and the scale of its error. The control cells of a known name count as that
context as far as they are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtri

from spaperb._messages import format_list, warn
from spaperb._types import FloatArray, IntArray
from spaperb.cells import CellMaker, Detection, PopulationChange, Survey
from spaperb.data import Query, Target, match_labels
from spaperb.evidence import (
    CLOSE,
    MAX_STATE_CELLS,
    ContextQuery,
    Evidence,
    Plan,
    agreement,
    describe_related,
    dose_shares,
    find_states,
    forget_perturbation,
    is_told,
    leave_out,
    make_episode,
    nearest_state,
    plan_held_out,
    relate,
    shrunk,
)
from spaperb.model._intervals import Intervals
from spaperb.module import HeldOut, InContextModule
from spaperb.populations import Pseudobulk

MAX_CELLS = 1000
"""Control cells of a context that its nearest ones are sought for."""
MAX_HELD_OUT = 20
"""Held-out changes of each network that are predicted."""


class ControlCells(NamedTuple):
    """Control cells of a context whose change is asked for.

    Attributes
    ----------
    pseudobulk
        Pseudobulk of its control cells.
    cells
        Their components, ``(n, n_components)``.
    number
        Number of the training context of its name, ``None`` for a new one.
    is_control
        Whether these are control cells, rather than all that there are.
    """

    pseudobulk: Pseudobulk
    cells: FloatArray
    number: int | None
    is_control: bool


class ContextChange(NamedTuple):
    """Change of a context.

    Attributes
    ----------
    mean, sigma
        Change of the mean, and the scale of its error, ``(G,)``.
    scale
        c, the scale of each gene's change, ``(G,)``.
    control
        Pseudobulk of its control cells.
    references, weights
        Stimulated populations that it resembles, and how much.
    distance
        How far it is from contexts in which the perturbation was measured, over the largest such
        distance of a training context; 0 where it was measured in the context itself, NaN with
        fewer than three contexts to compare with.
    is_control
        Whether it has control cells.
    likeness
        How far its control cells are those of the training context of its name, in [0, 1].
    intervals
        How far such changes were off that were held out.
    agreed, spread
        Square of the mean of the measured changes that it rests on, and mean of their squares,
        ``(G,)``.
    """

    mean: FloatArray
    sigma: FloatArray
    scale: FloatArray
    control: Pseudobulk
    references: list[Pseudobulk]
    weights: FloatArray
    distance: float
    is_control: bool
    likeness: float
    intervals: Intervals
    agreed: FloatArray
    spread: FloatArray

    def half_width(self, confidence_level: float) -> FloatArray:
        """Half of the width of the interval of each gene's change, ``(G,)``."""
        half_width = self.intervals.half_width(
            self.sigma, self.scale, self.control, self.references, self.weights, confidence_level
        )
        return max(1.0, self.distance) * half_width

    @property
    def detection(self) -> Detection:
        """What the change does to zeros, and to the mean of expressing cells."""
        return Detection.of(self.references, self.control, self.mean, self.weights)


@dataclass
class ContextPredictor:
    """Changes of the contexts of a query.

    Attributes
    ----------
    evidence
        What was measured in training.
    module
        The trained networks.
    intervals
        How far held-out changes were off.
    intervals_unseen_context
        How far they were off where nothing was known of their contexts.
    intervals_unseen_perturbation
        How far they were off where features alone told of their perturbations.
    largest_distance
        Largest distance of a training context from the others.
    states
        What was measured of the states of the contexts; ``None`` until it is asked for.
    """

    evidence: Evidence
    module: InContextModule
    intervals: Intervals
    intervals_unseen_context: Intervals
    intervals_unseen_perturbation: Intervals
    largest_distance: float
    states: Evidence | None = None

    def __post_init__(self) -> None:
        self._told: set[Any] = set()

    @classmethod
    def learn(cls, evidence: Evidence, module: InContextModule) -> ContextPredictor:
        """Learn from changes that were held out.

        The share of training, and how large errors are.
        """

        def hold_out(f: int, plan: Plan) -> HeldOut:
            episode = make_episode(evidence, plan)
            trained = module.predict_trained(episode.description, f)
            return HeldOut(episode, trained, module.predict_pretrained(episode.description))

        held_out, unseen, told = [], [], []
        for f, plans in enumerate(plan_held_out(evidence, len(module.networks))):
            for plan in plans[:MAX_HELD_OUT]:
                if is_told(evidence, plan):
                    told.append(hold_out(f, plan))
                    continue
                held_out.append(hold_out(f, plan))
                # Other perturbations in the context help, and a query may have none.
                without = leave_out(evidence, plan.change, with_context=True)
                if without is None or len(without.kept) == len(plan.kept):
                    unseen.append(held_out[-1])
                else:
                    unseen.append(hold_out(f, without))
                by_features = forget_perturbation(evidence, plan)
                if by_features is not None:
                    told.append(hold_out(f, by_features))
        # In a screen of one context features alone tell of what is left out.
        module.choose_share(held_out or told, evidence.settings.pull)
        evidence = evidence.without_thirds().compact()
        return cls(
            evidence,
            module,
            Intervals.of(held_out, module),
            Intervals.of(unseen, module),
            Intervals.of(told, module),
            evidence.largest_distance(),
        )

    def change(
        self, asked: ControlCells, target: Target, v_delta: FloatArray | None = None
    ) -> ContextChange:
        """Change of a context.

        Parameters
        ----------
        asked
            Its control cells.
        target
            The perturbation.
        v_delta
            Draws of V_delta, ``(n_draws, G)``, whose mean change is taken; ``None`` for the mean
            of all.
        """
        change = (self._attended if self._is_learned(target) else self._added)(asked, target)
        if v_delta is None:
            return change
        drawn = change.mean + change.sigma * ndtri(v_delta).mean(axis=0)
        # What nothing shows stays silent.
        return change._replace(mean=np.where(change.mean == 0, 0.0, drawn))

    def _attended(self, asked: ControlCells, target: Target) -> ContextChange:
        """Change that the networks predict, attending over the evidence."""
        pseudobulk, cells, number, is_control = asked
        evidence = self.evidence
        likeness = 1.0 if number is None else evidence.likeness(pseudobulk, number)
        doses, shares, rest = self._doses(target)
        features = target.features
        if features is not None and evidence.features is not None:
            features = evidence.features.standardised(features)
        query = ContextQuery.of(
            evidence,
            pseudobulk,
            cells,
            target.parts,
            target.number,
            context=number,
            likeness=likeness,
            features=features,
        )
        queries = [query._replace(dose=dose) for dose in doses.tolist()]
        relations = [relate(evidence, query, evidence.whole) for query in queries]
        described = [
            describe_related(evidence, query, relation)
            for query, relation in zip(queries, relations, strict=True)
        ]
        predicted = [self.module.predict(description) for description in described]
        means = [
            self._near_measured(p.mean, query) for p, query in zip(predicted, queries, strict=True)
        ]
        mean = shares @ np.array(means)
        sigma = shares @ np.array([p.sigma for p in predicted])
        # A gene that no control cell expresses and no piece of evidence shifts stays silent.
        is_shown = pseudobulk.mean != 0
        for description in described:
            is_shown = is_shown | description.shifts.any(axis=0)
        compared = [
            agreement(description, relation.perturbation)
            for description, relation in zip(described, relations, strict=True)
        ]
        agreed, spread = np.tensordot(shares, compared, 1)
        prior = np.zeros(len(evidence.changes.population))
        for share, relation in zip(shares, relations, strict=True):
            prior[relation.kept] += share * (relation.shares.T @ np.exp(relation.log_prior))
        references, weights = self._references(prior, target)
        return ContextChange(
            mean=rest * np.where(is_shown, mean, 0.0),
            sigma=rest * sigma,
            scale=shares @ np.array([description.scale for description in described]),
            control=pseudobulk,
            references=references,
            weights=weights,
            distance=self._distance(asked, target, likeness),
            is_control=is_control,
            likeness=likeness,
            intervals=self._intervals_of(target, number, likeness),
            agreed=agreed,
            spread=spread,
        )

    def _near_measured(self, mean: FloatArray, query: ContextQuery) -> FloatArray:
        """Change that stays near what was measured of it in the context itself.

        The networks shrink noise, and with it what is unlike other contexts and yet sure. So the
        measurement is shrunk towards what they say as James and Stein do, and no gene by more than
        a few standard errors (limited translation, Efron and Morris 1972). Cells that are like
        the context's in part leave as much more room. See ``benchmarks/accuracy/measured.py``.
        """
        changes = self.evidence.changes
        is_own = self.evidence.context == query.context
        is_own &= changes.perturbation == query.perturbation
        is_own &= (changes.dose == query.dose) | (np.isnan(changes.dose) & np.isnan(query.dose))
        if not is_own.any() or query.likeness == 0:
            return mean
        (own,) = np.flatnonzero(is_own)
        return shrunk(
            changes.shift[own].astype(np.float64),
            changes.error[own].astype(np.float64) / query.likeness,
            mean,
            self.evidence.settings.max_errors,
        )

    def _added(self, asked: ControlCells, target: Target) -> ContextChange:
        """Change of a combination where none was measured: the sum of its parts' changes.

        Networks that saw no example make them too small (``benchmarks/accuracy/combinations.py``).
        """
        parts = [
            self._attended(asked, Target(target.name, p, (p,), target.dose)) for p in target.parts
        ]
        return parts[0]._replace(
            mean=np.sum([part.mean for part in parts], axis=0),
            sigma=np.sqrt(np.sum([part.sigma**2 for part in parts], axis=0)),
            scale=np.sum([part.scale for part in parts], axis=0),
            references=[pseudobulk for part in parts for pseudobulk in part.references],
            weights=np.concatenate([part.weights for part in parts]) / len(parts),
            distance=self._distance(asked, target, parts[0].likeness),
            agreed=np.sum([part.agreed for part in parts], axis=0),
            spread=np.sum([part.spread for part in parts], axis=0),
        )

    def _intervals_of(self, target: Target, number: int | None, likeness: float) -> Intervals:
        """Intervals for contexts with, or without, a measurement of their own that counts."""
        if target.features is not None:
            return self.intervals_unseen_perturbation
        is_seen = number is not None and likeness > 0 and (self.evidence.context == number).any()
        return self.intervals if is_seen else self.intervals_unseen_context

    def _doses(self, target: Target) -> tuple[FloatArray, FloatArray, float]:
        """Measured doses to ask for, their shares, and what is left of the change below them.

        A dose between two has a mean of their changes, by its logarithm; above the highest the
        change stays, and below the lowest it falls to nothing in proportion.
        """
        if target.dose is None:
            return np.array([np.nan]), np.ones(1), 1.0
        changes = self.evidence.changes
        of = target.parts if target.number is None else (target.number,)
        is_asked = np.isin(changes.perturbation, of) | (target.features is not None)
        levels = np.unique(changes.dose[is_asked & (changes.dose > 0)])
        if not len(levels):
            # Only ever measured at a dose of 0.
            return np.array([np.nan]), np.ones(1), float(target.dose > 0)
        same = np.isclose(levels, target.dose, rtol=CLOSE, atol=0)
        if same.any():
            return levels[same][:1], np.ones(1), 1.0
        shares = dose_shares(levels, target.dose)
        return levels[shares > 0], shares[shares > 0], min(target.dose / levels[0], 1.0)

    def _references(
        self, prior: FloatArray, target: Target
    ) -> tuple[list[Pseudobulk], FloatArray]:
        """Stimulated populations that tell of zeros: of the perturbation, or of its parts."""
        perturbation = self.evidence.changes.perturbation
        is_used = prior > 0
        is_target = is_used & (perturbation == target.number)
        if not is_target.any():
            is_target = is_used & (
                np.isin(perturbation, target.parts) | (target.features is not None)
            )
        some = np.flatnonzero(is_target)
        best = some[np.argsort(-prior[some], kind="stable")]
        best = best[: self.evidence.settings.max_references]
        pseudobulks = [self.evidence.changes.pseudobulk(s) for s in best]
        return pseudobulks, prior[best] / prior[best].sum()

    def _distance(self, asked: ControlCells, target: Target, likeness: float) -> float:
        pseudobulk, cells, number, _ = asked
        if target.features is not None:
            return self._distance_of_features(asked, target.features, likeness)

        def of(perturbation: int) -> float:
            changes = self.evidence.changes
            here = (self.evidence.context == number) & (changes.perturbation == perturbation)
            if number is None or not here.any():
                return self.evidence.distance(pseudobulk, cells, perturbation, number)
            if likeness == 1:
                return 0.0
            return (1 - likeness) * self.evidence.distance(pseudobulk, cells, perturbation)

        perturbations = target.parts if target.number is None else (target.number,)
        distance = max(map(of, perturbations))
        return distance / self.largest_distance if distance else 0.0

    def _distance_of_features(
        self, asked: ControlCells, features: FloatArray, likeness: float
    ) -> float:
        """Distance of a context from those with any measurement, or of features: the larger."""
        evidence = self.evidence
        if evidence.features is None:
            return np.nan
        pseudobulk, cells, number, _ = asked
        distance = 0.0
        if number is None or not (evidence.context == number).any() or likeness < 1:
            distance = evidence.distance(pseudobulk, cells, None) / self.largest_distance
        if number is not None and (evidence.context == number).any():
            distance *= 1 - likeness
        of_features = evidence.features.distance(evidence.features.standardised(features))
        return max(distance, of_features)

    def changes(
        self, survey: Survey, target: Target, v_delta: FloatArray | None = None
    ) -> dict[int, ContextChange]:
        """Change of each context of a query.

        Parameters
        ----------
        survey
            Its cells, in the populations that :func:`populations_of` tells apart.
        target
            The perturbation.
        v_delta
            Draws of V_delta, as for :meth:`change`.
        """
        self._warn_of_combination(target)
        self._warn_of_features(target)
        changes = {}
        for code in sorted({p // 2 for p in survey.pseudobulks}):
            number = code if code < len(self.evidence.names) else None
            asked = self.control_cells(survey, code, number)
            changes[code] = self.change(asked, target, v_delta)
        self._warn_of(changes, survey.query.context_names, target)
        return changes

    def effects(self, n_perturbations: int, dose: float | None) -> FloatArray:
        """Mean measured change of each perturbation in components, ``(P, n_components)``.

        Parameters
        ----------
        n_perturbations
            Number of perturbations, P.
        dose
            The measured dose that is nearest to it is taken; ``None`` for the highest.
        """
        evidence, changes = self.evidence, self.evidence.changes
        rows = []
        for p in range(n_perturbations):
            of = evidence.whole[changes.perturbation[evidence.whole] == p]
            doses = changes.dose[of]
            if np.isfinite(doses).all():
                asked = doses.max() if dose is None else dose
                of = of[np.abs(doses - asked) == np.abs(doses - asked).min()]
            rows.append(changes.shift[of].mean(axis=0) @ evidence.components.T)
        return np.array(rows)

    def maker(
        self,
        query: Query,
        rows: IntArray,
        target: Target,
        v_delta: FloatArray | None = None,
        by_cell: bool = False,
        **how: Any,
    ) -> CellMaker:
        """Find the change of each context, for its cells.

        Parameters
        ----------
        query
            The cells, with their contexts (:meth:`assign`).
        rows
            Rows to predict.
        target
            The perturbation.
        v_delta
            Draws of V_delta, as for :meth:`change`.
        by_cell
            Whether cells are changed by their state, rather than all of a context alike.
        **how
            Further arguments of :class:`~spaperb.cells.CellMaker`: what becomes of a cell.
        """
        survey = Survey.of(query, populations_of(query, rows))
        changes = self.changes(survey, target, v_delta)
        if by_cell:
            survey, changes = self._by_state(survey, changes, rows, target)
        of_populations = {
            p: PopulationChange(c.mean, c.references, c.weights)
            for p in survey.pseudobulks
            for c in [changes[p // 2]]
        }
        return CellMaker(survey, of_populations, **how)

    def _by_state(
        self,
        survey: Survey,
        changes: dict[int, ContextChange],
        rows: IntArray,
        target: Target,
    ) -> tuple[Survey, dict[int, ContextChange]]:
        """Split contexts into states, and give each its own change.

        The mean change over the control cells of a context stays that of the context.
        """
        query, contexts = self._find_states(survey)
        if self.states is None or len(contexts) == len(changes):
            n = self.evidence.settings.state_cells
            largest = max(pseudobulk.n for pseudobulk in survey.pseudobulks.values())
            raise ValueError(
                f"`by_cell=True` needs at least {2 * n} control cells of a type, two "
                f"neighbourhoods of {n}; the largest type here has {largest}. Leave `by_cell` "
                "out, or predict more cells."
            )
        of_states = replace(self, evidence=self.states, states=None)
        survey = Survey.of(query, populations_of(query, rows))
        by_state = {
            state: of_states.change(of_states.control_cells(survey, state, None), target)
            for state in sorted({p // 2 for p in survey.pseudobulks})
        }
        for code, change in changes.items():
            here = [state for state in by_state if contexts[state] == code]
            if len(here) == 1:
                by_state[here[0]] = change
                continue
            sizes = np.array([by_state[state].control.n for state in here])
            kept = keep_mean(
                np.array([by_state[state].mean for state in here]),
                np.array([by_state[state].control.mean for state in here]),
                sizes / sizes.sum(),
                change.mean,
                self.evidence.has_mean,
            )
            for state, mean in zip(here, kept, strict=True):
                by_state[state] = by_state[state]._replace(mean=mean)
        return survey, by_state

    def _find_states(self, survey: Survey) -> tuple[Query, IntArray]:
        """Give every cell of a query its state for a context; and the context of each state."""
        query, populations, evidence = survey.query, survey.populations, self.evidence
        states: IntArray = np.full(len(populations), -1)
        contexts: list[int] = []
        for code in sorted({p // 2 for p in survey.pseudobulks}):
            population = control_population(survey, code)
            some = some_of(np.flatnonzero(populations == population), MAX_STATE_CELLS)
            centres = find_states(evidence.project(query.rows(some)), evidence.settings)
            of_context = np.flatnonzero(populations // 2 == code)
            for start in range(0, len(of_context), query.chunk_rows):
                chunk = of_context[start : start + query.chunk_rows]
                nearest = nearest_state(evidence.project(query.rows(chunk)), centres)
                states[chunk] = len(contexts) + nearest
            contexts += [code] * len(centres)
        return query._replace(context=states), np.array(contexts)

    def control_cells(self, survey: Survey, code: int, number: int | None) -> ControlCells:
        """Control cells of a context of a query, or all of its cells if none is known to be one.

        Parameters
        ----------
        survey
            The cells of the query.
        code
            Number of the context in the query.
        number
            Number of the training context of its name.
        """
        population = control_population(survey, code)
        some = some_of(np.flatnonzero(survey.populations == population), MAX_CELLS)
        components = self.evidence.project(survey.query.rows(some))
        return ControlCells(
            survey.pseudobulks[population], components, number, population % 2 == 0
        )

    def assign(self, query: Query) -> Query:
        """Find the context of every cell, by its label or its nearest control cells.

        Labels are those of training if they are spelled alike, whatever their type.
        """
        codes, names = np.full(query.x.shape[0], -1), list(self.evidence.names)
        if query.labels is not None:
            labels = pd.Series(query.labels, dtype=object)
            found = list(labels.dropna().unique())
            numbers = match_labels(found, names)
            new = [label for label in found if label not in numbers]
            self._tell_of_new(new, found)
            numbers |= {label: len(names) + i for i, label in enumerate(new)}
            names += new
            codes = labels.map(numbers).fillna(-1).to_numpy(dtype=np.int64, copy=True)
        unknown = np.flatnonzero(codes < 0)
        for start in range(0, len(unknown), MAX_CELLS):
            some = unknown[start : start + MAX_CELLS]
            codes[some] = self.evidence.assign(self.evidence.project(query.rows(some)))
        return query._replace(context=codes, context_names=names)

    def _tell_of_new(self, new: list[Any], found: list[Any]) -> None:
        """Name cell types that the model does not know, each once, and say if it knows none."""
        fresh = [label for label in new if label not in self._told]
        self._told.update(fresh)
        if fresh and len(new) == len(found):
            warn(
                "The model knows none of the cell types of these cells, so each is predicted as a "
                f"new type, from its control cells: {format_list(new)}. Types of training: "
                f"{format_list(self.evidence.names)}. If they are the same under other names, "
                "rename them."
            )
        elif fresh:
            warn(
                "These cell types are new to the model and are predicted from their own control "
                f"cells: {format_list(fresh)}."
            )

    def _is_learned(self, target: Target) -> bool:
        """Whether it was measured, or any combination was."""
        if target.number is not None or target.features is not None:
            return True
        return any(len(of) > 1 for of in self.evidence.parts)

    def _warn_of_combination(self, target: Target) -> None:
        """Warn of a combination where none was measured to learn from how parts combine."""
        if not self._is_learned(target):
            warn(
                f"{target.name} was never measured, and neither was any other combination: the "
                "changes of its parts are added up, so trust it, and its intervals, less than "
                "those of measured perturbations."
            )

    def _warn_of_features(self, target: Target) -> None:
        """Warn where features do not tell one perturbation from another."""
        features = self.evidence.features
        if target.features is not None and features is not None and features.skill == 0:
            warn(
                f"{target.name} was never measured, and features do not tell how the measured "
                "perturbations differ (each was left out and predicted from the others). So it is "
                "predicted as their mean."
            )

    def _warn_of(
        self, changes: dict[int, ContextChange], names: Sequence[Any], target: Target
    ) -> None:
        """Warn of contexts unlike training, or unlike the training cells of their name."""
        if any(change.is_control for change in changes.values()) and (
            without := [names[code] for code, c in changes.items() if not c.is_control]
        ):
            warn(
                "These cell types have no control cells here, so the change is added to what "
                f"their cells are, as if they were control cells: {format_list(without)}."
            )
        far = [
            f"{names[code]} ({change.distance:.2f})"
            for code, change in changes.items()
            if change.distance > self.evidence.settings.high_distance
        ]
        if far and target.features is not None:
            warn(
                f"The features of {target.name}, or the control cells of these cell types, are "
                "farther from those of training than any of those is from the others, so do not "
                f"trust their prediction (distance, at most 1 in training): {format_list(far)}."
            )
        elif far:
            warn(
                "The control cells of these cell types are farther from training contexts in "
                "which the perturbation was measured than any of those is from the others, so do "
                "not trust their prediction (distance, at most 1 in training): "
                f"{format_list(far)}."
            )
        unlike = [
            f"{names[code]} ({change.likeness:.0%})"
            for code, change in changes.items()
            if change.likeness < self.evidence.settings.low_likeness
        ]
        if unlike:
            warn(
                "The control cells of these cell types are unlike the training cells of the same "
                "name, by more than sampling noise, so what was measured there counts only in "
                "part (how far they are alike; 0 % is as far as the nearest other training "
                f"context): {format_list(unlike)}. Are they of another study, or normalised "
                "otherwise?"
            )


def populations_of(query: Query, rows: IntArray) -> IntArray:
    """Population of each cell: twice its context, plus one if it is known to be stimulated.

    It is -1 for cells that are neither predicted nor the control cells of a context that is.

    Parameters
    ----------
    query
        The cells, with their contexts.
    rows
        Rows to predict.
    """
    codes, is_control = query.context, query.is_control
    populations = 2 * codes + ~is_control
    wanted = np.isin(populations, populations[rows])
    of_wanted = is_control & np.isin(codes, codes[rows])
    return np.where(wanted | of_wanted, populations, -1)


def control_population(survey: Survey, code: int) -> int:
    """Population of a context's control cells, or of all its cells if none is known to be one."""
    return 2 * code if 2 * code in survey.pseudobulks else 2 * code + 1


def keep_mean(
    changes: FloatArray,
    control: FloatArray,
    shares: FloatArray,
    total: FloatArray,
    is_nonnegative: bool = True,
) -> FloatArray:
    """Move changes of states so that their mean is the context's, ``(n_states, G)``.

    Parameters
    ----------
    changes
        Change of each state, ``(n_states, G)``.
    control
        Its mean control expression, ``(n_states, G)``.
    shares
        Its share of the context's control cells, ``(n_states,)``.
    total
        Change of the context, ``(G,)``.
    is_nonnegative
        Whether expression cannot be negative.
    """
    after = control + changes + (total - shares @ changes)
    if not is_nonnegative:
        return after - control
    # No mean falls below 0: what a state cannot lose, the others do, in proportion.
    after, mean = np.maximum(after, 0), np.maximum(shares @ control + total, 0)
    now = shares @ after
    return after * np.divide(mean, now, out=np.ones_like(mean), where=now > 0) - control


def some_of(rows: IntArray, n: int) -> IntArray:
    """Rows at random, ``n`` at most, in their order: the first may be of one donor."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:n])
