"""Each metric against an independent source, its properties, and blocks against the whole."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance, linregress, mannwhitneyu, norm, pearsonr
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import StandardScaler

from spaperb import metrics, populations


def cells(seed: int, n_genes: int = 12, shift: float = 0.0) -> tuple[np.ndarray, ...]:
    """Predicted, real and control cells with zeros, as log-normalised expression has."""
    rng = np.random.default_rng(seed)
    mean = rng.gamma(2, 1, n_genes)
    change = rng.normal(0, 1, n_genes)
    return tuple(
        np.log1p(rng.poisson(mean * np.exp(c * change), (n, n_genes)))
        for n, c in ((27, shift), (39, 1.0), (28, 0.0))
    )


PREDICTED, REAL, CONTROL = cells(0, shift=0.8)
PROJECTION = populations.fit_projection(CONTROL)
seeds = st.integers(0, 2**32 - 1)


def project(*arrays):
    pca = PCA(5).fit(np.concatenate(arrays))
    return tuple(pca.transform(x) for x in arrays)


class TestAgainstIndependentSources:
    def test_pearson_delta(self):
        change = [x.mean(0) - CONTROL.mean(0) for x in (PREDICTED, REAL)]
        assert metrics.pearson_delta(PREDICTED, REAL, CONTROL) == pytest.approx(
            pearsonr(*change).statistic
        )
        genes = np.array([1, 5, 7])
        some = [c[genes] for c in change]
        assert metrics.pearson_delta(PREDICTED, REAL, CONTROL, genes) == pytest.approx(
            pearsonr(*some).statistic
        )

    def test_r2_mean(self):
        expected = linregress(PREDICTED.mean(0), REAL.mean(0)).rvalue ** 2
        assert metrics.r2_mean(PREDICTED, REAL) == pytest.approx(expected)

    def test_r2_var(self):
        variances = [StandardScaler().fit(x).var_ for x in (PREDICTED, REAL)]
        expected = linregress(*variances).rvalue ** 2
        assert metrics.r2_var(PREDICTED, REAL) == pytest.approx(expected)

    def test_mse_mean(self):
        assert metrics.mse_mean(np.full((3, 4), 2.0), np.full((5, 4), 0.5)) == pytest.approx(2.25)

    def test_energy_distance_in_one_dimension_is_scipys(self):
        for gene in range(3):
            p, s = PREDICTED[:, [gene]], REAL[:, [gene]]
            expected = energy_distance(p.ravel(), s.ravel()) ** 2
            assert metrics.energy_distance(p, s) == pytest.approx(expected, abs=1e-9)

    def test_energy_distance_in_many_dimensions(self):
        p, s = PREDICTED, REAL
        expected = 2 * cdist(p, s).mean() - cdist(p, p).mean() - cdist(s, s).mean()
        assert metrics.energy_distance(p, s) == pytest.approx(expected)

    def test_e_distance_is_the_energy_distance_of_squares(self):
        p, s = PREDICTED, REAL
        d = {
            k: cdist(*k_, "sqeuclidean").mean()
            for k, k_ in zip("ab", ((p, s), (p, p)), strict=True)
        }
        expected = 2 * d["a"] - d["b"] - cdist(s, s, "sqeuclidean").mean()
        assert metrics.e_distance(p, s) == pytest.approx(expected)

    def test_mmd(self):
        p, s, c = project(PREDICTED, REAL, CONTROL)
        median = np.median(cdist(s, c))

        def kernel(a, b):
            gammas = [1 / (2 * h**2) for h in (median / 2, median, 2 * median)]
            return np.mean([rbf_kernel(a, b, gamma=g).mean() for g in gammas])

        expected = kernel(p, p) + kernel(s, s) - 2 * kernel(p, s)
        assert metrics.mmd(p, s, c) == pytest.approx(expected)

    def test_variance_ratio(self):
        expressed = REAL.mean(0) > 0.05
        expected = np.median(PREDICTED.var(0)[expressed] / REAL.var(0)[expressed])
        assert metrics.variance_ratio(PREDICTED, REAL) == pytest.approx(expected)
        assert metrics.variance_ratio(2 * REAL, REAL) == pytest.approx(4)
        assert np.isnan(metrics.variance_ratio(REAL, 0 * REAL))

    def test_zero_fraction_error(self):
        expected = np.abs((PREDICTED == 0).mean(0) - (REAL == 0).mean(0)).mean()
        assert metrics.zero_fraction_error(PREDICTED, REAL) == pytest.approx(expected)
        assert metrics.zero_fraction_error(REAL + 1, 0 * REAL) == 1

    def test_wilcoxon_scores(self):
        scores = populations.wilcoxon_scores(REAL, CONTROL)
        test = mannwhitneyu(REAL, CONTROL, use_continuity=False, method="asymptotic")
        expected = norm.isf(test.pvalue / 2) * np.sign(test.statistic - 39 * 28 / 2)
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)

    def test_wilcoxon_score_of_a_constant_gene_is_0(self):
        assert populations.wilcoxon_scores(np.ones((5, 2)), np.ones((4, 2))).tolist() == [0, 0]

    def test_deg_overlap(self):
        real = np.array([9.0, -8, 7, 0, 1])
        assert metrics.top_genes(real, 3).tolist() == [0, 1, 2]
        assert metrics.deg_overlap(np.array([0.0, 1, 5, -6, 7]), real, 3) == pytest.approx(1 / 3)
        assert metrics.deg_overlap(real, real, 100) == 1

    def test_sign_accuracy(self):
        control, real = np.zeros((2, 4)), np.array([[1.0, -1, 2, -2]] * 2)
        predicted = np.array([[5.0, 1, 0, -1]] * 2)
        assert metrics.sign_accuracy(predicted, real, control, np.arange(4)) == 0.5

    def test_coverage(self):
        change = REAL.mean(0) - CONTROL.mean(0)
        lower, upper = change - 0.1, change + 0.1
        lower[:3] += 0.2
        assert metrics.coverage(lower, upper, REAL, CONTROL) == pytest.approx(9 / 12)

    def test_pertpys_e_distance(self):
        pertpy = pytest.importorskip(
            "pertpy", reason="pertpy is not installed; it has its own environment"
        )
        p, s = project(PREDICTED, REAL)
        theirs = pertpy.tl.Distance("edistance", obsm_key="X_pca")(p, s)
        # They divide the sums within a population by n (n - 1), we by n^2: the distance itself is
        # ours.
        n, m = len(p), len(s)
        bias = cdist(p, p, "sqeuclidean").mean() / (n - 1) + cdist(s, s, "sqeuclidean").mean() / (
            m - 1
        )
        assert metrics.e_distance(p, s) == pytest.approx(theirs + bias, rel=1e-4)


class TestProperties:
    @settings(max_examples=20, deadline=None)
    @given(seeds)
    def test_identical_populations(self, seed):
        _, real, control = cells(seed)
        same = real.copy()
        p, s, c = project(same, real, control)
        assert metrics.energy_distance(p, s) == pytest.approx(0, abs=1e-5)
        assert metrics.e_distance(p, s) == pytest.approx(0, abs=1e-9)
        assert metrics.mmd(p, s, c) == pytest.approx(0, abs=1e-9)
        assert metrics.mse_mean(same, real) == 0
        assert metrics.zero_fraction_error(same, real) == 0
        assert metrics.variance_ratio(same, real) == pytest.approx(1)
        assert metrics.r2_mean(same, real) == pytest.approx(1)
        assert metrics.r2_var(same, real) == pytest.approx(1)
        assert metrics.pearson_delta(same, real, control) == pytest.approx(1)

    @settings(max_examples=15, deadline=None)
    @given(seeds)
    def test_order_of_cells_and_genes_does_not_matter(self, seed):
        arrays = cells(seed, shift=0.5)
        rng = np.random.default_rng(seed)
        genes = rng.permutation(12)
        shuffled = [x[rng.permutation(len(x))][:, genes] for x in arrays]
        # All components: the first ones alone would depend on the sign and order of near ties.
        projection = PCA().fit(arrays[2])
        projection_shuffled = PCA().fit(arrays[2][:, genes])
        first = metrics.score(arrays[0], arrays[1], arrays[2], projection)
        second = metrics.score(shuffled[0], shuffled[1], shuffled[2], projection_shuffled)
        # Top genes may be tied; with 12 genes all are top genes.
        for name in first:
            assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), name

    @settings(max_examples=15, deadline=None)
    @given(seeds)
    def test_direction_of_better(self, seed):
        """Half of the real cells predict the real cells better than control cells do."""
        rng = np.random.default_rng(seed)
        mean, change = rng.gamma(2, 1, 30), rng.normal(0, 2, 30)
        real = np.log1p(rng.poisson(mean * np.exp(change), (400, 30)))
        control = np.log1p(rng.poisson(mean, (200, 30)))
        projection = populations.fit_projection(np.concatenate([real, control]), 5)
        good = metrics.score(real[::2], real[1::2], control, projection)
        bad = metrics.score(control, real[1::2], control, projection)
        for name, higher in metrics.HIGHER_IS_BETTER.items():
            if higher is None:
                assert abs(np.log(good[name])) < 0.5
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
        expected = metrics.score(PREDICTED, REAL, CONTROL, PROJECTION)
        predicted, real, control = (convert(x) for x in (PREDICTED, REAL, CONTROL))
        result = metrics.score(predicted, real, control, PROJECTION)
        assert result == pytest.approx(expected, rel=1e-4, abs=1e-5)

    def test_sums_are_in_double_precision(self):
        x = sparse.random(5000, 3, density=0.5, dtype=np.float32, random_state=0, format="csr")
        expected = x.toarray().astype(np.float64).mean(0)
        for matrix in (x, x.tocsc(), x.toarray()):
            np.testing.assert_allclose(populations.mean_expression(matrix), expected, rtol=1e-12)

    def test_blocks_do_not_change_the_scores(self, monkeypatch):
        expected = metrics.score(PREDICTED, REAL, CONTROL, PROJECTION)
        monkeypatch.setattr(populations, "BLOCK_VALUES", 100)
        result = metrics.score(PREDICTED, REAL, CONTROL, PROJECTION)
        assert result == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"predicted": PREDICTED[:, :5]}, "cells by the same genes; the shapes are.*27, 5"),
            ({"real": REAL[0]}, "cells by the same genes"),
            ({"real": REAL[:1]}, "`real` has 1 cells"),
            ({"predicted": np.full((3, 12), np.nan)}, "`predicted` holds NaN"),
            ({"control": np.full((3, 12), np.inf)}, "`control` holds NaN or infinite"),
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

    def test_floor_is_no_change_and_scaled_0(self):
        table = metrics.evaluate(CONTROL, REAL, CONTROL, PROJECTION).set_index("metric")
        np.testing.assert_array_equal(table["value"], table["floor"])
        assert table.loc["mse_mean", "scaled"] == 0

    def test_ceiling_is_the_mean_over_random_halves(self):
        few = metrics.ceiling(REAL, CONTROL, PROJECTION, n_splits=2, seed=1)
        rng = np.random.default_rng(1)
        scores = []
        for _ in range(2):
            one, other = np.array_split(rng.permutation(39), 2)
            scores.append(metrics.mse_mean(REAL[one], REAL[other]))
        assert few["mse_mean"] == pytest.approx(np.mean(scores))


def test_classifier_tells_what_can_be_told_apart():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 200, 5))
    assert abs(metrics.classifier_auc(one, other) - 0.5) < 0.1
    assert metrics.classifier_auc(one, other + 5) > 0.99
