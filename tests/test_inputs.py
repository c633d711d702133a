"""Odd cells through set-up, training, prediction and files: a right answer or a clear error.

The same cells in other ways have to have the same prediction, and what would make it wrong has to
be told. Each is an attack of some kind, and a judge is handed the kinds and attacks.

The slow tests try other examples, and more. `pytest tests/test_inputs.py -m "not slow"
--hypothesis-profile=nightly --hypothesis-show-statistics` tries ten times as many, others each
time, and counts what came of them.
"""

import linecache
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
from helpers import QUIET
from hypothesis import event, given, settings
from odd_cells import (
    BATCH,
    CASES,
    CONDITION,
    COUNTS,
    FEW,
    HARMLESS,
    OTHER_SCALES,
    SEPARATOR,
    SIZE,
    SOUND,
    TYPE,
    Case,
    Few,
    Sound,
    dense,
    query_cells,
    rearranged,
    renamed,
    setup_arguments,
    simulated_cells,
    store_otherwise,
    training_cells,
    viewed,
)
from scipy import sparse

import spaperb
from spaperb import SpaPerbModel
from spaperb.evidence import Settings

PACKAGE = str(Path(spaperb.__file__).parent)
LONGEST = timedelta(seconds=30)
"""An example takes half a second."""
N_CASES = settings.default.max_examples
N_SOUND, N_FEW = N_CASES // 5, N_CASES // 10
MANY = 5
"""So many times the examples of a test are tried where it is slow."""
REGISTERED = {"_scvi_condition", "_scvi_labels", "_scvi_batch"}
IDENTIFIERS = {"_scvi_uuid", "_scvi_manager_uuid"}
MOST_HARM, N_DRAWN = 1.2, 3
"""Error of predictions with few measured cells, drawn so often, over that without any."""
N_HARMLESS = 5
TOLD_APART = 0.9
"""Share of cells that are nearer to their own type than to another."""
CHANCE, N_PERMUTED = 0.05, 500
"""Cells are not unlike others if so many permutations of them all are."""
UNLIKE = "unlike the training cells of the same name"
SCALE_WARNINGS = "whole numbers only|negative values|Expression looks|seem to be on another scale"
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
    "The control cells of these cell types are (farther|unlike)",
    r"The model knows (none|\d+) of the",
    "These cell types are new to the model",
    "These cell types have no control cells here",
    "No cell has the control value .*, but all have",
    "All cells have the condition",
    ".* was never measured",
    ".* (was|were) measured at doses",
    "Setting element .* of view",
    r"Changes were measured in \d+ context\(s\), .*: too few to train on",
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


class Reference(NamedTuple):
    """A trained model and what it predicts of some cells, ``layer``, of the genes of ``query``."""

    model: SpaPerbModel
    train: ad.AnnData
    query: ad.AnnData
    asked: dict[str, Any]
    layer: np.ndarray
    names: dict[str, Any]
    rng: np.random.Generator

    def again(self, query: ad.AnnData, **other: Any) -> np.ndarray:
        """Predict cells as asked, writing nothing."""
        asked = {**self.asked, "latent": False, "inplace": False, **other}
        before = query.copy()
        try:
            return dense(self.model.predict_stimulated(query, **asked))
        finally:
            check_unchanged(before, query)


Judge = Callable[[str, Callable[[], str]], None]
"""Takes the kind of an attack and what carries it out, which returns the outcome or raises.

It raises ChangedError if something of the user's was changed, another AssertionError if an answer
is wrong, or an error or warning says what is not so or does not come, and anything else that did
not come from a check of the package's own."""


def strict(kind: str, attack: Callable[[], str]) -> None:
    """Count an outcome, for the statistics of Hypothesis; what is wrong is raised."""
    event(f"{kind}: {attack()}")


@settings(deadline=LONGEST, max_examples=N_CASES)
@given(CASES)
def test_a_right_answer_or_a_clear_error(case):
    examine(case, strict)


@settings(deadline=LONGEST, max_examples=N_SOUND)
@given(SOUND)
def test_nothing_that_would_be_wrong_goes_unnoticed(case):
    examine_sound(case, strict)


@settings(deadline=LONGEST, max_examples=N_FEW)
@given(FEW)
def test_few_measured_cells_are_no_worse_than_none(case):
    examine_few(case, strict)


@pytest.mark.slow
@settings(deadline=LONGEST, max_examples=MANY * N_CASES)
@given(CASES)
def test_a_right_answer_or_a_clear_error_in_many_cases(case):
    examine(case, strict)


@pytest.mark.slow
@settings(deadline=LONGEST, max_examples=MANY * N_SOUND)
@given(SOUND)
def test_nothing_of_much_that_would_be_wrong_goes_unnoticed(case):
    examine_sound(case, strict)


@pytest.mark.slow
@settings(deadline=LONGEST, max_examples=MANY * N_FEW)
@given(FEW)
def test_few_measured_cells_are_often_no_worse_than_none(case):
    examine_few(case, strict)


@contextmanager
def strict_warnings() -> Iterator[None]:
    """Make warnings errors as in pytest's settings, but for those that odd cells deserve."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module="spaperb")
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=f"(?s){message}")
        yield


def examine(case: Case, judge: Judge) -> None:
    """Take odd cells through the package, and if they are predicted, in other ways too."""
    with strict_warnings():
        predicted: list[tuple[Handed, Reference]] = []
        judge("odd cells", lambda: _answered(case, predicted))
        for handed, reference in predicted:
            judge("response table", partial(_table, handed))
            for kind, attack in {
                **some_harmless(reference),
                **arranged(handed, reference),
            }.items():
                judge(kind, attack)


def _answered(case: Case, predicted: list[tuple[Handed, Reference]]) -> str:
    """Take cells through the package: "right answer", or "clear error: " and what it is about."""
    whole = training_cells(case)
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
    layer = check_prediction(handed, query)
    columns = {CONDITION: "conditions", TYPE: "types", BATCH: "batches"}
    names = {key: case.columns[name] or () for key, name in columns.items()}
    rng = np.random.default_rng([case.seed, 2])
    predicted.append((handed, Reference(model, train, before, asked, layer, names, rng)))
    return "right answer"


def _table(handed: Handed) -> str:
    try:
        check_table(handed)
    except Exception as error:  # noqa: BLE001 - which one it is, is the question
        return clear(error, handed)
    return "right answer"


def otherwise(
    adata: ad.AnnData, arguments: dict[str, Any], perturbations: list[Any]
) -> dict[str, Any]:
    """Arguments of another set-up.

    All cells of one type, without doses, and control the other way round.
    """
    adata.obs["one type"] = "all cells"
    return {
        **arguments,
        "control": perturbations[0],
        "stimulated": arguments["control"],
        "labels_key": "one type",
        "dose_key": None,
    }


def harmless(reference: Reference) -> dict[str, Callable[[], str]]:
    """What makes no difference to a prediction, to the last bit."""

    def same(change: Any) -> str:
        query = change(reference.query, reference.rng, reference.names)
        columns = query.var_names.get_indexer(reference.query.var_names)
        np.testing.assert_array_equal(reference.again(query)[:, columns], reference.layer)
        return "right answer"

    def some_of_them() -> str:
        n_obs = reference.query.n_obs
        rows = np.arange(n_obs)
        if reference.asked["indices"] is not None:
            rows = rows[reference.asked["indices"]]
        some = np.flatnonzero(
            np.isin(np.arange(n_obs), rows) & (reference.rng.random(n_obs) < 0.5)
        )
        again = reference.again(reference.query, indices=some)
        np.testing.assert_array_equal(again[some], reference.layer[some])
        assert np.isnan(np.delete(again, some, axis=0)).all()
        return "right answer"

    def set_up_twice() -> str:
        arguments = reference.model.registry["setup_args"]
        other = otherwise(reference.train, arguments, reference.model.perturbations)
        SpaPerbModel.setup_anndata(reference.train, **other)
        np.testing.assert_array_equal(reference.again(reference.query), reference.layer)
        return "right answer"

    def from_a_file() -> str:
        is_new = reference.rng.random() < 0.5
        x = reference.model.adata_manager.get_from_registry("X")
        data = False
        if is_new and (not sparse.issparse(x) or x.nnz):
            data = reference.train.copy()
        with tempfile.TemporaryDirectory() as folder:
            reference.model.save(folder, overwrite=True)
            loaded = SpaPerbModel.load(folder, data)
        again = reference._replace(model=loaded).again(reference.query)
        np.testing.assert_array_equal(again, reference.layer)
        return "right answer"

    attacks = {name: partial(same, change) for name, change in HARMLESS.items()}
    return attacks | {
        "some of the cells": some_of_them,
        "set up twice": set_up_twice,
        "saved and loaded": from_a_file,
    }


def some_harmless(reference: Reference) -> dict[str, Callable[[], str]]:
    """A few of these, so that there is time for more cases."""
    attacks = harmless(reference)
    drawn = reference.rng.choice(list(attacks), N_HARMLESS, replace=False)
    return {kind: attacks[kind] for kind in drawn}


def arranged(handed: Handed, reference: Reference) -> dict[str, Callable[[], str]]:
    """What makes none but for rounding."""
    case, before = handed.case, handed.query
    layer = reference.layer
    scale = np.abs(layer[np.isfinite(layer)]).max(initial=1)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * scale)

    def cells_in_another_order() -> str:
        order = _order(handed)
        gene_order = np.random.default_rng(case.seed).permutation(before.n_vars)
        again = reference.again(rearranged(before, order, gene_order), indices=None)
        expected = layer[order][:, gene_order]
        is_known = np.isfinite(expected).any(1)
        close(again[is_known], expected[is_known])
        return "right answer"

    def types_renamed() -> str:
        twin, new = (renamed(adata, handed.train) for adata in (handed.train, before))
        store_otherwise(twin)
        SpaPerbModel.setup_anndata(twin, **setup_arguments(case))
        close(reference._replace(model=trained(case, twin)).again(new), layer)
        return "right answer"

    def set_up_twice_before_training() -> str:
        twin = handed.train.copy()
        arguments = setup_arguments(case)
        SpaPerbModel.setup_anndata(twin, **arguments)
        scvi.settings.seed = case.seed
        model = SpaPerbModel(twin, **case.model)
        other = otherwise(twin, arguments, reference.model.perturbations)
        SpaPerbModel.setup_anndata(twin, **other)
        fit(case, model)
        again = reference._replace(model=model).again(before)
        np.testing.assert_array_equal(again, layer)
        return "right answer"

    attacks = {"cells in another order": cells_in_another_order}
    # These train another model.
    if case.seed % 4 == 0:
        attacks["types renamed"] = types_renamed
    elif case.seed % 4 == 1:
        attacks["set up twice before training"] = set_up_twice_before_training
    return attacks


def examine_sound(case: Sound, judge: Judge) -> None:
    """Take simulated cells through the package, and to them what is not harmless."""
    with strict_warnings():
        predicted: list[Reference] = []
        judge("sound cells", lambda: _predicted(case, predicted))
        for reference in predicted:
            attacks = promises(reference) | harmful(reference) | some_harmless(reference)
            for kind, attack in attacks.items():
                judge(kind, attack)


def _predicted(case: Sound, predicted: list[Reference]) -> str:
    cells = simulated_cells(case)
    rng = np.random.default_rng(case.seed)
    is_train = cells.obs.groupby([TYPE, CONDITION], observed=True).cumcount().to_numpy() % 2 == 0
    train, query = cells[is_train].copy(), cells[~is_train].copy()
    query = query[rng.permutation(query.n_obs)].copy()
    counts = COUNTS if case.counts else None
    with warnings.catch_warnings(record=True) as found:
        warnings.filterwarnings("always", module="spaperb")
        SpaPerbModel.setup_anndata(train, counts_layer=counts)
        scvi.settings.seed = case.seed
        is_published = case.objective == "published"
        model = SpaPerbModel(train, objective=case.objective, **(SIZE if is_published else {}))
        model.train(max_epochs=1, batch_size=64 if is_published else 1, **QUIET)
        asked = {"seed": case.seed, "indices": None}
        layer = model.predict_stimulated(query, **asked, inplace=False)
    # Cells of the same populations: nothing is to be warned of. But some chance samples are unlike
    # the others.
    for text in (str(w.message) for w in found if w.filename.startswith(PACKAGE)):
        assert UNLIKE in text, f"This is not so: {text}"
        for name in re.findall(r"(type_\d) \(\d+%\)", text):
            p = p_value(control_cells_of(train)[name], control_cells_of(query)[name], rng)
            assert p < CHANCE, f"This is not so of {name} (p = {p}): {text}"
    assert isinstance(layer, np.ndarray)
    assert np.isfinite(layer).all()
    assert (layer >= 0).all()
    names = {key: tuple(train.obs[key].unique()) for key in (CONDITION, TYPE)}
    predicted.append(Reference(model, train, query, asked, layer, names, rng))
    return "right answer"


def promises(reference: Reference) -> dict[str, Callable[[], str]]:
    """What is said of the mean of predicted cells."""
    model, query = reference.model, reference.query
    if model.objective == "published":
        return {}

    def means(query: ad.AnnData, predicted: np.ndarray, step: np.ndarray | float = 0.0) -> str:
        table = model.predict_response(query)
        for name, rows in table.groupby("group", observed=True):
            is_control = (query.obs[TYPE] == name) & (query.obs[CONDITION] == "control")
            is_control = is_control.to_numpy()
            expected = rows["mean_control"] + rows["mean_change"]
            expected = expected.set_axis(rows["gene"])[query.var_names].clip(lower=0)
            missed = np.abs(predicted[is_control].mean(0, dtype=float) - expected.to_numpy())
            most = 1e-3 + np.max(step * is_control) / is_control.sum()
            assert (missed <= most).all(), f"{name}: {missed.max()}, {most} at most"
        return "right answer"

    def means_of_counts() -> str:
        drawn = reference.again(query, sample=True)
        assert (drawn % 1 == 0).all()
        factors = 1e4 / dense(query.layers[COUNTS]).sum(1)
        # One count more in a silent cell: whole counts come no nearer.
        return means(query, np.log1p(drawn * factors[:, None]), np.log1p(factors))

    def means_of_few_cells() -> str:
        is_control = query.obs[CONDITION] == "control"
        few = query[
            is_control & (query.obs.groupby([TYPE, CONDITION], observed=True).cumcount() < n_few)
        ]
        few = few.copy()
        # The first type is a new one, to be predicted from these few cells alone.
        few.obs[TYPE] = few.obs[TYPE].astype(str).replace("type_0", "new")
        return means(few, reference.again(few))

    n_few = int(reference.rng.integers(1, 4))
    attacks = {
        "means of contexts": lambda: means(query, reference.layer),
        f"means of few cells: {n_few}": means_of_few_cells,
    }
    if model.registry["setup_args"]["counts_layer"] is not None:
        attacks["means of drawn counts"] = means_of_counts
    return attacks


def told(call: Callable[[], Any], about: str) -> str:
    """Check that an error or a warning of the package's own speaks of it."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            call()
        except (ValueError, TypeError, KeyError, IndexError) as error:
            if not re.search(about, str(error), re.S):
                raise
            return "clear error"
    texts = [str(warning.message) for warning in found]
    assert any(re.search(about, text, re.S) for text in texts), f"Not told of; only: {texts}"
    return "clear warning"


def harmful(reference: Reference) -> dict[str, Callable[[], str]]:
    """What no silent answer may be given to."""
    model, query, rng = reference.model, reference.query, reference.rng
    attacks: dict[str, Callable[[], str]] = {}

    def on_another_scale(name: str) -> ad.AnnData:
        other = query.copy()
        other.X = sparse.csr_matrix(OTHER_SCALES[name](dense(query.layers[COUNTS])), dtype="f4")
        return other

    def is_told_at_set_up(name: str) -> str:
        adata = on_another_scale(name)
        return told(lambda: SpaPerbModel.setup_anndata(adata), SCALE_WARNINGS)

    for name in OTHER_SCALES:
        attacks[f"cells to predict: {name}"] = partial(
            lambda name: told(lambda: reference.again(on_another_scale(name)), SCALE_WARNINGS),
            name,
        )
        # A model may be trained on any target sum.
        if name != "counts per million":
            attacks[f"cells to train on: {name}"] = partial(is_told_at_set_up, name)

    def changed(
        about: str, change: Callable[[ad.AnnData], ad.AnnData | None]
    ) -> Callable[[], str]:
        def attack() -> str:
            other = query.copy()
            other = change(other) or other
            return told(lambda: reference.again(other), about)

        return attack

    def rename_control(other: ad.AnnData) -> None:
        other.obs[CONDITION] = other.obs[CONDITION].cat.rename_categories({"control": "ctrl"})

    def rename_some_genes(other: ad.AnnData) -> None:
        names = [name.upper() if rng.random() < 0.5 else name for name in other.var_names]
        other.var_names = [*names[:-1], names[-1].upper()]

    def exchange_types(other: ad.AnnData) -> None:
        names = list(other.obs[TYPE].cat.categories)
        turned = dict(zip(names, names[1:] + names[:1], strict=True))
        other.obs[TYPE] = other.obs[TYPE].astype(object).map(turned)

    def too_alike() -> str:
        # By their single cells, which the model does not look at: most are as near to the other
        # type.
        return "not to be told: the types are too alike"

    attacks["genes renamed"] = changed("genes are missing", rename_some_genes)
    mask = rng.integers(0, 2, query.n_obs)
    attacks["a mask of 0 and 1"] = lambda: told(
        lambda: reference.again(query, indices=mask), "mask"
    )
    if model.objective == "in_context":
        # The published model adds its shift to any cell, whatever its type or condition.
        is_control = (query.obs[CONDITION] == "control").to_numpy()
        attacks |= {
            "control cells renamed": changed("control value 'control'", rename_control),
            "stimulated cells alone": changed(
                "All cells have the condition 'stimulated'",
                lambda other: other[~is_control].copy(),
            ),
            "types exchanged": too_alike,
        }
        if _can_be_told_apart(reference):
            attacks["types exchanged"] = changed(UNLIKE, exchange_types)

    def genes_in_another_order() -> str:
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder, overwrite=True)
            other = reference.train[:, ::-1].copy()
            return told(lambda: SpaPerbModel.load(folder, other), "their order differs")

    def genes_of_the_model_renamed() -> str:
        names = reference.train.var_names
        reference.train.var_names = names[::-1]
        try:
            np.testing.assert_array_equal(reference.again(query), reference.layer)
            return told(
                lambda: model.train(max_epochs=1, **QUIET), "genes of the AnnData are not those"
            )
        finally:
            reference.train.var_names = names

    attacks["loaded with genes in another order"] = genes_in_another_order
    attacks["genes of the model's AnnData renamed"] = genes_of_the_model_renamed
    return attacks


def control_cells_of(adata: ad.AnnData) -> dict[str, np.ndarray]:
    """Expression of the control cells of each type."""
    is_control = adata.obs[CONDITION] == "control"
    return {
        name: dense(adata[is_control & (adata.obs[TYPE] == name)].X)
        for name in adata.obs[TYPE].unique()
    }


def p_value(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> float:
    """Share of permutations of all cells whose means differ as much as those of two groups."""
    both = np.concatenate([a, b])
    orders = [np.arange(len(both)), *(rng.permutation(len(both)) for _ in range(N_PERMUTED))]
    differences = [
        both[order[: len(a)]].mean(0) - both[order[len(a) :]].mean(0) for order in orders
    ]
    squares = (np.array(differences) ** 2).sum(1)
    return float((squares >= squares[0]).mean())


def _can_be_told_apart(reference: Reference) -> bool:
    """Whether control cells of some type are nearer to its mean than to that of the next type."""
    train, query = map(control_cells_of, (reference.train, reference.query))
    means = [train[name].mean(0) for name in sorted(train)]
    for name, own, other in zip(sorted(train), means, means[1:] + means[:1], strict=True):
        own, other = (((query[name] - mean) ** 2).sum(1) for mean in (own, other))
        if (own < other).mean() >= TOLD_APART:
            return True
    return False


def examine_few(case: Few, judge: Judge) -> None:
    """Hide almost all stimulated cells of a type, and then all: the few must not do harm."""
    with strict_warnings():
        judge(f"few measured cells: {case.n_kept}", lambda: _few(case))


def _few(case: Few) -> str:
    cells = simulated_cells(case)
    is_hidden = ((cells.obs[TYPE] == "type_0") & (cells.obs[CONDITION] == "stimulated")).to_numpy()
    is_control = ((cells.obs[TYPE] == "type_0") & (cells.obs[CONDITION] == "control")).to_numpy()
    hidden, rng = np.flatnonzero(is_hidden), np.random.default_rng(case.seed)

    def squared_error(kept: np.ndarray) -> float:
        train = cells[np.setdiff1d(np.arange(cells.n_obs), np.setdiff1d(hidden, kept))].copy()
        SpaPerbModel.setup_anndata(train)
        scvi.settings.seed = case.seed
        model = SpaPerbModel(train)
        model.train(max_epochs=1, batch_size=1, **QUIET)
        predicted = model.predict_stimulated(cells[is_control].copy(), inplace=False)
        truth = dense(cells.X[hidden]).mean(0, dtype=float)
        return float(((predicted.mean(0, dtype=float) - truth) ** 2).mean())

    # By chance some cells are unlike the others, three of them too; what is promised is the error
    # to expect.
    with_few = np.mean(
        [squared_error(rng.permutation(hidden)[: case.n_kept]) for _ in range(N_DRAWN)]
    )
    harm = np.sqrt(with_few / squared_error(hidden[:0]))
    assert harm <= MOST_HARM, f"{harm:.2f} times the error without the few cells"
    return "right answer"


def trained(case: Case, adata: ad.AnnData) -> SpaPerbModel:
    """A small model of cells that are set up."""
    scvi.settings.seed = case.seed
    model = SpaPerbModel(adata, **case.model)
    fit(case, model)
    return model


def fit(case: Case, model: SpaPerbModel) -> None:
    """Train a model."""
    model.train(**case.train, early_stopping=case.flaw == "early stopping", **QUIET)


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
        has_counts = model.objective == "in_context" and case.columns["counts"]
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


def check_prediction(handed: Handed, query: ad.AnnData) -> np.ndarray:
    """Check the fields that a prediction wrote, and its values, which it returns."""
    _, _, model, before, asked = handed
    (key,) = set(query.layers) - set(before.layers)
    added = {f"X_{key}", "X_spaperb_delta"} if asked["latent"] else set()
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
    n_latent = SIZE["n_latent"]
    if model.objective == "in_context":
        n_latent = len(model.state.predictor.evidence.components)
    for name in added:
        z = query.obsm[name]
        assert z.shape == (query.n_obs, n_latent)
        np.testing.assert_array_equal(np.isfinite(z).all(1), np.isin(np.arange(query.n_obs), rows))
    values = layer[is_wanted]
    if model.state.scale.nonnegative:
        assert (values >= 0).all()
    if asked["sample"]:
        assert (values % 1 == 0).all()

    return layer


def _order(handed: Handed) -> np.ndarray:
    """An order of the cells that must not matter.

    A cell's noise depends on its row, or on its place among those of its type.
    """
    case, _, model, query, asked = handed
    order = np.random.default_rng(case.seed).permutation(query.n_obs)
    if model.objective == "in_context" and TYPE in query.obs and query.obs[TYPE].notna().all():
        types = query.obs[TYPE].astype(object).to_numpy()
        for name in pd.unique(types):
            of_type = types[order] == name
            order[of_type] = np.sort(order[of_type])
        return order
    has_noise = case.model.get("delta_noise") != "fixed" or not asked["give_mean"]
    return np.arange(query.n_obs) if has_noise else order


def check_table(handed: Handed) -> None:
    """Check the response table against the cells and the prediction."""
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
    if case.groupby is None and TYPE not in before.obs:
        # Cells without types are taken for those of training.
        assert set(table["group"]) <= set(handed.train.obs[TYPE].astype(object))
        assert sorted(table["gene"].unique()) == sorted(genes)
        assert (table["lower"] <= table["mean_change"]).all()
        assert (table["mean_change"] <= table["upper"]).all()
        return
    groups = before.obs[groupby].astype(object)
    is_control = np.full(before.n_obs, True)
    if CONDITION in before.obs:
        control = case.columns["conditions"][0]
        is_control = (before.obs[CONDITION].astype(object) == control).to_numpy()
    layer = case.cells["layer"]
    x = dense(before[:, genes].X if layer is None else before[:, genes].layers[layer])
    x = x.astype(np.float32).astype(float)
    assert set(table["group"]) == set(groups)
    shift: dict[Any, np.ndarray] | None = {}
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
        scale = model.state.scale
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
        expected = np.maximum(expected, 0) if model.state.scale.nonnegative else expected
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
        and (model.objective == "published" or setup_arguments(case)["counts_layer"] is None),
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
    """Whether networks are to learn from scratch from fewer than two measured changes."""
    columns, obs = handed.case.columns, handed.train.obs
    if handed.case.model.get("pretrained", True):
        return False
    if columns["batches"] or columns["doses"] or handed.case.train["train_size"]:
        return True  # measured within these, or of a part of the cells, with fewer cells each
    types, conditions = (obs[key].astype(object).to_numpy() for key in (TYPE, CONDITION))
    n_cells = pd.Series(1, [types, conditions]).groupby(level=[0, 1]).sum().unstack(fill_value=0)
    arguments = setup_arguments(handed.case)
    names = arguments["stimulated"]
    if names is None:
        names = [name for name in n_cells.columns if name != arguments["control"]]
    n_measured = 0
    for name in names if isinstance(names, list) else [names]:
        n = np.minimum(n_cells[arguments["control"]], n_cells[name])
        n_measured += (n >= max(1, min(Settings.min_cells, n.max()))).sum()
    return n_measured < 2


def _query_conditions(handed: Handed) -> set:
    conditions = handed.query.obs.get(CONDITION, pd.Series(dtype=object))
    return set(conditions.dropna().astype(object))


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
        lambda h: h.case.flaw == "missing values"
        or (h.query is not None and h.query.obs[h.case.groupby or TYPE].isna().any()),
    ),
    "an absent condition": (
        r"No cell has .* \(`(control|stimulated)`\)",
        lambda h: not set(h.case.columns["conditions"])
        <= set(h.train.obs[CONDITION].astype(object)),
    ),
    "one condition": (
        "All .* cells have the condition",
        lambda h: h.train.obs[CONDITION].astype(object).nunique() == 1,
    ),
    "nothing to pair": ("nothing to pair", lambda h: _strata(h).empty),
    "few pairs": ("training needs at least 2", _has_few_pairs),
    "nothing to stop early by": (
        "Early stopping watches",
        lambda h: h.case.flaw == "early stopping",
    ),
    "odd doses": ("`dose_key`", _has_odd_doses),
    "no counts": (
        "must hold raw counts|is not log1p of the counts",
        lambda h: h.case.cells["values"] != "normalised"
        or not dense(h.train.layers[COUNTS]).any()
        or h.case.cells["dtype"] not in ("f4", "f8")
        or h.query is not None
        or h.case.flaw == "counts of other cells",
    ),
    "no control cells": (
        "No cell has the control value",
        lambda h: not (_query_conditions(h) & {h.case.columns["conditions"][0]})
        and len(_query_conditions(h)) > 1,
    ),
    "several perturbations": (
        "Pass one of them, or a combination",
        lambda h: len(h.model.perturbations) > 1,
    ),
    "an unknown perturbation": (
        "is not a perturbation that the model",
        lambda h: h.asked["perturbation"] not in h.model.perturbations,
    ),
    "no dose": ("pass `dose=`", lambda h: h.asked["dose"] is None),
    "a dose for a model without": ("takes no `dose`", lambda h: h.case.columns["doses"] is None),
    "missing genes": (
        "genes are missing",
        lambda h: len(set(h.train.var_names) - set(h.query.var_names)) > 0,
    ),
    "negative values": (
        "holds negative values, and the model",
        lambda h: (_expression(h.query, h.case) < 0).any()
        and not (_expression(h.train, h.case) < 0).any(),
    ),
    "counts of a model without": (
        "Counts are drawn by a model",
        lambda h: h.model.objective == "published"
        or setup_arguments(h.case)["counts_layer"] is None,
    ),
    "counts drawn twice": ("Counts are drawn once", lambda h: h.asked["n_samples"] > 1),
    "latent vectors of cells on disk": (
        "Latent vectors are computed at once",
        lambda h: h.case.query["storage"] == "dask",
    ),
    "no groups": (
        "There is no column",
        lambda h: h.case.groupby is not None and h.case.groupby not in h.query.obs,
    ),
    "intervals without the response": (
        "knows no error of its predictions",
        lambda h: h.model.objective == "published",
    ),
    "few changes": ("The networks learn from measured changes, at least 2", _has_few_changes),
}  # fmt: skip
