"""What an AnnData was set up with: codes of cells, perturbations."""

from __future__ import annotations

from typing import Any

import numpy as np
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager

from spaperb._types import IntArray
from spaperb.data._perturbations import Perturbations

CONDITION_KEY = "condition"
"""Registry key of the condition column (not scvi-tools' batch: a batch is another thing)."""
DOSE_KEY = "dose"
"""Registry key of the dose column."""


def condition_arms(adata_manager: AnnDataManager) -> IntArray:
    """Arm of every cell: CONTROL, NEITHER, or STIMULATED plus its perturbation, ``(n_obs,)``."""
    arms = perturbations_of(adata_manager.registry).arms
    return arms[registered_codes(adata_manager, CONDITION_KEY)]


def perturbations_of(registry: dict[str, Any]) -> Perturbations:
    """Perturbations that data were set up with."""
    setup = registry["setup_args"]
    state = registry["field_registries"][CONDITION_KEY]["state_registry"]
    return Perturbations.of(
        state["categorical_mapping"],
        setup["control"],
        setup["stimulated"],
        setup["combination_separator"],
    )


def stratum_labels(adata_manager: AnnDataManager) -> IntArray:
    """For every cell the number of its cell type and batch, ``(n_obs,)``."""
    labels = registered_codes(adata_manager, REGISTRY_KEYS.LABELS_KEY)
    if REGISTRY_KEYS.BATCH_KEY not in adata_manager.data_registry:
        return labels
    n_batches = len(_categories(adata_manager, REGISTRY_KEYS.BATCH_KEY))
    return labels * n_batches + registered_codes(adata_manager, REGISTRY_KEYS.BATCH_KEY)


def registered_codes(adata_manager: AnnDataManager, key: str) -> IntArray:
    """For every cell the number of its category when the data were set up, ``(n_obs,)``."""
    return np.asarray(adata_manager.get_from_registry(key), dtype=np.int64).ravel()


def _categories(adata_manager: AnnDataManager, key: str) -> np.ndarray:
    return np.asarray(adata_manager.get_state_registry(key).categorical_mapping)
