"""From contexts to cells: the change that each cell of a query gets.

The change of a context mixes what is learned across genes with what the network decodes,

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

from spaperb._types import Expression, FloatArray, IntArray
from spaperb.contexts import MAX_CELLS, Contexts, Profile
from spaperb.detection import Detection, even_numbers
from spaperb.pairing import CONTROL
from spaperb.prediction import Query, Respond
from spaperb.response import Response

MAX_PROFILE_CELLS = 10_000
"""Cells of a new context that its means are taken from."""

NetworkChange = Callable[[Expression], FloatArray]
"""From control cells ``(n, G)`` to the mean change that the network decodes, N, ``(G,)``."""


class CellChange(NamedTuple):
    """Change of a context: of its ``mean``, ``(G,)``, and what that does to zeros and levels."""

    mean: FloatArray
    detection: Detection


@dataclass
class Transfer:
    """Changes of the contexts of a training set, and of new ones.

    Attributes
    ----------
    contexts
        The training contexts, K of them.
    network_changes
        N of each of them, ``(K, G)``.
    network_share
        Share of a network that fits the measured changes exactly, in [0, 1].
    """

    contexts: Contexts
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
    ) -> Transfer:
        """Measure the contexts of training cells.

        Parameters
        ----------
        x
            Log-normalised expression, ``(n, G)``.
        arms
            For every cell CONTROL, STIMULATED or NEITHER, ``(n,)``.
        labels
            For every cell the number of its context, ``(n,)``.
        names
            Names of the contexts by that number.
        network_change
            The trained network's N.
        network_share
            Its share.
        """
        contexts = Contexts.of(x, arms, labels, names)
        changes = [
            network_change(x[(labels == names.index(name)) & (arms == CONTROL)][:MAX_CELLS])
            for name in contexts.names
        ]
        return cls(contexts, np.array(changes, dtype=np.float32), network_share)

    def to_state(self) -> dict[str, Any]:
        """Arrays and lists that :meth:`from_state` takes, to be saved with a model."""
        return {
            "contexts": self.contexts.to_state(),
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
        return Response(self.contexts)

    @cached_property
    def share(self) -> float:
        """Share of the network, by how well it fits the measured changes."""
        if not self.response.anchor_weights.any():
            return 0.0  # the measured changes are noise, and fitting them is no merit
        measured = self.response.shifts
        w = self.response.weights[:, None]
        error = (w * (self.network_changes[: len(measured)] - measured) ** 2).sum()
        return self.network_share * max(0.0, 1 - error / max((w * measured**2).sum(), 1e-12))

    def known(self, k: int) -> CellChange:
        """Change of training context ``k``."""
        control = self.contexts.control[k]
        if k >= self.contexts.n_paired:
            return self._unmeasured(control, self.contexts.cells[k], self.network_changes[k])
        change, trust = self.response.measured(k)
        change = change + self.share * (1 - trust) * (self.network_changes[k] - change)
        return self._cell_change(control, change, np.eye(self.contexts.n_paired)[k])

    def new(self, cells: npt.NDArray, network_change: NetworkChange) -> CellChange:
        """Change of a context that is not in the training data.

        Parameters
        ----------
        cells
            Its control cells, ``(n, G)``.
        network_change
            The trained network's N.
        """
        some = cells[:MAX_CELLS]
        near = self.contexts.project(some)
        return self._unmeasured(Profile.of(cells), near, network_change(some))

    def responder(
        self,
        query: Query,
        labels: npt.NDArray | None,
        is_control: npt.NDArray[np.bool_],
        rows: IntArray,
        network_change: NetworkChange,
        seed: int,
        detection: bool,
    ) -> Respond:
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
        network_change
            The trained network's N.
        seed
            Seed of what is random in the cells.
        detection
            Whether the change is split into detection and level, or added to every cell.
        """
        codes = self._codes(query, labels)

        def change(code: int) -> CellChange:
            if code < len(self.contexts.names):
                return self.known(code)
            cells = np.flatnonzero(codes == code)
            if is_control[cells].any():
                cells = cells[is_control[cells]]
            return self.new(query.rows(cells[:MAX_PROFILE_CELLS]), network_change)

        changes = {code: change(code) for code in np.unique(codes[rows])}

        places = pd.Series(codes).groupby(codes).cumcount().to_numpy()

        def respond(chunk: IntArray, x: npt.NDArray, draw: int) -> npt.NDArray:
            of_cell, at = codes[rows[chunk]], places[rows[chunk]]
            if not detection:
                return x + np.array([changes[code].mean for code in of_cell], dtype=np.float32)
            uniform, other = (
                even_numbers(at, x.shape[1], seed, 2 * draw + part) for part in (0, 1)
            )
            stimulated = np.empty_like(x)
            for code in np.unique(of_cell):
                i = of_cell == code
                stimulated[i] = changes[code].detection.apply(x[i], uniform[i], other[i])
            return stimulated

        return respond

    def _codes(self, query: Query, labels: npt.NDArray | None) -> IntArray:
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
            codes = named.map(numbers).fillna(-1).to_numpy(dtype=np.int64)
        unknown = np.flatnonzero(codes < 0)
        for start in range(0, len(unknown), MAX_CELLS):
            some = unknown[start : start + MAX_CELLS]
            codes[some] = self.contexts.assign(self.contexts.project(query.rows(some)))
        return codes

    def _unmeasured(
        self, control: Profile, cells: FloatArray, network_change: npt.NDArray
    ) -> CellChange:
        change, weights = self.response.predict(control, cells)
        change = change + self.share * (network_change - change)
        return self._cell_change(control, change, weights)

    def _cell_change(
        self, control: Profile, change: FloatArray, weights: FloatArray
    ) -> CellChange:
        return CellChange(change, Detection.of(self.contexts, control, change, weights))
