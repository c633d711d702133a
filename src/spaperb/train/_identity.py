"""What training is of: digests of the data that a model was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager

from spaperb._messages import format_list
from spaperb.data import CONDITION_KEY, DOSE_KEY
from spaperb.populations import dense


def check_unchanged(before: dict[str, str], now: dict[str, str]) -> None:
    """Check that the data of a model, given by digests, are those that were set up."""
    if changed := [name for name in before if now[name] != before[name]]:
        raise ValueError(
            f"{format_list(changed)} changed since the AnnData was set up for this model. Set it "
            "up anew and make a new model, or undo the change."
        )


N_LOOKED_AT = 100
"""Cells whose expression tells whether it is still the same."""


def data_digests(
    manager: AnnDataManager, codes: Callable[[AnnDataManager, str], npt.NDArray] | None = None
) -> dict[str, str]:
    """Digests of the data that a model is made from, by what they are called.

    Parameters
    ----------
    manager
        Manager of the model's AnnData.
    codes
        What gives the code of every cell in a registered column, in the registry's categories; by
        default the values that the column has now.
    """
    codes = codes or _current_codes
    digests = {"the expression": _expression_digest(manager)}
    for key in (CONDITION_KEY, REGISTRY_KEYS.LABELS_KEY, REGISTRY_KEYS.BATCH_KEY):
        if key in manager.data_registry:
            name = manager.get_state_registry(key).original_key
            digests[f"adata.obs[{name!r}]"] = digest(codes(manager, key))
    if DOSE_KEY in manager.data_registry:
        name = manager.data_registry[DOSE_KEY].attr_key
        digests[f"adata.obs[{name!r}]"] = digest(manager.adata.obs.get(name, []))
    return digests


def _current_codes(manager: AnnDataManager, key: str) -> npt.NDArray:
    state = manager.get_state_registry(key)
    column = manager.adata.obs.get(state.original_key, [])
    return pd.Index(state.categorical_mapping).get_indexer(np.asarray(column))


def _expression_digest(manager: AnnDataManager) -> str:
    some = dense(manager.get_from_registry(REGISTRY_KEYS.X_KEY)[:N_LOOKED_AT])
    return digest(some.ravel().astype(np.float32))


def digest(*columns: npt.ArrayLike) -> str:
    """Digest of columns, in their order."""
    hashes = [pd.util.hash_array(np.asarray(column)) for column in columns]
    return hashlib.sha256(np.concatenate(hashes).tobytes()).hexdigest()
