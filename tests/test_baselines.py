import numpy as np
import pytest
from helpers import small_cells

from spaperb import baselines


def mean(adata, cell_type, condition):
    chosen = (adata.obs["cell_type"] == cell_type) & (adata.obs["condition"] == condition)
    return adata.X.toarray()[chosen].mean(0)


def test_no_change(adata):
    predicted = baselines.NoChange().fit(adata).predict(adata)
    np.testing.assert_array_equal(predicted, adata.X.toarray())


def test_mean_shift_averages_over_types_with_both_conditions(adata):
    hidden = (adata.obs["cell_type"] == "type_0") & (adata.obs["condition"] == "stimulated")
    train, control = adata[~hidden].copy(), adata[adata.obs["cell_type"] == "type_0"].copy()
    expected = np.mean(
        [mean(adata, t, "stimulated") - mean(adata, t, "control") for t in ("type_1", "type_2")],
        axis=0,
    )
    predicted = baselines.MeanShift().fit(train).predict(control)
    np.testing.assert_allclose(
        predicted, np.maximum(control.X.toarray() + expected, 0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("stimulated", [None, "IFN"])
def test_other_names(stimulated):
    adata = small_cells()
    expected = baselines.MeanShift().fit(adata).shifts
    adata.obs = adata.obs.rename(columns={"condition": "drug", "cell_type": "type"})
    adata.obs["drug"] = adata.obs["drug"].cat.rename_categories(["none", "IFN"])
    model = baselines.MeanShift().fit(
        adata, condition_key="drug", control="none", stimulated=stimulated, held_out="type"
    )
    np.testing.assert_array_equal(model.shifts, expected)
