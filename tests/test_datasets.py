import numpy as np
import pytest
import scvi
from helpers import QUIET

from spaperb import SpaPerbModel, datasets


@pytest.fixture(scope="module")
def cells():
    return datasets.simulated()


def mean_change(adata, cell_type, layer=None):
    """Real (or, from the true layers, known) mean change of a cell type."""
    of_type = adata[adata.obs["cell_type"] == cell_type]
    if layer is not None:
        return (of_type.layers["true_stimulated"] - of_type.layers["true_control"]).mean(0)
    control = of_type[of_type.obs["condition"] == "control"]
    stimulated = of_type[of_type.obs["condition"] == "stimulated"]
    return np.asarray(stimulated.X.mean(0) - control.X.mean(0)).ravel()


def test_fields(cells):
    assert cells.shape == (1600, 500)
    sizes = cells.obs.groupby(["cell_type", "condition"], observed=True).size()
    assert (sizes == 100).all()
    assert len(sizes) == 16
    assert cells.obs["donor"].nunique() == 4
    counts = cells.layers["counts"].toarray()
    assert (counts == counts.round()).all()
    normalised = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    np.testing.assert_allclose(cells.X.toarray(), normalised, rtol=1e-4, atol=1e-5)


def test_seed():
    first, second, other = (
        datasets.simulated(n_cells=5, n_genes=20, seed=seed) for seed in (0, 0, 1)
    )
    assert (first.X != second.X).nnz == 0
    assert (first.X != other.X).nnz > 0


def test_counts_follow_the_true_means(cells):
    """Mean counts per 10,000 of real cells against the truth of those same cells."""
    stimulated = cells[cells.obs["condition"] == "stimulated"]
    counts = stimulated.layers["counts"].toarray()
    measured = (counts / counts.sum(1, keepdims=True) * 1e4).mean(0)
    true = np.expm1(stimulated.layers["true_stimulated"]).mean(0)
    assert np.corrcoef(measured, true)[0, 1] > 0.99


def test_measured_change_follows_the_true_change(cells):
    for cell_type in cells.obs["cell_type"].cat.categories:
        true = mean_change(cells, cell_type, "true")
        assert np.corrcoef(mean_change(cells, cell_type), true)[0, 1] > 0.85


def test_response_is_partly_shared_and_has_both_signs(cells):
    changes = np.array(
        [mean_change(cells, t, "true") for t in cells.obs["cell_type"].cat.categories]
    )
    similarity = np.corrcoef(changes)[np.triu_indices(len(changes), 1)]
    assert 0.4 < similarity.mean() < 0.95
    responding = changes[:, cells.var["responds"].to_numpy()]
    assert (responding > 0.1).any(axis=1).all()
    assert (responding < -0.1).any(axis=1).all()


def test_no_response():
    cells = datasets.simulated(response_scale=0.0, n_cells=5, n_genes=20)
    np.testing.assert_array_equal(cells.layers["true_control"], cells.layers["true_stimulated"])


def test_dropout_loses_counts():
    kept, lost = (
        datasets.simulated(n_cells=20, n_genes=50, dropout=dropout) for dropout in (0, 0.5)
    )
    assert lost.X.nnz == pytest.approx(0.5 * kept.X.nnz, rel=0.05)


@pytest.mark.slow
def test_published_objective_finds_the_response_of_a_hidden_type(cells):
    hidden = (cells.obs["cell_type"] == "type_0") & (cells.obs["condition"] == "stimulated")
    train = cells[~hidden].copy()
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(train)
    model = SpaPerbModel(train)
    with pytest.warns(UserWarning, match="take no part in training: type_0"):
        model.train(max_epochs=60, **QUIET)
    control = cells[(cells.obs["cell_type"] == "type_0") & (cells.obs["condition"] == "control")]
    predicted = model.predict_stimulated(control, inplace=False)
    change = predicted.mean(0) - np.asarray(control.X.mean(0)).ravel()
    assert np.corrcoef(change, mean_change(cells, "type_0", "true"))[0, 1] > 0.6
