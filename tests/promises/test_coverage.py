"""Intervals hold as often as they say, by simulation: over hidden types, levels and genes."""

import numpy as np
import pytest
import scvi
from helpers import QUIET

from spaperb import SpaPerbModel, datasets
from spaperb.evaluation.benchmark import Task, make_fold
from spaperb.populations import mean_expression

TASK = Task("cell_type", "condition", "control", None, "cell_type", None, 0, split_controls=False)
pytestmark = pytest.mark.slow


def fit(train) -> SpaPerbModel:
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(train)
    model = SpaPerbModel(train)
    model.train(max_epochs=2, batch_size=2, **QUIET)
    return model


def hidden_types(n_few=None):
    """Models of cells in which a type's stimulated cells are hidden, and what they would be.

    Control and measured stimulated cells of the type may be few, in training too.
    """
    for seed in range(3):
        cells = datasets.simulated(n_cells=60, n_genes=200, shared_response=0.5, seed=seed)
        for name in ("type_0", "type_1", "type_2"):
            fold = make_fold(cells, name, TASK)
            train, control, real = fold.train, fold.control[:n_few].copy(), fold.real[:n_few]
            if n_few is not None:
                others = np.flatnonzero((train.obs["cell_type"] == name).to_numpy())[n_few:]
                train = train[np.setdiff1d(np.arange(train.n_obs), others)].copy()
            with pytest.warns(UserWarning, match=name):
                model = fit(train)
            layers = control.layers
            noise_free = (layers["true_stimulated"] - layers["true_control"]).mean(0)
            measured = mean_expression(real) - mean_expression(control.X)
            yield model, control, measured, noise_free


def covered(table, truth):
    """Whether the interval of each gene holds its change."""
    return ((table["lower"] <= truth) & (truth <= table["upper"])).to_numpy()


def tables(models, level):
    for model, control, *truths in models:
        table = model.predict_response(control, confidence_level=level).set_index("gene")
        yield table.loc[control.var_names], *truths


@pytest.fixture(scope="module")
def models():
    return list(hidden_types())


def test_hidden_types(models):
    """Over types and data sets, of the measured change and of that without noise."""
    measured, true = [], []
    for table, change, noise_free in tables(models, 0.9):
        measured.append(covered(table, change).mean())
        true.append(covered(table, noise_free).mean())
    assert 0.85 < np.mean(measured) < 0.95
    # Two of the nine respond unlike all that training saw.
    assert np.sort(measured)[2] > 0.85
    assert min(measured) > 0.7
    assert np.mean(true) > 0.85


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_at_other_levels(models, level):
    found = [covered(table, change).mean() for table, change, _ in tables(models, level)]
    assert abs(np.mean(found) - level) < 0.08


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
def test_of_the_genes_that_change_most(models, level):
    """The tenth with the largest predicted changes, which a user looks at."""
    found = []
    for table, change, _ in tables(models, level):
        largest = table["mean_change"].abs().to_numpy().argsort()[-20:]
        found.append(covered(table, change)[largest].mean())
    assert level - 0.08 < np.mean(found)


def test_of_types_with_few_cells():
    """Fifteen in each condition: wider, and they hold all the same."""
    models = list(hidden_types(15))
    for level in (0.5, 0.9):
        found = [covered(table, change).mean() for table, change, _ in tables(models, level)]
        assert abs(np.mean(found) - level) < 0.08
        if level == 0.9:
            assert min(found) > 0.75


def test_a_higher_level_is_wider_for_each_gene(models):
    model, control, *_ = models[0]
    order = control.var_names
    widths = [
        model.predict_response(control, confidence_level=level)
        .set_index("gene")
        .loc[order]
        .eval("upper - lower")
        for level in (0.05, 0.5, 0.8, 0.9, 0.95, 0.99)
    ]
    assert (np.diff(widths, axis=0) > 0).all()
