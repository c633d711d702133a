"""What control cells that are used twice do to scores, and to which conclusions.

    python benchmarks/accuracy/split_controls.py FOLDER

FOLDER holds `kang_pbmc_ifnb.h5ad` and `crispr_multi.h5ad`. The cell types of `kang.py` and the
targets of `crispr.py`, one seed: once with half of the hidden context's control cells for the
method and half for the real change, and once with all of them for both, as published benchmarks
and version 0.1.0 have it. Writes `split_controls.csv` beside this file, a row a fold, and prints
the means over folds. `--folds DIR` keeps finished folds.
"""

import anndata as ad
import pandas as pd
from common import (
    HERE,
    KANG,
    N_TOP_GENES,
    by_fold,
    log_normalised,
    make_parser,
    read_folds,
    without,
)
from crispr import METHODS, SETUP, run_targets

from spaperb.evaluation.baselines import BASELINES
from spaperb.evaluation.benchmark import SpaPerb, benchmark

METRICS = ("pearson_delta", "weighted_r2_delta", "mse_mean", "deg_overlap", "discrimination")


def main() -> None:
    """Run both protocols on both data sets."""
    args = make_parser(__doc__, "folder", "--folds", "--n-jobs").parse_args()
    cells = log_normalised(args.folder / f"{KANG}.h5ad")
    targets = ad.read_h5ad(args.folder / "crispr_multi.h5ad")
    methods = {"spaperb_in_context": SpaPerb(pretrained=without(KANG)), **BASELINES}
    results = []
    for is_split in (False, True):
        how = {"seeds": [0], "n_jobs": args.n_jobs, "folder": args.folds}
        how["split_controls"] = is_split
        of_each = {
            "kang, cell types": benchmark(cells, methods, n_top_genes=N_TOP_GENES, **how),
            "crispr, targets": run_targets(
                targets, METHODS["targets"], held_out="cell_line", **how, **SETUP
            ),
        }
        name = "split" if is_split else "shared"
        results += [of.assign(data_set=key, controls=name) for key, of in of_each.items()]
    whole = pd.concat(results)
    path = HERE / "split_controls.csv"
    by_fold(whole[whole["metric"].isin(METRICS)]).to_csv(path, index=False, float_format="%.5g")
    tidy = read_folds(path)
    ceiling = tidy.drop_duplicates(["data_set", "controls", "context", "metric"])
    ceiling = ceiling.assign(method="*ceiling*", value=ceiling["ceiling"])
    means = pd.concat([tidy, ceiling]).groupby(["data_set", "method", "metric", "controls"])
    print(
        means["value"].mean().unstack(["metric", "controls"])[list(METRICS)].round(4).to_string()
    )


if __name__ == "__main__":
    main()
