import numpy as np
import pytest
from helpers import context_arrays, small_cells
from scipy import sparse
from spaperb.contexts import Contexts

from spaperb import datasets
from spaperb.populations import Profile


@pytest.fixture
def one_unpaired():
    """Three types, the stimulated cells of the first of them hidden."""
    adata = small_cells()
    hidden = (adata.obs["cell_type"] == "type_0") & (adata.obs["condition"] == "stimulated")
    return adata[~hidden].copy()


def test_paired_contexts_come_first(one_unpaired):
    contexts = Contexts.of(*context_arrays(one_unpaired))
    assert contexts.names == ["type_1", "type_2", "type_0"]
    (treatment,) = contexts.treatments
    assert treatment.paired.tolist() == [0, 1]
    assert (len(treatment.stimulated), len(contexts.control), len(contexts.cells)) == (2, 3, 3)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("convert", [np.asarray, sparse.csr_matrix])
def test_cells_that_are_all_the_same(value, convert):
    _, *others = context_arrays(small_cells())
    contexts = Contexts.of(convert(np.full((120, 5), value, dtype=np.float32)), *others)
    assert np.isfinite(contexts.components).all()
    for cells in contexts.cells:
        np.testing.assert_allclose(cells, 0, atol=1e-5 * value)
    np.testing.assert_array_equal(contexts.treatments[0].shifts, 0)


def test_equally_near_cells_of_low_rank():
    """Whole numbers of few genes: many cells are the same, and fewer components than genes say all."""
    adata = small_cells(n_genes=8)
    x = (adata.X.toarray() > 1).astype(np.float32)
    x[:, 4:] = 0
    _, *others = context_arrays(adata)
    first, *again = (
        Contexts.of(convert(x), *others) for convert in (np.asarray, sparse.csr_matrix, np.asarray)
    )
    for other in again:
        for cells, expected in zip(other.cells, first.cells, strict=True):
            np.testing.assert_array_equal(cells, expected)


def test_shifts_and_their_sampling_variance(one_unpaired):
    contexts = Contexts.of(*context_arrays(one_unpaired))
    x, obs = one_unpaired.X.toarray().astype(float), one_unpaired.obs
    c, s = (
        x[(obs["cell_type"] == "type_1") & (obs["condition"] == arm)]
        for arm in ("control", "stimulated")
    )
    np.testing.assert_allclose(contexts.treatments[0].shifts[0], s.mean(0) - c.mean(0), atol=1e-6)
    # that of many cells is all but their own
    ratio = contexts.treatments[0].variances[0] / ((c.var(0, ddof=1) + s.var(0, ddof=1)) / 20)
    assert np.median(ratio) == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(contexts.control[0].detection, (c > 0).mean(0))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10])
def test_sampling_variance_of_few_cells_is_that_of_drawing_them_again(n):
    """Against the spread of shifts of many draws; some of these cells do not show a gene at all."""
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
        (treatment,) = Contexts.of(x[only], arms[only], labels[only], names).treatments
        shifts.append(treatment.shifts[0])
        variances.append(treatment.variances[0])
    real, told = np.var(shifts, axis=0, ddof=1), np.mean(variances, axis=0)
    expressed = real > 0.01 / n
    ratio = told[expressed] / real[expressed]
    assert 0.7 < np.median(ratio) < 1.5
    assert ratio.min() > 0.2
    assert (np.min(variances, axis=0)[expressed] > 0).all()


def test_neighbours_of_a_context_among_all_are_itself():
    contexts = Contexts.of(*context_arrays(small_cells(n_cells=60, n_genes=200)))
    shares = contexts.neighbours(contexts.cells[2], np.arange(3))
    assert shares.sum() == pytest.approx(1)
    assert shares.argmax() == 2
    assert (contexts.assign(contexts.cells[1]) == 1).mean() > 0.9


def test_dense_and_sparse_cells_give_the_same(one_unpaired):
    x, *rest = context_arrays(one_unpaired)
    one, other = Contexts.of(x, *rest), Contexts.of(sparse.csr_matrix(x).toarray(), *rest)
    np.testing.assert_allclose(one.treatments[0].shifts, other.treatments[0].shifts)
    np.testing.assert_allclose(np.abs(one.components), np.abs(other.components), atol=1e-3)


def test_state_survives(one_unpaired):
    contexts = Contexts.of(*context_arrays(one_unpaired))
    restored = Contexts.from_state(contexts.to_state())
    assert isinstance(restored.control[0], Profile)
    assert isinstance(restored.treatments[0].stimulated[0], Profile)
    np.testing.assert_array_equal(restored.treatments[0].shifts, contexts.treatments[0].shifts)


def test_a_single_gene(one_unpaired):
    contexts = Contexts.of(*context_arrays(one_unpaired[:, :1].copy()))
    assert contexts.components.shape == (1, 1)


def test_too_few_cells_measure_no_shift():
    adata = small_cells()
    stimulated = adata.obs["condition"] == "stimulated"
    of_type = adata.obs["cell_type"] == "type_1"
    few = np.flatnonzero(of_type & stimulated)[2:]
    kept = np.setdiff1d(np.arange(adata.n_obs), few)
    assert Contexts.of(*context_arrays(adata[kept].copy())).names == ["type_0", "type_2", "type_1"]
    # with nothing better, they are used
    tiny = small_cells(n_cells=2)
    assert len(Contexts.of(*context_arrays(tiny)).treatments[0].paired) == 3


def test_sparse_and_dense_cells_have_the_same_components_to_the_last_bit():
    x, *rest = context_arrays(small_cells(n_cells=60, n_genes=200))
    of_sparse, of_dense = Contexts.of(x, *rest), Contexts.of(x.toarray(), *rest)
    for a, b in zip(of_sparse.cells, of_dense.cells, strict=True):
        np.testing.assert_array_equal(a, b)


def test_components_are_double_whatever_expression_is():
    x, *rest = context_arrays(small_cells())
    for dtype in (np.float32, np.longdouble):
        contexts = Contexts.of(x.toarray().astype(dtype), *rest)
        assert {cells.dtype for cells in contexts.cells} == {np.dtype(np.float64)}
