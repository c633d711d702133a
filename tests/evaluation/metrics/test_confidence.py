"""Coverage, and error among what a model is surest of."""

import numpy as np
import pytest
from helpers import populations_of

from spaperb import metrics

_, REAL, CONTROL = populations_of(0, shift=0.8)


def test_coverage():
    change = REAL.mean(0) - CONTROL.mean(0)
    lower, upper = change - 0.1, change + 0.1
    lower[:3] += 0.2
    assert metrics.coverage(lower, upper, REAL, CONTROL) == pytest.approx(9 / 12)


class TestRiskCoverage:
    def test_curve(self):
        table = metrics.risk_coverage([4.0, 1.0, 3.0], [0.3, 0.2, 0.1])
        np.testing.assert_allclose(table["coverage"], [1 / 3, 2 / 3, 1])
        np.testing.assert_allclose(table["risk"], [3, 2, 8 / 3])
        np.testing.assert_allclose(table["best"], [1, 2, 8 / 3])

    def test_predictions_of_the_same_uncertainty_share_their_errors(self):
        errors, unsure = np.array([5.0, 1, 2, 8]), np.array([1.0, 1, 1, 0])
        expected = metrics.risk_coverage(errors, unsure)["risk"]
        mean = 8 / 3
        np.testing.assert_allclose(expected, [8, (8 + mean) / 2, (8 + 2 * mean) / 3, 4])
        for order in ([1, 0, 2, 3], [2, 1, 0, 3]):
            again = metrics.risk_coverage(errors[order], unsure[order])["risk"]
            np.testing.assert_allclose(again, expected)

    def test_area(self):
        rng = np.random.default_rng(0)
        errors = rng.gamma(1, 1, 4000)
        assert metrics.area_under_risk_coverage(errors, errors) == pytest.approx(1)
        assert metrics.area_under_risk_coverage(errors, np.ones(4000)) == pytest.approx(0)
        assert abs(metrics.area_under_risk_coverage(errors, rng.random(4000))) < 0.1
        assert metrics.area_under_risk_coverage(errors, -errors) < -0.5
        assert np.isnan(metrics.area_under_risk_coverage(np.ones(5), np.arange(5)))

    def test_area_by_simulation(self):
        """Errors drawn with the scale that the model says: the gain of knowing the scale."""
        rng = np.random.default_rng(1)
        scale = rng.gamma(2, 1, 5000)
        errors = np.abs(rng.normal(0, scale))
        area = metrics.area_under_risk_coverage(errors, scale)
        assert 0.3 < area < 0.9
        worse = metrics.area_under_risk_coverage(errors, scale * rng.lognormal(0, 1, 5000))
        assert 0 < worse < area

    @pytest.mark.parametrize(
        ("error", "uncertainty", "match"),
        [
            ([1.0, 2.0], [1.0], r"shapes are \(2,\) and \(1,\)"),
            ([], [], "one value a prediction"),
            ([1.0, np.nan], [1.0, 2.0], "`error` holds 1 NaN"),
            ([1.0, 2.0], [np.nan, np.nan], "`uncertainty` holds 2 NaN"),
        ],
    )
    def test_wrong_values(self, error, uncertainty, match):
        with pytest.raises(ValueError, match=match):
            metrics.risk_coverage(error, uncertainty)
