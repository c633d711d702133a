"""From contexts to cells: the change that each cell of a query gets.

The change of a context mixes what is learned across genes with what the network decodes::

    change = R + share (N - R),    N = mean over the context's control cells of X_stim' - X_ctrl,
    share  = network_share * max(0, 1 - sum_s w_s |N_s - Delta_s|^2 / sum_s w_s |Delta_s|^2),

so that a network that does not even fit the measured changes Delta_s of the training contexts has no say. Of a
context whose change was measured, the network has the less to say the better it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scvi.utils import track

from spaperb._types import Expression, FloatArray, IntArray
from spaperb.cells import CellMaker, Detection, PopulationChange, Survey
from spaperb.contexts import MAX_CELLS, Contexts
from spaperb.data import match_labels
from spaperb.pairing import CONTROL
from spaperb.perturbations import Target
from spaperb.populations import Profile
from spaperb.prediction import Query
from spaperb.response import Change, Response, Situation, Subject
from spaperb.validation import listed, warn

UNLIKE = 0.75
"""Cells of a known name that are less like those of training are warned of."""
HIGH_DISTANCE = 1.25
"""A context that is farther from training, by a quarter more than any training context is from the others, is warned of."""
MIN_NETWORK_CELLS, MAX_NETWORK_CELLS = 20, 100_000
"""Cells that a context's network change is taken from at least, and those of all contexts and perturbations together."""

NetworkChange = Callable[[IntArray, Target], FloatArray]
"""From rows of control cells and a perturbation to the mean change that the network decodes, N, ``(G,)``."""


class CellChange(NamedTuple):
    """Change of a context: of its ``mean``, ``(G,)``.

    ``control`` is the profile of its control cells, ``response`` what was learned across genes, and ``distance`` how far
    it is from contexts in which the perturbation was measured, over the largest such distance of a training
    context; 0 where it was measured in the context itself, NaN with fewer than three contexts to compare with.
    """

    mean: FloatArray
    control: Profile
    response: Change
    distance: float
    situation: Situation
    """What was measured in the context."""
    is_control: bool
    """Whether it has control cells."""
    alike: float
    """How far its control cells are those of the training context of its name, in [0, 1]."""

    @property
    def detection(self) -> Detection:
        """What the change does to zeros and levels of its control cells."""
        response = self.response
        return Detection.of(response.references, self.control, self.mean, response.weights)


class Assignment(NamedTuple):
    """Context of each cell of a query, ``codes`` ``(n,)``, and the names that belong to these."""

    codes: IntArray
    names: list[Any]


@dataclass
class Transfer:
    """Changes of the contexts of a training set, and of new ones.

    Attributes
    ----------
    contexts
        The training contexts, K of them.
    parts
        For each perturbation the numbers of those that it combines.
    singles
        Numbers of the perturbations that are neither a combination nor named like one.
    network_changes
        N of each treatment of the contexts and each context, ``(T, K, G)``.
    network_share
        Share of a network that fits the measured changes exactly, in [0, 1].
    """

    contexts: Contexts
    parts: list[tuple[int, ...]]
    singles: list[int]
    network_changes: npt.NDArray[np.float32]
    network_share: float

    def __post_init__(self) -> None:
        self._told: set[Any] = set()

    @classmethod
    def learn(
        cls,
        x: Expression,
        arms: IntArray,
        labels: IntArray,
        names: list[Any],
        network_change: NetworkChange,
        network_share: float,
        parts: list[tuple[int, ...]],
        singles: list[int],
        batches: IntArray | None = None,
        doses: FloatArray | None = None,
        counts: Expression | None = None,
    ) -> Transfer:
        """Measure the contexts of training cells.

        Parameters
        ----------
        x
            Log-normalised expression, ``(n, G)``.
        arms
            For every cell CONTROL, NEITHER, or STIMULATED plus the number of its perturbation,
            ``(n,)``.
        labels
            For every cell the number of its context, ``(n,)``.
        names
            Names of the contexts by that number.
        network_change
            The trained network's N.
        network_share
            Its share.
        parts
            For each perturbation the numbers of those that it combines.
        singles
            Numbers of the perturbations that are neither a combination nor named like one.
        batches
            For every cell the number of its batch, ``(n,)``.
        doses
            For every cell its dose, ``(n,)``.
        counts
            Raw counts, ``(n, G)``.
        """
        contexts = Contexts.of(x, arms, labels, names, batches, doses, counts)
        control = [
            some_of(np.flatnonzero((labels == names.index(name)) & (arms == CONTROL)), MAX_CELLS)
            for name in contexts.names
        ]
        pairs = [(t, rows) for t in contexts.treatments for rows in control]
        n_cells = max(MIN_NETWORK_CELLS, min(MAX_CELLS, MAX_NETWORK_CELLS // len(pairs)))
        changes = [
            network_change(
                some_of(rows, n_cells), Target("", t.perturbation, parts[t.perturbation], t.dose)
            )
            for t, rows in track(pairs, description="Contexts", disable=len(pairs) < 100)
        ]
        shape = len(contexts.treatments), len(contexts.names), -1
        array = np.array(changes, dtype=np.float32).reshape(shape)
        return cls(contexts, parts, singles, array, network_share)

    def to_state(self) -> dict[str, Any]:
        """Arrays and lists that :meth:`from_state` takes, to be saved with a model."""
        return {
            "contexts": self.contexts.to_state(),
            "parts": self.parts,
            "singles": self.singles,
            "network_changes": self.network_changes,
            "network_share": self.network_share,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Transfer:
        """Restore what :meth:`to_state` gave."""
        return cls(**{**state, "contexts": Contexts.from_state(state["contexts"])})

    @cached_property
    def response(self) -> Response:
        """What is learned across genes."""
        return Response(self.contexts, self.parts, self.singles)

    @cached_property
    def share(self) -> float:
        """Share of the network, by how well it fits the measured changes."""
        if not self.response.is_reliable:
            return 0.0  # the measured changes are noise, and fitting them is no merit
        error = total = 0.0
        for t, changes in zip(self.contexts.treatments, self.network_changes, strict=True):
            w = t.weights[:, None]
            error += (w * (changes[t.paired] - t.shifts) ** 2).sum()
            total += (w * t.shifts**2).sum()
        return self.network_share * max(0.0, 1 - error / max(total, 1e-12))

    def change(
        self, subject: Subject, target: Target, network_change: FloatArray, is_control: bool
    ) -> CellChange:
        """Change of a context.

        Parameters
        ----------
        subject
            Its control cells, and the training context of its name if there is one.
        target
            The perturbation.
        network_change
            The trained network's N of its control cells.
        is_control
            Whether these are control cells, rather than all that there are.
        """
        response = self.response.predict(subject, target)
        share = self.share * (1 - response.measured)
        change = response.mean + share * (network_change - response.mean)
        distance = self._distance(subject, target)
        is_known = subject.number in self.response.of_context and subject.alike > 0.5
        situation: Situation = "beside" if is_known else "alone"
        if target.number is None and distance == 0:
            situation = "combined"
        return CellChange(
            change,
            subject.profile,
            response,
            distance,
            situation,
            is_control,
            subject.alike,
        )

    def _distance(self, subject: Subject, target: Target) -> float:
        perturbations = target.parts if target.number is None else (target.number,)
        distance = max(self.response.distance(subject, p) for p in perturbations)
        return distance / self.response.usual_distance if distance else 0.0

    def changes(
        self,
        survey: Survey,
        target: Target,
        network_change: NetworkChange,
    ) -> dict[int, CellChange]:
        """Change of each context of a query.

        Parameters
        ----------
        survey
            Its cells, in the populations that :func:`populations_of` tells apart.
        target
            The perturbation.
        network_change
            The trained network's N of rows of the query.
        """
        changes = {}
        for code in sorted({p // 2 for p in survey.profiles}):
            # Control cells, or all cells of a context if none is known to be one.
            population = 2 * code if 2 * code in survey.profiles else 2 * code + 1
            profile = survey.profiles[population]
            some = some_of(np.flatnonzero(survey.populations == population), MAX_CELLS)
            cells = self.contexts.project(survey.query.rows(some))
            subject = Subject(profile, cells)
            if code < len(self.contexts.names):
                alike = self.contexts.likeness(profile, code)
                subject = Subject(profile, cells, code, alike)
            n = network_change(some, target)
            changes[code] = self.change(subject, target, n, is_control=population % 2 == 0)
        return changes

    def maker(
        self,
        query: Query,
        context: Assignment,
        is_control: npt.NDArray[np.bool_],
        rows: IntArray,
        target: Target,
        network_change: NetworkChange,
        **how: Any,
    ) -> CellMaker:
        """Find the change of each context, for its cells.

        Parameters
        ----------
        query
            The cells.
        context
            Context of every cell.
        is_control
            Cells that are not known to be stimulated, ``(n,)``.
        rows
            Rows to predict.
        target
            The perturbation.
        network_change
            The trained network's N of rows of the query.
        **how
            Further arguments of :class:`~spaperb.cells.CellMaker`: what becomes of a cell.
        """
        survey = Survey.of(query, populations_of(context.codes, is_control, rows))
        changes = self.changes(survey, target, network_change)
        self.warn_of(changes, context.names)
        of_populations = {
            p: PopulationChange(c.mean, c.response.references, c.response.weights)
            for p in survey.profiles
            for c in [changes[p // 2]]
        }
        return CellMaker(survey, of_populations, **how)

    def assign(self, query: Query, labels: npt.NDArray | None) -> Assignment:
        """Find the context of every cell: by its label, or without one by its nearest control cells.

        Parameters
        ----------
        query
            The cells.
        labels
            Their cell types, ``(n,)``, missing where not known; ``None`` if there are none. They are those of training if they
            are spelled alike, whatever their type.
        """
        n_cells = query.x.shape[0]
        codes, names = np.full(n_cells, -1), list(self.contexts.names)
        if labels is not None:
            named = pd.Series(labels, dtype=object)
            found = list(named.dropna().unique())
            numbers = match_labels(found, names)
            new = [label for label in found if label not in numbers]
            self._tell_of_new(new, found)
            numbers |= {label: len(names) + i for i, label in enumerate(new)}
            names += new
            codes = named.map(numbers).fillna(-1).to_numpy(dtype=np.int64, copy=True)
        unknown = np.flatnonzero(codes < 0)
        for start in range(0, len(unknown), MAX_CELLS):
            some = unknown[start : start + MAX_CELLS]
            codes[some] = self.contexts.assign(self.contexts.project(query.rows(some)))
        return Assignment(codes, names)

    def _tell_of_new(self, new: list[Any], found: list[Any]) -> None:
        """Name cell types that the model does not know, each once, and say if it knows none."""
        fresh = [label for label in new if label not in self._told]
        self._told.update(fresh)
        if fresh and len(new) == len(found):
            warn(
                f"The model knows none of the cell types of these cells, so each is predicted as a new type, from its control cells: "
                f"{listed(new)}. Types of training: {listed(self.contexts.names)}. If they are the same under other names, rename them."
            )
        elif fresh:
            warn(
                "These cell types are new to the model and are predicted from their own control cells: "
                f"{listed(fresh)}."
            )

    def warn_of(self, changes: dict[int, CellChange], names: list[Any]) -> None:
        """Warn of contexts that are unlike anything in training, or unlike the training cells of their name."""
        if any(change.is_control for change in changes.values()) and (
            without := [names[code] for code, c in changes.items() if not c.is_control]
        ):
            warn(
                "These cell types have no control cells here, so the change is added to what their cells are, as if they were control cells: "
                f"{listed(without)}."
            )
        far = [
            f"{names[code]} ({change.distance:.2f})"
            for code, change in changes.items()
            if change.distance > HIGH_DISTANCE
        ]
        if far:
            warn(
                "The control cells of these cell types are farther from training contexts in which the perturbation was measured than any of "
                f"those is from the others, so do not trust their prediction (distance, at most 1 in training): {listed(far)}."
            )
        unlike = [
            f"{names[code]} ({change.alike:.0%})"
            for code, change in changes.items()
            if change.alike < UNLIKE
        ]
        if unlike:
            warn(
                "The control cells of these cell types are unlike the training cells of the same name, by more than sampling noise, so what was "
                "measured there counts only in part (how far they are alike; 0 % is as far as the nearest other training context): "
                f"{listed(unlike)}. Are they of another study, or normalised otherwise?"
            )


def populations_of(codes: IntArray, is_control: npt.NDArray[np.bool_], rows: IntArray) -> IntArray:
    """Number of each cell's population: twice its context, plus one for cells that are known not to be control.

    It is -1 for cells that are neither predicted nor the control cells of a context that is.

    Parameters
    ----------
    codes
        Context of every cell, ``(n,)``.
    is_control
        Cells that are not known to be stimulated, ``(n,)``.
    rows
        Rows to predict.
    """
    populations = 2 * codes + ~is_control
    wanted = np.isin(populations, populations[rows])
    of_wanted = is_control & np.isin(codes, codes[rows])
    return np.where(wanted | of_wanted, populations, -1)


def some_of(rows: IntArray, n: int) -> IntArray:
    """Rows at random, ``n`` at most, in their order: the first may be of one donor."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:n])
