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
noise alone: 0 for a change that does not depend on the noise, -1 for a prediction that does not.
Writes `split_controls_noise.csv`, a row a type.
"""

import copy
from collections.abc import Mapping

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
    without,
)
from crispr import METHODS, SETUP, run_targets

from spaperb._types import FloatArray
from spaperb.evaluation.baselines import BASELINES, KNNShift
from spaperb.evaluation.benchmark import Method, SpaPerb, benchmark
from spaperb.populations import mean_expression

METRICS = ("pearson_delta", "weighted_r2_delta", "mse_mean", "deg_overlap", "discrimination")


def noise_taken_back(
    cells: ad.AnnData, name: str, methods: Mapping[str, Method]
) -> dict[str, float]:
    """Slopes over genes of predicted means on the noise of the control cells."""
    fold = split(cells, name)
    setup = {"held_out": "cell_type", "condition_key": "condition", "control": "control"}
    setup |= {"stimulated": None, "labels_key": "cell_type", "seed": 0}

    def predicted(method: Method) -> FloatArray:
        fitted = copy.deepcopy(method)
        fitted.fit(fold.train.copy(), **setup)
        return mean_expression(fitted.predict(fold.control.copy()))

    noise = mean_expression(fold.control.X) - mean_expression(fold.control_real)
    of_shift = predicted(KNNShift())
    return {
        name: float((predicted(method) - of_shift) @ noise / (noise @ noise))
        for name, method in methods.items()
    }


def main() -> None:
    """Run both protocols on both data sets."""
    args = make_parser(__doc__, "folder", "--folds", "--n-jobs").parse_args()
    cells = log_normalised(args.folder / f"{KANG}.h5ad")
    targets = ad.read_h5ad(args.folder / "crispr_multi.h5ad")
    methods = {"spaperb_in_context": SpaPerb(pretrained=without(KANG)), **BASELINES}
    of_targets = {k: m for k, m in METHODS["targets"].items() if k != "spaperb_in_context"}
    both = {name: methods[name] for name in ("spaperb_in_context", "gene_forest")}
    rows = {name: noise_taken_back(cells, name, both) for name in paired_types(cells)}
    slopes = pd.DataFrame(rows).T.rename_axis("context")
    slopes.to_csv(HERE / "split_controls_noise.csv", float_format="%.4g")
    print(slopes.round(2).to_string(), slopes.mean().round(2).to_string(), sep="\n")
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
