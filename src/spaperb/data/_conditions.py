"""Which cells of a query are control cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from spaperb.data._labels import match_labels
from spaperb.validation import listed, warn


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
    if match_labels(found, [control]):
        is_control = [label for label, _ in match_labels(found, [control]).items()]
        return conditions.isin(is_control).to_numpy(dtype=bool)
    column = f"adata.obs[{conditions.name!r}]"
    if len(found) > 1:
        raise ValueError(
            f"No cell has the control value {control!r} in {column}, so control cells can't be told "
            f"from others; the values are: {listed(found)}. Rename the one of control cells, or, if "
            f"all are control cells, pass them without the column: adata.obs.drop(columns="
            f"{conditions.name!r})."
        )
    (value,) = found
    if match_labels(found, perturbations):
        warn(
            f"All cells have the condition {value!r} in {column}. The change is added to what they "
            "are, as if they were control cells, and no data speak for that."
        )
    else:
        warn(
            f"No cell has the control value {control!r} in {column}, but all have {value!r}: they "
            "are taken for control cells."
        )
    return np.ones(len(conditions), dtype=bool)
