"""What the values of a condition column mean.

The control, perturbations, combinations of perturbations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spaperb._messages import format_list, shown, warn
from spaperb._types import CONTROL, NEITHER, FloatArray, IntArray
from spaperb.evidence import CLOSE


class Target(NamedTuple):
    """A perturbation to predict: its ``name``, what it is made of, and its ``dose`` or ``None``.

    ``number`` is its number among the perturbations of the training data, ``None`` for a
    combination that is not among them; ``parts`` are the numbers of the perturbations that it
    combines, itself if it is single. One that was never measured has neither, but ``features``.
    """

    name: str
    number: int | None
    parts: tuple[int, ...]
    dose: float | None = None
    features: FloatArray | None = None

    def dose_range(self, ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """Doses that it, or all of its parts, were measured at; others, if features tell of it."""
        if self.features is not None:
            return min(low for low, _ in ranges), max(high for _, high in ranges)
        of = self.parts if self.number is None else (self.number,)
        low, high = zip(*(ranges[p] for p in of), strict=True)
        return max(low), min(high)


@dataclass(frozen=True)
class Perturbations:
    """The perturbations of a condition column, P of them.

    A value that holds the separator is a *combination* if each of its parts is a perturbation of
    its own; the order of the parts has no meaning. Parts that name the control drop out, so that
    ``"A+control"`` is ``"A"``. Any other value is one perturbation, whatever characters it holds.

    Attributes
    ----------
    names
        Names of the perturbations, ``(P,)``.
    parts
        For each perturbation the numbers of those that it combines, its own if it is single.
    arms
        What each value of the column makes of a cell: CONTROL, 1 + the number of its perturbation,
        or NEITHER.
    separator
        What joins the parts of a combination's name; ``None`` if there are no combinations.
    control
        Value of control cells.
    whole
        Names that hold the separator and are taken for one perturbation all the same.
    """

    names: list[Any]
    parts: list[tuple[int, ...]]
    arms: IntArray
    separator: str | None
    control: Any
    whole: list[str]

    @classmethod
    def of(
        cls,
        values: Sequence[Any] | npt.NDArray,
        control: Any,
        stimulated: Iterable[Any] | None = None,
        separator: str | None = None,
    ) -> Perturbations:
        """Read the values of a condition column.

        Parameters
        ----------
        values
            The distinct values.
        control
            Value of control cells.
        stimulated
            Values of stimulated cells; ``None`` for all but the control.
        separator
            What joins the parts of a combination's name.
        """
        chosen = [v for v in values if v != control]
        if stimulated is not None:
            wanted = set(stimulated)
            chosen = [v for v in chosen if v in wanted]
        pieces = {v: _split(v, separator, control) for v in chosen}
        single = {p[0] for p in pieces.values() if len(p) == 1}
        whole = [v for v, p in pieces.items() if len(p) > 1 and not single.issuperset(p)]
        pieces.update({v: (v,) for v in whole})
        # Values of the same parts are one perturbation.
        numbers: dict[tuple[Any, ...], int] = {}
        names: list[Any] = []
        for value, of_value in pieces.items():
            if of_value not in numbers:
                numbers[of_value] = len(names)
                names.append(value)
        return cls(
            names=names,
            parts=[tuple(numbers[(part,)] for part in key) for key in numbers],
            arms=np.array(
                [
                    CONTROL if v == control else 1 + numbers[pieces[v]] if v in pieces else NEITHER
                    for v in values
                ]
            ),
            separator=separator,
            control=control,
            whole=whole,
        )

    @property
    def singles(self) -> list[Any]:
        """Names of the perturbations that are no combinations, and do not look like one."""
        pairs = zip(self.names, self.parts, strict=True)
        return [name for name, of in pairs if len(of) == 1 and name not in self.whole]

    @property
    def composition(self) -> npt.NDArray[np.float32]:
        """How often each perturbation is a part of each value of the column, ``(n_values, P)``."""
        rows = np.zeros((len(self.arms), len(self.names)), dtype=np.float32)
        for row, arm in zip(rows, self.arms, strict=True):
            if arm > CONTROL:
                np.add.at(row, list(self.parts[arm - 1]), 1)
        return rows

    def find(self, name: Any) -> Target:
        """Find a perturbation, or a combination of known ones, by its name.

        Raises
        ------
        ValueError
            If it, or a part of it, is not known.
        """
        if name in self.names:
            number = self.names.index(name)
            return Target(str(name), number, self.parts[number])
        single = {self.names[p[0]]: p[0] for p in self.parts if len(p) == 1}
        # A single perturbation may be known by the name of its part ("A" of "A+control").
        single |= {
            _split(n, self.separator, self.control)[0]: i
            for n, i in single.items()
            if n not in self.whole
        }
        pieces = _split(name, self.separator, self.control)
        if unknown := [piece for piece in pieces if piece not in single]:
            of = f", of {shown(name)}," if len(pieces) > 1 else ""
            raise ValueError(
                f"{', '.join(map(shown, unknown))}{of} is not a perturbation that the model was "
                f"trained on. It knows: {format_list(self.names)}. One that was never measured is "
                "predicted from its features: set the data up with `perturbation_features=`."
            )
        parts = tuple(sorted(single[piece] for piece in pieces))
        same = [i for i, known in enumerate(self.parts) if tuple(sorted(known)) == parts]
        return Target(str(name), same[0] if same else None, parts)

    def knows(self, name: Any) -> bool:
        """Whether a perturbation, or each part of a combination, was measured."""
        try:
            self.find(name)
        except ValueError:
            return False
        return True

    def target(
        self,
        name: Any | None,
        dose: float | None,
        dose_key: str | None,
        ranges: Sequence[tuple[float, float]],
        features: FloatArray | None = None,
    ) -> Target:
        """Find what a user asks a model for, and warn of doses beyond those measured.

        Parameters
        ----------
        name
            Name of the perturbation; ``None`` for the only one.
        dose
            Its dose.
        dose_key
            Column that the model takes doses from, ``None`` if it has none.
        ranges
            Lowest and highest measured dose of each perturbation.
        features
            Features of one that was never measured.

        Raises
        ------
        ValueError
            If there are several perturbations and none is named, the named one is unknown, or the
            dose does not fit the model.
        """
        if name is None:
            if len(self.names) > 1:
                raise ValueError(
                    f"The model knows {len(self.names)} perturbations: {format_list(self.names)}. "
                    "Pass one of them, or a combination, as `perturbation=`."
                )
            name = self.names[0]
        target = (
            self.find(name) if features is None else Target(str(name), None, (), None, features)
        )
        if dose_key is None:
            if dose is not None:
                raise ValueError(
                    "The model was set up without doses and takes no `dose`. Set it up with "
                    "`dose_key=` to train one that does."
                )
            return target
        low, high = target.dose_range(ranges)
        measured = f"{target.name} was measured at doses from {low:g} to {high:g}"
        if features is not None:
            measured = f"The measured perturbations have doses from {low:g} to {high:g}"
        elif target.number is None:
            of_parts = [
                f"{self.names[p]} from {ranges[p][0]:g} to {ranges[p][1]:g}" for p in target.parts
            ]
            measured = f"The parts of {target.name} were measured at doses: {', '.join(of_parts)}"
        if dose is None:
            raise ValueError(
                f"The model was set up with doses (`dose_key={dose_key!r}`): pass `dose=`. "
                f"{measured}."
            )
        if not (isinstance(dose, Real) and 0 <= dose < math.inf):
            raise ValueError(f"`dose` must be a number of at least 0; it is {shown(dose)}.")
        if not low * (1 - CLOSE) <= dose <= high * (1 + CLOSE):
            warn(
                f"{measured}; what is predicted for {dose:g} is a guess: below that range the "
                "response falls to nothing, above it stays."
            )
        return target._replace(dose=float(dose))


def warn_of_whole_names(perturbations: Perturbations) -> None:
    """Warn once of names that look like combinations and are none."""
    if perturbations.whole:
        warn(
            f"These names hold the separator {perturbations.separator!r}, but not each of their "
            "parts is a perturbation of its own, so each is taken for one perturbation, not for a "
            f"combination: {format_list(perturbations.whole)}. If the separator is there by "
            "accident, pass `combination_separator=None`."
        )


def _split(name: Any, separator: str | None, control: Any) -> tuple[Any, ...]:
    """Parts of a name, in an order that has no meaning."""
    if not separator or not isinstance(name, str):
        return (name,)
    pieces = [piece for piece in name.split(separator) if piece != control]
    # "IFN+" ends with a separator by accident.
    return tuple(sorted(pieces)) if pieces and all(pieces) else (name,)
