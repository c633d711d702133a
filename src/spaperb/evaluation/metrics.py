"""How close predicted cells come to real ones, for any model.

Every score is a function of plain arrays, cells by genes: ``predicted`` and ``real`` stimulated
cells and ``control`` cells, all log-normalised. Arrays may be dense or sparse, of any precision;
sums run in double precision and over blocks, so that memory stays small next to the arrays
themselves.

:func:`evaluate` computes them, but for :func:`coverage` (of intervals) and
:func:`classifier_auc` (slow), between a floor ("no change": the control cells as they are)
and a ceiling (one random half of the real cells scored against the other half).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse
from scipy.stats import pearsonr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from spaperb._types import Expression, FloatArray, IntArray
from spaperb.populations import (
    Projection,
    mean_expression,
    mean_of_pairs,
    median_distance,
    project,
    variance,
    wilcoxon_scores,
    zero_fraction,
)

N_DEGS = 100
N_SPLITS = 20
N_FOLDS = 5
EXPRESSED_MEAN = 0.05
HIGHER_IS_BETTER = {
    "pearson_delta": True,
    "pearson_delta_degs": True,
    "r2_mean": True,
    "r2_var": True,
    "mse_mean": False,
    "energy_distance": False,
    "e_distance": False,
    "mmd": False,
    "variance_ratio": None,
    "zero_fraction_error": False,
    "deg_overlap": True,
    "sign_accuracy": True,
}
"""The metrics of :func:`evaluate` and which direction is better; ``None``: best at 1."""


def pearson_delta(
    predicted: Expression, real: Expression, control: Expression, genes: IntArray | None = None
) -> float:
    """Pearson correlation over genes of the predicted with the real mean change.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``.
    real
        Real stimulated cells, ``(n_real, G)``.
    control
        Control cells, ``(n_control, G)``.
    genes
        Columns to correlate over; ``None`` for all.

    Returns
    -------
    float
        Correlation of mean(predicted) - mean(control) with mean(real) - mean(control), in [-1, 1];
        0 where one of the changes is the same for every gene, as for "no change".
    """
    mean_control = mean_expression(control)
    chosen = slice(None) if genes is None else genes
    return _correlation(
        (mean_expression(predicted) - mean_control)[chosen],
        (mean_expression(real) - mean_control)[chosen],
    )


def r2_mean(predicted: Expression, real: Expression) -> float:
    """Squared Pearson correlation over genes of the predicted with the real means, in [0, 1].

    Every paper reports it and it tells little: means of control cells correlate well too.
    """
    return _correlation(mean_expression(predicted), mean_expression(real)) ** 2


def r2_var(predicted: Expression, real: Expression) -> float:
    """Squared correlation over genes of predicted and real variances, in [0, 1]."""
    return _correlation(variance(predicted), variance(real)) ** 2


def mse_mean(predicted: Expression, real: Expression) -> float:
    """Mean over genes of (mean(predicted) - mean(real))^2, in squared log-normalised units."""
    return float(np.mean((mean_expression(predicted) - mean_expression(real)) ** 2))


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


def deg_overlap(scores_predicted: FloatArray, scores_real: FloatArray, n: int = N_DEGS) -> float:
    """Fraction of the top real genes found again among the top predicted ones, in [0, 1].

    Parameters
    ----------
    scores_predicted
        :func:`~spaperb.populations.wilcoxon_scores` of predicted against control cells, ``(G,)``.
    scores_real
        :func:`~spaperb.populations.wilcoxon_scores` of real against control cells, ``(G,)``.
    n
        Number of top genes, in both directions.
    """
    real = top_genes(scores_real, n)
    return len(np.intersect1d(top_genes(scores_predicted, n), real)) / len(real)


def sign_accuracy(
    predicted: Expression, real: Expression, control: Expression, genes: IntArray
) -> float:
    """Fraction of genes whose predicted mean changes in the direction of the real mean, in [0, 1].

    A predicted change of exactly 0 is counted as wrong.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``.
    real
        Real stimulated cells, ``(n_real, G)``.
    control
        Control cells, ``(n_control, G)``.
    genes
        Columns to judge, the top DEGs say.
    """
    mean_control = mean_expression(control)
    change = mean_expression(predicted) - mean_control
    real_change = mean_expression(real) - mean_control
    return float(np.mean((np.sign(change) == np.sign(real_change))[genes]))


def coverage(
    lower: npt.NDArray, upper: npt.NDArray, real: Expression, control: Expression
) -> float:
    """Fraction of genes whose real mean change lies in the predicted interval, in [0, 1].

    Parameters
    ----------
    lower, upper
        Ends of each gene's predicted interval of the mean change, ``(G,)``; a 90 % interval should
        give 0.9.
    real
        Real stimulated cells, ``(n_real, G)``.
    control
        Control cells, ``(n_control, G)``.
    """
    change = mean_expression(real) - mean_expression(control)
    return float(np.mean((np.asarray(lower) <= change) & (change <= np.asarray(upper))))


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


def top_genes(scores: FloatArray, n: int = N_DEGS) -> IntArray:
    """Columns of the ``n`` genes of the largest absolute score, the largest first."""
    return np.argsort(-np.abs(scores), kind="stable")[:n]


class _Judge(NamedTuple):
    """What the scores of all methods on the same real and control cells have in common."""

    real: Expression
    control: Expression
    scores_real: FloatArray
    projection: Projection

    @classmethod
    def of(cls, real: Expression, control: Expression, projection: Projection) -> _Judge:
        return cls(real, control, wilcoxon_scores(real, control), projection)

    def scores(self, predicted: Expression) -> dict[str, float]:
        degs = top_genes(self.scores_real)
        p, s, c = (project(x, self.projection) for x in (predicted, self.real, self.control))
        return {
            "pearson_delta": pearson_delta(predicted, self.real, self.control),
            "pearson_delta_degs": pearson_delta(predicted, self.real, self.control, degs),
            "r2_mean": r2_mean(predicted, self.real),
            "r2_var": r2_var(predicted, self.real),
            "mse_mean": mse_mean(predicted, self.real),
            "energy_distance": energy_distance(p, s),
            "e_distance": e_distance(p, s),
            "mmd": mmd(p, s, c),
            "variance_ratio": variance_ratio(predicted, self.real),
            "zero_fraction_error": zero_fraction_error(predicted, self.real),
            "deg_overlap": deg_overlap(wilcoxon_scores(predicted, self.control), self.scores_real),
            "sign_accuracy": sign_accuracy(predicted, self.real, self.control, degs),
        }


def score(
    predicted: Expression, real: Expression, control: Expression, projection: Projection
) -> dict[str, float]:
    """Score predicted cells with every metric, raw.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``.
    real
        Real stimulated cells, ``(n_real, G)``.
    control
        Control cells, ``(n_control, G)``.
    projection
        Components for the distances between populations:
        :func:`~spaperb.populations.fit_projection` of the training cells.
    """
    return _Judge.of(real, control, projection).scores(predicted)


def ceiling(
    real: Expression,
    control: Expression,
    projection: Projection,
    n_splits: int = N_SPLITS,
    seed: int = 0,
) -> dict[str, float]:
    """Score one random half of the real cells against the other.

    No prediction can be expected to do better than real cells of the same number.
    """
    rng = np.random.default_rng(seed)
    splits = []
    for _ in range(n_splits):
        order = rng.permutation(real.shape[0])
        one, other = np.array_split(order, 2)
        splits.append(score(real[np.sort(one)], real[np.sort(other)], control, projection))
    return pd.DataFrame(splits).mean().to_dict()


def evaluate(
    predicted: Expression,
    real: Expression,
    control: Expression,
    projection: Projection,
    n_splits: int = N_SPLITS,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predicted cells with every metric, raw and between floor and ceiling.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``, log-normalised like the others.
    real
        Real stimulated cells, ``(n_real, G)``.
    control
        Control cells, ``(n_control, G)``.
    projection
        Components for the distances between populations:
        :func:`~spaperb.populations.fit_projection` of the training cells. Components of the few
        cells that are judged here can turn the order of two predictions around.
    n_splits
        Number of random splits of the real cells for the ceiling.
    seed
        Seed of the splits.

    Returns
    -------
    pandas.DataFrame
        One row a metric: ``metric``, ``value``, ``floor``, ``ceiling``, and ``scaled``, which is 0
        at the floor and 1 at the ceiling.

    Raises
    ------
    ValueError
        If the arrays have different genes, fewer than two cells, or NaN or infinite values.
    """
    check_populations(predicted=predicted, real=real, control=control)
    judge = _Judge.of(real, control, projection)
    table = pd.DataFrame(
        {
            "value": judge.scores(predicted),
            "floor": judge.scores(control),
            "ceiling": ceiling(real, control, projection, n_splits, seed),
        }
    )
    table = table.rename_axis("metric").reset_index()
    return table.assign(scaled=scaled(table))


def scaled(table: pd.DataFrame) -> pd.Series:
    """Place values between floor and ceiling: (value - floor) / (ceiling - floor).

    Parameters
    ----------
    table
        Columns ``metric``, ``value``, ``floor`` and ``ceiling``.

    Returns
    -------
    pandas.Series
        0 at the floor and 1 at the ceiling; NaN where both are the same, and for
        ``variance_ratio``, whose best value, 1, is at neither end.
    """
    gap = table["ceiling"] - table["floor"]
    has_scale = (gap.abs() > 1e-12) & table["metric"].map(
        lambda m: HIGHER_IS_BETTER[m] is not None
    )
    return (table["value"] - table["floor"]) / gap.where(has_scale)


def check_populations(**populations: Expression) -> None:
    """Check that populations have the same genes, at least two cells, and finite values.

    Raises
    ------
    ValueError
        Naming the population that is wrong and what was found.
    """
    shapes = {name: x.shape for name, x in populations.items()}
    if (
        any(len(shape) != 2 for shape in shapes.values())
        or len({s[1] for s in shapes.values()}) > 1
    ):
        raise ValueError(f"Populations must be cells by the same genes; the shapes are {shapes}.")
    for name, x in populations.items():
        if x.shape[0] < 2:
            raise ValueError(f"`{name}` has {x.shape[0]} cells, and at least two are needed.")
        if not np.isfinite(x.data if sparse.issparse(x) else x).all():
            raise ValueError(f"`{name}` holds NaN or infinite values.")


def _correlation(a: FloatArray, b: FloatArray) -> float:
    # Changes this small are rounding of single-precision expression: their correlation is noise.
    if min(np.ptp(a), np.ptp(b)) < 1e-6:
        return 0.0
    return float(pearsonr(a, b).statistic)


def _identity(distances: FloatArray) -> FloatArray:
    return distances
