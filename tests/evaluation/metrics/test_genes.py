"""Scores of gene lists, against independent sources and closed forms."""

import numpy as np
import pytest
import scanpy as sc
from anndata import AnnData
from helpers import populations_of
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import precision_score, recall_score

from spaperb import metrics, populations
from spaperb.evaluation.metrics import Changes

_, REAL, CONTROL = populations_of(0, shift=0.8)
SCORES_REAL = np.array([9.0, -8, 7, 0, 1, 0.5])
SCORES = np.array([6.0, 5, 0.1, -5, 0, 0.2])


def test_wilcoxon_scores():
    scores = populations.wilcoxon_scores(REAL, CONTROL)
    test = mannwhitneyu(REAL, CONTROL, use_continuity=False, method="asymptotic")
    expected = norm.isf(test.pvalue / 2) * np.sign(test.statistic - 39 * 28 / 2)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


def test_wilcoxon_score_of_a_constant_gene_is_0():
    assert populations.wilcoxon_scores(np.ones((5, 2)), np.ones((4, 2))).tolist() == [0, 0]


def test_deg_overlap():
    real = np.array([9.0, -8, 7, 0, 1])
    assert metrics.top_genes(real, 3).tolist() == [0, 1, 2]
    assert metrics.deg_overlap(np.array([0.0, 1, 5, -6, 7]), real, 3) == pytest.approx(1 / 3)
    assert metrics.deg_overlap(real, real, 100) == 1
    assert metrics.deg_overlap(real, real, 3) == 1


def test_deg_overlap_of_ties_does_not_depend_on_the_order_of_genes():
    real = np.array([9.0, -8, 7, 0, 1, 0.5])
    predicted = np.array([0.0, 3, 0, 0, 0, 0])
    expected = (1 + 2 * (2 / 5)) / 3  # gene 1, and of the five others two by chance
    for order in (slice(None), slice(None, None, -1)):
        found = metrics.deg_overlap(predicted[order], real[order], 3)
        assert found == pytest.approx(expected)
    assert metrics.deg_overlap(np.zeros(6), real, 3) == pytest.approx(0.5)


def test_sign_accuracy():
    changes = Changes(np.array([5.0, 1, 0, -1]), np.array([1.0, -1, 2, -2]))
    assert metrics.sign_accuracy(changes, np.arange(4)) == 0.5
    assert metrics.sign_accuracy(changes, np.array([0, 3])) == 1


def test_called_genes_are_scanpys():
    rng = np.random.default_rng(1)
    control = np.log1p(rng.poisson(2.0, (60, 80)))
    real = np.log1p(rng.poisson(2 + 2 * (np.arange(80) < 20), (60, 80)))
    both = AnnData(np.concatenate([real, control]))
    both.obs["of"] = ["real"] * 60 + ["control"] * 60
    sc.tl.rank_genes_groups(
        both, "of", groups=["real"], reference="control", method="wilcoxon", tie_correct=True
    )
    table = sc.get.rank_genes_groups_df(both, "real").set_index("names").loc[both.var_names]
    expected = (table["pvals_adj"] < 0.05).to_numpy()
    assert 15 < expected.sum() < 30
    called = metrics.called_genes(populations.wilcoxon_scores(real, control))
    np.testing.assert_array_equal(called, expected)


def test_few_genes_are_called_where_nothing_changes():
    rng = np.random.default_rng(2)
    n_found = [
        metrics.called_genes(
            populations.wilcoxon_scores(*np.log1p(rng.poisson(2.0, (2, 50, 200))))
        ).any()
        for _ in range(40)
    ]
    # By the promise of the false discovery rate, any gene at all in one of twenty.
    assert np.mean(n_found) < 0.16


def test_precision_and_recall():
    predicted, real = (metrics.called_genes(s) for s in (SCORES, SCORES_REAL))
    assert (predicted.sum(), real.sum()) == (3, 3)
    expected = precision_score(real, predicted), recall_score(real, predicted)
    assert expected == pytest.approx((2 / 3, 2 / 3))
    assert metrics.deg_precision(SCORES, SCORES_REAL) == pytest.approx(expected[0])
    assert metrics.deg_recall(SCORES, SCORES_REAL) == pytest.approx(expected[1])


def test_average_precision():
    # In order of the absolute score: genes 0 (real), 1 (real) and 3 (not) tied, 5 (not), 2 (real).
    expected = (1 / 1 + 2 * 0) / 3 + (1 / 3) * (2 / 3) + (1 / 3) * (3 / 5)
    assert metrics.deg_average_precision(SCORES, SCORES_REAL) == pytest.approx(expected)
    assert metrics.deg_average_precision(SCORES_REAL, SCORES_REAL) == 1


def test_an_empty_prediction_finds_nothing():
    nothing = np.zeros(6)
    assert metrics.deg_precision(nothing, SCORES_REAL) == 0
    assert metrics.deg_recall(nothing, SCORES_REAL) == 0
    assert metrics.deg_average_precision(nothing, SCORES_REAL) == pytest.approx(0.5)
    assert np.isnan(metrics.deg_direction(nothing, SCORES_REAL))


def test_without_real_genes_there_is_nothing_to_find():
    for function in (metrics.deg_precision, metrics.deg_recall, metrics.deg_average_precision):
        assert np.isnan(function(SCORES, np.zeros(6)))


def test_direction_is_of_the_genes_called_in_both():
    assert metrics.deg_direction(SCORES, SCORES_REAL) == 0.5  # genes 0 and 1
    assert metrics.deg_direction(-SCORES_REAL, SCORES_REAL) == 0


def test_gene_weights():
    weights = metrics.gene_weights(np.array([-3.0, 1, 2, 1]))
    np.testing.assert_allclose(weights, np.array([1, 0, 0.25, 0]) / 1.25)
    np.testing.assert_allclose(metrics.gene_weights(np.zeros(4)), 0.25)
