"""What to measure next."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi.utils import track

from spaperb._messages import format_list, shown
from spaperb.cells import Survey
from spaperb.data import Target, perturbations_of
from spaperb.evidence import suggest
from spaperb.model._base import SpaPerbBase
from spaperb.model._contexts import ContextPredictor, ControlCells, populations_of

MAX_OTHERS = 50
"""Changes, at random, whose intervals stand for those of all that were not measured."""


class Candidate(NamedTuple):
    """A change that was not measured: its context in the query, and its perturbation."""

    context: int
    target: Target


class SuggestMixin(SpaPerbBase):
    """Tell what to measure next."""

    def suggest_measurements(
        self,
        adata: AnnData | None = None,
        n: int = 5,
        *,
        perturbation: Any | None = None,
        confidence_level: float = 0.9,
    ) -> pd.DataFrame:
        """Tell which contexts (and perturbations in them) to measure next.

        Of all changes that were not measured, those that would leave the others nearest to a
        measured one: contexts are near if their control cells are, and how much perturbations
        differ is learned from those that were measured (:mod:`spaperb.evidence`). What the
        intervals of the others would be is then predicted as if each had been measured, as
        predicted, with as many stimulated cells as there are control cells.

        Parameters
        ----------
        adata
            Cells as for :meth:`predict_stimulated`; ``None`` for the AnnData of the model. Types
            with control cells may be measured.
        n
            How many to suggest at most.
        perturbation
            The perturbation to measure; ``None`` for any that was measured somewhere.
        confidence_level
            Of the intervals, in (0, 1).

        Returns
        -------
        pandas.DataFrame
            A row a measurement, the best first, each chosen as if those above were measured:

            - ``group``, ``perturbation``
            - ``gain``: share that it takes of the expected squared error of all that is not
              measured
            - ``half_width_before``, ``half_width_after``: mean over genes and the other changes
              (50 of them at most, at random) of half their intervals, log-normalised units; NaN
              where no other is left. A measurement that is as predicted tells little that is new,
              so they may also grow by a little

        Raises
        ------
        ValueError
            If ``n`` is below 1 or no whole number, the objective is the published one, the
            perturbation was never measured, everything is measured, or :meth:`predict_response`
            would refuse.
        """
        if not isinstance(n, Integral) or n < 1:
            raise ValueError(f"`n` must be a whole number and at least 1; it is {n!r}.")
        self._check_intervals(confidence_level)
        learned = self._learned()
        names = self.perturbations if perturbation is None else [perturbation]
        targets = [self._highest(name) for name in names]
        adata, query = self._query(adata, with_contexts=True)
        query = learned.assign(query)
        rows = np.flatnonzero(query.is_control)
        survey = Survey.of(query, populations_of(query, rows))
        asked = {
            code: learned.control_cells(
                survey, code, code if code < len(learned.evidence.names) else None
            )
            for code in sorted({int(p) // 2 for p in survey.pseudobulks if p % 2 == 0})
        }
        candidates = _unmeasured(learned, list(asked), targets)
        if not candidates:
            contexts = [query.context_names[code] for code in asked]
            raise ValueError(
                f"All is measured: {format_list(names)} in {format_list(contexts)}. Pass control "
                "cells of other types as `adata`."
            )
        codes = list(asked)
        numbers = np.array([[codes.index(c.context), c.target.number] for c in candidates])
        choices = suggest(
            learned.evidence,
            [asked[code].pseudobulk for code in codes],
            [asked[code].number for code in codes],
            numbers,
            n,
        )
        of_number = {target.number: target for target in targets}
        chosen = [
            Candidate(codes[choice.context], of_number[choice.perturbation]) for choice in choices
        ]
        widths = _widths(learned, query.context_names, asked, candidates, chosen, confidence_level)
        return pd.DataFrame(
            {
                "group": [query.context_names[c.context] for c in chosen],
                "perturbation": [c.target.name for c in chosen],
                "gain": [choice.gain for choice in choices],
                "half_width_before": [before for before, _ in widths],
                "half_width_after": [after for _, after in widths],
            }
        )

    def _highest(self, name: Any) -> Target:
        """Find a measured perturbation, at its highest dose."""
        known = perturbations_of(self.registry)
        target = known.find(name) if known.knows(name) else None
        if target is None or target.number is None:
            raise ValueError(
                f"{shown(name)} was never measured. Suggestions are of perturbations that were: "
                f"{format_list(self.perturbations)}."
            )
        if self._setup["dose_key"] is None:
            return target
        return target._replace(dose=target.dose_range(self.state.dose_ranges)[1])


def _unmeasured(
    learned: ContextPredictor, contexts: list[int], targets: list[Target]
) -> list[Candidate]:
    """Changes that were not measured in training."""
    evidence = learned.evidence
    measured = set(
        zip(evidence.context.tolist(), evidence.changes.perturbation.tolist(), strict=True)
    )
    return [
        Candidate(code, target)
        for code in contexts
        for target in targets
        if (code, target.number) not in measured
    ]


def _widths(
    learned: ContextPredictor,
    names: Any,
    asked: dict[int, ControlCells],
    candidates: list[Candidate],
    chosen: list[Candidate],
    confidence_level: float,
) -> list[tuple[float, float]]:
    """Mean half-width of the others' intervals before and after each choice."""
    order = np.random.default_rng(0).permutation(len(candidates))
    left = [candidates[i] for i in order]

    def cells(code: int, given: ContextPredictor) -> ControlCells:
        name = names[code]
        known = given.evidence.names
        return asked[code]._replace(number=known.index(name) if name in known else None)

    def width(given: ContextPredictor, some: list[Candidate]) -> float:
        return float(
            np.mean(
                [
                    given.change(cells(c.context, given), c.target).half_width(confidence_level)
                    for c in some
                ]
            )
        )

    widths, given = [], learned
    for choice in track(chosen, "Suggesting", disable=len(chosen) * len(left) < MAX_OTHERS):
        left = [c for c in left if c != choice]
        of = cells(choice.context, given)
        shift = given.change(of, choice.target).mean
        dose = np.nan if choice.target.dose is None else choice.target.dose
        evidence = given.evidence.with_measured(
            names[choice.context], of.pseudobulk, of.cells, choice.target.number, shift, dose
        )
        before, given = given, replace(learned, evidence=evidence)
        some = left[:MAX_OTHERS]
        widths.append((width(before, some), width(given, some)) if some else (np.nan, np.nan))
    return widths
