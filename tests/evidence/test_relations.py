from dataclasses import replace

import numpy as np
import pytest
from spaperb.contexts import Contexts

from spaperb import datasets
from spaperb.evidence import (
    EVIDENCE_FEATURES,
    RELATIONS,
    STATE_FEATURES,
    Evidence,
    Query,
    describe,
)
from spaperb.evidence._relations import nearest_shares
from spaperb.populations import Profile

NAMES = [f"type_{i}" for i in range(5)]


@pytest.fixture(scope="module")
def cells():
    return datasets.simulated(n_cell_types=5, n_cells=30, n_genes=40, seed=1)


def arrays(cells):
    arms = (cells.obs["condition"] == "stimulated").to_numpy().astype(int)
    return cells.X, arms, cells.obs["cell_type"].cat.codes.to_numpy().astype(int)


@pytest.fixture(scope="module")
def evidence(cells):
    return Evidence.of(*arrays(cells), NAMES)


def column(table, names, name):
    return table[..., names.index(name)]


def test_shapes(evidence):
    description = describe(evidence, Query.of_population(evidence, 0, 0), np.arange(1, 5))
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
        evidence, Query.of_population(evidence, 0, 0), kept
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
        "log level": np.log(before + 0.05),
        "detection": populations.detection[kept],
        "log level less the query's": np.log((before + 0.05) / (populations.mean[0] + 0.05)),
        "detection less the query's": populations.detection[kept] - populations.detection[0],
    }.items():
        np.testing.assert_allclose(
            column(pieces, EVIDENCE_FEATURES, name), value, atol=1e-12, err_msg=name
        )
    precise = 1 / (changes.error[kept] + 0.03) ** 2
    for name, value in {
        "log level": np.log(populations.mean[0] + 0.05),
        "detection": populations.detection[0],
        "error of the mean / c": populations.error[0] / scale,
        "prior mean / c": np.exp(log_prior) @ shift / scale,
        "mean / c": shift.mean(axis=0) / scale,
        "deviation / c": shift.std(axis=0) / scale,
        "precise mean / c": (precise * shift).sum(axis=0) / precise.sum(axis=0) / scale,
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


def test_nearest_shares_are_those_of_scikit_learn(cells, evidence):
    contexts = Contexts.of(*arrays(cells), NAMES)
    query = Query.of_population(evidence, 2, 0)
    among = np.array([0, 1, 4])
    np.testing.assert_allclose(
        nearest_shares(evidence, query, among), contexts.neighbours(contexts.cells[2], among)
    )


def test_few_cells_are_all_neighbours(evidence):
    cells = [c[: 1 + i] for i, c in enumerate(evidence.populations.cells)]
    tiny = replace(evidence, populations=evidence.populations._replace(cells=cells))
    query = Query.of_population(evidence, 2, 0)
    np.testing.assert_allclose(nearest_shares(tiny, query, np.array([0])), [1.0])
    shares = nearest_shares(tiny, query, np.array([0, 1]))
    assert shares.sum() == pytest.approx(1)


def test_new_cells_are_described_as_a_population_of_the_same_cells(cells, evidence):
    x, arms, labels = arrays(cells)
    mine = x[(labels == 2) & (arms == 0)]
    contexts = Contexts.of(x, arms, labels, NAMES)
    new = Query.of(evidence, Profile.of(mine), contexts.project(mine), (0,), 0)
    kept = np.array([0, 1, 3, 4])
    for a, b in zip(
        describe(evidence, new, kept),
        describe(evidence, Query.of_population(evidence, 2, 0), kept),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_order_of_evidence_and_choice_of_genes_change_nothing(evidence):
    query = Query.of_population(evidence, 0, 0)
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
    query = Query(
        p.mean[0], p.detection[0], p.error[0], p.cells[0], p.correlation[0], 0, (0, 1), None, 10.0
    )
    description = describe(evidence, query, kept)

    def of(name):
        return column(description.relations, RELATIONS, name)

    np.testing.assert_array_equal(of("same context"), changes.population[kept] == 0)
    assert not of("same perturbation").any()
    np.testing.assert_array_equal(of("part of the combination"), changes.perturbation[kept] < 2)
    np.testing.assert_allclose(of("log ratio of doses"), np.log(10 / changes.dose[kept]))
    prior = np.exp(description.log_prior)
    assert (
        prior[changes.perturbation[kept] == 2].max() < prior[changes.perturbation[kept] < 2].min()
    )
    single = describe(evidence, query._replace(parts=(2,), perturbation=2), kept)
    np.testing.assert_array_equal(
        column(single.relations, RELATIONS, "same perturbation"), changes.perturbation[kept] == 2
    )
