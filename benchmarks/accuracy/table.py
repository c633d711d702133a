"""Print the table of README.md from a committed CSV.

    python benchmarks/accuracy/table.py kang_cell_type.csv [more.csv ...]

Mean over contexts of the median over seeds; ± the standard deviation over seeds of the mean over
contexts. Each seed draws the split of the control cells, so all methods vary with it.
"""

import argparse

import pandas as pd
from common import HERE, read_folds

# metric, column, factor, digits, heading
COLUMNS = [
    ("pearson_delta", "value", 1, 3, "pearson_delta"),
    ("pearson_delta_specific", "value", 1, 3, "specific"),
    ("discrimination", "value", 1, 2, "discrimination"),
    ("weighted_r2_delta", "value", 1, 2, "weighted R²"),
    ("mse_mean", "value", 1e3, 1, "mse_mean × 10³"),
    ("energy_distance", "of_no_change", 1, 3, "energy distance / no change"),
    ("variance_ratio", "value", 1, 2, "variance_ratio"),
    ("zero_fraction_error", "value", 1, 2, "zero_fraction_error"),
    ("deg_overlap", "value", 1, 2, "deg_overlap"),
    ("deg_average_precision", "value", 1, 2, "DEGs, average precision"),
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="results of a benchmark, beside this file")
    results = pd.concat([read_folds(HERE / name) for name in parser.parse_args().files])
    # The ceiling as one more method.
    ceiling = results.drop_duplicates(["context", "seed", "metric"]).assign(method="*ceiling*")
    results = pd.concat([results, ceiling.assign(value=ceiling["ceiling"])])
    results["of_no_change"] = results["value"] / results["floor"]

    keys, values = ["method", "metric"], ["value", "of_no_change"]
    mean = results.groupby([*keys, "context"])[values].median().groupby(keys).mean()
    spread = results.groupby([*keys, "seed"])[values].mean().groupby(keys).std()
    methods = mean.xs("pearson_delta", level="metric")["value"].sort_values(ascending=False).index

    columns = [column for column in COLUMNS if column[0] in set(results["metric"])]
    print("| | " + " | ".join(heading for *_, heading in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for method in methods:
        cells = []
        for metric, column, factor, digits, _ in columns:
            cell = f"{factor * mean.loc[(method, metric), column]:.{digits}f}"
            deviation = factor * spread.loc[(method, metric), column]
            cells.append(cell + (f" ± {deviation:.{digits}f}" if deviation > 1e-9 else ""))
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
