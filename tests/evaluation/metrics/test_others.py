"""Scores that tell a change from others, against loops and what they are meant to punish."""

import numpy as np
import pytest
from scipy.spatial.distance import cosine, euclidean
from scipy.stats import pearsonr

from spaperb import metrics
from spaperb.evaluation.metrics import Changes

RNG = np.random.default_rng(0)
COMMON = RNG.normal(0, 2, 40)
OTHERS = COMMON + RNG.normal(0, 1, (9, 40))
REAL = COMMON + RNG.normal(0, 1, 40)
NOISY = Changes(REAL + RNG.normal(0, 1.2, 40), REAL)


@pytest.mark.parametrize(
    ("function", "distance"),
    [(metrics.discrimination, cosine), (metrics.centroid_accuracy, euclidean)],
)
class TestRank:
    def test_counts_others_further_away(self, function, distance):
        own = distance(NOISY.predicted, REAL)
        for others in (OTHERS, OTHERS[:1], np.concatenate([OTHERS, NOISY.predicted[None]])):
            expected = np.mean([distance(NOISY.predicted, other) > own for other in others])
            assert function(NOISY, others) == pytest.approx(expected)

    def test_the_right_one_is_first(self, function, distance):
        assert function(Changes(REAL, REAL), OTHERS) == 1

    def test_the_mean_change_is_at_chance(self, function, distance):
        """A prediction that is the same for all perturbations can't tell them apart."""
        rng = np.random.default_rng(1)
        all_changes = COMMON + rng.normal(0, 1, (60, 40))
        mean = all_changes.mean(axis=0)
        scores = [
            function(Changes(mean, all_changes[i]), np.delete(all_changes, i, axis=0))
            for i in range(60)
        ]
        assert np.mean(scores) == pytest.approx(0.5, abs=1e-9)

    def test_ties_count_half(self, function, distance):
        assert function(Changes(REAL, REAL), np.stack([REAL, -REAL])) == 0.75


def test_no_change_discriminates_nothing():
    assert metrics.discrimination(Changes(np.zeros(40), REAL), OTHERS) == 0.5


def test_pearson_delta_specific():
    common = OTHERS.mean(axis=0)
    expected = pearsonr(NOISY.predicted - common, REAL - common).statistic
    assert metrics.pearson_delta_specific(NOISY, OTHERS) == pytest.approx(expected)


def test_the_mean_of_the_others_knows_nothing_specific():
    mean = Changes(OTHERS.mean(axis=0), REAL)
    assert pearsonr(*mean).statistic > 0.8
    assert metrics.pearson_delta_specific(mean, OTHERS) == 0
