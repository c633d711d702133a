"""By donor: how far a method can get that predicts cells one by one.

    python benchmarks/accuracy/composition.py kang_pbmc_ifnb.h5ad

Control and stimulated cells of a donor differ in their response and in their mixture of cell
types. The *oracle* knows the donor's real stimulated cells of every type, and gives each type's
mean to the donor's control cells of that type: the right response in the control cells' mixture.
What it misses is the change of the mixture, which no prediction of one cell from one cell can
contain. Types that the donor has in one condition only are left as they are. Writes
`kang_donor_oracle.csv` beside this file, with the best baseline and the default model of
`kang_donor.csv`.
"""

import anndata as ad
import numpy as np
import pandas as pd
from common import HERE, log_normalised, make_parser, read_folds, split

from spaperb import metrics
from spaperb.populations import dense


def oracle(adata: ad.AnnData, donor: str) -> dict[str, float]:
    """Score the right response in the control cells' mixture of types."""
    fold = split(adata, donor, "donor")
    hidden = (adata.obs["donor"] == donor) & (adata.obs["condition"] == "stimulated")
    types = adata.obs["cell_type"][hidden].to_numpy()
    real, predicted = dense(fold.real), dense(fold.control.X).copy()
    of_control = fold.control.obs["cell_type"].to_numpy()
    for cell_type in np.intersect1d(types, of_control):
        predicted[of_control == cell_type] = real[types == cell_type].mean(axis=0)
    shares = [pd.Series(x).value_counts(normalize=True) for x in (of_control, types)]
    return {
        "donor": donor,
        "mixture_change": 0.5 * shares[0].subtract(shares[1], fill_value=0).abs().sum(),
        "pearson_delta_oracle": metrics.pearson_delta(
            predicted, real, fold.control.X, control_real=fold.control_real
        ),
        "mse_mean_oracle": metrics.mse_mean(predicted, real),
    }


def main() -> None:
    """Score all donors."""
    adata = log_normalised(make_parser(__doc__, "file").parse_args().file)
    donors = adata.obs["donor"].astype(str)
    adata.obs["donor"] = donors
    table = pd.DataFrame([oracle(adata, donor) for donor in sorted(donors.unique())])
    results = read_folds(HERE / "kang_donor.csv")
    for metric, best in (("pearson_delta", "max"), ("mse_mean", "min")):
        rows = results[results["metric"] == metric]
        scores = rows.groupby(["context", "method"])["value"].median().unstack()
        ours = scores.pop("spaperb_in_context")
        table[f"{metric}_in_context"] = ours[table["donor"]].to_numpy()
        baselines = scores.drop(columns="spaperb_published", errors="ignore")
        table[f"{metric}_best_baseline"] = baselines.agg(best, axis=1)[table["donor"]].to_numpy()
    table.to_csv(HERE / "kang_donor_oracle.csv", index=False, float_format="%.4g")
    print(table.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
