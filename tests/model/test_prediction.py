"""predict_stimulated: what it writes, and every kind of cells that it serves."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BATCH_SIZE, QUIET, SMALL, small_cells, snapshot, train_small
from scipy import sparse

from spaperb import SpaPerbModel
from spaperb.data._query import select_rows

# New cells here are of another simulation: it is said, and is no matter.
pytestmark = pytest.mark.filterwarnings("ignore:The control cells of these:UserWarning")

LAYER = "spaperb_stimulated"


def predicted(model, adata, **kwargs):
    return model.predict_stimulated(adata, inplace=False, **kwargs)


class TestFields:
    def test_only_the_announced_fields_are_new(self, either, query):
        before = snapshot(query)
        assert either.predict_stimulated(query) is None
        assert query.layers[LAYER].dtype == np.float32
        made_by = query.uns["spaperb"][LAYER]
        assert made_by["model"] == "SpaPerbModel"
        assert made_by["objective"] == either.objective
        assert made_by["seed"] == 0
        del query.layers[LAYER], query.uns["spaperb"]
        assert snapshot(query) == before

    def test_latent_vectors_on_request(self, either, query):
        either.predict_stimulated(query, latent=True)
        z_stim, z_delta = query.obsm["X_spaperb_stimulated"], query.obsm["X_spaperb_delta"]
        n_latent = 4 if either.objective == "published" else 29  # fewer than genes
        assert z_stim.shape == z_delta.shape == (query.n_obs, n_latent)
        np.testing.assert_allclose(
            z_stim - z_delta,
            either.get_latent_representation(small_cells(seed=1)),
            atol=1e-5,
        )

    def test_another_key_leaves_the_first_layer(self, either, query):
        either.predict_stimulated(query)
        first = query.layers[LAYER].copy()
        either.predict_stimulated(query, key_added="again", seed=5, latent=True)
        assert np.array_equal(query.layers[LAYER], first)
        assert set(query.uns["spaperb"]) == {LAYER, "again"}
        assert "X_again" in query.obsm

    def test_not_in_place_nothing_is_written(self, either, query):
        before = snapshot(query)
        layer = predicted(either, query)
        assert layer.shape == query.shape
        assert snapshot(query) == before

    def test_the_result_can_be_written_to_a_file(self, either, query, tmp_path):
        either.predict_stimulated(query, latent=True)
        query.write_h5ad(tmp_path / "cells.h5ad")
        read = ad.read_h5ad(tmp_path / "cells.h5ad")
        assert np.array_equal(read.layers[LAYER], query.layers[LAYER])

    def test_the_models_own_cells_by_default(self):
        adata = small_cells()
        train_small(adata).predict_stimulated()
        assert np.isfinite(adata.layers[LAYER]).all()


class TestValues:
    def test_it_is_the_decoded_shifted_posterior(self, query):
        model = train_small(small_cells(), delta_noise="fixed")
        x = torch.from_numpy(query.X.toarray())
        with torch.inference_mode():
            z = model.module.encoder(x).loc
            z_delta = model.module.delta_encoder(model.module.v_delta)
            expected = model.module.decoder(z + z_delta).clip(min=0).numpy()
        np.testing.assert_allclose(predicted(model, query), expected, rtol=1e-5, atol=1e-5)

    def test_never_negative_for_non_negative_data(self, trained, query):
        assert predicted(trained, query).min() >= 0

    def test_seed(self, trained, query):
        layer = predicted(trained, query)
        assert np.array_equal(layer, predicted(trained, query))
        assert not np.array_equal(layer, predicted(trained, query, seed=1))

    def test_a_cell_is_predicted_the_same_alone_and_among_others(self, trained, query):
        everything = predicted(trained, query)
        for kwargs in ({"batch_size": 7}, {"batch_size": 10_000}, {"indices": [5]}):
            layer = predicted(trained, query, **kwargs)
            np.testing.assert_allclose(layer[5], everything[5], rtol=1e-5, atol=1e-6)

    def test_more_samples_approach_the_expected_shift(self, trained, query):
        many = predicted(trained, query, n_samples=200)
        deviation = [np.abs(predicted(trained, query, n_samples=n) - many).mean() for n in (1, 20)]
        assert deviation[1] < 0.5 * deviation[0]

    def test_posterior_draws_differ_from_its_mean(self, query):
        model = train_small(small_cells(), delta_noise="fixed")
        mean = predicted(model, query)
        assert np.array_equal(mean, predicted(model, query, seed=1))
        draw = predicted(model, query, give_mean=False)
        assert not np.allclose(mean, draw)
        assert not np.allclose(draw, predicted(model, query, give_mean=False, seed=1))


class TestRows:
    @pytest.mark.parametrize(
        "indices", [[3, 1], np.array([3, 1]), pd.Index([1, 3]), np.isin(np.arange(120), [1, 3])]
    )
    def test_rows_not_selected_are_nan(self, either, query, indices):
        either.predict_stimulated(query, indices=indices)
        layer = query.layers[LAYER]
        assert np.isfinite(layer[[1, 3]]).all()
        assert np.isnan(np.delete(layer, [1, 3], axis=0)).all()

    def test_no_rows(self, either, query):
        assert np.isnan(predicted(either, query, indices=[])).all()

    @pytest.mark.parametrize(
        ("indices", "rows"),
        [
            ([True, False, False, True], [0, 3]),
            (pd.Series([True, False, False, True], index=list("dcba")), [0, 3]),
            (pd.Series([True, False, False, True], dtype="boolean"), [0, 3]),
            (np.array([1, 0, 1, 0], dtype=bool), [0, 2]),
            (pd.Series([2, 1], dtype="Int64"), [2, 1]),
            ([-1, 0], [3, 0]),
            ([3, 1, 3], [3, 1, 3]),
            ([0, 1], [0, 1]),
            ([1, 0, 0], [1, 0, 0]),
            ([2, 1, 0, 0], [2, 1, 0, 0]),
            (range(2), [0, 1]),
            (2, [2]),
            ([], []),
            (None, [0, 1, 2, 3]),
        ],
    )
    def test_what_rows_are_meant(self, indices, rows):
        assert select_rows(indices, 4).tolist() == rows

    def test_positions_of_a_few_cells(self):
        assert select_rows([1, 0], 2).tolist() == [1, 0]
        assert select_rows([0, 0], 2).tolist() == [0, 0]
        assert select_rows([0], 1).tolist() == [0]

    @pytest.mark.parametrize("dtype", [int, np.uint8, "Int64"])
    @pytest.mark.parametrize("mask", [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    def test_a_mask_of_numbers_is_refused(self, mask, dtype):
        with pytest.raises(ValueError, match=r"4 numbers.*0 or 1.*`mask\.astype\(bool\)`"):
            select_rows(pd.Series(mask, dtype=dtype), 4)

    @pytest.mark.parametrize(
        ("indices", "match"),
        [
            ([0.0, 1.0], r"Float64 values: 0\.0, 1\.0.*`\.astype\(int\)`"),
            (["cell_1"], r"values: cell_1.*`adata\.obs_names\.get_indexer\(names\)`"),
            (pd.Series([True, None, None, False], dtype="boolean"), r"2 of 4.*fillna\(False\)"),
            ([True, False, None, False], r"no value for 1 of 4 cells"),
        ],
    )
    def test_what_is_neither_positions_nor_a_mask(self, indices, match):
        with pytest.raises(ValueError, match=match):
            select_rows(indices, 4)

    @pytest.mark.parametrize("indices", [[120], np.ones(119, dtype=bool)])
    def test_impossible_rows(self, either, query, indices):
        with pytest.raises(IndexError):
            either.predict_stimulated(query, indices=indices)
        assert LAYER not in query.layers


class TestNewData:
    def test_genes_in_another_order(self, either, query):
        expected = predicted(either, query)
        order = np.random.default_rng(0).permutation(query.n_vars)
        np.testing.assert_array_equal(
            predicted(either, query[:, order].copy()), expected[:, order]
        )

    def test_extra_genes_are_ignored_with_a_note(self, either, query):
        expected = predicted(either, query)
        extra = ad.AnnData(np.ones((query.n_obs, 2), np.float32), obs=query.obs)
        extra.var_names = ["other_0", "other_1"]
        both = ad.concat([extra, query], axis="var")
        with pytest.warns(UserWarning, match="2 of 32 genes are unknown to the model"):
            layer = predicted(either, both)
        assert np.isnan(layer[:, :2]).all()
        np.testing.assert_array_equal(layer[:, 2:], expected)

    def test_missing_genes_are_listed(self, either, query):
        with pytest.raises(ValueError, match=r"2 of the model's 30 genes.*: gene_0, gene_7"):
            either.predict_stimulated(query[:, ~query.var_names.isin(["gene_0", "gene_7"])])

    @pytest.mark.parametrize(
        ("trained_on", "found", "hint"),
        [
            ("ENSG{:011d}", "ENSG{:011d}.2", "another Ensembl version"),
            ("ENSG{:011d}.12", "ENSG{:011d}", "another Ensembl version"),
            ("ENSMUSG{:011d}.1", "ENSMUSG{:011d}.2", "another Ensembl version"),
            ("Gene{}", "GENE{}", "other case"),
            ("GENE{}", "Gene{}", "other case"),
        ],
    )
    def test_genes_under_other_names(self, trained_on, found, hint):
        """The error tells what to call, and what it tells is right."""
        adata, query = small_cells(), small_cells(seed=1)
        adata.var_names = [trained_on.format(i) for i in range(30)]
        model = train_small(adata)
        query.var_names = [found.format(i) for i in range(30)]
        with pytest.raises(ValueError, match=f"30 of them are there .*{hint}.*`") as error:
            predicted(model, query)
        assert query.var_names[0] == found.format(0)
        call = str(error.value).split("`")[-2]
        exec(call, {"model": model, "adata": query})
        assert list(query.var_names) == [trained_on.format(i) for i in range(30)]
        predicted(model, query)

    def test_genes_named_in_a_column(self, either, query):
        expected = predicted(either, query)
        query.var["gene symbols"] = query.var_names.astype("category")
        query.var["other"] = "gene_0"
        query.var_names = [f"ENSG{i:011d}" for i in range(30)]
        with pytest.raises(ValueError, match=r"30 of them are in adata.var\['gene sym") as error:
            predicted(either, query)
        exec(str(error.value).split("`")[-2], {"adata": query})
        np.testing.assert_array_equal(predicted(either, query), expected)

    def test_genes_of_another_kind_of_name(self, either, query):
        query.var_names = [f"ENSG{i:011d}" for i in range(30)]
        with pytest.raises(
            ValueError, match="model's genes are symbols, those of the AnnData Ens"
        ):
            predicted(either, query)

    def test_no_hint_where_there_is_nothing_to_tell(self, either, query):
        query.var_names = [f"other_{i}" for i in range(30)]
        with pytest.raises(ValueError, match=r"\(30 in all\)\. Add those that are"):
            predicted(either, query)

    @pytest.mark.filterwarnings("ignore:The model knows none of the cell types")
    def test_unseen_cell_types_and_no_condition(self, either):
        new = small_cells(seed=2)
        new.obs["cell_type"] = "never seen"
        del new.obs["condition"]
        either.predict_stimulated(new)
        assert np.isfinite(new.layers[LAYER]).all()

    @pytest.mark.parametrize(
        "convert",
        [
            sparse.csr_matrix,
            sparse.csc_matrix,
            sparse.csr_array,
            lambda x: x.toarray(),
            lambda x: x.toarray().astype(np.float64),
            lambda x: np.asfortranarray(x.toarray()),
            lambda x: x.astype(np.float64),
        ],
        ids=["csr", "csc", "csr_array", "dense", "float64", "fortran", "csr float64"],
    )
    def test_every_kind_of_matrix(self, either, query, convert):
        expected = predicted(either, query)
        query.X = convert(query.X)
        before = snapshot(query)
        np.testing.assert_allclose(predicted(either, query), expected, rtol=1e-5, atol=1e-6)
        assert snapshot(query) == before

    def test_integers(self, either, query):
        query.X = query.X.toarray().round()
        with pytest.warns(UserWarning, match="raw counts"):
            expected = predicted(either, query)
        query.X = query.X.astype(int)
        with pytest.warns(UserWarning, match="raw counts"):
            np.testing.assert_array_equal(predicted(either, query), expected)

    def test_a_view_that_the_user_holds_gets_the_layer(self, either, query):
        expected = predicted(either, query)
        view = query[10:20]
        with pytest.warns(ad.ImplicitModificationWarning):
            either.predict_stimulated(view)
        assert view.layers[LAYER].shape == (10, 30)
        assert LAYER not in query.layers
        # The same cells in other rows: other noise, the same cells.
        assert np.corrcoef(view.layers[LAYER].ravel(), expected[10:20].ravel())[0, 1] > 0.9

    @pytest.mark.parametrize("objective", list(SMALL))
    def test_layer_of_the_set_up(self, adata, objective):
        adata.layers["normalised"] = adata.X.copy()
        SpaPerbModel.setup_anndata(adata, layer="normalised")
        model = SpaPerbModel(adata, **SMALL[objective])
        model.train(max_epochs=1, batch_size=BATCH_SIZE[objective], **QUIET)
        with pytest.raises(ValueError, match="no layer 'normalised'"):
            predicted(model, small_cells())
        expected = predicted(model, adata)
        adata.X = None
        np.testing.assert_array_equal(predicted(model, adata), expected)

    def test_negative_values_do_not_fit_a_model_of_non_negative_ones(self, either, query):
        query.X = query.X.toarray() - 1
        with pytest.raises(ValueError, match=r"negative values.*Was it scaled\?"):
            either.predict_stimulated(query)
        assert LAYER not in query.layers

    def test_nan(self, either, query):
        query.X = query.X.toarray()
        query.X[0, 0] = np.nan
        with pytest.raises(ValueError, match="NaN or infinite"):
            either.predict_stimulated(query)

    def test_no_sample(self, either, query):
        for size in (0, -5):
            with pytest.raises(ValueError, match=f"`batch_size` must be at least 1; it is {size}"):
                either.predict_stimulated(query, batch_size=size)
        with pytest.raises(ValueError, match="`n_samples` must be at least 1; it is 0"):
            either.predict_stimulated(query, n_samples=0)

    def test_progress_is_shown_for_many_blocks(self, either, query, capsys, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr("spaperb.data._disk.BLOCK_VALUES", 10 * query.n_vars)
            predicted(either, query)
        assert "Predicting" in capsys.readouterr().out
        predicted(either, query)
        assert capsys.readouterr().out == ""
