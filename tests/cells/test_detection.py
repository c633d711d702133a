"""Zeros and levels: the mean is the predicted one, and no change changes nothing."""

import numpy as np
import pytest
from helpers import context_arrays, even
from hypothesis import given, settings
from hypothesis import strategies as st

from spaperb import datasets
from spaperb.cells import Detection
from spaperb.evidence import Evidence
from spaperb.populations import Pseudobulk


@pytest.fixture(scope="module")
def evidence():
    return Evidence.of(*context_arrays(datasets.simulated(n_cell_types=4, n_genes=100)))


def apply(evidence, cells, change, k=0, seed=0):
    references = [evidence.changes.pseudobulk(s) for s in evidence.whole]
    weights = np.eye(len(references))[k]
    split = Detection.of(references, Pseudobulk.of(cells), change, weights)
    return split.apply(cells, even(len(cells), cells.shape[1], seed))


@pytest.fixture(scope="module")
def cells():
    """500 control cells of type_0."""
    adata = datasets.simulated(n_cell_types=4, n_genes=100, n_cells=500)
    of_type = (adata.obs["cell_type"] == "type_0") & (adata.obs["condition"] == "control")
    return adata.X[of_type.to_numpy()].toarray()


def test_no_change_changes_no_cell(evidence, cells):
    np.testing.assert_allclose(apply(evidence, cells, np.zeros(100)), cells, rtol=1e-5)


@pytest.mark.parametrize("k", [0, 3])
def test_the_mean_is_the_predicted_one(evidence, cells, k):
    change = evidence.changes.shift[1]
    predicted = apply(evidence, cells, change, k)
    expected = np.maximum(cells.mean(0) + change, 0)
    # Well below the standard error of 500 cells drawn at random.
    error = np.abs(predicted.mean(0) - expected)
    assert error.mean() < 0.5 * np.mean(predicted.std(0) / np.sqrt(500))
    assert error.max() < 0.15


def test_zeros_and_variance_are_those_of_stimulated_cells(evidence, cells):
    adata = datasets.simulated(n_cell_types=4, n_genes=100, n_cells=500)
    of_type = (adata.obs["cell_type"] == "type_0") & (adata.obs["condition"] == "stimulated")
    real = adata.X[of_type.to_numpy()].toarray()
    predicted = apply(evidence, cells, real.mean(0) - cells.mean(0))
    ours = np.abs((predicted == 0).mean(0) - (real == 0).mean(0)).mean()
    assert ours < 0.03
    ratio = predicted.var(0) / np.maximum(real.var(0), 1e-9)
    assert 0.8 < np.median(ratio[real.mean(0) > 0.05]) < 1.2
    constant = np.maximum(cells + real.mean(0) - cells.mean(0), 0)
    assert np.abs((constant == 0).mean(0) - (real == 0).mean(0)).mean() > 3 * ours


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-5, 5))
def test_values_are_never_negative_nor_infinite(seed, size):
    evidence = Evidence.of(*context_arrays(datasets.simulated(2, 20, 30)))
    rng = np.random.default_rng(seed)
    cells = rng.poisson(rng.gamma(0.5, 1, 30), (7, 30)).astype(np.float32)
    predicted = apply(evidence, cells, size * rng.standard_normal(30), k=1, seed=seed)
    assert np.isfinite(predicted).all()
    assert (predicted >= 0).all()
    # a mean that falls to nothing leaves nothing
    assert (apply(evidence, cells, -cells.mean(0) - 1) == 0).all()
