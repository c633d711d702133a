from dataclasses import replace

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from spaperb import datasets
from spaperb.evidence import (
    EVIDENCE_FEATURES,
    RELATIONS,
    STATE_FEATURES,
    ContextQuery,
    Evidence,
    Settings,
    describe,
    relate,
    shrunk,
)
from spaperb.evidence._relations import (
    NO_TARGET,
    foremost,
    log_dose_weights,
)
from spaperb.populations import Pseudobulk

NAMES = [f"type_{i}" for i in range(5)]
SETTINGS = Settings()


@pytest.fixture(scope="module")
def cells():
    return datasets.simulated(n_cell_types=5, n_cells=30, n_genes=40, seed=1)


def arrays(cells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    arms = (cells.obs["condition"] == "stimulated").to_numpy().astype(int)
    return cells.X, arms, cells.obs["cell_type"].cat.codes.to_numpy().astype(int)


@pytest.fixture(scope="module")
def evidence(cells):
    return Evidence.of(*arrays(cells), NAMES)


def column(table, names, name):
    return table[..., names.index(name)]


def test_shapes(evidence):
    description = describe(evidence, ContextQuery.of_population(evidence, 0, 0), np.arange(1, 5))
    assert description.state.shape == (40, len(STATE_FEATURES))
    assert description.pieces.shape == (4, 40, len(EVIDENCE_FEATURES))
    assert description.relations.shape == (4, len(RELATIONS))
    assert description.log_prior.shape == (4,)
    assert description.shifts.shape == (4, 40)
    assert description.scale.shape == (40,)
    assert np.exp(description.log_prior).sum() == pytest.approx(1)


def test_features_by_hand(evidence):
    kept = np.array([1, 3])
    state, pieces, relations, log_prior, shifts, scale = describe(
        evidence, ContextQuery.of_population(evidence, 0, 0), kept
    )
    changes, populations = evidence.changes, evidence.populations
    shift = changes.shift[kept]
    np.testing.assert_array_equal(shifts, shift)
    np.testing.assert_allclose(scale, np.abs(shift).max(axis=0) + 0.05)
    before, after = populations.mean[kept], changes.mean[kept]
    for name, value in {
        "shift / c": shift / scale,
        "error / c": changes.error[kept] / scale,
        "log fold change": np.log((after + 0.05) / (before + 0.05)),
        "log mean": np.log(before + 0.05),
        "detection": populations.detection[kept],
        "log mean less the query's": np.log((before + 0.05) / (populations.mean[0] + 0.05)),
        "detection less the query's": populations.detection[kept] - populations.detection[0],
    }.items():
        np.testing.assert_allclose(
            column(pieces, EVIDENCE_FEATURES, name), value, atol=1e-12, err_msg=name
        )
    precise = 1 / (changes.error[kept] + 0.03) ** 2
    for name, value in {
        "log mean": np.log(populations.mean[0] + 0.05),
        "detection": populations.detection[0],
        "error of the mean / c": populations.error[0] / scale,
        "prior mean / c": np.exp(log_prior) @ shift / scale,
        "mean / c": shift.mean(axis=0) / scale,
        "deviation / c": shift.std(axis=0) / scale,
        "precise mean / c": (precise * shift).sum(axis=0) / precise.sum(axis=0) / scale,
        "mean of other perturbations here / c": np.zeros(40),
        "log c": np.log(scale),
    }.items():
        np.testing.assert_allclose(
            column(state, STATE_FEATURES, name), value, atol=1e-12, err_msg=name
        )
    r = np.corrcoef(populations.mean[[0, *kept]])[0, 1:]
    np.testing.assert_allclose(column(relations, RELATIONS, "correlation of control means"), r)
    np.testing.assert_allclose(column(relations, RELATIONS, "n / (n + 30)"), 0.5)
    assert column(relations, RELATIONS, "same perturbation").all()
    assert not column(relations, RELATIONS, "same context").any()
    # The prior: half nearest cells, half a softmax of correlations.
    near = column(relations, RELATIONS, "share of the nearest control cells")
    alike = np.exp(r / 0.03) / np.exp(r / 0.03).sum()
    weights = (near + alike) / 2 + 1e-3
    np.testing.assert_allclose(np.exp(log_prior), weights / weights.sum())


def test_nearest_shares_are_those_of_scikit_learn(evidence):
    p, among = evidence.populations, np.array([0, 1, 4])
    reference = np.concatenate([p.cells[i] for i in among])
    index = NearestNeighbors(n_neighbors=30).fit(reference)
    nearest = index.kneighbors(p.cells[2], return_distance=False) // 30
    expected = [(nearest == i).mean() for i in range(3)]
    np.testing.assert_allclose(evidence.neighbours(p.cells[2], among), expected)


def test_few_cells_are_all_neighbours(evidence):
    cells = [c[: 1 + i] for i, c in enumerate(evidence.populations.cells)]
    tiny = replace(evidence, populations=evidence.populations._replace(cells=cells))
    np.testing.assert_allclose(tiny.neighbours(cells[2], np.array([0])), [1.0])
    assert tiny.neighbours(cells[2], np.array([0, 1])).sum() == pytest.approx(1)


def test_new_cells_are_described_as_a_population_of_the_same_cells(cells, evidence):
    x, arms, labels = arrays(cells)
    mine = x[(labels == 2) & (arms == 0)]
    new = ContextQuery.of(evidence, Pseudobulk.of(mine), evidence.project(mine), (0,), 0)
    kept = np.array([0, 1, 3, 4])
    for a, b in zip(
        describe(evidence, new, kept),
        describe(evidence, ContextQuery.of_population(evidence, 2, 0), kept),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_what_was_left_out_changes_nothing(evidence):
    """Neither its shift nor its stimulated cells are in a description without it."""
    changes = evidence.changes
    wild = [np.array(moments, copy=True) for moments in changes]
    for moments in wild[4:]:
        moments[0] = 100.0
    other = replace(evidence, changes=type(changes)(*wild))
    kept = np.arange(1, 5)
    query = ContextQuery.of_population(evidence, 0, 0)
    for a, b in zip(describe(evidence, query, kept), describe(other, query, kept), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("likeness", [0.0, 0.4, 1.0])
def test_the_own_context_has_the_say_as_far_as_it_is_alike_and_was_measured(evidence, likeness):
    kept = evidence.whole
    query = ContextQuery.of_population(evidence, 0, 0)._replace(likeness=likeness)
    new = query._replace(context=None)
    share = np.exp(relate(evidence, new, kept).log_prior)
    least = SETTINGS.least_share
    share = share * (1 + 5 * least) - least  # before the least share was added
    own = likeness * 30 / (30 + 30)
    expected = (1 - own) * share
    expected[0] = share[0] + (1 - share[0]) * own
    expected += SETTINGS.least_share
    relation = relate(evidence, query, kept)
    np.testing.assert_allclose(np.exp(relation.log_prior), expected / expected.sum(), rtol=1e-6)
    same = column(relation.relations, RELATIONS, "same context")
    np.testing.assert_allclose(same, [likeness, 0, 0, 0, 0])


def many(n_perturbations, n_types=2, parts=None, n_cells=240):
    """Evidence with several perturbations in each context."""
    cells = datasets.simulated(n_cell_types=n_types, n_cells=n_cells, n_genes=30, seed=0)
    x, arms, labels = arrays(cells)
    arms[arms == 1] += np.arange((arms == 1).sum()) % n_perturbations
    parts = [(p,) for p in range(n_perturbations)] if parts is None else parts
    return Evidence.of(x, arms, labels, NAMES[:n_types], parts=parts)


def test_parts_of_a_combination_have_equal_weights_and_add_up():
    evidence = many(3)
    changes = evidence.changes
    # Perturbation 0 was measured in both contexts, 1 in the first alone.
    kept = np.array(
        [s for s in evidence.whole if changes.perturbation[s] == 0 or changes.population[s] == 0]
    )
    query = ContextQuery.of_population(evidence, 0, 0)._replace(parts=(0, 1), perturbation=None)
    relation = relate(evidence, query, kept)
    of = changes.perturbation[kept]
    weights = [np.exp(relation.log_prior[of == p]).sum() for p in range(3)]
    assert weights[0] == pytest.approx(weights[1])
    assert weights[2] < 0.05 * weights[0]
    np.testing.assert_array_equal(relation.factor, np.where(of < 2, 2, 1))
    description = describe(evidence, query, kept)
    np.testing.assert_allclose(description.shifts, relation.factor[:, None] * changes.shift[kept])


def test_a_part_that_comes_twice_has_twice_the_weight():
    evidence = many(2)
    query = ContextQuery.of_population(evidence, 0, 0)._replace(parts=(0, 0, 1), perturbation=None)
    relation = relate(evidence, query, evidence.whole)
    of = evidence.changes.perturbation[evidence.whole]
    weights = [np.exp(relation.log_prior[of == p]).sum() for p in (0, 1)]
    assert weights[0] == pytest.approx(2 * weights[1])
    assert set(relation.factor) == {3}


def test_the_pieces_with_the_greatest_weights_are_kept():
    n = SETTINGS.max_pieces + 8
    evidence = many(n, n_types=1, n_cells=4 * n)
    query = ContextQuery.of_population(evidence, 0, 3)
    best = relate(evidence, query, evidence.whole)
    roomy = replace(evidence, settings=replace(SETTINGS, max_pieces=2 * n))
    relation = relate(roomy, query, evidence.whole)
    assert len(relation.kept) == n
    assert len(best.kept) == SETTINGS.max_pieces
    assert np.exp(best.log_prior).sum() == pytest.approx(1)
    assert best.by_target.sum() == pytest.approx(1)
    assert 3 in evidence.changes.perturbation[best.kept]
    is_best = np.isin(relation.kept, best.kept)
    assert relation.log_prior[~is_best].max() <= relation.log_prior[is_best].min()
    # What other perturbations did here is of all of them.
    np.testing.assert_array_equal(best.here, relation.here)


def test_of_each_part_as_many_pieces_are_kept():
    # One part was measured a hundred times, so that each piece of it weighs little, and one ten
    # times.
    target = np.repeat([0, 1, NO_TARGET], [100, 10, 20])
    log_prior = np.random.default_rng(0).normal(size=130) - np.log(
        np.repeat([100, 10, 1], [100, 10, 20])
    )
    some = foremost(log_prior, target, 32)
    assert np.array_equal(some, np.sort(some))
    assert [(target[some] == t).sum() for t in (0, 1, NO_TARGET)] == [22, 10, 0]
    of_first = some[target[some] == 0]
    left = np.setdiff1d(np.arange(100), of_first)
    assert log_prior[left].max() < log_prior[of_first].min()


@pytest.mark.parametrize("n_times", [3, 40])
def test_parts_that_were_measured_more_or_less_often_still_add_up(n_times):
    """All contexts are alike and both parts have the same change: the prior is twice it."""
    few, n_genes = 2, 30
    cells = datasets.simulated(n_cell_types=1, n_cells=40, n_genes=n_genes, seed=0)
    is_control = (cells.obs["condition"] == "control").to_numpy()
    x = cells.X.toarray() if hasattr(cells.X, "toarray") else np.asarray(cells.X)
    control, stimulated = x[is_control], x[~is_control]
    blocks, arms, labels = [], [], []
    for k in range(n_times):
        for arm, block in [(0, control), (1, stimulated), *([(2, stimulated)] if k < few else [])]:
            blocks.append(block)
            arms.append(np.full(len(block), arm))
            labels.append(np.full(len(block), k))
    names = [f"type_{k}" for k in range(n_times)]
    evidence = Evidence.of(
        np.concatenate(blocks), np.concatenate(arms), np.concatenate(labels), names
    )
    query = ContextQuery.of_population(evidence, 0, 0)._replace(
        parts=(0, 1), perturbation=None, context=None
    )
    prior = relate(evidence, query, evidence.whole)
    change = (np.exp(prior.log_prior) * prior.factor) @ evidence.changes.shift[prior.kept]
    np.testing.assert_allclose(change, 2 * evidence.changes.shift[0], atol=1e-6)
    of = evidence.changes.perturbation[prior.kept]
    weights = [np.exp(prior.log_prior[of == p]).sum() for p in (0, 1)]
    np.testing.assert_allclose(weights, 0.5)


def test_the_mean_of_other_perturbations_in_the_context():
    evidence = many(3)
    changes, kept = evidence.changes, evidence.whole
    here = changes.population[kept] == 0
    of = changes.perturbation[kept]
    query = ContextQuery.of_population(evidence, 0, 1)._replace(likeness=0.5)
    description = describe(evidence, query, kept)
    told = column(description.state, STATE_FEATURES, "mean of other perturbations here / c")
    expected = 0.5 * changes.shift[kept[here & (of != 1)]].mean(axis=0)
    np.testing.assert_allclose(told * description.scale, expected, atol=1e-12)
    new = describe(evidence, query._replace(context=None), kept)
    assert not column(new.state, STATE_FEATURES, "mean of other perturbations here / c").any()
    both = query._replace(parts=(0, 1), perturbation=None)
    told = column(
        describe(evidence, both, kept).state,
        STATE_FEATURES,
        "mean of other perturbations here / c",
    )
    assert told.any()


@pytest.mark.parametrize(
    ("dose", "expected"),
    [(1.0, [1, 0]), (10.0, [0, 1]), (10**0.25, [0.75, 0.25]), (0.1, [1, 0]), (99.0, [0, 1])],
)
def test_weights_of_doses_go_by_their_logarithms(dose, expected):
    weights = np.exp(log_dose_weights(np.zeros(2, dtype=int), np.array([1.0, 10.0]), dose, 1e-3))
    np.testing.assert_allclose(weights, np.maximum(expected, SETTINGS.least_share))


def test_without_doses_their_weights_are_all_the_same():
    doses = np.full(2, np.nan)
    np.testing.assert_array_equal(log_dose_weights(np.zeros(2, dtype=int), doses, np.nan, 1e-3), 0)


def test_order_of_evidence_and_choice_of_genes_change_nothing(evidence):
    query = ContextQuery.of_population(evidence, 0, 0)
    kept, order, genes = np.arange(1, 5), np.array([2, 0, 3, 1]), np.array([5, 30, 7])
    whole = describe(evidence, query, kept)
    permuted = describe(evidence, query, kept[order])
    some = describe(evidence, query, kept, genes)
    np.testing.assert_allclose(permuted.state, whole.state, atol=1e-12)
    np.testing.assert_allclose(permuted.pieces, whole.pieces[order], atol=1e-12)
    np.testing.assert_allclose(permuted.log_prior, whole.log_prior[order])
    np.testing.assert_allclose(some.state, whole.state[genes], atol=1e-12)
    np.testing.assert_allclose(some.pieces, whole.pieces[:, genes], atol=1e-12)
    np.testing.assert_allclose(some.relations, whole.relations)


def test_relations_tell_the_context_the_perturbation_its_parts_and_doses():
    cells = datasets.simulated(n_cell_types=2, n_cells=80, n_genes=30, doses=(1.0, 10.0), seed=0)
    x, arms, labels = arrays(cells)
    # Perturbations a, b, c; c is not a part of a+b.
    arms[arms == 1] += np.arange((arms == 1).sum()) // 2 % 3
    evidence = Evidence.of(
        x, arms, labels, NAMES[:2], doses=cells.obs["dose"].to_numpy(), parts=[(0,), (1,), (2,)]
    )
    kept = evidence.whole
    changes = evidence.changes
    assert len(kept) == 12
    p = evidence.populations
    query = ContextQuery(
        p.mean[0],
        p.detection[0],
        p.error[0],
        p.cells[0],
        p.correlation[0],
        0,
        1.0,
        (0, 1),
        None,
        10.0,
    )
    description = describe(evidence, query, kept)

    def of(name):
        return column(description.relations, RELATIONS, name)

    np.testing.assert_array_equal(of("same context"), changes.population[kept] == 0)
    assert not of("same perturbation").any()
    np.testing.assert_array_equal(of("part of the combination"), changes.perturbation[kept] < 2)
    np.testing.assert_allclose(of("log ratio of doses"), np.log(10 / changes.dose[kept]))
    prior = np.exp(description.log_prior)
    part, is_asked = changes.perturbation[kept], changes.dose[kept] == 10
    # All other perturbations together, next to both parts together.
    assert prior[part == 2].sum() == pytest.approx(np.exp(-4) * prior[part < 2].sum())
    assert prior[part == 0].sum() == pytest.approx(prior[part == 1].sum())
    assert prior[~is_asked].sum() < 0.01
    single = describe(evidence, query._replace(parts=(2,), perturbation=2), kept)
    np.testing.assert_array_equal(
        column(single.relations, RELATIONS, "same perturbation"), changes.perturbation[kept] == 2
    )


@pytest.mark.parametrize(("dose", "left"), [(0.2, 0.2), (1.0, 1.0), (3.0, 1.0), (99.0, 1.0)])
def test_below_its_lowest_dose_a_part_falls_in_proportion(dose, left):
    """Of two parts, of which the second was measured at doses of 1 and 10 only."""
    cells = datasets.simulated(n_cell_types=2, n_cells=80, n_genes=30, doses=(1.0, 10.0), seed=0)
    x, arms, labels = arrays(cells)
    doses = cells.obs["dose"].to_numpy().copy()
    arms[arms == 1] += np.arange((arms == 1).sum()) // 2 % 2
    doses[(arms == 1) & (doses == 1.0)] = 0.1
    evidence = Evidence.of(x, arms, labels, NAMES[:2], doses=doses, parts=[(0,), (1,)])
    query = ContextQuery.of_population(evidence, 0, 0)._replace(
        parts=(0, 1), perturbation=None, dose=dose
    )
    relation = relate(evidence, query, evidence.whole)
    of = evidence.changes.perturbation[relation.kept]
    np.testing.assert_allclose(relation.factor[of == 0], 2)
    np.testing.assert_allclose(relation.factor[of == 1], 2 * left)


@pytest.mark.parametrize("base", [2.0, 10.0])
def test_the_base_of_logarithms_changes_nothing_that_networks_see(cells, evidence, base):
    x, arms, labels = arrays(cells)
    unit = 1 / np.log(base)
    other = Evidence.of(x * unit, arms, labels, NAMES, unit=unit)
    kept = np.array([1, 3])
    natural, based = (
        describe(e, ContextQuery.of_population(e, 0, 0), kept)._asdict() for e in (evidence, other)
    )
    for name in ("shifts", "scale"):
        np.testing.assert_allclose(based.pop(name), unit * natural.pop(name), atol=1e-6)
    for name in natural:
        np.testing.assert_allclose(based[name], natural[name], atol=1e-5, err_msg=name)


class TestShrunk:
    measured = np.array([3.0, 0.1, -0.1, 0.0])

    def test_within_the_noise_it_is_what_the_networks_say(self):
        towards = np.array([2.9, 0.0, 0.0, 0.0])
        np.testing.assert_allclose(shrunk(self.measured, np.full(4, 0.2), towards, 1.5), towards)

    def test_one_sure_gene_is_kept_and_the_noise_of_others_is_shrunk(self):
        error = np.array([0.1, 0.2, 0.2, 0.2])
        got = shrunk(self.measured, error, np.zeros(4), 1.5)
        assert abs(got[0] - 3.0) <= 0.15 + 1e-12
        assert np.abs(got[1:]).max() < 0.1

    def test_factor_of_james_and_stein(self):
        error, towards = np.full(4, 0.1), self.measured + 0.15
        expected = self.measured + 0.1**2 / 0.15**2 * 0.15
        np.testing.assert_allclose(shrunk(self.measured, error, towards, 1.5), expected)

    def test_without_error_the_measurement_stays(self):
        got = shrunk(self.measured, np.zeros(4), np.zeros(4), 1.5)
        np.testing.assert_array_equal(got, self.measured)
        np.testing.assert_array_equal(shrunk(self.measured, np.zeros(4), self.measured, 1.5), got)
