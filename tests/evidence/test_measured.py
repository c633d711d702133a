import numpy as np
import pytest

from spaperb._types import CONTROL, NEITHER
from spaperb.evidence import Changes, Evidence, Populations
from spaperb.evidence._measured import log_mean

N_GENES = 12


def cells(n=(12, 13, 14, 15), seed=0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two contexts, a and b, each with control and stimulated cells, in this order."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(1.0, (sum(n), N_GENES)).astype(float)
    return x, np.repeat([0, 1, 0, 1], n), np.repeat([0, 0, 1, 1], n)


def test_shapes():
    x, arms, labels = cells()
    evidence = Evidence.of(x, arms, labels, ["a", "b"])
    populations, changes = evidence.populations, evidence.changes
    assert evidence.names == ["a", "b"]
    assert evidence.n_genes == N_GENES
    assert populations.half.tolist() == [0, 0, 1, 2, 1, 2]
    assert populations.context.tolist() == [0, 1, 0, 0, 1, 1]
    assert populations.mean.shape == populations.error.shape == (6, N_GENES)
    assert populations.correlation.shape == (6, 6)
    assert changes.population.tolist() == [0, 1, 2, 3, 4, 5]
    assert changes.n.tolist() == [12, 14, 6, 6, 7, 7]
    assert all(len(moments) == 6 for moments in changes)
    assert evidence.whole.tolist() == [0, 1]


def test_changes_are_differences_of_means():
    x, arms, labels = cells()
    evidence = Evidence.of(x, arms, labels, ["a", "b"])
    for k in (0, 1):
        control, stimulated = (x[(labels == k) & (arms == arm)] for arm in (0, 1))
        shift = stimulated.mean(axis=0) - control.mean(axis=0)
        np.testing.assert_allclose(evidence.changes.shift[k], shift)
        np.testing.assert_allclose(evidence.changes.mean[k], stimulated.mean(axis=0))
        np.testing.assert_allclose(evidence.changes.detection[k], (stimulated > 0).mean(axis=0))
        np.testing.assert_allclose(evidence.populations.mean[k], control.mean(axis=0))
    expected = np.mean(evidence.changes.shift[:2] ** 2)
    assert evidence.mean_square == pytest.approx(expected)


def test_halves_share_no_cell_and_make_up_the_whole():
    x, arms, labels = cells(n=(12, 14, 16, 10))
    evidence = Evidence.of(x, arms, labels, ["a", "b"])
    populations, changes = evidence.populations, evidence.changes
    for k in (0, 1):
        halves = populations.context == k
        halves[:2] = False
        np.testing.assert_allclose(populations.mean[halves].mean(axis=0), populations.mean[k])
        assert len(populations.cells[k]) == sum(
            len(populations.cells[i]) for i in np.flatnonzero(halves)
        )
        of = np.flatnonzero(halves[changes.population])
        np.testing.assert_allclose(changes.shift[of].mean(axis=0), changes.shift[k])


def test_halves_are_of_each_batch():
    """A batch that one half held alone would move its means."""
    x, arms, labels = cells(n=(12, 12, 12, 12))
    batches = np.tile([0, 1], 24)
    x[batches == 1] += 100
    evidence = Evidence.of(x, arms, labels, ["a", "b"], batches)
    means = evidence.populations.mean.mean(axis=1)
    assert means.min() > 49
    assert means.max() < 53


def test_standard_errors_are_those_of_repeated_draws():
    repeats = [Evidence.of(*cells(n=(40, 60, 50, 30), seed=s), ["a", "b"]) for s in range(200)]
    shifts = np.array([e.changes.shift for e in repeats])
    errors = np.array([e.changes.error for e in repeats])
    np.testing.assert_allclose(errors.mean((0, 2)), shifts.std(axis=0).mean(axis=1), rtol=0.05)
    means = np.array([e.populations.mean for e in repeats])
    errors = np.array([e.populations.error for e in repeats])
    np.testing.assert_allclose(errors.mean((0, 2)), means.std(axis=0).mean(axis=1), rtol=0.05)


def test_keeping_some_changes_keeps_all_populations():
    x, arms, labels = cells(n=(9, 12, 9, 12))
    arms[arms == 1] = np.tile([1, 2], 12)
    evidence = Evidence.of(x, arms, labels, ["a", "b"])
    assert len(evidence.whole) == 4
    rest = evidence.keep(evidence.context != 0)
    assert set(rest.context.tolist()) == {1}
    assert len(rest.whole) == 2
    assert rest.populations is evidence.populations


def test_contexts_without_stimulated_cells_are_populations_without_changes():
    x, arms, labels = cells()
    arms[(labels == 0) & (arms == 1)] = NEITHER
    evidence = Evidence.of(x, arms, labels, ["a", "b"])
    assert evidence.names == ["b", "a"]
    k = evidence.names.index("a")
    control = x[(labels == 0) & (arms == CONTROL)]
    np.testing.assert_allclose(evidence.populations.mean[k], control.mean(axis=0))
    assert k not in evidence.populations.context[evidence.changes.population]


def test_components_are_those_of_the_populations():
    x, arms, labels = cells()
    evidence = Evidence.of(x, arms, labels, ["a", "b"])
    control = x[(labels == 1) & (arms == CONTROL)]
    np.testing.assert_allclose(evidence.project(control), evidence.populations.cells[1])


def test_state_holds_everything():
    evidence = Evidence.of(*cells(), ["a", "b"])
    again = Evidence.from_plain(evidence.to_plain())
    assert isinstance(again.populations, Populations)
    assert isinstance(again.changes, Changes)
    np.testing.assert_equal(vars(again), vars(evidence))


def test_log_level_has_no_jump_where_means_change_their_sign():
    np.testing.assert_allclose(log_mean(np.array([0.0, 0.95, 2.95])), np.log([0.05, 1.0, 3.0]))
    x = np.linspace(-2, 2, 1001)
    assert (np.diff(log_mean(x)) > 0).all()
    assert np.abs(np.diff(log_mean(x))).max() < 0.1


def test_without_halves_all_that_is_of_whole_contexts_stays():
    x, arms, labels = cells(n=(9, 12, 9, 12))
    evidence = Evidence.of(x, arms, labels, ["a", "b"])
    rest = evidence.without_halves()
    assert len(rest.populations.n) == len(rest.populations.cells) == 2
    np.testing.assert_array_equal(rest.whole, np.arange(len(evidence.whole)))
    np.testing.assert_array_equal(rest.changes.shift, evidence.changes.shift[evidence.whole])
    np.testing.assert_array_equal(
        rest.populations.correlation, evidence.populations.correlation[:2, :2]
    )
    assert rest.largest_distance() == evidence.largest_distance() or np.isnan(
        rest.largest_distance()
    )
