"""Labels that mean the same are found, and none that does not."""

import numpy as np
import pandas as pd
import pytest

from spaperb.data import match_labels


@pytest.mark.parametrize(
    ("labels", "known", "expected"),
    [
        ([1, 2], [2, 1], {1: 1, 2: 0}),
        (["1", "2"], [1, 2], {"1": 0, "2": 1}),
        ([1.0, 2.0], ["1", "2"], {1.0: 0, 2.0: 1}),
        ([np.int64(3)], ["3"], {3: 0}),
        ([np.float32(3)], ["3"], {3.0: 0}),
        (["1.0", "-2.0"], [1, -2], {"1.0": 0, "-2.0": 1}),
        (["1", "v2.0"], ["1.0", "v2"], {"1": 0}),
        (["1.0", "1"], [1], {}),
        (["T cells ", "b cells"], ["B cells", "T cells"], {"T cells ": 1, "b cells": 0}),
        ([True], ["True"], {True: 0}),
        (["NK"], ["B", "T"], {}),
        # Two that are spelled alike are told apart by their value, or not at all.
        (["a"], ["a", "A"], {"a": 0}),
        (["A "], ["a", "A"], {}),
        (["a ", "a"], ["a"], {"a": 0}),
        (["a ", " a"], ["a"], {}),
        (["1"], [1, "1"], {"1": 1}),
    ],
)
def test_match_labels(labels, known, expected):
    assert match_labels(labels, known) == expected


def test_missing_values_match_nothing():
    assert match_labels([pd.Timestamp("2020-01-01")], ["2020-01-01 00:00:00"]) == {
        pd.Timestamp("2020-01-01"): 0
    }
    assert match_labels([], ["a"]) == {}
