import numpy as np
import pytest
from helpers import context_arrays, small_cells
from scipy import sparse

from spaperb import datasets
from spaperb._types import CONTROL, NEITHER, STIMULATED
from spaperb.evidence import Evidence, Settings
from spaperb.populations import Pseudobulk


@pytest.fixture
def one_unpaired():
    """Three types, the stimulated cells of the first of them hidden."""
    adata = small_cells()
    hidden = (adata.obs["cell_type"] == "type_0") & (adata.obs["condition"] == "stimulated")
    return adata[~hidden].copy()


def test_paired_evidence_come_first(one_unpaired):
    evidence = Evidence.of(*context_arrays(one_unpaired))
    assert evidence.names == ["type_1", "type_2", "type_0"]
    whole = evidence.whole
    assert evidence.changes.population[whole].tolist() == [0, 1]
    assert evidence.populations.third[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("convert", [np.asarray, sparse.csr_matrix])
def test_cells_that_are_all_the_same(value, convert):
    _, *others = context_arrays(small_cells())
    evidence = Evidence.of(convert(np.full((120, 5), value, dtype=np.float32)), *others)
    assert np.isfinite(evidence.components).all()
    for cells in evidence.populations.cells:
        np.testing.assert_allclose(cells, 0, atol=1e-5 * value)
    np.testing.assert_array_equal(evidence.changes.shift, 0)


def test_equally_near_cells_of_low_rank():
    """Whole numbers of few genes.

    Many cells are the same, and fewer components than genes say all.
    """
    adata = small_cells(n_genes=8)
    x = (adata.X.toarray() > 1).astype(np.float32)
    x[:, 4:] = 0
    _, *others = context_arrays(adata)
    first, *again = (
        Evidence.of(convert(x), *others) for convert in (np.asarray, sparse.csr_matrix, np.asarray)
    )
    for other in again:
        for cells, expected in zip(other.populations.cells, first.populations.cells, strict=True):
            np.testing.assert_array_equal(cells, expected)


def test_shifts_and_their_sampling_variance(one_unpaired):
    evidence = Evidence.of(*context_arrays(one_unpaired))
    x, obs = one_unpaired.X.toarray().astype(float), one_unpaired.obs
    c, s = (
        x[(obs["cell_type"] == "type_1") & (obs["condition"] == arm)]
        for arm in ("control", "stimulated")
    )
    np.testing.assert_allclose(evidence.changes.shift[0], s.mean(0) - c.mean(0), atol=1e-6)
    # that of many cells is all but their own
    ratio = evidence.changes.error[0] ** 2 / ((c.var(0, ddof=1) + s.var(0, ddof=1)) / 20)
    assert np.median(ratio) == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(evidence.populations.detection[0], (c > 0).mean(0))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10])
def test_sampling_variance_of_few_cells_is_that_of_drawing_them_again(n):
    """Against the spread of shifts of many draws.

    Some of these cells do not show a gene at all.
    """
    cells = datasets.simulated(n_cell_types=4, n_cells=300, n_genes=200)
    x, arms, labels, names = context_arrays(cells)
    rng = np.random.default_rng(0)
    of_type = np.flatnonzero((labels == 0) & (arms == 1))
    others = np.flatnonzero((labels != 0) | (arms == 0))
    shifts, variances = [], []
    for _ in range(30):
        rows = np.concatenate([others, rng.permutation(of_type)[:n]])
        only = rows[(labels[rows] == 0) | (arms[rows] == 0)]
        # without another measured context the few cells are measured all the same
        changes = Evidence.of(x[only], arms[only], labels[only], names).changes
        shifts.append(changes.shift[0])
        variances.append(changes.error[0] ** 2)
    real, told = np.var(shifts, axis=0, ddof=1), np.mean(variances, axis=0)
    expressed = real > 0.01 / n
    ratio = told[expressed] / real[expressed]
    assert 0.7 < np.median(ratio) < 1.5
    assert ratio.min() > 0.2
    assert (np.min(variances, axis=0)[expressed] > 0).all()


def test_neighbours_of_a_context_among_all_are_itself():
    evidence = Evidence.of(*context_arrays(small_cells(n_cells=60, n_genes=200)))
    shares = evidence.neighbours(evidence.populations.cells[2], np.arange(3))
    assert shares.sum() == pytest.approx(1)
    assert shares.argmax() == 2
    assert (evidence.assign(evidence.populations.cells[1]) == 1).mean() > 0.9


def test_dense_and_sparse_cells_give_the_same(one_unpaired):
    x, *rest = context_arrays(one_unpaired)
    one, other = Evidence.of(x, *rest), Evidence.of(sparse.csr_matrix(x).toarray(), *rest)
    np.testing.assert_allclose(one.changes.shift, other.changes.shift)
    np.testing.assert_allclose(np.abs(one.components), np.abs(other.components), atol=1e-3)


def test_state_survives(one_unpaired):
    evidence = Evidence.of(*context_arrays(one_unpaired))
    restored = Evidence.from_plain(evidence.to_plain())
    assert isinstance(restored.populations.pseudobulk(0), Pseudobulk)
    assert isinstance(restored.changes.pseudobulk(0), Pseudobulk)
    np.testing.assert_array_equal(restored.changes.shift, evidence.changes.shift)


def test_a_single_gene(one_unpaired):
    evidence = Evidence.of(*context_arrays(one_unpaired[:, :1].copy()))
    assert evidence.components.shape == (1, 1)


def test_too_few_cells_measure_no_shift():
    adata = small_cells()
    stimulated = adata.obs["condition"] == "stimulated"
    of_type = adata.obs["cell_type"] == "type_1"
    few = np.flatnonzero(of_type & stimulated)[4:]
    kept = np.setdiff1d(np.arange(adata.n_obs), few)
    assert Evidence.of(*context_arrays(adata[kept].copy())).names == ["type_0", "type_2", "type_1"]
    # with nothing better, they are used
    tiny = small_cells(n_cells=2)
    assert len(Evidence.of(*context_arrays(tiny)).whole) == 3


def test_sparse_and_dense_cells_have_the_same_components_to_the_last_bit():
    x, *rest = context_arrays(small_cells(n_cells=60, n_genes=200))
    of_sparse, of_dense = Evidence.of(x, *rest), Evidence.of(x.toarray(), *rest)
    for a, b in zip(of_sparse.populations.cells, of_dense.populations.cells, strict=True):
        np.testing.assert_array_equal(a, b)


def test_components_are_double_whatever_expression_is():
    x, *rest = context_arrays(small_cells())
    for dtype in (np.float32, np.longdouble):
        evidence = Evidence.of(x.toarray().astype(dtype), *rest)
        assert {cells.dtype for cells in evidence.populations.cells} == {np.dtype(np.float64)}


def test_many_doses_are_grouped_by_rank():
    x, arms, labels, names = context_arrays(small_cells(n_cells=120))
    doses = np.random.default_rng(0).permutation(np.arange(1.0, len(arms) + 1))
    evidence = Evidence.of(x, arms, labels, names, doses=doses)
    of_type = evidence.changes.dose[evidence.whole[evidence.context[evidence.whole] == 0]]
    assert len(of_type) == Settings.max_doses
    assert (np.diff(of_type) > 0).all()


def test_cells_at_a_dose_of_0_tell_of_no_stimulus():
    x, arms, labels, names = context_arrays(small_cells(n_cells=60))
    stimulated = np.flatnonzero(arms)
    doses = np.zeros(len(arms))
    doses[stimulated[::2]] = 10.0
    both = Evidence.of(x, arms, labels, names, doses=doses)
    assert set(both.changes.dose) == {10.0}
    arms[stimulated[1::2]] = NEITHER
    some = Evidence.of(x, arms, labels, names, doses=doses)
    whole = both.whole
    np.testing.assert_allclose(both.changes.shift[whole], some.changes.shift[some.whole])
    # With no other dose they are all that is known.
    arms[stimulated[1::2]] = 1
    assert set(Evidence.of(x, arms, labels, names, doses=np.zeros(len(arms))).changes.dose) == {0}


def test_likeness_of_thirds_of_a_type_and_of_other_types():
    evidence = Evidence.of(*context_arrays(small_cells(n_cells=100, n_genes=200)))
    p = evidence.populations
    for third in np.flatnonzero(p.third):
        own = int(p.context[third])
        for k in range(3):
            likeness = evidence.likeness(p.pseudobulk(third), k)
            assert likeness == 1 if k == own else likeness < 0.9


def test_distance_to_where_a_perturbation_was_measured():
    evidence = Evidence.of(*context_arrays(small_cells(n_cells=100, n_genes=200)))
    p = evidence.populations
    pseudobulk, cells = p.pseudobulk(0), p.cells[0]
    own = evidence.distance(pseudobulk, cells, 0)
    others = evidence.distance(pseudobulk, cells, 0, besides=0)
    assert own < others < np.inf
    assert evidence.distance(pseudobulk, cells, 1) == np.inf
    assert evidence.largest_distance() >= others
    assert np.isnan(evidence.keep(evidence.context != 0).largest_distance())


def test_cells_that_take_no_part_change_nothing():
    """Neither their values, nor that they are there."""
    x, arms, labels, names = context_arrays(small_cells())
    rng = np.random.default_rng(0)
    left_out = rng.permutation(len(arms))[:30]
    arms = arms.copy()
    arms[left_out] = NEITHER
    x = x.toarray()
    first = Evidence.of(x, arms, labels, names)
    x[left_out] = rng.permuted(x[left_out], axis=1)
    kept = np.setdiff1d(np.arange(len(arms)), left_out)
    for other in (
        Evidence.of(x, arms, labels, names),
        Evidence.of(x[kept], arms[kept], labels[kept], names),
    ):
        for a, b in zip(first.changes, other.changes, strict=True):
            np.testing.assert_array_equal(a, b)


def test_negative_means_of_stimulated_cells_or_thirds_have_finite_errors():
    """Where the control cells' means are positive, as by chance in scaled data of few genes."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (40, 3))
    arms, labels = np.repeat([CONTROL, STIMULATED], 20), np.zeros(40, dtype=int)
    x[arms == CONTROL] += 0.05 - x[arms == CONTROL].mean(axis=0)
    x[arms == STIMULATED] -= 2
    evidence = Evidence.of(x, arms, labels, ["a"])
    assert np.isfinite(evidence.changes.error).all()
    assert np.isfinite(evidence.populations.error).all()
    expected = np.sqrt(x[arms == CONTROL].var(0) / 20 + x[arms == STIMULATED].var(0) / 20)
    np.testing.assert_allclose(evidence.changes.error[0], expected, rtol=0.3)
    positive = Evidence.of(np.abs(x), arms, labels, ["a"])
    query = Pseudobulk.of(x[arms == STIMULATED])
    assert np.isfinite(positive.error_of_mean(query)).all()
