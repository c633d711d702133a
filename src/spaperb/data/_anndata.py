"""Checks of what the user hands in: each error says what was found and what to do.

Nothing here changes the AnnData, and everything here runs before any training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from anndata import AnnData
from anndata.compat import DaskArray
from scipy import sparse

from spaperb._messages import format_list
from spaperb._types import Expression
from spaperb.data._disk import backed_matrix

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
            f"say; it has: {format_list(modalities)}"
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
        If there are no cells or genes, gene names repeat, there is no ``X`` or no such layer, or
        the matrix is neither in memory (or mapped into it) nor, if that will do, on disk.
    """
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(
            f"The AnnData is empty: it has {adata.n_obs} cells and {adata.n_vars} genes."
        )
    if not adata.var_names.is_unique:
        repeated = adata.var_names[adata.var_names.duplicated()].unique()
        raise ValueError(
            f"{len(repeated)} gene name(s) occur more than once: {format_list(repeated)}. "
            "Make them unique with `adata.var_names_make_unique()`."
        )
    layers = [key for key in adata.layers if key is not None]
    if layer is not None and layer not in layers:
        raise ValueError(
            f"There is no layer {layer!r} in adata.layers; it has: {format_list(layers)}."
        )
    x = adata.X if layer is None else adata.layers[layer]
    if x is None:
        raise ValueError(
            "adata.X is None, and expression is taken from there unless "
            "`setup_anndata(layer=...)` names a layer. Set the data up with the layer that holds "
            "it, or put it into X: `adata.X = adata.layers[...]`. The layers are: "
            f"{format_list(layers)}."
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
            f"{name} is {found}; a NumPy array or a SciPy CSR or CSC matrix is needed. Load it "
            "with `adata = adata.to_memory()`, or leave it on disk with `adata = "
            "spaperb.read_mapped(path)`."
        )
    return x


def check_no_view(adata: AnnData) -> None:
    """Check that fields can be written to an AnnData, and that it keeps them."""
    if adata.is_view:
        raise ValueError(
            f"The AnnData is a view of another one ({adata.n_obs} of its cells), and a model "
            "needs data of its own. Make a copy: `adata = adata.copy()`."
        )


def check_genes(adata: AnnData, expected: Sequence[Any] | npt.NDArray) -> None:
    """Check that the genes are those of a model, in its order."""
    names, expected = np.asarray(adata.var_names, dtype=str), np.asarray(expected, dtype=str)
    if np.array_equal(names, expected):
        return
    found = "their order differs"
    if len(missing := np.setdiff1d(expected, names)):
        found = f"missing are: {format_list(missing)}"
    elif len(names) > len(expected):
        found = f"it has {len(names) - len(expected)} more"
    raise ValueError(
        f"The genes of the AnnData are not those of the model ({len(expected)} genes); {found}. "
        "Subset and reorder it: adata[:, model.get_var_names()].copy(). A model loaded without "
        "data (`adata=False`) tells the names, and predicts cells with more genes, in any order."
    )


def missing_genes_hint(adata: AnnData, missing: npt.NDArray) -> str:
    """Tell what to call if genes seem to be in an AnnData under other names.

    Else an empty text.
    """

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
            f"({format_list(adata.var_names[:3])}, say): name them as the model does, by the "
            "annotation that the cells were counted with."
        )
    return ""


def _without_version(name: str) -> str:
    return name.split(".")[0] if ENSEMBL_ID.match(name) else name
