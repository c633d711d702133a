"""The response table: which genes change in which cells, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from spaperb._types import IntArray
from spaperb.calibration import Calibration
from spaperb.transfer import CellChange

PSEUDOCOUNT = 0.01
"""Counts per 10,000 added to both means of a fold change, so that silent genes have one."""


def response_table(
    groups: Mapping[Any, IntArray],
    codes: IntArray,
    changes: Mapping[int, CellChange],
    calibration: Calibration,
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
    changes
        Change of each context.
    calibration
        What makes the intervals.
    var_names
        Gene names, ``(G,)``.
    level
        Level of the intervals, in (0, 1).

    Returns
    -------
    See :meth:`spaperb.SpaPerbModel.predict_response`.
    """
    columns = {code: _columns(change, calibration, level) for code, change in changes.items()}
    tables = []
    for name, rows in groups.items():
        found, counts = np.unique(codes[rows], return_counts=True)
        shares = zip(found, counts / counts.sum(), strict=True)
        table = sum(share * columns[int(code)] for code, share in shares)
        table.insert(0, "gene", np.asarray(var_names))
        table.insert(0, "group", name)
        tables.append(_finished(table))
    return pd.concat(tables, ignore_index=True)


def _columns(change: CellChange, calibration: Calibration, level: float) -> pd.DataFrame:
    """What is averaged over the contexts of a group."""
    half_width = calibration.half_width(change.response, change.control, level, change.distance)
    return pd.DataFrame(
        {
            "mean_control": change.control.mean,
            "mean_change": change.mean,
            "half_width": half_width,
            "responding": change.detection.responding(change.control),
            "distance": change.distance,
        }
    )


def _finished(table: pd.DataFrame) -> pd.DataFrame:
    """Ends of the intervals, fold changes, and the surest changes first."""
    change, half = table["mean_change"], table.pop("half_width")
    before = np.expm1(table["mean_control"]) + PSEUDOCOUNT
    after = np.expm1((table["mean_control"] + change).clip(lower=0)) + PSEUDOCOUNT
    table = table.assign(
        lower=change - half,
        upper=change + half,
        log2_fold_change=np.log2(after / before),
        score=change / half,
    )
    order = table["score"].abs().sort_values(ascending=False, kind="stable").index
    names = ["group", "gene", "mean_control", "mean_change", "lower", "upper", "log2_fold_change"]
    return table.loc[order, [*names, "score", "responding", "distance"]]
