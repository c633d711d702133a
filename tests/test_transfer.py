"""From contexts to cells, through the model: contexts by label or neighbours, saved and loaded."""

import anndata as ad
import numpy as np
import pytest
from helpers import QUIET, SMALL_MODEL, small_cells, snapshot

from spaperb import SpaPerbModel
from spaperb.perturbations import Target
from spaperb.transfer import Transfer

ONE = Target("stimulated", 0, (0,))
CELLS = {"n_cells": 40, "n_genes": 150}


def train(adata, **kwargs) -> SpaPerbModel:
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, objective="residual", **{**SMALL_MODEL, **kwargs})
    model.train(max_epochs=3, batch_size=16, **QUIET)
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
    with pytest.warns(UserWarning, match="but for the reconstruction of control cells: type_0"):
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
    assert (made_by["objective"], made_by["response"], made_by["detection"]) == (
        "residual",
        True,
        True,
    )


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
    for cells in (split[1], renamed(split[1], "type_9")):
        np.testing.assert_array_equal(predict(loaded, cells), predict(model, cells))


def renamed(adata, name):
    adata = adata.copy()
    adata.obs["cell_type"] = name
    return adata


class TestContextOfACell:
    def test_without_a_column_the_neighbours_say(self, model, split):
        control = split[1].copy()
        bare = ad.AnnData(control.X, var=control.var)
        codes = model._transfer.codes(query_of(model, bare), None)
        names = np.array(model._transfer.contexts.names)[codes]
        assert (names == "type_0").mean() > 0.5
        assert predict(model, bare).shape == bare.shape

    def test_missing_labels_are_filled_by_neighbours(self, model, split):
        control = split[1].copy()
        labels = control.obs["cell_type"].astype(object).to_numpy(copy=True)
        labels[:5] = None
        codes = model._transfer.codes(query_of(model, control), labels)
        assert (codes[5:] == model._transfer.contexts.names.index("type_0")).all()
        assert (codes[:5] < 3).all()

    def test_an_unseen_type_is_predicted_from_its_own_control_cells(self, model, split):
        _, control, real = split
        new = renamed(control, "type_9")
        # with the same cells, a new name gives nearly what the unpaired training type gives
        np.testing.assert_allclose(
            predict(model, new).mean(0), predict(model, control).mean(0), atol=0.1
        )
        # stimulated cells of the new type are not taken for its control cells
        both = renamed(ad.concat([control, real]), "type_9")
        n = control.n_obs
        np.testing.assert_allclose(predict(model, both)[:n], predict(model, new), atol=1e-5)

    def test_the_order_of_types_does_not_matter(self, model, split):
        new = ad.concat([split[1], renamed(split[1], "type_9")])
        swapped = np.roll(np.arange(new.n_obs), split[1].n_obs)
        np.testing.assert_array_equal(
            predict(model, new[swapped].copy()), predict(model, new)[swapped]
        )

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


def query_of(model, adata):
    from spaperb.data._scale import Scale
    from spaperb.prediction import make_query

    return make_query(adata, model.get_var_names(), None, Scale(**model.expression_kind_))


class TestParts:
    def test_without_detection_every_cell_gets_the_change(self, model, split):
        control = split[1]
        predicted = predict(model, control, detection=False)
        transfer = model._transfer
        k = transfer.contexts.names.index("type_0")
        change = transfer.known(k, ONE, transfer.network_change(k, 0, None)).mean
        expected = np.maximum(control.X.toarray() + change, 0)
        np.testing.assert_allclose(predicted, expected, atol=1e-5)

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

    def test_without_the_response_it_is_the_decoded_change(self, split):
        with pytest.warns(UserWarning, match="type_0"):
            plain = train(split[0].copy(), response=False)
        assert plain.transfer_ == {}
        control = split[1]
        predicted = predict(plain, control)
        x = control.X.toarray()
        # a change that differs from cell to cell, added to the cell's own expression
        change = (predicted - x)[:, x.min(0) > 0]
        assert np.corrcoef(predicted.ravel(), x.ravel())[0, 1] > 0.5
        assert change.size == 0 or change.std(0).max() > 0

    def test_the_response_works_with_the_published_objective_too(self, split):
        adata = split[0].copy()
        SpaPerbModel.setup_anndata(adata)
        published = SpaPerbModel(adata, response=True, **SMALL_MODEL)
        with pytest.warns(UserWarning, match="type_0"):
            published.train(max_epochs=1, batch_size=16, **QUIET)
        assert predict(published, split[1]).shape == split[1].shape

    def test_network_share(self, model):
        transfer = model._transfer
        shifts = transfer.contexts.treatments[0].shifts
        for sign, share in ((1, 0.1), (-1, 0)):
            fitting = Transfer(
                transfer.contexts, [(0,)], [0], transfer.network_changes.copy(), 0.1
            )
            fitting.network_changes[0, :2] = sign * shifts
            assert fitting.share == pytest.approx(share)
        with pytest.raises(ValueError, match="`network_share` must be in"):
            SpaPerbModel(model.adata, network_share=1.5)

    def test_unknown_objective(self, model):
        with pytest.raises(ValueError, match="`objective` must be one of 'published', 'residual'"):
            SpaPerbModel(model.adata, objective="best")


def test_a_checkpoint_from_within_training_learns_the_contexts_when_loaded(split, tmp_path):
    from scvi.train import SaveCheckpoint

    adata = split[0].copy()
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, objective="residual", **SMALL_MODEL)
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


def test_the_users_cells_stay_as_they_are(model, split):
    control = split[1].copy()
    before = snapshot(control)
    predict(model, control)
    assert snapshot(control) == before
