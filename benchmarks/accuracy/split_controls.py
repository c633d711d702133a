"""What control cells that are used twice do to scores, and to which conclusions.

    python benchmarks/accuracy/split_controls.py FOLDER

FOLDER holds `kang_pbmc_ifnb.h5ad` and `crispr_multi.h5ad`. The cell types of `kang.py` and, with
baselines alone, the targets of `crispr.py`, one seed: once with half of the hidden context's
control cells for the method and half for the real change, and once with all of them for both, as
published benchmarks and version 0.1.0 have it. Writes `split_controls.csv` beside this file, a row
a fold, and prints the means over folds. `--folds DIR` keeps finished folds.

A method that takes the control cells' sampling noise back predicts a change with that noise in it.
How much of it, is the slope of the predicted change, less that of `knn_shift`, which is nearly the
same whatever these cells are, on the difference of the two halves of the control cells, which is
noise alone, doubled since that difference has the noise of both: 0 for a change that does not
depend on the noise, -1 for a prediction that does not. The same predictions are scored against the
control cells that they were made from too (`same half`), since halves are noisier than the whole.
Writes `split_controls_noise.csv`, a row a type and method.
"""

import copy
from collections.abc import Mapping
from typing import Any

import anndata as ad
import pandas as pd
from common import (
    HERE,
    KANG,
    N_TOP_GENES,
    by_fold,
    log_normalised,
    make_parser,
    paired_types,
    read_folds,
    split,
    task_of,
    without,
)
from crispr import METHODS, SETUP, run_targets

from spaperb.evaluation.baselines import BASELINES
from spaperb.evaluation.benchmark import Method, SpaPerb, benchmark
from spaperb.evaluation.metrics import pearson_delta
from spaperb.populations import mean_expression

METRICS = ("pearson_delta", "weighted_r2_delta", "mse_mean", "deg_overlap", "discrimination")


def noise_of_controls(
    cells: ad.AnnData, name: str, methods: Mapping[str, Method]
) -> list[dict[str, Any]]:
    """Score predictions against either half of the control cells, and find their noise in them."""
    fold = split(cells, name)
    before, other = (mean_expression(x) for x in (fold.control.X, fold.control_real))
    noise = before - other
    means, rows = {}, []
    for method, of_method in methods.items():
        fitted = copy.deepcopy(of_method)
        fitted.fit(fold.train.copy(), **task_of().setup(seed=0))
        predicted = fitted.predict(fold.control.copy())
        means[method] = mean_expression(predicted)
        scores = {
            key: pearson_delta(predicted, fold.real, fold.control.X, control_real=control)
            for key, control in (("same half", fold.control.X), ("other half", fold.control_real))
        }
        rows.append({"context": name, "method": method, **scores})
    for row in rows:
        moved = means[row["method"]] - means["knn_shift"]
        row["slope"] = 2 * float(moved @ noise / (noise @ noise))
    return rows


def main() -> None:
    """Run both protocols on both data sets."""
    args = make_parser(__doc__, "folder", "--folds", "--n-jobs").parse_args()
    cells = log_normalised(args.folder / f"{KANG}.h5ad")
    targets = ad.read_h5ad(args.folder / "crispr_multi.h5ad")
    methods = {"spaperb_in_context": SpaPerb(pretrained=without(KANG)), **BASELINES}
    of_targets = {k: m for k, m in METHODS["targets"].items() if k != "spaperb_in_context"}
    rows = [row for name in paired_types(cells) for row in noise_of_controls(cells, name, methods)]
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "split_controls_noise.csv", index=False, float_format="%.4g")
    of_methods = table.drop(columns="context").groupby("method")
    print(of_methods.agg(["mean", "min", "max"]).round(3).to_string())
    results = []
    for is_split in (False, True):
        how = {"seeds": [0], "n_jobs": args.n_jobs, "folder": args.folds}
        how["split_controls"] = is_split
        of_each = {
            "kang, cell types": benchmark(cells, methods, n_top_genes=N_TOP_GENES, **how),
            "crispr, targets": run_targets(
                targets, of_targets, held_out="cell_line", **how, **SETUP
            ),
        }
        name = "split" if is_split else "shared"
        results += [of.assign(data_set=key, controls=name) for key, of in of_each.items()]
    whole = pd.concat(results)
    path = HERE / "split_controls.csv"
    by_fold(whole[whole["metric"].isin(METRICS)]).to_csv(path, index=False, float_format="%.7g")
    tidy = read_folds(path)
    ceiling = tidy.drop_duplicates(["data_set", "controls", "context", "metric"])
    ceiling = ceiling.assign(method="*ceiling*", value=ceiling["ceiling"])
    means = pd.concat([tidy, ceiling]).groupby(["data_set", "method", "metric", "controls"])
    print(
        means["value"].mean().unstack(["metric", "controls"])[list(METRICS)].round(4).to_string()
    )


if __name__ == "__main__":
    main()
