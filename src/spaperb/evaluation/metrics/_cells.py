"""Predicted against real cells as populations: distances, spread, zeros, genes together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from spaperb._types import Expression, FloatArray, IntArray
from spaperb.evaluation.metrics._changes import correlation
from spaperb.populations import (
    blocks,
    dense,
    mean_expression,
    mean_of_pairs,
    median_distance,
    variance,
    zero_fraction,
)

N_FOLDS = 5
EXPRESSED_MEAN = 0.05


def energy_distance(predicted: npt.NDArray, real: npt.NDArray) -> float:
    """Energy distance ``2 E|P - S| - E|P - P'| - E|S - S'|`` with Euclidean norms, at least 0.

    The expectations are means over all pairs of cells, a cell with itself included, so that the
    distance of a population to itself is 0. Unlike the squared :func:`e_distance` it sees a wrong
    variance.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, n_dims)``; :func:`evaluate` gives 50 PCs.
    real
        Real stimulated cells, ``(n_real, n_dims)``.

    References
    ----------
    Szekely and Rizzo (2013), Journal of Statistical Planning and Inference 143, 1249-1272.
    """
    between = mean_of_pairs(predicted, real, _identity)
    within = mean_of_pairs(predicted, predicted, _identity) + mean_of_pairs(real, real, _identity)
    return 2 * between - within


def e_distance(predicted: npt.NDArray, real: npt.NDArray) -> float:
    """The field's "E-distance": the energy distance with squared norms.

    With squared Euclidean norms the variances cancel, and only the means are compared.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, n_dims)``.
    real
        Real stimulated cells, ``(n_real, n_dims)``.

    References
    ----------
    Peidli et al. (2024), scPerturb, Nature Methods 21, 531-540.
    """
    return float(2 * np.sum((mean_expression(predicted) - mean_expression(real)) ** 2))


def mmd(predicted: npt.NDArray, real: npt.NDArray, control: npt.NDArray) -> float:
    """Squared maximum mean discrepancy with an RBF kernel, ``E k(P,P') + E k(S,S') - 2 E k(P,S)``.

    The kernel is ``exp(-|a - b|^2 / (2 h^2))``, averaged over the bandwidths m / 2, m and 2 m,
    where m is the median distance between real and control cells: the same kernel for every
    method.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, n_dims)``; :func:`evaluate` gives 50 PCs.
    real
        Real stimulated cells, ``(n_real, n_dims)``.
    control
        Control cells, ``(n_control, n_dims)``.

    References
    ----------
    Gretton et al. (2012), Journal of Machine Learning Research 13, 723-773.
    """
    m = median_distance(real, control)
    if m == 0:
        raise ValueError("Real and control cells are all the same: no bandwidth fits them.")

    def kernel(distances: FloatArray) -> FloatArray:
        # The kernel of bandwidth m is that of 2 m to the power of 4, and that of m / 2 to 16.
        wide = np.exp(distances**2 * (-1 / (2 * (2 * m) ** 2)))
        middle = np.square(np.square(wide))
        return (wide + middle + np.square(np.square(middle))) / 3

    within = mean_of_pairs(predicted, predicted, kernel) + mean_of_pairs(real, real, kernel)
    return within - 2 * mean_of_pairs(predicted, real, kernel)


def wasserstein(predicted: Expression, real: Expression) -> float:
    """Mean over genes of the Wasserstein distance between predicted and real expression.

    The first Wasserstein distance of each gene by itself: the mean absolute difference of the two
    quantile functions, in log-normalised units.
    """
    n, m = predicted.shape[0], real.shape[0]
    # Both quantile functions are constant between these shares of the cells.
    steps = np.union1d(np.arange(n + 1) / n, np.arange(m + 1) / m)
    middles, widths = (steps[1:] + steps[:-1]) / 2, np.diff(steps)
    of_predicted, of_real = (middles * n).astype(int), (middles * m).astype(int)
    total = 0.0
    for genes in blocks(predicted.shape[1], len(middles)):
        p, s = (np.sort(dense(x[:, genes]).astype(np.float64), axis=0) for x in (predicted, real))
        total += (widths @ np.abs(p[of_predicted] - s[of_real])).sum()
    return float(total / predicted.shape[1])


def r2_var(predicted: Expression, real: Expression) -> float:
    """Squared correlation over genes of predicted and real variances, in [0, 1]."""
    return correlation(variance(predicted), variance(real)) ** 2


def variance_ratio(predicted: Expression, real: Expression) -> float:
    """Median over expressed genes of var(predicted) / var(real); 1 is right.

    Expressed genes are those whose real mean is above 0.05 log-normalised units and whose real
    variance is not 0; NaN if there is none.
    """
    real_variance = variance(real)
    expressed = (mean_expression(real) > EXPRESSED_MEAN) & (real_variance > 0)
    if not expressed.any():
        return float("nan")
    return float(np.median(variance(predicted)[expressed] / real_variance[expressed]))


def zero_fraction_error(predicted: Expression, real: Expression) -> float:
    """Mean over genes of the absolute difference in the fraction of zeros, in [0, 1]."""
    return float(np.mean(np.abs(zero_fraction(predicted) - zero_fraction(real))))


def correlation_error(predicted: Expression, real: Expression, genes: IntArray) -> float:
    """Mean absolute error of the correlations of genes with each other, in [0, 2].

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``.
    real
        Real stimulated cells, ``(n_real, G)``.
    genes
        Columns to judge, the top DEGs say. A gene that is the same in all cells correlates with
        none.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        of_predicted, of_real = (
            np.nan_to_num(np.corrcoef(dense(x[:, genes]).astype(np.float64), rowvar=False))
            for x in (predicted, real)
        )
    pairs = np.triu_indices(len(genes), 1)
    return float(np.abs(of_predicted - of_real)[pairs].mean())


def classifier_auc(predicted: npt.NDArray, real: npt.NDArray, seed: int = 0) -> float:
    """How well a classifier tells predicted from real cells: 0.5 not at all, 1 always.

    Logistic regression on standardised components, in five-fold cross-validation.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, n_dims)``: 50 PCs, say.
    real
        Real stimulated cells, ``(n_real, n_dims)``.
    seed
        Seed of the folds.
    """
    x = np.concatenate([predicted, real])
    y = np.repeat([0, 1], [len(predicted), len(real)])
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed)
    p = cross_val_predict(classifier, x, y, cv=folds, method="predict_proba")[:, 1]
    return float(roc_auc_score(y, p))


def _identity(distances: FloatArray) -> FloatArray:
    return distances
