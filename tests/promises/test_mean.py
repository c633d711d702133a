"""Predicted cells have the predicted mean: the worst gene of each type, whatever is asked."""

import numpy as np
import pytest
from helpers import QUIET

from spaperb import SpaPerbModel, datasets


@pytest.fixture(scope="module")
def cells():
    return datasets.simulated(n_cell_types=4, n_cells=80, n_genes=150, seed=3)


@pytest.fixture(scope="module")
def model(cells):
    cells = cells.copy()
    SpaPerbModel.setup_anndata(cells, counts_layer="counts")
    model = SpaPerbModel(cells)
    model.train(max_epochs=2, batch_size=2, **QUIET)
    return model


def worst_error(model, control, predicted):
    """Largest error of a gene's mean in a type, in log-normalised units."""
    table = model.predict_response(control)
    expected = table.assign(mean=table["mean_control"] + table["mean_change"])
    expected = expected.pivot(index="group", columns="gene", values="mean")[control.var_names]
    means = [predicted[control.obs["cell_type"] == name].mean(0) for name in expected.index]
    return np.abs(np.array(means) - np.maximum(expected.to_numpy(), 0)).max()


@pytest.mark.parametrize("asked", [{}, {"n_samples": 3}, {"seed": 5}, {"batch_size": 7}])
@pytest.mark.parametrize("n", [3, 50, None])
def test_of_expression(model, cells, asked, n):
    control = cells[cells.obs["condition"] == "control"]
    of_types = control.obs.groupby("cell_type", observed=True).indices.values()
    control = control[np.concatenate([rows[:n] for rows in of_types])].copy()
    predicted = model.predict_stimulated(control, inplace=False, **asked).astype(float)
    assert worst_error(model, control, predicted) < 1e-3
    assert (predicted >= 0).all()


def test_of_drawn_counts(model, cells):
    """Within one count in one cell, as expression that these counts are normalised to."""
    control = cells[cells.obs["condition"] == "control"].copy()
    counts = model.predict_stimulated(control, inplace=False, sample=True).astype(float)
    scale = 1e4 / control.layers["counts"].sum(1).reshape(-1, 1)
    error = worst_error(model, control, np.log1p(counts * np.asarray(scale)))
    n = control.obs["cell_type"].value_counts().min()
    assert error < np.log1p(np.asarray(scale).max()) / n


def test_of_a_change_added_to_every_cell(model, cells):
    """Each cell has the change, or 0 where it would be negative."""
    is_asked = (cells.obs["cell_type"] == "type_1") & (cells.obs["condition"] == "control")
    control = cells[is_asked].copy()
    table = model.predict_response(control).set_index("gene")
    change = table.loc[control.var_names, "mean_change"].to_numpy()
    predicted = model.predict_stimulated(control, inplace=False, detection=False)
    np.testing.assert_allclose(predicted, np.maximum(control.X.toarray() + change, 0), atol=1e-5)
