"""What each part of the model is worth: hidden cell types of Kang et al. 2018, a change a row.

    python benchmarks/accuracy/ablation.py kang_pbmc_ifnb.h5ad

The folds, genes and metrics of `kang.py`; weights never saw Kang et al. The first rows change the
default. Its weights learned with all parts in place, so the other parts are taken from networks
that learn from scratch, whose rows are to be compared with `from scratch`. `not trained` is what
any network begins with: the mean of the measured changes by prior weights. Writes `ablation.csv`
beside this file, a row a type, variant and seed, and prints the table of README.md. `--folds DIR`
keeps finished folds.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from common import HERE, KANG, N_TOP_GENES, log_normalised, make_parser, without

from spaperb.evaluation.benchmark import Method, SpaPerb, benchmark, summary
from spaperb.evidence import Relation, Settings, relate

SETTINGS = "spaperb.data._episodes.Settings"
"""What gives the settings of a model's evidence."""
GIVEN = ("spaperb.evidence._relations.relate", "spaperb.model._contexts.relate")
"""All relations that networks are given come from here, in training and in prediction."""
METRICS = {"pearson_delta": (1, 3), "mse_mean": (1e3, 1)}
"""Factor and digits in the table."""


def without_prior(*args: Any) -> Relation:
    """Give each piece of evidence the same prior weight."""
    given = relate(*args)
    return given._replace(log_prior=np.full(len(given.kept), -np.log(len(given.kept))))


def without_relations(*args: Any) -> Relation:
    """Leave out how the evidence relates to the query, but for the prior weights."""
    given = relate(*args)
    return given._replace(relations=np.zeros_like(given.relations))


class Changed:
    """A model that is trained and asked while names of the package have another value.

    Parameters
    ----------
    method
        The model.
    value
        The value.
    *names
        The names, with their modules.
    """

    def __init__(self, method: Method, value: Any, *names: str):
        self.method, self.value, self.names = method, value, names

    def _changed(self) -> ExitStack:
        stack = ExitStack()
        for name in self.names:
            stack.enter_context(mock.patch(name, self.value))
        return stack

    def fit(self, adata, **setup):
        """Train."""
        with self._changed():
            self.method.fit(adata, **setup)
        return self

    def predict(self, adata_control):
        """Predict."""
        with self._changed():
            return self.method.predict(adata_control)


def variants() -> dict[str, Method]:
    """All rows."""
    weights = without(KANG)
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
        "from scratch, no twins": Changed(scratch, partial(Settings, twins=0.0), SETTINGS),
        "from scratch, all evidence kept": Changed(
            scratch, partial(Settings, all_kept=1.0), SETTINGS
        ),
        "from scratch, no prior": Changed(scratch, without_prior, *GIVEN),
        "from scratch, no relations": Changed(scratch, without_relations, *GIVEN),
    }


def main() -> None:
    """Run all rows."""
    args = make_parser(__doc__, "file", "--seeds", "--folds", "--n-jobs").parse_args()
    methods = variants()
    results = benchmark(
        log_normalised(args.file),
        methods,
        n_top_genes=N_TOP_GENES,
        seeds=args.seeds,
        n_jobs=args.n_jobs,
        folder=args.folds,
    )
    for error in results["error"].dropna().unique():
        print(f"Folds failed: {error}")
    results = results[results["metric"].isin(METRICS)]
    table = results.pivot(index=["context", "method", "seed"], columns="metric", values="value")
    table = table[list(METRICS)].rename_axis(index=["type", "variant", "seed"])
    table.to_csv(HERE / "ablation.csv", float_format="%.6g")
    means = summary(results).set_index(["method", "metric"])
    print("| | pearson_delta | mse_mean × 10³ |\n|---|---|---|")
    for name in methods:
        rows = [(means.loc[name, metric], *how) for metric, how in METRICS.items()]
        cells = [f"{f * row['mean']:.{d}f} ± {f * row['spread']:.{d}f}" for row, f, d in rows]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
