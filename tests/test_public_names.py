"""The names of other libraries that this package relies on: public, and there."""

import ast
import gc
import importlib
from pathlib import Path

import pytest
from helpers import small_cells, train_small
from scvi.model import SCVI
from torch import nn

import spaperb
from spaperb import SpaPerbModel
from spaperb.nn import Encoder

LIBRARIES = ("anndata", "lightning", "pandas", "scanpy", "scvi", "torch")


def imported() -> list[str]:
    """All names that the package imports from these libraries."""
    names = set()
    for path in Path(spaperb.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    return sorted(name for name in names if name.split(".")[0] in LIBRARIES)


def test_they_are_found():
    assert {"scvi.train.TrainRunner", "anndata.AnnData"} <= set(imported())


@pytest.mark.parametrize("name", imported())
def test_public_and_there(name):
    assert not any(part.startswith("_") for part in name.split("."))
    module, _, attribute = name.rpartition(".")
    if not module or not hasattr(importlib.import_module(module), attribute):
        importlib.import_module(name)


def test_scvi_tools_still_keeps_managers_of_models_that_are_gone():
    """Where this fails, `spaperb._compat.forget_with` is no longer needed."""
    adata = small_cells()
    SCVI.setup_anndata(adata)
    n_before = len(SCVI._per_instance_manager_store)
    model = SCVI(adata)
    del model
    assert len(SCVI._per_instance_manager_store) > n_before


def test_a_model_that_is_gone_is_forgotten():
    model = train_small(small_cells(), objective="published")
    key = model.id
    assert key in SpaPerbModel._per_instance_manager_store
    del model
    gc.collect()
    assert key not in SpaPerbModel._per_instance_manager_store


def test_layers_are_adjusted():
    encoder = Encoder(10, 4, 8, 2, 0.3)
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == 2
    assert {m.momentum for m in norms} == {0.1}
    dropouts = [m for m in encoder.modules() if isinstance(m, nn.Dropout)]
    assert {type(m).__module__ for m in dropouts} == {"spaperb.nn._cells"}
