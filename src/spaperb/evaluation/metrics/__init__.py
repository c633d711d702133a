"""How close predicted cells come to real ones, for any model.

Every score is a function of plain arrays, cells by genes: ``predicted`` and ``real`` stimulated
cells, the ``control`` cells that were predicted from, and other control cells, ``control_real``,
that the real change is measured from; all log-normalised. Arrays may be dense or sparse, of any
precision; sums run in double precision and over blocks, so that memory stays small next to the
arrays themselves.

:func:`evaluate` computes them between a floor ("no change": the control cells as they are) and a
ceiling (one random half of the real cells scored against the other). Not part of it are
:func:`coverage` and :func:`risk_coverage`, which judge what a model says of its own errors, and
:func:`classifier_auc`, which is slow. :func:`evaluate_anndata` takes two AnnData of several
perturbations, as cell-eval does.
"""

from spaperb.evaluation.metrics._anndata import as_anndata, evaluate_anndata
from spaperb.evaluation.metrics._cells import (
    classifier_auc,
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
    log_fold_change_error,
    mse_mean,
    pearson_delta,
    r2_mean,
    weighted_mse,
    weighted_r2_delta,
)
from spaperb.evaluation.metrics._confidence import (
    area_under_risk_coverage,
    coverage,
    risk_coverage,
)
from spaperb.evaluation.metrics._evaluate import (
    HIGHER_IS_BETTER,
    N_SPLITS,
    ceiling,
    check_populations,
    evaluate,
    scaled,
    score,
)
from spaperb.evaluation.metrics._genes import (
    FDR,
    N_DEGS,
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

__all__ = [
    "FDR",
    "HIGHER_IS_BETTER",
    "N_DEGS",
    "N_SPLITS",
    "Changes",
    "area_under_risk_coverage",
    "as_anndata",
    "called_genes",
    "ceiling",
    "centroid_accuracy",
    "check_populations",
    "classifier_auc",
    "correlation_error",
    "coverage",
    "deg_average_precision",
    "deg_direction",
    "deg_overlap",
    "deg_precision",
    "deg_recall",
    "discrimination",
    "e_distance",
    "energy_distance",
    "evaluate",
    "evaluate_anndata",
    "gene_weights",
    "log_fold_change_error",
    "mmd",
    "mse_mean",
    "pearson_delta",
    "pearson_delta_specific",
    "r2_mean",
    "r2_var",
    "risk_coverage",
    "scaled",
    "score",
    "sign_accuracy",
    "top_genes",
    "variance_ratio",
    "wasserstein",
    "weighted_mse",
    "weighted_r2_delta",
    "zero_fraction_error",
]
