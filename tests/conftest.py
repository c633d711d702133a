"""Fixtures: small simulated cells, a trained model, the real cells where they are at hand."""

import os
from typing import Any

import anndata as ad
import matplotlib as mpl
import pytest
import scvi
from helpers import real_cells, small_cells, train_small
from hypothesis import HealthCheck, settings

from spaperb import SpaPerbModel

mpl.use("Agg")

# Models are trained within some examples, so there is no deadline and data may take long to make.
SLOW: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=40, derandomize=True, **SLOW)
settings.register_profile("nightly", max_examples=400, print_blob=True, **SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seed():
    scvi.settings.seed = 0


@pytest.fixture
def adata() -> ad.AnnData:
    return small_cells()


@pytest.fixture(scope="session")
def trained() -> SpaPerbModel:
    return train_small(small_cells())


@pytest.fixture(scope="session")
def in_context() -> SpaPerbModel:
    return train_small(small_cells(), objective="in_context")


@pytest.fixture(params=["trained", "in_context"])
def either(request) -> SpaPerbModel:
    """A model of each objective."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def query(trained) -> ad.AnnData:
    """New cells with the model's genes, no obs columns, no traces of scvi-tools."""
    new = small_cells(seed=1)
    return ad.AnnData(new.X, var=new.var[[]], obs=new.obs[[]])


@pytest.fixture(scope="session")
def kang() -> ad.AnnData:
    return real_cells("kang_pbmc_ifnb")
