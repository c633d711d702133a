"""How far a predicted change may be off: intervals from predictions of measured changes without them.

Each measured change (of at most twenty, at random) is left out in turn and predicted by everything that is left: for contexts
that were never stimulated with all that was measured in its context left out, for others without the one change, and for combinations
that were never measured, but whose parts were, without one such combination. With the errors e_sg of the genes that some cell expresses, the sampling
variances v_sg of the measured changes, the variances of their cells sigma_sg^2 = n_s v_sg, and the scales of :mod:`spaperb.response`::

    u_sg^2 = v_sg + c_0 sigma_sg^2 + c_1 scale_sg^2,    c_0, c_1 >= 0 with the greatest likelihood of e ~ N(0, u^2),
    q(scale) = quantile of |e_sg| / u_sg at the level, in each tenth of the genes by scale,

where u of each left-out change has c of the others, so that q is what a new context needs. Errors have longer tails where
changes are large, and a q of their own lets intervals hold as often there as elsewhere. The interval of a new change is
R +- q u. For its v it has the number of control cells in both conditions: it says where an experiment of that size would find the
mean change. Where a change was measured and is trusted by t, c_0 sigma^2 + c_1 scale^2 counts by (1 - t)^2 and the measurement's variance by t^2. A context that is farther
from the training contexts than any of these is from the others gets an interval that is wider in proportion.

References
----------
Lei et al. (2018), Distribution-free predictive inference for regression, Journal of the American Statistical Association 113, 1094-1111.

Vovk (2012), Conditional validity of inductive conformal predictors, Proceedings of Machine Learning Research 25, 475-490.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls
from scvi.utils import track

from spaperb._types import FloatArray, IntArray
from spaperb.perturbations import Target
from spaperb.populations import Profile
from spaperb.response import Change, Response, Sample, Situation, Subject

MAX_LEFT_OUT = 20
"""Changes that are left out: each costs a fit of the response."""
MIN_LEFT_OUT = 3
"""Fewer say nothing of how errors vary from context to context."""
N_STRATA = 10
MIN_STRATUM = 50
"""Genes of left-out changes in a stratum at least, unless there is only one."""
N_ROUNDS = 20
"""Least squares whose weights are those of the round before; the likelihood no longer changes after ten."""
FLOOR = 1e-9


class Intervals(NamedTuple):
    """What makes intervals of one level: c, ``(2,)``, and q at some scales, ``(n_strata,)`` each."""

    coefficients: FloatArray
    scales: FloatArray
    quantiles: FloatArray

    def half_width(self, change: Change, control: Profile, distance: float) -> FloatArray:
        """Half of the width of a change's interval, ``(G,)``.

        Parameters
        ----------
        change
            The change.
        control
            Profile of the context's control cells.
        distance
            The context's distance over the largest usual one.
        """
        stimulated = change.weights @ np.array([p.variance for p in change.references])
        least = _least([control, *change.references], control.n)
        noise = np.maximum((control.variance + stimulated) / control.n, least)
        error = _basis(noise * control.n, change.scale) @ self.coefficients
        error = change.unmeasured * error + change.noise + FLOOR
        q = np.interp(change.scale, self.scales, self.quantiles)
        return q * max(1.0, distance) * np.sqrt(noise + error)


def calibrate(response: Response) -> dict[Situation, Calibration]:
    """Calibrate each situation that at least three measured changes can be put into, with a progress bar.

    Raises
    ------
    ValueError
        If not even contexts in which nothing was measured are one of them.
    """
    contexts = response.contexts
    # One dose of a perturbation, the highest, stands for all.
    last = {
        (s.context, contexts.treatments[s.treatment].perturbation): s for s in response.samples
    }
    shared = [s for s in last.values() if len(contexts.treatments[s.treatment].paired) > 1]
    if len(shared) < MIN_LEFT_OUT:
        raise ValueError(
            f"Intervals are learned from contexts with a measured change that another context has too, "
            f"and need at least {MIN_LEFT_OUT} of them; there are {len(shared)}."
        )
    calibrations: dict[Situation, Calibration] = {
        "alone": Calibration.of(response, shared, "alone")
    }
    is_single = len({t.perturbation for t in contexts.treatments}) == 1
    calibrations["beside"] = (
        calibrations["alone"] if is_single else Calibration.of(response, shared, "beside")
    )
    composed = [s for s in last.values() if response.is_composed(s)]
    if len(composed) >= MIN_LEFT_OUT:
        calibrations["combined"] = Calibration.of(response, composed, "combined")
    return calibrations


@dataclass
class Calibration:
    """Errors of left-out changes, S of them.

    Attributes
    ----------
    errors, variances, scales
        Error, sampling variance of the measured change, and scale, ``(S, G)``.
    sizes
        Cells in the smaller condition of each, ``(S,)``.
    """

    errors: FloatArray
    variances: FloatArray
    scales: FloatArray
    sizes: IntArray

    @classmethod
    def of(cls, response: Response, samples: list[Sample], situation: Situation) -> Calibration:
        """Leave measured changes out, of more than twenty as many at random, with a progress bar.

        Parameters
        ----------
        response
            The response of the training contexts.
        samples
            The changes.
        situation
            What is left in their contexts when they are predicted.
        """
        contexts = response.contexts
        if len(samples) > MAX_LEFT_OUT:
            some = np.random.default_rng(0).choice(len(samples), MAX_LEFT_OUT, replace=False)
            samples = [samples[i] for i in np.sort(some)]
        errors, variances, scales, sizes = [], [], [], []
        for sample in track(samples, description="Calibrating"):
            treatment, k = contexts.treatments[sample.treatment], sample.context
            left_out = None if situation == "alone" else treatment.perturbation
            without = response.without(k, left_out)
            subject = Subject(contexts.control[k], contexts.cells[k], k)
            parts = response.parts[treatment.perturbation]
            number = None if situation == "combined" else treatment.perturbation
            predicted = without.predict(subject, Target("", number, parts, treatment.dose))
            errors.append(treatment.shifts[sample.place] - predicted.mean)
            variances.append(treatment.variances[sample.place])
            scales.append(predicted.scale)
            sizes.append(treatment.n[sample.place])
        return cls(*map(np.array, (errors, variances, scales, sizes)))

    def intervals(self, level: float) -> Intervals:
        """Intervals of a level: c of all changes; q of the errors over their u, with c of the other changes, by scale."""
        expressed = self._expressed
        ratios, scales = [], []
        for s, genes in enumerate(expressed):
            others = expressed & (np.arange(len(expressed)) != s)[:, None]
            basis = _basis(self.sizes[s] * self.variances[s], self.scales[s])
            u2 = self.variances[s] + basis @ self._coefficients(others) + FLOOR
            ratios.append((np.abs(self.errors[s]) / np.sqrt(u2))[genes])
            scales.append(self.scales[s][genes])
        ratio, scale = np.concatenate(ratios), np.concatenate(scales)
        n_strata = int(np.clip(scale.size // MIN_STRATUM, 1, N_STRATA))
        strata = np.array_split(np.argsort(scale, kind="stable"), n_strata)
        return Intervals(
            self._coefficients(expressed),
            np.array([np.median(scale[genes]) for genes in strata]),
            np.array([np.quantile(ratio[genes], level) for genes in strata]),
        )

    @property
    def _expressed(self) -> npt.NDArray[np.bool_]:
        """Genes that some cell of each change expresses, ``(S, G)``; all if none does.

        The others are predicted without an error, and would make all seem as sure.
        """
        expressed = self.variances > 0
        return expressed if expressed.any() else ~expressed

    def _coefficients(self, of: npt.NDArray[np.bool_]) -> FloatArray:
        """c_0 and c_1 of some genes, ``(2,)``, by Fisher scoring: least squares of e^2 - v, each over u^2 of the round before."""
        variance = self.variances[of] + FLOOR
        squares = self.errors[of] ** 2 - variance
        basis = _basis((self.sizes[:, None] * self.variances)[of], self.scales[of])
        c = np.array([0.0, 1.0])
        for _ in range(N_ROUNDS):
            u2 = variance + basis @ c
            c = nnls(basis / u2[:, None], squares / u2)[0]
        return c


def _basis(of_cells: FloatArray, scale: FloatArray) -> FloatArray:
    """What the error that is not sampling noise is made of: variance of cells and squared scale, ``(G, 2)``."""
    return np.column_stack([of_cells, scale**2])


def _least(profiles: list[Profile], n: int) -> FloatArray:
    """Least sampling variance of each gene's mean over n cells, ``(G,)``: in none of them, it may be in one of n + 1, at its usual level."""
    mean, detection = np.sum([(p.mean, p.detection) for p in profiles], axis=0)
    return (np.divide(mean, detection, where=detection > 0, out=np.ones_like(mean)) / n) ** 2
