"""The response table: which genes change in which cells, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from spaperb._types import IntArray
from spaperb.calibration import Calibration, Intervals
from spaperb.populations import Profile
from spaperb.prediction import Query
from spaperb.response import Situation
from spaperb.transfer import CellChange, some_of

MAX_CELLS = 10_000
"""Cells of a group that its means are taken from."""
PSEUDOCOUNT = 0.01
"""Counts per 10,000 added to both means of a fold change, so that silent genes have one."""


def response_table(
    groups: Mapping[Any, IntArray],
    codes: IntArray,
    query: Query,
    changes: Mapping[int, CellChange],
    calibrations: Mapping[Situation, Calibration],
    var_names: Sequence[str],
    level: float,
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
    calibrations
        What makes the intervals, by what was measured in a context.
    var_names
        Gene names, ``(G,)``.
    level
        Level of the intervals, in (0, 1).

    Returns
    -------
    pandas.DataFrame
        See :meth:`spaperb.SpaPerbModel.predict_response`.
    """
    intervals = {key: calibration.intervals(level) for key, calibration in calibrations.items()}
    tables = []
    for name, rows in groups.items():
        table = sum(
            (codes[rows] == code).mean()
            * _columns(
                Profile.of(query.rows(some_of(rows[codes[rows] == code], MAX_CELLS))),
                changes[int(code)],
                intervals[changes[int(code)].situation],
            )
            for code in np.unique(codes[rows])
        )
        table.insert(0, "gene", np.asarray(var_names))
        table.insert(0, "group", name)
        tables.append(_finished(table))
    return pd.concat(tables, ignore_index=True)


def _columns(control: Profile, change: CellChange, intervals: Intervals) -> pd.DataFrame:
    """What is averaged over the contexts of a group, from its own control cells."""
    return pd.DataFrame(
        {
            "mean_control": control.mean,
            "mean_change": change.mean,
            "half_width": intervals.half_width(change.response, control, change.distance),
            "responding": change.detection.responding(control),
            "distance": change.distance,
        }
    )


def _finished(table: pd.DataFrame) -> pd.DataFrame:
    """Ends of the intervals, fold changes, and the surest changes first."""
    change, half = table["mean_change"], table.pop("half_width")
    before, after = (
        _log_counts(mean.clip(lower=0))
        for mean in (table["mean_control"], table["mean_control"] + change)
    )
    table = table.assign(
        lower=change - half,
        upper=change + half,
        log2_fold_change=(after - before) / np.log(2),
        score=np.where(change == 0, 0.0, change / half),
    )
    order = table["score"].abs().sort_values(ascending=False, kind="stable").index
    names = ["group", "gene", "mean_control", "mean_change", "lower", "upper", "log2_fold_change"]
    return table.loc[order, [*names, "score", "responding", "distance"]]


def _log_counts(mean: pd.Series) -> pd.Series:
    """Logarithm of back-transformed means and the pseudocount, of means that are too large for an exponential too."""
    return mean + np.log1p((PSEUDOCOUNT - 1) * np.exp(-mean))
