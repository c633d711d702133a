"""What features tell of a perturbation that was never measured."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel

from spaperb import datasets
from spaperb.evidence import (
    ContextQuery,
    Evidence,
    describe,
    forget_perturbation,
    is_told,
    leave_out,
    relate,
)
from spaperb.evidence._features import CONSTANT, Features

RNG = np.random.default_rng(0)
N = 20


def told(n_features=3, share=1.0, noise=0.1):
    """Features, and changes that go with them."""
    features = RNG.normal(size=(N, n_features))
    changes = features @ RNG.normal(size=(n_features, 50)) * share
    return features, changes + noise * RNG.normal(size=changes.shape)


def learn(features, changes, reliability=None):
    centred = changes - changes.mean(axis=0)
    return Features.of(features, centred, np.ones(N) if reliability is None else reliability)


def by_sklearn(learned, features, changes, asked, reliability):
    """The same regression by scikit-learn."""
    d = features.shape[1]
    values = (features - features.mean(axis=0)) / features.std(axis=0)

    def matrix(a, b):
        if learned.kernel == "linear":
            return CONSTANT + a @ b.T / d
        return CONSTANT + rbf_kernel(a, b, gamma=0.5 / d)

    model = KernelRidge(alpha=learned.penalty, kernel="precomputed")
    model.fit(matrix(values, values), changes, sample_weight=reliability)
    return model.predict(matrix(asked[None], values))[0]


@pytest.mark.parametrize("kernel", ["linear", "gaussian"])
def test_weights_are_those_of_kernel_ridge_regression(kernel):
    features, changes = told()
    reliability = RNG.uniform(0.2, 1.0, N)
    learned = learn(features, changes)._replace(kernel=kernel, penalty=0.3)
    asked = learned.standardised(RNG.normal(size=3))
    known, weights = learned.weights(asked, np.arange(N), reliability)
    assert known.tolist() == list(range(N))
    expected = by_sklearn(learned, features, changes, asked, reliability)
    np.testing.assert_allclose(weights @ changes, expected, atol=1e-6)
    assert weights.sum() == pytest.approx(1, abs=1e-2)


def test_errors_are_those_of_leaving_each_out():
    features, changes = told(noise=0.5)
    learned = learn(features, changes)
    assert np.isfinite(learned.penalty)
    errors = []
    for p in range(N):
        others = np.setdiff1d(np.arange(N), [p])
        known, weights = learned.weights(learned.values[p], others, np.ones(N - 1))
        errors.append(weights @ changes[others[known]] - changes[p])
    np.testing.assert_allclose(
        learned.error, np.sqrt(np.mean(np.square(errors), axis=0)), rtol=1e-3
    )


def test_skill_is_what_features_explain():
    assert learn(*told(noise=0.01)).skill > 0.95
    features, changes = told(share=0.0, noise=1.0)
    nothing = learn(features, changes)
    assert nothing.skill == 0
    assert np.isinf(nothing.penalty)
    _, weights = nothing.weights(nothing.values[0], np.arange(N), np.ones(N))
    np.testing.assert_allclose(weights, 1 / N, rtol=1e-3)


def test_features_that_tell_nothing_are_rarely_believed():
    """Of 22 kernels and penalties some is better than the mean by chance, in half of all data."""
    for n_features in (2, 10, 30):
        skills = [learn(*told(n_features, share=0.0, noise=1.0)).skill for _ in range(60)]
        assert np.mean(np.array(skills) > 0) < 0.1


def test_few_perturbations_tell_nothing():
    features, changes = told(noise=0.01)
    few = Features.of(features[:4], changes[:4] - changes[:4].mean(axis=0), np.ones(4))
    assert few.skill == 0


def test_units_of_features_do_not_matter():
    features, changes = told()
    scaled = features * [1e-6, 1.0, 1e6] + [0, 5, -1e7]
    a, b = learn(features, changes), learn(scaled, changes)
    assert (a.kernel, a.penalty) == (b.kernel, b.penalty)
    np.testing.assert_allclose(a.values, b.values, atol=1e-6)


def test_a_feature_that_never_varies_is_no_feature():
    features, changes = told()
    more = np.column_stack([features, np.full(N, 7.0)])
    asked = np.append(features[0], 1000.0)
    learned = learn(more, changes)
    assert learned.skill > 0.9
    assert learned.distance(learned.standardised(asked)) == pytest.approx(0, abs=1e-6)


def test_distance_is_over_the_largest_of_training():
    learned = learn(np.arange(N, dtype=float)[:, None], RNG.normal(size=(N, 5)))
    at = [learned.distance(learned.standardised(np.array([x]))) for x in (3.0, 3.5, 20.0, 30.0)]
    np.testing.assert_allclose(at, [0, 0.5, 1, 11], atol=1e-6)


def test_twins_do_not_make_others_far():
    """Where each perturbation has a twin, one without is not infinitely far."""
    groups = np.repeat(np.eye(4), 2, axis=0)
    learned = Features.of(groups, RNG.normal(size=(8, 30)), np.ones(8))
    assert learned.distance(learned.standardised(groups[0])) == 0
    between = learned.distance(learned.standardised(np.array([1.0, 1.0, 0.0, 0.0])))
    assert 0.5 < between < 4
    copies = np.repeat(RNG.normal(size=(5, 8)), 2, axis=0)
    learned = Features.of(copies, RNG.normal(size=(10, 30)), np.ones(10))
    for row in copies:
        assert learned.distance(learned.standardised(row)) < 1e-6


def test_constant_features_change_nothing():
    features, changes = told()
    more = np.column_stack([features, np.full((N, 20), 3.0)])
    a, b = learn(features, changes), learn(more, changes)
    assert (a.kernel, a.penalty, a.skill) == (b.kernel, b.penalty, pytest.approx(b.skill))
    asked = RNG.normal(size=3)
    _, of_a = a.weights(a.standardised(asked), np.arange(N), np.ones(N))
    asked = np.append(asked, np.full(20, 3.0))
    _, of_b = b.weights(b.standardised(asked), np.arange(N), np.ones(N))
    np.testing.assert_allclose(of_a, of_b)


def test_a_perturbation_that_is_left_out_takes_no_part():
    features, changes = told(noise=0.5)
    before = learn(features, changes).without(3)
    other = changes - changes.mean(axis=0)
    other[3] *= 10
    after = Features.of(features, other, np.ones(N)).without(3)
    assert (before.kernel, before.penalty, before.skill) == (
        after.kernel,
        after.penalty,
        after.skill,
    )
    np.testing.assert_array_equal(before.error, after.error)


def test_one_perturbation_alone():
    learned = Features.of(RNG.normal(size=(1, 3)), np.zeros((1, 5)), np.array([np.nan]))
    assert learned.skill == 0
    assert learned.distance(np.ones(3)) == 0
    _, weights = learned.weights(np.ones(3), np.array([0]), np.ones(1))
    assert weights[0] == pytest.approx(1, rel=1e-3)


@pytest.fixture(scope="module")
def screen():
    return datasets.simulated_screen(
        n_perturbations=10, n_cell_types=2, n_cells=40, n_genes=60, n_features=2, seed=3
    )


def measured(cells, features) -> Evidence:
    arms = cells.obs["condition"].cat.codes.to_numpy().astype(int)
    labels = cells.obs["cell_type"].cat.codes.to_numpy().astype(int)
    names = list(cells.obs["cell_type"].cat.categories)
    return Evidence.of(cells.X, arms, labels, names).with_features(features)


@pytest.fixture(scope="module")
def evidence(screen):
    # In the order of the codes, which is that of the categories.
    return measured(screen, screen.uns["perturbation_features"].to_numpy())


def test_a_piece_is_the_regression_in_its_context(evidence):
    asked, whole = np.array([0.5, -1.0]), evidence.whole
    query = ContextQuery.of_population(evidence, 0, 0)._replace(
        parts=(), perturbation=None, features=asked
    )
    relation = relate(evidence, query, whole)
    description = describe(evidence, query, whole)
    assert relation.is_told.sum() == 2
    changes = evidence.changes
    for row in np.flatnonzero(relation.is_told):
        here = whole[changes.population[whole] == relation.population[row]]
        n = changes.n[here]
        _, weights = evidence.features.weights(asked, changes.perturbation[here], n / (n + 30))
        np.testing.assert_allclose(description.shifts[row], weights @ changes.shift[here])
        error = np.sqrt(weights**2 @ changes.error[here] ** 2 + evidence.features.error**2)
        np.testing.assert_allclose(
            description.pieces[row, :, 1], error / description.scale, rtol=1e-6
        )
    # What features tell is nearly all that counts.
    assert np.exp(relation.log_prior[relation.is_told]).sum() > 0.95
    assert np.exp(relation.log_prior).sum() == pytest.approx(1)


def test_a_perturbation_that_was_measured_elsewhere_needs_no_features(evidence):
    whole, changes = evidence.whole, evidence.changes
    query = ContextQuery.of_population(evidence, 0, 4)
    elsewhere = whole[(evidence.context[whole] != 0) | (changes.perturbation[whole] != 4)]
    assert not relate(evidence, query, elsewhere).is_told.any()
    nowhere = whole[changes.perturbation[whole] != 4]
    assert relate(evidence, query, nowhere).is_told.sum() == 2


def test_nothing_of_a_left_out_perturbation_is_looked_at(evidence):
    """Its changes may be anything, and the description stays."""
    whole, changes = evidence.whole, evidence.changes
    query = ContextQuery.of_population(evidence, 0, 4)
    nowhere = whole[changes.perturbation[whole] != 4]
    before = describe(evidence, query, nowhere)
    other = changes.shift.copy()
    other[changes.perturbation == 4] += 100
    changed = replace(evidence, changes=changes._replace(shift=other), features=None)
    changed = changed.with_features(evidence.features.values)
    after = describe(changed, query, nowhere)
    for a, b in zip(before, after, strict=True):
        # The kernel's constant costs some digits.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_with_a_perturbation_missing_in_a_context(screen):
    """Each context is told by what was measured there."""
    some = screen[
        (screen.obs["cell_type"] != "type_0") | (screen.obs["condition"] != "perturbation_2")
    ].copy()
    evidence = measured(some, screen.uns["perturbation_features"].to_numpy())
    query = ContextQuery.of_population(evidence, 0, 0)._replace(
        parts=(), perturbation=None, features=np.zeros(2)
    )
    relation = relate(evidence, query, evidence.whole)
    numbers = [
        evidence.changes.perturbation[relation.kept[row.indices]]
        for row in relation.shares[relation.is_told]
    ]
    assert sorted(map(len, numbers)) == [9, 10]


def test_below_its_lowest_dose_a_perturbation_tells_less(screen):
    arms = screen.obs["condition"].cat.codes.to_numpy().astype(int)
    labels = screen.obs["cell_type"].cat.codes.to_numpy().astype(int)
    names = list(screen.obs["cell_type"].cat.categories)
    doses = np.where(arms > 0, 10.0, np.nan)
    features = screen.uns["perturbation_features"].to_numpy()
    evidence = Evidence.of(screen.X, arms, labels, names, doses=doses).with_features(features)
    query = ContextQuery.of_population(evidence, 0, 0)._replace(
        parts=(), perturbation=None, features=np.zeros(2)
    )
    shifts = {}
    for dose in (10.0, 1.0):
        description = describe(evidence, query._replace(dose=dose), evidence.whole)
        is_told = relate(evidence, query._replace(dose=dose), evidence.whole).is_told
        shifts[dose] = description.shifts[is_told]
    np.testing.assert_allclose(shifts[1.0], 0.1 * shifts[10.0], rtol=1e-4, atol=1e-7)


def test_combinations_with_it_are_forgotten_too(screen):
    arms = screen.obs["condition"].cat.codes.to_numpy().astype(int)
    labels = screen.obs["cell_type"].cat.codes.to_numpy().astype(int)
    names = list(screen.obs["cell_type"].cat.categories)
    parts = [(p,) for p in range(9)] + [(0, 1)]
    features = screen.uns["perturbation_features"].to_numpy()
    evidence = Evidence.of(screen.X, arms, labels, names, parts=parts).with_features(features)
    of = evidence.changes.perturbation
    (change, *_) = evidence.whole[of[evidence.whole] == 0]
    plan = forget_perturbation(evidence, leave_out(evidence, int(change), with_context=False))
    assert set(of[plan.kept]) == set(range(2, 9)) | {1}
    assert is_told(evidence, plan)
