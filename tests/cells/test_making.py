"""The mean over a population's predicted cells is the predicted mean.

Of the worst gene, at any size.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from spaperb.cells import CellMaker, PopulationChange, Survey
from spaperb.data._query import Query
from spaperb.populations import Pseudobulk

GENES = 40


def cells_of(n: int, seed: int):
    """Counts of cells whose genes are silent in all cells, in some, or in none.

    And log-normalised.
    """
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.4, 2.0, GENES) * (rng.random(GENES) > 0.1)
    counts = rng.poisson(rates * rng.gamma(3, 1 / 3, (n, GENES))).astype(float)
    counts[:, -1] += 3
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32), counts


def make(x, change, how="detection", populations=None, counts=None, seed=0, n_samples=1):
    reference = Pseudobulk.of(cells_of(200, 99)[0], cells_of(200, 99)[1])
    populations = np.zeros(x.shape[0], dtype=int) if populations is None else populations
    query = Query(x, np.arange(GENES), None, np.ones(x.shape[0], dtype=bool), counts=counts)
    survey = Survey.of(query, populations)
    changes = {
        p: PopulationChange(change, [reference], np.ones(1)) for p in np.unique(populations)
    }
    made = CellMaker(survey, changes, how, seed, n_samples).make(query, np.arange(x.shape[0]))
    predicted = np.empty(x.shape)
    for rows, values in made:
        predicted[rows] = values
    return predicted


@given(st.integers(1, 400), st.floats(0, 3), st.integers(0, 10**6), st.integers(1, 3))
def test_the_mean_is_the_predicted_one(n, size, seed, n_samples):
    x, _ = cells_of(n, seed)
    change = size * np.random.default_rng(seed).standard_normal(GENES)
    predicted = make(x, change, seed=seed, n_samples=n_samples)
    expected = np.maximum(x.mean(0, dtype=float) + change, 0)
    assert np.abs(predicted.mean(0) - expected).max() < 1e-3
    assert (predicted >= 0).all()
    assert np.isfinite(predicted).all()


def test_each_population_has_its_own_mean():
    x, _ = cells_of(300, 0)
    change = np.random.default_rng(1).normal(0, 0.5, GENES)
    populations = np.random.default_rng(2).choice([0, 1, 5], 300, p=[0.1, 0.3, 0.6])
    predicted = make(x, change, populations=populations)
    for p in (0, 1, 5):
        of = populations == p
        expected = np.maximum(x[of].mean(0, dtype=float) + change, 0)
        assert np.abs(predicted[of].mean(0) - expected).max() < 1e-3


def test_as_many_cells_express_a_gene_as_are_to():
    x, _ = cells_of(400, 0)
    # half of those that are silent are to turn on, half of the others to fall silent
    level = Pseudobulk.of(x).mean / np.maximum(Pseudobulk.of(x).detection, 1e-9)
    q0 = (x > 0).mean(0)
    reference = Pseudobulk.of(x)
    for q1 in (0.5 * q0, q0 + 0.5 * (1 - q0)):
        change = level * (q1 - q0)
        query = Query(x, np.arange(GENES), None, np.ones(x.shape[0], dtype=bool))
        survey = Survey.of(query, np.zeros(400, dtype=int))
        maker = CellMaker(
            survey, {0: PopulationChange(change, [reference], np.ones(1))}, "detection"
        )
        ((_, predicted),) = maker.make(query, np.arange(400))
        expressed = q0 > 0
        assert np.abs((predicted > 0).mean(0) - q1)[expressed].max() <= 0.5 / 400 + 1e-9


def error_of_counts(n: int, size: float, seed: int) -> float:
    """Error of the worst gene's mean, in steps.

    The change of a mean by one count more in a silent cell.
    """
    x, counts = cells_of(n, seed)
    change = size * np.random.default_rng(seed).standard_normal(GENES)
    drawn = make(x, change, "counts", counts=counts, seed=seed)
    assert ((drawn >= 0) & (drawn % 1 == 0)).all()
    scale = 1e4 / counts.sum(1, keepdims=True)
    expected = np.maximum(x.mean(0, dtype=float) + change, 0)
    error = np.abs(np.log1p(drawn * scale).mean(0) - expected)
    # rates beyond all reason are not looked for
    reached = expected < np.log1p(100 * scale.min())
    return error[reached].max() / (np.log1p(scale.max()) / n)


@given(st.integers(2, 600), st.floats(0, 1.5), st.integers(0, 10**6))
def test_drawn_counts_have_the_predicted_mean(n, size, seed):
    assert error_of_counts(n, size, seed) <= 1


def test_rates_found_on_some_cells_give_all_of_them_the_mean():
    assert error_of_counts(3000, 1.0, 0) <= 3


@pytest.mark.parametrize("how", ["detection", "counts"])
def test_chunks_and_formats_do_not_show(how, monkeypatch):
    x, counts = cells_of(700, 3)
    populations = np.random.default_rng(0).choice([0, 3], 700)
    change = np.random.default_rng(1).normal(0, 0.7, GENES)
    expected = make(x, change, how, populations, counts)
    same = make(sparse.csr_matrix(x), change, how, populations, sparse.csr_matrix(counts))
    np.testing.assert_array_equal(same, expected)
    monkeypatch.setattr("spaperb.data._query.CHUNK_VALUES", 7 * GENES)
    monkeypatch.setattr("spaperb.data._disk.BLOCK_VALUES", 90 * GENES)
    np.testing.assert_array_equal(make(x, change, how, populations, counts), expected)


def test_a_population_does_not_depend_on_the_others():
    x, _ = cells_of(200, 4)
    change = np.random.default_rng(1).normal(0, 0.7, GENES)
    alone = make(x, change)
    both = np.concatenate([cells_of(50, 5)[0], x])
    populations = np.repeat([1, 0], [50, 200])
    np.testing.assert_array_equal(make(both, change, populations=populations)[50:], alone)


def test_no_change_changes_no_cell():
    x, counts = cells_of(100, 0)
    np.testing.assert_allclose(make(x, np.zeros(GENES)), x, rtol=1e-6)
    np.testing.assert_array_equal(make(x, np.zeros(GENES), "counts", counts=counts), counts)


def test_shifted_cells_are_not_below_the_minimum():
    x, _ = cells_of(50, 0)
    change = np.random.default_rng(1).normal(0, 0.7, GENES)
    np.testing.assert_allclose(make(x, change, "shift"), x + change, atol=1e-5)


def test_cells_that_changed_before_they_are_made_are_refused():
    """As on disk, where a layer is made when it is asked for."""
    x, _ = cells_of(50, 0)
    survey = Survey.of(
        Query(x, np.arange(GENES), None, np.ones(50, dtype=bool)), np.zeros(50, dtype=int)
    )
    change = PopulationChange(np.full(GENES, 0.1), [Pseudobulk.of(x)], np.ones(1))
    maker = CellMaker(survey, {0: change}, "detection")
    for other in (np.zeros_like(x), x + 1):
        with pytest.raises(RuntimeError, match="changed since"):
            list(
                maker.make(
                    Query(other, np.arange(GENES), None, np.ones(50, dtype=bool)), np.arange(50)
                )
            )
