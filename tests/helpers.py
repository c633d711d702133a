"""Small simulated cells and a small model of them, for every test."""

import os
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scvi
import torch

from spaperb import SpaPerbModel, datasets
from spaperb.cells import order_of

DATA = Path(os.environ.get("SPAPERB_DATA", Path(__file__).parents[1] / "../shared/data"))

PUBLISHED: dict[str, Any] = {"objective": "published", "n_latent": 4, "n_hidden": 16}
IN_CONTEXT: dict[str, Any] = {"pretrained": False, "n_latent": 4, "n_hidden": 16, "n_networks": 2}
SMALL: dict[str, dict[str, Any]] = {"published": PUBLISHED, "in_context": IN_CONTEXT}
BATCH_SIZE = {"published": 16, "in_context": 2}
"""Pairs, or episodes of each network, a minibatch."""
QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}


def small_cells(**kwargs) -> ad.AnnData:
    """Simulate three cell types of 20 cells a condition, 30 genes, without the true layers."""
    adata = datasets.simulated(**{"n_cell_types": 3, "n_cells": 20, "n_genes": 30, **kwargs})
    drop_layers(adata)
    return adata


def real_cells(name: str) -> ad.AnnData:
    """Read one of the real data sets, or skip the test where it is not at hand."""
    path = DATA / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"the real cells are not at {path}; set SPAPERB_DATA to their folder")
    return ad.read_h5ad(path)


def layer_names(adata: ad.AnnData) -> list[str]:
    """Names of layers; anndata 0.13 has X among them, named None."""
    return [name for name in adata.layers if name is not None]


def drop_layers(adata: ad.AnnData) -> None:
    """Take all layers off."""
    for name in layer_names(adata):
        del adata.layers[name]


def train_small(
    adata: ad.AnnData, seed: int = 0, objective: str = "published", **model_kwargs
) -> SpaPerbModel:
    """Set up and train a small model for a few epochs."""
    scvi.settings.seed = seed
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **{**SMALL[objective], **model_kwargs})
    model.train(max_epochs=3, batch_size=BATCH_SIZE[objective], **QUIET)
    return model


def weights(model: SpaPerbModel) -> torch.Tensor:
    """All weights and buffers of a model, in a row."""
    return torch.cat([w.detach().double().flatten() for w in model.module.state_dict().values()])


def snapshot(adata: ad.AnnData) -> dict:
    """Everything of an AnnData that a call might have changed, to compare later."""
    x = adata.X.toarray() if hasattr(adata.X, "toarray") else np.array(adata.X)
    return {
        "X": x.tobytes(),
        "type": (type(adata.X), x.dtype),
        "obs": adata.obs.to_csv(),
        "var": adata.var.to_csv(),
        "keys": [
            layer_names(adata),
            *(sorted(getattr(adata, slot)) for slot in ("obsm", "varm", "obsp", "uns")),
        ],
    }


def even(n: int, n_genes: int, seed: int = 0, draw: int = 0) -> np.ndarray:
    """Numbers of n silent cells."""
    ranks = np.repeat(np.arange(n, dtype=np.uint32)[:, None], n_genes, axis=1)
    return order_of(ranks, np.full_like(ranks, n), seed, draw)


def context_arrays(adata: ad.AnnData) -> tuple:
    """Expression, arms, labels and names, as ``Evidence.of`` takes them."""
    arms = (adata.obs["condition"] == "stimulated").to_numpy().astype(int)
    labels = adata.obs["cell_type"].cat
    return adata.X, arms, labels.codes.to_numpy().astype(int), list(labels.categories)


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def flip_byte_of_weight(path: Path, model: SpaPerbModel) -> None:
    """Change a byte of a weight in a file that holds the model's."""
    content = bytearray(path.read_bytes())
    weight = next(model.module.parameters()).detach().numpy().tobytes()
    content[content.index(weight)] ^= 0xFF
    path.write_bytes(content)


def populations_of(seed: int, n_genes: int = 12, shift: float = 0.0) -> tuple[np.ndarray, ...]:
    """Predicted, real and control cells with zeros, as log-normalised expression has."""
    rng = np.random.default_rng(seed)
    mean = rng.gamma(2, 1, n_genes)
    change = rng.normal(0, 1, n_genes)
    return tuple(
        np.log1p(rng.poisson(mean * np.exp(c * change), (n, n_genes)))
        for n, c in ((27, shift), (39, 1.0), (28, 0.0))
    )
