import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spaperb._types import CONTROL, NEITHER, STIMULATED
from spaperb.data._pairs import Stratum, random_pairs, split_strata

cells = st.lists(
    st.tuples(st.sampled_from([CONTROL, STIMULATED, NEITHER]), st.integers(0, 3)), min_size=1
)


def arms_and_labels(cells):
    arms, labels = np.array(cells).T
    return arms, labels


@given(cells, st.integers(0, 2**32))
def test_pairs_are_within_a_stratum_and_use_its_larger_arm_once(cells, seed):
    arms, labels = arms_and_labels(cells)
    strata = split_strata(np.arange(len(arms)), arms, labels)
    control, stimulated = random_pairs(strata, np.random.default_rng(seed)).T

    assert (arms[control] == CONTROL).all()
    assert (arms[stimulated] == STIMULATED).all()
    assert (labels[control] == labels[stimulated]).all()
    for label in np.unique(labels):
        members = [np.flatnonzero((labels == label) & (arms == a)) for a in (CONTROL, STIMULATED)]
        used = [side[labels[side] == label] for side in (control, stimulated)]
        larger = max(len(m) for m in members)
        if min(len(m) for m in members) == 0:
            assert len(used[0]) == 0
            continue
        for member, use in zip(members, used, strict=True):
            assert len(use) == larger
            counts = np.unique(use, return_counts=True)[1]
            # every cell is used, and none twice more often than another
            assert len(counts) == min(len(member), larger)
            assert counts.max() - counts.min() <= 1


def test_pairs_follow_the_seed():
    strata = [Stratum(np.arange(50), np.arange(50, 80))]
    draw = lambda seed: random_pairs(strata, np.random.default_rng(seed))  # noqa: E731
    assert np.array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))


def test_every_partner_is_possible():
    strata = [Stratum(np.arange(3), np.arange(3, 6))]
    rng = np.random.default_rng(0)
    seen = {tuple(pair) for _ in range(100) for pair in random_pairs(strata, rng)}
    assert len(seen) == 9


def test_only_the_given_cells_are_sorted():
    arms, labels = np.array([0, 1, 0, 1]), np.zeros(4, dtype=int)
    (stratum,) = split_strata(np.array([0, 3]), arms, labels)
    assert (stratum.control.tolist(), stratum.stimulated.tolist()) == ([0], [3])


def test_no_strata_give_no_pairs():
    assert random_pairs([], np.random.default_rng(0)).shape == (0, 2)


def test_rare_perturbations_are_not_drowned():
    arms = np.repeat([CONTROL, STIMULATED, STIMULATED + 1], [50, 100, 1])
    strata = split_strata(np.arange(151), arms, np.zeros(151, dtype=int))
    control, stimulated = random_pairs(strata, np.random.default_rng(0)).T
    assert (arms[control] == CONTROL).all()
    counts = np.bincount(arms[stimulated])[1:]
    # as many pairs as the larger arm has cells, in proportion to the square roots: 10 to 1
    assert counts.sum() == 101
    assert counts[1] == 10
    assert len(np.unique(control)) == 50


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(0, 200))
def test_every_perturbation_has_its_pairs(sizes, n_control):
    n_control += 1
    arms = np.repeat(np.arange(len(sizes) + 1), [n_control, *sizes])
    strata = split_strata(np.arange(len(arms)), arms, np.zeros_like(arms))
    pairs = [stratum.n_pairs for stratum in strata]
    assert sum(pairs) == max(n_control, sum(sizes))
    assert min(pairs) >= 1
    order = np.argsort(sizes, kind="stable")
    assert (np.diff(np.array(pairs)[order]) >= -1).all()
