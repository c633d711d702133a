"""How far a predicted change may be off: intervals from changes that were held out of training.

Each network predicts, mixed with the pretrained ones, the measured changes that it did not learn
from, asked of a third of their contexts' control cells and measured in the others. With the errors
e_sg of the genes that some cell expresses, the sampling variances v_sg of the measured changes,
and the error scale sigma_sg of the networks::

    u_sg^2 = v_sg + sigma_sg^2,    q(c) = quantile of |e_sg| / u_sg at the confidence level,

in each tenth of the genes by their scale c. The interval of a new change is its mean +- q u, where
v is that of an experiment with as many stimulated cells as there are control cells. Where nothing
was held out, q is that of the normal distribution. With several perturbations held-out changes are
predicted twice: from all other evidence, and without what was measured in their contexts, for
queries in whose context nothing was measured. A context that is farther from the training contexts
than any of these is from the others gets an interval that is wider in proportion.

References
----------
Lei et al. (2018), Distribution-free predictive inference for regression, Journal of the American
Statistical Association 113, 1094-1111.

Vovk (2012), Conditional validity of inductive conformal predictors, Proceedings of Machine
Learning Research 25, 475-490.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from spaperb._types import FloatArray
from spaperb.module import HeldOut, InContextModule
from spaperb.populations import Pseudobulk

N_STRATA = 10
MIN_STRATUM = 50
"""Genes of held-out changes in a stratum at least, unless there is only one."""
LEVELS = np.linspace(0, 1, 201)
"""Confidence levels whose quantiles are kept."""
FLOOR = 1e-9


class Intervals(NamedTuple):
    """Ratios of held-out errors to their expected size.

    Attributes
    ----------
    scales
        Median scale c of the genes of each stratum, ``(n_strata,)``; empty if nothing was held
        out.
    ratios
        Quantiles of ``|e| / u`` in each, ``(n_strata, 201)``.
    """

    scales: FloatArray
    ratios: FloatArray

    @classmethod
    def of(cls, held_out: Sequence[HeldOut], module: InContextModule) -> Intervals:
        """Compare held-out changes with what is predicted of them."""
        ratios: list[FloatArray] = [np.empty(0)]
        scales: list[FloatArray] = [np.empty(0)]
        for episode, trained, pretrained in held_out:
            predicted = module.mix(trained, pretrained)
            u = np.sqrt(predicted.sigma**2 + episode.error**2 + FLOOR)
            # Genes that no cell expresses are predicted without an error.
            some = episode.is_expressed
            ratios.append((np.abs(predicted.mean - episode.target) / u)[some])
            scales.append(episode.description.scale[some])
        ratio, scale = np.concatenate(ratios), np.concatenate(scales)
        if not ratio.size:
            return cls(np.empty(0), np.empty((0, len(LEVELS))))
        n_strata = int(np.clip(scale.size // MIN_STRATUM, 1, N_STRATA))
        strata = np.array_split(np.argsort(scale, kind="stable"), n_strata)
        return cls(
            np.array([np.median(scale[genes]) for genes in strata]),
            np.array([np.quantile(ratio[genes], LEVELS) for genes in strata]),
        )

    def half_width(
        self,
        sigma: FloatArray,
        scale: FloatArray,
        control: Pseudobulk,
        stimulated: list[Pseudobulk],
        weights: FloatArray,
        confidence_level: float,
    ) -> FloatArray:
        """Half of the width of a change's interval, ``(G,)``.

        Parameters
        ----------
        sigma, scale
            Error scale and scale of the change, ``(G,)``.
        control
            Pseudobulk of the context's control cells.
        stimulated, weights
            Stimulated populations that it resembles, and how much.
        confidence_level
            Of the interval, in (0, 1).
        """
        after = weights @ np.array([p.variance for p in stimulated])
        least = _least([control, *stimulated], control.n)
        noise = np.maximum((control.variance + after) / control.n, least)
        q = np.full(len(sigma), ndtri((1 + confidence_level) / 2))
        if len(self.scales):
            of_strata = [np.interp(confidence_level, LEVELS, ratios) for ratios in self.ratios]
            q = np.interp(scale, self.scales, of_strata)
        return q * np.sqrt(noise + sigma**2 + FLOOR)


def _least(pseudobulks: list[Pseudobulk], n: int) -> FloatArray:
    """Least sampling variance of a mean over n cells, ``(G,)``.

    As if one cell in n expressed the gene, at the mean of expressing cells, or 1 without any.
    """
    mean, detection = np.sum([(p.mean, p.detection) for p in pseudobulks], axis=0)
    return (np.divide(mean, detection, where=detection > 0, out=np.ones_like(mean)) / n) ** 2
