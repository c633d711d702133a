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
    assert populations.third.tolist() == [0, 0, 1, 2, 3, 1, 2, 3]
    assert populations.context.tolist() == [0, 1, 0, 0, 0, 1, 1, 1]
    assert populations.mean.shape == populations.error.shape == (8, N_GENES)
    assert populations.correlation.shape == (8, 8)
    assert changes.population.tolist() == list(range(8))
    assert changes.n.tolist() == [12, 14, 4, 4, 4, 5, 5, 4]
    assert all(len(moments) == 8 for moments in changes)
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


def test_thirds_share_no_cell_and_make_up_the_whole():
    x, arms, labels = cells(n=(12, 15, 18, 9))
    evidence = Evidence.of(x, arms, labels, ["a", "b"])
    populations, changes = evidence.populations, evidence.changes
    for k in (0, 1):
        thirds = populations.context == k
        thirds[:2] = False
        np.testing.assert_allclose(populations.mean[thirds].mean(axis=0), populations.mean[k])
        assert len(populations.cells[k]) == sum(
            len(populations.cells[i]) for i in np.flatnonzero(thirds)
        )
        of = np.flatnonzero(thirds[changes.population])
        np.testing.assert_allclose(changes.shift[of].mean(axis=0), changes.shift[k])


def test_thirds_of_a_change_are_of_its_perturbation_and_dose():
    rng = np.random.default_rng(0)
    n = 240
    arms = np.tile([0, 1, 1, 2], n // 4)
    doses = np.where(arms == 0, np.nan, np.tile([0.0, 1.0, 2.0, 2.0], n // 4))
    x = rng.poisson(1.0, (n, N_GENES)).astype(float)
    evidence = Evidence.of(x, arms, np.repeat([0, 1], n // 2), ["a", "b"], doses=doses)
    changes = evidence.changes
    assert len(evidence.whole) == 6
    for s in evidence.whole:
        of = evidence.thirds[s]
        assert (evidence.context[of] == evidence.context[s]).all()
        assert (changes.perturbation[of] == changes.perturbation[s]).all()
        assert (changes.dose[of] == changes.dose[s]).all()
        assert evidence.populations.third[changes.population[of]].tolist() == [1, 2, 3]
        # A third's are its own and the others.
        assert evidence.thirds[of[0]].tolist() == of.tolist()


def test_a_context_of_five_cells_has_thirds_and_one_of_four_that_is_not_measured_has_none():
    x, arms, labels = cells(n=(5, 5, 20, 20))
    evidence = Evidence.of(x, arms, labels, ["a", "b"])
    assert (evidence.thirds[evidence.whole] >= 0).all()
    x, arms, labels = cells(n=(4, 4, 20, 20))
    evidence = Evidence.of(x, arms, labels, ["a", "b"])
    assert len(evidence.whole) == 1
    assert len(evidence.changes.n) == 4


def test_small_batches_are_shared_out_among_thirds():
    """Both conditions alike, or a batch of one cell each would be in no third."""
    x, arms, labels = cells(n=(9, 9, 9, 9))
    evidence = Evidence.of(x, arms, labels, ["a", "b"], np.tile(np.arange(9), 4))
    assert evidence.changes.n[evidence.thirds[:2]].tolist() == [[3, 3, 3]] * 2


def test_thirds_go_by_the_order_of_batches_and_not_by_their_numbers():
    x, arms, labels = cells(n=(9, 9, 9, 9))
    batches = np.tile(np.arange(9), 4)
    plain, other = (Evidence.of(x, arms, labels, ["a", "b"], b) for b in (batches, 3 * batches))
    np.testing.assert_array_equal(plain.populations.mean, other.populations.mean)
    np.testing.assert_array_equal(plain.thirds, other.thirds)


def test_what_is_kept_has_its_own_thirds():
    """Numbers are those of what is kept, also where they were looked up before."""
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (120, N_GENES)).astype(float)
    evidence = Evidence.of(x, np.tile([0, 1, 2], 40), np.repeat([0, 1], 60), ["a", "b"])
    before = evidence.changes.shift[evidence.thirds]
    is_kept = evidence.changes.perturbation == 1
    kept = evidence.keep(is_kept)
    assert (kept.thirds >= 0).all()
    np.testing.assert_array_equal(kept.changes.shift[kept.thirds], before[is_kept])
    assert (kept.without_thirds().thirds == -1).all()


def test_thirds_are_of_each_batch():
    """A batch that one third held alone would move its means."""
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


def test_without_thirds_all_that_is_of_whole_contexts_stays():
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (80, N_GENES)).astype(float)
    arms, labels = np.tile([0, 1], 40), np.repeat([0, 1, 2, 3], 20)
    evidence = Evidence.of(x, arms, labels, ["a", "b", "c", "d"])
    rest = evidence.without_thirds()
    assert len(rest.populations.n) == len(rest.populations.cells) == 4
    np.testing.assert_array_equal(rest.whole, np.arange(len(evidence.whole)))
    np.testing.assert_array_equal(rest.changes.shift, evidence.changes.shift[evidence.whole])
    np.testing.assert_array_equal(
        rest.populations.correlation, evidence.populations.correlation[:4, :4]
    )
    assert rest.largest_distance() == evidence.largest_distance() > 0
