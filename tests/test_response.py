"""The response across genes finds what can be learned and shrinks what is noise."""

import numpy as np
import pytest
from helpers import context_arrays, small_cells

from spaperb import datasets
from spaperb.contexts import Contexts
from spaperb.response import ANCHORS, Response, describe


def response(adata) -> Response:
    return Response(Contexts.of(*context_arrays(adata)))


@pytest.fixture(scope="module")
def many():
    """Eight types with a response of their own on top of a shared one."""
    return datasets.simulated(n_cells=60, n_genes=300, shared_response=0.5)


def test_left_out_contexts_are_described_by_the_others_alone(many):
    x, arms, labels, names = context_arrays(many)
    spoilt = x.toarray()
    spoilt[(labels == 0) & (arms == 1)] += 5
    one, other = (Response(Contexts.of(values, arms, labels, names)) for values in (x, spoilt))
    np.testing.assert_allclose(one.left_out[0].anchors, other.left_out[0].anchors, atol=1e-5)
    np.testing.assert_allclose(one.left_out[0].features, other.left_out[0].features, atol=1e-5)
    assert np.abs(one.left_out[1].anchors - other.left_out[1].anchors).max() > 0.1


def test_anchors_are_weighted_shifts(many):
    contexts = Contexts.of(*context_arrays(many))
    others = np.arange(1, 8)
    description = describe(contexts, others, contexts.control[0], contexts.cells[0])
    assert description.anchors.shape == (300, len(ANCHORS))
    np.testing.assert_allclose(description.anchors[:, 2], contexts.shifts[1:].mean(0))
    np.testing.assert_allclose(
        description.anchors[:, 0], description.weights @ contexts.shifts[1:]
    )
    low, high = contexts.shifts[1:].min(0), contexts.shifts[1:].max(0)
    assert (
        (description.anchors >= low[:, None] - 1e-9)
        & (description.anchors <= high[:, None] + 1e-9)
    ).all()


def test_it_beats_the_best_anchor_where_contexts_differ(many):
    """Every type is left out in turn, its stimulated cells unseen by everything."""
    errors = []
    for name in many.obs["cell_type"].cat.categories:
        of_type = many.obs["cell_type"] == name
        hidden = of_type & (many.obs["condition"] == "stimulated")
        control = of_type & ~hidden
        r = response(many[~hidden].copy())
        k = r.contexts.names.index(name)
        change, _ = r.predict(r.contexts.control[k], r.contexts.cells[k])
        paired = np.arange(r.contexts.n_paired)
        anchors = describe(r.contexts, paired, r.contexts.control[k], r.contexts.cells[k]).anchors
        real = np.asarray(many.X[hidden.to_numpy()].mean(0) - many.X[control.to_numpy()].mean(0))
        errors.append([np.mean((y - real) ** 2) for y in (change, *anchors.T)])
    ours, *others = np.mean(errors, axis=0)
    assert ours < min(others)


def test_noise_is_shrunk_to_no_change():
    adata = datasets.simulated(n_cells=60, n_genes=300, response_scale=0)
    hidden = (adata.obs["cell_type"] == "type_0") & (adata.obs["condition"] == "stimulated")
    r = response(adata[~hidden].copy())
    change, _ = r.predict(r.contexts.control[-1], r.contexts.cells[-1])
    assert np.mean(r.shifts**2) > 0.01
    assert (change == 0).all()
    assert np.mean(r.measured(0)[0] ** 2) < 0.1 * np.mean(r.shifts[0] ** 2)


def test_leaves_grow_with_the_noise(many):
    few = many[np.arange(many.n_obs) % 8 == 0].copy()
    assert response(few).forest.min_samples_leaf > response(many).forest.min_samples_leaf == 10


def test_a_measured_change_is_kept_as_far_as_it_was_measured_well(many):
    r = response(many)
    few = response(many[np.arange(many.n_obs) % 12 == 0].copy())
    for k in (0, 5):
        change, trust = r.measured(k)
        assert ((trust >= 0) & (trust <= 1)).all()
        between = np.abs(change - r.shifts[k]) <= np.abs(r._priors[k] - r.shifts[k]) + 1e-9
        assert between.all()
        assert few.measured(k)[1].mean() < trust.mean()


def test_one_paired_context_gives_its_own_shift():
    adata = small_cells()
    keep = (adata.obs["cell_type"] == "type_0") | (adata.obs["condition"] == "control")
    r = response(adata[keep].copy())
    change, weights = r.predict(r.contexts.control[1], r.contexts.cells[1])
    assert weights.tolist() == [1]
    assert r.forest is None
    factor = r.anchor_weights.sum()
    assert 0 < factor <= 1
    np.testing.assert_allclose(change, factor * r.shifts[0])
    np.testing.assert_array_equal(r.measured(0)[0], r.shifts[0])


def test_predictions_repeat(many):
    one, other = response(many), response(many)
    for r in (one, other):
        r.change, _ = r.predict(r.contexts.control[0], r.contexts.cells[0])
    np.testing.assert_array_equal(one.change, other.change)
