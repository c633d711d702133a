"""The mean change of a context that was never stimulated, learned across genes.

A handful of contexts is too few to learn from, but every gene of every context is a sample. Each paired
training context is left out in turn and described, gene by gene, by what the *other* contexts say of it
(their changes, weighted in four ways, and the gene's expression here and there); a regression that all
genes share learns the left-out change from that description. Describing the context in question by all
training contexts and applying the regression predicts it: training imitates the test.

With Delta_s the measured shift of context s, v_s its sampling variance, w_s = n_s / (n_s + 30) its weight,
phi_a(s) what anchor a says of s without s, and f(s) all of its features (see :func:`describe`)::

    a*     = argmin_{a >= 0} sum_s w_s |Delta_s - sum_a a_a phi_a(s)|^2 + lambda |a - rho / 4|^2
    t_s    = (Delta_s - sum_a a*_a phi_a(s)) / scale(s)
    R(q)   = sum_a a*_a phi_a(q) + scale(q) * forest(f(q) / scale(q)),     forest: f(s) / scale(s) -> t_s

rho is the share of the shifts' squares that sampling noise does not explain, so that noise is pulled to "no
change", and below a tenth is it. The forest's leaves grow with the noise of t, and where less than three tenths of
t is more than noise there is none. A context whose shift was measured keeps it as far as it
was measured well, R = prior + tau^2 / (tau^2 + v) (Delta - prior), with the anchors' leave-one-out value as prior.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.special import softmax
from sklearn.ensemble import ExtraTreesRegressor

from spaperb._types import FloatArray, IntArray
from spaperb.contexts import Contexts, Profile

ANCHORS = ("neighbour_shift", "similarity_shift", "mean_shift", "precise_shift")
TEMPERATURE = 0.03
"""Of the softmax over correlations of control profiles, as in the baseline ``similarity_shift``."""
PULL = 0.5
"""lambda, in units of the anchors' mean square."""
MIN_RELIABILITY = 0.1
"""Shifts of less are taken for noise."""
MIN_LEARNABLE = 0.3
"""Where less of what the anchors leave is more than noise, a forest learns the noise."""
HALF_WEIGHT = 30
"""Cells in the smaller condition that give a context half of the greatest weight."""
N_TREES = 100
LEAF = 10
"""Samples in a leaf of the forest at least; more where the samples are noisy."""
SCALE_FLOOR = 0.05
LOG_FLOOR = 0.05
MAX_SAMPLES = 200_000


class Description(NamedTuple):
    """What other contexts say of one context's change."""

    anchors: FloatArray
    """Four estimates of the change, ``(G, 4)``: :data:`ANCHORS`."""
    features: FloatArray
    """All features, in log-normalised units, ``(G, F)``."""
    scale: FloatArray
    """Largest change of each gene in the other contexts, ``(G,)``."""
    weights: FloatArray
    """Weight of each of the other contexts by nearness of cells, ``(len(others),)``."""


def describe(
    contexts: Contexts, others: IntArray, profile: Profile, cells: FloatArray
) -> Description:
    """Describe a context by the measured shifts of others.

    Parameters
    ----------
    contexts
        The training contexts.
    others
        Numbers of the paired contexts that may be used.
    profile
        Profile of the context's control cells.
    cells
        Components of its control cells, ``(n, n_components)``.
    """
    shifts, variances = contexts.shifts[others], contexts.shift_variances[others]
    control = np.array([contexts.control[k].mean for k in others])
    stimulated = np.array([contexts.stimulated[k].mean for k in others])
    near = contexts.neighbours(cells, others)
    alike = softmax([_correlation(profile.mean, mean) / TEMPERATURE for mean in control])
    precise = 1 / (variances + 1e-3)
    anchors = np.column_stack(
        [near @ shifts, alike @ shifts, shifts.mean(0), (precise * shifts).sum(0) / precise.sum(0)]
    )
    # Means below 0 (scaled data) have no logarithm and count as not expressed.
    log_control, log_stimulated = (
        np.log(np.maximum(x, 0) + LOG_FLOOR) for x in (control, stimulated)
    )
    fold_change = near @ (log_stimulated - log_control)
    features = [
        shifts.min(0),
        shifts.max(0),
        profile.mean,
        profile.detection,
        near @ control,
        control.mean(0),
        near @ stimulated,
        fold_change,
        np.sqrt(near @ variances),
    ]
    scale = np.abs(shifts).max(0) + SCALE_FLOOR
    return Description(anchors, np.column_stack([anchors[:, :3], *features]), scale, near)


class Response:
    """Predict the mean change of contexts, measured or not.

    Parameters
    ----------
    contexts
        The training contexts.
    """

    def __init__(self, contexts: Contexts):
        self.contexts = contexts
        paired = np.arange(contexts.n_paired)
        self.shifts, self.variances = contexts.shifts, contexts.shift_variances
        n = np.array(
            [min(c.n, s.n) for c, s in zip(contexts.control, contexts.stimulated, strict=False)]
        )
        self.weights = n / (n + HALF_WEIGHT)
        # With a single paired context there is nothing to learn from but the shift itself.
        self.left_out = [
            describe(contexts, paired[paired != k], contexts.control[k], contexts.cells[k])
            for k in paired
            if len(paired) > 1
        ]

    @cached_property
    def anchor_weights(self) -> FloatArray:
        """a*, the weights of the four anchors, ``(4,)``."""
        reliability = self._reliability(self.shifts)
        if reliability < MIN_RELIABILITY:
            return np.zeros(len(ANCHORS))
        target = np.full(len(ANCHORS), reliability / len(ANCHORS))
        if not self.left_out:
            return target
        root = np.sqrt(self.weights)
        m = np.concatenate([r * d.anchors for r, d in zip(root, self.left_out, strict=True)])
        y = np.concatenate([r * shift for r, shift in zip(root, self.shifts, strict=True)])
        pull = np.sqrt(PULL * max((m**2).sum(), 1e-12) / len(ANCHORS))
        m = np.concatenate([m, pull * np.eye(len(ANCHORS))])
        return nnls(m, np.concatenate([y, pull * target]))[0]

    @cached_property
    def forest(self) -> ExtraTreesRegressor | None:
        """Regression of the anchors' scaled error, ``None`` where there is nothing to learn."""
        if not self.left_out:
            return None
        errors = self.shifts - self._priors
        reliability = self._reliability(errors)
        if reliability < MIN_LEARNABLE:
            return None
        leaf = LEAF * max(1.0, (1 - reliability) / reliability)
        scale = np.array([d.scale for d in self.left_out])
        x = np.concatenate([self._inputs(d) for d in self.left_out])
        y, weight = (errors / scale).ravel(), (self.weights[:, None] * scale**2).ravel()
        if len(y) > MAX_SAMPLES:
            some = np.random.default_rng(0).choice(len(y), MAX_SAMPLES, replace=False)
            x, y, weight = x[some], y[some], weight[some]
        forest = ExtraTreesRegressor(
            N_TREES,
            min_samples_leaf=int(min(leaf, max(1, len(y) // 2))),
            max_features=0.7,
            random_state=0,
        )
        return forest.fit(x, y, weight)

    def predict(self, profile: Profile, cells: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Predict the change of a context whose change was not measured, R.

        Parameters
        ----------
        profile
            Profile of its control cells.
        cells
            Components of its control cells, ``(n, n_components)``.

        Returns
        -------
        The mean change, ``(G,)``, and the weights of the paired contexts by nearness, ``(P,)``.
        """
        paired = np.arange(self.contexts.n_paired)
        description = describe(self.contexts, paired, profile, cells)
        change = description.anchors @ self.anchor_weights
        if self.forest is not None:
            change += description.scale * self.forest.predict(self._inputs(description))
        return change, description.weights

    def measured(self, k: int) -> tuple[FloatArray, FloatArray]:
        """Improve the measured change of paired context ``k`` by what the others say of it.

        Returns
        -------
        The mean change, ``(G,)``, and for each gene how far the measurement is trusted, in [0, 1].
        """
        if not self.left_out:
            return self.shifts[k], np.ones_like(self.shifts[k])
        scale = np.array([d.scale for d in self.left_out])
        squares = (self.shifts - self._priors) ** 2 - self.variances
        w = self.weights[:, None]
        tau2 = scale[k] ** 2 * max((w * squares).sum() / (w * scale**2).sum(), 0.0)
        trust = tau2 / np.maximum(tau2 + self.variances[k], 1e-12)
        return self._priors[k] + trust * (self.shifts[k] - self._priors[k]), trust

    @cached_property
    def _priors(self) -> FloatArray:
        """What the anchors say of each paired context without it, ``(P, G)``."""
        return np.array([d.anchors @ self.anchor_weights for d in self.left_out])

    def _inputs(self, description: Description) -> FloatArray:
        """Features over the gene's scale, so that one regression serves weak and strong genes."""
        anchor = description.anchors @ self.anchor_weights
        features = np.column_stack([description.features, anchor])
        return np.column_stack([features / description.scale[:, None], description.scale])

    def _reliability(self, values: FloatArray) -> float:
        """Share of the squares of ``values`` ``(P, G)`` that sampling noise does not explain."""
        w = self.weights[:, None]
        return max(0.0, 1 - (w * self.variances).sum() / max((w * values**2).sum(), 1e-12))


def _correlation(a: FloatArray, b: FloatArray) -> float:
    """Pearson correlation, 0 where one of both is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float(a @ b / norm) if norm > 0 else 0.0
