"""All scores together: their properties, blocks against the whole, floor and ceiling."""

import numpy as np
import pandas as pd
import pytest
from helpers import populations_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.decomposition import PCA

from spaperb import metrics, populations

PREDICTED, REAL, CONTROL = populations_of(0, shift=0.8)
PROJECTION = populations.fit_projection(CONTROL)
JUDGED = {
    "control_real": populations_of(1)[2],
    "others": np.random.default_rng(0).normal(size=(4, 12)),
}
NEED_OTHERS = ("discrimination", "centroid_accuracy", "pearson_delta_specific")
seeds = st.integers(0, 2**32 - 1)


class TestProperties:
    @settings(max_examples=20, deadline=None)
    @given(seeds)
    def test_identical_populations(self, seed):
        _, real, control = populations_of(seed)
        same = real.copy()
        pca = PCA(5).fit(np.concatenate([same, real, control]))
        p, s, c = (pca.transform(x) for x in (same, real, control))
        assert metrics.energy_distance(p, s) == pytest.approx(0, abs=1e-5)
        assert metrics.e_distance(p, s) == pytest.approx(0, abs=1e-9)
        assert metrics.mmd(p, s, c) == pytest.approx(0, abs=1e-9)
        assert metrics.mse_mean(same, real) == 0
        assert metrics.zero_fraction_error(same, real) == 0
        assert metrics.variance_ratio(same, real) == pytest.approx(1)
        assert metrics.r2_mean(same, real) == pytest.approx(1)
        assert metrics.r2_var(same, real) == pytest.approx(1)
        assert metrics.pearson_delta(same, real, control) == pytest.approx(1)
        assert metrics.wasserstein(same, real) == pytest.approx(0, abs=1e-12)
        assert metrics.correlation_error(same, real, np.arange(12)) == pytest.approx(0)

    @settings(max_examples=15, deadline=None)
    @given(seeds)
    def test_order_of_cells_and_genes_does_not_matter(self, seed):
        arrays = populations_of(seed, shift=0.5)
        rng = np.random.default_rng(seed)
        genes = rng.permutation(12)
        shuffled = [x[rng.permutation(len(x))][:, genes] for x in arrays]
        # All components: the first ones alone would depend on the sign and order of near ties.
        projection = PCA().fit(arrays[2])
        projection_shuffled = PCA().fit(arrays[2][:, genes])
        others = JUDGED["others"]
        (p, s, c), (p_, s_, c_) = arrays, shuffled
        first = metrics.score(p, s, c, projection, others=others)
        second = metrics.score(p_, s_, c_, projection_shuffled, others=others[:, genes])
        # Top genes may be tied; with 12 genes all are top genes.
        for name in first:
            same = pytest.approx(first[name], rel=1e-5, abs=1e-6, nan_ok=True)
            assert second[name] == same, name

    @settings(max_examples=15, deadline=None)
    @given(seeds)
    def test_direction_of_better(self, seed):
        """Half of the real cells predict the real cells better than control cells do."""
        rng = np.random.default_rng(seed)
        mean, change = rng.gamma(2, 1, 30), rng.normal(0, 2, 30)
        change[::3] = 0
        real = np.log1p(rng.poisson(mean * np.exp(change), (400, 30)))
        control = np.log1p(rng.poisson(mean, (200, 30)))
        projection = populations.fit_projection(np.concatenate([real, control]), 5)
        half = (real.mean(0) - control.mean(0)) / 2
        others = half + rng.normal(0, 0.1, (6, 30))
        judged = {"control_real": control[::2], "others": others}
        good = metrics.score(real[::2], real[1::2], control[1::2], projection, **judged)
        bad = metrics.score(control[1::2], real[1::2], control[1::2], projection, **judged)
        for name, higher in metrics.HIGHER_IS_BETTER.items():
            if higher is None:
                assert abs(np.log(good[name])) < 0.5
            elif name == "deg_direction":
                assert np.isnan(bad[name]), "no change calls no gene"
                assert good[name] > 0.8
            elif name != "deg_overlap":  # all 30 genes are top genes
                assert (good[name] > bad[name]) == higher, name

    def test_no_change_is_no_change(self):
        for control in (CONTROL, sparse.csr_matrix(CONTROL), CONTROL.astype(np.float32)):
            assert metrics.pearson_delta(control, REAL, CONTROL) == pytest.approx(0, abs=1e-6)

    def test_opposite_change(self):
        opposite = 2 * CONTROL.mean(0) - REAL.mean(0)
        assert metrics.pearson_delta(opposite[None], REAL, CONTROL) == pytest.approx(-1)


class TestInputs:
    @pytest.mark.parametrize("convert", [sparse.csr_matrix, sparse.csc_array, np.float32])
    def test_sparse_and_single_precision(self, convert):
        expected = metrics.score(PREDICTED, REAL, CONTROL, PROJECTION, **JUDGED)
        predicted, real, control = (convert(x) for x in (PREDICTED, REAL, CONTROL))
        judged = {**JUDGED, "control_real": convert(JUDGED["control_real"])}
        result = metrics.score(predicted, real, control, PROJECTION, **judged)
        assert result == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)

    def test_sums_are_in_double_precision(self):
        x = sparse.random(5000, 3, density=0.5, dtype=np.float32, random_state=0, format="csr")
        expected = x.toarray().astype(np.float64).mean(0)
        for matrix in (x, x.tocsc(), x.toarray()):
            np.testing.assert_allclose(populations.mean_expression(matrix), expected, rtol=1e-12)

    def test_blocks_do_not_change_the_scores(self, monkeypatch):
        expected = metrics.score(PREDICTED, REAL, CONTROL, PROJECTION, **JUDGED)
        monkeypatch.setattr(populations, "BLOCK_VALUES", 100)
        result = metrics.score(PREDICTED, REAL, CONTROL, PROJECTION, **JUDGED)
        assert result == pytest.approx(expected, nan_ok=True)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"predicted": PREDICTED[:, :5]}, "cells by the same genes; the shapes are.*27, 5"),
            ({"real": REAL[0]}, "cells by the same genes"),
            ({"real": REAL[:1]}, "`real` has 1 cells"),
            ({"predicted": np.full((3, 12), np.nan)}, "`predicted` holds NaN"),
            ({"control": np.full((3, 12), np.inf)}, "`control` holds NaN or infinite"),
            ({"control_real": CONTROL[:, 1:]}, "cells by the same genes.*28, 11"),
            ({"control_real": CONTROL[:1]}, "`control_real` has 1 cells"),
            ({"others": np.zeros((3, 11))}, r"\(n_others, 12\); its shape is \(3, 11\)"),
            ({"others": np.zeros(12)}, r"its shape is \(12,\)"),
            ({"others": np.full((2, 12), np.nan)}, "`others` holds NaN"),
        ],
    )
    def test_wrong_populations(self, change, match):
        arrays = {"predicted": PREDICTED, "real": REAL, "control": CONTROL, **change}
        with pytest.raises(ValueError, match=match):
            metrics.evaluate(**arrays, projection=PROJECTION)

    def test_cells_that_are_all_the_same_have_no_bandwidth(self):
        with pytest.raises(ValueError, match="all the same"):
            metrics.mmd(PREDICTED, np.ones((3, 12)), np.ones((3, 12)))


class TestEvaluate:
    def test_table(self):
        table = metrics.evaluate(PREDICTED, REAL, CONTROL, PROJECTION)
        assert table["metric"].tolist() == list(metrics.HIGHER_IS_BETTER)
        assert list(table.columns) == ["metric", "value", "floor", "ceiling", "scaled"]
        pd.testing.assert_frame_equal(
            table, metrics.evaluate(PREDICTED, REAL, CONTROL, PROJECTION)
        )
        rows = table.set_index("metric")
        expected = (rows["value"] - rows["floor"]) / (rows["ceiling"] - rows["floor"])
        chosen = ["pearson_delta", "mse_mean", "energy_distance", "mmd"]
        np.testing.assert_allclose(rows.loc[chosen, "scaled"], expected[chosen])
        assert np.isnan(rows.loc["variance_ratio", "scaled"])

    def test_a_ceiling_that_is_no_better_than_the_floor_gives_no_scale(self):
        """Half of the cells may be noisier than no change at all: the order would turn around."""
        table = pd.DataFrame(
            {
                "metric": ["mse_mean", "mse_mean", "pearson_delta", "pearson_delta"],
                "value": [4.0, 4.0, 0.5, 0.5],
                "floor": [7.0, 7.0, 0.0, 0.2],
                "ceiling": [13.0, 1.0, 0.8, 0.2],
            }
        )
        expected = [np.nan, 0.5, 0.625, np.nan]
        np.testing.assert_allclose(metrics.scaled(table), expected)

    def test_floor_is_no_change_and_scaled_0(self):
        table = metrics.evaluate(CONTROL, REAL, CONTROL, PROJECTION).set_index("metric")
        np.testing.assert_array_equal(table["value"], table["floor"])
        assert table.loc["mse_mean", "scaled"] == 0

    def test_ceiling_is_the_mean_over_random_halves_with_control_cells_of_their_own(self):
        before = JUDGED["control_real"]
        few = metrics.ceiling(REAL, CONTROL, PROJECTION, n_splits=2, seed=1, **JUDGED)
        rng = np.random.default_rng(1)
        errors, correlations = [], []
        for _ in range(2):
            one, other = (REAL[half] for half in np.array_split(rng.permutation(39), 2))
            errors.append(metrics.mse_mean(one, other))
            changes = one.mean(0) - CONTROL.mean(0), other.mean(0) - before.mean(0)
            correlations.append(np.corrcoef(*changes)[0, 1])
        assert few["mse_mean"] == pytest.approx(np.mean(errors))
        assert few["pearson_delta"] == pytest.approx(np.mean(correlations))

    def test_the_real_change_is_from_its_own_control_cells(self):
        before = JUDGED["control_real"]
        table = metrics.evaluate(PREDICTED, REAL, CONTROL, PROJECTION, 2, **JUDGED)
        change = PREDICTED.mean(0) - CONTROL.mean(0), REAL.mean(0) - before.mean(0)
        value = table.set_index("metric")["value"]
        assert value["pearson_delta"] == pytest.approx(np.corrcoef(*change)[0, 1])
        degs = populations.wilcoxon_scores(REAL, before)
        found = populations.wilcoxon_scores(PREDICTED, CONTROL)
        assert value["deg_recall"] == pytest.approx(metrics.deg_recall(found, degs))
        floor = table.set_index("metric")["floor"]
        assert floor["pearson_delta"] == 0
        assert floor["discrimination"] == 0.5

    def test_without_other_changes_there_is_nothing_to_tell_it_from(self):
        for others in (None, np.empty((0, 12))):
            table = metrics.evaluate(PREDICTED, REAL, CONTROL, PROJECTION, 2, others=others)
            missing = table.loc[table["value"].isna(), "metric"]
            assert set(missing) == set(NEED_OTHERS)
