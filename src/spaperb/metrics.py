"""How close predicted cells come to real ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.stats import pearsonr

from spaperb._types import Expression


def pearson_delta(predicted: Expression, real: Expression, control: Expression) -> float:
    """Pearson correlation over genes of the predicted with the real mean change.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``.
    real
        Real stimulated cells, ``(n_real, G)``.
    control
        Control cells, ``(n_control, G)``.

    Returns
    -------
    Correlation of mean(predicted) - mean(control) with mean(real) - mean(control), in [-1, 1]; 0
    where one of the changes is the same for every gene, as for "no change".
    """
    mean_control = mean_expression(control)
    return _correlation(
        mean_expression(predicted) - mean_control, mean_expression(real) - mean_control
    )


def r2_mean(predicted: Expression, real: Expression) -> float:
    """Squared Pearson correlation over genes of the predicted with the real means.

    Every paper reports it and it tells little: means of control cells correlate well too.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``.
    real
        Real stimulated cells, ``(n_real, G)``.
    """
    return _correlation(mean_expression(predicted), mean_expression(real)) ** 2


def mean_expression(x: Expression) -> npt.NDArray[np.float64]:
    """Mean over cells in double precision, ``(G,)``."""
    n_cells = x.shape[0]
    if sparse.issparse(x):
        # SciPy sums float32 in single precision, whatever `dtype` it is asked for.
        return (x.T @ np.ones(n_cells)) / n_cells
    return x.mean(axis=0, dtype=np.float64)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    # Changes this small are rounding of log-normalised means, and their correlation would be noise.
    if min(np.ptp(a), np.ptp(b)) < 1e-9:
        return 0.0
    return float(pearsonr(a, b).statistic)
