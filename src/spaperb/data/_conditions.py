"""Which cells of a query are control cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from spaperb.data._labels import match_labels
from spaperb.validation import listed, shown, warn


def control_cells(
    conditions: pd.Series, control: Any, perturbations: Sequence[Any]
) -> npt.NDArray[np.bool_]:
    """Cells that are not known to be stimulated, ``(n,)``.

    Parameters
    ----------
    conditions
        Condition of each cell, missing where not known; its name is that of the column.
    control
        Value of control cells in training.
    perturbations
        Values of stimulated cells in training.

    Raises
    ------
    ValueError
        If no cell is a control cell, and there are cells of several conditions: the mean of them
        all would be taken for that of control cells.
    """
    found = list(conditions.dropna().unique())
    if not found:
        return np.ones(len(conditions), dtype=bool)
    # Among all values, so that a perturbation that is spelled like the control is not taken for it.
    numbers = match_labels(found, [control, *perturbations])
    if of_control := [label for label, number in numbers.items() if number == 0]:
        return conditions.isin(of_control).to_numpy(dtype=bool)
    column = f"adata.obs[{conditions.name!r}]"
    if len(found) > 1:
        raise ValueError(
            f"No cell has the control value {shown(control)} in {column}, so control cells can't be "
            f"told from others; the values are: {listed(found)}. Rename the one of control cells, or, "
            f"if all are control cells, pass them without the column: adata.obs.drop(columns="
            f"{conditions.name!r})."
        )
    (value,) = found
    if value in numbers:
        warn(
            f"All cells have the condition {shown(value)} in {column}. The change is added to what "
            "they are, as if they were control cells, and no data speak for that."
        )
    else:
        warn(
            f"No cell has the control value {shown(control)} in {column}, but all have "
            f"{shown(value)}: they are taken for control cells."
        )
    return np.ones(len(conditions), dtype=bool)
