"""Labels of a query and of training that mean the same, whatever type a column has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

WHOLE = re.compile(r"-?\d+\.0")
"""A whole number as a floating-point one is written."""


def match_labels(labels: Iterable[Hashable], known: Sequence[Any]) -> dict[Any, int]:
    """Find labels among those of training, by value or by spelling.

    The numbers 1 and 1.0 and the texts ``"1"`` and ``"1.0"`` are spelled alike, and so are texts
    that differ by spaces at their ends or by case. Columns change in these ways when they are
    written and read again.

    Parameters
    ----------
    labels
        Distinct labels.
    known
        Distinct labels of training.

    Returns
    -------
    dict
        For each label that was found its position in ``known``.
    """
    labels = list(labels)
    position = {label: i for i, label in enumerate(known)}
    found = {label: position[label] for label in labels if label in position}
    by_spelling = _only(known)
    for spelling, label in _only(labels).items():
        if label not in found and spelling in by_spelling:
            found[label] = position[by_spelling[spelling]]
    return found


def _only(labels: Iterable[Hashable]) -> dict[str, Any]:
    """Labels by their spelling, of spellings that only one label has."""
    spelled = [(_spelling(label), label) for label in labels]
    counts = Counter(spelling for spelling, _ in spelled)
    return {spelling: label for spelling, label in spelled if counts[spelling] == 1}


def _spelling(label: Any) -> str:
    # A column of whole numbers with a missing value is one of floating-point numbers.
    if isinstance(label, float | np.floating) and float(label).is_integer():
        label = int(label)
    text = str(label).strip().casefold()
    return text.partition(".")[0] if WHOLE.fullmatch(text) else text
