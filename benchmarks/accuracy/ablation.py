"""What each part of the in-context model is worth: hidden cell types of Kang et al. 2018, one change a row.

    python benchmarks/accuracy/ablation.py kang_pbmc_ifnb.h5ad

The folds, genes and metrics of `kang.py`; weights never saw Kang et al. The first rows change the default. Its weights learned with all parts in place, so
the other parts are taken from networks that learn from scratch, whose rows are to be compared with `from scratch`. `not trained` is what any network begins
with: the mean of the measured changes by prior weights. Writes `ablation.csv` beside this file, a row a type, variant and seed, and prints
the table of README.md. `--folds DIR` keeps finished folds.
"""

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import report
from reading import log_normalised
from weights import without

from spaperb.benchmark import Method, SpaPerb, benchmark, summary
from spaperb.evidence._relations import Relation

EPISODES = "spaperb.evidence._episodes"
GIVEN = "spaperb.evidence._relations.Relation.best"
"""All relations that networks are given go through this method, in training and in prediction."""
METRICS = {"pearson_delta": (1, 3), "mse_mean": (1e3, 1)}
"""Factor and digits in the table."""

best = Relation.best


def without_prior(relation: Relation, n: int) -> Relation:
    """Give each piece of evidence the same prior weight."""
    given = best(relation, n)
    return given._replace(log_prior=np.full(len(given.kept), -np.log(len(given.kept))))


def without_relations(relation: Relation, n: int) -> Relation:
    """Leave out how the evidence relates to the query, but for the prior weights."""
    given = best(relation, n)
    return given._replace(relations=np.zeros_like(given.relations))


class Changed:
    """A model that is trained and asked while a name of the package has another value.

    Parameters
    ----------
    method
        The model.
    name, value
        The name, with its module, and the value.
    """

    def __init__(self, method: Method, name: str, value: Any):
        self.method, self.name, self.value = method, name, value

    def fit(self, adata, **setup):
        """Train."""
        with mock.patch(self.name, self.value):
            self.method.fit(adata, **setup)
        return self

    def predict(self, adata_control):
        """Predict."""
        with mock.patch(self.name, self.value):
            return self.method.predict(adata_control)


def variants() -> dict[str, Method]:
    """All rows."""
    weights = without("kang_pbmc_ifnb")
    scratch = SpaPerb(pretrained=False)
    still = {"max_epochs": 1, "plan_kwargs": {"lr": 0.0}}
    return {
        "default": SpaPerb(pretrained=weights),
        "untouched": SpaPerb({"max_epochs": 0}, pretrained=weights),
        "no latent loss": SpaPerb(pretrained=weights, latent_weight=0.0),
        "from scratch": scratch,
        "from scratch, not trained": SpaPerb(still, pretrained=False),
        "from scratch, no latent loss": SpaPerb(pretrained=False, latent_weight=0.0),
        "from scratch, one network": SpaPerb(pretrained=False, n_networks=1),
        "from scratch, no twins": Changed(scratch, f"{EPISODES}.TWINS", 0.0),
        "from scratch, all evidence kept": Changed(scratch, f"{EPISODES}.ALL_KEPT", 1.0),
        "from scratch, no prior": Changed(scratch, GIVEN, without_prior),
        "from scratch, no relations": Changed(scratch, GIVEN, without_relations),
    }


def main() -> None:
    """Run all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="raw counts, with obs condition and cell_type")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folds", type=Path)
    parser.add_argument("--n-jobs", type=int, default=2)
    args = parser.parse_args()
    methods = variants()
    results = benchmark(
        log_normalised(args.file),
        methods,
        n_top_genes=2000,
        seeds=args.seeds,
        n_jobs=args.n_jobs,
        folder=args.folds,
    )
    for error in results["error"].dropna().unique():
        print(f"Folds failed: {error}")
    results = results[results["metric"].isin(METRICS)]
    table = results.pivot(index=["context", "method", "seed"], columns="metric", values="value")
    table = table[list(METRICS)].rename_axis(index=["type", "variant", "seed"])
    table.to_csv(report.HERE / "ablation.csv", float_format="%.6g")
    means = summary(results).set_index(["method", "metric"])
    print("| | pearson_delta | mse_mean × 10³ |\n|---|---|---|")
    for name in methods:
        rows = [(means.loc[name, metric], *how) for metric, how in METRICS.items()]
        cells = [f"{f * row['mean']:.{d}f} ± {f * row['spread']:.{d}f}" for row, f, d in rows]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
