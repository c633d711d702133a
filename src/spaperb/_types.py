"""Names of types, and of the arms of cells, that several rooms share."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Expression: TypeAlias = Any
"""Cells by genes: a NumPy array, or a SciPy sparse matrix or array, which bring no types."""

IntArray: TypeAlias = npt.NDArray[np.int64]

FloatArray: TypeAlias = npt.NDArray[np.float64]

CONTROL, STIMULATED, NEITHER = 0, 1, -1
"""What a cell's condition makes of it (its *arm*): the values of the ``arms`` arrays.

Cells of further perturbations have the arms STIMULATED + 1, STIMULATED + 2, ...
"""
