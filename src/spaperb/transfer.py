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
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scvi.utils import track

from spaperb._types import Expression, FloatArray, IntArray
from spaperb.contexts import MAX_CELLS, Contexts, Profile
from spaperb.counts import CountChange, scale_of, size_of
from spaperb.detection import Detection, even_numbers
from spaperb.pairing import CONTROL
from spaperb.perturbations import Target
from spaperb.prediction import Cells, Query
from spaperb.response import Change, Response, Situation, Subject
from spaperb.validation import listed, warn

MAX_PROFILE_CELLS = 10_000
"""Cells of a new context that its means are taken from."""
HIGH_DISTANCE = 1.25
"""A context that is farther from training, by a quarter more than any training context is from the others, is warned of."""
MIN_NETWORK_CELLS, MAX_NETWORK_CELLS = 20, 100_000
"""Cells that a context's network change is taken from at least, and those of all contexts and perturbations together."""

How = Literal["shift", "detection", "counts"]

NetworkChange = Callable[[IntArray, Target], FloatArray]
"""From rows of control cells and a perturbation to the mean change that the network decodes, N, ``(G,)``."""


class CellChange(NamedTuple):
    """Change of a context: of its ``mean``, ``(G,)``, and what that does to zeros and levels.

    ``control`` is the profile of its control cells, ``response`` what was learned across genes, and ``distance`` how far
    it is from contexts in which the perturbation was measured, over the largest such distance of a training
    context; 0 where it was measured in the context itself, NaN with fewer than three contexts to compare with.
    """

    mean: FloatArray
    detection: Detection
    control: Profile
    response: Change
    distance: float
    situation: Situation
    """What was measured in the context."""


@dataclass
class Responder:
    """Gives each cell the change of its context: a ``Respond`` of :mod:`spaperb.prediction`.

    Attributes
    ----------
    changes
        Change of each context.
    of_counts
        The same of counts, where these are drawn.
    codes, places
        Context of every cell, and its place among the cells of its context, ``(n_obs,)``.
    seed
        Seed of what is random in the cells.
    how
        What becomes of a cell.
    """

    changes: dict[int, CellChange]
    of_counts: dict[int, CountChange]
    codes: IntArray
    places: IntArray
    seed: int
    how: How

    def __call__(self, cells: Cells, draw: int) -> npt.NDArray:
        """Turn control cells into stimulated ones, ``(n, G)``."""
        x, codes, places = cells.x, self.codes[cells.rows], self.places[cells.rows]
        if self.how == "shift":
            return x + np.array([self.changes[code].mean for code in codes], dtype=np.float32)
        uniform, other = (
            even_numbers(places, x.shape[1], self.seed, 2 * draw + part) for part in (0, 1)
        )
        stimulated = np.empty_like(x)
        for code in np.unique(codes):
            i = codes == code
            if cells.counts is not None:
                raw = cells.counts[i]
                size = size_of(raw, scale_of(x[i], raw))
                stimulated[i] = self.of_counts[code].apply(raw, size, uniform[i])
            else:
                stimulated[i] = self.changes[code].detection.apply(x[i], uniform[i], other[i])
        return stimulated


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
            np.flatnonzero((labels == names.index(name)) & (arms == CONTROL))
            for name in contexts.names
        ]
        pairs = [(t, rows) for t in contexts.treatments for rows in control]
        n_cells = max(MIN_NETWORK_CELLS, min(MAX_CELLS, MAX_NETWORK_CELLS // len(pairs)))
        changes = [
            network_change(
                rows[:n_cells], Target("", t.perturbation, parts[t.perturbation], t.dose)
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

    def network_change(self, k: int, perturbation: int, dose: float | None) -> FloatArray:
        """Mean change of training context ``k`` that the network decodes, N, ``(G,)``."""
        weights = self.response.dose_weights(perturbation, dose)
        return np.array(list(weights.values())) @ self.network_changes[list(weights), k]

    def known(self, k: int, target: Target, network_change: FloatArray) -> CellChange:
        """Change of training context ``k``.

        Parameters
        ----------
        k
            Number of the context.
        target
            The perturbation.
        network_change
            The trained network's N.
        """
        subject = Subject(self.contexts.control[k], self.contexts.cells[k], k)
        return self._cell_change(subject, target, network_change)

    def new(self, cells: npt.NDArray, target: Target, network_change: FloatArray) -> CellChange:
        """Change of a context that is not in the training data.

        Parameters
        ----------
        cells
            Its control cells, ``(n, G)``.
        target
            The perturbation.
        network_change
            The trained network's N of them.
        """
        subject = Subject(Profile.of(cells), self.contexts.project(cells[:MAX_CELLS]))
        return self._cell_change(subject, target, network_change)

    def _cell_change(
        self, subject: Subject, target: Target, network_change: FloatArray
    ) -> CellChange:
        response = self.response.predict(subject, target)
        share = self.share * (1 - response.measured)
        change = response.mean + share * (network_change - response.mean)
        detection = Detection.of(response.references, subject.profile, change, response.weights)
        distance = self._distance(subject, target)
        situation: Situation = (
            "alone" if subject.number not in self.response.of_context else "beside"
        )
        if target.number is None and distance == 0:
            situation = "combined"
        return CellChange(change, detection, subject.profile, response, distance, situation)

    def _distance(self, subject: Subject, target: Target) -> float:
        perturbations = target.parts if target.number is None else (target.number,)
        distance = max(self.response.distance(subject, p) for p in perturbations)
        return distance / self.response.usual_distance if distance else 0.0

    def changes(
        self,
        query: Query,
        codes: IntArray,
        wanted: IntArray,
        is_control: npt.NDArray[np.bool_],
        target: Target,
        network_change: NetworkChange,
    ) -> dict[int, CellChange]:
        """Change of each wanted context of a query.

        Parameters
        ----------
        query
            The cells.
        codes
            Context of every cell, of :meth:`codes`, ``(n,)``.
        wanted
            The contexts.
        is_control
            Cells that the profile of a new cell type is taken from where it has any, ``(n,)``.
        target
            The perturbation.
        network_change
            The trained network's N of rows of the query.
        """

        def change(code: int) -> CellChange:
            cells = _control(codes, code, is_control)
            is_known = code < len(self.contexts.names)
            if is_known and target.number is not None:
                n = self.network_change(code, target.number, target.dose)
                return self.known(code, target, n)
            n = network_change(cells[:MAX_CELLS], target)
            if is_known:
                return self.known(code, target, n)
            return self.new(query.rows(cells[:MAX_PROFILE_CELLS]), target, n)

        return {int(code): change(int(code)) for code in wanted}

    def responder(
        self,
        query: Query,
        labels: npt.NDArray | None,
        is_control: npt.NDArray[np.bool_],
        rows: IntArray,
        target: Target,
        network_change: NetworkChange,
        seed: int,
        how: How,
    ) -> Responder:
        """Find each cell's context and its change.

        Parameters
        ----------
        query
            The cells.
        labels
            Their cell types, ``(n,)``, missing where not known; ``None`` if there are none.
        is_control
            Cells that the profile of a new cell type is taken from where it has any, ``(n,)``.
        rows
            Rows to predict.
        target
            The perturbation.
        network_change
            The trained network's N of rows of the query.
        seed
            Seed of what is random in the cells.
        how
            What becomes of a cell: the change is added to it (``"shift"``), split into detection and level
            (``"detection"``), or drawn in its counts (``"counts"``).
        """
        codes = self.codes(query, labels)
        changes = self.changes(
            query, codes, np.unique(codes[rows]), is_control, target, network_change
        )
        _warn_of_distance(codes, labels, changes)
        of_counts: dict[int, CountChange] = {}
        if how == "counts":
            of_counts = {
                code: self._count_change(query, _control(codes, code, is_control), change, seed)
                for code, change in changes.items()
            }
        places = pd.Series(codes).groupby(codes).cumcount().to_numpy()
        return Responder(changes, of_counts, codes, places, seed, how)

    @staticmethod
    def _count_change(query: Query, cells: IntArray, change: CellChange, seed: int) -> CountChange:
        """Change of counts of a context, from its control cells in the query."""
        some = cells[:MAX_CELLS]
        x = query.rows(some)
        uniform = even_numbers(np.arange(len(some)), x.shape[1], seed, 0)
        response = change.response
        theta = np.array([p.dispersion for p in response.references], dtype=float)
        theta = np.exp(response.weights @ np.log(theta) / response.weights.sum())
        return CountChange.of(x, query.raw(some), uniform, change.mean, theta)

    def codes(self, query: Query, labels: npt.NDArray | None) -> IntArray:
        """Context of every cell: by its label, or without one by its nearest control cells.

        New labels get the numbers after those of the training contexts.
        """
        n_cells = query.x.shape[0]
        codes = np.full(n_cells, -1)
        if labels is not None:
            named = pd.Series(labels, dtype=object)
            numbers = {name: k for k, name in enumerate(self.contexts.names)}
            for label in named.dropna().unique():
                numbers.setdefault(label, len(numbers))
            codes = named.map(numbers).fillna(-1).to_numpy(dtype=np.int64, copy=True)
        unknown = np.flatnonzero(codes < 0)
        for start in range(0, len(unknown), MAX_CELLS):
            some = unknown[start : start + MAX_CELLS]
            codes[some] = self.contexts.assign(self.contexts.project(query.rows(some)))
        return codes


def _control(codes: IntArray, code: int, is_control: npt.NDArray[np.bool_]) -> IntArray:
    """Rows of a context's control cells, or of all its cells if none is known to be one."""
    cells = np.flatnonzero(codes == code)
    return cells[is_control[cells]] if is_control[cells].any() else cells


def _warn_of_distance(
    codes: IntArray, labels: npt.NDArray | None, changes: dict[int, CellChange]
) -> None:
    """Warn once of contexts that are unlike anything in training."""
    far = {code: change.distance for code, change in changes.items()}
    far = {code: distance for code, distance in far.items() if distance > HIGH_DISTANCE}
    if not far:
        return
    names = far if labels is None else {labels[codes == code][0]: d for code, d in far.items()}
    found = listed([f"{name} ({distance:.2f})" for name, distance in names.items()])
    warn(
        "The control cells of these cell types are farther from training contexts in which the perturbation was measured than any of "
        f"those is from the others, so do not trust their prediction (distance, at most 1 in training): {found}."
    )
