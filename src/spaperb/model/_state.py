"""What training learned: one typed state, which is saved as plain values and arrays of numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spaperb.data import Scale
from spaperb.evidence import Evidence
from spaperb.model._intervals import Intervals
from spaperb.model._transfer import Transfer
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
    transfer
        What was measured, and how far predictions may be off; ``None`` before training ended, and
        with the published objective.
    """

    scale: Scale
    dose_ranges: list[tuple[float, float]] = field(default_factory=list)
    split_of: str = ""
    transfer: Transfer | None = None

    def to_plain(self) -> dict[str, Any]:
        """Dictionaries and lists of numbers, text and arrays that :meth:`from_plain` takes."""
        transfer = self.transfer
        return {
            "scale": vars(self.scale),
            "dose_ranges": np.reshape(self.dose_ranges, (-1, 2)).astype(float),
            "split_of": self.split_of,
            "transfer": transfer
            and {
                "evidence": transfer.evidence.to_plain(),
                "intervals": transfer.intervals._asdict(),
                "intervals_unseen_context": transfer.intervals_unseen_context._asdict(),
                "largest_distance": transfer.largest_distance,
            },
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any], module: InContextModule) -> State:
        """Restore what :meth:`to_plain` gave, of a model with these networks."""
        if (transfer := plain["transfer"]) is not None:
            transfer = Transfer(
                Evidence.from_plain(transfer["evidence"]),
                module,
                Intervals(**transfer["intervals"]),
                Intervals(**transfer["intervals_unseen_context"]),
                transfer["largest_distance"],
            )
        return cls(
            Scale(**plain["scale"]),
            [(float(low), float(high)) for low, high in plain["dose_ranges"]],
            plain["split_of"],
            transfer,
        )
