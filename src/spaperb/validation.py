"""Checks of what the user hands in: each error says what was found and what to do.

Nothing here changes the AnnData, and everything here runs before any training.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData
from anndata.compat import DaskArray
from scipy import sparse
from scvi import settings

from spaperb._types import Expression
from spaperb.disk import backed_matrix

MAX_LISTED = 20
FIXED_ARGUMENTS = ("n_input", "composition", "dosed", "n_batch")
"""Arguments of modules that follow from the data."""
ENSEMBL_ID = re.compile(r"ENS[A-Z]*G\d{11}")
"""Beginning of an Ensembl gene identifier, which may go on with a version."""


def check_anndata(adata: object) -> None:
    """Check that cells come as an AnnData, and tell how to make one of what came instead.

    Raises
    ------
    TypeError
        If it is anything else.
    """
    if isinstance(adata, AnnData):
        return
    found = f"a {type(adata).__name__}"
    advice = "Make one of it: `anndata.AnnData(X, obs=..., var=...)`, with one row a cell"
    if adata is None:
        found, advice = "None", "Pass the cells"
    elif isinstance(adata, str | Path):
        found = f"the path {str(adata)!r}"
        advice = f"Read the file first: `adata = anndata.read_h5ad({str(adata)!r})`"
    elif isinstance(modalities := getattr(adata, "mod", None), Mapping):
        advice = (
            f"Pass the modality with gene expression, `mdata[{next(iter(modalities), 'rna')!r}]`, "
            f"say; it has: {listed(modalities)}"
        )
    raise TypeError(f"`adata` must be an AnnData; it is {found}. {advice}.")


def expression_matrix(adata: AnnData, layer: str | None, lazy: bool = False) -> Expression:
    """Return ``adata.X`` or a layer, if its rows can be read.

    Parameters
    ----------
    adata
        The AnnData.
    layer
        Layer; ``None`` for ``X``.
    lazy
        Whether a dask array will do. The matrix of a backed AnnData becomes one.

    Raises
    ------
    ValueError
        If there are no cells or genes, gene names repeat, there is no ``X`` or no such layer, or the
        matrix is neither in memory (or mapped into it) nor, if that will do, on disk.
    """
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(
            f"The AnnData is empty: it has {adata.n_obs} cells and {adata.n_vars} genes."
        )
    if not adata.var_names.is_unique:
        repeated = adata.var_names[adata.var_names.duplicated()].unique()
        raise ValueError(
            f"{len(repeated)} gene name(s) occur more than once: {listed(repeated)}. "
            "Make them unique with `adata.var_names_make_unique()`."
        )
    layers = [key for key in adata.layers if key is not None]
    if layer is not None and layer not in layers:
        raise ValueError(f"There is no layer {layer!r} in adata.layers; it has: {listed(layers)}.")
    x = adata.X if layer is None else adata.layers[layer]
    if x is None:
        raise ValueError(
            "adata.X is None, and expression is taken from there unless `setup_anndata(layer=...)` "
            "names a layer. Set the data up with the layer that holds it, or put it into X: "
            f"`adata.X = adata.layers[...]`. The layers are: {listed(layers)}."
        )
    is_backed = adata.isbacked and layer is None
    if lazy and is_backed:
        return backed_matrix(x)
    if lazy and isinstance(x, DaskArray):
        return x
    if not (isinstance(x, np.ndarray) or (sparse.issparse(x) and x.format in ("csr", "csc"))):
        name = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        found = (
            f"backed by the file {adata.filename}" if is_backed else f"of type {type(x).__name__}"
        )
        raise ValueError(
            f"{name} is {found}; a NumPy array or a SciPy CSR or CSC matrix is needed. Load it with "
            "`adata = adata.to_memory()`, or leave it on disk with `adata = spaperb.read_mapped(path)`."
        )
    return x


def check_column(adata: AnnData, argument: str, key: str) -> None:
    """Check that an obs column exists and has a value for every cell."""
    _check_found(adata, argument, key)
    if n_missing := int(adata.obs[key].isna().sum()):
        raise ValueError(
            f"adata.obs[{key!r}] (`{argument}`) has no value for {n_missing} of {adata.n_obs} "
            f"cells. Fill them in, or leave these cells out: adata[adata.obs[{key!r}].notna()].copy()."
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


def check_no_view(adata: AnnData) -> None:
    """Check that fields can be written to an AnnData, and that it keeps them."""
    if adata.is_view:
        raise ValueError(
            f"The AnnData is a view of another one ({adata.n_obs} of its cells), and a model needs data of its own. "
            "Make a copy: `adata = adata.copy()`."
        )


def check_genes(adata: AnnData, expected: Sequence[Any] | npt.NDArray) -> None:
    """Check that the genes are those of a model, in its order."""
    names, expected = np.asarray(adata.var_names, dtype=str), np.asarray(expected, dtype=str)
    if np.array_equal(names, expected):
        return
    found = "their order differs"
    if len(missing := np.setdiff1d(expected, names)):
        found = f"missing are: {listed(missing)}"
    elif len(names) > len(expected):
        found = f"it has {len(names) - len(expected)} more"
    raise ValueError(
        f"The genes of the AnnData are not those of the model ({len(expected)} genes); {found}. "
        "Subset and reorder it: adata[:, model.get_var_names()].copy(). A model loaded without "
        "data (`adata=False`) tells the names, and predicts cells with more genes, in any order."
    )


def check_unchanged(before: dict[str, str], now: dict[str, str]) -> None:
    """Check that the data of a model, given by digests, are those that were set up."""
    if changed := [name for name in before if now[name] != before[name]]:
        raise ValueError(
            f"{listed(changed)} changed since the AnnData was set up for this model. Set it up "
            "anew and make a new model, or undo the change."
        )


def check_categories(adata: AnnData, argument: str, key: str) -> None:
    """Check that an obs column exists, has a value for every cell, and that its values can be categories of a model.

    These are sorted, which takes values of one kind.
    """
    check_column(adata, argument, key)
    categories = adata.obs[key].astype("category").cat.categories.to_numpy()
    try:
        np.unique(categories)
    except TypeError as error:
        kinds = sorted({type(category).__name__ for category in categories})
        raise ValueError(
            f"adata.obs[{key!r}] (`{argument}`) holds values of several kinds, which have no order: {', '.join(kinds)}. "
            f"Make them one, `adata.obs[{key!r}] = adata.obs[{key!r}].astype(str)`, say."
        ) from error


def check_conditions(
    adata: AnnData, condition_key: str, control: Any, stimulated: Sequence[Any] | None
) -> None:
    """Check that the condition column holds the control and something to compare it with."""
    found = list(adata.obs[condition_key].unique())
    values = [("control", control), *(("stimulated", value) for value in stimulated or [])]
    for argument, value in values:
        if value not in found:
            raise ValueError(
                f"No cell has {shown(value)} (`{argument}`) in adata.obs[{condition_key!r}]. The values "
                f"are: {listed(found)}. Pass one of them as `{argument}=`."
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
            f"{listed(others)}. Pass one of them as `stimulated=`."
        )


def perturbations_with_pairs(
    adata: AnnData,
    condition_key: str,
    control: Any,
    stimulated: Sequence[Any] | None,
    labels_key: str,
    batch_key: str | None,
) -> list[Any]:
    """Values of stimulated cells that have control cells of their cell type (and batch) to be paired with.

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
            f"control and stimulated cells: {listed(found)}. Check the columns"
            + (", or leave out `batch_key`." if batch_key else ".")
        )
    if excluded := [value for value in names if value not in paired]:
        warn(
            f"These perturbations have no control cells of their cell type{where} to be paired with "
            f"and are left out: {listed(excluded)}."
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
            f"adata.obs[{dose_key!r}] (`dose_key`) must hold numbers; it has the type {doses.dtype}, "
            f"with values like {listed(doses.unique()[:3])}. Convert it with "
            f"`adata.obs[{dose_key!r}] = adata.obs[{dose_key!r}].astype(float)`."
        )
    is_stimulated = adata.obs[condition_key].isin(stimulated).to_numpy()
    of_stimulated = doses.to_numpy(dtype=float)[is_stimulated]
    missing, wrong = np.isnan(of_stimulated), (of_stimulated < 0) | np.isinf(of_stimulated)
    if missing.any() or wrong.any():
        raise ValueError(
            f"adata.obs[{dose_key!r}] (`dose_key`) needs a dose of at least 0 for every stimulated "
            f"cell: {missing.sum()} of {is_stimulated.sum()} have none, and {wrong.sum()} a negative or "
            "infinite one. Fill them in, or leave these cells out."
        )


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Check that an argument has one of its possible values."""
    if value not in choices:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, choices))}, not {shown(value)}."
        )


def check_arguments(of: str, made: type, given: Mapping[str, Any]) -> None:
    """Refuse keywords that what is made does not take."""
    taken = [name for name in signature(made).parameters if name not in FIXED_ARGUMENTS]
    if unknown := [name for name in given if name not in taken]:
        raise TypeError(f"{of} takes no {listed(unknown)}. It takes: {listed(taken)}.")


def shown(value: object) -> str:
    """Return a value as it is written in Python: text in quotes, a number of NumPy as any other."""
    return repr(value.item() if isinstance(value, np.number | np.bool | np.str_) else value)


def listed(values: Iterable[Any]) -> str:
    """Values in words, the first of them if there are many.

    Text stands as it is, unless it could be taken for a value of another kind (``"0"``, ``"True"``).
    """
    values = list(values)
    is_plain = all(isinstance(value, str) and not _is_ambiguous(value) for value in values)
    words = [str(value) if is_plain else shown(value) for value in values[:MAX_LISTED]]
    more = f", ... ({len(values)} in all)" if len(values) > MAX_LISTED else ""
    return (", ".join(words) + more) or "none"


def _is_ambiguous(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.strip() != text or text in ("", "None", "True", "False")
    return True


def described_columns(adata: AnnData) -> str:
    """Obs columns, with the values of those that look categorical."""
    columns = []
    for key, column in adata.obs.items():
        if str(key).startswith("_scvi"):
            continue
        values = column.unique()
        few = len(values) <= MAX_LISTED
        columns.append(f"{key!r} ({listed(values)})" if few else repr(key))
    return listed(columns)


def missing_genes_hint(adata: AnnData, missing: npt.NDArray) -> str:
    """Tell what to call if genes seem to be in an AnnData under other names; else an empty text."""

    def n_found(names: Iterable[str], spelled: Callable[[str], str] = str) -> int:
        there = {spelled(name) for name in names}
        return sum(spelled(name) in there for name in missing)

    hints = [(0, "")]
    for key, column in adata.var.items():
        advice = (
            f"adata.var_names = adata.var[{key!r}].astype(str).to_numpy(); "
            "adata.var_names_make_unique()"
        )
        there = f"are in adata.var[{key!r}]. Name the genes by it: `{advice}`."
        hints.append((n_found(column.astype(str)), there))
    for spelled, there, key in (
        (_without_version, "with another Ensembl version or none", 'name.split(".")[0]'),
        (str.lower, "in other case (of the same species?)", "name.lower()"),
    ):
        advice = (
            f"names = {{{key}: name for name in model.get_var_names()}}; "
            f"adata.var_names = [names.get({key}, name) for name in adata.var_names]"
        )
        there = f"are there {there}. Give them the model's names: `{advice}`."
        hints.append((n_found(adata.var_names, spelled), there))
    n, hint = max(hints, key=lambda hint: hint[0])
    if n:
        return f" {n} of them {hint}"
    is_id, is_found_id = (
        2 * sum(bool(ENSEMBL_ID.match(name)) for name in names) > len(names)
        for names in (missing, adata.var_names)
    )
    if is_id != is_found_id:
        kinds = ("symbols", "Ensembl identifiers")
        return (
            f" The model's genes are {kinds[is_id]}, those of the AnnData {kinds[is_found_id]} "
            f"({listed(adata.var_names[:3])}, say): name them as the model does, by the annotation "
            "that the cells were counted with."
        )
    return ""


def _without_version(name: str) -> str:
    return name.split(".")[0] if ENSEMBL_ID.match(name) else name


def warn(message: str) -> None:
    """Warn the user, pointing at the line that scvi-tools' settings ask for."""
    warnings.warn(message, UserWarning, stacklevel=settings.warnings_stacklevel)
