"""What becomes of odd cells: the examples of `tests/test_inputs.py`, counted by outcome.

    python benchmarks/reliability/inputs.py

Hypothesis draws 500 cases of cells, models and questions: matrix formats and types of numbers, odd names and categories, one gene, three cells,
silent and constant genes, values up to a million, views, repeated names. Each is set up, trained for an epoch or two, predicted, saved, loaded and
predicted again. The seed is fixed; the cases follow from it and the version of Hypothesis. Writes `inputs.csv` beside this file, and
prints each case that went wrong.
"""

import logging
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pandas as pd
import scvi
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.progress import track

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from odd_cells import CASES, Case  # noqa: E402
from test_inputs import ChangedError, examine  # noqa: E402

N_CASES = 500


@seed(0)
@settings(
    max_examples=N_CASES,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(CASES)
def draw(case: Case) -> None:
    """Collect the cases."""
    cases.append(case)


def outcome(case: Case) -> str:
    """Name what becomes of a case."""
    try:
        return examine(case)
    except Exception as error:  # noqa: BLE001 - which one it is, is the question
        print(case)
        traceback.print_exc()
        if isinstance(error, ChangedError):
            return "changed AnnData"
        return "wrong answer" if isinstance(error, AssertionError) else "other exception"


if __name__ == "__main__":
    scvi.settings.verbosity = logging.ERROR
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cases: list[Case] = []
    draw()
    counts, longest = Counter(), 0.0
    for case in track(cases):
        start = time.perf_counter()
        counts[outcome(case)] += 1
        longest = max(longest, time.perf_counter() - start)
    wrong = ["wrong answer", "other exception", "changed AnnData"]
    table = pd.Series({**counts, **{name: counts[name] for name in wrong}}).rename("cases")
    table = table.rename_axis("outcome").reset_index().sort_values("outcome")
    table.to_csv(HERE / "inputs.csv", index=False)
    print(table.to_string(index=False))
    print(f"{len(cases)} cases, the longest took {longest:.1f} seconds.")
    if any(counts[name] for name in wrong):
        sys.exit("An attack succeeded.")
