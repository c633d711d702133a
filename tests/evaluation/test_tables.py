"""Tables with a row a fold, as the benchmarks of the repository write them."""

import importlib
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers import small_cells

from spaperb.evaluation.baselines import MeanShift, NoChange
from spaperb.evaluation.benchmark import benchmark

ACCURACY = Path(__file__).parents[2] / "benchmarks" / "accuracy"

pytestmark = pytest.mark.skipif(
    not ACCURACY.exists(), reason="benchmarks/ are in the repository, not in a wheel"
)


class Failing(NoChange):
    def predict(self, adata_control):
        raise ValueError("no, really")


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(ACCURACY)
    yield importlib.import_module("common")
    sys.modules.pop("common")


def test_written_and_read_again_is_the_same(common, tmp_path):
    """A context that is called NA and a fold that failed too."""
    adata = small_cells()
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"type_1": "NA"})
    methods = {"mean_shift": MeanShift(), "failing": Failing(), "no_change": NoChange()}
    results = benchmark(adata, methods, seeds=[0, 1], n_splits=2, min_cells=10)
    results = results.assign(data_set="small")
    common.by_fold(results).to_csv(tmp_path / "folds.csv", index=False)
    again = common.read_folds(tmp_path / "folds.csv")
    keys = ["data_set", "context", "method", "seed", "metric"]
    tables = [table.sort_values(keys, ignore_index=True) for table in (results, again)]
    tables[1]["context"] = tables[1]["context"].astype(tables[0]["context"].dtype)
    assert set(again["context"]) == {"type_0", "NA", "type_2"}
    for column in ("value", "floor", "ceiling", "scaled", "seconds"):
        pd.testing.assert_series_equal(tables[0][column], tables[1][column], rtol=1e-9)
    errors = [table["error"].fillna("").tolist() for table in tables]
    assert errors[0] == errors[1]
    assert "ValueError: no, really" in errors[0]
