"""How messages to the user are worded: values and lists in them, and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scvi import settings

MAX_LISTED = 20


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Check that an argument has one of its possible values."""
    if value not in choices:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, choices))}, not {shown(value)}."
        )


def shown(value: object) -> str:
    """Return a value as it is written in Python.

    Text in quotes, a number of NumPy as any other.
    """
    return repr(value.item() if isinstance(value, np.number | np.bool | np.str_) else value)


def format_list(values: Iterable[Any]) -> str:
    """Values in words, the first of them if there are many.

    Text stands as it is, unless it could be taken for a value of another kind (``"0"``,
    ``"True"``).
    """
    values = list(values)
    is_plain = all(isinstance(value, str) and not _is_ambiguous(value) for value in values)
    words = [str(value) if is_plain else shown(value) for value in values[:MAX_LISTED]]
    more = f", ... ({len(values)} in all)" if len(values) > MAX_LISTED else ""
    return (", ".join(words) + more) or "none"


def _is_ambiguous(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.strip() != text or text in ("", "None", "True", "False")
    return True


def warn(message: str) -> None:
    """Warn the user, pointing at the line that scvi-tools' settings ask for."""
    warnings.warn(message, UserWarning, stacklevel=settings.warnings_stacklevel)
