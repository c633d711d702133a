"""The mean change of each gene: direction, size, fold change.

The predicted change is mean(predicted) - mean(control). The real change is mean(real) -
mean(control_real): with other control cells, the sampling noise of the control cells is not in
both.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from scipy.stats import pearsonr
from sklearn.metrics import r2_score

from spaperb._types import Expression, FloatArray, IntArray
from spaperb.populations import mean_expression

PSEUDOCOUNT = 1e-2
"""Added to mean expression before its logarithm, in counts of 10,000: a hundredth of a count."""


class Changes(NamedTuple):
    """Predicted and real mean change of each gene, ``(G,)``."""

    predicted: FloatArray
    real: FloatArray

    @classmethod
    def of(
        cls,
        predicted: Expression,
        real: Expression,
        control: Expression,
        control_real: Expression | None = None,
    ) -> Self:
        """Measure them; arguments as for :func:`pearson_delta`."""
        before = mean_expression(control)
        before_real = before if control_real is None else mean_expression(control_real)
        return cls(mean_expression(predicted) - before, mean_expression(real) - before_real)


def pearson_delta(
    predicted: Expression,
    real: Expression,
    control: Expression,
    genes: IntArray | None = None,
    control_real: Expression | None = None,
) -> float:
    """Pearson correlation over genes of the predicted with the real mean change.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``.
    real
        Real stimulated cells, ``(n_real, G)``.
    control
        Control cells that were predicted from, ``(n_control, G)``.
    genes
        Columns to correlate over; ``None`` for all.
    control_real
        Control cells that the real change is measured from, ``(n_control_real, G)``: others than
        ``control``, or their sampling noise is in both changes and correlates with itself.
        ``None`` for ``control``.

    Returns
    -------
    float
        Correlation in [-1, 1]; 0 where one of the changes is the same for every gene, as for "no
        change".

    References
    ----------
    Nicol, Shivakumar and Irizarry (2026), bioRxiv 2026.05.07.723486, on control cells that are
    used twice.
    """
    changes = Changes.of(predicted, real, control, control_real)
    chosen = slice(None) if genes is None else genes
    return correlation(changes.predicted[chosen], changes.real[chosen])


def r2_mean(predicted: Expression, real: Expression) -> float:
    """Squared Pearson correlation over genes of the predicted with the real means, in [0, 1].

    Every paper reports it and it tells little: means of control cells correlate well too.
    """
    return correlation(mean_expression(predicted), mean_expression(real)) ** 2


def mse_mean(predicted: Expression, real: Expression) -> float:
    """Mean over genes of (mean(predicted) - mean(real))^2, in squared log-normalised units."""
    return float(np.mean((mean_expression(predicted) - mean_expression(real)) ** 2))


def weighted_mse(predicted: Expression, real: Expression, weights: FloatArray) -> float:
    """Mean over genes of (mean(predicted) - mean(real))^2, weighted: WMSE.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``.
    real
        Real stimulated cells, ``(n_real, G)``.
    weights
        Weight of each gene, ``(G,)``: :func:`gene_weights`.

    References
    ----------
    Mejia et al. (2025), Diversity by design, arXiv 2506.22641.
    """
    squares = (mean_expression(predicted) - mean_expression(real)) ** 2
    return float(np.average(squares, weights=weights))


def weighted_r2_delta(changes: Changes, weights: FloatArray) -> float:
    """Coefficient of determination of the mean change over genes, weighted; at most 1.

    1 - sum w (real - predicted)^2 / sum w (real - mean_w(real))^2. Unlike a correlation it sees a
    change of the wrong size. Changes are from the control cells; the authors take them from the
    mean over perturbations (:func:`pearson_delta_specific` asks for that).

    Parameters
    ----------
    changes
        Predicted and real mean changes.
    weights
        Weight of each gene, ``(G,)``: :func:`gene_weights`.

    References
    ----------
    Mejia et al. (2025), Diversity by design, arXiv 2506.22641.
    """
    return float(r2_score(changes.real, changes.predicted, sample_weight=weights))


def log_fold_change_error(
    predicted: Expression,
    real: Expression,
    control: Expression,
    genes: IntArray,
    control_real: Expression | None = None,
) -> float:
    """Mean over genes of the absolute error of the log2 fold change.

    Fold changes are of mean expression, transformed back from ``log1p`` as scanpy does, plus a
    hundredth of a count of 10,000: without it a gene that nothing expresses has any fold change.

    Parameters
    ----------
    predicted, real, control, control_real
        As for :func:`pearson_delta`.
    genes
        Columns to judge, the real DEGs say.

    Returns
    -------
    float
        NaN without genes, and where mean expression is negative: scaled data have no fold change.
    """
    control_real = control if control_real is None else control_real
    means = np.array([mean_expression(x)[genes] for x in (predicted, control, real, control_real)])
    if not means.size or means.min() < 0:
        return float("nan")
    after, before, real_after, real_before = np.log2(np.expm1(means) + PSEUDOCOUNT)
    return float(np.mean(np.abs((after - before) - (real_after - real_before))))


def correlation(a: FloatArray, b: FloatArray) -> float:
    """Pearson correlation; 0 where one of them is constant."""
    # Changes this small are rounding of single-precision expression: their correlation is noise.
    if min(np.ptp(a), np.ptp(b)) < 1e-6:
        return 0.0
    return float(pearsonr(a, b).statistic)
