"""Scores of populations, against independent sources and closed forms."""

import numpy as np
import pytest
from helpers import populations_of
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance, linregress, wasserstein_distance
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import StandardScaler

from spaperb import metrics, populations

PREDICTED, REAL, CONTROL = populations_of(0, shift=0.8)


def project(*arrays):
    pca = PCA(5).fit(np.concatenate(arrays))
    return tuple(pca.transform(x) for x in arrays)


def test_r2_var():
    variances = [StandardScaler().fit(x).var_ for x in (PREDICTED, REAL)]
    expected = linregress(*variances).rvalue ** 2
    assert metrics.r2_var(PREDICTED, REAL) == pytest.approx(expected)


def test_energy_distance_in_one_dimension_is_scipys():
    for gene in range(3):
        p, s = PREDICTED[:, [gene]], REAL[:, [gene]]
        expected = energy_distance(p.ravel(), s.ravel()) ** 2
        assert metrics.energy_distance(p, s) == pytest.approx(expected, abs=1e-9)


def test_energy_distance_in_many_dimensions():
    p, s = PREDICTED, REAL
    expected = 2 * cdist(p, s).mean() - cdist(p, p).mean() - cdist(s, s).mean()
    assert metrics.energy_distance(p, s) == pytest.approx(expected)


def test_e_distance_is_the_energy_distance_of_squares():
    p, s = PREDICTED, REAL
    d = {k: cdist(*k_, "sqeuclidean").mean() for k, k_ in zip("ab", ((p, s), (p, p)), strict=True)}
    expected = 2 * d["a"] - d["b"] - cdist(s, s, "sqeuclidean").mean()
    assert metrics.e_distance(p, s) == pytest.approx(expected)


def test_mmd():
    p, s, c = project(PREDICTED, REAL, CONTROL)
    median = np.median(cdist(s, c))

    def kernel(a, b):
        gammas = [1 / (2 * h**2) for h in (median / 2, median, 2 * median)]
        return np.mean([rbf_kernel(a, b, gamma=g).mean() for g in gammas])

    expected = kernel(p, p) + kernel(s, s) - 2 * kernel(p, s)
    assert metrics.mmd(p, s, c) == pytest.approx(expected)


def test_variance_ratio():
    expressed = REAL.mean(0) > 0.05
    expected = np.median(PREDICTED.var(0)[expressed] / REAL.var(0)[expressed])
    assert metrics.variance_ratio(PREDICTED, REAL) == pytest.approx(expected)
    assert metrics.variance_ratio(2 * REAL, REAL) == pytest.approx(4)
    assert np.isnan(metrics.variance_ratio(REAL, 0 * REAL))


def test_zero_fraction_error():
    expected = np.abs((PREDICTED == 0).mean(0) - (REAL == 0).mean(0)).mean()
    assert metrics.zero_fraction_error(PREDICTED, REAL) == pytest.approx(expected)
    assert metrics.zero_fraction_error(REAL + 1, 0 * REAL) == 1


def test_pertpys_e_distance():
    pertpy = pytest.importorskip(
        "pertpy", reason="pertpy is not installed; it has its own environment"
    )
    p, s = project(PREDICTED, REAL)
    theirs = pertpy.tl.Distance("edistance", obsm_key="X_pca")(p, s)
    # They divide the sums within a population by n (n - 1), we by n^2: the distance itself is
    # ours.
    n, m = len(p), len(s)
    bias = cdist(p, p, "sqeuclidean").mean() / (n - 1) + cdist(s, s, "sqeuclidean").mean() / (
        m - 1
    )
    assert metrics.e_distance(p, s) == pytest.approx(theirs + bias, rel=1e-4)


@pytest.mark.parametrize("sizes", [(27, 39), (10, 20), (1, 7), (8, 8)])
def test_wasserstein_is_scipys_of_each_gene(sizes, monkeypatch):
    predicted, real = PREDICTED[: sizes[0]], REAL[: sizes[1]]
    expected = np.mean(
        [wasserstein_distance(p, s) for p, s in zip(predicted.T, real.T, strict=True)]
    )
    assert metrics.wasserstein(predicted, real) == pytest.approx(expected)
    monkeypatch.setattr(populations, "BLOCK_VALUES", 100)
    matrices = sparse.csr_matrix(predicted), sparse.csc_array(real)
    assert metrics.wasserstein(*matrices) == pytest.approx(expected)


def test_correlation_error():
    genes = np.array([1, 4, 9, 2])
    pairs = [(i, j) for k, i in enumerate(genes) for j in genes[:k]]
    expected = np.mean(
        [
            abs(
                linregress(PREDICTED[:, i], PREDICTED[:, j]).rvalue
                - linregress(REAL[:, i], REAL[:, j]).rvalue
            )
            for i, j in pairs
        ]
    )
    assert metrics.correlation_error(PREDICTED, REAL, genes) == pytest.approx(expected)


def test_correlation_error_of_cells_that_are_all_the_same():
    """They correlate with nothing, which is the size of the real correlations."""
    genes = np.array([0, 1])
    same = np.ones((5, 12))
    expected = abs(np.corrcoef(REAL[:, 0], REAL[:, 1])[0, 1])
    assert metrics.correlation_error(same, REAL, genes) == pytest.approx(expected)


def test_classifier_tells_what_can_be_told_apart():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 200, 5))
    assert abs(metrics.classifier_auc(one, other) - 0.5) < 0.1
    assert metrics.classifier_auc(one, other + 5) > 0.99
