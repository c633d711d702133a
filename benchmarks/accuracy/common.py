"""What to take off a sum of two responses: half of the cells predict it, the other half is the truth.

    python benchmarks/accuracy/common.py crispr_multi.h5ad

On training cells alone: Norman et al. 2019 without the pairs that `crispr.py` hides. Shifts share the sampling noise of the control cells, which a pair's shift holds
once and the sum of two shifts twice; so the response to a pair is the sum of the responses to its parts less what perturbations have in
common. Three random halves of every perturbation and of the control cells of K562; the truth of two single perturbations is the
sum of their shifts in the other half, with this half's control noise once. Writes `common.csv` beside this file: the squared error, a mean
over genes, pairs of single perturbations and halves.
"""

import argparse
from itertools import combinations
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from crispr import HIDDEN_PAIRS
from spaperb.contexts import Contexts
from spaperb.response import Response, Subject

from spaperb.perturbations import Perturbations
from spaperb.populations import mean_expression

HERE = Path(__file__).parent
N_HALVES = 3
LINE = "k562"


def errors(cells: ad.AnnData, seed: int) -> pd.DataFrame:
    """Squared errors of each way to add two responses, a row a pair."""
    condition, line = (cells.obs[k].astype(str).to_numpy() for k in ("perturbation", "cell_line"))
    values, names = np.unique(condition), list(np.unique(line))
    known = Perturbations.of(values, "control", None, "+")
    arms, labels = known.arms[np.searchsorted(values, condition)], np.searchsorted(names, line)
    rng = np.random.default_rng(seed)
    kept = np.ones(cells.n_obs, dtype=bool)
    for name in values:
        of = np.flatnonzero((condition == name) & (line == LINE))
        kept[rng.permutation(of)[: len(of) // 2]] = False
    contexts = Contexts.of(cells.X[kept], arms[kept], labels[kept], names)
    k = contexts.names.index(LINE)
    subject = Subject(contexts.control[k], contexts.cells[k], k)

    def mean(name, half):
        return mean_expression(cells.X[(condition == name) & (line == LINE) & half])

    before, other = (mean("control", half) for half in (kept, ~kept))
    response = Response(contexts, known.parts, known.singles)
    everything = Response(contexts, known.parts, list(range(len(known.names))))
    singles = [i for i in known.singles if ((condition == known.names[i]) & (line == LINE)).any()]
    shift = {i: mean(known.names[i], kept) - before for i in singles}
    true = {i: mean(known.names[i], ~kept) - other for i in singles}
    r = {i: response.at_dose(subject, i, None).mean for i in singles}
    common, of_all = (x._common(subject, None) for x in (response, everything))
    rows = []
    for a, b in combinations(singles, 2):
        ways = {
            "strongest shift": max(shift[a], shift[b], key=np.linalg.norm),
            "sum of shifts": shift[a] + shift[b],
            "sum of responses": r[a] + r[b],
            "less what all have in common, pairs too (before)": r[a] + r[b] - of_all,
            "less what single ones have in common (default)": r[a] + r[b] - common,
        }
        truth = true[a] + true[b] - (before - other)
        rows.append({way: np.mean((change - truth) ** 2) for way, change in ways.items()})
    return pd.DataFrame(rows)


def main() -> None:
    """Run all halves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("crispr", type=Path)
    cells = ad.read_h5ad(parser.parse_args().crispr)
    cells = cells[~cells.obs["perturbation"].isin(HIDDEN_PAIRS)].copy()
    table = pd.concat([errors(cells, seed) for seed in range(N_HALVES)]).mean()
    table.rename("mse").rename_axis("change").to_csv(HERE / "common.csv", float_format="%.4g")
    print((1e3 * table).round(3).to_string())


if __name__ == "__main__":
    main()
