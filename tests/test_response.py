"""The response across genes finds what can be learned and shrinks what is noise."""

import numpy as np
import pytest
from helpers import context_arrays, left_out, response_of, small_cells

from spaperb import datasets
from spaperb.contexts import Contexts
from spaperb.perturbations import Target
from spaperb.response import ANCHORS, Change, Response, Subject, describe

ONE = Target("stimulated", 0, (0,))


def response(adata) -> Response:
    return response_of(Contexts.of(*context_arrays(adata)))


def predict(r, k, measured=False):
    """Change of training context ``k``."""
    subject = Subject(r.contexts.control[k], r.contexts.cells[k], k if measured else None)
    return r.predict(subject, ONE)


def regression(r):
    return r.regression(contexts=True, perturbations=False)


@pytest.fixture(scope="module")
def many():
    """Eight types with a response of their own on top of a shared one."""
    return datasets.simulated(n_cells=60, n_genes=300, shared_response=0.5)


def test_left_out_contexts_are_described_by_the_others_alone(many):
    x, arms, labels, names = context_arrays(many)
    spoilt = x.toarray()
    spoilt[(labels == 0) & (arms == 1)] += 5
    one, other = (response_of(Contexts.of(values, arms, labels, names)) for values in (x, spoilt))
    np.testing.assert_allclose(left_out(one, 0).anchors, left_out(other, 0).anchors, atol=1e-5)
    np.testing.assert_allclose(left_out(one, 0).features, left_out(other, 0).features, atol=1e-5)
    assert np.abs(left_out(one, 1).anchors - left_out(other, 1).anchors).max() > 0.1


def test_anchors_are_weighted_shifts(many):
    contexts = Contexts.of(*context_arrays(many))
    others = np.arange(1, 8)
    (treatment,) = contexts.treatments
    description = describe(contexts, treatment, others, contexts.control[0], contexts.cells[0])
    assert description.anchors.shape == (300, len(ANCHORS))
    np.testing.assert_allclose(description.anchors[:, 2], treatment.shifts[1:].mean(0))
    np.testing.assert_allclose(
        description.anchors[:, 0], description.weights @ treatment.shifts[1:]
    )
    low, high = treatment.shifts[1:].min(0), treatment.shifts[1:].max(0)
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
        change = predict(r, k).mean
        (treatment,) = r.contexts.treatments
        profile, cells = r.contexts.control[k], r.contexts.cells[k]
        anchors = describe(r.contexts, treatment, np.arange(7), profile, cells).anchors
        real = np.asarray(many.X[hidden.to_numpy()].mean(0) - many.X[control.to_numpy()].mean(0))
        errors.append([np.mean((y - real) ** 2) for y in (change, *anchors.T)])
    ours, *others = np.mean(errors, axis=0)
    assert ours < min(others)


def test_noise_is_shrunk_to_no_change():
    adata = datasets.simulated(n_cells=60, n_genes=300, response_scale=0)
    hidden = (adata.obs["cell_type"] == "type_0") & (adata.obs["condition"] == "stimulated")
    r = response(adata[~hidden].copy())
    shifts = r.contexts.treatments[0].shifts
    assert np.mean(shifts**2) > 0.01
    assert (predict(r, 7).mean == 0).all()
    assert np.mean(predict(r, 0, measured=True).mean ** 2) < 0.1 * np.mean(shifts[0] ** 2)


def test_leaves_grow_with_the_noise(many):
    few = many[np.arange(many.n_obs) % 3 == 0].copy()
    few, enough = (regression(response(x)).forest.min_samples_leaf for x in (few, many))
    assert few > enough == 10


def test_a_measured_change_is_kept_as_far_as_it_was_measured_well(many):
    r = response(many)
    few = response(many[np.arange(many.n_obs) % 12 == 0].copy())
    for k in (0, 5):
        change, trust, *_ = predict(r, k, measured=True)
        shift = r.contexts.treatments[0].shifts[k]
        assert ((trust >= 0) & (trust <= 1)).all()
        between = np.abs(change - shift) <= np.abs(regression(r).priors[k] - shift) + 1e-9
        assert between.all()
        assert predict(few, k, measured=True).measured.mean() < trust.mean()


def test_one_paired_context_gives_its_own_shift():
    adata = small_cells()
    keep = (adata.obs["cell_type"] == "type_0") | (adata.obs["condition"] == "control")
    r = response(adata[keep].copy())
    change = predict(r, 1)
    (shift,) = r.contexts.treatments[0].shifts
    assert change.weights.tolist() == [1]
    assert regression(r).forest is None
    factor = regression(r).anchor_weights.sum()
    assert 0 < factor <= 1
    np.testing.assert_allclose(change.mean, factor * shift)
    np.testing.assert_array_equal(predict(r, 0, measured=True).mean, shift)


def test_predictions_repeat(many):
    one, other = response(many), response(many)
    np.testing.assert_array_equal(predict(one, 0).mean, predict(other, 0).mean)


def test_a_part_of_a_change_is_no_better_known_than_the_whole(many):
    """Below the lowest dose: its error shrinks with the change, and nothing of it was measured."""
    description = left_out(response(many), 0)
    whole = Change.predicted(description.anchors[:, 0], description)
    part = Change.mixed([whole], np.array([0.3]))
    np.testing.assert_allclose(part.mean, 0.3 * whole.mean)
    np.testing.assert_allclose(part.scale, 0.3 * whole.scale)
    np.testing.assert_array_equal(part.unmeasured, 1)
    np.testing.assert_allclose(part.weights.sum(), whole.weights.sum())
