"""Peers that need no environment of their own, and how the others are run."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from spaperb import datasets
from spaperb.evaluation.baselines import NoChange
from spaperb.evaluation.benchmark import benchmark

ACCURACY = Path(__file__).parents[2] / "benchmarks" / "accuracy"
HIDDEN = "type_0"
SETUP = {
    "held_out": "cell_type",
    "condition_key": "condition",
    "control": "control",
    "stimulated": "stimulated",
    "labels_key": "cell_type",
    "seed": 0,
}

pytestmark = pytest.mark.skipif(
    not (ACCURACY / "peers").exists(), reason="benchmarks/ are in the repository, not in a wheel"
)


@pytest.fixture
def peer(monkeypatch):
    monkeypatch.syspath_prepend(str(ACCURACY))
    return lambda name: importlib.import_module(f"peers.{name}")


@pytest.fixture
def own(peer):
    """Small settings: seconds instead of minutes."""
    trvae = peer("trvae").TrVAE(max_epochs=60, n_anneal=20, batch_size=256)
    return {"linear": peer("linear").LatentLinear(10), "trvae": trvae}


@pytest.fixture(scope="module")
def cells():
    return datasets.simulated(n_cell_types=6, n_genes=100, shared_response=0.8)


@pytest.fixture(scope="module")
def seen(cells):
    hidden = (cells.obs["cell_type"] == HIDDEN) & (cells.obs["condition"] == "stimulated")
    return cells[~hidden].copy()


@pytest.fixture(scope="module")
def control(seen):
    return seen[seen.obs["cell_type"] == HIDDEN].copy()


def predict(method, seen, control, **setup):
    return method.fit(seen.copy(), **{**SETUP, **setup}).predict(control.copy())


def test_they_find_the_hidden_change(cells, own):
    results = benchmark(
        cells,
        {**own, "no_change": NoChange()},
        stimulated="stimulated",
        contexts=[HIDDEN],
        seeds=[0],
        n_splits=2,
    )
    assert results["error"].isna().all()
    of = results.pivot(index="method", columns="metric", values="value")
    assert (of.loc[list(own), "pearson_delta"] > 0.5).all(), of["pearson_delta"]
    errors = of["mse_mean"]
    assert (errors[list(own)] < errors["no_change"]).all(), errors


@pytest.mark.parametrize("name", ["linear", "trvae"])
def test_a_prediction_has_a_row_for_each_cell_and_follows_from_the_seed(name, own, seen, control):
    first, again = (predict(own[name], seen, control) for _ in range(2))
    assert first.shape == control.shape
    assert (first >= 0).all()
    np.testing.assert_array_equal(first, again)


def test_another_seed_trains_another_network(own, seen, control):
    first, other = (predict(own["trvae"], seen, control, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first, other)


def test_a_process_of_its_own_predicts_the_same(peer, seen, control):
    here = predict(peer("linear").LatentLinear(), seen, control)
    elsewhere = peer("_environment").InEnvironment("linear", sys.executable)
    there = predict(elsewhere, seen, control)
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-5)


def test_what_fails_there_is_told(peer, seen, control):
    elsewhere = peer("_environment").InEnvironment("biolord", sys.executable)
    with pytest.raises(RuntimeError, match="ended with 1: ModuleNotFoundError"):
        predict(elsewhere, seen, control)


def test_an_environment_needs_its_python(peer, tmp_path):
    with pytest.raises(RuntimeError, match=r"needs Python 2\.99"):
        peer("_environment").environment("scgen", "2.99", tmp_path)
