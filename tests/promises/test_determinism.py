"""The same seed gives the same numbers on a processor, to the last bit."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import scvi
import torch
from helpers import BATCH_SIZE, QUIET, SMALL, small_cells, weights

from spaperb import SpaPerbModel

# The cells are of another simulation, one type of them new: it is said, and is no matter here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:These cell types are new:UserWarning"),
    pytest.mark.filterwarnings("ignore:The control cells of these:UserWarning"),
]


MODELS: dict[str, dict[str, Any]] = {**SMALL, "pretrained": {}}


def train(kind, adata=None, **train_kwargs) -> SpaPerbModel:
    scvi.settings.seed = 0
    adata = small_cells() if adata is None else adata
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **MODELS[kind])
    model.train(max_epochs=2, batch_size=BATCH_SIZE[model.objective], **QUIET, **train_kwargs)
    return model


@pytest.fixture(scope="module", params=list(MODELS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind) -> SpaPerbModel:
    return train(kind)


@pytest.fixture(scope="module")
def cells():
    """New cells, of a type that training did not see and of one that it did."""
    new = small_cells(seed=1, n_cells=70)
    new.obs["cell_type"] = np.where(new.obs["cell_type"] == "type_2", "new", "type_0")
    return new


@pytest.fixture(scope="module")
def expected(model, cells) -> dict[str, np.ndarray]:
    return {name: predict(model, cells, **kwargs) for name, kwargs in KINDS.items()}


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "drawn": {"give_mean": False, "n_samples": 2, "seed": 3},
}


def predict(model, cells, **kwargs) -> np.ndarray:
    return model.predict_stimulated(cells, inplace=False, **kwargs)


def same(model, cells, expected) -> bool:
    return all(
        np.array_equal(predict(model, cells, **KINDS[name]), expected[name]) for name in KINDS
    )


def test_run_to_run(model, kind, cells, expected):
    again = train(kind)
    assert torch.equal(weights(again), weights(model))
    assert same(again, cells, expected)


def test_whatever_was_random_in_between(model, cells, expected):
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    scvi.settings.seed = 99
    assert same(model, cells, expected)


def test_save_and_load(model, cells, expected, tmp_path):
    model.save(tmp_path / "model")
    for adata in (False, model.adata):
        loaded = SpaPerbModel.load(tmp_path / "model", adata)
        assert torch.equal(weights(loaded), weights(model))
        assert same(loaded, cells, expected)


def test_loader_processes(model, kind, cells, expected):
    workers = train(kind, datasplitter_kwargs={"num_workers": 2})
    assert torch.equal(weights(workers), weights(model))
    assert same(workers, cells, expected)


def test_sparse_and_dense(model, kind, cells, expected):
    dense = small_cells()
    dense.X = dense.X.toarray()
    of_dense = train(kind, dense)
    np.testing.assert_allclose(weights(of_dense), weights(model), rtol=0, atol=1e-6)
    dense_cells = cells.copy()
    dense_cells.X = cells.X.toarray()
    for name, kwargs in KINDS.items():
        found = predict(of_dense, dense_cells, **kwargs)
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64, 100, 1000])
def test_chunk_size(model, cells, expected, batch_size):
    for name, kwargs in KINDS.items():
        found = predict(model, cells, batch_size=batch_size, **kwargs)
        np.testing.assert_array_equal(found, expected[name])


def test_ten_predictions_at_once(model, cells, expected):
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda _: predict(model, cells, **KINDS["drawn"]), range(10)))
    for one in found:
        np.testing.assert_array_equal(one, expected["drawn"])
