"""What scvi-tools has no public way for, each with its reason.

``tests/test_public_names.py`` tells when one of these breaks; everything else in this package uses
public names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

# scvi-tools 1.4.2 uses rich.pretty in `view_anndata_setup` without importing it.
import rich.pretty  # noqa: F401
from scvi.nn import FCLayers
from torch import nn


def forget_with(model: Any) -> None:
    """Let scvi-tools forget the data of a model once the model is gone.

    It keeps what binds a model to its data for as long as the process lives: a loop over models
    would hold all of their cells.
    """
    managers = getattr(type(model), "_per_instance_manager_store", {})
    weakref.finalize(model, managers.pop, model.id, None)


def adjust_layers(layers: FCLayers, momentum: float, dropout: Callable[[], nn.Module]) -> None:
    """Set the momentum of batch normalisation, and take another dropout.

    ``FCLayers`` has no arguments for these.
    """
    for block in layers.fc_layers:
        for i, module in enumerate(block):
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = momentum
            elif isinstance(module, nn.Dropout):
                block[i] = dropout()
