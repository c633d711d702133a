"""From contexts to cells, through the model: contexts by label or neighbours, saved and loaded."""

import warnings
from functools import partial
from typing import Any

import anndata as ad
import numpy as np
import pytest
from helpers import IN_CONTEXT, QUIET, small_cells, snapshot

from spaperb import SpaPerbModel
from spaperb.evidence import Settings
from spaperb.module._in_context import Predicted

CELLS: dict[str, Any] = {"n_cell_types": 4, "n_cells": 40, "n_genes": 150}


def train(adata, **kwargs) -> SpaPerbModel:
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **kwargs)
    model.train(max_epochs=1, batch_size=2, **QUIET)
    return model


def hide(adata, cell_type="type_0"):
    """Split cells into training cells, and control and stimulated cells of one type."""
    of_type = adata.obs["cell_type"] == cell_type
    stimulated = adata.obs["condition"] == "stimulated"
    return (
        adata[~(of_type & stimulated)].copy(),
        adata[of_type & ~stimulated].copy(),
        adata[of_type & stimulated].copy(),
    )


@pytest.fixture(scope="module")
def split():
    return hide(small_cells(**CELLS))


@pytest.fixture(scope="module")
def model(split):
    with pytest.warns(UserWarning, match="take no part in training: type_0"):
        return train(split[0].copy())


def predict(model, adata, **kwargs):
    return model.predict_stimulated(adata, inplace=False, **kwargs)


def test_layer_and_record(model, split):
    control = split[1].copy()
    model.predict_stimulated(control)
    layer = control.layers["spaperb_stimulated"]
    assert layer.dtype == np.float32
    assert (layer >= 0).all()
    made_by = control.uns["spaperb"]["spaperb_stimulated"]
    assert (made_by["objective"], made_by["detection"]) == ("in_context", True)


def test_a_cell_does_not_depend_on_chunks_or_the_other_rows(model, split):
    control = split[1]
    expected = predict(model, control)
    np.testing.assert_array_equal(predict(model, control, batch_size=7), expected)
    rows = np.array([3, 11, 30])
    np.testing.assert_array_equal(predict(model, control, indices=rows)[rows], expected[rows])
    np.testing.assert_array_equal(predict(model, control), expected)
    assert not np.array_equal(predict(model, control, seed=1), expected)


def test_saved_and_loaded(model, split, tmp_path):
    model.save(tmp_path / "model")
    loaded = SpaPerbModel.load(tmp_path / "model", adata=False)
    np.testing.assert_array_equal(predict(loaded, split[1]), predict(model, split[1]))
    new = renamed(split[1], "new to both")
    with pytest.warns(UserWarning, match="knows none"):
        np.testing.assert_array_equal(predict(loaded, new), predict(model, new))


def renamed(adata, name):
    adata = adata.copy()
    adata.obs["cell_type"] = name
    return adata


def change_of(model, adata):
    table = model.predict_response(adata).set_index("gene")
    return table.loc[adata.var_names, "mean_change"].to_numpy()


class TestContextOfACell:
    def test_without_a_column_the_neighbours_say(self, model, split):
        control = split[1].copy()
        bare = ad.AnnData(control.X, var=control.var)
        query = model.state.predictor.assign(query_of(model, bare))
        names = np.array(query.context_names)[query.context]
        assert (names == "type_0").mean() > 0.5
        assert predict(model, bare).shape == bare.shape

    def test_missing_labels_are_filled_by_neighbours(self, model, split):
        control = split[1].copy()
        labels = control.obs["cell_type"].astype(object).to_numpy(copy=True)
        labels[:5] = None
        query = query_of(model, control)._replace(labels=labels)
        codes = model.state.predictor.assign(query).context
        assert (codes[5:] == model.state.predictor.evidence.names.index("type_0")).all()
        assert (codes[:5] < 4).all()

    def test_an_unseen_type_is_predicted_from_its_own_control_cells(self, model, split):
        _, control, real = split
        new = renamed(control, "type_9")
        with pytest.warns(
            UserWarning, match=r"knows none of the cell types.*type_9.*type_1, type_2, type_3"
        ):
            predict(model, new)
        predict(model, new)  # said once
        # with the same cells, a new name gives nearly what the unpaired training type gives
        np.testing.assert_allclose(
            predict(model, new).mean(0), predict(model, control).mean(0), atol=0.1
        )
        # stimulated cells of the new type are not taken for its control cells
        both = renamed(ad.concat([control, real]), "type_9")
        n = control.n_obs
        np.testing.assert_allclose(predict(model, both)[:n], predict(model, new), atol=1e-5)

    def test_the_order_of_types_does_not_matter(self, model, split):
        new = ad.concat([split[1], renamed(split[1], "type_8")])
        swapped = np.roll(np.arange(new.n_obs), split[1].n_obs)
        with pytest.warns(UserWarning, match="new to the model.*type_8"):
            expected = predict(model, new)
        np.testing.assert_array_equal(predict(model, new[swapped].copy()), expected[swapped])

    def test_new_types_beside_known_ones_are_named_once(self, model, split):
        both = ad.concat([split[1], renamed(split[1], "type_7")], index_unique="-")
        with pytest.warns(UserWarning, match="new to the model.*own control cells: type_7"):
            predict(model, both)
        predict(model, both)

    def test_labels_of_another_type_are_those_of_training(self, split):
        train_cells, control, _ = (x.copy() for x in split)
        for x in (train_cells, control):
            x.obs["cell_type"] = x.obs["cell_type"].astype(str).str[-1].astype(int)
        with pytest.warns(UserWarning, match="take no part in training: 0"):
            of_numbers = train(train_cells)
        expected = predict(of_numbers, control)
        for labels in ("0", 0.0, " 0", np.int8(0)):
            np.testing.assert_array_equal(predict(of_numbers, renamed(control, labels)), expected)

    def test_measured_types_get_about_their_measured_change(self, model, split):
        train_cells = split[0]
        of_type = train_cells.obs["cell_type"] == "type_1"
        arms = [
            train_cells[of_type & (train_cells.obs["condition"] == arm)].copy()
            for arm in ("control", "stimulated")
        ]
        predicted, measured = predict(model, arms[0]).mean(0), arms[1].X.toarray().mean(0)
        before = arms[0].X.toarray().mean(0)
        assert np.mean((predicted - measured) ** 2) < 0.2 * np.mean((before - measured) ** 2)

    def test_what_was_measured_is_kept_whatever_the_networks_say(self, model, split, monkeypatch):
        monkeypatch.setattr(model.module, "predict", lambda d: Predicted(0 * d.scale, d.scale))
        of_type = split[0].obs["cell_type"] == "type_1"
        stimulated = split[0].obs["condition"] == "stimulated"
        control = split[0][of_type & ~stimulated].copy()
        of_arms = [split[0][of_type & stimulated].X.toarray(), control.X.toarray()]
        measured = of_arms[0].mean(0) - of_arms[1].mean(0)
        predicted = change_of(model, control)
        strongest = np.argsort(-np.abs(measured))[:10]
        assert (predicted[strongest] / measured[strongest] > 0.5).all()
        # Genes are matched by name, here too.
        order = np.random.default_rng(0).permutation(control.n_vars)
        shuffled = change_of(model, control[:, order].copy())
        np.testing.assert_allclose(shuffled, predicted[order], atol=1e-6)
        # Cells of that name, but of another study, are not those that were measured.
        other = control.copy()
        other.X = other.X[:, order]
        with pytest.warns(UserWarning, match=r"type_1 \(0%\)"):
            np.testing.assert_array_equal(change_of(model, other), 0)
        # Nothing was measured of cells of another name.
        with pytest.warns(UserWarning, match="knows none"):
            np.testing.assert_array_equal(change_of(model, renamed(control, "new")), 0)


def test_a_saved_model_keeps_the_constants_that_it_learned_with(tmp_path, monkeypatch):
    cells = small_cells(**CELLS)
    monkeypatch.setattr("spaperb.data._episodes.Settings", partial(Settings, max_errors=0.0))
    model = train(cells)
    model.save(tmp_path / "model")
    model.export(tmp_path / "file")
    monkeypatch.undo()
    expected = predict(model, cells)
    for loaded in (
        SpaPerbModel.load(tmp_path / "model", cells),
        SpaPerbModel.load_exported(tmp_path / "file"),
    ):
        np.testing.assert_array_equal(predict(loaded, cells), expected)
    assert not np.allclose(predict(train(cells.copy()), cells), expected)


class TestACellTypeIsItsCells:
    """Cells of a known name that are not those of training."""

    @pytest.fixture(scope="class")
    @classmethod
    def split(cls):
        return hide(small_cells(**{**CELLS, "n_cell_types": 5}))

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, split):
        with pytest.warns(UserWarning, match="type_0"):
            return train(split[0].copy())

    @pytest.fixture
    def elsewhere(self, split):
        """Control cells of another study: half of the genes are three times as high."""
        control = split[0][
            (split[0].obs["cell_type"] == "type_1") & (split[0].obs["condition"] == "control")
        ].copy()
        genes = np.arange(control.n_vars) % 2 == 0
        raw = np.expm1(control.X.toarray()) * np.where(genes, 6.0, 0.3)
        control.X = np.log1p(raw / raw.sum(1, keepdims=True) * 1e4).astype(np.float32)
        return control

    def test_their_mean_is_their_own_plus_the_change(self, model, elsewhere):
        with pytest.warns(
            UserWarning, match=r"unlike the training cells of the same name.*type_1"
        ):
            predicted = predict(model, elsewhere)
        with pytest.warns(UserWarning, match=r"unlike the training cells"):
            table = model.predict_response(elsewhere).set_index("gene").loc[elsewhere.var_names]
        before = elsewhere.X.mean(0)
        np.testing.assert_allclose(table["mean_control"], before, atol=1e-5)
        expected = np.maximum(before + table["mean_change"], 0)
        np.testing.assert_allclose(predicted.mean(0), expected, atol=1e-3)

    def test_what_was_measured_under_their_name_does_not_count(self, model, elsewhere):
        with pytest.warns(UserWarning, match=r"type_1 \(0%\)"):
            known = predict(model, elsewhere)
        with pytest.warns(UserWarning, match="knows none"):
            new = predict(model, renamed(elsewhere, "elsewhere"))
        np.testing.assert_allclose(known, new, atol=1e-5)
        with pytest.warns(UserWarning, match="unlike the training cells"):
            assert (model.predict_response(elsewhere)["distance"] > 0.3).all()

    def test_a_part_of_the_training_cells_is_alike(self, model, split):
        train_cells = split[0]
        of_type = train_cells.obs["cell_type"] == "type_1"
        control = train_cells[of_type & (train_cells.obs["condition"] == "control")].copy()
        for n in (3, 10, 20):
            some = control[np.random.default_rng(n).permutation(control.n_obs)[:n]].copy()
            assert (model.predict_response(some)["distance"] == 0).all()

    def test_the_first_cells_do_not_stand_for_all(self, split, monkeypatch):
        monkeypatch.setattr("spaperb.model._contexts.MAX_CELLS", 20)
        monkeypatch.setattr("spaperb.model._response.MAX_CELLS", 20)
        with pytest.warns(UserWarning, match="type_0"):
            model = train(split[0].copy())
        control = split[1].copy()
        # ten odd cells come first, as those of one donor do in a sorted file
        order = np.argsort(-control.X.toarray()[:, 0], kind="stable")
        first = model.predict_response(control[order].copy()).set_index("gene")
        expected = control.X.toarray().mean(0)[0]
        assert abs(first.loc["gene_0", "mean_control"] - expected) < 0.5 * (
            control.X.toarray()[order[:20], 0].mean() - expected
        )


def query_of(model, adata):
    from spaperb.data._query import make_query

    return make_query(
        adata,
        model.get_var_names(),
        model.registry["setup_args"],
        model.state.scale,
        model.perturbations,
    )


class TestParts:
    def test_without_detection_every_cell_gets_the_change(self, model, split):
        control = split[1]
        predicted = predict(model, control, detection=False)
        x = control.X.toarray()
        # where it is not clipped at 0 it is the same for each cell of a gene
        most = x.argmax(0), np.arange(x.shape[1])
        change = (predicted - x)[most]
        assert np.abs(change).max() > 0.1
        np.testing.assert_allclose(predicted, np.maximum(x + change, 0), atol=1e-5)

    def test_negative_expression_has_no_zeros_to_predict(self, split):
        train_cells, control, _ = (x.copy() for x in split)
        for x in (train_cells, control):
            x.X = x.X.toarray() - 1
        with pytest.warns(UserWarning, match="negative values"):
            negative = train(train_cells)
        assert predict(negative, control).min() < 0
        np.testing.assert_array_equal(
            predict(negative, control), predict(negative, control, detection=False)
        )

    def test_unknown_objective(self, model):
        with pytest.raises(
            ValueError, match="`objective` must be one of 'in_context', 'published'"
        ):
            SpaPerbModel(model.adata, objective="best")


def test_a_checkpoint_from_within_training_learns_the_contexts_when_loaded(split, tmp_path):
    from scvi.train import SaveCheckpoint

    adata = split[0].copy()
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **IN_CONTEXT)
    checkpoint = SaveCheckpoint(
        dirpath=str(tmp_path), monitor="validation_loss", load_best_on_end=True
    )
    with pytest.warns(UserWarning, match="type_0"):
        model.train(max_epochs=2, callbacks=[checkpoint], **QUIET)
    (saved,) = tmp_path.iterdir()
    control = split[1]
    loaded = SpaPerbModel.load(str(saved), adata)
    np.testing.assert_array_equal(predict(loaded, control), predict(model, control))
    with pytest.raises(RuntimeError, match="saved before its training ended"):
        predict(SpaPerbModel.load(str(saved), adata=False), control)


def test_v_delta_draws_from_the_predicted_distribution(model, split):
    """Its mean is the prediction, and its spread that of the error scale."""
    control = split[1]
    mean = predict(model, control).mean(0)
    one, again, other = (
        predict(model, control, give_mean=False, seed=seed).mean(0) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, atol=0.01)
    many = predict(model, control, give_mean=False, n_samples=400, detection=False).mean(0)
    alone = predict(model, control, detection=False).mean(0)
    assert np.abs(many - alone).max() < 0.2 * np.abs(one - mean).max()
    table = model.predict_response(control).set_index("gene").loc[control.var_names]
    half = ((table["upper"] - table["lower"]) / 2).to_numpy()
    assert (np.abs(one - mean) < 2 * half).mean() > 0.95


def test_the_users_cells_stay_as_they_are(model, split):
    control = split[1].copy()
    before = snapshot(control)
    predict(model, control)
    assert snapshot(control) == before


def test_expression_that_never_varies_changes_nothing():
    """Sums of nothing, in single precision too."""
    cells = small_cells(n_cell_types=3, n_cells=6, n_genes=2)
    cells.X = np.full((cells.n_obs, 2), 3.5, dtype=np.float32)
    SpaPerbModel.setup_anndata(cells)
    model = SpaPerbModel(cells, **IN_CONTEXT)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "invalid value encountered in scalar")
        model.train(max_epochs=1, batch_size=2, **QUIET)
        predicted = model.predict_stimulated(cells, inplace=False)
    assert np.isfinite(predicted).all()
