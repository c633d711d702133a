"""Kang et al. 2018 with two or three training types: the regime that most users are in.

    python benchmarks/accuracy/few_types.py kang_pbmc_ifnb.h5ad

Each cell type with at least 50 cells in both conditions is hidden in turn, and only two (three)
other types, drawn at random from those with at least 30 control cells, keep their stimulated
cells; two draws a hidden type. Weights never saw Kang et al. Writes `few_types.csv` and
`few_types_summary.csv` beside this file. `--folds DIR` keeps finished folds.
"""

import anndata as ad
import numpy as np
import pandas as pd
from common import (
    HERE,
    KANG,
    N_TOP_GENES,
    by_fold,
    log_normalised,
    make_parser,
    paired_types,
    summaries,
    without,
)

from spaperb.evaluation.baselines import BASELINES
from spaperb.evaluation.benchmark import SpaPerb, benchmark

LEAST_TRAINING = 30
N_DRAWS = 2


def kept(cells: ad.AnnData, hidden: str, place: int, n: int, draw: int) -> np.ndarray:
    """Cells that are left: controls, and stimulated cells of the hidden and of a few types."""
    of_type = cells.obs["cell_type"].to_numpy()
    is_control = (cells.obs["condition"] == "control").to_numpy()
    sizes = pd.Series(of_type[is_control]).value_counts()
    others = sorted(sizes.index[(sizes >= LEAST_TRAINING) & (sizes.index != hidden)])
    # Hidden types have draws of their own, or nearly the same few types would serve all.
    chosen = np.random.default_rng([draw, n, place]).permutation(others)[:n]
    return is_control | np.isin(of_type, [hidden, *chosen])


def main() -> None:
    """Run all draws."""
    args = make_parser(__doc__, "file", "--seeds", "--folds", "--n-jobs").parse_args()
    cells = log_normalised(args.file)
    methods = {
        "spaperb_in_context": SpaPerb(pretrained=without(KANG)),
        **BASELINES,
    }
    results = []
    for n in (2, 3):
        for draw in range(N_DRAWS):
            for place, hidden in enumerate(paired_types(cells)):
                some = cells[kept(cells, hidden, place, n, draw)].copy()
                of_draw = benchmark(
                    some,
                    methods,
                    contexts=[hidden],
                    n_top_genes=N_TOP_GENES,
                    seeds=args.seeds,
                    n_jobs=args.n_jobs,
                    folder=args.folds,
                )
                context = f"{hidden}, draw {draw}"
                results.append(of_draw.assign(context=context, n_training_types=n))
    whole = pd.concat(results)
    by_fold(whole).to_csv(HERE / "few_types.csv", index=False, float_format="%.7g")
    table = summaries(whole, "n_training_types")
    table.to_csv(HERE / "few_types_summary.csv", index=False, float_format="%.6g")
    columns = ["n_training_types", "metric"]
    wide = table.pivot(index="method", columns=columns, values="mean")
    print(wide.loc[:, wide.columns.isin(["pearson_delta", "mse_mean"], level=1)].round(4))


if __name__ == "__main__":
    main()
