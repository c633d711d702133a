"""One row for each attack: what was tried, how often, what happened."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "speed"))

import machine  # noqa: E402


def row(attack: str, outcomes: Iterable[str], good: Iterable[str], **more: Any) -> dict[str, Any]:
    """Count the outcomes of an attack, and how many are as they should be.

    Parameters
    ----------
    attack
        What was tried.
    outcomes
        What happened, once for each try.
    good
        Outcomes that should be.
    **more
        Further columns.
    """
    counts = Counter(outcomes)
    result = {
        "attack": attack,
        "tries": counts.total(),
        "passed": sum(counts[outcome] for outcome in good),
        "outcomes": "; ".join(f"{n} {outcome}" for outcome, n in counts.most_common()),
        **more,
    }
    print(result, flush=True)
    return result


def write(name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows beside the scripts, with the machine; end with an error if an attack succeeded that is not ``known`` to."""
    table = pd.DataFrame(rows)
    known = table.get("known", pd.Series(index=table.index)).notna()
    table["machine"] = machine.describe()
    table.to_csv(HERE / f"{name}.csv", index=False, float_format="%.4g")
    print(table.drop(columns="machine").to_string(index=False))
    if (table["tries"] == 0).any():
        sys.exit("An attack was never tried.")
    if ((table["passed"] < table["tries"]) & ~known).any():
        sys.exit("An attack succeeded.")
