"""Which cells of a query are control cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData

from spaperb._messages import format_list, shown, warn
from spaperb.data._columns import _check_found
from spaperb.data._labels import match_labels


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
    # Among all values, so that a perturbation that is spelled like the control is not taken for
    # it.
    numbers = match_labels(found, [control, *perturbations])
    if of_control := [label for label, number in numbers.items() if number == 0]:
        return conditions.isin(of_control).to_numpy(dtype=bool)
    column = f"adata.obs[{conditions.name!r}]"
    if len(found) > 1:
        raise ValueError(
            f"No cell has the control value {shown(control)} in {column}, so control cells can't "
            f"be told from others; the values are: {format_list(found)}. Rename the one of "
            "control cells, or, if all are control cells, pass them without the column: "
            f"adata.obs.drop(columns={conditions.name!r})."
        )
    (value,) = found
    if value in numbers:
        warn(
            f"All cells have the condition {shown(value)} in {column}. The change is added to "
            "what they are, as if they were control cells, and no data speak for that."
        )
    else:
        warn(
            f"No cell has the control value {shown(control)} in {column}, but all have "
            f"{shown(value)}: they are taken for control cells."
        )
    return np.ones(len(conditions), dtype=bool)


def check_conditions(
    adata: AnnData, condition_key: str, control: Any, stimulated: Sequence[Any] | None
) -> None:
    """Check that the condition column holds the control and something to compare it with."""
    found = list(adata.obs[condition_key].unique())
    values = [("control", control), *(("stimulated", value) for value in stimulated or [])]
    for argument, value in values:
        if value not in found:
            raise ValueError(
                f"No cell has {shown(value)} (`{argument}`) in adata.obs[{condition_key!r}]. The "
                f"values are: {format_list(found)}. Pass one of them as `{argument}=`."
            )
    if stimulated is not None and not len(stimulated):
        raise ValueError("`stimulated` is empty. Name perturbations, or leave it out to take all.")
    if stimulated is not None and control in stimulated:
        raise ValueError(f"`control` and `stimulated` are both {shown(control)}.")
    if not [value for value in found if value != control]:
        raise ValueError(
            f"All {adata.n_obs} cells have the condition {shown(control)} in "
            f"adata.obs[{condition_key!r}]. Training needs stimulated cells too."
        )


def as_list(values: Any | Sequence[Any] | None) -> list[Any] | None:
    """Put a single value into a list; ``None`` stays."""
    if values is None or isinstance(values, list):
        return values
    return list(values) if pd.api.types.is_list_like(values) else [values]


def check_one_stimulus(
    adata: AnnData, condition_key: str, control: Any, stimulated: Any | None
) -> None:
    """Check that control cells have exactly one perturbation to be compared with."""
    one = None if stimulated is None else [stimulated]
    check_conditions(adata, condition_key, control, one)
    others = [value for value in adata.obs[condition_key].unique() if value != control]
    if stimulated is None and len(others) > 1:
        raise ValueError(
            f"adata.obs[{condition_key!r}] has {len(others)} values beside the control: "
            f"{format_list(others)}. Pass one of them as `stimulated=`."
        )


def perturbations_with_pairs(
    adata: AnnData,
    condition_key: str,
    control: Any,
    stimulated: Sequence[Any] | None,
    labels_key: str,
    batch_key: str | None,
) -> list[Any]:
    """Perturbations with control cells of their cell type (and batch) to be paired with.

    Warns of those that have none; raises if that is all of them.
    """
    condition = adata.obs[condition_key]
    keys = [labels_key] if batch_key is None else [labels_key, batch_key]
    groups = [adata.obs[key].astype(str).to_numpy() for key in keys]
    table = pd.crosstab(groups, condition.astype(object).to_numpy())
    # By value rather than by label: pandas takes truth values for masks.
    cells = dict(zip(table.columns, table.to_numpy().T, strict=True))
    names = [value for value in cells if value != control]
    if stimulated is not None:
        names = [value for value in names if value in stimulated]
    has_control = cells[control] > 0
    paired = [value for value in names if cells[value][has_control].any()]
    where = " and batch" if batch_key else ""
    if not paired:
        of_group = zip(table.index, cells[control], sum(cells[v] for v in names), strict=True)
        found = [f"{group} {n_control} and {n}" for group, n_control, n in of_group]
        raise ValueError(
            f"No cell type in adata.obs[{labels_key!r}] has both control and stimulated cells"
            f"{' within one batch' if batch_key else ''}, so there is nothing to pair. Numbers of "
            f"control and stimulated cells: {format_list(found)}. Check the columns"
            + (", or leave out `batch_key`." if batch_key else ".")
        )
    if excluded := [value for value in names if value not in paired]:
        warn(
            f"These perturbations have no control cells of their cell type{where} to be paired "
            f"with and are left out: {format_list(excluded)}."
        )
    return paired


def check_doses(
    adata: AnnData, dose_key: str, condition_key: str, stimulated: Sequence[Any]
) -> None:
    """Check that the dose of every stimulated cell is a number of at least 0; others need none."""
    _check_found(adata, "dose_key", dose_key)
    doses = adata.obs[dose_key]
    if not pd.api.types.is_numeric_dtype(doses) or pd.api.types.is_bool_dtype(doses):
        raise ValueError(
            f"adata.obs[{dose_key!r}] (`dose_key`) must hold numbers; it has the type "
            f"{doses.dtype}, with values like {format_list(doses.unique()[:3])}. Convert it with "
            f"`adata.obs[{dose_key!r}] = adata.obs[{dose_key!r}].astype(float)`."
        )
    is_stimulated = adata.obs[condition_key].isin(stimulated).to_numpy()
    of_stimulated = doses.to_numpy(dtype=float)[is_stimulated]
    missing, wrong = np.isnan(of_stimulated), (of_stimulated < 0) | np.isinf(of_stimulated)
    if missing.any() or wrong.any():
        raise ValueError(
            f"adata.obs[{dose_key!r}] (`dose_key`) needs a dose of at least 0 for every "
            f"stimulated cell: {missing.sum()} of {is_stimulated.sum()} have none, and "
            f"{wrong.sum()} a negative or infinite one. Fill them in, or leave these cells out."
        )
