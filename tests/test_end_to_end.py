"""From raw counts of real cells to differential expression of a predicted layer."""

import numpy as np
import pytest
import scanpy as sc
import scvi
from helpers import QUIET

from spaperb import SpaPerbModel, baselines, metrics

pytestmark = pytest.mark.slow

HIDDEN = "CD14+ Monocytes"


@pytest.mark.parametrize("objective", ["published", "in_context"])
def test_kang_cells(kang, objective):
    adata = kang.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    of_type = adata.obs["cell_type"] == HIDDEN
    hidden = (of_type & (adata.obs["condition"] == "stimulated")).to_numpy()
    train = adata[~hidden].copy()
    sc.pp.highly_variable_genes(train, n_top_genes=1000, subset=True)
    adata = adata[:, train.var_names].copy()

    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(train)
    model = SpaPerbModel(train, objective=objective)
    with pytest.warns(UserWarning, match="take no part in training.*: CD14"):
        model.train(max_epochs=20, **QUIET)
    model.predict_stimulated(adata)

    control = adata[(of_type & ~hidden).to_numpy()].copy()
    predicted, real = control.layers["spaperb_stimulated"], adata[hidden].X
    baseline = baselines.MeanShift().fit(train).predict(control)
    assert baseline.shape == control.shape
    score = metrics.pearson_delta(predicted, real, control.X)
    if objective == "published":
        # No claim of merit: it learns something of the response of a hidden type.
        assert score > 0.3
    else:
        assert score > metrics.pearson_delta(baseline, real, control.X)
        assert metrics.zero_fraction_error(predicted, real) < 0.1
    assert predicted.min() >= 0

    sc.tl.rank_genes_groups(adata, "cell_type", layer="spaperb_stimulated")
    assert np.isfinite(sc.get.rank_genes_groups_df(adata, HIDDEN)["scores"]).all()
