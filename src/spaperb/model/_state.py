"""What training learned: one typed state, which is saved as plain values and arrays of numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spaperb.data import Scale
from spaperb.evidence import Evidence
from spaperb.model._contexts import ContextPredictor
from spaperb.model._intervals import Intervals
from spaperb.module import InContextModule


@dataclass
class State:
    """All that a model knows beside its weights, registry and history.

    Attributes
    ----------
    scale
        Scale of the training expression.
    dose_ranges
        Lowest and highest measured dose of each perturbation, ``(P,)``; empty without doses.
    split_of
        Digest of the names of the cells that were split into training, validation and test.
    predictor
        What was measured, and how far predictions may be off; ``None`` before training ended, and
        with the published objective.
    """

    scale: Scale
    dose_ranges: list[tuple[float, float]] = field(default_factory=list)
    split_of: str = ""
    predictor: ContextPredictor | None = None

    def to_plain(self) -> dict[str, Any]:
        """Dictionaries and lists of numbers, text and arrays that :meth:`from_plain` takes."""
        predictor = self.predictor
        return {
            "scale": vars(self.scale),
            "dose_ranges": np.reshape(self.dose_ranges, (-1, 2)).astype(float),
            "split_of": self.split_of,
            "predictor": predictor
            and {
                "evidence": predictor.evidence.to_plain(),
                "intervals": predictor.intervals._asdict(),
                "intervals_unseen_context": predictor.intervals_unseen_context._asdict(),
                "intervals_unseen_perturbation": predictor.intervals_unseen_perturbation._asdict(),
                "largest_distance": predictor.largest_distance,
                "states": predictor.states and predictor.states.to_plain(),
            },
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any], module: InContextModule) -> State:
        """Restore what :meth:`to_plain` gave, of a model with these networks."""
        if (predictor := plain["predictor"]) is not None:
            predictor = ContextPredictor(
                Evidence.from_plain(predictor["evidence"]),
                module,
                Intervals(**predictor["intervals"]),
                Intervals(**predictor["intervals_unseen_context"]),
                Intervals(**predictor["intervals_unseen_perturbation"]),
                predictor["largest_distance"],
                predictor["states"] and Evidence.from_plain(predictor["states"]),
            )
        return cls(
            Scale(**plain["scale"]),
            [(float(low), float(high)) for low, high in plain["dose_ranges"]],
            plain["split_of"],
            predictor,
        )
