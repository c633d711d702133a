"""Control cells are those of the training control, or the user is told what is taken for them."""

import numpy as np
import pandas as pd
import pytest

from spaperb.data import control_cells


def cells(values, dtype=object):
    return pd.Series(values, name="treatment", dtype=dtype)


@pytest.mark.parametrize("dtype", [object, "category", "string"])
def test_control_cells(dtype):
    found = control_cells(cells(["control", "IFN", None], dtype), "control", ["IFN"])
    np.testing.assert_array_equal(found, [True, False, False])


def test_spelled_otherwise():
    np.testing.assert_array_equal(control_cells(cells(["0", "1"]), 0, [1]), [True, False])
    np.testing.assert_array_equal(
        control_cells(cells(["Control ", "IFN"]), "control", ["IFN"]), [True, False]
    )


def test_a_perturbation_spelled_like_the_control_is_none():
    with pytest.warns(UserWarning, match="All cells have the condition 'a'"):
        assert control_cells(cells(["a", "a"]), "A", ["a"]).all()
    np.testing.assert_array_equal(control_cells(cells(["a", "A"]), "A", ["a"]), [False, True])


def test_numbers_are_shown_as_they_are_written():
    with pytest.warns(UserWarning, match="but all have 14: they"):
        control_cells(cells([14, 14], "int64"), 9, [4])


def test_a_column_without_values_says_nothing():
    assert control_cells(cells([None, np.nan]), "control", ["IFN"]).all()


def test_other_conditions_are_refused():
    with pytest.raises(ValueError, match=r"'control'.*\['treatment'\].*ctrl, IFN"):
        control_cells(cells(["ctrl", "IFN", "ctrl"]), "control", ["IFN"])


def test_one_other_value_is_told_of():
    with pytest.warns(UserWarning, match="all have 'ctrl': they are taken for control"):
        assert control_cells(cells(["ctrl", "ctrl"]), "control", ["IFN"]).all()
    with pytest.warns(UserWarning, match="added to what they are"):
        assert control_cells(cells(["IFN"]), "control", ["IFN"]).all()
