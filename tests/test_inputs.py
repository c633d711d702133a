"""Odd cells through set-up, training, prediction and files: a right answer or a clear error, and nothing of the user's changed.

`pytest tests/test_inputs.py --hypothesis-profile=nightly --hypothesis-show-statistics` tries ten times as many and counts what came of them.
"""

import linecache
import re
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import anndata as ad
import numpy as np
import pandas as pd
import scvi
from helpers import QUIET
from hypothesis import event, given, settings
from odd_cells import (
    BATCH,
    CASES,
    CONDITION,
    COUNTS,
    SEPARATOR,
    TYPE,
    Case,
    dense,
    query_cells,
    rearranged,
    renamed,
    setup_arguments,
    store_otherwise,
    training_cells,
    viewed,
)
from scipy import sparse

import spaperb
from spaperb import SpaPerbModel
from spaperb.contexts import MIN_MEASURED
from spaperb.data._scale import Scale

PACKAGE = str(Path(spaperb.__file__).parent)
LONGEST = timedelta(seconds=30)
"""An example takes half a second."""
SIZE = {"n_latent": 3, "n_hidden": 8}
REGISTERED = {"_scvi_condition", "_scvi_labels", "_scvi_batch"}
IDENTIFIERS = {"_scvi_uuid", "_scvi_manager_uuid"}
EXPECTED_WARNINGS = (
    r"(?:The e|E)xpression holds whole numbers only",
    "Expression holds negative values",
    "Expression looks (not log-transformed|log-transformed|log-normalised to base)",
    "The cells to predict seem to be on another scale",
    "The table has no column `log2_fold_change`",
    "Expression is a CSC matrix",
    "These perturbations have no control cells",
    "These names hold the separator",
    "These cell types have no control and stimulated cells to pair",
    r"\d+ of \d+ genes are unknown to the model",
    "The control cells of these cell types are farther",
    ".* was never measured",
    ".* (was|were) measured at doses",
    "Setting element .* of view",
)


class ChangedError(AssertionError):
    """Something of the user's was changed."""


class Handed(NamedTuple):
    """What was handed in when an error came."""

    case: Case
    train: ad.AnnData
    model: SpaPerbModel | None = None
    query: ad.AnnData | None = None
    asked: dict[str, Any] | None = None


@settings(deadline=LONGEST)
@given(CASES)
def test_a_right_answer_or_a_clear_error(case):
    event(examine(case))


def examine(case: Case) -> str:
    """Take cells through the package: "right answer", or "clear error: " and what it is about, or the first and a clear error of the response table.

    Raises
    ------
    ChangedError
        If something of the user's was changed.
    AssertionError
        If an answer is wrong, or an error says what is not so.
    Exception
        Any error or warning that comes from elsewhere than a check of the package's own.
    """
    # A forest of few trees is as good here, and calibration fits many.
    with warnings.catch_warnings(), patch("spaperb.response.N_TREES", 5):
        warnings.simplefilter("ignore")
        whole = training_cells(case)
        # As in pytest's settings, but for the warnings that these cells deserve.
        warnings.filterwarnings("error", module="spaperb")
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=f"(?s){message}")
        return _examine(case, whole)


def _examine(case: Case, whole: ad.AnnData) -> str:
    untouched = whole.copy()
    train = viewed(whole, case.seed % 2 + 1 if case.flaw == "a view to train on" else 0)
    before = train.copy()
    handed = Handed(case, before)
    try:
        SpaPerbModel.setup_anndata(train, **setup_arguments(case))
    except Exception as error:  # noqa: BLE001 - which one it is, is the question
        check_unchanged(untouched, whole)
        check_unchanged(before, train)
        return clear(error, handed)
    try:
        model = trained(case, train)
    except Exception as error:  # noqa: BLE001 - which one it is, is the question
        check_unchanged(before, train, obs=REGISTERED, uns=IDENTIFIERS)
        return clear(error, handed)
    check_unchanged(before, train, obs=REGISTERED, uns=IDENTIFIERS)

    whole = query_cells(case, before)
    untouched = whole.copy()
    query = viewed(whole, case.query["views"])
    before = query.copy()
    asked = arguments(case, model, query.n_obs)
    handed = Handed(case, handed.train, model, before, asked)
    try:
        model.predict_stimulated(query, **asked)
    except Exception as error:  # noqa: BLE001 - which one it is, is the question
        check_unchanged(before, query)
        return clear(error, handed)
    if case.query["views"]:
        check_unchanged(untouched, whole)
    assert not (accepted := flaws_of(handed)), f"Not refused: {accepted}"
    check_prediction(handed, query)
    try:
        check_table(handed, query)
    except Exception as error:  # noqa: BLE001 - which one it is, is the question
        return f"right answer, but for the response table: {clear(error, handed)}"
    return "right answer"


def trained(case: Case, adata: ad.AnnData) -> SpaPerbModel:
    """A small model of cells that are set up."""
    scvi.settings.seed = case.seed
    model = SpaPerbModel(adata, **SIZE, **case.model)
    model.train(**case.train, early_stopping=case.flaw == "early stopping", **QUIET)
    return model


def arguments(case: Case, model: SpaPerbModel, n_obs: int) -> dict[str, Any]:
    """Arguments of `predict_stimulated`."""
    asked = {**case.predict}
    known = model.perturbations
    name = known[-1 if asked["perturbation"] == "last" else 0]
    if asked["perturbation"] == "combination" and all(isinstance(name, str) for name in known):
        combination = (case.columns["separator"] or SEPARATOR).join(known[:2])
        name = combination if is_known(combination, case, known) else name
    asked["perturbation"] = name
    if (len(known) == 1 and case.seed % 2) or case.flaw == "no perturbation":
        asked["perturbation"] = None
    elif case.flaw == "an unknown perturbation":
        asked["perturbation"] = "never measured"
    doses = case.columns["doses"] or (1.0,)
    low, high = min(doses), max(doses)
    at = {"lowest": low, "highest": high, "between": (low + high) / 2, "above": high * 2}
    asked["dose"] = {**at, "below": low / 2}[asked["dose"]]
    if (case.columns["doses"] is None) != (case.flaw in ("no doses", "no dose")):
        asked["dose"] = None
    if case.flaw not in ("no counts", "counts drawn twice"):
        has_counts = model.response and case.columns["counts"]
        asked["sample"] &= has_counts and asked["n_samples"] == 1
    if case.query["storage"] == "dask" and case.flaw != "latent vectors of cells on disk":
        asked["latent"] = False
    some = np.arange(0, n_obs, 2)
    rows = {"some": some, "twice": [0, 0], "mask": np.isin(np.arange(n_obs), some), "nothing": []}
    asked["indices"] = rows.get(asked["indices"])
    return asked


def is_known(combination: str, case: Case, known: list[str]) -> bool:
    """Whether a combination of the first two perturbations is one of known ones."""
    separator, control = case.columns["separator"], case.columns["conditions"][0]
    if separator is None:
        return False
    parts = [part for part in combination.split(separator) if part != control]
    return bool(parts) and all(part in known for part in parts)


def check_unchanged(before: ad.AnnData, after: ad.AnnData, **added: set[str]) -> None:
    """Check that an AnnData is as before, but for these keys of its parts."""
    # AnnData drops unused categories of a view that it copies, as it did before.
    after = after.copy() if after.is_view else after
    try:
        for axis in ("obs", "var"):
            new = [key for key in getattr(after, axis) if key in added.get(axis, ())]
            pd.testing.assert_frame_equal(
                getattr(after, axis).drop(columns=new), getattr(before, axis), check_exact=True
            )
        pairs = [(before.X, after.X)]
        for part in ("layers", "obsm", "varm", "obsp", "varp"):
            old, new = getattr(before, part), getattr(after, part)
            assert set(old) == set(new) - added.get(part, set()), part
            pairs += [(old[key], new[key]) for key in old]
        for old, new in pairs:
            _check_same_matrix(old, new)
        kept = {key: after.uns[key] for key in after.uns if key not in added.get("uns", ())}
        assert kept == {
            key: before.uns[key] for key in before.uns if key not in added.get("uns", ())
        }
    except AssertionError as error:
        raise ChangedError(str(error)) from error


def _check_same_matrix(old: Any, new: Any) -> None:
    if old is None or new is None:
        assert old is new
        return
    assert old.dtype == new.dtype
    assert sparse.issparse(old) == sparse.issparse(new)
    if not sparse.issparse(old):
        np.testing.assert_array_equal(dense(new), dense(old))
        return
    assert old.format == new.format
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(new, part), getattr(old, part))


def check_prediction(handed: Handed, query: ad.AnnData) -> None:
    """Check the fields that a prediction wrote, its values, and that the same cells get it in any form."""
    case, _, model, before, asked = handed
    (key,) = set(query.layers) - set(before.layers)
    added = {f"X_{key}", spaperb.model.DELTA_KEY} if asked["latent"] else set()
    check_unchanged(before, query, layers={key}, obsm=added, uns={"spaperb"})
    assert set(query.obsm) == set(before.obsm) | added
    assert {**before.uns.get("spaperb", {}), key: query.uns["spaperb"][key]} == query.uns[
        "spaperb"
    ]
    if asked["key_added"] is None:
        assert re.fullmatch(r"spaperb_[^/]*(?<!_counts)" + "_counts" * asked["sample"], key, re.S)
    else:
        assert key == asked["key_added"]

    layer = query.layers[key]
    assert layer.shape == query.shape
    assert layer.dtype == np.float32
    layer = dense(layer)
    rows = np.arange(query.n_obs)
    if (indices := asked["indices"]) is not None:
        rows = np.unique(rows[indices]) if len(indices) else rows[:0]
    genes = query.var_names.get_indexer(model.get_var_names())
    is_wanted = np.zeros(query.shape, dtype=bool)
    is_wanted[np.ix_(rows, genes)] = True
    np.testing.assert_array_equal(np.isfinite(layer), is_wanted)
    assert np.isnan(layer[~is_wanted]).all()
    for name in added:
        z = query.obsm[name]
        assert z.shape == (query.n_obs, SIZE["n_latent"])
        np.testing.assert_array_equal(np.isfinite(z).all(1), np.isin(np.arange(query.n_obs), rows))
    values = layer[is_wanted]
    if model.expression_kind_["nonnegative"]:
        assert (values >= 0).all()
    if asked["sample"]:
        assert (values % 1 == 0).all()

    # The same model from its file, to the last bit.
    asked = {**asked, "latent": False, "inplace": False}
    has_values = not sparse.issparse(handed.train.X) or handed.train.X.nnz
    data = handed.train.copy() if case.seed % 2 and has_values else False
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, overwrite=True)
        loaded = SpaPerbModel.load(folder, data)
    np.testing.assert_array_equal(dense(loaded.predict_stimulated(before, **asked)), layer)

    order = _order(handed)
    gene_order = np.random.default_rng(case.seed).permutation(before.n_vars)
    other = rearranged(before, order, gene_order)
    again = dense(model.predict_stimulated(other, **{**asked, "indices": None}))
    expected = layer[order][:, gene_order]
    is_known = np.isin(order, rows)
    scale = np.abs(values).max(initial=1)
    np.testing.assert_allclose(again[is_known], expected[is_known], rtol=1e-5, atol=1e-5 * scale)

    if case.seed % 4 == 0:
        twin, new = (renamed(adata, handed.train) for adata in (handed.train, before))
        store_otherwise(twin)
        SpaPerbModel.setup_anndata(twin, **setup_arguments(case))
        again = dense(trained(case, twin).predict_stimulated(new, **asked))
        np.testing.assert_allclose(again, layer, rtol=1e-5, atol=1e-5 * scale)


def _order(handed: Handed) -> np.ndarray:
    """An order of the cells that must not matter: a cell's noise depends on its row, or on its place among those of its type."""
    case, _, model, query, asked = handed
    order = np.random.default_rng(case.seed).permutation(query.n_obs)
    if model.response and TYPE in query.obs and query.obs[TYPE].notna().all():
        types = query.obs[TYPE].astype(object).to_numpy()
        for name in pd.unique(types):
            of_type = types[order] == name
            order[of_type] = np.sort(order[of_type])
        return order
    has_noise = case.model["delta_noise"] == "fresh" or not asked["give_mean"]
    return np.arange(query.n_obs) if model.response or has_noise else order


def check_table(handed: Handed, query: ad.AnnData) -> None:
    """Check the response table against the cells, and the prediction where that adds the same change to each."""
    case, _, model, before, asked = handed
    query = before.copy()
    groupby = case.groupby or TYPE
    try:
        table = model.predict_response(
            query, asked["perturbation"], asked["dose"], groupby=case.groupby
        )
    finally:
        check_unchanged(before, query)
    genes = list(model.get_var_names())
    groups = before.obs[groupby].astype(object)
    is_control = np.ones(before.n_obs, dtype=bool)
    if CONDITION in before.obs:
        control = case.columns["conditions"][0]
        is_control = (before.obs[CONDITION].astype(object) == control).to_numpy()
    layer = case.cells["layer"]
    x = dense(before[:, genes].X if layer is None else before[:, genes].layers[layer])
    x = x.astype(np.float32).astype(float)
    assert set(table["group"]) == set(groups)
    shift = {}
    if asked["detection"] or groupby != TYPE:
        shift = None
    for name, rows in table.groupby("group", sort=False):
        assert sorted(rows["gene"]) == sorted(genes)
        of_group = (groups == name).to_numpy()
        if is_control[of_group].any():
            of_group = of_group & is_control
        by_gene = rows.set_index("gene").loc[genes]
        np.testing.assert_allclose(
            by_gene["mean_control"], x[of_group].mean(0), rtol=1e-5, atol=1e-9
        )
        assert np.isfinite(by_gene["mean_change"]).all()
        assert (by_gene["lower"] <= by_gene["mean_change"]).all()
        assert (by_gene["mean_change"] <= by_gene["upper"]).all()
        scale = Scale(**model.expression_kind_)
        assert ("log2_fold_change" in by_gene) == scale.is_logarithm
        assert ("responding" in by_gene) == scale.nonnegative
        if scale.is_logarithm:
            assert np.isfinite(by_gene["log2_fold_change"]).all()
        if scale.nonnegative:
            assert by_gene["responding"].between(0, 1 + 1e-9).all()  # a mean over cell types
        assert not by_gene["score"].isna().any()
        assert rows["score"].abs().is_monotonic_decreasing
        assert (by_gene["distance"].isna() | (by_gene["distance"] >= 0)).all()
        if shift is not None:
            shift[name] = by_gene["mean_change"].to_numpy()
    if shift is not None:
        changed = model.predict_stimulated(
            before, asked["perturbation"], asked["dose"], detection=False, inplace=False
        )
        changed = dense(changed)[:, before.var_names.get_indexer(genes)]
        expected = x + np.array([shift[name] for name in groups])
        expected = np.maximum(expected, 0) if model.expression_kind_["nonnegative"] else expected
        scale = np.abs(x).max(initial=1)
        np.testing.assert_allclose(changed, expected, rtol=1e-4, atol=1e-5 * scale)


def flaws_of(handed: Handed) -> list[str]:
    """What no answer may be given to."""
    case, _, model, _, asked = handed
    flaws = {about: REFUSALS[about][1](handed) for about in ALWAYS_REFUSED} | {
        "missing values": case.flaw == "missing values",
        "an unknown perturbation": asked["perturbation"] == "never measured",
        "several perturbations": asked["perturbation"] is None and len(model.perturbations) > 1,
        "no dose": case.columns["doses"] is not None and asked["dose"] is None,
        "a dose for a model without": case.columns["doses"] is None and asked["dose"] is not None,
        "counts drawn twice": asked["sample"] and asked["n_samples"] > 1,
        "counts of a model without": asked["sample"]
        and (not model.response or setup_arguments(case)["counts_layer"] is None),
        "latent vectors of cells on disk": asked["latent"] and case.query["storage"] == "dask",
    }
    return [about for about, is_so in flaws.items() if is_so]


def clear(error: Exception, handed: Handed) -> str:
    """What a clear error is about; raises any other."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename
    is_own = file.startswith(PACKAGE) and linecache.getline(
        file, trace.tb_lineno
    ).strip().startswith("raise")
    if not (is_own and isinstance(error, (ValueError, TypeError, KeyError, IndexError))):
        raise error
    for about, (message, is_so) in REFUSALS.items():
        if re.search(message, str(error), re.S):
            assert is_so(handed), f"This is not so: {error}"
            return f"clear error: {about}"
    raise AssertionError(f"Nothing speaks for this: {error}")


def _expression(adata: ad.AnnData, case: Case) -> Any:
    layer = case.cells["layer"]
    return dense(adata.X if layer is None else adata.layers[layer])


def _is_not_finite(handed: Handed) -> bool:
    cells = [adata for adata in (handed.train, handed.query) if adata is not None]
    matrices = [_expression(adata, handed.case) for adata in cells]
    return not all(np.isfinite(x).all() for x in matrices)


def _strata(handed: Handed) -> pd.DataFrame:
    """Control and stimulated cells of each cell type and batch that has both."""
    arguments, obs = setup_arguments(handed.case), handed.train.obs
    keys = [obs[TYPE].astype(object).to_numpy()]
    keys += [obs[BATCH].astype(object).to_numpy()] if arguments["batch_key"] else []
    condition = obs[CONDITION].astype(object)
    stimulated = arguments["stimulated"]
    if stimulated is None:
        is_stimulated = condition != arguments["control"]
    else:
        is_stimulated = condition.isin(
            stimulated if isinstance(stimulated, list) else [stimulated]
        )
    cells = pd.DataFrame(
        {
            "control": (condition == arguments["control"]).to_numpy(),
            "stimulated": is_stimulated.to_numpy(),
        }
    )
    counts = cells.groupby(keys, sort=False).sum()
    return counts[(counts > 0).all(axis=1)]


def _has_few_pairs(handed: Handed) -> bool:
    strata = _strata(handed)
    pairs = strata.max(axis=1).sum() * (handed.case.train["train_size"] or 0.9)
    return pairs <= 2 + len(strata) / 2


def _has_few_changes(handed: Handed) -> bool:
    """Whether fewer than three changes are measured that another cell type has too."""
    columns, obs = handed.case.columns, handed.train.obs
    if columns["batches"] or columns["doses"]:
        return True  # measured within these, with fewer cells each
    types, conditions = (obs[key].astype(object).to_numpy() for key in (TYPE, CONDITION))
    n_cells = pd.Series(1, [types, conditions]).groupby(level=[0, 1]).sum().unstack(fill_value=0)
    n_possible = 0
    n_cells = dict(zip(n_cells.columns, n_cells.to_numpy().T, strict=True))
    for name in handed.model.perturbations:
        n = np.minimum(n_cells[columns["conditions"][0]], n_cells[name])
        n_measured = (n >= max(1, min(MIN_MEASURED, n.max()))).sum()
        n_possible += n_measured if n_measured > 1 else 0
    return n_possible < 3 + 2 * (len(handed.model.perturbations) > 1)


def _has_several_kinds(handed: Handed) -> bool:
    columns = handed.case.columns
    named = [
        columns[key] for key in ("conditions", "types", "batches") if columns[key] is not None
    ]
    has_words = [{isinstance(name, str) for name in names} for names in named]
    return {True, False} in has_words


def _has_odd_doses(handed: Handed) -> bool:
    doses = handed.case.columns["doses"]
    return any(not isinstance(dose, (int, float)) or dose < 0 for dose in doses)


ALWAYS_REFUSED = (
    "a view to train on",
    "repeated genes",
    "missing genes",
    "not finite",
    "not numbers",
    "one condition",
    "nothing to pair",
    "negative values",
)
"""Errors that come whenever their reason is there; the others have further conditions."""
REFUSALS: dict[str, tuple[str, Callable[[Handed], bool]]] = {
    "no genes": ("The AnnData is empty", lambda h: h.query.n_vars == 0),
    "a view to train on": ("is a view", lambda h: h.case.flaw == "a view to train on"),
    "values of several kinds": ("values of several kinds", _has_several_kinds),
    "repeated genes": ("occur more than once", lambda h: not h.train.var_names.is_unique),
    "not finite": ("NaN or infinite", _is_not_finite),
    "not numbers": ("must be numbers", lambda h: h.case.cells["dtype"] in ("c8", "O")),
    "missing values": (
        "has no value for",
        lambda h: h.case.flaw == "missing values" or (h.query is not None and h.query.obs[h.case.groupby or TYPE].isna().any()),
    ),
    "an absent condition": (
        r"No cell has .* \(`(control|stimulated)`\)",
        lambda h: not set(h.case.columns["conditions"]) <= set(h.train.obs[CONDITION].astype(object)),
    ),
    "one condition": ("All .* cells have the condition", lambda h: h.train.obs[CONDITION].astype(object).nunique() == 1),
    "nothing to pair": ("nothing to pair", lambda h: _strata(h).empty),
    "few pairs": ("training needs at least 2", _has_few_pairs),
    "nothing to stop early by": ("Early stopping watches", lambda h: h.case.flaw == "early stopping"),
    "odd doses": ("`dose_key`", _has_odd_doses),
    "no counts": (
        "must hold raw counts|is not log1p of the counts",
        lambda h: h.case.cells["values"] != "normalised"
        or not dense(h.train.layers[COUNTS]).any()
        or h.case.cells["dtype"] not in ("f4", "f8")
        or h.query is not None
        or h.case.flaw == "counts of other cells",
    ),
    "several perturbations": ("Pass one of them, or a combination", lambda h: len(h.model.perturbations) > 1),
    "an unknown perturbation": (
        "is not a perturbation that the model",
        lambda h: h.asked["perturbation"] not in h.model.perturbations,
    ),
    "no dose": ("pass `dose=`", lambda h: h.asked["dose"] is None),
    "a dose for a model without": ("takes no `dose`", lambda h: h.case.columns["doses"] is None),
    "missing genes": ("genes are missing", lambda h: len(set(h.train.var_names) - set(h.query.var_names)) > 0),
    "negative values": (
        "holds negative values, and the model",
        lambda h: (_expression(h.query, h.case) < 0).any() and not (_expression(h.train, h.case) < 0).any(),
    ),
    "counts of a model without": (
        "Counts are drawn by a model",
        lambda h: not h.model.response or setup_arguments(h.case)["counts_layer"] is None,
    ),
    "counts drawn twice": ("Counts are drawn once", lambda h: h.asked["n_samples"] > 1),
    "latent vectors of cells on disk": ("Latent vectors are computed at once", lambda h: h.case.query["storage"] == "dask"),
    "no groups": ("There is no column", lambda h: (h.case.groupby or TYPE) not in h.query.obs),
    "intervals without the response": ("which this model was made without", lambda h: not h.model.response),
    "few changes": ("Intervals are learned from", _has_few_changes),
}  # fmt: skip
