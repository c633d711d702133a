"""What the recommended model must do on simulated cells whose answer is known."""

import pytest

from spaperb import datasets
from spaperb.evaluation.baselines import BASELINES
from spaperb.evaluation.benchmark import SpaPerb, benchmark

pytestmark = pytest.mark.slow

OURS = SpaPerb({"max_epochs": 5})
CONTEXTS = ["type_0", "type_1", "type_2", "type_3"]


def scores(adata, methods, metric):
    """Mean over contexts of each method's score."""
    results = benchmark(
        adata, {"in_context": OURS, **methods}, contexts=CONTEXTS, seeds=(0,), n_splits=2
    )
    assert results["error"].isna().all()
    of_metric = {m: results[results["metric"] == m] for m in metric}
    return {m: rows.groupby("method")["value"].mean() for m, rows in of_metric.items()}


def test_its_change_is_right_where_the_response_depends_on_the_context():
    """Nearer to the real change than every baseline, from control cells that are not in it.

    As a population it is nearer than all but the forest, which takes some of the control cells'
    noise back ("Control cells that are used twice" in `benchmarks/accuracy/README.md`).
    """
    adata = datasets.simulated(shared_response=0.3, lineage_response=0.6, n_genes=300)
    table = scores(adata, BASELINES, ("pearson_delta", "mse_mean", "energy_distance"))
    change = table["pearson_delta"]
    assert (change["in_context"] > change.drop("in_context")).all(), change
    for metric in ("mse_mean", "energy_distance"):
        ours = table[metric]["in_context"]
        assert (ours < table[metric].drop(["in_context", "gene_forest"])).all(), table[metric]


@pytest.mark.parametrize("seed", [0, 1])
def test_without_a_response_it_is_no_worse_than_no_change(seed):
    adata = datasets.simulated(response_scale=0.0, n_cells=60, n_genes=300, seed=seed)
    table = scores(
        adata, {"no_change": BASELINES["no_change"]}, ("mse_mean", "energy_distance", "mmd")
    )
    for metric in table.values():
        assert metric["in_context"] <= metric["no_change"], table
