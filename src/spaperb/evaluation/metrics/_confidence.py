"""Whether a model knows where it is right: intervals, and error among what it is surest of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from spaperb._types import Expression
from spaperb.populations import mean_expression


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


def risk_coverage(error: npt.ArrayLike, uncertainty: npt.ArrayLike) -> pd.DataFrame:
    """Mean error of what a model is surest of, for each share of it.

    Parameters
    ----------
    error
        Error of each prediction, of genes or contexts say, ``(n,)``.
    uncertainty
        How unsure the model was of each, ``(n,)``: half-widths of intervals or distances. Only
        its order counts; predictions of the same uncertainty share their errors.

    Returns
    -------
    pandas.DataFrame
        A row for each number of predictions kept, the surest first: ``coverage``, the share that
        is kept; ``risk``, their mean error; ``best``, that of the same number with the smallest
        errors. The last row holds the mean error of all.

    Raises
    ------
    ValueError
        If the lengths differ, there is no prediction, or a value is NaN.

    References
    ----------
    Geifman and El-Yaniv (2017), Selective classification for deep neural networks, NeurIPS 30,
    with errors of any size in place of wrong classes.
    """
    errors, unsure = (np.asarray(x, dtype=np.float64) for x in (error, uncertainty))
    if errors.shape != unsure.shape or errors.ndim != 1 or not errors.size:
        raise ValueError(
            "`error` and `uncertainty` must be one value a prediction each; their shapes are "
            f"{errors.shape} and {unsure.shape}."
        )
    for name, values in (("error", errors), ("uncertainty", unsure)):
        if np.isnan(values).any():
            raise ValueError(f"`{name}` holds {np.isnan(values).sum()} NaN.")
    # In any order of predictions that it can't tell apart the curve is the same.
    tied = pd.Series(errors).groupby(unsure).transform("mean").to_numpy()
    number = np.arange(1, errors.size + 1)
    return pd.DataFrame(
        {
            "coverage": number / errors.size,
            "risk": np.cumsum(tied[np.argsort(unsure, kind="stable")]) / number,
            "best": np.cumsum(np.sort(errors)) / number,
        }
    )


def area_under_risk_coverage(error: npt.ArrayLike, uncertainty: npt.ArrayLike) -> float:
    """Mean over all shares kept of :func:`risk_coverage`'s risk, between chance and the best.

    Parameters
    ----------
    error, uncertainty
        As for :func:`risk_coverage`.

    Returns
    -------
    float
        0 where uncertainty tells nothing of the errors, 1 where it puts them in order, negative
        where it puts the worst first; NaN where all errors are the same.

    References
    ----------
    Geifman, Uziel and El-Yaniv (2019), Bias-reduced uncertainty estimation for deep neural
    classifiers, ICLR: the excess area, here as a share of the largest gain.
    """
    curve = risk_coverage(error, uncertainty)
    risk, best = float(curve["risk"].mean()), float(curve["best"].mean())
    chance = float(curve["risk"].iloc[-1])
    gain = chance - best
    return (chance - risk) / gain if gain > 1e-12 * max(1.0, chance) else float("nan")
