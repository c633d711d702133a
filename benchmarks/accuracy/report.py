"""What a benchmark leaves behind: its results and their summary as CSV, figures, and a table on the screen."""

from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from spaperb import pl
from spaperb.evaluation.benchmark import summary

HERE = Path(__file__).parent


def write(
    results: pd.DataFrame, name: str, metrics: Sequence[str] = (), stay: Collection[str] = ()
) -> None:
    """Write `<name>.csv`, `<name>_summary.csv` and a figure for each of some metrics beside this file.

    Rows of methods that `stay` are those of the file that is there.
    """
    if stay:
        before = pd.read_csv(HERE / f"{name}.csv", dtype={"context": str})
        results = pd.concat([results, before[before["method"].isin(stay)]])
    results.to_csv(HERE / f"{name}.csv", index=False, float_format="%.6g")
    table = summary(results)
    table.to_csv(HERE / f"{name}_summary.csv", index=False, float_format="%.6g")
    for metric in metrics:
        pl.benchmark(results, metric, save=HERE / f"{name}_{metric}.png")
    print(table.pivot(index="method", columns="metric", values="mean").round(3).to_string())
