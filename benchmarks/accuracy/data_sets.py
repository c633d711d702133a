"""Each data set of the pretraining, leave one context out, by weights that never saw it.

    python benchmarks/accuracy/data_sets.py FOLDER
    python benchmarks/accuracy/data_sets.py FOLDER --sets kang_pbmc_ifnb

FOLDER holds the data sets. `untouched` are the pretrained networks without a step of training,
`from scratch` networks without pretraining, `spaperb_in_context` the default, beside the
baselines. Each perturbation of a set is hidden in each context with at least 20 cells in both
conditions; genes are chosen without the hidden cells. The CRISPR screens have a protocol of their
own (`crispr.py`). Writes `data_sets.csv` and `data_sets_summary.csv` beside this file.
`--folds DIR` keeps finished folds; `--only METHOD ...` runs some methods and replaces their rows
alone.
"""

from pathlib import Path

import pandas as pd
from common import (
    HERE,
    LEAST_CELLS,
    N_TOP_GENES,
    by_fold,
    chosen,
    data_sets,
    log_normalised,
    make_parser,
    read_folds,
    summaries,
    without,
)

from spaperb.evaluation.baselines import BASELINES
from spaperb.evaluation.benchmark import Method, SpaPerb, benchmark


def methods_for(name: str) -> dict[str, Method]:
    """All methods, with weights that never saw the data set."""
    return {
        "spaperb_in_context": SpaPerb(pretrained=without(name)),
        "untouched": SpaPerb({"max_epochs": 0}, pretrained=without(name)),
        "from scratch": SpaPerb(pretrained=False),
        **BASELINES,
    }


def run(
    file: Path, row: pd.Series, methods: dict[str, Method], seeds: list[int], **kwargs
) -> pd.DataFrame:
    """Hide each context of a data set."""
    cells = log_normalised(file)
    results = []
    for stimulated in sorted(set(cells.obs[row["condition"]]) - {row["control"]}):
        of_stimulus = benchmark(
            cells,
            methods,
            held_out=row["context"],
            condition_key=row["condition"],
            control=row["control"],
            stimulated=stimulated,
            labels_key=row["context"],
            min_cells=LEAST_CELLS,
            n_top_genes=N_TOP_GENES,
            seeds=seeds,
            **kwargs,
        )
        results.append(of_stimulus.assign(context=f"{stimulated}: " + of_stimulus["context"]))
    return pd.concat(results).assign(data_set=row["name"])


def main() -> None:
    """Run all data sets."""
    parser = make_parser(__doc__, "folder", "--seeds", "--folds", "--only", "--n-jobs")
    parser.add_argument("--sets", nargs="+")
    args = parser.parse_args()
    table = data_sets()
    table = table[table["name"] != "crispr_multi"]
    path, results = HERE / "data_sets.csv", []
    if args.only and path.exists():
        before = read_folds(path)
        results = [before[~before["method"].isin(args.only)]]
    for _, row in table[table["name"].isin(args.sets or table["name"])].iterrows():
        file = args.folder / f"{row['name']}.h5ad"
        methods = chosen(methods_for(row["name"]), args.only)
        results.append(run(file, row, methods, args.seeds, n_jobs=args.n_jobs, folder=args.folds))
    whole = pd.concat(results)
    by_fold(whole).to_csv(path, index=False, float_format="%.7g")
    of_sets = summaries(whole, "data_set")
    of_sets.to_csv(HERE / "data_sets_summary.csv", index=False, float_format="%.6g")
    for metric in ("pearson_delta", "mse_mean"):
        of_metric = of_sets[of_sets["metric"] == metric]
        wide = of_metric.pivot(index="method", columns="data_set", values="mean")
        print(metric, wide.assign(mean=wide.mean(axis=1)).round(4).to_string(), sep="\n")


if __name__ == "__main__":
    main()
