"""What to measure next."""

import numpy as np
import pytest
import scvi
from helpers import PUBLISHED, QUIET, drop_layers, small_cells, snapshot

from spaperb import SpaPerbModel, datasets
from spaperb.evidence import Evidence, suggest
from spaperb.populations import Pseudobulk


def fit(cells, **setup):
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(cells, **setup)
    model = SpaPerbModel(cells)
    model.train(max_epochs=0, **QUIET)
    return model


def measured_in(cells, types):
    """Cells without the stimulated ones of other types."""
    hidden = ~cells.obs["cell_type"].isin(types) & (cells.obs["condition"] == "stimulated")
    return cells[~hidden].copy()


@pytest.fixture(scope="module")
def cells():
    cells = datasets.simulated(8, 60, 150, n_lineages=2, marker_fraction=0.3)
    drop_layers(cells)
    return cells


@pytest.mark.filterwarnings("ignore:These cell types have no")
@pytest.mark.filterwarnings("ignore:Changes were measured in 1 context")
class TestModel:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, cells):
        # Types 0, 2, 4, 6 are of one lineage and 1, 3, 5, 7 of the other.
        with pytest.warns(UserWarning, match="take no part in training"):
            return fit(measured_in(cells, ["type_0", "type_2"]))

    def test_the_lineage_that_was_not_measured_comes_first(self, model):
        table = model.suggest_measurements(n=3)
        assert table.columns.tolist() == [
            "group",
            "perturbation",
            "gain",
            "half_width_before",
            "half_width_after",
        ]
        assert table["group"][0] in {"type_1", "type_3", "type_5", "type_7"}
        assert table["group"].is_unique
        assert (table["perturbation"] == "stimulated").all()
        assert table["gain"].is_monotonic_decreasing
        assert 0 < table["gain"].sum() <= 1 + 1e-9
        assert table["gain"][0] > 0.3

    def test_all_that_is_left(self, model):
        table = model.suggest_measurements(n=100)
        assert len(table) == 6
        assert np.isnan(table["half_width_after"].iloc[-1])
        assert table["gain"].sum() == pytest.approx(1)
        # What is measured as it was predicted leaves the others no wider.
        others = table.iloc[:-1]
        assert (others["half_width_after"] < 1.02 * others["half_width_before"]).all()
        assert np.isfinite(table["half_width_after"].iloc[:-1]).all()

    def test_other_orders_and_forms(self, cells, model):
        expected = model.suggest_measurements(n=3)
        asked = measured_in(cells, ["type_0", "type_2"])
        order = np.random.default_rng(0).permutation(asked.n_obs)
        for other in (asked[order].copy(), asked[:, ::-1].copy()):
            table = model.suggest_measurements(other, n=3)
            assert table["group"].tolist() == expected["group"].tolist()
            np.testing.assert_allclose(table["gain"], expected["gain"], rtol=1e-6)

    def test_cells_of_types_that_the_model_never_saw(self, cells):
        known = cells[cells.obs["cell_type"].isin(["type_0", "type_2", "type_4"])].copy()
        model = fit(known)
        others = cells[cells.obs["cell_type"].isin(["type_1", "type_3", "type_6"])]
        asked = others[others.obs["condition"] == "control"].copy()
        before = snapshot(asked)
        with pytest.warns(UserWarning, match="knows none of the cell types"):
            table = model.suggest_measurements(asked, n=2)
        assert table["group"][0] in {"type_1", "type_3"}
        assert table["half_width_after"][0] < table["half_width_before"][0]
        assert snapshot(asked) == before

    def test_errors(self, cells, model):
        with pytest.raises(ValueError, match="whole number and at least 1; it is 0"):
            model.suggest_measurements(n=0)
        with pytest.raises(ValueError, match="'other' was never measured"):
            model.suggest_measurements(perturbation="other")
        some = cells[cells.obs["cell_type"] == "type_0"].copy()
        with pytest.raises(ValueError, match="All is measured: stimulated in type_0"):
            model.suggest_measurements(some)
        small = small_cells()
        SpaPerbModel.setup_anndata(small)
        published = SpaPerbModel(small, **PUBLISHED)
        published.train(max_epochs=1, **QUIET)
        with pytest.raises(ValueError, match="published objective knows no error"):
            published.suggest_measurements()


@pytest.mark.filterwarnings("ignore:These cell types have no")
def test_a_screen():
    cells = datasets.simulated_screen(6, 3, 30, 80)
    rng = np.random.default_rng(0)
    hidden = {(p, t) for p in range(1, 6) for t in range(3) if t != p % 3}
    names = cells.obs["cell_type"].astype(str) + cells.obs["condition"].astype(str)
    is_hidden = names.isin([f"type_{t}perturbation_{p}" for p, t in hidden])
    model = fit(cells[~is_hidden][rng.permutation((~is_hidden).sum())].copy())
    table = model.suggest_measurements(n=4)
    pairs = {
        (int(p[-1]), int(t[-1]))
        for p, t in zip(table["perturbation"], table["group"], strict=True)
    }
    assert len(pairs) == 4
    assert pairs <= hidden
    one = model.suggest_measurements(n=4, perturbation="perturbation_2")
    assert (one["perturbation"] == "perturbation_2").all()
    assert len(one) == 2


@pytest.mark.filterwarnings("ignore:The model knows none", "ignore:Changes were measured in 1")
def test_one_new_type_of_a_screen():
    """No perturbation takes all of the error for its own."""
    cells = datasets.simulated_screen(6, 2, 40, 80)
    first = cells[cells.obs["cell_type"] == "type_0"].copy()
    is_asked = (cells.obs["cell_type"] == "type_1") & (cells.obs["condition"] == "control")
    table = fit(first).suggest_measurements(cells[is_asked].copy(), n=6)
    assert len(table) == 6
    assert table["gain"].iloc[0] < 0.5


def test_the_noise_of_shared_control_cells_is_not_taken_off():
    """Few control cells do not make perturbations look alike."""
    gains = []
    for n_control in (10, 160):
        cells = datasets.simulated_screen(8, 2, 40, 80)
        rows = [
            np.flatnonzero(
                (cells.obs["cell_type"] == f"type_{t}") & (cells.obs["condition"] == "control")
            )[n_control:]
            for t in (0, 1)
        ]
        hidden = (cells.obs["cell_type"] == "type_1") & cells.obs["condition"].isin(
            [f"perturbation_{p}" for p in range(4)]
        )
        keep = ~hidden.to_numpy()
        keep[np.concatenate(rows)] = False
        gains.append(fit(cells[keep].copy()).suggest_measurements(n=4)["gain"].to_numpy())
    assert (gains[0] > 0.1).all()
    np.testing.assert_allclose(gains[0], gains[1], atol=0.15)


class TestCover:
    """The choice itself, on evidence made by hand: contexts on a line."""

    def evidence(self, at):
        rng = np.random.default_rng(0)
        x, arms, labels = [], [], []
        for k, place in enumerate(at):
            for arm in (0, 1):
                x.append(5 + place + 0.01 * rng.normal(size=(50, 20)) + arm)
                arms += [arm] * 50
                labels += [k] * 50
        names = [str(place) for place in at]
        return Evidence.of(np.concatenate(x), np.array(arms), np.array(labels), names, seed=None)

    def test_the_middle_of_the_far_group_comes_first(self):
        places = [0.0, 5.0, 5.2, 5.4, 1.0]
        evidence = self.evidence(places)
        contexts = [evidence.populations.pseudobulk(k) for k in range(5)]
        known = evidence.keep(np.array([0]))
        candidates = np.array([[k, 0] for k in range(1, 5)])
        order = [choice.context for choice in suggest(known, contexts, [*range(5)], candidates, 4)]
        assert order[0] == 2
        assert order[1] == 4

    def test_gains_are_shares_of_squared_distances(self):
        evidence = self.evidence([0.0, 1.0, 3.0])
        contexts = [evidence.populations.pseudobulk(k) for k in range(3)]
        known = evidence.keep(np.array([0]))
        first, second = suggest(known, contexts, [*range(3)], np.array([[1, 0], [2, 0]]), 5)
        # Costs are 1 and 9; to measure the far one leaves 1.
        assert (first.context, second.context) == (2, 1)
        assert first.gain == pytest.approx(0.9, rel=0.01)
        assert second.gain == pytest.approx(0.1, rel=0.05)

    def test_twins_are_not_both_measured(self):
        evidence = self.evidence([0.0, 4.0, 4.0, 2.0])
        contexts = [evidence.populations.pseudobulk(k) for k in range(4)]
        known = evidence.keep(np.array([0]))
        order = [
            c.context
            for c in suggest(known, contexts, [*range(4)], np.array([[1, 0], [2, 0], [3, 0]]), 3)
        ]
        assert {order[0], order[1]} in ({1, 3}, {2, 3})

    def test_bulks_of_new_contexts(self):
        evidence = self.evidence([0.0, 1.0])
        new = [Pseudobulk(np.full(20, 9.0), np.full(20, 1e-4), np.ones(20), 50)]
        (choice,) = suggest(evidence, new, [None], np.array([[0, 0]]), 1)
        assert choice.gain == pytest.approx(1)
