"""The response table: which genes change in which cells, by how much, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from spaperb._messages import warn
from spaperb._types import IntArray
from spaperb.data import Query, Scale
from spaperb.model._transfer import CellChange, some_of
from spaperb.populations import Pseudobulk

MAX_CELLS = 10_000
"""Cells of a group that its means are taken from."""
PSEUDOCOUNT = 1e-6
"""Share of the target sum added to both means of a fold change, so that silent genes have one: 0.01
counts per 10,000."""


def response_table(
    groups: Mapping[Any, IntArray],
    codes: IntArray,
    query: Query,
    changes: Mapping[int, CellChange],
    var_names: Sequence[str],
    level: float,
    scale: Scale,
) -> pd.DataFrame:
    """Put the changes of groups of cells into a table.

    Parameters
    ----------
    groups
        Rows of the cells of each group. A group of several contexts has the mean of their changes and of their
        half-widths, by its share of cells.
    codes
        Context of every cell, ``(n,)``.
    query
        The cells.
    changes
        Change of each context.
    var_names
        Gene names, ``(G,)``.
    level
        Level of the intervals, in (0, 1).
    scale
        Scale of the training expression.

    Returns
    -------
    pandas.DataFrame
        See :meth:`spaperb.SpaPerbModel.predict_response`.
    """
    tables = []
    for name, rows in groups.items():
        table = sum(
            (codes[rows] == code).mean()
            * _columns(
                Pseudobulk.of(query.rows(some_of(rows[codes[rows] == code], MAX_CELLS))),
                changes[int(code)],
                level,
            )
            for code in np.unique(codes[rows])
        )
        table.insert(0, "gene", np.asarray(var_names))
        table.insert(0, "group", name)
        tables.append(_finished(table, scale))
    if not scale.is_logarithm:
        missing = ["`log2_fold_change`, which transforms logarithms back"]
        if not scale.nonnegative:
            missing.append("`responding`, which takes zeros for silent genes")
        warn(
            f"The table has no column {' and no '.join(missing)}: the training cells look {scale}. "
            "Train on log-normalised expression to have all columns."
        )
    return pd.concat(tables, ignore_index=True)


def _columns(control: Pseudobulk, change: CellChange, level: float) -> pd.DataFrame:
    """What is averaged over the contexts of a group, from its own control cells."""
    half_width = change.intervals.half_width(
        change.sigma, change.scale, control, change.references, change.weights, level
    )
    return pd.DataFrame(
        {
            "mean_control": control.mean,
            "mean_change": change.mean,
            "half_width": max(1.0, change.distance) * half_width,
            "responding": change.detection.responding(control),
            "distance": change.distance,
        }
    )


def _finished(table: pd.DataFrame, scale: Scale) -> pd.DataFrame:
    """Ends of the intervals, fold changes, and the surest changes first."""
    change, half = table["mean_change"], table.pop("half_width")
    table = table.assign(
        lower=change - half,
        upper=change + half,
        score=np.where(change == 0, 0.0, change / half),
    )
    order = table["score"].abs().sort_values(ascending=False, kind="stable").index
    names = ["group", "gene", "mean_control", "mean_change", "lower", "upper"]
    if scale.is_logarithm:
        control = table["mean_control"]
        table["log2_fold_change"] = log2_fold_change(control, control + change, scale)
        names.append("log2_fold_change")
    names += ["score", "responding"] if scale.nonnegative else ["score"]
    return table.loc[order, [*names, "distance"]]


def log2_fold_change(before: pd.Series, after: pd.Series, scale: Scale) -> pd.Series:
    """Logarithm to base 2 of the ratio of mean expression, transformed back, after over before.

    Parameters
    ----------
    before, after
        Mean log-normalised expression; what is negative counts as 0.
    scale
        Scale of the expression: the base, and the target sum that the pseudocount is a share of.
    """
    pseudocount = PSEUDOCOUNT * scale.target_sum
    natural = (mean.clip(lower=0) * math.log(scale.base) for mean in (before, after))
    # The logarithm of exp(x) - 1 + pseudocount, of an x too large for an exponential too.
    first, last = (x + np.log1p((pseudocount - 1) * np.exp(-x)) for x in natural)
    return (last - first) / math.log(2)
