"""Methods by data sets: mean, worst context and ceiling, and which method wins how often.

    python benchmarks/accuracy/ranks.py

Reads the results of `data_sets.py` beside this file, and prints three tables for each of two
metrics: means over the folds of each data set, the worst fold, and over all folds the mean rank,
the share of folds won, and in how many the default model is ahead of each method, with the P value
of a sign test. Folds of one data set have training cells in common, so the test over folds claims
too much; that over data sets, of their means, does not.
"""

import pandas as pd
from common import HERE, read_folds
from scipy.stats import binomtest

OURS = "spaperb_in_context"
METRICS = {"pearson_delta": ("max", 1.0, 3), "mse_mean": ("min", 1e3, 2)}
"""What is best, factor and digits."""


def scores(metric: str) -> pd.DataFrame:
    """Median over seeds of each method in each fold, and the ceiling."""
    rows = read_folds(HERE / "data_sets.csv")
    rows = rows[rows["metric"] == metric]
    of_fold = ["data_set", "context"]
    wide = rows.groupby([*of_fold, "method"], sort=False)["value"].median().unstack()
    return wide.assign(**{"*ceiling*": rows.groupby(of_fold, sort=False)["ceiling"].median()})


def sign_test(is_ahead: pd.Series) -> float:
    """P value of as many wins or more by chance, one-sided."""
    return float(binomtest(int(is_ahead.sum()), len(is_ahead), alternative="greater").pvalue)


def duels(of_folds: pd.DataFrame, best: str) -> pd.DataFrame:
    """Where the default model is ahead of each other method, over folds and over data sets."""
    rows = {}
    for other in of_folds.columns.drop([OURS, "*ceiling*"]):
        both = of_folds[[OURS, other]].dropna()
        gain = (both[OURS] - both[other]) * (1 if best == "max" else -1)
        of_sets = gain.groupby(level="data_set").mean()
        rows[other] = {
            "folds ahead": f"{(gain > 0).sum()} of {len(gain)}",
            "P": sign_test(gain > 0),
            "data sets ahead": f"{(of_sets > 0).sum()} of {len(of_sets)}",
            "P ": sign_test(of_sets > 0),
        }
    return pd.DataFrame(rows).T


def main() -> None:
    """Print all tables."""
    for metric, (best, factor, digits) in METRICS.items():
        of_folds = scores(metric)
        methods = of_folds.drop(columns="*ceiling*")
        ranks = methods.rank(axis=1, ascending=best == "min")
        table = pd.DataFrame(
            {"mean rank": ranks.mean(), "won": (ranks == 1).where(methods.notna()).mean()}
        )
        table = table.join(duels(of_folds, best)).sort_values("mean rank")
        by_set = of_folds.groupby(level="data_set", sort=False)
        worst = by_set.min() if best == "max" else by_set.max()
        for title, values in (("mean", by_set.mean()), ("worst fold", worst)):
            print(f"\n{metric}, {title}\n")
            print((factor * values.T).round(digits).to_string())
        print(f"\n{metric}, all folds\n")
        print(table.round({"mean rank": 1, "won": 2}).to_string())


if __name__ == "__main__":
    main()
