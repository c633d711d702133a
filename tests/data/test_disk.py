"""Expression on disk: the same training and the same predictions, without loading it."""

import anndata as ad
import h5py
import numpy as np
import pytest
import scvi
from anndata.experimental import read_elem_lazy
from helpers import BATCH_SIZE, QUIET, SMALL
from scipy import sparse

from spaperb import SpaPerbModel, datasets, read_mapped
from spaperb.data._disk import is_on_disk

da = pytest.importorskip("dask.array")


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    adata = datasets.simulated(n_cell_types=4, n_cells=40, n_genes=60)
    adata.X = sparse.csr_matrix(adata.X)
    adata.obsm["X_pca"] = np.ones((adata.n_obs, 2))
    return adata


@pytest.fixture(scope="module", params=["h5ad", "gzip", "zarr2.zarr", "zarr3.zarr", "dense"])
def path(request, cells, tmp_path_factory):
    """Each kind of file that AnnData writes."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param.endswith(".zarr"):
        with ad.settings.override(zarr_write_format=int(request.param[4])):
            cells.write_zarr(folder / "cells.zarr")
        return folder / "cells.zarr"
    written = cells.copy()
    if request.param == "dense":
        written.X = written.X.toarray()
    written.write_h5ad(
        folder / "cells.h5ad", compression="gzip" if request.param == "gzip" else None
    )
    return folder / "cells.h5ad"


def fit(adata, objective="in_context", **kwargs) -> SpaPerbModel:
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(adata, **kwargs)
    model = SpaPerbModel(adata, **SMALL[objective])
    model.train(2, batch_size=BATCH_SIZE[objective], **QUIET)
    return model


@pytest.fixture(scope="module")
def model(cells) -> SpaPerbModel:
    return fit(cells.copy(), counts_layer="counts")


@pytest.fixture(scope="module")
def published(cells) -> SpaPerbModel:
    return fit(cells.copy(), "published")


@pytest.fixture(params=["model", "published"])
def either(request) -> SpaPerbModel:
    """A model of each objective."""
    return request.getfixturevalue(request.param)


class TestMapped:
    def test_it_is_the_same_anndata(self, cells, path):
        mapped = read_mapped(path)
        order = np.array([7, 3, 3, 200])
        for x, y in ((mapped.X, cells.X), (mapped.layers["counts"], cells.layers["counts"])):
            assert is_on_disk(x)
            assert not is_on_disk(y)
            expected = y[order].toarray()
            found = x[order]
            np.testing.assert_array_equal(
                found.toarray() if sparse.issparse(found) else found, expected
            )
        assert mapped.obs.equals(cells.obs)
        assert mapped.var_names.equals(cells.var_names)
        assert list(mapped.obsm) == ["X_pca"]

    def test_training_is_the_same(self, cells, path, either):
        mapped = read_mapped(path)
        of_mapped = fit(mapped, either.objective, counts_layer="counts")
        for name, weights in either.module.state_dict().items():
            np.testing.assert_array_equal(of_mapped.module.state_dict()[name], weights)
        np.testing.assert_array_equal(
            of_mapped.predict_stimulated(cells, inplace=False),
            either.predict_stimulated(cells, inplace=False),
        )

    def test_a_scratch_file_leaves_nothing_behind(self, path, tmp_path):
        mapped = read_mapped(path, scratch=tmp_path)
        assert mapped.X[:3].sum() > 0
        assert not list(tmp_path.iterdir())

    def test_a_csc_matrix_is_refused(self, cells, tmp_path):
        csc = ad.AnnData(cells.X.tocsc())
        csc.write_h5ad(tmp_path / "csc.h5ad")
        with pytest.raises(ValueError, match=r"X in .*csc.h5ad is a csc_matrix.*tocsr"):
            read_mapped(tmp_path / "csc.h5ad")

    def test_no_file_and_no_anndata(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no file"):
            read_mapped(tmp_path / "none.h5ad")
        (tmp_path / "cells.csv").write_text("")
        with pytest.raises(ValueError, match=r"neither an \.h5ad file nor a \.zarr store"):
            read_mapped(tmp_path / "cells.csv")

    def test_no_expression(self, cells, tmp_path):
        ad.AnnData(sparse.csr_matrix((3, 2), dtype="f4")).write_h5ad(tmp_path / "zeros.h5ad")
        assert read_mapped(tmp_path / "zeros.h5ad").X.sum() == 0
        ad.AnnData(obs=cells.obs).write_h5ad(tmp_path / "obs.h5ad")
        assert read_mapped(tmp_path / "obs.h5ad").X is None


def backed(path):
    if path.suffix == ".zarr":
        pytest.skip("AnnData has no backed mode for zarr stores")
    return ad.read_h5ad(path, backed="r")


def lazy(path):
    if path.suffix == ".zarr":
        import zarr

        store = zarr.open_group(path, mode="r")
    else:
        store = h5py.File(path)
    return ad.AnnData(
        read_elem_lazy(store["X"]).rechunk((100, -1)),
        obs=ad.io.read_elem(store["obs"]),
        var=ad.io.read_elem(store["var"]),
        layers={"counts": read_elem_lazy(store["layers/counts"])},
    )


class TestLazyPrediction:
    @pytest.mark.parametrize("read", [read_mapped, backed, lazy])
    def test_blocks_are_what_memory_gives(self, cells, path, either, read):
        adata = read(path)
        expected = either.predict_stimulated(cells, inplace=False)
        assert either.predict_stimulated(adata) is None
        layer = adata.layers["spaperb_stimulated"]
        assert isinstance(layer, da.Array)
        np.testing.assert_allclose(layer.compute(), expected, rtol=1e-5, atol=1e-6)

    def test_some_cells_and_genes_in_another_order(self, cells, path, model):
        adata = lazy(path)[:, ::-1]
        chosen = np.array([5, 101, 310])
        found = model.predict_stimulated(adata, indices=chosen, inplace=False).compute()[:, ::-1]
        expected = model.predict_stimulated(cells, indices=chosen, inplace=False)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_it_is_streamed_to_zarr(self, cells, path, model, tmp_path):
        adata = lazy(path)
        model.predict_stimulated(adata)
        with ad.settings.override(zarr_write_format=3):
            adata.write_zarr(tmp_path / "out.zarr")
        written = ad.read_zarr(tmp_path / "out.zarr").layers["spaperb_stimulated"]
        expected = model.predict_stimulated(cells, inplace=False)
        np.testing.assert_allclose(written, expected, rtol=1e-5, atol=1e-6)

    def test_blocks_of_any_size_become_a_usual_one(self, cells, path, model, monkeypatch):
        monkeypatch.setattr("spaperb.data._disk.BLOCK_VALUES", 150 * cells.n_vars)
        adata = lazy(path)
        layer = model.predict_stimulated(adata, inplace=False)
        assert layer.chunks == ((150, 150, 20), (60,))
        expected = model.predict_stimulated(cells, inplace=False)
        np.testing.assert_allclose(layer.compute(), expected, rtol=1e-5, atol=1e-6)

    def test_counts(self, cells, path, model):
        adata = lazy(path)
        found = model.predict_stimulated(adata, sample=True, inplace=False).compute()
        expected = model.predict_stimulated(cells, sample=True, inplace=False)
        np.testing.assert_allclose(found, expected)

    @pytest.mark.parametrize("objective", list(SMALL))
    def test_the_networks_are_those_of_the_call(self, cells, path, objective):
        model = fit(cells.copy(), objective)
        expected = model.predict_stimulated(cells, inplace=False)
        layer = model.predict_stimulated(lazy(path), inplace=False)
        model.train(1, batch_size=BATCH_SIZE[objective], **QUIET)
        np.testing.assert_allclose(layer.compute(), expected, rtol=1e-4, atol=1e-5)
        assert not np.allclose(
            model.predict_stimulated(cells, inplace=False), expected, rtol=1e-4, atol=1e-5
        )

    def test_cells_without_a_type(self, cells, path, model):
        bare, query = lazy(path), cells.copy()
        for adata in (bare, query):
            del adata.obs["cell_type"]
        found = model.predict_stimulated(bare, inplace=False).compute()
        np.testing.assert_allclose(
            found, model.predict_stimulated(query, inplace=False), rtol=1e-5, atol=1e-6
        )

    def test_the_response_table(self, cells, path, model):
        table, expected = (model.predict_response(adata) for adata in (lazy(path), cells))
        np.testing.assert_allclose(table["mean_change"], expected["mean_change"], atol=1e-6)

    @pytest.mark.slow
    def test_other_processes_predict_too(self, path, model, cells):
        from dask.distributed import Client

        with Client(n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
            layer = model.predict_stimulated(lazy(path), inplace=False)
            found = client.compute(layer).result()
        expected = model.predict_stimulated(cells, inplace=False)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_latent_vectors_are_refused(self, path, model):
        with pytest.raises(ValueError, match=r"Leave out `latent=True`"):
            model.predict_stimulated(lazy(path), latent=True)

    def test_wrong_values_are_found(self, path, model):
        adata = lazy(path)
        adata.X = adata.X.map_blocks(
            lambda x: (x.toarray() if sparse.issparse(x) else x) * np.nan, dtype="f4"
        )
        with pytest.raises(ValueError, match="NaN or infinite"):
            model.predict_stimulated(adata)


def test_training_tells_how_to_leave_cells_on_disk(path):
    with pytest.raises(ValueError, match=r"spaperb\.read_mapped\(path\)"):
        SpaPerbModel.setup_anndata(lazy(path))


def test_batches_on_disk(cells, tmp_path):
    """Each block knows the batches of its own cells."""
    adata = cells.copy()
    adata.obs["batch"] = np.where(np.arange(adata.n_obs) // 2 % 2, "b", "a")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    model = fit(adata, "published", batch_key="batch")
    found = model.predict_stimulated(lazy(tmp_path / "cells.h5ad"), inplace=False).compute()
    expected = model.predict_stimulated(adata, inplace=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected[2:4] - expected[:2]).max() > 1e-3
