"""Intervals that hold where nothing was measured, the table they stand in, and its picture."""

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scvi
from helpers import QUIET, snapshot, train_small

from spaperb import SpaPerbModel, datasets, pl
from spaperb.evaluation.benchmark import Task, make_fold
from spaperb.evidence import Description, Episode
from spaperb.model._intervals import LEVELS, Intervals
from spaperb.module import HeldOut, InContextModule
from spaperb.module._in_context import Predicted
from spaperb.populations import Pseudobulk, mean_expression

TASK = Task("cell_type", "condition", "control", None, "cell_type", None, 0, split_controls=False)
COLUMNS = [
    "group",
    "gene",
    "mean_control",
    "mean_change",
    "lower",
    "upper",
    "log2_fold_change",
    "score",
    "responding",
    "agreement",
    "group_agreement",
    "distance",
]


def fit(train, **kwargs) -> SpaPerbModel:
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(train)
    model = SpaPerbModel(train, **kwargs)
    model.train(max_epochs=2, batch_size=2, **QUIET)
    return model


@pytest.fixture(scope="module")
def fold():
    return make_fold(datasets.simulated(n_cells=60, n_genes=200), "type_0", TASK)


@pytest.fixture(scope="module")
def model(fold):
    with pytest.warns(UserWarning, match="type_0"):
        return fit(fold.train.copy())


def half_width(table):
    return ((table["upper"] - table["lower"]) / 2).to_numpy()


class TestTable:
    def test_one_row_a_group_and_gene_the_surest_first(self, model, fold):
        before = snapshot(fold.train)
        table = model.predict_response(fold.train)
        assert snapshot(fold.train) == before
        assert table.columns.tolist() == COLUMNS
        assert len(table) == 8 * 200
        assert not table.isna().any().any()
        for _, of_group in table.groupby("group"):
            assert of_group["gene"].is_unique
            assert of_group["score"].abs().is_monotonic_decreasing
            np.testing.assert_allclose(
                of_group["score"], of_group["mean_change"] / half_width(of_group)
            )
        assert (
            (table["lower"] < table["mean_change"]) & (table["mean_change"] < table["upper"])
        ).all()
        assert table["responding"].between(0, 1).all()
        sign = np.sign(table["mean_change"]) * np.sign(table["log2_fold_change"])
        assert (sign >= 0).mean() > 0.99

    def test_it_agrees_with_the_predicted_cells(self, model, fold):
        control = fold.control.copy()
        table = model.predict_response(control).set_index("gene").loc[control.var_names]
        predicted = model.predict_stimulated(control, inplace=False, detection=False)
        x = control.X.toarray()
        unclipped = (predicted > 0).all(0)
        np.testing.assert_allclose(
            table["mean_change"][unclipped], (predicted - x).mean(0)[unclipped], atol=1e-4
        )
        np.testing.assert_allclose(table["mean_control"], x.mean(0), atol=1e-5)
        cells = model.predict_stimulated(control, inplace=False)
        changed = (np.abs(cells - x) > 0.1).mean(0)
        clear = table["mean_change"].abs().to_numpy() > 0.3
        # cells near the least level that counts fall on one side or the other
        differs = np.abs(table["responding"] - changed)[clear]
        assert (differs < 0.1).mean() > 0.9

    def test_groups_of_several_types_are_mixtures(self, model, fold):
        cells = fold.train[fold.train.obs["condition"] == "control"].copy()
        cells.obs["all"] = "all"
        whole = model.predict_response(cells, groupby="all").set_index("gene")["mean_change"]
        by_type = model.predict_response(cells).pivot(
            index="gene", columns="group", values="mean_change"
        )
        pd.testing.assert_series_equal(
            whole.sort_index(), by_type.mean(axis=1), check_names=False, atol=1e-9
        )

    def test_expression_without_a_logarithm(self, fold):
        cells = fold.train.copy()
        cells.X = cells.X.toarray() * 1e5
        about_cells = pytest.warns(UserWarning, match="looks not log-transformed")
        with about_cells, pytest.warns(UserWarning, match="type_0"):
            model = fit(cells)
        about_table = (
            "no column `log2_fold_change`, which transforms logarithms back: the training"
        )
        with pytest.warns(UserWarning, match=about_table) as record:
            table = model.predict_response(cells)
        assert len(record) == 1
        assert table["mean_control"].max() > 1e5
        assert table.columns.tolist() == [name for name in COLUMNS if "fold" not in name]
        assert not table.isna().any().any()

    def test_scaled_expression_has_no_silent_genes(self, fold, tmp_path):
        cells = fold.train.copy()
        sc.pp.scale(cells)
        about_cells = pytest.warns(UserWarning, match="negative values")
        with about_cells, pytest.warns(UserWarning, match="type_0"):
            model = fit(cells)
        about_table = "no column `log2_fold_change`, .* and no `responding`, .* look scaled"
        with pytest.warns(UserWarning, match=about_table) as record:
            table = model.predict_response(cells)
        assert len(record) == 1
        without = ("log2_fold_change", "responding")
        assert table.columns.tolist() == [name for name in COLUMNS if name not in without]
        assert not table.isna().any().any()
        pl.response(table, "type_3", save=tmp_path / "response.png")

    def test_cells_that_express_nothing_change_in_nothing(self, fold):
        cells = fold.train.copy()
        cells.X = np.zeros(cells.shape, dtype=np.float32)
        with pytest.warns(UserWarning, match="type_0"):
            table = fit(cells).predict_response(cells)
        assert (table[["mean_control", "mean_change", "log2_fold_change", "score"]] == 0).all(None)

    def test_the_measured_are_surer_than_the_hidden(self, model, fold):
        table = model.predict_response(fold.train)
        width = half_width(table)
        hidden = (table["group"] == "type_0").to_numpy()
        # what is left is the sampling noise of 60 cells, which every interval contains
        assert width[~hidden].mean() < 0.95 * width[hidden].mean()
        assert (table["distance"][~hidden] == 0).all()
        assert (table["distance"][hidden] > 0).all()

    def test_saved_with_the_model(self, model, fold, tmp_path):
        expected = model.predict_response(fold.control)
        model.save(tmp_path / "model")
        loaded = SpaPerbModel.load(tmp_path / "model", adata=False)
        assert loaded.state.predictor is not None
        pd.testing.assert_frame_equal(loaded.predict_response(fold.control), expected)

    def test_wider_at_a_higher_level(self, model, fold):
        half, most = (
            half_width(model.predict_response(fold.control, confidence_level=level))
            for level in (0.5, 0.95)
        )
        assert half.mean() < 0.6 * most.mean()

    def test_wrong_arguments(self, model, fold):
        with pytest.raises(ValueError, match="`confidence_level` must be between 0 and 1"):
            model.predict_response(fold.control, confidence_level=90)
        with pytest.raises(ValueError, match="no column 'clusters'"):
            model.predict_response(fold.control, groupby="clusters")
        with pytest.warns(UserWarning, match="type_0"):
            plain = train_small(fold.train.copy())
        with pytest.raises(ValueError, match="knows no error of its predictions"):
            plain.predict_response(fold.control)

    def test_too_few_contexts_have_the_networks_own_intervals(self):
        cells = datasets.simulated(n_cell_types=2, n_cells=20, n_genes=30)
        with pytest.warns(UserWarning, match="too few to train on"):
            model = fit(cells)
        assert not len(model.state.predictor.intervals.scales)
        table = model.predict_response(cells)
        assert np.isfinite(table["lower"]).all()
        assert (table["lower"] < table["upper"]).all()


def test_cells_unlike_anything_get_wider_intervals(model, fold):
    control = fold.control.copy()
    strange = control.copy()
    strange.X = strange.X[:, np.random.default_rng(0).permutation(200)]
    strange.obs["cell_type"] = control.obs["cell_type"] = "new"
    with pytest.warns(UserWarning, match="knows none"):
        usual = model.predict_response(control)
    with pytest.warns(UserWarning, match=r"do not trust their prediction.*new \("):
        other = model.predict_response(strange)
    assert usual["distance"].iloc[0] < 1 < other["distance"].iloc[0]
    assert half_width(other).mean() > 1.2 * half_width(usual).mean()


def test_quantiles_by_hand():
    """Errors of 1 to 40 over an expected size of 1, in one stratum of few genes."""
    n = 40
    module = InContextModule(n_networks=1)
    target = np.arange(1.0, n + 1)
    episode = Episode(
        Description._make([*[np.zeros((n, 1))] * 5, np.ones(n)]),
        np.zeros((n, 1)),
        target,
        np.zeros(n),
        1.0,
        np.arange(n) < 30,
    )
    predicted = Predicted(np.zeros(n), np.ones(n))
    intervals = Intervals.of([HeldOut(episode, predicted, predicted)], module)
    assert intervals.scales.tolist() == [1]
    # of the genes that some cell expresses
    for level in (0.1, 0.5, 0.9):
        q = np.interp(level, LEVELS, intervals.ratios[0])
        assert q == pytest.approx(np.quantile(target[:30], level), rel=1e-6)


def test_strata_are_tenths_of_the_genes_by_their_scale():
    """Errors of 1 or 3 times what was expected; between two tenths quantiles go over."""
    n = 1000
    rng = np.random.default_rng(0)
    scale = rng.permutation(np.arange(1.0, n + 1))
    ratio = np.where(scale <= n / 2, 1.0, 3.0)
    # u^2 = sigma^2 + error^2
    sigma, error = np.full(n, 3.0), np.full(n, 4.0)
    episode = Episode(
        Description._make([*[np.zeros((n, 1))] * 5, scale]),
        np.zeros((n, 1)),
        5 * ratio,
        error,
        1.0,
        np.ones(n, dtype=bool),
    )
    predicted = Predicted(np.zeros(n), sigma)
    held_out = [HeldOut(episode, predicted, predicted)]
    intervals = Intervals.of(held_out, InContextModule(n_networks=1))
    np.testing.assert_allclose(intervals.scales, 50.5 + 100 * np.arange(10))
    expected = np.repeat([[1.0], [3.0]], 5, axis=0) * np.ones(len(LEVELS))
    np.testing.assert_allclose(intervals.ratios, expected, rtol=1e-9)
    asked = np.array([1.0, 450.5, 500.5, 550.5, 5000.0])
    pseudobulk = Pseudobulk(np.ones(5), np.full(5, 8.0), np.ones(5), 2)
    half = intervals.half_width(np.full(5, 3.0), asked, pseudobulk, [pseudobulk], np.ones(1), 0.9)
    # The sampling variance of two means over two cells each is 8.
    np.testing.assert_allclose(half, np.array([1, 1, 2, 3, 3]) * np.sqrt(9 + 8), rtol=1e-9)


@pytest.mark.parametrize(
    ("level", "q"), [(0.5, 0.6744898), (0.9, 1.6448536), (0.95, 1.959964), (0.99, 2.5758293)]
)
def test_where_nothing_was_held_out_the_normal_distribution_says(level, q):
    intervals = Intervals.of([], InContextModule(n_networks=1))
    pseudobulk = Pseudobulk(np.ones(5), np.zeros(5), np.ones(5), 10**6)
    half = intervals.half_width(
        np.full(5, 2.0), np.ones(5), pseudobulk, [pseudobulk], np.ones(1), level
    )
    np.testing.assert_allclose(half, 2 * q, rtol=1e-5)


def test_held_out_changes_without_sampling_variance():
    """Genes that all cells of a type express alike are not certain, and no quantile is endless."""
    rng = np.random.default_rng(0)
    n_types, n_cells, n_genes = 8, 10, 40
    labels = np.repeat(np.arange(n_types), 2 * n_cells)
    arms = np.tile(np.repeat(["control", "stimulated"], n_cells), n_types)
    x = np.log1p(rng.poisson(2.0, (len(labels), n_genes))).astype("f4")
    # A fifth of the genes is expressed in one type alone, and in all its cells alike.
    for gene in range(n_types):
        x[:, gene] = labels == gene
    obs = pd.DataFrame({"condition": arms, "cell_type": [f"type_{i}" for i in labels]})
    cells = ad.AnnData(x, obs.set_index(obs.index.astype(str)).astype("category"))
    intervals = fit(cells).state.predictor.intervals
    assert len(intervals.scales) > 1
    quantiles = [np.interp(0.9, LEVELS, ratios) for ratios in intervals.ratios]
    assert 0.5 < min(quantiles)
    assert max(quantiles) < 4


def names_at_random(cells):
    """The same stimulus by three names."""
    names = cells.obs["condition"].astype(object).to_numpy(copy=True)
    stimulated = np.flatnonzero(names == "stimulated")
    names[stimulated] = np.random.default_rng(0).choice(["A", "B", "C"], len(stimulated))
    cells.obs["condition"] = pd.Categorical(names)
    return cells


@pytest.mark.slow
def test_intervals_of_a_type_in_which_nothing_was_measured():
    """Other perturbations in the left-out contexts must not help where the query has none."""
    coverage = []
    for seed in range(3):
        cells = datasets.simulated(n_cells=90, n_genes=150, shared_response=0.3, seed=seed)
        cells = names_at_random(cells)
        of_type = cells.obs["cell_type"] == "type_0"
        control = cells[of_type & (cells.obs["condition"] == "control")].copy()
        real = cells.X[(of_type & (cells.obs["condition"] == "A")).to_numpy()]
        train = cells[~of_type | (cells.obs["condition"] == "control")].copy()
        with pytest.warns(UserWarning, match="type_0"):
            table = fit(train).predict_response(control, "A")
        table = table.set_index("gene").loc[cells.var_names]
        change = mean_expression(real) - mean_expression(control.X)
        coverage.append(((table["lower"] <= change) & (change <= table["upper"])).mean())
    assert np.mean(coverage) > 0.8
    assert min(coverage) > 0.7


def test_intervals_are_those_of_queries_of_which_as_much_is_known(fold, tmp_path):
    """Of a type in which another perturbation was measured, or none."""
    cells = names_at_random(fold.train.copy())
    with pytest.warns(UserWarning, match="type_0"):
        model = fit(cells)
    learned = model.state.predictor
    assert not np.array_equal(learned.intervals.ratios, learned.intervals_unseen_context.ratios)
    model.save(tmp_path / "model")
    loaded = SpaPerbModel.load(tmp_path / "model", adata=False)
    for name, kind in (("type_0", "intervals_unseen_context"), ("type_1", "intervals")):
        of_type = (cells.obs["cell_type"] == name) & (cells.obs["condition"] == "control")
        control = cells[of_type].copy()
        expected = half_width(model.predict_response(control, "A"))
        np.testing.assert_array_equal(half_width(loaded.predict_response(control, "A")), expected)
        kept = getattr(learned, kind)
        try:
            setattr(learned, kind, kept._replace(ratios=2 * kept.ratios))
            wider = half_width(model.predict_response(control, "A"))
        finally:
            setattr(learned, kind, kept)
        np.testing.assert_allclose(np.sort(wider), np.sort(2 * expected))


def test_silent_genes_do_not_make_the_others_seem_sure(fold):
    rest = np.r_[:5]

    def widths(n_genes):
        cells = fold.train[:, :n_genes].copy()
        cells.X = cells.X.toarray()
        cells.X[:, len(rest) :] = 0
        with pytest.warns(UserWarning, match="type_0"):
            model = fit(cells)
        table = model.predict_response(cells).set_index("gene").loc[cells.var_names[rest]]
        return half_width(table)

    few, many = widths(6), widths(200)
    assert 0.8 < np.median(many / few) < 1.25


def combinations_of(n_types, seed):
    """Six perturbations and their fifteen pairs, nearly additive, in cells of some types."""
    rng = np.random.default_rng(seed)
    n_cells, n_genes = 40, 80
    singles = list("ABCDEF")
    names = [*singles, *map("+".join, itertools.combinations(singles, 2))]
    base = rng.gamma(2.0, 0.5, (n_types, n_genes))
    effects = {p: rng.normal(0, 0.6, n_genes) * (rng.random(n_genes) < 0.3) for p in singles}
    x, obs = [], []
    for t in range(n_types):
        for name in ["control", *names]:
            parts = [effects[p] for p in name.split("+") if p in effects]
            change = sum(parts) + rng.normal(0, 0.1 * len(parts), n_genes) if parts else 0.0
            x.append(rng.poisson(base[t] * np.exp(change), (n_cells, n_genes)))
            obs += [(name, f"type_{t}")] * n_cells
    cells = ad.AnnData(
        np.log1p(np.concatenate(x)).astype("f4"),
        pd.DataFrame(obs, columns=["condition", "cell_type"]).astype("category"),
    )
    cells.obs_names = cells.obs_names.astype(str)
    return cells


@pytest.mark.slow
def test_intervals_of_combinations_whose_parts_were_measured():
    """Learned from measured combinations.

    Tighter than those of a change of which nothing is known.
    """
    coverage, ratios = [], []
    cells = combinations_of(3, seed=0)
    hidden = ["A+B", "C+D", "E+F"]
    model = fit(cells[~cells.obs["condition"].isin(hidden)].copy())
    of_type = cells[cells.obs["cell_type"] == "type_0"]
    control = of_type[of_type.obs["condition"] == "control"].copy()
    for pair in hidden:
        real = of_type[of_type.obs["condition"] == pair].X
        table = model.predict_response(control, pair).set_index("gene").loc[cells.var_names]
        change = real.mean(0) - control.X.mean(0)
        coverage.append(((table["lower"] <= change) & (change <= table["upper"])).mean())
        noise = np.sqrt((real.var(0) + control.X.var(0)) / len(real))
        ratios.append(np.median(half_width(table) / (1.645 * noise)))
    assert 0.8 < np.mean(coverage) < 0.97
    assert min(coverage) > 0.7
    assert np.mean(ratios) < 2.5


def test_unseen_combinations_without_an_example_are_warned_of(fold):
    cells = names_at_random(fold.train.copy())
    with pytest.warns(UserWarning, match="type_0"):
        model = fit(cells)
    with pytest.warns(UserWarning, match="never measured, and neither was.*its intervals, less"):
        assert len(model.predict_response(fold.control, "A+B")) == 200


class TestEdges:
    def test_silent_genes_are_not_certain(self, fold):
        cells = fold.train.copy()
        cells.X = cells.X.toarray()
        cells.X[:, :5] = 0
        with pytest.warns(UserWarning, match="type_0"):
            table = fit(cells).predict_response(cells)
        assert np.isfinite(table["score"]).all()
        assert half_width(table).min() > 0.001

    def test_a_group_is_described_by_its_own_cells(self, model, fold):
        half = fold.control[::2].copy()
        table = model.predict_response(half).set_index("gene").loc[half.var_names]
        np.testing.assert_allclose(table["mean_control"], half.X.toarray().mean(0), atol=1e-5)
        whole = model.predict_response(fold.control).set_index("gene").loc[half.var_names]
        assert half_width(table).mean() > 1.05 * half_width(whole).mean()

    def test_missing_conditions_and_an_index_that_is_a_column(self, model, fold):
        cells = fold.train.copy()
        cells.obs["condition"] = cells.obs["condition"].astype("string")
        cells.obs.loc[cells.obs_names[:3], "condition"] = pd.NA
        cells.obs["barcode"] = cells.obs_names
        cells.obs.index.name = "barcode"
        assert len(model.predict_response(cells)) == 8 * 200


@pytest.mark.slow
def test_batches_of_a_cell_or_two_do_not_make_noise_a_response():
    cells = datasets.simulated(
        n_cells=60, n_genes=150, n_donors=30, n_cell_types=4, response_scale=0.0
    )
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(cells, batch_key="donor")
    model = SpaPerbModel(cells)
    model.train(**QUIET)
    table = model.predict_response(cells)
    evidence = model.state.predictor.evidence
    noise = np.abs(evidence.changes.shift[evidence.whole]).mean()
    assert table["mean_change"].abs().mean() < 0.35 * noise
    assert (table["score"].abs() > 1).mean() < 0.02


class TestPlot:
    def test_response(self, model, fold, tmp_path):
        table = model.predict_response(fold.control)
        ax = pl.response(table, save=tmp_path / "response.png")
        assert (tmp_path / "response.png").stat().st_size > 1000
        assert "distance" in ax.get_title()
        n_points = [len(points.get_offsets()) for points in ax.collections]
        assert sum(n_points) >= 200

    def test_one_group_of_several(self, model, fold):
        table = model.predict_response(fold.train)
        with pytest.raises(
            ValueError, match="one of the table's groups as `group=`: type_0, type_1"
        ):
            pl.response(table)
        assert "type_3" in pl.response(table, "type_3").get_title()
