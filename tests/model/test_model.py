"""SpaPerbModel as a scvi-tools model: set-up, training, representations, files."""

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scvi
import torch
from helpers import (
    BATCH_SIZE,
    IN_CONTEXT,
    PUBLISHED,
    QUIET,
    SMALL,
    small_cells,
    snapshot,
    train_small,
    weights,
)
from mudata import MuData
from scipy import sparse
from scvi.model.base import VAEMixin
from scvi.train import SaveCheckpoint

from spaperb import SpaPerbModel
from spaperb.model.tune import TunableSpaPerbModel
from spaperb.nn import read_weights, shipped_weights

# New cells here are of another simulation: it is said, and is no matter.
pytestmark = pytest.mark.filterwarnings("ignore:The control cells of these:UserWarning")

BOTH = pytest.mark.parametrize("objective", list(SMALL))


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.module.parameters()])


class TestSetup:
    def test_default_names_need_no_argument(self, adata):
        SpaPerbModel.setup_anndata(adata)
        assert set(adata.obs) >= {"_scvi_condition", "_scvi_labels"}

    def test_expression_is_left_alone(self):
        for convert in (sparse.csr_matrix, lambda x: np.asfortranarray(x.toarray())):
            adata = small_cells()
            adata.X = convert(adata.X)
            x = adata.X
            SpaPerbModel.setup_anndata(adata)
            assert adata.X is x

    def test_layer(self, adata):
        adata.layers["normalised"] = adata.X.copy()
        adata.X = adata.X * 0
        SpaPerbModel.setup_anndata(adata, layer="normalised")
        assert SpaPerbModel(adata, **IN_CONTEXT).get_from_registry(adata, "X").sum() > 0

    def test_registry_can_be_viewed(self, adata, capsys):
        SpaPerbModel.setup_anndata(adata)
        SpaPerbModel(adata, **IN_CONTEXT).view_anndata_setup()
        assert "condition State Registry" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            (PUBLISHED, "published"),
            (IN_CONTEXT, "in_context, 2 networks, from scratch"),
            ({}, f"in_context, {len(read_weights(shipped_weights()))} networks, pretrained"),
        ],
        ids=["published", "scratch", "pretrained"],
    )
    def test_repr_names_the_model(self, adata, capsys, settings, expected):
        SpaPerbModel.setup_anndata(adata)
        repr(SpaPerbModel(adata, **settings))
        assert f"SpaPerbModel with objective: {expected}\n" in capsys.readouterr().out


class TestTraining:
    def test_three_calls(self, adata):
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata)
        model.train(max_epochs=1)
        model.predict_stimulated(adata)
        assert adata.layers["spaperb_stimulated"].shape == adata.shape

    @pytest.mark.parametrize(
        ("objective", "max_epochs", "name"),
        [("in_context", 24, "train_loss"), ("published", 60, "validation_loss")],
    )
    def test_loss_falls(self, adata, objective, max_epochs, name):
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **SMALL[objective])
        model.train(
            max_epochs, batch_size=BATCH_SIZE[objective], plan_kwargs={"lr": 1e-2}, **QUIET
        )
        loss = model.history[name].to_numpy(dtype=float).ravel()
        assert loss[-1] < 0.5 * loss[0]

    @BOTH
    def test_early_stopping_watches_validation_by_default(self, adata, objective):
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **SMALL[objective])
        model.train(max_epochs=50, early_stopping_patience=1, early_stopping_min_delta=50, **QUIET)
        assert len(model.history["validation_loss"]) < 50
        assert model.trainer.early_stopping_callback.monitor == "validation_loss"

    @BOTH
    def test_training_again_goes_on(self, adata, objective):
        model = train_small(adata, objective=objective)
        before = parameters(model)
        model.train(max_epochs=2, batch_size=16, **QUIET)
        assert len(model.history["train_loss"]) == 5
        assert not torch.equal(before, parameters(model))

    @BOTH
    def test_seed_makes_training_reproducible(self, objective):
        first, second, other = (train_small(small_cells(), seed, objective) for seed in (0, 0, 1))
        assert torch.equal(parameters(first), parameters(second))
        assert not torch.equal(parameters(first), parameters(other))

    @BOTH
    def test_sparse_and_dense_expression_give_the_same_model(self, objective):
        dense = small_cells()
        dense.X = dense.X.toarray()
        models = [train_small(cells, objective=objective) for cells in (small_cells(), dense)]
        torch.testing.assert_close(*map(parameters, models))

    @BOTH
    def test_checkpoints(self, adata, tmp_path, objective):
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **SMALL[objective])
        checkpoint = SaveCheckpoint(
            dirpath=str(tmp_path), monitor="validation_loss", load_best_on_end=True
        )
        model.train(max_epochs=3, callbacks=[checkpoint], **QUIET)
        (saved,) = tmp_path.iterdir()
        best = SpaPerbModel.load(str(saved), adata)
        assert torch.equal(parameters(best), parameters(model))

    @BOTH
    def test_compiled(self, adata, objective):
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **SMALL[objective])
        # The eager backend checks that the module can be captured, without a compiler on the
        # machine.
        plan_kwargs = {"compile": True, "compile_kwargs": {"backend": "eager"}}
        model.train(max_epochs=1, plan_kwargs=plan_kwargs, **QUIET)
        assert model.is_trained

    def test_indices_of_the_split_are_kept(self, either):
        parts = [either.train_indices, either.validation_indices, either.test_indices]
        assert sorted(np.concatenate(parts)) == list(range(either.adata.n_obs))

    @BOTH
    def test_batches_keep_pairs_apart(self, adata, objective):
        SpaPerbModel.setup_anndata(adata, batch_key="donor")
        model = SpaPerbModel(adata, **SMALL[objective])
        model.train(max_epochs=1, train_size=0.7, **QUIET)
        assert model.is_trained

    def test_no_validation_pairs(self, adata):
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **PUBLISHED)
        with pytest.raises(ValueError, match="Pass `early_stopping=False`, lower `train_size`"):
            model.train(max_epochs=1, train_size=1.0, **QUIET)
        model.train(max_epochs=1, train_size=1.0, early_stopping=False, **QUIET)
        assert model.is_trained

    def test_held_out_episodes_need_no_validation_cells(self, adata):
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **IN_CONTEXT)
        model.train(max_epochs=1, train_size=1.0, **QUIET)
        assert np.isfinite(model.history["validation_loss"].to_numpy(dtype=float)).all()

    def test_minibatch_of_one_pair(self, adata):
        SpaPerbModel.setup_anndata(adata)
        with pytest.raises(ValueError, match="must be at least 2"):
            SpaPerbModel(adata, **PUBLISHED).train(batch_size=1)

    @pytest.mark.parametrize(("objective", "least"), [("in_context", 1), ("published", 2)])
    @pytest.mark.parametrize("batch_size", [0, -1])
    def test_minibatch_of_nothing(self, adata, objective, least, batch_size):
        SpaPerbModel.setup_anndata(adata)
        with pytest.raises(ValueError, match=f"must be at least {least}; it is {batch_size}"):
            SpaPerbModel(adata, **SMALL[objective]).train(batch_size=batch_size)

    def test_datamodule_is_refused(self, adata):
        SpaPerbModel.setup_anndata(adata)
        with pytest.raises(ValueError, match="takes no `datamodule`"):
            SpaPerbModel(adata, **IN_CONTEXT).train(datamodule=object())


@BOTH
def test_models_that_are_let_go_let_their_cells_go(tmp_path, objective):
    cells = small_cells()
    model = train_small(cells, objective=objective)
    model.save(tmp_path / "model")
    loaded = SpaPerbModel.load(tmp_path / "model", cells)
    model.deregister_manager(cells)
    of_cells, of_loaded = weakref.ref(cells), weakref.ref(loaded)
    del cells, model, loaded
    gc.collect()
    assert of_loaded() is None
    assert of_cells() is None


class TestRepresentations:
    def test_in_context_cells_are_encoded_by_components(self, in_context, query):
        z = in_context.get_latent_representation()
        assert z.shape[0] == in_context.adata.n_obs
        x = in_context.adata.X.toarray()
        assert np.isfinite(z).all()
        expected = in_context._learned().evidence.project(x)
        np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-5)
        arguments: list[dict[str, Any]] = [{"return_dist": True}, {"dataloader": []}]
        for argument in arguments:
            with pytest.raises(ValueError, match="have no posterior and take no `dataloader`"):
                in_context.get_latent_representation(query, **argument)

    def test_latent_representation(self, trained):
        z = trained.get_latent_representation()
        assert z.shape == (trained.adata.n_obs, 4)
        mean, variance = trained.get_latent_representation(return_dist=True)
        np.testing.assert_array_equal(z, mean)
        assert (variance > 0).all()

    def test_elbo_and_reconstruction_error(self, trained):
        elbo = trained.get_elbo(return_mean=False)
        error = trained.get_reconstruction_error(return_mean=False)["reconstruction_loss"]
        assert elbo.shape == error.shape == (trained.adata.n_obs,)
        assert (error > 0).all()
        # The sign is that of the loss's terms, and KL is positive.
        assert (-elbo > 0).all()

    def test_genes_in_another_order_do_not_fit_other_methods(self, trained):
        other = small_cells(seed=1)
        with pytest.raises(ValueError, match="their order differs"):
            trained.get_elbo(other[:, ::-1].copy())
        with pytest.raises(ValueError, match="missing are: gene_29"):
            trained.get_elbo(other[:, :-1].copy())
        with pytest.raises(ValueError, match="are missing in the AnnData: gene_29"):
            trained.get_latent_representation(other[:, :-1].copy())

    def test_it_is_that_of_scvi_tools(self, trained):
        """For cells of training, the mean and the variance."""
        expected = VAEMixin.get_latent_representation(trained, return_dist=True)
        found = trained.get_latent_representation(return_dist=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        loader = trained._make_data_loader(adata=trained.adata)
        z = trained.get_latent_representation(dataloader=loader)
        np.testing.assert_allclose(z, expected[0], rtol=1e-6)

    def test_new_cells_are_encoded_as_by_scvi_tools(self, trained):
        new = small_cells(seed=1)
        expected = VAEMixin.get_latent_representation(trained, new.copy())
        found = trained.get_latent_representation(new)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_any_cells_are_encoded(self, either):
        """Of unseen types, without columns, with other genes and order; nothing is written."""
        new = small_cells(seed=1)
        expected = either.get_latent_representation(new)
        unseen = new[:, ::-1].copy()
        unseen.obs["cell_type"] = "unseen"
        bare = ad.AnnData(new.X, var=new.var)
        for cells in (unseen, bare):
            before = snapshot(cells)
            assert np.array_equal(either.get_latent_representation(cells), expected)
            assert snapshot(cells) == before

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("in_context", {}),
            ("trained", {}),
            ("trained", {"return_dist": True}),
            ("trained", {"give_mean": False}),
        ],
    )
    def test_rows_follow_indices_whatever_the_chunks(self, request, query, name, settings):
        model = request.getfixturevalue(name)
        expected = np.asarray(model.get_latent_representation(query, **settings))
        for size in (7, 10_000):
            z = model.get_latent_representation(query, batch_size=size, **settings)
            assert np.array_equal(z, expected)
        for rows in ([5, 3, 119, 3], [-1], np.arange(120) % 3 == 0, []):
            z = model.get_latent_representation(query, rows, **settings)
            where = np.asarray(rows) if len(rows) else slice(0, 0)
            assert np.array_equal(z, expected[..., where, :])

    def test_draws(self, trained, query):
        """The posterior's, by the seed, which leave PyTorch's random state alone."""
        state = torch.get_rng_state()
        draws = [
            trained.get_latent_representation(query, give_mean=False, seed=seed)
            for seed in range(200)
        ]
        again = trained.get_latent_representation(query, give_mean=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(again, draws[0])
        mean, variance = trained.get_latent_representation(query, return_dist=True)
        standard = (np.array(draws) - mean) / np.sqrt(variance)
        assert abs(standard.mean()) < 4 / np.sqrt(standard.size)
        assert abs(standard.std() - 1) < 4 / np.sqrt(2 * standard.size)
        trained.predict_stimulated(query, give_mean=False, latent=True)
        z = query.obsm["X_spaperb_stimulated"] - query.obsm["X_spaperb_delta"]
        np.testing.assert_allclose(z, again, atol=1e-5)

    def test_batches(self, adata):
        """Known ones by name, others as the average batch."""
        SpaPerbModel.setup_anndata(adata, batch_key="donor")
        model = SpaPerbModel(adata, **PUBLISHED)
        model.train(max_epochs=2, batch_size=16, **QUIET)
        z = model.get_latent_representation(adata)
        expected = VAEMixin.get_latent_representation(model)
        np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-6)
        new = adata.copy()
        del new.obs["donor"]
        n_batch = adata.obs["donor"].nunique()
        shares = torch.full((adata.n_obs, n_batch), 1 / n_batch)
        with torch.inference_mode():
            average = model.module.encoder(torch.from_numpy(adata.X.toarray()), shares).loc
        z_new = model.get_latent_representation(new)
        np.testing.assert_allclose(z_new, average, rtol=1e-5, atol=1e-6)
        assert not np.allclose(z_new, z)

    def test_cells_on_disk(self, either, query, tmp_path):
        expected = either.get_latent_representation(query)
        query.write_h5ad(tmp_path / "cells.h5ad")
        backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
        assert np.array_equal(either.get_latent_representation(backed), expected)
        backed.file.close()

    def test_what_cannot_be_encoded(self, either, query):
        with pytest.raises(ValueError, match="`batch_size` must be at least 1; it is 0"):
            either.get_latent_representation(query, batch_size=0)
        with pytest.raises(IndexError, match="120 is out of bounds"):
            either.get_latent_representation(query, [120])
        query.X = query.X.toarray() - 1
        with pytest.raises(ValueError, match="negative values"):
            either.get_latent_representation(query)


class TestFiles:
    def test_saved_model_gives_the_same_predictions(self, adata, query, tmp_path):
        for name, settings in {
            "scratch": IN_CONTEXT,
            "pretrained": {},
            "fresh": {**PUBLISHED, "delta_noise": "fresh"},
            "fixed": {**PUBLISHED, "delta_noise": "fixed"},
        }.items():
            SpaPerbModel.setup_anndata(adata)
            model = SpaPerbModel(adata, **settings)
            model.train(max_epochs=2, batch_size=BATCH_SIZE[model.objective], **QUIET)
            path = tmp_path / name
            model.save(path)
            expected = model.predict_stimulated(query, inplace=False)
            for load_adata in (adata, False):
                loaded = SpaPerbModel.load(path, load_adata)
                assert np.array_equal(loaded.predict_stimulated(query, inplace=False), expected)
                pd.testing.assert_frame_equal(
                    loaded.history["train_loss"], model.history["train_loss"], check_dtype=False
                )

    @BOTH
    def test_negative_data_stay_unclipped_after_loading(self, adata, tmp_path, objective):
        adata.X = adata.X.toarray() - 1
        with pytest.warns(UserWarning, match="negative values"):
            model = train_small(adata, objective=objective)
        model.save(tmp_path / "model")
        loaded = SpaPerbModel.load(tmp_path / "model", adata=False)
        assert loaded.predict_stimulated(adata, inplace=False).min() < 0

    @BOTH
    def test_loaded_with_its_data_it_trains_on(self, adata, tmp_path, objective):
        train_small(adata, objective=objective).save(tmp_path / "model", save_anndata=True)
        loaded = SpaPerbModel.load(tmp_path / "model")
        loaded.train(max_epochs=1, **QUIET)
        assert len(loaded.history["train_loss"]) == 4

    def test_loaded_with_new_control_cells(self, either, tmp_path):
        either.save(tmp_path / "model")
        new = small_cells(seed=1)
        new = new[new.obs["condition"] == "control"].copy()
        assert (
            SpaPerbModel.load(tmp_path / "model", new).get_latent_representation().shape[0] == 60
        )

    def test_without_data_it_says_what_it_needs(self, either, tmp_path):
        either.save(tmp_path / "model")
        loaded = SpaPerbModel.load(tmp_path / "model", adata=False)
        with pytest.raises(ValueError, match="loaded without data: pass the cells"):
            loaded.predict_stimulated()
        with pytest.raises(ValueError, match="Load it with the training AnnData"):
            loaded.train()

    @pytest.mark.parametrize("size", [0, 100, -100])
    def test_truncated_file(self, trained, tmp_path, size):
        trained.save(tmp_path / "model")
        file = tmp_path / "model" / "model.pt"
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"model\.pt could not be read"):
            SpaPerbModel.load(tmp_path / "model", adata=False)

    def test_model_of_another_class(self, adata, tmp_path):
        TunableSpaPerbModel.setup_anndata(adata)
        TunableSpaPerbModel(adata, **IN_CONTEXT).save(tmp_path / "model")
        with pytest.raises(ValueError, match="holds a TunableSpaPerbModel, not a SpaPerbModel"):
            SpaPerbModel.load(tmp_path / "model", adata)

    def test_model_of_another_package(self, adata, tmp_path):
        scvi.model.SCVI.setup_anndata(adata)
        scvi.model.SCVI(adata).save(tmp_path / "model")
        with pytest.raises(ValueError, match=r"more than data.*package is loaded by that one"):
            SpaPerbModel.load(tmp_path / "model", adata)

    def test_no_values_to_load(self, adata, tmp_path):
        adata.layers["normalised"] = adata.X
        adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
        SpaPerbModel.setup_anndata(adata, layer="normalised")
        SpaPerbModel(adata, **IN_CONTEXT).save(tmp_path / "model")
        with pytest.raises(ValueError, match=r"X holds nothing but zeros.*with a dense X"):
            SpaPerbModel.load(tmp_path / "model", adata)
        adata.X = adata.X.toarray()
        SpaPerbModel.load(tmp_path / "model", adata)

    def test_no_file(self, adata, tmp_path):
        with pytest.raises(ValueError, match="There is no model file"):
            SpaPerbModel.load(tmp_path, adata)


class TestScanpySession:
    @BOTH
    def test_prediction_is_used_like_any_layer(self, objective):
        """Differential expression, a dot plot and a PCA on the predicted layer."""
        adata = small_cells()
        model = train_small(adata, objective=objective)
        sc.pp.pca(adata, n_comps=5)
        model.predict_stimulated(adata)
        layer = "spaperb_stimulated"
        sc.tl.rank_genes_groups(adata, "cell_type", layer=layer, method="wilcoxon")
        assert np.isfinite(sc.get.rank_genes_groups_df(adata, None)["scores"]).all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scanpy's own, about its plotting dependencies
            axes = sc.pl.dotplot(adata, adata.var_names[:3], "cell_type", layer=layer, show=False)
        assert "mainplot_ax" in axes
        before = adata.obsm["X_pca"].copy()
        sc.pp.pca(adata, n_comps=5, layer=layer)
        assert adata.obsm["X_pca"].shape == before.shape
        assert not np.allclose(adata.obsm["X_pca"], before)


class TestBadInput:
    """Each error says what was found, comes before any training, and changes nothing."""

    @staticmethod
    def refused(adata, match, **setup):
        before = snapshot(adata)
        with pytest.raises(ValueError, match=match):
            SpaPerbModel.setup_anndata(adata, **setup)
        assert snapshot(adata) == before

    def test_no_condition_column(self, adata):
        adata.obs = adata.obs.rename(columns={"condition": "treatment"})
        self.refused(
            adata, r"no column 'condition'.*'treatment' \(control, stimulated\).*`condition_key=`"
        )

    def test_no_cell_type_column(self, adata):
        self.refused(adata, "no column 'celltype'.*'cell_type'", labels_key="celltype")

    def test_no_batch_column(self, adata):
        self.refused(adata, "no column 'lane'.*'donor'", batch_key="lane")

    @pytest.mark.parametrize("argument", ["control", "stimulated"])
    def test_absent_value(self, adata, argument):
        self.refused(
            adata,
            rf"No cell has 'ctrl' \(`{argument}`\).*values are: control, stimulated",
            **{argument: "ctrl"},
        )

    def test_view(self, adata):
        adata.obs["batch"] = "one"
        view = adata[:100][:, :20]
        self.refused(view, r"view of another one \(100 .*adata = adata\.copy\(\)")
        assert view.is_view

    @pytest.mark.parametrize("key", ["condition", "cell_type", "donor"])
    def test_values_of_several_kinds(self, adata, key):
        values = adata.obs[key].astype(object)
        values[:3] = 7
        adata.obs[key] = values
        self.refused(
            adata, rf"\['{key}'\].*several kinds.*: int, str.*astype\(str\)", batch_key="donor"
        )

    def test_same_value_twice(self, adata):
        self.refused(adata, "both 'control'", stimulated="control")

    def test_one_condition_only(self, adata):
        adata = adata[adata.obs["condition"] == "control"].copy()
        self.refused(adata, "All 60 cells have the condition 'control'")

    def test_no_type_with_both_conditions(self, adata):
        adata.obs["cell_type"] = adata.obs["condition"].astype(str) + " cells"
        self.refused(adata, "nothing to pair.*control cells 60 and 0, stimulated cells 0 and 60")

    def test_no_batch_with_both_conditions(self, adata):
        adata.obs["lane"] = adata.obs["condition"].astype(str)
        self.refused(adata, "within one batch.*leave out `batch_key`", batch_key="lane")

    def test_truth_values_are_conditions(self, adata):
        adata.obs["is_treated"] = adata.obs["condition"] == "stimulated"
        setup = {"condition_key": "is_treated", "control": False}
        adata.obs["lane"] = adata.obs["is_treated"].astype(str)
        self.refused(
            adata, "False 60 and 0, True 0 and 60", labels_key="lane", stimulated=True, **setup
        )
        SpaPerbModel.setup_anndata(adata, **setup)

    @pytest.mark.parametrize("key", ["condition", "cell_type"])
    def test_missing_values(self, adata, key):
        adata.obs.loc[adata.obs_names[:5], key] = np.nan
        self.refused(adata, rf"\['{key}'\].*has no value for 5 of 120 cells")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dense", [True, False])
    def test_nan_or_infinite(self, adata, value, dense):
        if dense:
            adata.X = adata.X.toarray()
            adata.X[3, 4] = value
        else:
            adata.X.data[7] = value
        self.refused(adata, "NaN or infinite values")

    def test_duplicate_genes(self, adata):
        adata.var_names = ["gene_0", *adata.var_names[:-1]]
        self.refused(adata, "1 gene name.*more than once: gene_0.*var_names_make_unique")

    @pytest.mark.parametrize("shape", [(0, 30), (120, 0)])
    def test_empty(self, adata, shape):
        self.refused(
            adata[: shape[0], : shape[1]].copy(), rf"{shape[0]} cells and {shape[1]} genes"
        )

    def test_missing_layer(self, adata):
        self.refused(adata, "no layer 'counts' in adata.layers; it has: none", layer="counts")

    def test_no_expression(self, adata):
        empty = ad.AnnData(obs=adata.obs, shape=adata.shape)
        empty.layers["logged"] = adata.X
        self.refused(empty, r"X is None.*`setup_anndata\(layer=...\)`.*layers are: logged\.")
        SpaPerbModel.setup_anndata(empty, layer="logged")

    @pytest.mark.parametrize(
        ("cells", "advice"),
        [
            ("cells.h5ad", r"the path 'cells.h5ad'.*`adata = anndata.read_h5ad\('cells.h5ad'\)`"),
            (Path("cells.h5ad"), "the path 'cells.h5ad'"),
            (pd.DataFrame([[1.0]]), r"a DataFrame.*`anndata.AnnData\(X, obs=..., var=...\)`"),
            (MuData({"rna": small_cells()}), r"a MuData.*`mdata\['rna'\]`, say; it has: rna\."),
            (None, "None. Pass the cells"),
        ],
        ids=["str", "Path", "DataFrame", "MuData", "None"],
    )
    def test_no_anndata(self, trained, cells, advice):
        calls = [SpaPerbModel.setup_anndata, SpaPerbModel]
        if cells is not None:
            calls += [trained.predict_stimulated, trained.get_latent_representation]
        for call in calls:
            with pytest.raises(TypeError, match=f"`adata` must be an AnnData; it is {advice}"):
                call(cells)

    def test_no_anndata_for_a_table(self, adata):
        model = train_small(adata, objective="in_context")
        with pytest.raises(TypeError, match="`adata` must be an AnnData; it is the path"):
            model.predict_response("cells.h5ad")

    @pytest.mark.parametrize("key", ["condition", "cell_type", "donor", "dose"])
    def test_a_column_twice(self, adata, key):
        adata.obs["dose"] = 1.0
        adata.obs = pd.concat([adata.obs, adata.obs[[key]]], axis=1)
        setup = {"batch_key": "donor", "dose_key": "dose"}
        self.refused(adata, rf"2 columns named '{key}' \(`\w+_key`\).*duplicated", **setup)
        adata.obs = adata.obs.loc[:, ~adata.obs.columns.duplicated()]
        SpaPerbModel.setup_anndata(adata, **setup)

    def test_another_column_twice(self, adata):
        adata.obs = pd.concat([adata.obs, adata.obs[["donor"]]], axis=1)
        self.refused(adata, "no column 'lane'.*'donor'", batch_key="lane")
        SpaPerbModel.setup_anndata(adata)

    @pytest.mark.parametrize(
        ("objective", "keys"),
        [
            ("in_context", ["condition", "cell_type"]),
            ("published", ["condition", "cell_type", "donor"]),
        ],
    )
    def test_a_column_twice_in_new_cells(self, adata, objective, keys):
        setup = {"batch_key": "donor"}
        SpaPerbModel.setup_anndata(adata, **setup)
        model = SpaPerbModel(adata, **SMALL[objective])
        model.train(max_epochs=1, batch_size=16, **QUIET)
        for key in keys:
            new = small_cells(seed=1)
            new.obs = pd.concat([new.obs, new.obs[[key]]], axis=1)
            for call in (model.predict_stimulated, model.get_latent_representation):
                with pytest.raises(ValueError, match=f"2 columns named '{key}'"):
                    call(new)

    def test_numbers_and_their_names_are_told_apart(self, adata):
        number = (adata.obs["condition"] == "stimulated").astype(int).to_numpy()
        for column, control, found in (
            (number, "0", "No cell has '0'.*values are: 0, 1[.]"),
            (number.astype(str), np.int64(0), "No cell has 0 .*values are: '0', '1'[.]"),
        ):
            adata.obs["treated"] = column
            setup = {"condition_key": "treated", "control": control}
            self.refused(adata, found, **setup)
        self.refused(adata, r"'treated' \('0', '1'\)", condition_key="absent")

    def test_expression_that_is_not_numbers(self, adata):
        adata.X = np.full(adata.shape, "a", dtype=object)
        self.refused(adata, "must be numbers")

    def test_backed(self, adata, tmp_path):
        adata.write_h5ad(tmp_path / "cells.h5ad")
        backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
        with pytest.raises(ValueError, match=r"`adata = adata\.to_memory\(\)`"):
            SpaPerbModel.setup_anndata(backed)
        backed.file.close()

    def test_raw_counts_are_warned_of(self):
        adata = small_cells()
        adata.X = np.expm1(adata.X.toarray()).round()
        with pytest.warns(UserWarning, match=r"sc\.pp\.normalize_total.*sc\.pp\.log1p"):
            SpaPerbModel.setup_anndata(adata)

    def test_negative_values_are_noted_once(self, adata):
        adata.X = adata.X.toarray() - 1
        with pytest.warns(UserWarning, match="negative values") as record:
            SpaPerbModel.setup_anndata(adata)
        assert len(record) == 1

    def test_column_order_is_warned_of(self, adata):
        adata.X = adata.X.tocsc()
        with pytest.warns(UserWarning, match="tocsr"):
            SpaPerbModel.setup_anndata(adata)

    def test_predict_before_train(self, adata):
        SpaPerbModel.setup_anndata(adata)
        with pytest.raises(RuntimeError, match="train the model first"):
            SpaPerbModel(adata, **IN_CONTEXT).predict_stimulated()
        assert "spaperb_stimulated" not in adata.layers


def with_other_columns():
    """Cells with further columns to set them up by, and a batch."""
    adata = small_cells()
    rng = np.random.default_rng(0)
    adata.obs["batch"] = pd.Categorical(rng.choice(["a", "b"], adata.n_obs))
    adata.obs["other_type"] = rng.choice(["x", "y"], adata.n_obs)
    stimulated = adata.obs["condition"] == "stimulated"
    adata.obs["other_condition"] = np.where(stimulated, "control", "after")
    return adata


def set_up(adata):
    SpaPerbModel.setup_anndata(adata, batch_key="batch")


def set_up_otherwise(adata):
    SpaPerbModel.setup_anndata(
        adata, condition_key="other_condition", labels_key="other_type", batch_key="donor"
    )


def set_up_for_scvi(adata):
    with pytest.warns(UserWarning, match="unnormalized count data"):
        scvi.model.SCVI.setup_anndata(adata, labels_key="other_type", batch_key="other_condition")


OTHERS = pytest.mark.parametrize("other", [set_up_otherwise, set_up_for_scvi])
ARGUMENTS: dict[str, Any] = {"max_epochs": 2, "batch_size": 4, **QUIET}


def fitted(adata, between=None, objective="in_context"):
    """A model made of a set-up, with something done to the AnnData before it is trained."""
    scvi.settings.seed = 0
    set_up(adata)
    model = SpaPerbModel(adata, **SMALL[objective])
    if between is not None:
        between(adata)
    model.train(**ARGUMENTS)
    return model


class TestAnotherSetUp:
    """A model trains on and predicts by its own set-up, whatever its AnnData is set up for."""

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls):
        return fitted(with_other_columns())

    @staticmethod
    def assert_same(model, expected):
        assert torch.equal(weights(model), weights(expected))
        np.testing.assert_array_equal(
            model.predict_stimulated(inplace=False), expected.predict_stimulated(inplace=False)
        )
        np.testing.assert_array_equal(
            model.get_latent_representation(), expected.get_latent_representation()
        )
        if model.objective == "published":
            elbos = []
            for m in (model, expected):
                scvi.settings.seed = 0  # of its draws
                elbos.append(m.get_elbo())
            assert elbos[0] == elbos[1]

    @OTHERS
    def test_before_training(self, expected, other):
        self.assert_same(fitted(with_other_columns(), other), expected)

    @OTHERS
    def test_published_networks_before_training(self, other):
        models = [fitted(with_other_columns(), o, "published") for o in (None, other)]
        self.assert_same(*models)

    def test_between_set_up_and_model(self, expected):
        """By another class: one of the same class is what the model is made from."""
        adata = with_other_columns()
        scvi.settings.seed = 0
        set_up(adata)
        set_up_for_scvi(adata)
        model = SpaPerbModel(adata, **IN_CONTEXT)
        model.train(**ARGUMENTS)
        self.assert_same(model, expected)

    @OTHERS
    def test_after_training(self, expected, other):
        adata = with_other_columns()
        model = fitted(adata)
        other(adata)
        self.assert_same(model, expected)
        other(adata)
        pd.testing.assert_frame_equal(model.predict_response(), expected.predict_response())

    @OTHERS
    def test_training_further(self, other):
        models = []
        for between in (other, lambda adata: None):
            adata = with_other_columns()
            model = fitted(adata)
            between(adata)
            scvi.settings.seed = 1
            model.train(**ARGUMENTS)
            models.append(model)
        self.assert_same(*models)

    def test_two_models_in_turn(self, expected):
        adata = with_other_columns()
        set_up_otherwise(adata)
        scvi.settings.seed = 0
        second = SpaPerbModel(adata, **IN_CONTEXT)
        self.assert_same(fitted(adata), expected)
        scvi.settings.seed = 0
        second.train(**ARGUMENTS)
        alone = with_other_columns()
        set_up_otherwise(alone)
        scvi.settings.seed = 0
        expected_second = SpaPerbModel(alone, **IN_CONTEXT)
        scvi.settings.seed = 0
        expected_second.train(**ARGUMENTS)
        assert second.perturbations == ["after"]
        self.assert_same(second, expected_second)

    def test_categories_in_another_order(self, expected):
        """Codes of a category stay those of the model."""

        def reorder(adata):
            for key in ("batch", "cell_type"):
                column = adata.obs[key].cat
                adata.obs[key] = column.reorder_categories(column.categories[::-1])
            set_up_otherwise(adata)

        self.assert_same(fitted(with_other_columns(), reorder), expected)
        model = fitted(with_other_columns())
        reorder(model.adata)
        self.assert_same(model, expected)


class TestChangedData:
    """Training refuses data other than those that were set up."""

    @staticmethod
    def rename(adata):
        adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"type_0": "new"})

    @staticmethod
    def relabel(adata):
        adata.obs.loc[adata.obs_names[:3], "batch"] = "a"
        adata.obs.loc[adata.obs_names[3:6], "batch"] = "b"

    @staticmethod
    def drop(adata):
        del adata.obs["condition"]

    @staticmethod
    def scale(adata):
        adata.X = adata.X.toarray() - 1

    @staticmethod
    def reorder_genes(adata):
        adata._inplace_subset_var(np.arange(adata.n_vars)[::-1])

    @staticmethod
    def leave_cells_out(adata):
        adata._inplace_subset_obs(np.arange(100))

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            (rename, r"adata\.obs\['cell_type'\] changed since"),
            (relabel, r"adata\.obs\['batch'\] changed since"),
            (drop, r"adata\.obs\['condition'\] changed since"),
            (scale, "the expression changed since"),
            (reorder_genes, "their order differs"),
            (leave_cells_out, "changed since"),
        ],
    )
    @pytest.mark.parametrize("between", [lambda adata: None, set_up_otherwise])
    def test_refused(self, change, found, between):
        model = fitted(with_other_columns())
        before = weights(model)
        query = small_cells()
        expected = model.predict_stimulated(query, inplace=False)
        between(model.adata)
        change(model.adata)
        with pytest.raises(ValueError, match=found):
            model.train(**ARGUMENTS)
        assert torch.equal(weights(model), before)
        np.testing.assert_array_equal(model.predict_stimulated(query, inplace=False), expected)

    def test_refused_between_set_up_and_model(self):
        adata = with_other_columns()
        set_up(adata)
        TestChangedData.relabel(adata)
        with pytest.raises(
            ValueError, match=r"adata\.obs\['batch'\] changed since.*Set it up anew"
        ):
            SpaPerbModel(adata, **IN_CONTEXT)
        set_up(adata)
        SpaPerbModel(adata, **IN_CONTEXT)

    def test_data_given_later(self, tmp_path):
        """To a model that was loaded without."""
        model = fitted(with_other_columns())
        model.save(tmp_path / "model")
        loaded = SpaPerbModel.load(tmp_path / "model", adata=False)
        loaded.adata = with_other_columns()
        loaded.train(**ARGUMENTS)
        TestChangedData.relabel(loaded.adata)
        with pytest.raises(ValueError, match=r"adata\.obs\['batch'\] changed since"):
            loaded.train(**ARGUMENTS)

    def test_the_same_in_another_form_is_no_change(self):
        def convert(adata):
            adata.X = adata.X.toarray().astype(np.float64)
            adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
            adata.obs["condition"] = adata.obs["condition"].astype(object)
            adata.obs_names = [f"{name}-1" for name in adata.obs_names]

        torch.testing.assert_close(
            weights(fitted(with_other_columns(), convert)),
            weights(fitted(with_other_columns())),
        )


class TestLeftOutCells:
    """Cells for testing take no part in what a model learns."""

    @pytest.fixture(scope="class")
    @classmethod
    def split(cls):
        """Positions for training, validation and testing."""
        fifth = np.arange(small_cells().n_obs) % 5
        return [np.flatnonzero(part) for part in (fifth > 1, fifth == 1, fifth == 0)]

    @staticmethod
    def model(split, adata=None, spoilt=slice(0), **kwargs):
        adata = small_cells() if adata is None else adata
        x = adata.X.toarray()
        x[spoilt] = np.random.default_rng(0).permuted(x[spoilt], axis=1)
        adata.X = x
        scvi.settings.seed = 0
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **IN_CONTEXT)
        # A list of its own: scvi-tools adds a third part where there is none.
        indexing = {"external_indexing": list(split)}
        model.train(datasplitter_kwargs=indexing, **ARGUMENTS, **kwargs)
        return model

    def test_what_they_express_changes_nothing(self, split):
        query = small_cells()
        model, other = self.model(split), self.model(split, spoilt=split[2])
        assert torch.equal(weights(model), weights(other))
        pd.testing.assert_frame_equal(model.predict_response(query), other.predict_response(query))
        np.testing.assert_array_equal(
            model.predict_stimulated(query, inplace=False),
            other.predict_stimulated(query, inplace=False),
        )

    def test_it_is_as_if_they_were_not_there(self, split):
        model = self.model(split)
        used = np.sort(np.concatenate(split[:2]))
        adata = small_cells()[used].copy()
        alone = self.model([np.searchsorted(used, part) for part in split[:2]], adata)
        assert torch.equal(weights(model), weights(alone))
        query = small_cells()
        pd.testing.assert_frame_equal(model.predict_response(query), alone.predict_response(query))

    def test_those_for_validation_are_measured(self):
        adata = small_cells()
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **IN_CONTEXT)
        model.train(train_size=0.5, validation_size=0.2, **ARGUMENTS)
        used = np.concatenate([model.train_indices, model.validation_indices])
        cells = adata[used]
        control = cells[cells.obs["condition"] == "control"]
        evidence = model.state.to_plain()["predictor"]["evidence"]
        means = evidence["populations"]["mean"][: len(evidence["names"])]
        for name, mean in zip(evidence["names"], means, strict=True):
            expected = control[control.obs["cell_type"] == name].X.toarray().mean(0)
            np.testing.assert_allclose(mean, expected, rtol=1e-5)

    def test_after_loading_they_are_the_same(self, split, tmp_path):
        """From within training, too, before it measured anything."""
        checkpoint = SaveCheckpoint(
            dirpath=str(tmp_path), monitor="validation_loss", load_best_on_end=True
        )
        model = self.model(split, callbacks=[checkpoint])
        (saved,) = tmp_path.iterdir()
        loaded = SpaPerbModel.load(str(saved), model.adata.copy())
        assert loaded.state.predictor is None
        query = small_cells()
        pd.testing.assert_frame_equal(
            loaded.predict_response(query), model.predict_response(query)
        )
        other = model.adata[::-1].copy()
        with pytest.raises(RuntimeError, match="other cells, or the same in another order"):
            SpaPerbModel.load(str(saved), other).predict_response(query)

    def test_training_further_begins_anew(self, split, tmp_path):
        """A checkpoint from within a second training knows nothing that the first one measured."""
        model = self.model(split)
        checkpoint = SaveCheckpoint(dirpath=str(tmp_path), monitor="validation_loss")
        model.train(callbacks=[checkpoint], **ARGUMENTS)
        (saved,) = tmp_path.iterdir()
        loaded = SpaPerbModel.load(str(saved), adata=False)
        assert loaded.state.predictor is None

    @BOTH
    def test_a_perturbation_that_is_left_out_as_a_whole(self, objective):
        adata = small_cells()
        conditions = adata.obs["condition"].astype(str).to_numpy()
        conditions[np.flatnonzero(conditions == "stimulated")[::2]] = "other"
        adata.obs["condition"] = conditions
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **SMALL[objective])
        before = weights(model)
        test = np.flatnonzero(conditions == "other")
        train, validation = np.flatnonzero(conditions != "other"), test[:0]
        arguments = {"early_stopping": False, **ARGUMENTS}
        with pytest.raises(ValueError, match=r"perturbations are left.*: other"):
            model.train(
                datasplitter_kwargs={"external_indexing": [train, validation, test]}, **arguments
            )
        assert torch.equal(weights(model), before)
        assert not model.is_trained
