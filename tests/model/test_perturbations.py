"""Several perturbations, combinations, doses and batches.

Names, and the model from set-up to prediction.
"""

import warnings
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from helpers import (
    IN_CONTEXT,
    PUBLISHED,
    QUIET,
    SMALL,
    drop_layers,
    layer_names,
    small_cells,
    snapshot,
)

from spaperb import SpaPerbModel, datasets
from spaperb._types import CONTROL, NEITHER
from spaperb.data._perturbations import Perturbations


def of(*values, **kwargs) -> Perturbations:
    return Perturbations.of(values, "control", **{"separator": "+", **kwargs})


class TestNames:
    def test_each_value_is_a_perturbation(self):
        p = of("A", "control", "B")
        assert (p.names, p.parts) == (["A", "B"], [(0,), (1,)])
        assert p.arms.tolist() == [1, CONTROL, 2]

    def test_others_take_no_part(self):
        p = of("A", "control", "B", stimulated=["B"])
        assert (p.names, p.arms.tolist()) == (["B"], [NEITHER, CONTROL, 1])

    def test_numbers_as_names(self):
        p = Perturbations.of(np.array([0, 1, 2]), 0)
        assert p.find(np.int64(2)).number == p.find(2).number == 1
        with pytest.raises(ValueError, match=r"^'2' is not a perturbation.*It knows: 1, 2\."):
            p.find("2")
        with pytest.raises(ValueError, match=r"^7 is not a perturbation"):
            p.find(np.int64(7))

    def test_combinations_have_parts(self):
        p = of("A", "A+B", "B", "control")
        assert p.parts == [(0,), (0, 2), (2,)]
        assert p.composition.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]]

    def test_the_order_of_parts_has_no_meaning_and_the_control_is_no_part(self):
        p = of("A+control", "B", "A+B", "B+A", "control")
        assert p.names == ["A+control", "B", "A+B"]
        assert p.arms.tolist() == [1, 2, 3, 3, CONTROL]
        assert p.find("A").number == p.find("control+A").number == 0
        assert p.find("B+A").number == 2

    @pytest.mark.parametrize("name", ["IFN+", "+", "CD3+CD28"])
    def test_a_separator_by_accident(self, name):
        p = of("A", name, "control")
        assert p.names == ["A", name]
        assert p.parts == [(0,), (1,)]
        assert p.find(name).parts == (1,)

    def test_no_separator(self):
        p = of("A", "B", "A+B", "control", separator=None)
        assert p.parts == [(0,), (1,), (2,)]

    def test_numbers_are_names(self):
        p = Perturbations.of([0, 1, 2], 0, separator="+")
        assert p.names == [1, 2]
        assert p.find(2).number == 1

    def test_unseen_combinations_of_seen_parts(self):
        target = of("A", "B", "C", "control").find("C+A")
        assert (target.number, target.parts) == (None, (0, 2))

    @pytest.mark.parametrize(("name", "unknown"), [("D", "'D' is not"), ("A+D", "'D', of 'A")])
    def test_unknown_names_list_the_known(self, name, unknown):
        with pytest.raises(ValueError, match=rf"{unknown}.*It knows: A, B"):
            of("A", "B", "control").find(name)


def several(n_cells: int = 40, n_genes: int = 60) -> ad.AnnData:
    """Three types; A and B change genes of their own, "A+B" both; B is rare."""
    rng = np.random.default_rng(0)
    base = small_cells(n_cells=3 * n_cells, n_genes=n_genes)
    cells = base[base.obs["condition"] == "control"].copy()
    turn = np.tile(np.repeat(["control", "A", "B", "A+B"], [n_cells, n_cells, 10, 20]), 5)
    names = pd.Series("", index=cells.obs_names)
    for cell_type in cells.obs["cell_type"].unique():
        of_type = (cells.obs["cell_type"] == cell_type).to_numpy()
        names[of_type] = turn[: of_type.sum()]
    x = cells.X.toarray()
    for part, genes in (("A", slice(0, 10)), ("B", slice(10, 20))):
        has = names.str.contains(part).to_numpy()
        x[has, genes] += 1 + 0.1 * rng.random((has.sum(), 10)).astype("f4")
    cells.X = x
    cells.obs["condition"] = pd.Categorical(names)
    return cells


@pytest.fixture(scope="module")
def data():
    return several()


def fit(adata, setup=None, max_epochs=3, **kwargs) -> SpaPerbModel:
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(adata, **(setup or {}))
    model = SpaPerbModel(adata, **kwargs)
    batch_size = {"published": 32, "in_context": 2}[model.objective]
    model.train(max_epochs=max_epochs, batch_size=batch_size, **QUIET)
    return model


@pytest.fixture(scope="module")
def model(data):
    return fit(data.copy())


def control_of(adata, cell_type="type_0") -> ad.AnnData:
    keep = (adata.obs["cell_type"] == cell_type) & (adata.obs["condition"] == "control")
    return adata[keep].copy()


def by_condition(adata):
    for name in adata.obs["condition"].unique():
        yield name, adata[adata.obs["condition"] == name]


def change(model, cells, *args, **kwargs):
    predicted = model.predict_stimulated(cells, *args, inplace=False, **kwargs)
    return predicted.mean(0) - np.asarray(cells.X).mean(0)


def mean_change(model, cells, *args, **kwargs):
    """Of each gene, as the table has it."""
    table = model.predict_response(cells, *args, **kwargs).set_index("gene")
    return table.loc[cells.var_names, "mean_change"].to_numpy()


class TestPublishedCase:
    """One perturbation is trained and predicted as if there could be no others."""

    def test_however_it_is_set_up(self, adata):
        others = adata.copy()
        others.obs["condition"] = others.obs["condition"].cat.add_categories(["A", "A+B"])
        setups = [
            (adata.copy(), {}),
            (adata.copy(), {"stimulated": "stimulated", "combination_separator": None}),
            (others, {"stimulated": ["stimulated"]}),
        ]
        for objective in ("published", "in_context"):
            models = [fit(cells, setup, **SMALL[objective]) for cells, setup in setups]
            states = [model.module.state_dict() for model in models]
            assert not [key for key in states[0] if "perturbation" in key or "composition" in key]
            for state in states[1:]:
                assert state.keys() == states[0].keys()
                for key in state:
                    assert torch.equal(state[key], states[0][key])

    def test_it_needs_no_name(self, trained, query):
        expected = trained.predict_stimulated(query, inplace=False)
        named = trained.predict_stimulated(query, "stimulated", inplace=False)
        np.testing.assert_array_equal(named, expected)
        assert trained.perturbations == ["stimulated"]

    def test_its_layer_keeps_its_name(self, trained, query):
        trained.predict_stimulated(query, "stimulated")
        assert layer_names(query) == ["spaperb_stimulated"]


class TestPrediction:
    def test_each_perturbation_changes_its_genes(self, data, model):
        cells = control_of(data)
        a, b, both = (change(model, cells, name) for name in ("A", "B", "A+B"))
        assert a[:10].mean() > 0.5 > abs(a[10:20].mean())
        assert b[10:20].mean() > 0.5 > abs(b[:10].mean())
        assert min(both[:10].mean(), both[10:20].mean()) > 0.5

    @pytest.mark.filterwarnings("ignore:.*was never measured")
    def test_an_unseen_combination_adds_up(self, data):
        seen = data[data.obs["condition"] != "A+B"].copy()
        model = fit(seen)
        assert model.perturbations == ["A", "B"]
        with pytest.warns(UserWarning, match=r"B\+A was never measured, .* are added up"):
            model.predict_stimulated(control_of(data), "B+A", inplace=False)
        # Ten cells of B are trusted in part, and in the combination no less.
        a, b, both = (change(model, control_of(data), name) for name in ("A", "B", "B+A"))
        assert both[:10].mean() > 0.75 * a[:10].mean() > 0.5
        assert both[10:20].mean() > 0.75 * b[10:20].mean() > 0.3
        # less noise than in the sum of the measured shifts, of 10 cells of B say
        of_type = seen[seen.obs["cell_type"] == "type_0"]
        means = {name: cells.X.mean(0) for name, cells in by_condition(of_type)}
        added = means["A"] + means["B"] - 2 * means["control"]
        assert np.abs(both[20:]).mean() < 0.8 * np.abs(added[20:]).mean()

    @pytest.mark.filterwarnings("ignore:.*was never measured")
    @pytest.mark.parametrize("settings", [IN_CONTEXT, {}], ids=["scratch", "pretrained"])
    def test_without_an_example_it_is_the_sum_of_its_parts(self, data, settings):
        model = fit(data[data.obs["condition"] != "A+B"].copy(), **settings)
        cells = control_of(data)
        a, b = (mean_change(model, cells, name) for name in "AB")
        with pytest.warns(UserWarning, match="never measured.* are added up"):
            both = mean_change(model, cells, "A+B")
        np.testing.assert_allclose(both, a + b, atol=1e-9)
        assert np.abs(both).max() > 0.5
        with pytest.warns(UserWarning, match="never measured.* are added up"):
            twice = mean_change(model, cells, "A+A")
        np.testing.assert_allclose(twice, 2 * a, atol=1e-9)
        one, again, other = (
            model.predict_stimulated(cells, "A+B", give_mean=False, seed=s, inplace=False)
            for s in (0, 0, 1)
        )
        np.testing.assert_array_equal(one, again)
        assert not np.allclose(one, other)

    @pytest.mark.filterwarnings("ignore:.*was never measured")
    @pytest.mark.parametrize("is_measured", [True, False])
    def test_the_order_of_parts_has_no_meaning(self, data, model, is_measured):
        if not is_measured:
            model = fit(data[data.obs["condition"] != "A+B"].copy())
        cells = control_of(data)
        one, other = (
            model.predict_stimulated(cells, name, inplace=False) for name in ("A+B", "B+A")
        )
        np.testing.assert_array_equal(one, other)

    @pytest.mark.filterwarnings("ignore:A.B was never measured")
    def test_a_combination_is_as_far_from_training_as_its_farther_part(self, data):
        is_b = (data.obs["cell_type"] == "type_0") & (data.obs["condition"] == "B")
        model = fit(data[~is_b & (data.obs["condition"] != "A+B")].copy())
        a, b, both = (
            model.predict_response(control_of(data), name)["distance"].iloc[0]
            for name in ("A", "B", "A+B")
        )
        assert a == 0 < b == both

    def test_composition_is_learned_from_measured_combinations(self, data):
        """Where "A+B" does less than A and B, "A+C" is predicted to do less than A and C."""
        cells = data.copy()
        x, rng = cells.X, np.random.default_rng(1)
        names = cells.obs["condition"].astype(object).to_numpy(copy=True)
        as_c = np.flatnonzero(names == "A")[::2]
        x[as_c, 20:30] += 1 + 0.1 * rng.random((len(as_c), 10)).astype("f4")
        x[as_c, :10] -= 1
        names[as_c] = "C"
        both = names == "A+B"
        x[both, :20] = np.maximum(x[both, :20] - 0.7, 0)
        cells.obs["condition"] = pd.Categorical(names)
        model = fit(cells)
        known = control_of(data)
        alone = sum(change(model, known, name, detection=False) for name in ("A", "C"))
        together = change(model, known, "A+C", detection=False)
        assert 0 < together[20:30].mean() < 0.9 * alone[20:30].mean()
        # in a type that training did not see, what perturbations have in common is that of near
        # types
        bare = ad.AnnData(
            known.X, obs=pd.DataFrame({"cell_type": "new"}, known.obs_names), var=known.var
        )
        with pytest.warns(UserWarning, match="knows none of the cell types"):
            elsewhere = change(model, bare, "A+C", detection=False)
        assert np.corrcoef(elsewhere, together)[0, 1] > 0.8

    def test_a_screen_in_one_cell_line(self, data):
        """With one context nothing is trained, and measurements are improved all the same."""
        line = data[(data.obs["cell_type"] == "type_0") & (data.obs["condition"] != "A+B")].copy()
        with pytest.warns(UserWarning, match="too few to train on"):
            model = fit(line)
        known = control_of(line)
        # A has 40 cells and is kept, B ten and is shrunk: chance explains much of what ten cells
        # say
        for name, genes, least in (("A", slice(0, 10), 0.75), ("B", slice(10, 20), 0.2)):
            truth = np.zeros(line.n_vars)
            truth[genes] = 1.05
            measured = line.X[(line.obs["condition"] == name).to_numpy()].mean(0) - known.X.mean(0)
            found = mean_change(model, known, name)
            assert least < found[genes].mean() / 1.05 < 1.05
            assert ((found - truth) ** 2).mean() < 0.5 * ((measured - truth) ** 2).mean()

    @pytest.mark.slow
    def test_another_perturbation_in_the_same_context_helps(self):
        """A and B are the same stimulus, which each type responds to in a way of its own."""
        cells = datasets.simulated(
            n_cell_types=6, n_cells=120, n_genes=150, shared_response=0.3, seed=1
        )
        names = cells.obs["condition"].astype(object).to_numpy(copy=True)
        stimulated = np.flatnonzero(names == "stimulated")
        names[stimulated] = np.random.default_rng(0).choice(["A", "B"], len(stimulated))
        cells.obs["condition"] = pd.Categorical(names)
        known = control_of(cells)
        truth = (known.layers["true_stimulated"] - known.layers["true_control"]).mean(0)
        drop_layers(cells)
        of_type = (cells.obs["cell_type"] == "type_0").to_numpy()
        errors = []
        for hidden in (["B"], ["A", "B"]):
            train = cells[~(of_type & np.isin(names, hidden))].copy()
            with warnings.catch_warnings():
                # Said where all stimulated cells of the type are hidden.
                warnings.filterwarnings("ignore", "These cell types have no control and stim")
                model = fit(train, max_epochs=10)
            found = mean_change(model, known, "B")
            errors.append(((found - truth) ** 2).mean())
        assert errors[0] < 0.6 * errors[1]

    def test_a_type_that_never_saw_the_perturbation(self, data):
        hidden = (data.obs["cell_type"] == "type_0") & (data.obs["condition"] == "B")
        model = fit(data[~hidden].copy())
        b = change(model, control_of(data), "B")
        assert b[10:20].mean() > 0.4 > abs(b[:10].mean())

    def test_a_new_type_without_columns(self, data, model):
        cells = control_of(data)
        bare = ad.AnnData(cells.X, var=cells.var)
        b = change(model, bare, "B")
        assert b[10:20].mean() > 0.5 > abs(b[:10].mean())

    def test_layers_are_named_after_perturbations(self, data, model):
        cells = control_of(data)
        model.predict_stimulated(cells, "A")
        model.predict_stimulated(cells, "A+B", key_added="mine")
        assert layer_names(cells) == ["spaperb_A", "mine"]
        assert cells.uns["spaperb"]["spaperb_A"]["perturbation"] == "A"
        assert cells.uns["spaperb"]["mine"]["perturbation"] == "A+B"

    def test_slashes_do_not_reach_the_file(self, data, tmp_path):
        cells = data.copy()
        cells.obs["condition"] = cells.obs["condition"].cat.rename_categories({"A": "IL1A/B"})
        with pytest.warns(UserWarning, match="taken for one perturbation"):
            model = fit(cells)
        query = control_of(cells)
        model.predict_stimulated(query, "IL1A/B")
        query.write_h5ad(tmp_path / "cells.h5ad")
        assert "spaperb_IL1A_B" in ad.read_h5ad(tmp_path / "cells.h5ad").layers

    def test_names_that_are_numbers(self, data):
        cells = data[data.obs["condition"].isin(["control", "A", "B"])].copy()
        numbers = cells.obs["condition"].map({"control": 0.0, "A": 1.5, "B": -2.0})
        cells.obs["condition"] = numbers.astype(float)
        model = fit(cells, {"control": 0.0})
        query = cells[cells.obs["condition"] == 0].copy()
        for name in (1.5, -2.0):
            model.predict_stimulated(query, name)
        assert layer_names(query) == ["spaperb_1.5", "spaperb_-2.0"]

    def test_no_layer_takes_the_place_of_another(self, data):
        cells = data.copy()
        names = {"A": "C/D", "B": "C_D"}
        cells.obs["condition"] = cells.obs["condition"].cat.rename_categories(names)
        with pytest.warns(UserWarning, match="taken for one perturbation"):
            model = fit(cells)
        query = control_of(cells)
        for name in names.values():
            with pytest.raises(ValueError, match=r"share the layer spaperb_C_D.*`key_added=`"):
                model.predict_stimulated(query, name)
            assert model.predict_stimulated(query, name, inplace=False).shape == query.shape
            model.predict_stimulated(query, name, key_added=f"of {len(query.layers)}")

    def test_saved_and_loaded(self, data, model, tmp_path):
        model.save(tmp_path / "model")
        loaded = SpaPerbModel.load(tmp_path / "model", adata=False)
        cells = control_of(data)
        for name in ("A", "A+B"):
            np.testing.assert_array_equal(
                loaded.predict_stimulated(cells, name, inplace=False),
                model.predict_stimulated(cells, name, inplace=False),
            )

    def test_latent_effects_are_the_mean_measured_changes(self, data, model):
        table = model.get_delta_representation()
        assert table.index.tolist() == ["A", "A+B", "B"]
        pd.testing.assert_frame_equal(table, model.get_delta_representation())
        z = model.get_latent_representation()
        keys = [data.obs[key].astype(str).to_numpy() for key in ("condition", "cell_type")]
        means = pd.DataFrame(z).groupby(keys).mean()
        for name in table.index:
            shift = means.loc[name] - means.loc["control"]
            np.testing.assert_allclose(table.loc[name], shift.mean(), atol=1e-4)

    def test_latent_effects_of_published_networks(self, data):
        published = fit(data.copy(), **PUBLISHED)
        table = published.get_delta_representation()
        assert table.shape == (3, PUBLISHED["n_latent"])
        pd.testing.assert_frame_equal(table, published.get_delta_representation())
        # linear in the parts, whatever V_delta is
        one = published.get_delta_representation(n_samples=1)
        np.testing.assert_allclose(
            one.loc["A"] - one.loc["B"], table.loc["A"] - table.loc["B"], atol=1e-5
        )

    def test_which_one(self, data, model):
        with pytest.raises(ValueError, match=r"knows 3 perturbations: A, A\+B, B"):
            model.predict_stimulated(control_of(data))
        with pytest.raises(ValueError, match="'C' is not a perturbation"):
            model.predict_stimulated(control_of(data), "C")
        with pytest.raises(ValueError, match="without doses and takes no `dose`"):
            model.predict_stimulated(control_of(data), "A", dose=1.0)


class TestSetup:
    def test_a_combination_without_its_parts_is_named_once(self, data):
        cells = data[data.obs["condition"] != "B"].copy()
        with pytest.warns(UserWarning, match=r"taken for one perturbation.*: A\+B") as record:
            SpaPerbModel.setup_anndata(cells)
        assert len([w for w in record if "one perturbation" in str(w.message)]) == 1
        model = SpaPerbModel(cells, **PUBLISHED)
        model.train(max_epochs=1, batch_size=32, **QUIET)
        with pytest.raises(ValueError, match=r"'B', of 'B\+A', is not"):
            model.predict_stimulated(control_of(data), "B+A")

    def test_perturbations_without_a_pair_are_named_once_and_left_out(self, data):
        cells = data.copy()
        lonely = cells[(cells.obs["condition"] == "B") & (cells.obs["cell_type"] == "type_0")]
        lonely = lonely.copy()
        lonely.obs["cell_type"] = "type_9"
        lonely.obs["condition"] = "C"
        cells = ad.concat([cells, lonely], index_unique="-")
        with pytest.warns(UserWarning, match="left out: C") as record:
            SpaPerbModel.setup_anndata(cells)
        assert len([w for w in record if "left out" in str(w.message)]) == 1
        model = SpaPerbModel(cells, **PUBLISHED)
        model.train(max_epochs=1, batch_size=32, **QUIET)
        assert model.perturbations == ["A", "A+B", "B"]
        with pytest.raises(ValueError, match="'C' is not a perturbation"):
            model.predict_stimulated(control_of(data), "C")

    def test_a_list_of_perturbations(self, data):
        cells = data.copy()
        with pytest.raises(ValueError, match="No cell has 'D'"):
            SpaPerbModel.setup_anndata(cells, stimulated=["A", "D"])
        with pytest.raises(ValueError, match="`control` and `stimulated` are both"):
            SpaPerbModel.setup_anndata(cells, stimulated=["A", "control"])
        SpaPerbModel.setup_anndata(cells, stimulated=np.array(["A", "B"]))
        assert SpaPerbModel(cells, **PUBLISHED).perturbations == ["A", "B"]

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*was never measured")
    def test_a_thousand_perturbations(self):
        cells = small_cells(n_cell_types=2, n_cells=2000, n_genes=20)
        names = cells.obs["condition"].astype(object).to_numpy(copy=True)
        stimulated = np.flatnonzero(names == "stimulated")
        names[stimulated] = [f"p{i % 1000}" for i in range(len(stimulated))]
        cells.obs["condition"] = pd.Categorical(names)
        before = snapshot(cells)["X"]
        SpaPerbModel.setup_anndata(cells)
        model = SpaPerbModel(cells, **IN_CONTEXT)
        model.train(max_epochs=1, **QUIET)
        assert len(model.perturbations) == 1000
        n_components = len(model.state.predictor.evidence.components)
        assert model.get_delta_representation().shape == (1000, n_components)
        predicted = model.predict_stimulated(cells[:20], "p3+p7", inplace=False)
        assert np.isfinite(predicted).all()
        assert snapshot(cells)["X"] == before


CURVE: dict[str, Any] = {
    "doses": [0.1, 1.0, 10.0],
    "half_dose": 1.0,
    "n_cells": 90,
    "n_genes": 200,
}


class TestDoses:
    @pytest.fixture(scope="class")
    @classmethod
    def series(cls):
        return datasets.simulated(n_cell_types=4, **CURVE)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, series):
        hidden = (series.obs["cell_type"] == "type_0") & (series.obs["condition"] != "control")
        with pytest.warns(UserWarning, match="take no part in training: type_0"):
            return fit(series[~hidden].copy(), {"dose_key": "dose"})

    def query(self, series):
        cells = control_of(series)
        drop_layers(cells)
        cells.X = cells.X.toarray()
        return cells

    def test_the_known_curve_is_recovered(self, series, model):
        cells = self.query(series)
        full = datasets.simulated(n_cell_types=4, **CURVE | {"doses": [1000.0]})
        full = control_of(full)
        direction = full.layers["true_stimulated"].mean(0) - full.layers["true_control"].mean(0)
        asked = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
        with pytest.warns(UserWarning, match="doses from 0.1 to 10; .* 0.03 is a guess"):
            effects = [change(model, cells, dose=dose) @ direction for dose in asked]
        assert (np.diff(effects) > 0).all()
        # half of the effect of 10 (10 / 11 of all) is where it should be, between 0.3 and 3
        half = np.interp(effects[-1] / 2, effects, np.log(asked))
        assert abs(half - np.log(10 / 12)) < 1.0

    def test_no_dose_changes_nothing_and_a_huge_one_as_the_highest(self, series, model):
        cells = self.query(series)
        with pytest.warns(UserWarning, match="guess"):
            nothing = model.predict_stimulated(cells, dose=0.0, inplace=False)
        np.testing.assert_array_equal(nothing, cells.X)
        with pytest.warns(UserWarning, match="guess"):
            most = model.predict_stimulated(cells, dose=1e6, inplace=False)
        highest = model.predict_stimulated(cells, dose=10.0, inplace=False)
        np.testing.assert_array_equal(most, highest)

    @pytest.mark.filterwarnings("ignore:stimulated was measured at doses")
    def test_below_the_lowest_dose_a_change_falls_in_proportion(self, series, model):
        cells = self.query(series)
        lowest = mean_change(model, cells, dose=0.1)
        assert np.abs(lowest).max() > 0.1
        for dose in (0.05, 0.01, 0.0):
            np.testing.assert_allclose(mean_change(model, cells, dose=dose), dose / 0.1 * lowest)

    @pytest.mark.parametrize(("low", "high"), [(0.1, 1.0), (1.0, 10.0)])
    def test_between_two_doses_a_change_is_their_mean_by_logarithm(self, series, model, low, high):
        cells = self.query(series)
        of_low, of_high = (mean_change(model, cells, dose=dose) for dose in (low, high))
        for share in (0.5, 0.2):
            dose = low ** (1 - share) * high**share
            expected = (1 - share) * of_low + share * of_high
            np.testing.assert_allclose(mean_change(model, cells, dose=dose), expected, atol=1e-9)

    def test_doses_of_test_cells_are_not_known(self, series):
        """A dose that only test cells had is as much a guess as any other."""
        cells = series.copy()
        stimulated = np.flatnonzero((cells.obs["condition"] == "stimulated").to_numpy())
        doses = cells.obs["dose"].to_numpy(copy=True)
        doses[stimulated[::10]] = 100.0
        cells.obs["dose"] = doses
        test = np.flatnonzero(doses == 100.0)
        train = np.setdiff1d(np.arange(cells.n_obs), test)
        SpaPerbModel.setup_anndata(cells, dose_key="dose")
        model = SpaPerbModel(cells)
        split = [train, np.array([], dtype=int), test]
        model.train(1, datasplitter_kwargs={"external_indexing": split}, **QUIET)
        query = control_of(cells)
        with pytest.warns(UserWarning, match="doses from 0.1 to 10; .* 100 is a guess"):
            found = mean_change(model, query, dose=100.0)
        np.testing.assert_array_equal(found, mean_change(model, query, dose=10.0))

    def test_a_measured_dose_in_single_precision_is_measured(self, series):
        cells, single = series.copy(), series.copy()
        single.obs["dose"] = single.obs["dose"].astype("float32")
        double, single = (fit(x, {"dose_key": "dose"}) for x in (cells, single))
        query = self.query(series)
        for dose in (0.1, np.float32(0.1)):
            np.testing.assert_allclose(
                mean_change(single, query, dose=dose),
                mean_change(double, query, dose=0.1),
                atol=1e-4,
            )

    def test_doses_that_differ_by_rounding_alone(self, series):
        cells = series.copy()
        doses = cells.obs["dose"].to_numpy(copy=True)
        doses[::2] = doses[::2].astype("float32")
        cells.obs["dose"] = doses
        query = self.query(series)
        found, expected = (
            mean_change(fit(x, {"dose_key": "dose"}), query, dose=0.1)
            for x in (cells, series.copy())
        )
        np.testing.assert_allclose(found, expected, atol=1e-6)

    @pytest.mark.filterwarnings("ignore:stimulated was measured at doses")
    def test_a_perturbation_without_a_dose_above_0(self):
        cells = small_cells(n_cell_types=4)
        cells.obs["dose"] = 0.0
        model = fit(cells, {"dose_key": "dose"}, max_epochs=1)
        query = self.query(cells)
        nothing = model.predict_stimulated(query, dose=0.0, inplace=False)
        np.testing.assert_array_equal(nothing, query.X)
        assert np.abs(change(model, query, dose=1.0)).max() > 0.1

    def test_layers_and_records(self, series, model):
        cells = self.query(series)
        model.predict_stimulated(cells, dose=0.5)
        assert layer_names(cells) == ["spaperb_stimulated_0.5"]
        assert cells.uns["spaperb"]["spaperb_stimulated_0.5"]["dose"] == 0.5

    def test_latent_effects_are_of_the_highest_dose_or_of_one(self, model):
        highest = model.get_delta_representation()
        pd.testing.assert_frame_equal(highest, model.get_delta_representation(dose=10.0))
        assert not highest.equals(model.get_delta_representation(dose=1.0))

    def test_the_dose_must_be_given_and_make_sense(self, series, model):
        with pytest.raises(ValueError, match=r"pass `dose=`.*doses from 0\.1 to 10"):
            model.predict_stimulated(self.query(series))
        for dose in (-1, np.nan, np.inf, "high"):
            with pytest.raises(ValueError, match="`dose` must be a number of at least 0"):
                model.predict_stimulated(self.query(series), dose=dose)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda d: d.where(d != 1.0), "120 of 360 have none"),
            (lambda d: d.where(d != 1.0, -1.0), "and 120 a negative"),
            (lambda d: d.astype(str), "must hold numbers"),
        ],
    )
    def test_bad_doses_in_training(self, series, spoil, message):
        cells = series.copy()
        cells.obs["dose"] = spoil(cells.obs["dose"])
        before = snapshot(cells)
        with pytest.raises(ValueError, match=message):
            SpaPerbModel.setup_anndata(cells, dose_key="dose")
        assert snapshot(cells) == before
        with pytest.raises(ValueError, match="no column 'doses'"):
            SpaPerbModel.setup_anndata(cells, dose_key="doses")

    def test_control_cells_need_no_dose(self, series):
        cells = series.copy()
        cells.obs.loc[cells.obs["condition"] == "control", "dose"] = np.nan
        model = fit(cells, {"dose_key": "dose"})
        assert np.isfinite(model.history["train_loss"].to_numpy(dtype=float)).all()

    def test_doses_without_end_are_grouped(self, series):
        cells = series.copy()
        rng = np.random.default_rng(0)
        cells.obs["dose"] *= rng.uniform(0.9, 1.1, cells.n_obs)
        model = fit(cells, {"dose_key": "dose"})
        changes = model.state.predictor.evidence.changes
        assert len(np.unique(changes.dose)) == 10


class TestBatches:
    @pytest.fixture(scope="class")
    @classmethod
    def confounded(cls):
        """Two batches, the second with mostly stimulated cells and five genes of its own."""
        cells = datasets.simulated(n_cell_types=3, n_cells=80, n_genes=100, response_scale=0.0)
        rng = np.random.default_rng(0)
        in_second = rng.random(cells.n_obs) < np.where(
            cells.obs["condition"] == "control", 0.2, 0.8
        )
        cells.X = cells.X.toarray()
        cells.X[in_second, :5] += 2
        cells.obs["lane"] = pd.Categorical(np.where(in_second, "second", "first"))
        return cells

    def test_changes_are_measured_within_batches(self, confounded):
        cells = control_of(confounded)
        apart = fit(confounded.copy(), {"batch_key": "lane"})
        mixed = fit(confounded.copy())
        assert change(mixed, cells, detection=False)[:5].mean() > 0.8
        assert abs(change(apart, cells, detection=False)[:5].mean()) < 0.2

    def test_networks_know_the_batch(self, confounded):
        model = fit(confounded.copy(), {"batch_key": "lane"}, **PUBLISHED)
        assert model.module.n_batch == 2
        cells = control_of(confounded)
        one, other = cells.copy(), cells.copy()
        one.obs["lane"], other.obs["lane"] = "first", "second"
        assert not np.allclose(change(model, one), change(model, other))
        assert model.get_latent_representation().shape[0] == confounded.n_obs

    def test_in_context_the_batch_of_a_query_says_nothing(self, confounded):
        model = fit(confounded.copy(), {"batch_key": "lane"})
        cells = control_of(confounded)
        expected = model.predict_stimulated(cells, inplace=False)
        other, none = cells.copy(), cells.copy()
        other.obs["lane"] = "third"
        del none.obs["lane"]
        for query in (other, none):
            np.testing.assert_array_equal(model.predict_stimulated(query, inplace=False), expected)

    def test_an_unknown_batch_is_the_average_one(self, confounded):
        model = fit(confounded.copy(), {"batch_key": "lane"}, **PUBLISHED)
        cells = control_of(confounded)
        unknown, none, known = cells.copy(), cells.copy(), cells
        unknown.obs["lane"] = "third"
        del none.obs["lane"]
        with pytest.warns(UserWarning, match=r"none of the 1 batches.*third.*first, second"):
            of_unknown = change(model, unknown)
        np.testing.assert_array_equal(of_unknown, change(model, none))
        assert not np.allclose(of_unknown, change(model, known))

    def test_batches_of_another_type_are_those_of_training(self, confounded):
        """The number 1 and the text "1" are one batch."""
        numbered = confounded.copy()
        numbered.obs["lane"] = (numbered.obs["lane"] == "second").astype(int)
        model = fit(numbered, {"batch_key": "lane"}, **PUBLISHED)
        cells = control_of(numbered)
        as_text = cells.copy()
        as_text.obs["lane"] = cells.obs["lane"].astype(str)
        np.testing.assert_array_equal(change(model, as_text), change(model, cells))

    def test_one_batch_is_no_covariate(self, adata):
        adata.obs["lane"] = "only"
        state = fit(adata, {"batch_key": "lane"}).module.state_dict()
        plain = fit(small_cells()).module.state_dict()
        assert all(torch.equal(state[key], plain[key]) for key in plain)
