"""Coverage of the 90 % intervals in contexts never seen, and what the distance tells of errors.

    python benchmarks/accuracy/intervals.py kang_pbmc_ifnb.h5ad

Kang et al. 2018, each cell type's stimulated cells hidden as in `kang.py`; the same with a second
type hidden too, so that some types lose their nearest relative; and three simulated data sets of
seven types in five lineages, three of which have one type only, each type hidden. Coverage is the
fraction of genes whose real mean change lies in the interval (`coverage_strongest`: of the tenth
with the largest predicted change; `coverage_true`: the noise-free change, for simulated cells);
`risk_coverage` how well the widths put the genes' errors in order, 0 for chance and 1 for the best
order; `relative_error` the squared error of the mean change over the squared change, both less
what sampling noise adds to them, summed over genes. Weights never saw Kang et al. Writes
`intervals.csv` and `intervals.png` beside this file.
"""

from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from common import HERE, KANG, log_normalised, make_parser, paired_types, split, trained, without
from matplotlib.figure import Figure

from spaperb import datasets, metrics
from spaperb.evaluation.benchmark import Fold
from spaperb.populations import mean_expression, variance


def whole(cells: ad.AnnData, name: str) -> Fold:
    """Hide stimulated cells alone.

    The predicted change does not follow the noise of the control cells, and half of them would
    make the real change noisier than what the intervals were made for.
    """
    return split(cells, name, split_controls=False)


def kang_folds(path: Path) -> Iterator[tuple]:
    """Folds of one hidden type, and of two."""
    cells = log_normalised(path)
    types = paired_types(cells)
    stimulated = cells.obs["condition"] == "stimulated"
    for name in types:
        yield "kang", name, whole(cells, name), None
    for second in types:
        rest = cells[~(stimulated & (cells.obs["cell_type"] == second))].copy()
        for name in types:
            if name != second:
                yield "kang, two hidden", name, whole(rest, name), None


def simulated_folds() -> Iterator[tuple]:
    """The same of each simulated type, with the noise-free change."""
    for seed in range(3):
        cells = datasets.simulated(
            n_cell_types=7,
            n_lineages=5,
            n_cells=60,
            n_genes=300,
            shared_response=0.2,
            lineage_response=0.6,
            seed=seed,
        )
        for name in cells.obs["cell_type"].cat.categories:
            fold = whole(cells, name)
            layers = fold.control.layers
            true = layers["true_stimulated"].mean(0) - layers["true_control"].mean(0)
            yield f"simulated {seed}", name, fold, true


def score(data: str, name: str, fold: Fold, true: np.ndarray | None, seed: int) -> dict:
    """Train, predict, and look whether the truth is where it should be."""
    train, control, real, *_ = fold
    model = trained(train, seed, without(KANG) if data.startswith("kang") else True)
    table = model.predict_response(control).set_index("gene").loc[control.var_names]
    lower, upper = table["lower"].to_numpy(), table["upper"].to_numpy()
    change = mean_expression(real) - mean_expression(control.X)
    noise = variance(real) / real.shape[0] + variance(control.X) / control.n_obs
    predicted = table["mean_change"].to_numpy()
    strongest = np.argsort(-np.abs(predicted))[: len(predicted) // 10]
    error = predicted - change
    return {
        "data": data,
        "context": name,
        "seed": seed,
        "coverage": metrics.coverage(lower, upper, real, control.X),
        "coverage_strongest": np.mean(((lower <= change) & (change <= upper))[strongest]),
        "coverage_true": np.nan if true is None else np.mean((lower <= true) & (true <= upper)),
        "half_width": float(np.mean(upper - lower) / 2),
        "risk_coverage": metrics.area_under_risk_coverage(np.abs(error), upper - lower),
        "distance": table["distance"].iloc[0],
        "relative_error": (error**2 - noise).sum() / (change**2 - noise).sum(),
    }


def main() -> None:
    """Run both."""
    parser = make_parser(__doc__, "file", "--seeds")
    parser.set_defaults(seeds=[0])
    args = parser.parse_args()
    rows = [
        score(*fold, seed=seed)
        for folds in (kang_folds(args.file), simulated_folds())
        for fold in folds
        for seed in args.seeds
    ]
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "intervals.csv", index=False, float_format="%.4g")
    table["kind"] = table["data"].str.rstrip(" 012")
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, of_kind in table.groupby("kind"):
        left.scatter(of_kind["distance"], of_kind["coverage"], label=kind)
        right.scatter(of_kind["distance"], of_kind["relative_error"], label=kind)
    left.axhline(0.9, color="black", linewidth=0.8, linestyle="--")
    left.set(xlabel="distance", ylabel="coverage of 90 % intervals", ylim=(0, 1.02))
    right.set(xlabel="distance", ylabel="relative error")
    left.legend(frameon=False)
    figure.savefig(HERE / "intervals.png", dpi=150)
    print(table.drop(columns="kind").round(3).to_string())
    columns = ["coverage", "coverage_strongest", "coverage_true", "half_width", "risk_coverage"]
    print(table.groupby("kind")[columns].agg(["mean", "min", "max"]).round(3).T.to_string())
    for data, of_data in table.groupby("data"):
        rank = of_data[["distance", "relative_error"]].corr("spearman").iloc[0, 1]
        area = metrics.area_under_risk_coverage(of_data["relative_error"], of_data["distance"])
        print(f"{data}: distance and relative error: rank correlation {rank:.2f}, area {area:.2f}")


if __name__ == "__main__":
    main()
