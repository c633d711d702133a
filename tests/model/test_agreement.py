"""Agreement of the evidence: 1 where what counts says the same and is sure of it."""

import numpy as np
import pytest
from helpers import QUIET, small_cells

from spaperb import SpaPerbModel, datasets
from spaperb.evidence import Description, agreement


def description(shifts, errors, weights):
    """A description of one gene."""
    shifts, errors = (np.array(x, dtype=float)[:, None] for x in (shifts, errors))
    scale = np.array([2.0])
    pieces = np.zeros((len(shifts), 1, 7))
    pieces[..., 0], pieces[..., 1] = shifts / scale, errors / scale
    nothing = np.empty(0)
    return Description(nothing, pieces, nothing, np.log(weights), shifts, scale)


@pytest.mark.parametrize(
    ("shifts", "errors", "weights", "expected"),
    [
        ([1, 1, 1], [0, 0, 0], [0.2, 0.3, 0.5], 1),  # all say the same
        ([1, -1], [0, 0], [0.5, 0.5], 0),  # they cancel
        ([1, -1], [0, 0], [0.9, 0.1], 0.64),  # (0.9 - 0.1)^2
        ([2, 2], [2, 2], [0.5, 0.5], 0.5),  # as large as their noise
        ([1, 5], [0, 0], [1 - 1e-12, 1e-12], 1),  # what does not count
    ],
)
def test_by_hand(shifts, errors, weights, expected):
    of = np.zeros(len(shifts), dtype=int)
    agreed, spread = agreement(description(shifts, errors, weights), of)
    assert (agreed / spread)[0] == pytest.approx(expected, abs=1e-6)


def test_parts_of_a_combination_need_not_say_the_same():
    unlike = description([2, 2, -4, -4], [0, 0, 0, 0], [0.25] * 4)
    agreed, spread = agreement(unlike, np.array([0, 0, 1, 1]))
    assert (agreed / spread)[0] == pytest.approx(1)
    agreed, spread = agreement(unlike, np.array([0, 1, 0, 1]))
    assert (agreed / spread)[0] == pytest.approx(0.1)


@pytest.fixture(scope="module")
def models():
    """The response is the same in all types, or has nothing in common."""
    tables = {}
    for shared in (1.0, 0.0):
        cells = datasets.simulated(5, 100, 150, shared_response=shared)
        train = cells[(cells.obs["cell_type"] != "type_0") | (cells.obs["condition"] == "control")]
        train = train.copy()
        SpaPerbModel.setup_anndata(train)
        model = SpaPerbModel(train)
        with pytest.warns(UserWarning, match="type_0"):
            model.train(max_epochs=0, **QUIET)
        tables[shared] = model.predict_response(train).set_index("group")
    return tables


def test_contexts_that_respond_alike_agree(models):
    alike, unlike = (models[shared].loc["type_0", "group_agreement"].iloc[0] for shared in (1, 0))
    assert alike > 0.8
    assert unlike < 0.6


def test_a_type_that_was_measured_agrees_with_itself(models):
    own, new = (models[0.0].loc[t, "group_agreement"].iloc[0] for t in ("type_1", "type_0"))
    assert own > new + 0.1


def test_ranges_and_the_group(models):
    for table in models.values():
        assert table["agreement"].between(0, 1 + 1e-9).all()
        for _, of in table.groupby(level=0):
            assert of["group_agreement"].nunique() == 1
            low, high = of["agreement"].min(), of["agreement"].max()
            assert low <= of["group_agreement"].iloc[0] <= high


def test_silent_genes_agree_on_nothing():
    cells = small_cells()
    x = cells.X.toarray()
    x[:, 3] = 0
    cells.X = x
    SpaPerbModel.setup_anndata(cells)
    model = SpaPerbModel(cells)
    model.train(max_epochs=0, **QUIET)
    table = model.predict_response().set_index("gene")
    assert (table.loc["gene_3", "agreement"] == 0).all()
    assert np.isfinite(table["agreement"]).all()
