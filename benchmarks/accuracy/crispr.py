"""Two CRISPR screens: pairs from their single parts, and targets in a cell line without them.

    python benchmarks/accuracy/crispr.py crispr_multi.h5ad --task pairs
    python benchmarks/accuracy/crispr.py crispr_multi.h5ad --task targets

pairs: the five pairs of Norman et al. 2019 (K562, activation) whose parts both were measured alone
are hidden at once and predicted from all other cells. targets: each of the nine targets that all
four cell lines share (McFaline-Figueroa et al. 2023: A172, T98G, U87MG, interference) is hidden in
one line at a time. Writes `crispr_<task>.csv`, `crispr_<task>_summary.csv` and a figure for each
of two metrics beside this file. `--folds DIR` keeps finished folds; `--only METHOD ...` runs some
methods and replaces their rows alone.
"""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from common import chosen, make_parser, without, write

from spaperb import baselines, populations
from spaperb.evaluation.baselines import BASELINES
from spaperb.evaluation.benchmark import SpaPerb, benchmark

HIDDEN_PAIRS = [
    "KLF1+MAP2K6",
    "KLF1+TGFBR2",
    "MAP2K3+MAP2K6",
    "MAP2K3+SLC38A2",
    "MAPK1+TGFBR2",
]
"""All pairs of the file whose parts both were measured alone."""
SETUP: dict[str, Any] = {"condition_key": "perturbation", "labels_key": "cell_line"}


class ShiftOf:
    """Add a shift made of those of all perturbations in the control cells' line.

    Parameters
    ----------
    make
        From the perturbations' shifts by name, and the name of the hidden one, to a shift.
    """

    def __init__(self, make):
        self.make = make

    def fit(self, adata, *, condition_key, control, stimulated, labels_key, **setup):
        """Learn the shifts of each line."""
        self.stimulated, self.labels_key, self.shifts = stimulated, labels_key, {}
        condition = adata.obs[condition_key].to_numpy()
        for line in adata.obs[labels_key].unique():
            of_line = (adata.obs[labels_key] == line).to_numpy()
            before = populations.mean_expression(adata.X[of_line & (condition == control)])
            self.shifts[line] = {
                name: populations.mean_expression(adata.X[of_line & (condition == name)]) - before
                for name in np.unique(condition[of_line])
                if name != control
            }
        return self

    def predict(self, adata_control):
        """Add the shift."""
        (line,) = adata_control.obs[self.labels_key].unique()
        shift = self.make(self.shifts[line], self.stimulated)
        return np.maximum(populations.dense(adata_control.X) + shift, 0)


def additive(shifts, pair):
    """Sum of the parts' shifts."""
    return sum(shifts[part] for part in pair.split("+"))


def strongest(shifts, pair):
    """Shift of the part that changes most."""
    return max((shifts[part] for part in pair.split("+")), key=np.linalg.norm)


def mean_of_all(shifts, hidden):
    """Mean over all perturbations."""
    return np.mean(list(shifts.values()), axis=0)


METHODS = {
    "pairs": {
        "spaperb_in_context": SpaPerb(all_perturbations=True, pretrained=without("crispr_multi")),
        "additive shift": ShiftOf(additive),
        "strongest part": ShiftOf(strongest),
        "mean over perturbations": ShiftOf(mean_of_all),
        "no_change": baselines.NoChange(),
    },
    "targets": {
        "spaperb_in_context": SpaPerb(all_perturbations=True, pretrained=without("crispr_multi")),
        "mean over perturbations": ShiftOf(mean_of_all),
        **BASELINES,
    },
}


def run_pairs(cells: ad.AnnData, methods: dict[str, Any], **kwargs) -> pd.DataFrame:
    """Hide the pairs and predict each."""
    results = []
    for pair in HIDDEN_PAIRS:
        others = [name for name in HIDDEN_PAIRS if name != pair]
        # The benchmark hides this pair, and the others are not there at all.
        seen = cells[~cells.obs["perturbation"].isin(others)].copy()
        of_pair = benchmark(seen, methods, stimulated=pair, contexts=["k562"], **kwargs)
        results.append(of_pair.assign(context=pair))
    return pd.concat(results)


def run_targets(cells: ad.AnnData, methods: dict[str, Any], **kwargs) -> pd.DataFrame:
    """Hide each shared target in each line."""
    lines = cells.obs.groupby("perturbation", observed=True)["cell_line"].nunique()
    results = []
    for target in lines.index[lines == 4].drop("control"):
        names = sorted(cells.obs["cell_line"].unique())
        of_target = benchmark(cells, methods, stimulated=target, contexts=names, **kwargs)
        results.append(of_target.assign(context=f"{target}, " + of_target["context"]))
    return pd.concat(results)


def main() -> None:
    """Run one task."""
    parser = make_parser(__doc__, "file", "--seeds", "--folds", "--only", "--n-jobs")
    parser.add_argument("--task", choices=["pairs", "targets"], required=True)
    args = parser.parse_args()
    run = {"pairs": run_pairs, "targets": run_targets}[args.task]
    known = METHODS[args.task]
    methods = chosen(known, args.only)
    cells = ad.read_h5ad(args.file)
    how = {"seeds": args.seeds, "n_jobs": args.n_jobs, "folder": args.folds, **SETUP}
    results = run(cells, methods, held_out="cell_line", **how)
    stay = set(known) - set(methods)
    write(results, f"crispr_{args.task}", ["pearson_delta", "mse_mean"], stay)


if __name__ == "__main__":
    main()
