"""Features of perturbations: checked, and put in the order of the model's perturbations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from spaperb._messages import format_list, shown
from spaperb._types import FloatArray
from spaperb.data._labels import match_labels
from spaperb.populations import dense

SAME = 1e-6
"""Relative difference of features within a perturbation up to which they are the same."""


class FeatureTable(NamedTuple):
    """Features of perturbations, those of the data and others.

    Attributes
    ----------
    names
        Names of the perturbations, as text.
    columns
        Names of the features, ``(d,)``.
    values
        Their features, ``(n, d)``.
    """

    names: list[str]
    columns: list[str]
    values: FloatArray

    @classmethod
    def read(
        cls,
        adata: AnnData,
        given: pd.DataFrame | Mapping[Any, Any] | str,
        condition_key: str,
        control: Any,
        singles: Sequence[Any],
    ) -> FeatureTable:
        """Read the features of perturbations.

        Parameters
        ----------
        adata
            The cells.
        given
            A table with a row a perturbation, a vector for each by its name, or a key of such a
            table in ``adata.uns`` or of a vector for each cell in ``adata.obsm``.
        condition_key, control
            Column of ``adata.obs`` with the perturbation of each cell, and its value for control
            cells, which have no features.
        singles
            Names of the perturbations that are no combinations: each needs features. Others
            without any are left out.

        Raises
        ------
        ValueError
            If there is no such key; a perturbation has no features, or two vectors; vectors differ
            in length, are empty, or hold what is no finite number; or all perturbations have the
            same.
        TypeError
            If they are given as something else.
        """
        vectors, columns = _vectors(adata, given, condition_key, [control, *singles])
        for name in match_labels(vectors, [control]):
            del vectors[name]
        known = match_labels(singles, list(vectors))
        if missing := [name for name in singles if name not in known]:
            raise ValueError(
                f"`perturbation_features` has no features of {len(missing)} of {len(singles)} "
                f"perturbations: {format_list(missing)}. It has features of: "
                f"{format_list(vectors)}. Add the missing ones (a row of the table each, by their "
                "names), or leave these perturbations out, `stimulated=[...]`."
            )
        needed = {list(vectors)[i] for i in known.values()}
        table = {
            str(name): vector
            for name, given_vector in vectors.items()
            for vector in [as_vector(given_vector, name)]
            if name in needed or np.isfinite(vector).all()
        }
        for name in needed:
            check_finite(table[str(name)], name)
        if len({str(name) for name in vectors}) < len(vectors):
            raise ValueError(
                "`perturbation_features` has several vectors for names that are spelled alike: "
                f"{format_list(vectors)}."
            )
        lengths = sorted({len(vector) for vector in table.values()})
        if len(lengths) > 1:
            raise ValueError(
                "`perturbation_features` must have as many numbers for each perturbation; there "
                f"are vectors of lengths {format_list(lengths)}."
            )
        measured = np.array([table[str(name)] for name in needed])
        if len(measured) > 1 and (measured == measured[0]).all():
            raise ValueError(
                "`perturbation_features` are the same for all perturbations in the data, so they "
                "tell none from another. Pass others, or leave them out."
            )
        columns = columns or [str(i) for i in range(lengths[0])]
        return cls(list(table), columns, np.array(list(table.values())))

    def of(self, names: Sequence[Any]) -> FloatArray:
        """Features of some perturbations, ``(P, d)``; NaN for those that it does not hold."""
        numbers = match_labels(names, self.names)
        without = np.full(len(self.columns), np.nan)
        return np.array([self.values[numbers[n]] if n in numbers else without for n in names])

    def find(
        self, name: Any, given: Any | None, measured: Sequence[Any], control: Any
    ) -> FloatArray:
        """Find the features of a perturbation that was never measured, ``(d,)``.

        Parameters
        ----------
        name
            Its name.
        given
            Features that the user passed; ``None`` for those of the table.
        measured
            Names of the measured perturbations.
        control
            Value of control cells.

        Raises
        ------
        ValueError
            If it is the control, or is spelled like a perturbation that was measured; neither the
            table nor the user has its features, or both; or these are of another length, have
            other names, or are not finite.
        """
        alike = match_labels([name], [*measured, control])
        if alike:
            known = [*measured, control][alike[name]]
            raise ValueError(
                f"{shown(name)} is spelled like {shown(known)}, which was measured. Pass that "
                "name, or one of a perturbation that was not."
            )
        others = [n for n in self.names if n not in match_labels(self.names, measured)]
        found = match_labels([name], others)
        if given is None and not found:
            raise ValueError(
                f"{shown(name)} was never measured, and the model has no features of it. Pass "
                f"`features=`, {len(self.columns)} numbers. It knows: {format_list(measured)}; "
                f"beside these it has features of: {format_list(others)}."
            )
        if given is None:
            return self.values[self.names.index(others[found[name]])]
        if found:
            raise ValueError(
                f"The model has features of {shown(name)} already. Leave out `features`, or pass "
                "another name."
            )
        values = as_vector(self._in_order(given, name), name)
        check_finite(values, name)
        if len(values) != len(self.columns):
            raise ValueError(
                f"The features of {shown(name)} are {len(values)} numbers, and the model was set "
                f"up with {len(self.columns)} for each perturbation."
            )
        return values

    def _in_order(self, given: Any, name: Any) -> Any:
        """Put features with names into the table's order."""
        if isinstance(given, pd.DataFrame) and len(given) == 1:
            given = given.iloc[0]
        if not isinstance(given, pd.Series) or isinstance(given.index, pd.RangeIndex):
            return given
        found = given.set_axis(given.index.astype(str))
        if set(found.index) != set(self.columns) or not found.index.is_unique:
            raise ValueError(
                f"The features of {shown(name)} have other names than those that the model was "
                f"set up with: {format_list(found.index)} in place of "
                f"{format_list(self.columns)}. Rename them, or pass an array in that order."
            )
        return found[self.columns]


def as_vector(given: Any, name: Any) -> FloatArray:
    """Check that features of a perturbation are numbers, ``(d,)``."""
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The features of {shown(name)} must be numbers: {error}.") from error
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"The features of {shown(name)} must be a vector of numbers; their shape is "
            f"{values.shape}."
        )
    return values


def check_finite(values: FloatArray, name: Any) -> None:
    """Check that no feature of a perturbation is missing or infinite."""
    if n := int((~np.isfinite(values)).sum()):
        raise ValueError(
            f"The features of {shown(name)} hold {n} values that are missing or infinite, of "
            f"{len(values)}. Fill them in, or leave these features out."
        )


def _vectors(
    adata: AnnData, given: Any, condition_key: str, names: Sequence[Any]
) -> tuple[dict[Any, Any], list[str]]:
    """Features by name, and their names, as they were given; no names if there are none."""
    if isinstance(given, str):
        if given in adata.uns:
            return _vectors(adata, adata.uns[given], condition_key, names)
        if given in adata.obsm:
            return _of_cells(adata, given, condition_key, names), []
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
        columns = [str(column) for column in given.columns]
        return dict(zip(given.index, given.to_numpy(), strict=True)), columns
    if isinstance(given, Mapping):
        # As a set-up keeps them, and a saved model gives them back.
        if set(given) == set(FeatureTable._fields):
            return dict(zip(given["names"], given["values"], strict=True)), list(given["columns"])
        return dict(given), []
    raise TypeError(
        "`perturbation_features` must be a DataFrame with a row a perturbation, a mapping from "
        f"names to vectors, or a key of adata.uns or adata.obsm; it is {type(given).__name__}."
    )


def _of_cells(
    adata: AnnData, key: str, condition_key: str, names: Sequence[Any]
) -> dict[Any, Any]:
    """Features by name, of a vector for each cell; but for control cells, the first of names."""
    cells = np.asarray(dense(adata.obsm[key]), dtype=np.float64)
    indices = adata.obs.groupby(condition_key, observed=True).indices
    vectors = {}
    for name in names[1:]:
        of = cells[indices[name]]
        if not np.allclose(of, of[0], rtol=SAME, atol=0, equal_nan=True):
            raise ValueError(
                f"Cells of {shown(name)} differ in adata.obsm[{key!r}] "
                "(`perturbation_features`): features are of a perturbation, so all of its cells "
                "must have the same."
            )
        vectors[name] = of[0]
    return vectors
