"""Cells of one type that respond differently, and cells without types."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
from helpers import IN_CONTEXT, PUBLISHED, QUIET, drop_layers, real_cells, small_cells, snapshot
from scipy import sparse

from spaperb import SpaPerbModel, datasets
from spaperb.data import CLUSTERS, find_clusters
from spaperb.model._contexts import keep_mean

HIDDEN = "type_0"


def fit(cells, **setup):
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(cells, **setup)
    model = SpaPerbModel(cells)
    model.train(max_epochs=0, **QUIET)
    return model


@pytest.fixture(scope="module")
def cells():
    return datasets.simulated(4, 200, 400, gradient=1.0)


@pytest.fixture(scope="module")
def train(cells):
    hidden = (cells.obs["cell_type"] == HIDDEN) & (cells.obs["condition"] == "stimulated")
    train = cells[~hidden].copy()
    drop_layers(train)
    return train


@pytest.fixture(scope="module")
def model(train):
    with pytest.warns(UserWarning, match=HIDDEN):
        return fit(train.copy())


@pytest.fixture(scope="module")
def query(cells):
    is_asked = (cells.obs["cell_type"] == HIDDEN) & (cells.obs["condition"] == "control")
    return cells[is_asked].copy()


def predict(model, query, **kwargs):
    return model.predict_stimulated(query, inplace=False, **kwargs)


def test_cells_that_respond_more_are_predicted_to(query, model):
    true = query.layers["true_stimulated"] - query.layers["true_control"]
    axis = true.mean(axis=0)
    changes = {
        by_cell: predict(model, query, by_cell=by_cell, detection=False) - query.X.toarray()
        for by_cell in (False, True)
    }
    strength = np.corrcoef(changes[True] @ axis, true @ axis)[0, 1]
    assert strength > 0.5
    made = predict(model, query, by_cell=True) - query.X.toarray()
    by_type = predict(model, query) - query.X.toarray()
    of_cells = [np.corrcoef(x @ axis, true @ axis)[0, 1] for x in (made, by_type)]
    assert of_cells[0] > of_cells[1] + 0.2


@pytest.mark.parametrize("how", [{}, {"give_mean": False}, {"n_samples": 3}])
def test_the_mean_of_a_type_stays(query, model, how):
    by_type, by_cell = (predict(model, query, by_cell=b, **how).mean(axis=0) for b in (0, 1))
    np.testing.assert_allclose(by_cell, by_type, atol=2e-3)
    assert np.abs(by_cell - by_type).mean() < 1e-4


def test_the_mean_of_scaled_expression_stays(train, query):
    scaled, asked = train.copy(), query.copy()
    mean, deviation = train.X.toarray().mean(axis=0), train.X.toarray().std(axis=0) + 0.1
    for some in (scaled, asked):
        drop_layers(some)
        some.X = ((some.X.toarray() - mean) / deviation).astype(np.float32)
    with pytest.warns(UserWarning, match=HIDDEN):
        model = fit(scaled)
    by_type, by_cell = (predict(model, asked, by_cell=b).mean(axis=0) for b in (False, True))
    np.testing.assert_allclose(by_cell, by_type, atol=1e-5)


def test_counts_by_cell(cells, query):
    hidden = (cells.obs["cell_type"] == HIDDEN) & (cells.obs["condition"] == "stimulated")
    train = cells[~hidden].copy()
    with pytest.warns(UserWarning, match=HIDDEN):
        model = fit(train, counts_layer="counts")
    by_type, by_cell = (
        predict(model, query, by_cell=b, sample=True).mean(axis=0) for b in (False, True)
    )
    assert np.corrcoef(by_type, by_cell)[0, 1] > 0.99


def test_the_same_in_other_orders_and_forms(query, model):
    expected = predict(model, query, by_cell=True)
    np.testing.assert_array_equal(predict(model, query, by_cell=True), expected)
    np.testing.assert_array_equal(predict(model, query, by_cell=True, batch_size=7), expected)
    dense = query.copy()
    dense.X = dense.X.toarray()
    np.testing.assert_array_equal(predict(model, dense, by_cell=True), expected)
    genes = np.random.default_rng(0).permutation(query.n_vars)
    np.testing.assert_array_equal(
        predict(model, query[:, genes], by_cell=True), expected[:, genes]
    )
    # Which cells turn on goes with their order, so the change itself is compared.
    order = np.random.default_rng(0).permutation(query.n_obs)
    expected = predict(model, query, by_cell=True, detection=False)
    shuffled = predict(model, query[order], by_cell=True, detection=False)
    np.testing.assert_allclose(shuffled, expected[order], atol=1e-4)


def test_some_cells_are_predicted_as_among_all(query, model):
    expected = predict(model, query, by_cell=True)
    some = np.arange(5, 60, 3)
    np.testing.assert_array_equal(
        predict(model, query, by_cell=True, indices=some)[some], expected[some]
    )


def test_it_is_noted_and_nothing_else_changes(query, model):
    cells = query.copy()
    before = snapshot(cells)["X"]
    model.predict_stimulated(cells, by_cell=True)
    assert cells.uns["spaperb"]["spaperb_stimulated"]["by_cell"]
    assert snapshot(cells)["X"] == before


def test_saved_with_states_or_without(query, train, model, tmp_path):
    expected = predict(model, query, by_cell=True)
    model.save(tmp_path / "with")
    loaded = SpaPerbModel.load(tmp_path / "with")
    np.testing.assert_array_equal(predict(loaded, query, by_cell=True), expected)
    states, model.state.predictor.states = model.state.predictor.states, None
    model.save(tmp_path / "without")
    model.state.predictor.states = states
    bare = SpaPerbModel.load(tmp_path / "without")
    with pytest.raises(ValueError, match=r"loaded without data\. Load it with the training"):
        predict(bare, query, by_cell=True)
    with_data = SpaPerbModel.load(tmp_path / "without", train.copy())
    np.testing.assert_array_equal(predict(with_data, query, by_cell=True), expected)


@pytest.mark.filterwarnings("ignore:The control cells of these", "ignore:These cell types have no")
def test_errors(query, train, model):
    for n in (3, 79):
        with pytest.raises(
            ValueError, match=f"at least 80 control cells of a type, .* here has {n}\\."
        ):
            predict(model, query[:n], by_cell=True)
    SpaPerbModel.setup_anndata(cells := train.copy())
    published = SpaPerbModel(cells, **PUBLISHED)
    published.train(max_epochs=1, **QUIET)
    with pytest.raises(ValueError, match="published objective knows no states"):
        predict(published, query, by_cell=True)


def test_other_cells_than_those_of_training_are_not_measured(query, train, model, tmp_path):
    states, model.state.predictor.states = model.state.predictor.states, None
    model.save(tmp_path / "model")
    model.state.predictor.states = states
    order = np.random.default_rng(0).permutation(train.n_obs)
    others = train.copy()
    others.obs_names = [f"other_{i}" for i in range(others.n_obs)]
    for wrong in (train[order].copy(), others):
        loaded = SpaPerbModel.load(tmp_path / "model", wrong)
        with pytest.raises(RuntimeError, match="states of its training cells, and the"):
            predict(loaded, query, by_cell=True)


def test_small_types_are_predicted_as_without(cells, train, model, query):
    small = cells[(cells.obs["cell_type"] == "type_1") & (cells.obs["condition"] == "control")]
    both = ad.concat([query, small[:50]])
    by_type, by_cell = (predict(model, both, by_cell=b) for b in (False, True))
    is_small = (both.obs["cell_type"] == "type_1").to_numpy()
    np.testing.assert_array_equal(by_cell[is_small], by_type[is_small])
    assert np.abs(by_cell - by_type)[~is_small].max() > 0.1


def test_means_are_kept_and_never_below_zero():
    rng = np.random.default_rng(0)
    control = rng.exponential(1.0, (4, 50)) * (rng.random((4, 50)) < 0.7)
    changes = rng.normal(0, 1, (4, 50))
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    total = np.maximum(rng.normal(-0.5, 1, 50), -(shares @ control))
    kept = keep_mean(changes, control, shares, total)
    np.testing.assert_allclose(shares @ kept, total, atol=1e-12)
    assert (control + kept > -1e-12).all()
    # What no state shows and nothing changes stays silent.
    silent = keep_mean(np.zeros((2, 1)), np.zeros((2, 1)), np.ones(2) / 2, np.zeros(1))
    np.testing.assert_array_equal(silent, 0)


class TestClusters:
    @pytest.fixture(scope="class")
    @classmethod
    def kinds(cls):
        """Types of other sizes in each condition, with a strong response."""
        cells = datasets.simulated(4, 150, 200, n_lineages=4, shared_response=0.9)
        rng = np.random.default_rng(0)
        is_control = (cells.obs["condition"] == "control").to_numpy()
        is_first = cells.obs["cell_type"].isin(["type_0", "type_1"]).to_numpy()
        share = np.where(is_control == is_first, 1.0, 0.6)
        return cells[rng.random(cells.n_obs) < share].copy()

    def test_stimulated_cells_are_put_where_they_came_from(self, kinds):
        arms = (kinds.obs["condition"] == "stimulated").to_numpy().astype(int)
        clusters = find_clusters(kinds.X, arms)
        types = kinds.obs["cell_type"].to_numpy()
        control = pd.crosstab(clusters[arms == 0], types[arms == 0])
        of_cluster = control.idxmax(axis=1)
        assert set(of_cluster) == set(types)
        of_control, of_stimulated = (
            (of_cluster.reindex(clusters[arms == arm]).to_numpy() == types[arms == arm]).mean()
            for arm in (0, 1)
        )
        assert of_control > 0.75
        assert of_stimulated > of_control - 0.05

    def test_dense_and_sparse_and_types_of_numbers(self, kinds):
        arms = (kinds.obs["condition"] == "stimulated").to_numpy().astype(int)
        expected = find_clusters(kinds.X, arms)
        for x in (kinds.X.toarray(), sparse.csc_matrix(kinds.X), kinds.X.astype(np.float64)):
            np.testing.assert_array_equal(find_clusters(x, arms), expected)

    def test_a_model_without_types(self, kinds):
        cells = kinds.copy()
        true = cells.layers["true_stimulated"] - cells.layers["true_control"]
        del cells.obs["cell_type"]
        asked = cells[cells.obs["condition"] == "control"].copy()
        drop_layers(cells)
        model = fit(cells, labels_key=None)
        assert cells.obs[CLUSTERS].nunique() >= 4
        bare = asked.copy()
        predicted = predict(model, bare) - bare.X.toarray()
        true = true[(cells.obs["condition"] == "control").to_numpy()]
        assert np.corrcoef(predicted.mean(axis=0), true.mean(axis=0))[0, 1] > 0.9

    def test_data_stay_as_they_were_if_set_up_fails(self, kinds):
        cells = kinds.copy()
        before = snapshot(cells)
        for wrong, match in (
            ({"control": "nothing"}, "No cell has 'nothing'"),
            ({"dose_key": "dose"}, "no column 'dose'"),
            ({"condition_key": "arm"}, "no column 'arm'"),
        ):
            with pytest.raises(ValueError, match=match):
                SpaPerbModel.setup_anndata(cells, labels_key=None, **wrong)
            assert snapshot(cells) == before

    def test_clusters_of_another_set_up_are_not_taken_for_these(self, kinds):
        first, second = (
            kinds[kinds.obs["cell_type"].isin(types)].copy()
            for types in (["type_0", "type_1", "type_2"], ["type_1", "type_2", "type_3"])
        )
        for cells in (first, second):
            drop_layers(cells)
            SpaPerbModel.setup_anndata(cells, labels_key=None)
        assert not set(first.obs[CLUSTERS]) & set(second.obs[CLUSTERS])
        again = first.copy()
        SpaPerbModel.setup_anndata(again, labels_key=None)
        pd.testing.assert_series_equal(again.obs[CLUSTERS], first.obs[CLUSTERS])

    def test_a_column_of_ones_own_stays(self, kinds):
        cells = kinds.copy()
        cells.obs[CLUSTERS] = cells.obs["cell_type"]
        with pytest.raises(ValueError, match="is not what an earlier set-up wrote"):
            SpaPerbModel.setup_anndata(cells, labels_key=None)
        assert (cells.obs[CLUSTERS] == cells.obs["cell_type"]).all()

    def test_the_response_of_cells_without_types(self, kinds):
        cells = kinds.copy()
        drop_layers(cells)
        model = fit(cells, labels_key=None)
        asked = kinds[kinds.obs["condition"] == "control"].copy()
        table = model.predict_response(asked)
        assert set(table["group"]) <= set(cells.obs[CLUSTERS])

    def test_few_cells(self):
        cells = small_cells(n_cell_types=2, n_cells=10)
        with pytest.raises(ValueError, match=r"at least 30 of 3 genes .* there are 20 of 30"):
            SpaPerbModel.setup_anndata(cells, labels_key=None)

    def test_loading_with_data(self, kinds, tmp_path):
        cells = kinds.copy()
        drop_layers(cells)
        SpaPerbModel.setup_anndata(cells, labels_key=None)
        model = SpaPerbModel(cells, **IN_CONTEXT)
        model.train(max_epochs=1, batch_size=2, **QUIET)
        expected = predict(model, cells)
        model.save(tmp_path / "model", save_anndata=True)
        loaded = SpaPerbModel.load(tmp_path / "model")
        np.testing.assert_array_equal(predict(loaded, cells), expected)
        del cells.obs[CLUSTERS]
        with pytest.raises(ValueError, match=r"this AnnData has no adata.obs.'spaperb_cluster'"):
            SpaPerbModel.load(tmp_path / "model", cells)


@pytest.mark.slow
def test_two_types_of_real_cells_under_one_label():
    """Monocytes of two kinds, half of whose stimulated cells are given, are told apart."""
    import scanpy as sc

    cells = real_cells("kang_pbmc_ifnb")
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.pp.highly_variable_genes(cells, n_top_genes=1000)
    cells = cells[:, cells.var["highly_variable"]].copy()
    types = cells.obs["cell_type"].astype(str).to_numpy()
    pair = ["CD14+ Monocytes", "FCGR3A+ Monocytes"]
    is_pair = np.isin(types, pair)
    cells.obs["cell_type"] = pd.Categorical(np.where(is_pair, "monocytes", types))
    is_stimulated = (cells.obs["condition"] == "stimulated").to_numpy()
    is_given = np.random.default_rng(0).random(cells.n_obs) < 0.5
    model = fit(cells[is_given].copy())
    asked = is_pair & ~is_stimulated & is_given
    query = cells[asked].copy()
    squares = {}
    for by_cell in (False, True):
        predicted = predict(model, query, by_cell=by_cell)
        for kind in pair:
            of = types[asked] == kind
            real = cells.X[(types == kind) & is_stimulated & ~is_given].mean(axis=0)
            error = predicted[of].mean(axis=0) - np.asarray(real).ravel()
            squares[by_cell, kind] = (error**2).mean()
    for kind in pair:
        assert squares[True, kind] < 0.8 * squares[False, kind]
