"""Values and lists in words."""

import numpy as np
import pytest

from spaperb._messages import format_list, shown


def test_long_lists_are_cut():
    assert format_list([]) == "none"
    assert format_list(range(3)) == "0, 1, 2"
    assert format_list(str(i) for i in range(100)).endswith("'19', ... (100 in all)")
    assert format_list(range(100)).endswith("18, 19, ... (100 in all)")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["B cell", "T, cell"], "B cell, T, cell"),
        (["0", "1"], "'0', '1'"),
        (["0", 0, np.int64(0), 0.0], "'0', 0, 0, 0.0"),
        ([np.float32(0.5), np.bool(True), np.str_("a")], "0.5, True, 'a'"),
        (["B", True], "'B', True"),
        (["B", "nan"], "'B', 'nan'"),
        (["B", float("nan")], "'B', nan"),
        (["B", ""], "'B', ''"),
        (["B", "B "], "'B', 'B '"),
        (["B", "None"], "'B', 'None'"),
    ],
)
def test_values_are_told_apart(values, words):
    assert format_list(values) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), ("0", "'0'"), (np.int64(0), "0"), (np.str_("0"), "'0'")],
    ids=["int", "str", "int64", "str_"],
)
def test_a_value_is_shown_as_it_is_written(value, text):
    assert shown(value) == text
