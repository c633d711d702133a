"""What the scripts here share: simulated cells, and one row for each attack."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd

from spaperb import datasets

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.speed.common import answer_of, describe_machine

__all__ = ["HERE", "answer_of", "make_cells", "make_row", "write"]

HERE = Path(__file__).parent


def make_cells(n_cells: int, n_genes: int, seed: int = 0) -> ad.AnnData:
    """Simulate three types, so many cells of each and condition, without what tells the truth."""
    cells = datasets.simulated(n_cell_types=3, n_cells=n_cells, n_genes=n_genes, seed=seed)
    cells.layers.clear()
    return cells


def make_row(
    attack: str, outcomes: Iterable[str], good: Iterable[str], **more: Any
) -> dict[str, Any]:
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
    """Write the rows beside the scripts, with the machine.

    Ends with an error if an attack succeeded that is not ``known`` to.
    """
    table = pd.DataFrame(rows)
    known = table.get("known", pd.Series(index=table.index)).notna()
    table["machine"] = describe_machine()
    table.to_csv(HERE / f"{name}.csv", index=False, float_format="%.4g")
    print(table.drop(columns="machine").to_string(index=False))
    if (table["tries"] == 0).any():
        sys.exit("An attack was never tried.")
    if ((table["passed"] < table["tries"]) & ~known).any():
        sys.exit("An attack succeeded.")
