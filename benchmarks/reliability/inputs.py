"""What becomes of odd cells: the examples of `tests/test_inputs.py`, counted by kind and outcome.

    python benchmarks/reliability/inputs.py

Hypothesis draws 500 cases of cells, models and questions: matrix formats and types of numbers, odd
names and categories, one gene, three cells, silent and constant genes, values up to a million,
views, repeated names. Each is set up, trained for an epoch or two, and predicted. What is
predicted is predicted again in other ways (labels of another type, genes in another order, set up
twice, from a file), and has to be the same. Of 100 cases of simulated cells predictions keep what
is promised of them, and what would make them wrong (another scale, exchanged cell types) has to be
told. In 50 more hardly any stimulated cell of a type was measured, which must do no harm. The seed
is fixed; the cases follow from it and the version of Hypothesis. Writes `inputs.csv` beside this
file, and prints each case that went wrong.
"""

import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable

import pandas as pd
import scvi
from common import HERE
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from rich.progress import track

sys.path.insert(0, str(HERE.parents[1] / "tests"))

from odd_cells import CASES, FEW, SOUND, Case, Few, Sound
from test_inputs import ChangedError, examine, examine_few, examine_sound

WRONG = ("wrong answer", "other exception", "changed AnnData")
ATTACKS = ((CASES, examine, 500), (SOUND, examine_sound, 100), (FEW, examine_few, 50))


def drawn(strategy: SearchStrategy, n: int) -> list:
    """Draw cases."""
    cases = []

    @seed(0)
    @settings(
        max_examples=n,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(case: Case | Sound | Few) -> None:
        cases.append(case)

    draw()
    return cases


class Tally:
    """A judge that counts outcomes by kind, and goes on after what is wrong."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def __call__(self, kind: str, attack: Callable[[], str]) -> None:
        """Carry out an attack."""
        try:
            outcome = attack()
        except Exception as error:  # noqa: BLE001 - which one it is, is the question
            print(f"{kind}: {case}")
            traceback.print_exc()
            outcome = "wrong answer" if isinstance(error, AssertionError) else "other exception"
            outcome = "changed AnnData" if isinstance(error, ChangedError) else outcome
        self.counts[kind, outcome] += 1

    def table(self) -> pd.DataFrame:
        """Count cases by kind and outcome; the wrong outcomes of a kind are there with 0, too."""
        kinds = sorted({kind for kind, _ in self.counts})
        missing = {(kind, name): 0 for kind in kinds for name in WRONG}
        cases = pd.Series({**missing, **self.counts}, name="cases").sort_index()
        return cases.rename_axis(["kind", "outcome"]).reset_index()


if __name__ == "__main__":
    scvi.settings.verbosity = logging.ERROR
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tally, n_cases, longest = Tally(), 0, 0.0
    for strategy, examined, n in ATTACKS:
        for case in track(drawn(strategy, n)):
            start = time.perf_counter()
            examined(case, tally)
            n_cases, longest = n_cases + 1, max(longest, time.perf_counter() - start)
    table = tally.table()
    table.to_csv(HERE / "inputs.csv", index=False)
    print(table.to_string(index=False))
    print(f"{n_cases} cases, the longest took {longest:.1f} seconds.")
    if table.loc[table["outcome"].isin(WRONG), "cases"].any():
        sys.exit("An attack succeeded.")
