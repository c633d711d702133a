"""Names of types that several modules share."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Expression: TypeAlias = Any
"""Cells by genes: a NumPy array, or a SciPy sparse matrix or array, which bring no types."""

IntArray: TypeAlias = npt.NDArray[np.int64]

FloatArray: TypeAlias = npt.NDArray[np.float64]
