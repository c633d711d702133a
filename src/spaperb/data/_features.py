"""Features of perturbations: checked, and put in the order of the model's perturbations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from spaperb._messages import format_list, shown
from spaperb._types import FloatArray
from spaperb.data._labels import match_labels

SAME = 1e-6
"""Relative difference of features within a perturbation up to which they are the same."""

FeatureTable = Mapping[Any, FloatArray]
"""A vector for each perturbation, ``(d,)``, by its name."""


def read_features(
    adata: AnnData,
    given: pd.DataFrame | Mapping[Any, Any] | str,
    condition_key: str,
    singles: Sequence[Any],
) -> dict[str, FloatArray]:
    """Read the features of perturbations, as a vector for each.

    Parameters
    ----------
    adata
        The cells.
    given
        A table with a row a perturbation, a vector for each by its name, or a key of such a table
        in ``adata.uns`` or of a vector for each cell in ``adata.obsm``.
    condition_key
        Column of ``adata.obs`` with the perturbation of each cell.
    singles
        Names of the perturbations that are no combinations: each needs features.

    Raises
    ------
    ValueError
        If there is no such key; a perturbation has no features, or two vectors; vectors differ in
        length, are empty, or hold what is no finite number; or all perturbations have the same.
    TypeError
        If they are given as something else.
    """
    vectors = _vectors(adata, given, condition_key)
    if missing := [name for name in singles if name not in match_labels(singles, list(vectors))]:
        raise ValueError(
            f"`perturbation_features` has no features of {len(missing)} of {len(singles)} "
            f"perturbations: {format_list(missing)}. It has features of: "
            f"{format_list(vectors)}. Add the missing ones, or leave these perturbations out, "
            "`stimulated=[...]`."
        )
    table = {str(name): check_features(vector, name) for name, vector in vectors.items()}
    if len(table) < len(vectors):
        raise ValueError(
            "`perturbation_features` has several vectors for names that are spelled alike: "
            f"{format_list(vectors)}."
        )
    lengths = sorted({len(vector) for vector in table.values()})
    if len(lengths) > 1:
        raise ValueError(
            "`perturbation_features` must have as many numbers for each perturbation; there are "
            f"vectors of lengths {format_list(lengths)}."
        )
    measured = np.array([table[str(name)] for name in _named(singles, vectors)])
    if len(measured) > 1 and (measured == measured[0]).all():
        raise ValueError(
            "`perturbation_features` are the same for all perturbations in the data, so they tell "
            "none from another. Pass others, or leave them out."
        )
    return table


def check_features(vector: Any, name: Any) -> FloatArray:
    """Check that features of a perturbation are finite numbers, ``(d,)``."""
    try:
        values = np.asarray(vector, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The features of {shown(name)} must be numbers: {error}.") from error
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"The features of {shown(name)} must be a vector of numbers; their shape is "
            f"{values.shape}."
        )
    if n := int((~np.isfinite(values)).sum()):
        raise ValueError(
            f"The features of {shown(name)} hold {n} values that are missing or infinite, of "
            f"{len(values)}. Fill them in, or leave these features out."
        )
    return values


def features_of(names: Sequence[Any], table: FeatureTable) -> FloatArray:
    """Features of each perturbation, ``(P, d)``; NaN for those that the table does not hold."""
    numbers = match_labels(names, list(table))
    vectors = list(table.values())
    without = np.full_like(vectors[0], np.nan)
    return np.array([vectors[numbers[n]] if n in numbers else without for n in names])


def find_features(
    name: Any,
    given: Any | None,
    table: FeatureTable | None,
    measured: Sequence[Any],
    is_measured: bool,
) -> FloatArray | None:
    """Find the features of a perturbation to predict; ``None`` for one that was measured.

    Parameters
    ----------
    name
        Its name.
    given
        Features that the user passed, ``(d,)``.
    table
        Those that the data were set up with.
    measured
        Names of the measured perturbations.
    is_measured
        Whether it, or all of its parts, were measured.

    Raises
    ------
    ValueError
        If features are given of a perturbation that was measured, to a model without them, or in
        another length; or the table has none of one that was not.
    """
    if given is None:
        if is_measured or table is None:
            return None
        # Not by another spelling of one that was measured: that would be told by features alone.
        others = [n for n in table if n not in match_labels(table, measured)]
        found = match_labels([name], others)
        if not found:
            raise ValueError(
                f"{shown(name)} was never measured, and the model has no features of it. Pass "
                f"`features=`, {len(next(iter(table.values())))} numbers. It knows: "
                f"{format_list(measured)}; beside these it has features of: "
                f"{format_list(others)}."
            )
        return table[others[found[name]]]
    if is_measured:
        raise ValueError(
            f"{shown(name)} was measured, so what was measured tells of it. Leave out `features`, "
            "or pass the name of a perturbation that was never measured."
        )
    if table is None:
        raise ValueError(
            "The model was set up without features of perturbations and takes no `features`. Set "
            "it up with `perturbation_features=` to train one that does."
        )
    values, n_features = check_features(given, name), len(next(iter(table.values())))
    if len(values) != n_features:
        raise ValueError(
            f"The features of {shown(name)} are {len(values)} numbers, and the model was set up "
            f"with {n_features} for each perturbation."
        )
    return values


def _vectors(
    adata: AnnData, given: pd.DataFrame | Mapping[Any, Any] | str, condition_key: str
) -> dict[Any, Any]:
    """Features by name, as they were given."""
    if isinstance(given, str):
        if given in adata.uns:
            return _vectors(adata, adata.uns[given], condition_key)
        if given in adata.obsm:
            return _of_cells(adata, given, condition_key)
        raise ValueError(
            f"There is neither adata.uns[{given!r}] nor adata.obsm[{given!r}] "
            f"(`perturbation_features`). Keys of uns: {format_list(adata.uns)}; of obsm: "
            f"{format_list(adata.obsm)}."
        )
    if isinstance(given, pd.DataFrame):
        if not given.index.is_unique:
            twice = given.index[given.index.duplicated()].unique()
            raise ValueError(
                "`perturbation_features` has several rows for some perturbations: "
                f"{format_list(twice)}."
            )
        return dict(zip(given.index, given.to_numpy(), strict=True))
    if isinstance(given, Mapping):
        return dict(given)
    raise TypeError(
        "`perturbation_features` must be a DataFrame with a row a perturbation, a mapping from "
        f"names to vectors, or a key of adata.uns or adata.obsm; it is {type(given).__name__}."
    )


def _of_cells(adata: AnnData, key: str, condition_key: str) -> dict[Any, Any]:
    """Features by name, of a vector for each cell."""
    cells = np.asarray(adata.obsm[key], dtype=np.float64)
    vectors = {}
    for name, rows in adata.obs.groupby(condition_key, observed=True).indices.items():
        of = cells[rows]
        if not np.allclose(of, of[0], rtol=SAME, atol=0, equal_nan=True):
            raise ValueError(
                f"Cells of {shown(name)} differ in adata.obsm[{key!r}] "
                "(`perturbation_features`): features are of a perturbation, so all of its cells "
                "must have the same."
            )
        vectors[name] = of[0]
    return vectors


def _named(names: Sequence[Any], vectors: Mapping[Any, Any]) -> list[Any]:
    """Names as they are spelled in a table."""
    known, numbers = list(vectors), match_labels(names, list(vectors))
    return [known[numbers[name]] for name in names]
