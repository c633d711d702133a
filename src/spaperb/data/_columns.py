"""Columns of ``adata.obs``: that they are there, once, with a value for each cell."""

from __future__ import annotations

import numpy as np
from anndata import AnnData

from spaperb._messages import MAX_LISTED, format_list


def check_column(adata: AnnData, argument: str, key: str) -> None:
    """Check that an obs column exists and has a value for every cell."""
    _check_found(adata, argument, key)
    if n_missing := int(adata.obs[key].isna().sum()):
        raise ValueError(
            f"adata.obs[{key!r}] (`{argument}`) has no value for {n_missing} of {adata.n_obs} "
            "cells. Fill them in, or leave these cells out: "
            f"adata[adata.obs[{key!r}].notna()].copy()."
        )


def _check_found(adata: AnnData, argument: str, key: str) -> None:
    if key not in adata.obs:
        raise ValueError(
            f"There is no column {key!r} in adata.obs, which `{argument}` names. The columns are: "
            f"{described_columns(adata)}. Pass the right one as `{argument}=`."
        )
    check_named_once(adata, argument, key)


def check_named_once(adata: AnnData, argument: str, key: str) -> None:
    """Check that no two obs columns have a name that is asked for."""
    if (n := list(adata.obs.columns).count(key)) > 1:
        raise ValueError(
            f"adata.obs has {n} columns named {key!r} (`{argument}`). Keep the right one; the "
            "first of each name: `adata.obs = adata.obs.loc[:, ~adata.obs.columns.duplicated()]`."
        )


def check_categories(adata: AnnData, argument: str, key: str) -> None:
    """Check that an obs column exists, is complete, and holds values of one kind.

    Categories are sorted, which takes values of one kind.
    """
    check_column(adata, argument, key)
    categories = adata.obs[key].astype("category").cat.categories.to_numpy()
    try:
        np.unique(categories)
    except TypeError as error:
        kinds = sorted({type(category).__name__ for category in categories})
        raise ValueError(
            f"adata.obs[{key!r}] (`{argument}`) holds values of several kinds, which have no "
            f"order: {', '.join(kinds)}. Make them one, `adata.obs[{key!r}] = "
            f"adata.obs[{key!r}].astype(str)`, say."
        ) from error


def described_columns(adata: AnnData) -> str:
    """Obs columns, with the values of those that look categorical."""
    columns = []
    for key, column in adata.obs.items():
        if str(key).startswith("_scvi"):
            continue
        values = column.unique()
        few = len(values) <= MAX_LISTED
        columns.append(f"{key!r} ({format_list(values)})" if few else repr(key))
    return format_list(columns)
