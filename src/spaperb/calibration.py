"""How far a predicted change may be off: intervals from predictions of measured changes without them.

Each measured change (of at most twenty, at random) is left out in turn and predicted by everything that is left: for contexts
that were never stimulated with all that was measured in its context left out, for others without the one change. With the errors e_sg, the sampling variances v_sg of the measured changes and the
scales of :mod:`spaperb.response`, the error that is not sampling noise is a function of the gene's scale::

    E[e_sg^2] - v_sg = c_0 + c_1 scale_sg^2,    c_0, c_1 >= 0 by least squares, each over scale^2,
    u_sg^2 = v_sg + c_0 + c_1 scale_sg^2,       q = quantile of |e_sg| / u_sg at the level,

where u of each left-out change has c of the others, so that q is what a new context needs. The interval of a new change is
R +- q u. For its v it has the number of control cells in both conditions: it says where an experiment of that size would find the
mean change. Where a change was measured, c_0 + c_1 scale^2 and the measurement's variance combine as independent errors do. A context that is farther
from the training contexts than any of these is from the others gets an interval that is wider in proportion.

References
----------
Lei et al. (2018), Distribution-free predictive inference for regression, Journal of the American Statistical Association 113, 1094-1111.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls
from scvi.utils import track

from spaperb._types import FloatArray
from spaperb.contexts import Profile
from spaperb.perturbations import Target
from spaperb.response import Change, Response, Subject

MAX_LEFT_OUT = 20
"""Changes that are left out: each costs a fit of the response."""
MIN_LEFT_OUT = 3
"""Fewer say nothing of how errors vary from context to context."""
HOMOSCEDASTIC = 0.01
"""Added to scale^2 where squared errors are divided by it."""
FLOOR = 1e-9


@dataclass
class Calibration:
    """Errors of left-out changes, S of them.

    Attributes
    ----------
    errors, variances, scales
        Error, sampling variance of the measured change, and scale, ``(S, G)``.
    """

    errors: FloatArray
    variances: FloatArray
    scales: FloatArray

    @classmethod
    def of(cls, response: Response, whole_contexts: bool) -> Calibration:
        """Leave measured changes out, with a progress bar.

        Parameters
        ----------
        response
            The response of the training contexts.
        whole_contexts
            Whether to leave out the other perturbations of a change's context too.

        Raises
        ------
        ValueError
            If fewer than three can be predicted without them.
        """
        contexts = response.contexts
        # One dose of a perturbation, the highest, stands for all.
        last = {
            (s.context, contexts.treatments[s.treatment].perturbation): s for s in response.samples
        }
        possible = [s for s in last.values() if len(contexts.treatments[s.treatment].paired) > 1]
        if len(possible) < MIN_LEFT_OUT:
            raise ValueError(
                f"Intervals are learned from contexts with a measured change that another context has too, "
                f"and need at least {MIN_LEFT_OUT} of them; there are {len(possible)}."
            )
        if len(possible) > MAX_LEFT_OUT:
            some = np.random.default_rng(0).choice(len(possible), MAX_LEFT_OUT, replace=False)
            possible = [possible[i] for i in np.sort(some)]
        errors, variances, scales = [], [], []
        for sample in track(possible, description="Calibrating"):
            treatment, k = contexts.treatments[sample.treatment], sample.context
            left_out = None if whole_contexts else treatment.perturbation
            without = Response(contexts.without(k, left_out), response.parts, response.singles)
            subject = Subject(contexts.control[k], contexts.cells[k], k)
            target = Target("", treatment.perturbation, (), treatment.dose)
            predicted = without.predict(subject, target)
            errors.append(treatment.shifts[sample.place] - predicted.mean)
            variances.append(treatment.variances[sample.place])
            scales.append(predicted.scale)
        return cls(np.array(errors), np.array(variances), np.array(scales))

    def half_width(
        self, change: Change, control: Profile, quantile: float, distance: float
    ) -> FloatArray:
        """Half of the width of a change's interval, ``(G,)``.

        Parameters
        ----------
        change
            The change.
        control
            Profile of the context's control cells.
        quantile
            q, of :meth:`quantile`.
        distance
            The context's distance over the largest usual one.
        """
        stimulated = change.weights @ np.array([p.variance for p in change.references])
        # Of a gene in none of n cells, one in n + 1 may have it.
        least = 1 / control.n**2
        noise = np.maximum((control.variance + stimulated) / control.n, least)
        error = self._error(self._coefficients(slice(None)), change.scale)
        # Independent errors combine as parallel resistors do; an infinite variance leaves the other.
        error = 1 / (1 / (error + FLOOR) + 1 / np.maximum(change.variance, least))
        return quantile * max(1.0, distance) * np.sqrt(noise + error)

    def quantile(self, level: float) -> float:
        """Q at a level: of the errors over their u, with c of the other changes."""
        every = np.arange(len(self.errors))
        ratios = [
            np.abs(self.errors[s])
            / np.sqrt(
                self.variances[s]
                + self._error(self._coefficients(every != s), self.scales[s])
                + FLOOR
            )
            for s in every
        ]
        return float(np.quantile(ratios, level))

    def _coefficients(self, of: Any) -> FloatArray:
        """c_0 and c_1, ``(2,)``."""
        squares = (self.errors[of] ** 2 - self.variances[of]).ravel()
        scale2 = self.scales[of].ravel() ** 2
        weight = 1 / (scale2 + HOMOSCEDASTIC)
        return nnls(np.column_stack([weight, scale2 * weight]), squares * weight)[0]

    @staticmethod
    def _error(c: FloatArray, scale: FloatArray) -> FloatArray:
        return c[0] + c[1] * scale**2
