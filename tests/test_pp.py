"""Features of genes from control cells."""

import numpy as np
import pandas as pd
import pytest
from helpers import small_cells, snapshot

from spaperb import pp


@pytest.fixture(scope="module")
def cells():
    return small_cells(n_cells=60, n_genes=40)


def test_they_are_correlations_within_types(cells):
    features = pp.gene_features(cells, inplace=False, n_components=5)
    assert features.shape == (40, 5)
    assert features.index.tolist() == cells.var_names.tolist()
    control = cells[cells.obs["condition"] == "control"]
    x = pd.DataFrame(control.X.toarray().astype(float))
    x -= x.groupby(control.obs["cell_type"].to_numpy()).transform("mean")
    u, _, _ = np.linalg.svd(x - x.mean(), full_matrices=False)
    expected = np.array([[np.corrcoef(x[g], u[:, i])[0, 1] for i in range(5)] for g in range(40)])
    np.testing.assert_allclose(np.abs(features), np.abs(expected), atol=1e-6)


def test_genes_that_go_together_are_near(cells):
    twins = cells.copy()
    x = twins.X.toarray()
    x[:, 1] = x[:, 0]
    twins.X = x
    features = pp.gene_features(twins, inplace=False).to_numpy()
    squares = ((features - features[0]) ** 2).sum(axis=1)
    assert squares[1] == pytest.approx(0, abs=1e-12)
    assert np.sort(squares)[2] > 1e-3


def test_some_genes_and_where_they_are_put(cells):
    cells = cells.copy()
    assert pp.gene_features(cells, ["gene_7", "gene_3"], key_added="mine") is None
    assert cells.uns["mine"].index.tolist() == ["gene_7", "gene_3"]
    every = pp.gene_features(cells, inplace=False)
    pd.testing.assert_frame_equal(cells.uns["mine"], every.loc[["gene_7", "gene_3"]])


@pytest.mark.filterwarnings("ignore:Expression looks not log-transformed")
def test_stimulated_cells_are_not_looked_at(cells):
    other = cells.copy()
    x = other.X.toarray()
    x[(other.obs["condition"] != "control").to_numpy()] *= 7
    other.X = x
    pd.testing.assert_frame_equal(
        pp.gene_features(cells, inplace=False), pp.gene_features(other, inplace=False)
    )


def test_all_cells_may_be_control_cells(cells):
    control = cells[cells.obs["condition"] == "control"].copy()
    bare = control.copy()
    del bare.obs["condition"]
    pd.testing.assert_frame_equal(
        pp.gene_features(bare, condition_key=None, inplace=False),
        pp.gene_features(control, inplace=False),
    )
    with pytest.raises(ValueError, match="no column 'condition'"):
        pp.gene_features(bare)


def test_errors(cells):
    before = snapshot(cells)
    with pytest.raises(ValueError, match="1 of 2 genes are not in the AnnData: KLF1"):
        pp.gene_features(cells, ["gene_1", "KLF1"])
    with pytest.raises(ValueError, match=r"0 control cells .'untreated'.*: control, stimulated"):
        pp.gene_features(cells, control="untreated")
    with pytest.raises(ValueError, match=r"no column 'kind' in adata\.obs"):
        pp.gene_features(cells, labels_key="kind")
    with pytest.raises(ValueError, match="`n_components` must be at least 1"):
        pp.gene_features(cells, n_components=0)
    assert snapshot(cells) == before
    silent = cells.copy()
    x = silent.X.toarray()
    x[:, 4] = 0
    silent.X = x
    with pytest.raises(ValueError, match=r"1 of 2 genes do not vary .*: gene_4"):
        pp.gene_features(silent, ["gene_3", "gene_4"])
    assert "gene_4" not in pp.gene_features(silent, inplace=False).index
    with pytest.raises(TypeError, match=r"Pass .'gene_1'."):
        pp.gene_features(cells, "gene_1")
