"""A model that predicts perturbations that were never measured, from their features."""

import numpy as np
import pandas as pd
import pytest
import scvi
from helpers import PUBLISHED, QUIET, snapshot
from scipy import sparse

from spaperb import SpaPerbModel, datasets

HIDDEN = ["perturbation_0", "perturbation_1", "perturbation_2"]
SIZES = {"n_perturbations": 24, "n_cell_types": 2, "n_cells": 40, "n_genes": 150, "n_features": 3}


@pytest.fixture(scope="module")
def screen():
    return datasets.simulated_screen(**SIZES)


@pytest.fixture(scope="module")
def table(screen):
    return screen.uns["perturbation_features"]


@pytest.fixture(scope="module")
def train(screen):
    cells = screen[~screen.obs["condition"].isin(HIDDEN)].copy()
    del cells.uns["perturbation_features"]
    return cells


def fit(cells, features, max_epochs=2, **setup):
    cells = cells.copy()
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(cells, perturbation_features=features, **setup)
    model = SpaPerbModel(cells)
    model.train(max_epochs=max_epochs, batch_size=2, **QUIET)
    return model


@pytest.fixture(scope="module")
def model(train, table):
    return fit(train, table)


def control_of(cells, cell_type):
    return cells[
        (cells.obs["cell_type"] == cell_type) & (cells.obs["condition"] == "control")
    ].copy()


def truth(screen, cell_type, name):
    of = screen[(screen.obs["cell_type"] == cell_type) & (screen.obs["condition"] == name)]
    return (of.layers["true_stimulated"] - of.layers["true_control"]).mean(axis=0)


def change(model, cells, name, **kwargs):
    predicted = model.predict_stimulated(cells, name, inplace=False, **kwargs)
    return predicted.mean(axis=0) - np.asarray(cells.X.mean(axis=0)).ravel()


def test_never_measured_perturbations_are_predicted(screen, table, model):
    values = ((table - table.mean()) / table.std()).drop(index=HIDDEN)
    correlations = []
    for cell_type in ("type_0", "type_1"):
        cells = control_of(screen, cell_type)
        for name in HIDDEN:
            true = truth(screen, cell_type, name)
            asked = (table.loc[name] - table.mean()) / table.std()
            nearest = ((values - asked) ** 2).sum(axis=1).idxmin()
            by_nearest = truth(screen, cell_type, nearest)
            correlations.append(
                [np.corrcoef(c, true)[0, 1] for c in (change(model, cells, name), by_nearest)]
            )
    ours, nearest = np.mean(correlations, axis=0)
    assert ours >= 0.6
    assert ours > nearest
    assert np.min(correlations, axis=0)[0] > 0.3


def test_intervals_hold_what_was_never_measured(screen, model):
    covered = []
    for cell_type in ("type_0", "type_1"):
        cells = control_of(screen, cell_type)
        for name in HIDDEN:
            response = model.predict_response(cells, name).set_index("gene").loc[screen.var_names]
            true = truth(screen, cell_type, name)
            covered.append(((response["lower"] <= true) & (true <= response["upper"])).mean())
            # They are wider than those of what was measured.
            known = model.predict_response(cells, "perturbation_5")
            assert (response["upper"] - response["lower"]).mean() > (
                1.1 * (known["upper"] - known["lower"]).mean()
            )
    assert 0.85 <= np.mean(covered) <= 1.0
    assert min(covered) > 0.7


@pytest.mark.parametrize("kind", ["mapping", "uns", "obsm", "other order", "text and spaces"])
def test_however_features_are_given(kind, screen, train, table, model):
    cells = train.copy()
    features = {
        "mapping": dict(zip(table.index, table.to_numpy().tolist(), strict=True)),
        "other order": table.iloc[::-1],
        "text and spaces": table.set_axis(" " + table.index.str.upper()),
    }.get(kind, "the_features")
    if kind == "uns":
        cells.uns["the_features"] = table
    if kind == "obsm":
        # Control cells have none.
        of_cells = table.reindex(cells.obs["condition"].astype(str))
        cells.obsm["the_features"] = of_cells.to_numpy()
    other = fit(cells, features)
    asked = control_of(screen, "type_0")
    given = {"features": table.loc[HIDDEN[0]].to_numpy()} if kind == "obsm" else {}
    name = "new" if kind == "obsm" else HIDDEN[0]
    np.testing.assert_array_equal(
        change(other, asked, name, **given), change(model, asked, HIDDEN[0])
    )


def test_passed_features_are_those_of_the_table(screen, table, model):
    cells = control_of(screen, "type_1")
    np.testing.assert_array_equal(
        change(model, cells, "anything", features=table.loc[HIDDEN[1]].tolist()),
        change(model, cells, HIDDEN[1]),
    )


def test_features_with_names_are_put_in_order(screen, table, model):
    cells = control_of(screen, "type_1")
    expected = change(model, cells, HIDDEN[1])
    row = table.loc[HIDDEN[1]]
    for given in (row.iloc[::-1], row.iloc[::-1].to_frame().T):
        np.testing.assert_array_equal(change(model, cells, "new", features=given), expected)
    with pytest.raises(ValueError, match=r"other names than those .*: a, b, c in place of"):
        change(model, cells, "new", features=row.set_axis(["a", "b", "c"]))


def test_sparse_vectors_of_cells(screen, train, table, model):
    cells = train.copy()
    of_cells = table.reindex(cells.obs["condition"].astype(str)).fillna(0.0)
    cells.obsm["the_features"] = sparse.csr_matrix(of_cells.to_numpy())
    asked = control_of(screen, "type_0")
    given = table.loc[HIDDEN[0]].to_numpy()
    np.testing.assert_array_equal(
        change(fit(cells, "the_features"), asked, "new", features=given),
        change(model, asked, HIDDEN[0]),
    )


def test_one_perturbation_with_features(screen, table):
    """There is nothing to compare, so another one is predicted as the same, with a warning."""
    some = screen[screen.obs["condition"].isin(["control", "perturbation_4"])].copy()
    model = fit(some, table, max_epochs=0)
    cells = control_of(screen, "type_0")
    with pytest.warns(UserWarning, match="features do not tell"):
        new = change(model, cells, "perturbation_5")
    assert np.corrcoef(new, change(model, cells, "perturbation_4"))[0, 1] > 0.9


def test_what_is_told_by_features_alone_does_not_choose_the_share(train, table):
    """With each perturbation measured in one type features alone tell of half of the changes."""
    names = train.obs["condition"].astype(str) + train.obs["cell_type"].astype(str)
    number = train.obs["condition"].astype(str).str.split("_").str[-1]
    is_even = number.str.isdigit() & (number.where(number.str.isdigit(), "0").astype(int) % 2 == 0)
    is_gone = is_even & (train.obs["cell_type"] == "type_1")
    cells = train[~is_gone].copy()
    assert names.nunique() > cells.obs.groupby(["condition", "cell_type"], observed=True).ngroups
    models = [fit(cells, features, max_epochs=0) for features in (table, None)]
    shares = [float(model.module.share) for model in models]
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)


def test_layers_and_what_made_them(screen, table, model):
    cells = control_of(screen, "type_1")
    model.predict_stimulated(cells, HIDDEN[0])
    assert f"spaperb_{HIDDEN[0]}" in cells.layers
    assert cells.uns["spaperb"][f"spaperb_{HIDDEN[0]}"]["perturbation"] == HIDDEN[0]


def test_saved_and_exported_models_predict_the_same(screen, model, tmp_path):
    cells = control_of(screen, "type_0")
    before = change(model, cells, HIDDEN[2])
    model.save(tmp_path / "model")
    model.export(tmp_path / "model.safetensors")
    for other in (
        SpaPerbModel.load(tmp_path / "model"),
        SpaPerbModel.load_exported(tmp_path / "model.safetensors"),
    ):
        np.testing.assert_array_equal(change(other, cells, HIDDEN[2]), before)


def test_measured_perturbations_are_predicted_as_without_features(screen, train, table):
    """What is left out to learn from differs, but not what the networks are told of it."""
    cells = control_of(screen, "type_0")
    with_features, without = (fit(train, features, max_epochs=0) for features in (table, None))
    np.testing.assert_allclose(
        change(with_features, cells, "perturbation_7"), change(without, cells, "perturbation_7")
    )


def test_features_that_tell_nothing_give_the_mean_and_a_warning(screen, train, table):
    noise = pd.DataFrame(np.random.default_rng(1).normal(size=(24, 3)), table.index)
    model = fit(train, noise, max_epochs=0)
    assert model.state.predictor.evidence.features.skill == 0
    cells = control_of(screen, "type_0")
    with pytest.warns(UserWarning, match="features do not tell .* predicted as their mean"):
        changes = [change(model, cells, name) for name in HIDDEN]
    np.testing.assert_allclose(changes[0], changes[1], atol=1e-6)


def test_features_far_from_those_of_training_are_warned_of(screen, table, model):
    cells = control_of(screen, "type_0")
    far = 20 * table.loc[HIDDEN[0]]
    with pytest.warns(UserWarning, match="features of far, .* farther from those of training"):
        response = model.predict_response(cells, "far", features=far)
    assert (response["distance"] > 1.25).all()


def test_one_context_is_enough(screen, train, table):
    """In a screen of one line perturbations are left out to learn from."""
    one = train[train.obs["cell_type"] == "type_0"].copy()
    model = fit(one, table)
    assert len(model.history["validation_loss"]) == 2
    cells = control_of(screen, "type_0")
    correlations = [
        np.corrcoef(change(model, cells, name), truth(screen, "type_0", name))[0, 1]
        for name in HIDDEN
    ]
    assert np.mean(correlations) > 0.55


def test_a_new_type_and_a_new_perturbation_at_once(screen, train, table):
    one = train[(train.obs["cell_type"] == "type_0") | (train.obs["condition"] == "control")]
    with pytest.warns(UserWarning, match="type_1"):
        model = fit(one.copy(), table)
    cells = control_of(screen, "type_1")
    correlation = np.corrcoef(change(model, cells, HIDDEN[0]), truth(screen, "type_1", HIDDEN[0]))
    assert correlation[0, 1] > 0.4


@pytest.mark.filterwarnings("ignore:.*a guess")
def test_doses_of_what_was_never_measured(train, screen, table):
    cells = train.copy()
    rng = np.random.default_rng(0)
    cells.obs["dose"] = rng.choice([1.0, 10.0], cells.n_obs)
    model = fit(cells, table, max_epochs=0, dose_key="dose")
    asked = control_of(screen, "type_0")
    low, high = (change(model, asked, HIDDEN[0], dose=dose) for dose in (0.1, 1.0))
    np.testing.assert_allclose(low, 0.1 * high, atol=1e-5)
    assert np.abs(high).max() > 0.1
    with pytest.raises(ValueError, match=r"pass `dose=`.* The measured perturbations have doses"):
        change(model, asked, HIDDEN[0])


class TestErrors:
    def refused(self, train, features, match, error=ValueError):
        cells = train.copy()
        before = snapshot(cells)
        with pytest.raises(error, match=match):
            SpaPerbModel.setup_anndata(cells, perturbation_features=features)
        assert snapshot(cells) == before

    def test_missing(self, train, table):
        self.refused(train, table.drop(index="perturbation_9"), "no features of 1 of 21 .*_9")

    def test_other_lengths(self, train, table):
        vectors = {name: row.tolist() for name, row in table.iterrows()}
        vectors["perturbation_9"] = [1.0]
        self.refused(train, vectors, "vectors of lengths 1, 3")

    def test_not_finite(self, train, table):
        for value in (np.nan, np.inf):
            wrong = table.copy()
            wrong.iloc[4, 1] = value
            self.refused(train, wrong, "'perturbation_4' hold 1 values that are missing or infin")

    def test_not_numbers(self, train, table):
        self.refused(train, table.assign(feature_0="C1CC1"), "must be numbers")
        self.refused(train, {name: [] for name in table.index}, "must be a vector of numbers")

    def test_the_same_for_all(self, train, table):
        self.refused(train, table * 0 + 3, "the same for all perturbations")

    def test_twice(self, train, table):
        self.refused(train, pd.concat([table, table.iloc[:1]]), "several rows .*perturbation_0")
        alike = {name: row.tolist() for name, row in table.iterrows()}
        self.refused(train, {**alike, 1: [1, 2, 3], "1": [3, 2, 1]}, "spelled alike")

    def test_no_such_key(self, train):
        self.refused(train, "nothing", r"neither adata.uns\['nothing'\] nor adata.obsm")

    def test_another_type(self, train):
        self.refused(train, [1, 2], "must be a DataFrame .* it is list", TypeError)

    def test_cells_of_a_perturbation_differ(self, train):
        cells = train.copy()
        cells.obsm["F"] = np.random.default_rng(0).normal(size=(cells.n_obs, 2))
        self.refused(cells, "F", "Cells of 'perturbation_.*' differ")

    def test_the_control(self, screen, train, table):
        none = pd.DataFrame([[0.0, 0.0, 0.0]], ["control"], table.columns)
        model = fit(train, pd.concat([table, none]), max_epochs=0)
        cells = control_of(screen, "type_0")
        for given in ({}, {"features": [0.0, 0.0, 0.0]}):
            with pytest.raises(ValueError, match="'control' is spelled like 'control'"):
                model.predict_stimulated(cells, "control", **given)

    def test_features_without_a_name(self, screen, model):
        with pytest.raises(ValueError, match="never measured: name it, `perturbation=`"):
            model.predict_stimulated(control_of(screen, "type_0"), features=[1.0, 2.0, 3.0])

    def test_features_that_the_table_has(self, screen, model):
        with pytest.raises(ValueError, match="has features of 'perturbation_0' already"):
            model.predict_stimulated(
                control_of(screen, "type_0"), HIDDEN[0], features=[1.0, 2.0, 3.0]
            )

    def test_unknown_to_the_table(self, screen, model):
        cells = control_of(screen, "type_0")
        with pytest.raises(ValueError, match=r"'other' was never measured, .* Pass `features=`"):
            model.predict_stimulated(cells, "other")

    def test_another_spelling_of_what_was_measured(self, screen, model):
        """Not taken for one that was never measured, whose features are known."""
        cells = control_of(screen, "type_0")
        for given in ({}, {"features": [1.0, 2.0, 3.0]}):
            with pytest.raises(ValueError, match="is spelled like 'perturbation_7', which was"):
                model.predict_stimulated(cells, "Perturbation_7", **given)

    def test_features_of_what_was_measured(self, screen, table, model):
        cells = control_of(screen, "type_0")
        with pytest.raises(ValueError, match=r"'perturbation_7' was measured, .* Leave out `feat"):
            model.predict_stimulated(cells, "perturbation_7", features=table.iloc[7])

    def test_wrong_features(self, screen, model):
        cells = control_of(screen, "type_0")
        for features, match in (
            ([1.0, 2.0], "are 2 numbers, and the model was set up with 3"),
            ([1.0, 2.0, np.nan], "hold 1 values that are missing"),
            (np.ones((1, 3)), "must be a vector of numbers"),
        ):
            with pytest.raises(ValueError, match=match):
                model.predict_response(cells, "new", features=features)

    def test_a_model_without_features(self, screen, train):
        model = fit(train, None, max_epochs=0)
        cells = control_of(screen, "type_0")
        with pytest.raises(ValueError, match="set up without features of perturbations"):
            model.predict_stimulated(cells, "new", features=[1.0])
        with pytest.raises(ValueError, match="set the data up with `perturbation_features=`"):
            model.predict_stimulated(cells, "new")

    def test_the_published_objective(self, screen, train, table):
        cells = train.copy()
        SpaPerbModel.setup_anndata(cells, perturbation_features=table)
        model = SpaPerbModel(cells, **PUBLISHED)
        model.train(max_epochs=1, **QUIET)
        with pytest.raises(ValueError, match="'perturbation_0' is not a perturbation"):
            model.predict_stimulated(control_of(screen, "type_0"), HIDDEN[0])
        with pytest.raises(ValueError, match=r"published objective .* takes no `features`"):
            model.predict_stimulated(
                control_of(screen, "type_0"), HIDDEN[0], features=[1.0, 2.0, 3.0]
            )
