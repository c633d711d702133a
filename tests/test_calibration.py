"""Intervals that hold where nothing was measured, the table they stand in, and its picture."""

import numpy as np
import pandas as pd
import pytest
import scvi
from helpers import QUIET, SMALL_MODEL, snapshot, train_small

from spaperb import SpaPerbModel, datasets, pl
from spaperb.benchmark import Task, make_fold
from spaperb.calibration import MAX_LEFT_OUT, Calibration
from spaperb.contexts import Contexts
from spaperb.populations import mean_expression

TASK = Task("cell_type", "condition", "control", None, "cell_type", None, 0)
COLUMNS = [
    "group",
    "gene",
    "mean_control",
    "mean_change",
    "lower",
    "upper",
    "log2_fold_change",
    "score",
    "responding",
    "distance",
]


def fit(train, **kwargs) -> SpaPerbModel:
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(train)
    model = SpaPerbModel(train, objective="residual", **SMALL_MODEL, **kwargs)
    model.train(max_epochs=2, batch_size=64, **QUIET)
    return model


@pytest.fixture(scope="module")
def fold():
    return make_fold(datasets.simulated(n_cells=60, n_genes=200), "type_0", TASK)


@pytest.fixture(scope="module")
def model(fold):
    with pytest.warns(UserWarning, match="type_0"):
        return fit(fold.train.copy())


def half_width(table):
    return ((table["upper"] - table["lower"]) / 2).to_numpy()


class TestTable:
    def test_one_row_a_group_and_gene_the_surest_first(self, model, fold):
        before = snapshot(fold.train)
        table = model.predict_response(fold.train)
        assert snapshot(fold.train) == before
        assert table.columns.tolist() == COLUMNS
        assert len(table) == 8 * 200
        assert not table.isna().any().any()
        for _, of_group in table.groupby("group"):
            assert of_group["gene"].is_unique
            assert of_group["score"].abs().is_monotonic_decreasing
            np.testing.assert_allclose(
                of_group["score"], of_group["mean_change"] / half_width(of_group)
            )
        assert (
            (table["lower"] < table["mean_change"]) & (table["mean_change"] < table["upper"])
        ).all()
        assert table["responding"].between(0, 1).all()
        sign = np.sign(table["mean_change"]) * np.sign(table["log2_fold_change"])
        assert (sign >= 0).mean() > 0.99

    def test_it_agrees_with_the_predicted_cells(self, model, fold):
        control = fold.control.copy()
        table = model.predict_response(control).set_index("gene").loc[control.var_names]
        predicted = model.predict_stimulated(control, inplace=False, detection=False)
        x = control.X.toarray()
        unclipped = (predicted > 0).all(0)
        np.testing.assert_allclose(
            table["mean_change"][unclipped], (predicted - x).mean(0)[unclipped], atol=1e-4
        )
        np.testing.assert_allclose(table["mean_control"], x.mean(0), atol=1e-5)
        cells = model.predict_stimulated(control, inplace=False)
        changed = (np.abs(cells - x) > 0.1).mean(0)
        clear = table["mean_change"].abs().to_numpy() > 0.3
        # cells near the least level that counts fall on one side or the other
        differs = np.abs(table["responding"] - changed)[clear]
        assert (differs < 0.1).mean() > 0.9

    def test_groups_of_several_types_are_mixtures(self, model, fold):
        cells = fold.train[fold.train.obs["condition"] == "control"].copy()
        cells.obs["all"] = "all"
        whole = model.predict_response(cells, groupby="all").set_index("gene")["mean_change"]
        by_type = model.predict_response(cells).pivot(
            index="gene", columns="group", values="mean_change"
        )
        pd.testing.assert_series_equal(
            whole.sort_index(), by_type.mean(axis=1), check_names=False, atol=1e-9
        )

    def test_the_measured_are_surer_than_the_hidden(self, model, fold):
        table = model.predict_response(fold.train)
        width = half_width(table)
        hidden = (table["group"] == "type_0").to_numpy()
        # what is left is the sampling noise of 60 cells, which every interval contains
        assert width[~hidden].mean() < 0.95 * width[hidden].mean()
        assert (table["distance"][~hidden] == 0).all()
        assert (table["distance"][hidden] > 0).all()

    def test_saved_with_the_model(self, model, fold, tmp_path):
        expected = model.predict_response(fold.control)
        model.save(tmp_path / "model")
        loaded = SpaPerbModel.load(tmp_path / "model", adata=False)
        assert loaded.calibration_
        pd.testing.assert_frame_equal(loaded.predict_response(fold.control), expected)

    def test_wider_at_a_higher_level(self, model, fold):
        half, most = (
            half_width(model.predict_response(fold.control, level=level)) for level in (0.5, 0.95)
        )
        assert half.mean() < 0.6 * most.mean()

    def test_wrong_arguments(self, model, fold):
        with pytest.raises(ValueError, match="`level` must be between 0 and 1"):
            model.predict_response(fold.control, level=90)
        with pytest.raises(ValueError, match="no column 'clusters'"):
            model.predict_response(fold.control, groupby="clusters")
        with pytest.warns(UserWarning, match="type_0"):
            plain = train_small(fold.train.copy())
        with pytest.raises(ValueError, match="made without"):
            plain.predict_response(fold.control)

    def test_too_few_contexts(self):
        cells = datasets.simulated(n_cell_types=2, n_cells=20, n_genes=30)
        with pytest.raises(ValueError, match="at least 3 of them; there are 2"):
            fit(cells).predict_response(cells)


class TestCoverage:
    def test_hidden_types(self):
        """Over types and data sets; the noise-free change is covered more often than the measured one."""
        measured, true = [], []
        for seed in range(3):
            cells = datasets.simulated(n_cells=60, n_genes=200, shared_response=0.5, seed=seed)
            for name in ("type_0", "type_1", "type_2"):
                fold = make_fold(cells, name, TASK)
                with pytest.warns(UserWarning, match=name):
                    table = fit(fold.train).predict_response(fold.control)
                table = table.set_index("gene").loc[cells.var_names]
                change = mean_expression(fold.real) - mean_expression(fold.control.X)
                layers = fold.control.layers
                noise_free = (layers["true_stimulated"] - layers["true_control"]).mean(0)
                for truth, found in ((change, measured), (noise_free, true)):
                    found.append(((table["lower"] <= truth) & (truth <= table["upper"])).mean())
        assert 0.85 < np.mean(measured) < 0.95
        assert min(measured) > 0.75
        assert np.mean(true) > 0.85

    def test_cells_unlike_anything_get_wider_intervals(self, model, fold):
        control = fold.control.copy()
        strange = control.copy()
        strange.X = strange.X[:, np.random.default_rng(0).permutation(200)]
        strange.obs["cell_type"] = control.obs["cell_type"] = "new"
        usual, other = (model.predict_response(cells) for cells in (control, strange))
        with pytest.warns(UserWarning, match=r"do not trust their prediction.*new \("):
            model.predict_stimulated(strange, inplace=False)
        model.predict_stimulated(control, inplace=False)
        assert usual["distance"].iloc[0] < 1 < other["distance"].iloc[0]
        assert half_width(other).mean() > 1.2 * half_width(usual).mean()


def test_the_cost_is_bounded():
    rng = np.random.default_rng(0)
    n_types, n_cells = 30, 6
    labels = np.repeat(np.arange(n_types), 2 * n_cells)
    arms = np.tile(np.repeat([0, 1], n_cells), n_types)
    x = rng.poisson(1.0, (len(labels), 20)).astype("f4") + arms[:, None]
    contexts = Contexts.of(x, arms, labels, list(range(n_types)))
    assert len(Calibration.of(contexts, [(0,)]).errors) == MAX_LEFT_OUT


class TestPlot:
    def test_response(self, model, fold, tmp_path):
        table = model.predict_response(fold.control)
        ax = pl.response(table, save=tmp_path / "response.png")
        assert (tmp_path / "response.png").stat().st_size > 1000
        assert "distance" in ax.get_title()
        n = sum(
            len(points.get_offsets()) for points in ax.collections if len(points.get_offsets()) > 1
        )
        assert n >= 200

    def test_one_group_of_several(self, model, fold):
        table = model.predict_response(fold.train)
        with pytest.raises(
            ValueError, match="one of the table's groups as `group=`: type_0, type_1"
        ):
            pl.response(table)
        assert "type_3" in pl.response(table, "type_3").get_title()
