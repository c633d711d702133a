"""Each gene has an order of its own, in which every place is taken once."""

import numpy as np
import pytest
from helpers import even
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spaperb.cells import order_of


@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_every_place_is_taken_once(n, seed):
    numbers = even(n, 3, seed)
    expected = (np.arange(n) + 0.5) / n
    np.testing.assert_allclose(np.sort(numbers, axis=0), np.repeat(expected[:, None], 3, axis=1))


@given(st.integers(1, 500), st.floats(0, 1), st.integers(0, 2**31))
def test_any_share_is_met_to_half_a_cell(n, share, seed):
    met = (even(n, 20, seed) < share).sum(axis=0)
    assert np.abs(met - n * share).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("n", [2, 3, 5, 8, 50, 1000])
def test_orders_are_random(n):
    numbers = even(n, 4000)
    # the first cell has any place as often as any other
    _, times = np.unique(numbers[0], return_counts=True)
    assert len(times) == min(n, len(times))
    if n <= 50:
        assert stats.chisquare(times).pvalue > 1e-4
    # genes go together no more than independent permutations do, whose correlations have variance
    # 1 / (n - 1)
    correlation = np.corrcoef(numbers.T)[np.triu_indices(4000, 1)] if n > 2 else numbers[0] * 4 - 2
    assert abs(np.mean(correlation)) < 0.02
    if n > 2:
        assert np.var(correlation) == pytest.approx(1 / (n - 1), rel=0.1)


def test_a_number_depends_on_rank_size_gene_and_seed_alone():
    ranks = np.array([[0, 5], [7, 2]], dtype=np.uint32)
    sizes = np.array([[10, 6], [9, 3]], dtype=np.uint32)
    numbers = order_of(ranks, sizes, 1, 0)
    np.testing.assert_array_equal(order_of(ranks[1:], sizes[1:], 1, 0), numbers[1:])
    assert not np.array_equal(order_of(ranks, sizes, 2, 0), numbers)
    assert not np.array_equal(order_of(ranks, sizes, 1, 1), numbers)
