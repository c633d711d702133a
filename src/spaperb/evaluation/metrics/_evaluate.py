"""All scores of a prediction in one table, between a floor and a ceiling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
from scipy import sparse

from spaperb._types import Expression, FloatArray, IntArray
from spaperb.evaluation.metrics._cells import (
    correlation_error,
    e_distance,
    energy_distance,
    mmd,
    r2_var,
    variance_ratio,
    wasserstein,
    zero_fraction_error,
)
from spaperb.evaluation.metrics._changes import (
    Changes,
    correlation,
    log_fold_change_error,
    mse_mean,
    r2_mean,
    weighted_mse,
    weighted_r2_delta,
)
from spaperb.evaluation.metrics._genes import (
    called_genes,
    deg_average_precision,
    deg_direction,
    deg_overlap,
    deg_precision,
    deg_recall,
    gene_weights,
    sign_accuracy,
    top_genes,
)
from spaperb.evaluation.metrics._others import (
    centroid_accuracy,
    discrimination,
    pearson_delta_specific,
)
from spaperb.populations import Projection, project, wilcoxon_scores

N_SPLITS = 20
HIGHER_IS_BETTER = {
    "pearson_delta": True,
    "pearson_delta_degs": True,
    "weighted_r2_delta": True,
    "r2_mean": True,
    "r2_var": True,
    "mse_mean": False,
    "weighted_mse": False,
    "log_fold_change_error": False,
    "energy_distance": False,
    "e_distance": False,
    "mmd": False,
    "wasserstein": False,
    "variance_ratio": None,
    "zero_fraction_error": False,
    "correlation_error": False,
    "deg_overlap": True,
    "sign_accuracy": True,
    "deg_precision": True,
    "deg_recall": True,
    "deg_average_precision": True,
    "deg_direction": True,
    "discrimination": True,
    "centroid_accuracy": True,
    "pearson_delta_specific": True,
}
"""The metrics of :func:`evaluate` and which direction is better; ``None``: best at 1."""


class _Judge(NamedTuple):
    """What the scores of all predictions of the same real cells have in common."""

    real: Expression
    control_real: Expression
    scores_real: FloatArray
    degs: IntArray
    projection: Projection
    others: FloatArray | None

    @classmethod
    def of(
        cls,
        real: Expression,
        control: Expression,
        control_real: Expression | None,
        projection: Projection,
        others: FloatArray | None,
    ) -> Self:
        control_real = control if control_real is None else control_real
        scores = wilcoxon_scores(real, control_real)
        return cls(real, control_real, scores, top_genes(scores), projection, others)

    def scores(self, predicted: Expression, control: Expression) -> dict[str, float]:
        """Score cells that were predicted from control cells."""
        real, control_real, scores_real, degs, projection, others = self
        changes = Changes.of(predicted, real, control, control_real)
        weights = gene_weights(scores_real)
        called = np.flatnonzero(called_genes(scores_real))
        found = wilcoxon_scores(predicted, control)
        p, s, c = (project(x, projection) for x in (predicted, real, control_real))
        scores = {
            "pearson_delta": correlation(*changes),
            "pearson_delta_degs": correlation(*(change[degs] for change in changes)),
            "weighted_r2_delta": weighted_r2_delta(changes, weights),
            "r2_mean": r2_mean(predicted, real),
            "r2_var": r2_var(predicted, real),
            "mse_mean": mse_mean(predicted, real),
            "weighted_mse": weighted_mse(predicted, real, weights),
            "log_fold_change_error": log_fold_change_error(
                predicted, real, control, called, control_real
            ),
            "energy_distance": energy_distance(p, s),
            "e_distance": e_distance(p, s),
            "mmd": mmd(p, s, c),
            "wasserstein": wasserstein(predicted, real),
            "variance_ratio": variance_ratio(predicted, real),
            "zero_fraction_error": zero_fraction_error(predicted, real),
            "correlation_error": correlation_error(predicted, real, degs),
            "deg_overlap": deg_overlap(found, scores_real),
            "sign_accuracy": sign_accuracy(changes, degs),
            "deg_precision": deg_precision(found, scores_real),
            "deg_recall": deg_recall(found, scores_real),
            "deg_average_precision": deg_average_precision(found, scores_real),
            "deg_direction": deg_direction(found, scores_real),
        }
        if others is not None and len(others):
            scores["discrimination"] = discrimination(changes, others)
            scores["centroid_accuracy"] = centroid_accuracy(changes, others)
            scores["pearson_delta_specific"] = pearson_delta_specific(changes, others)
        return {name: scores.get(name, float("nan")) for name in HIGHER_IS_BETTER}


def score(
    predicted: Expression,
    real: Expression,
    control: Expression,
    projection: Projection,
    *,
    control_real: Expression | None = None,
    others: FloatArray | None = None,
) -> dict[str, float]:
    """Score predicted cells with every metric, raw.

    Parameters
    ----------
    predicted, real, control, projection, control_real, others
        As for :func:`evaluate`.
    """
    judge = _Judge.of(real, control, control_real, projection, others)
    return judge.scores(predicted, control)


def ceiling(
    real: Expression,
    control: Expression,
    projection: Projection,
    n_splits: int = N_SPLITS,
    seed: int = 0,
    *,
    control_real: Expression | None = None,
    others: FloatArray | None = None,
) -> dict[str, float]:
    """Score one random half of the real cells against the other: a replicate.

    With ``control_real`` each half has control cells of its own, as a prediction and the real
    cells have. It is what an experiment with half of the cells would score. A prediction without
    noise may be above it.

    Parameters
    ----------
    real, control, projection, n_splits, seed, control_real, others
        As for :func:`evaluate`.
    """
    rng = np.random.default_rng(seed)
    splits = []
    for _ in range(n_splits):
        order = rng.permutation(real.shape[0])
        one, other = (real[np.sort(half)] for half in np.array_split(order, 2))
        splits.append(
            score(one, other, control, projection, control_real=control_real, others=others)
        )
    return pd.DataFrame(splits).mean().to_dict()


def evaluate(
    predicted: Expression,
    real: Expression,
    control: Expression,
    projection: Projection,
    n_splits: int = N_SPLITS,
    seed: int = 0,
    *,
    control_real: Expression | None = None,
    others: FloatArray | None = None,
) -> pd.DataFrame:
    """Score predicted cells with every metric, raw and between floor and ceiling.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``, log-normalised like the others.
    real
        Real stimulated cells, ``(n_real, G)``.
    control
        Control cells that were predicted from, ``(n_control, G)``.
    projection
        Components for the distances between populations:
        :func:`~spaperb.populations.fit_projection` of the training cells. Components of the few
        cells that are judged here can turn the order of two predictions around.
    n_splits
        Number of random splits of the real cells for the ceiling.
    seed
        Seed of the splits.
    control_real
        Control cells of the same context that the model never saw, ``(n_control_real, G)``; the
        real change is measured from them. ``None`` measures it from ``control``. Then the sampling
        noise of the control cells is in the real change, and in the predicted one of any method
        that uses these cells, and scores of changes are too high, those of weak changes most.
    others
        Real mean changes that the prediction should be told from, ``(n_others, G)``: of other
        perturbations in this context, measured from ``control_real``, or of this perturbation in
        other contexts. ``None`` leaves the scores that need them NaN.

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
    populations = {"predicted": predicted, "real": real, "control": control}
    if control_real is not None:
        populations["control_real"] = control_real
    check_populations(populations)
    if others is not None:
        others = _checked_others(others, real.shape[1])
    judge = _Judge.of(real, control, control_real, projection, others)
    replicate = ceiling(
        real, control, projection, n_splits, seed, control_real=control_real, others=others
    )
    table = pd.DataFrame(
        {
            "value": judge.scores(predicted, control),
            "floor": judge.scores(control, control),
            "ceiling": replicate,
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
        0 at the floor and 1 at the ceiling; NaN where the ceiling is not better than the floor, as
        with cells too few to tell a change from noise, where one of them is NaN, and for
        ``variance_ratio``, whose best value, 1, is at neither end.
    """
    gap = table["ceiling"] - table["floor"]
    is_better = [
        HIGHER_IS_BETTER[metric] is not None
        and (size if HIGHER_IS_BETTER[metric] else -size) > 1e-12
        for metric, size in zip(table["metric"], gap, strict=True)
    ]
    return (table["value"] - table["floor"]) / gap.where(is_better)


def check_populations(populations: Mapping[str, Expression]) -> None:
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


def _checked_others(others: FloatArray, n_genes: int) -> FloatArray:
    """Other changes as a finite array ``(n_others, G)``."""
    others = np.asarray(others, dtype=np.float64)
    if others.ndim != 2 or others.shape[1] != n_genes:
        raise ValueError(
            "`others` must be changes by the genes of the cells, "
            f"(n_others, {n_genes}); its shape is {others.shape}."
        )
    if not np.isfinite(others).all():
        raise ValueError("`others` holds NaN or infinite values.")
    return others
