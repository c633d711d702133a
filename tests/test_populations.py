"""Moments of cells: the same from every kind of matrix, in blocks of any size."""

import numpy as np
import pytest
from scipy import sparse

from spaperb import populations
from spaperb.populations import Pseudobulk, mean_expression, variance, zero_fraction


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    return (rng.poisson(0.5, (30, 7)) * rng.random((30, 7))).astype(np.float32)


def with_zeros_and_duplicates(cells) -> sparse.csr_matrix:
    """Store a zero, and one value in two parts."""
    x = sparse.csr_matrix(cells)
    first = x.data[0]
    data = np.concatenate([[first / 2, first / 2], x.data[1:]]).astype(np.float32)
    indices, indptr = np.concatenate([x.indices[:1], x.indices]), x.indptr + 1
    indptr[0] = 0
    silent = int(np.flatnonzero(cells[-1] == 0)[0])
    indptr[-1] += 1
    return sparse.csr_matrix(
        (np.append(data, np.float32(0)), np.append(indices, silent), indptr), x.shape
    )


@pytest.mark.parametrize("block", [1, 10, 10_000])
@pytest.mark.parametrize(
    "kind",
    [
        np.asarray,
        sparse.csr_matrix,
        sparse.csc_matrix,
        sparse.csr_array,
        with_zeros_and_duplicates,
    ],
)
def test_moments(cells, kind, block, monkeypatch):
    monkeypatch.setattr(populations, "BLOCK_VALUES", block)
    x, exact = kind(cells), cells.astype(float)
    before = x.copy()
    np.testing.assert_allclose(mean_expression(x), exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance(x), exact.var(0), rtol=1e-6)
    np.testing.assert_array_equal(zero_fraction(x), (exact == 0).mean(0))
    if sparse.issparse(x):
        np.testing.assert_array_equal(x.data, before.data)


def test_a_mixture_of_populations_is_that_of_their_cells(cells):
    parts = np.split(cells, [4, 17])
    shares = np.array([len(part) for part in parts]) / len(cells)
    mixed = Pseudobulk.mixed([Pseudobulk.of(part) for part in parts], shares)
    whole = Pseudobulk.of(cells)
    for moment in ("mean", "variance", "detection", "n"):
        np.testing.assert_allclose(getattr(mixed, moment), getattr(whole, moment), atol=1e-9)


def test_a_mixture_of_the_same_cells_varies_by_no_less_than_nothing():
    rng = np.random.default_rng(0)
    same = Pseudobulk.of(np.tile(1e3 * rng.random(500), (3, 1)))
    shares = rng.dirichlet(np.ones(7))
    variance = Pseudobulk.mixed([same] * 7, shares).variance
    assert (variance >= 0).all()
    np.testing.assert_allclose(variance, 0, atol=1e-12)


def test_no_value_at_all():
    empty = sparse.csr_matrix((3, 2), dtype=np.float32)
    assert mean_expression(empty).tolist() == [0, 0]
    assert zero_fraction(empty).tolist() == [1, 1]


@pytest.mark.parametrize("moment", [mean_expression, variance, zero_fraction])
@pytest.mark.parametrize("convert", [sparse.csr_matrix, sparse.csc_matrix, np.asfortranarray])
def test_the_kind_of_matrix_does_not_show_in_the_last_bit(moment, convert):
    rng = np.random.default_rng(0)
    cells = (rng.poisson(0.5, (300, 200)) * rng.random((300, 200))).astype(np.float32)
    np.testing.assert_array_equal(moment(convert(cells)), moment(cells))
