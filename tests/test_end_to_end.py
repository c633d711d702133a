"""From raw counts of real cells to differential expression of a predicted layer."""

import numpy as np
import pytest
import scanpy as sc
import scvi
from helpers import QUIET

from spaperb import SpaPerbModel, baselines, metrics

HIDDEN = "CD14+ Monocytes"


def test_kang_cells(kang):
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
    model = SpaPerbModel(train)
    with pytest.warns(
        UserWarning, match=f"take no part in training: {HIDDEN}".replace("+", r"\+")
    ):
        model.train(max_epochs=20, **QUIET)
    model.predict_stimulated(adata)

    control = adata[(of_type & ~hidden).to_numpy()].copy()
    predicted, real = control.layers["spaperb_stimulated"], adata[hidden].X
    # No claim of merit: the published objective learns something of the response of a hidden type.
    assert metrics.pearson_delta(predicted, real, control.X) > 0.3
    assert baselines.MeanShift().fit(train).predict(control).shape == control.shape
    assert predicted.min() >= 0

    sc.tl.rank_genes_groups(adata, "cell_type", layer="spaperb_stimulated")
    assert np.isfinite(sc.get.rank_genes_groups_df(adata, HIDDEN)["scores"]).all()
