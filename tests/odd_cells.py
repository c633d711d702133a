"""Odd cells: Hypothesis strategies of what a user may hand in, and AnnData made of them.

A `Case` says in plain values what its cells, model and prediction are like, so that Hypothesis can
print and shrink it; numbers of expression come from its seed. `Sound` and `Few` are of simulated
cells, enough of them to tell what must not go unnoticed. `HARMLESS` holds what may be done to
cells without a difference to their prediction, `OTHER_SCALES` what may not.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from dask import array as da
from hypothesis import strategies as st
from scipy import sparse

from spaperb import datasets

LAYER, COUNTS = "normalised", "counts"
CONDITION, TYPE, BATCH, DOSE = "condition", "cell_type", "batch", "dose"
SEPARATOR = "+"


@dataclass(frozen=True)
class Case:
    """Cells to train on, a model, cells to predict, and what is asked of them.

    Odd, but sound unless there is a flaw.
    """

    seed: int
    cells: dict[str, Any]
    columns: dict[str, Any]
    model: dict[str, Any]
    train: dict[str, Any]
    query: dict[str, Any]
    predict: dict[str, Any]
    groupby: str | None
    flaw: str | None


FLAWS = (
    "a view to train on",
    "repeated genes",
    "not finite",
    "not numbers",
    "missing values",
    "values of several kinds",
    "odd doses",
    "no doses",
    "missing genes",
    "negative values",
    "an unknown perturbation",
    "no perturbation",
    "no dose",
    "no counts",
    "counts of other cells",
    "counts of other expression",
    "counts drawn twice",
    "latent vectors of cells on disk",
    "early stopping",
)


def mostly(*usual: Any, odd: tuple, share: int = 3) -> st.SearchStrategy:
    """One of the usual values, and in one of so many cases an odd one."""
    return st.integers(1, share).flatmap(lambda i: st.sampled_from(odd if i == share else usual))


ODD_NAMES = (
    "", " ", "a/b", "a_b", "nan", "None", "1", "1.0", "-0", "True", "é", "e\u0301", "細胞",
    "ß", "A+", "+B", "+", "A+B", "A+A",
    "control+", "spaperb", "_scvi_labels", "a\nb", "\\", "'", '"', "{}", "%s", "a" * 200,
)  # fmt: skip
# HDF5 and fixed-width NumPy strings end at a zero, and files take no lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


def names(n: int) -> st.SearchStrategy[tuple]:
    """Distinct names of one kind: words, odd words, any words, numbers, or truth values."""
    words = ["A", "B", "C", "D", "E", "A+B", "B+A", "A+C", "A+control"]
    sets = [words, ODD_NAMES, range(-3, 13), [False, True], [0.0, 1.0, -1.5, 1e6, 1e-300]]
    kinds = [st.permutations(some).map(lambda order: order[:n]) for some in sets if len(some) >= n]
    kinds.append(st.lists(TEXT, min_size=n, max_size=n, unique=True))
    return st.one_of(kinds).map(tuple)


CELLS = st.fixed_dictionaries(
    {
        "n_cells": mostly(36, 48, odd=(3, 4, 6, 9, 13, 18)),
        "n_genes": mostly(7, 12, odd=(1, 2, 3)),
        "design": mostly("balanced", odd=("random", "a type without stimulated cells")),
        "values": mostly(
            "normalised",
            odd=(
                "up to a million", "every scale", "zeros", "constant", "one cell for all",
                "negative",
                "counts", "one value",
            ),
            share=2,
        ),
        "dtype": mostly(
            "f4", "f8", odd=("f2", "g", ">f4", "i1", "i4", "i8", "u1", "u2", "u4", "u8", "?")
        ),
        "storage": st.sampled_from(
            [
                "c", "f", "strided", "readonly", "csr_matrix", "csc_matrix", "csr_array",
                "csc_array",
                "unsorted", "duplicates", "explicit zeros", "long indices",
            ]
        ),
        "layer": mostly(None, odd=(LAYER,)),
        "genes": mostly("plain", odd=("odd", "numbers"), share=2),
        "obs_names": st.sampled_from(["plain", "repeated", "odd"]),
    }
)  # fmt: skip

COLUMNS = st.fixed_dictionaries(
    {
        "conditions": mostly(2, odd=(3, 4)).flatmap(names),
        "types": mostly(3, 4, odd=(1, 2)).flatmap(names),
        "batches": mostly(None, odd=(1, 2, 3)).flatmap(
            lambda n: st.none() if n is None else names(n)
        ),
        "doses": mostly(
            None, odd=((1.0,), (0.0, 1.0), (1e-40, 0.1, 1e30), (1, 2, 30), tuple(range(1, 13)))
        ),
        "as": st.sampled_from(
            ["object", "categorical", "unused categories", "ordered", "plain", "nullable"]
        ),
        "stimulated": st.sampled_from(["all", "first", "list"]),
        "separator": st.sampled_from([SEPARATOR, None, "/"]),
        "counts": mostly(False, odd=(True,)),
    }
)

SIZE: dict[str, Any] = {"n_latent": 3, "n_hidden": 8}
FROM_SCRATCH: dict[str, Any] = {"objective": "in_context", "pretrained": False, **SIZE}
MODEL = st.sampled_from(
    [
        {"objective": "in_context"},
        {**FROM_SCRATCH, "n_networks": 1},
        {**FROM_SCRATCH, "n_networks": 2},
        {"objective": "published", "delta_noise": "fresh", **SIZE},
        {"objective": "published", "delta_noise": "fixed", **SIZE},
    ]
)

TRAIN = st.fixed_dictionaries(
    {
        "max_epochs": st.integers(1, 2),
        "batch_size": st.sampled_from([2, 3, 5, 64]),
        "train_size": mostly(None, odd=(0.5, 1.0)),
    }
)

QUERY = st.fixed_dictionaries(
    {
        "cells": st.sampled_from(
            ["all", "all", "control", "stimulated", "one", "shuffled", "repeated"]
        ),
        "genes": mostly("same", odd=("permuted", "more"), share=2),
        "types": mostly("kept", odd=("absent", "new", "some missing", "some new"), share=2),
        "conditions": st.sampled_from(["kept", "absent", "some missing", "others"]),
        "batches": st.sampled_from(["kept", "absent", "some missing", "others"]),
        "values": mostly("same", odd=("one cell of a million", "a cell of zeros")),
        "storage": st.sampled_from(["c", "csr_matrix", "csc_array", "duplicates", "dask"]),
        "as": st.sampled_from(["object", "categorical", "unused categories", "plain", "nullable"]),
        "views": st.integers(0, 2),
    }
)

PREDICT = st.fixed_dictionaries(
    {
        "perturbation": st.sampled_from(["first", "last", "combination"]),
        "dose": st.sampled_from(["lowest", "highest", "between", "below", "above"]),
        "indices": mostly(None, odd=("some", "twice", "mask", "nothing")),
        "n_samples": mostly(1, odd=(2,)),
        "give_mean": st.booleans(),
        "seed": st.integers(0, 3),
        "detection": st.booleans(),
        "sample": st.booleans(),
        "key_added": mostly(None, odd=("細胞", "")),
        "latent": mostly(False, odd=(True,)),
    }
)


def flawed(case: Case) -> Case:
    """Put the flaw of a case where it belongs, and keep its minibatches small."""

    def with_(part: str, **values: Any) -> Case:
        return replace(case, **{part: {**getattr(case, part), **values}})

    if case.model["objective"] == "in_context":
        case = with_("train", batch_size=min(case.train["batch_size"], 3))
    if case.flaw in ("counts of other cells", "counts of other expression"):
        case = with_("columns", counts=True)
    i, columns = case.seed, case.columns
    if columns["counts"] and case.flaw != "counts of other expression":
        case = with_("cells", values="normalised", dtype=("f4", "f8")[i % 2])
    match case.flaw:
        case "repeated genes":
            return with_("cells", genes="repeated", n_genes=7)
        case "not finite":
            return with_("cells", dtype="f4")
        case "not numbers":
            return with_("cells", dtype=("c8", "O")[i % 2])
        case "values of several kinds":
            key = ("conditions", "types", "batches")[i % 3]
            return with_("columns", **{key: (1, "1", "b", 2)[: max(2, len(columns[key] or ()))]})
        case "odd doses":
            return with_("columns", doses=((-1.0, 1.0), ("1", "2"), (1.0, None))[i % 3])
        case "missing genes":
            return with_("query", genes="fewer")
        case "negative values":
            return with_("query", values="negative")
        case "latent vectors of cells on disk":
            case = with_("predict", latent=True)
            return with_("query", storage="dask")
        case "counts drawn twice":
            return with_("predict", n_samples=2, sample=True)
    return case


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**16),
    cells=CELLS,
    columns=COLUMNS,
    model=MODEL,
    train=TRAIN,
    query=QUERY,
    predict=PREDICT,
    groupby=mostly(None, odd=("donor", BATCH)),
    flaw=mostly(None, odd=FLAWS),
).map(flawed)


@dataclass(frozen=True)
class Sound:
    """Simulated cells, of which every second of a type and condition is to be predicted."""

    seed: int
    n_cell_types: int
    n_cells: int
    n_genes: int
    objective: str
    counts: bool


SOUND = st.builds(
    Sound,
    seed=st.integers(0, 2**16),
    n_cell_types=st.integers(3, 5),
    # 15 control cells of a type to predict or more: with fewer, noise explains almost any
    # difference.
    n_cells=st.integers(30, 60),
    # With fewer genes a cell shows too few different counts to tell its scale from.
    n_genes=st.integers(60, 150),
    objective=mostly("in_context", odd=("published",)),
    counts=st.booleans(),
)


@dataclass(frozen=True)
class Few:
    """Simulated cells, of one type of which hardly any stimulated cell was measured."""

    seed: int
    n_cell_types: int
    n_cells: int
    n_genes: int
    n_kept: int


FEW = st.builds(
    Few,
    seed=st.integers(0, 2**16),
    # Fewer other types, cells or genes do not tell how well a type is predicted without its own.
    n_cell_types=st.integers(5, 8),
    n_cells=st.integers(60, 100),
    n_genes=st.integers(150, 300),
    n_kept=st.integers(4, 8),
)


def simulated_cells(case: Sound | Few) -> ad.AnnData:
    """Control and stimulated cells, without the truth beside them."""
    adata = datasets.simulated(case.n_cell_types, case.n_cells, case.n_genes, seed=case.seed)
    del adata.layers["true_control"], adata.layers["true_stimulated"]
    return adata


def setup_arguments(case: Case) -> dict[str, Any]:
    """Arguments of `setup_anndata`."""
    columns, conditions = case.columns, case.columns["conditions"]
    stimulated = {"all": None, "first": conditions[1], "list": list(conditions[1:])}
    return {
        "control": conditions[0],
        "stimulated": stimulated[columns["stimulated"]],
        "layer": case.cells["layer"],
        "batch_key": None if columns["batches"] is None else BATCH,
        "dose_key": None if columns["doses"] is None else DOSE,
        "combination_separator": columns["separator"],
        "counts_layer": COUNTS if columns["counts"] and case.flaw != "no counts" else None,
    }


def training_cells(case: Case) -> ad.AnnData:
    """AnnData to train on."""
    cells, columns = case.cells, case.columns
    rng = np.random.default_rng(case.seed)
    n, n_genes = cells["n_cells"], cells["n_genes"]
    kinds = _arranged(cells["design"], n, len(columns["types"]), len(columns["conditions"]), rng)
    types, conditions = kinds.T
    counts, x = _expression(cells["values"], types, conditions, n_genes, rng)
    if case.flaw == "not finite":
        x = x.astype(float)
        x[0, 0] = rng.choice([np.nan, np.inf, -np.inf])
    if case.flaw == "counts of other cells":
        counts = counts[::-1]
    obs = pd.DataFrame(index=_obs_names(cells["obs_names"], n))
    obs[CONDITION] = _column(columns["conditions"], conditions, columns["as"], obs.index)
    obs[TYPE] = _column(columns["types"], types, columns["as"], obs.index)
    obs["donor"] = pd.Categorical.from_codes(np.arange(n) % 2, ["x", "y"])
    if columns["batches"] is not None:
        batches = rng.permutation(np.arange(n) % len(columns["batches"]))
        obs[BATCH] = _column(columns["batches"], batches, columns["as"], obs.index)
    if columns["doses"] is not None:
        doses = [columns["doses"][i] for i in rng.integers(len(columns["doses"]), size=n)]
        obs[DOSE] = pd.Series(doses, index=obs.index)
    if case.flaw == "missing values":
        key = (CONDITION, TYPE)[case.seed % 2]
        obs[key] = obs[key].astype(object)
        obs.iloc[0, obs.columns.get_loc(key)] = None
    var = pd.DataFrame({"of": range(n_genes)}, index=_gene_names(cells["genes"], n_genes))
    # What a user keeps beside expression, which nobody may touch.
    others = {
        "obsm": {"X_pca": rng.random((n, 2))},
        "obsp": {"distances": sparse.csr_matrix(np.eye(n))},
        "uns": {"spaperb": {"earlier": {"seed": 1}}, "colors": ["red"]},
    }
    adata = ad.AnnData(_stored(x, cells["dtype"], cells["storage"]), obs, var, **others)
    adata.layers[COUNTS] = _stored(counts, "f4", cells["storage"])
    if cells["layer"] is not None:
        adata.layers[cells["layer"]] = adata.X
        adata.X = np.ones((n, n_genes), dtype=np.float32)
    return adata


def query_cells(case: Case, train: ad.AnnData) -> ad.AnnData:
    """Cells to predict, made from those trained on."""
    query, columns = case.query, case.columns
    rng = np.random.default_rng([case.seed, 1])
    is_control = (train.obs[CONDITION] == columns["conditions"][0]).fillna(False).to_numpy(bool)
    every = np.arange(train.n_obs)
    rows = {
        "all": every,
        "control": every[is_control],
        "stimulated": every[~is_control],
        "one": every[:1],
        "shuffled": rng.permutation(every),
        "repeated": rng.choice(every, 2 * len(every)),
    }[query["cells"]]
    rows = rows if len(rows) else every
    layer = case.cells["layer"]
    x, counts = (
        dense(matrix)[rows].astype(matrix.dtype.newbyteorder("="))
        for matrix in (train.X if layer is None else train.layers[layer], train.layers[COUNTS])
    )
    if query["values"] == "negative":
        x = x.astype(float) - 1
    else:
        # Types of whole numbers hold no million.
        largest = (
            np.iinfo(x.dtype).max if x.dtype.kind in "iu" else 1e6 if x.dtype != "f2" else 6e4
        )
        for values in (x, counts):
            if query["values"] == "one cell of a million" and values.dtype != "?":
                values[0] = min(1e6, largest)
            elif query["values"] == "a cell of zeros":
                values[0] = 0
    obs = pd.DataFrame(index=_obs_names("repeated", len(rows)))
    others = {CONDITION: columns["conditions"], TYPE: columns["types"], BATCH: columns["batches"]}
    for key, how in ((CONDITION, "conditions"), (TYPE, "types"), (BATCH, "batches")):
        if key in train.obs and query[how] != "absent":
            values = train.obs[key].astype(object).to_numpy()[rows]
            obs[key] = _changed(values, query[how], query["as"], others[key], obs.index)
    if query["cells"] != "one":
        obs["donor"] = pd.Categorical.from_codes(np.arange(len(rows)) % 2, ["x", "y"])
    var = train.var[[]].copy()
    if query["genes"] == "more":
        x, counts = (
            np.hstack([np.ones_like(values[:, [0, 0]]), values]) for values in (x, counts)
        )
        var = pd.DataFrame(index=["more_0", "more_1", *var.index])
    new = ad.AnnData(x, obs, var, layers={COUNTS: counts})
    n_genes = new.n_vars
    order = {"permuted": rng.permutation(n_genes), "fewer": np.arange(1, n_genes)}
    new = new[:, order.get(query["genes"], slice(None))].copy()
    stored = _stored(new.X, new.X.dtype, query["storage"])
    new.layers[COUNTS] = _stored(new.layers[COUNTS], "f4", query["storage"])
    if layer is None:
        new.X = stored
    else:
        new.layers[layer] = stored
        new.X = None
    return new


def with_layers(adata: ad.AnnData, change: Callable[[Any], Any], var: pd.DataFrame) -> ad.AnnData:
    """The same cells with other matrices of expression and counts, for these genes."""
    x = None if adata.X is None else change(adata.X)
    layers = {key: change(adata.layers[key]) for key in adata.layers if key is not None}
    return ad.AnnData(x, adata.obs.copy(), var, layers=layers)


Names = dict[str, Any]
"""Names of the training cells by column."""
Change = Callable[[ad.AnnData, np.random.Generator, Names], ad.AnnData]


def _genes_in_another_order(
    adata: ad.AnnData, rng: np.random.Generator, names: Names
) -> ad.AnnData:
    return adata[:, rng.permutation(adata.n_vars)].copy()


def _more_genes(adata: ad.AnnData, rng: np.random.Generator, names: Names) -> ad.AnnData:
    at = rng.integers(adata.n_vars + 1)
    genes = list(adata.var_names)
    var = pd.DataFrame(index=[*genes[:at], "further_0", "further_1", *genes[at:]])
    change = lambda matrix: np.insert(dense(matrix), [at, at], 0, axis=1)  # noqa: E731
    return with_layers(adata, change, var)


def _stored_otherwise(adata: ad.AnnData, rng: np.random.Generator, names: Names) -> ad.AnnData:
    storages = [
        "c",
        "f",
        "strided",
        "readonly",
        "csr_matrix",
        "csc_array",
        "unsorted",
        "duplicates",
    ]
    storage = rng.choice([*storages, "explicit zeros", "long indices", "dask"])
    return with_layers(
        adata, lambda matrix: _stored(dense(matrix), matrix.dtype, storage), adata.var.copy()
    )


def _in_another_precision(adata: ad.AnnData, rng: np.random.Generator, names: Names) -> ad.AnnData:
    # Models read single precision, which double holds exactly.
    dtype = rng.choice(["f4", "f8"])
    return with_layers(
        adata, lambda matrix: dense(matrix).astype("f4").astype(dtype), adata.var.copy()
    )


def _viewed(adata: ad.AnnData, rng: np.random.Generator, names: Names) -> ad.AnnData:
    return viewed(adata, int(rng.integers(1, 3)))


def _columns_in_another_order(
    adata: ad.AnnData, rng: np.random.Generator, names: Names
) -> ad.AnnData:
    other = adata.copy()
    other.obs["further"] = 1.0
    other.obs = other.obs[rng.permutation(other.obs.columns)]
    return other


def _spelling(name: Any) -> Any:
    """What names are told apart by.

    Numbers by value, texts but for case and spaces at their ends.
    """
    try:
        return float(name)
    except ValueError:
        return str(name).strip().casefold()


def _typed_otherwise(key: str) -> Change:
    def change(adata: ad.AnnData, rng: np.random.Generator, names: Names) -> ad.AnnData:
        other = adata.copy()
        if key not in other.obs:
            return other
        values = other.obs[key].astype(object)
        found = list(values.dropna().unique())
        # Texts that are spelled alike are told apart by their exact spelling, which has to stay
        # then.
        known = {*names[key], *found}
        is_clear = len(set(map(_spelling, known))) == len(known)
        how = rng.choice(["object", "text", "padded", "float"] if is_clear else ["object"])
        if how == "float" and all(type(name) in (int, np.int64) for name in found):
            values = values.map(float, na_action="ignore").astype(object)
        elif how in ("text", "padded"):
            form = " {} ".format if how == "padded" else str
            values = values.map(form, na_action="ignore")
        present = list(values.dropna().unique())
        categories = [present[i] for i in rng.permutation(len(present))] + [
            _unseen(present or [""])
        ]
        dtypes = [object, pd.CategoricalDtype(pd.Index(categories, dtype=object).unique())]
        if all(isinstance(name, str) for name in present):
            dtypes.append("string")
        other.obs[key] = values.astype(dtypes[rng.integers(len(dtypes))])
        return other

    return change


HARMLESS: dict[str, Change] = {
    "called twice": lambda adata, rng, names: adata.copy(),
    "genes in another order": _genes_in_another_order,
    "more genes": _more_genes,
    "stored otherwise": _stored_otherwise,
    "in another precision": _in_another_precision,
    "a view": _viewed,
    "columns in another order": _columns_in_another_order,
    "types of another type": _typed_otherwise(TYPE),
    "conditions of another type": _typed_otherwise(CONDITION),
    "batches of another type": _typed_otherwise(BATCH),
}
"""The same cells in other ways: each has the prediction that it has anyway, to the last bit."""


def _normalised(counts: np.ndarray, target_sum: float = 1e4) -> np.ndarray:
    return counts / np.maximum(counts.sum(1, keepdims=True), 1) * target_sum


OTHER_SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "raw counts": lambda counts: counts,
    "not logged": _normalised,
    "logged twice": lambda counts: np.log1p(np.log1p(_normalised(counts))),
    "base 2": lambda counts: np.log1p(_normalised(counts)) / np.log(2),
    "base 10": lambda counts: np.log1p(_normalised(counts)) / np.log(10),
    "counts per million": lambda counts: np.log1p(_normalised(counts, 1e6)),
    "scaled": lambda counts: _scaled(np.log1p(_normalised(counts))),
}
"""From counts to expression on another scale than ten thousand counts and natural logarithms."""


def _scaled(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / np.maximum(x.std(0), 1e-3)


def viewed(adata: ad.AnnData, depth: int) -> ad.AnnData:
    """The same cells as a view, of a view."""
    for _ in range(depth):
        adata = adata[np.arange(adata.n_obs)]
    return adata


def rearranged(adata: ad.AnnData, cells: np.ndarray, genes: np.ndarray) -> ad.AnnData:
    """The same cells in another order, of genes too, stored and named in another way."""
    other = adata[cells][:, genes].copy()
    store_otherwise(other)
    for key in {CONDITION, TYPE, BATCH}.intersection(other.obs):
        values = other.obs[key].astype(object)
        if isinstance(other.obs[key].dtype, pd.CategoricalDtype):
            other.obs[key] = values
        else:
            present = list(values.dropna().unique())
            other.obs[key] = pd.Categorical(values, categories=present[::-1])
    other.obs_names = [f"other {i}" for i in range(other.n_obs)]
    return other


def renamed(adata: ad.AnnData, train: ad.AnnData) -> ad.AnnData:
    """The same cells with other names of the training types, in the same order."""
    known = train.obs[TYPE].astype("category").cat.categories
    names = {name: f"type {i}" for i, name in enumerate(known)}
    other = adata.copy()
    if TYPE in other.obs:
        values = other.obs[TYPE].astype(object).map(lambda name: names.get(name, name))
        others = sorted(set(values.dropna()).difference(names.values()), key=str)
        other.obs[TYPE] = pd.Categorical(values, [*names.values(), *others, "no cell"])
    return other


def store_otherwise(adata: ad.AnnData) -> None:
    """Make dense expression sparse, and any other dense."""
    for layer in (None, *adata.layers):
        matrix = adata.X if layer is None else adata.layers[layer]
        if matrix is None:
            continue
        storage = "csr_matrix" if isinstance(matrix, np.ndarray) else "f"
        stored = _stored(dense(matrix), matrix.dtype, storage)
        if layer is None:
            adata.X = stored
        else:
            adata.layers[layer] = stored


def _arranged(
    design: str, n: int, n_types: int, n_conditions: int, rng: np.random.Generator
) -> np.ndarray:
    """Type and condition of each cell, ``(n, 2)``."""
    if design == "random":
        kinds = rng.integers([n_types, n_conditions], size=(n, 2))
    else:
        i = np.arange(n)
        kinds = np.column_stack([i // n_conditions % n_types, i % n_conditions])
    if design == "a type without stimulated cells":
        kinds[kinds[:, 0] == n_types - 1, 1] = 0
    return rng.permutation(kinds)


def _expression(
    values: str, types: np.ndarray, conditions: np.ndarray, n_genes: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Raw counts of cells and what expression is made of them, ``(n, G)`` each."""
    n = len(types)
    rates = rng.gamma(1, 3, (types.max() + 1, n_genes))[types]
    rates *= np.exp(rng.normal(0, 1, (conditions.max() + 1, n_genes)))[conditions]
    rates[:, rng.random(n_genes) < 0.2] = 0
    counts = rng.poisson(rates)
    x = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)
    if values == "up to a million":
        x = rng.uniform(0, 1e6, x.shape)
    elif values == "every scale":
        x = 10 ** rng.uniform(-6, 6, x.shape) * (counts > 0)
    elif values == "zeros":
        x = np.zeros(x.shape)
    elif values == "constant":
        x[:, ::2] = rng.choice([0, 1, 7.5, 1e6], x[:, ::2].shape[1])
    elif values == "one cell for all":
        x = np.tile(x[:1], (n, 1))
    elif values == "one value":
        x = np.zeros(x.shape)
        x[n // 2, n_genes // 2] = 1e6
    elif values == "negative":
        x = x - 3
    elif values == "counts":
        x = counts * rng.choice([1, 1000], (n, 1))

    return counts, x


def _stored(x: np.ndarray, dtype: Any, storage: str) -> Any:
    """Put values into a matrix of a type and format."""
    if np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        # The largest numbers of long types are no doubles.
        x = np.clip(np.nan_to_num(np.rint(x)), max(limits.min, -(2**53)), min(limits.max, 2**53))
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    if storage == "strided":
        return np.repeat(x, 2, axis=1)[:, ::2]
    if storage == "dask":
        return da.from_array(x, chunks=(5, x.shape[1]))
    # SciPy has no sparse matrices of the other types.
    if (
        storage not in ("c", "f", "readonly")
        and x.dtype.char in "fdbhilqBHILQ?F"
        and x.dtype.isnative
    ):
        return _sparse(x, storage)
    x = np.array(x, order="F" if storage == "f" else "C")
    x.flags.writeable = storage != "readonly"
    return x


def _sparse(x: np.ndarray, storage: str) -> Any:
    if storage in ("csr_matrix", "csc_matrix", "csr_array", "csc_array"):
        return getattr(sparse, storage)(x)
    matrix = sparse.csr_matrix(x)
    if storage == "unsorted":
        for start, stop in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
            matrix.indices[start:stop] = matrix.indices[start:stop][::-1].copy()
            matrix.data[start:stop] = matrix.data[start:stop][::-1].copy()
        matrix.has_sorted_indices = False
    elif storage == "duplicates" and x.dtype.kind == "f":
        # Each value comes in two parts, whole ones if it is whole.
        is_whole = (matrix.data % 1 == 0).all()
        half = matrix.data // 2 if is_whole else matrix.data / 2
        values = np.column_stack([half, matrix.data - half]).ravel()
        matrix = sparse.csr_matrix(
            (values, np.repeat(matrix.indices, 2), 2 * matrix.indptr), x.shape
        )
    elif storage == "explicit zeros":
        columns = np.indices(x.shape)[1]
        matrix = sparse.csr_matrix(
            (x.ravel(), columns.ravel(), np.arange(len(x) + 1) * x.shape[1]), x.shape
        )
    elif storage == "long indices":
        matrix.indices, matrix.indptr = matrix.indices.astype("i8"), matrix.indptr.astype("i8")
    return matrix


def dense(x: Any) -> np.ndarray:
    """Values of any matrix."""
    if isinstance(x, da.Array):
        x = x.compute()
    return x.toarray() if sparse.issparse(x) else np.array(x)


def _column(values: tuple, codes: np.ndarray, kind: str, index: pd.Index) -> pd.Series:
    """Column of obs with these values."""
    of_cells = [values[code] for code in codes]
    if kind == "plain":
        return pd.Series(of_cells, index=index)
    if kind == "nullable":
        return pd.Series(of_cells, index=index).convert_dtypes()
    column = pd.Series(of_cells, index=index, dtype=object)
    if kind == "object":
        return column
    categories = list(values)[::-1]
    if kind == "unused categories" and not isinstance(values[0], bool):
        categories.append(_unseen(values))
    return column.astype(pd.CategoricalDtype(categories, ordered=kind == "ordered"))


def _changed(values: np.ndarray, how: str, kind: str, known: tuple, index: pd.Index) -> pd.Series:
    """Column of the cells to predict, with values that training did not see, or none."""
    unseen = _unseen(known)
    if how in ("new", "others"):
        values = np.full(len(values), unseen, dtype=object)
    elif how in ("some missing", "some new"):
        values = values.copy()
        values[::3] = None if how == "some missing" else unseen
    column = pd.Series(list(values), index=index, dtype=object)
    if kind == "plain":
        return pd.Series(list(values), index=index)
    if kind == "nullable":
        return column.infer_objects().convert_dtypes()
    if kind == "object":
        return column
    categories = list(column.dropna().unique())
    if kind == "unused categories":
        categories.append("unused")
    return column.astype(pd.CategoricalDtype(categories))


def _unseen(names: tuple) -> Any:
    """Another name of the same kind."""
    return (
        "unseen"
        if isinstance(names[0], str)
        else max(number for number in names if not isinstance(number, str)) + 5
    )


def _obs_names(kind: str, n: int) -> list[str]:
    if kind == "repeated":
        return [f"cell {i // 3}" for i in range(n)]
    return [ODD_NAMES[i % len(ODD_NAMES)] if kind == "odd" else f"cell {i}" for i in range(n)]


def _gene_names(kind: str, n: int) -> list[str]:
    if kind == "numbers":
        return [str(i) for i in range(n)]
    if kind == "repeated":
        return ["gene"] * n
    return list(ODD_NAMES[:n]) if kind == "odd" else [f"gene_{i}" for i in range(n)]
