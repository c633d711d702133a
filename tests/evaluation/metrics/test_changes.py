"""Scores of the mean change, against independent sources and closed forms."""

import numpy as np
import pytest
import scanpy as sc
from anndata import AnnData
from helpers import populations_of
from scipy.stats import linregress, pearsonr

from spaperb import metrics
from spaperb.evaluation.metrics import Changes

PREDICTED, REAL, CONTROL = populations_of(0, shift=0.8)


def test_pearson_delta():
    change = [x.mean(0) - CONTROL.mean(0) for x in (PREDICTED, REAL)]
    assert metrics.pearson_delta(PREDICTED, REAL, CONTROL) == pytest.approx(
        pearsonr(*change).statistic
    )
    genes = np.array([1, 5, 7])
    some = [c[genes] for c in change]
    assert metrics.pearson_delta(PREDICTED, REAL, CONTROL, genes) == pytest.approx(
        pearsonr(*some).statistic
    )


def test_r2_mean():
    expected = linregress(PREDICTED.mean(0), REAL.mean(0)).rvalue ** 2
    assert metrics.r2_mean(PREDICTED, REAL) == pytest.approx(expected)


def test_mse_mean():
    assert metrics.mse_mean(np.full((3, 4), 2.0), np.full((5, 4), 0.5)) == pytest.approx(2.25)


def test_weighted_mse():
    predicted, real = np.full((3, 2), [1.0, 5.0]), np.full((4, 2), [0.0, 2.0])
    assert metrics.weighted_mse(predicted, real, np.array([3.0, 1.0])) == pytest.approx(3)


def test_weighted_r2_delta():
    changes = Changes.of(PREDICTED, REAL, CONTROL)
    weights = np.random.default_rng(0).random(12)
    mean = np.average(changes.real, weights=weights)
    unexplained = weights @ (changes.real - changes.predicted) ** 2
    expected = 1 - unexplained / (weights @ (changes.real - mean) ** 2)
    assert metrics.weighted_r2_delta(changes, weights) == pytest.approx(expected)


def test_weighted_r2_delta_sees_the_size_and_a_correlation_does_not():
    changes = Changes.of(PREDICTED, REAL, CONTROL)
    half = Changes(changes.real / 2, changes.real)
    weights = np.ones(12)
    assert np.corrcoef(*half)[0, 1] == pytest.approx(1)
    assert metrics.weighted_r2_delta(half, weights) < 0.8
    assert metrics.weighted_r2_delta(Changes(changes.real, changes.real), weights) == 1


def test_log_fold_change_error_is_of_scanpys_fold_changes():
    """Of genes with many counts, where its pseudocount and ours make no difference."""
    rng = np.random.default_rng(0)
    predicted, real, control = (np.log1p(rng.poisson(200 * m, (50, 6))) for m in (2, 3, 1))

    def fold_changes(cells):
        both = AnnData(np.concatenate([cells, control]))
        both.obs["of"] = ["cells"] * 50 + ["control"] * 50
        sc.tl.rank_genes_groups(both, "of", groups=["cells"], reference="control")
        table = sc.get.rank_genes_groups_df(both, "cells").set_index("names")
        return table.loc[both.var_names, "logfoldchanges"].to_numpy()

    genes = np.array([0, 2, 5])
    expected = np.abs(fold_changes(predicted) - fold_changes(real))[genes].mean()
    result = metrics.log_fold_change_error(predicted, real, control, genes)
    assert result == pytest.approx(expected, rel=1e-3)
    assert metrics.log_fold_change_error(real, real, control, genes) == 0
    assert np.isnan(metrics.log_fold_change_error(real, real, control, genes[:0]))


def test_scaled_expression_has_no_fold_change():
    scaled = np.full((5, 2), -0.5)
    assert np.isnan(metrics.log_fold_change_error(scaled, scaled, scaled, np.array([0])))


def test_a_gene_that_nothing_expresses_has_no_fold_change():
    silent = np.zeros((5, 1))
    assert metrics.log_fold_change_error(silent, silent, silent, np.array([0])) == 0


class TestControlCellsUsedTwice:
    """Cells without any response: whoever finds one has found the noise of the control cells."""

    @staticmethod
    def correlations(n: int) -> np.ndarray:
        """Of changes that are noise, with shared and with split control cells."""
        rng = np.random.default_rng(n)
        found = []
        for _ in range(20):
            predicted, real, one, other = np.log1p(rng.poisson(2.0, (4, n, 300)))
            shared = metrics.pearson_delta(predicted, real, one)
            split = metrics.pearson_delta(predicted, real, one, control_real=other)
            found.append((shared, split))
        return np.mean(found, axis=0)

    @pytest.mark.parametrize("n", [10, 100])
    def test_shared_they_correlate_with_themselves_and_split_they_do_not(self, n):
        shared, split = self.correlations(n)
        # Half of the variance of both changes is that of the control cells.
        assert shared == pytest.approx(0.5, abs=0.05)
        assert abs(split) < 0.05
