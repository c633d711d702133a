import numpy as np
import pytest
from scipy import sparse
from scipy.stats import linregress, pearsonr

from spaperb import metrics

RNG = np.random.default_rng(0)
PREDICTED, REAL, CONTROL = (RNG.random((n, 12)) for n in (7, 9, 8))


def test_pearson_delta():
    change = [x.mean(0) - CONTROL.mean(0) for x in (PREDICTED, REAL)]
    expected = pearsonr(*change).statistic
    assert metrics.pearson_delta(PREDICTED, REAL, CONTROL) == pytest.approx(expected)


def test_pearson_delta_of_perfect_opposite_and_no_change():
    assert metrics.pearson_delta(REAL, REAL, CONTROL) == pytest.approx(1)
    opposite = 2 * CONTROL.mean(0) - REAL.mean(0)
    assert metrics.pearson_delta(opposite[None], REAL, CONTROL) == pytest.approx(-1)
    assert metrics.pearson_delta(CONTROL, REAL, CONTROL) == 0
    assert metrics.pearson_delta(sparse.csr_matrix(CONTROL), REAL, CONTROL) == 0


def test_r2_mean():
    expected = linregress(PREDICTED.mean(0), REAL.mean(0)).rvalue ** 2
    assert metrics.r2_mean(PREDICTED, REAL) == pytest.approx(expected)


def test_means_are_in_double_precision():
    x = sparse.random(5000, 3, density=0.5, dtype=np.float32, random_state=0, format="csr")
    expected = x.toarray().astype(np.float64).mean(0)
    for matrix in (x, x.tocsc(), x.toarray()):
        np.testing.assert_allclose(metrics.mean_expression(matrix), expected, rtol=1e-12)


def test_sparse_and_single_precision():
    arrays = (PREDICTED, REAL, CONTROL)
    expected = metrics.pearson_delta(*arrays)
    for convert in (sparse.csr_matrix, sparse.csc_array, np.float32):
        assert metrics.pearson_delta(*map(convert, arrays)) == pytest.approx(expected, rel=1e-5)
