import numpy as np
import pytest
from scipy import sparse

from spaperb.validation import ROWS_AT_ONCE, ExpressionKind, expression_kind, listed, shown


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([[0.5, 1.0]], ExpressionKind(nonnegative=True, counts=False)),
        ([[2.0, 1.0]], ExpressionKind(nonnegative=True, counts=True)),
        ([[-2.0, 1.0]], ExpressionKind(nonnegative=False, counts=False)),
        ([[0.0, 0.0]], ExpressionKind(nonnegative=True, counts=False)),
    ],
)
@pytest.mark.parametrize("convert", [np.array, sparse.csr_matrix, sparse.csc_matrix])
def test_kinds(values, kind, convert):
    assert expression_kind(convert(values)) == kind


@pytest.mark.parametrize("row", [0, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 3])
def test_every_block_is_looked_at(row):
    x = np.ones((2 * ROWS_AT_ONCE + 5, 2))
    x[row, 1] = -0.5
    assert expression_kind(x) == ExpressionKind(nonnegative=False, counts=False)
    x[row, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        expression_kind(x)


def test_long_lists_are_cut():
    assert listed([]) == "none"
    assert listed(range(3)) == "0, 1, 2"
    assert listed(str(i) for i in range(100)).endswith("'19', ... (100 in all)")
    assert listed(range(100)).endswith("18, 19, ... (100 in all)")


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
    assert listed(values) == words


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), ("0", "'0'"), (np.int64(0), "0"), (np.str_("0"), "'0'")]
)
def test_a_value_is_shown_as_it_is_written(value, text):
    assert shown(value) == text
