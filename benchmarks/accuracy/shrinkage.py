"""How a measured change is best shrunk: half of the stimulated cells measure it, the other half is the truth.

    python benchmarks/accuracy/shrinkage.py kang_pbmc_ifnb.h5ad crispr_multi.h5ad

On training cells alone: of Kang et al. 2018 without one donor's stimulated cells, each cell type; of Norman et al. 2019 without the pairs
that `crispr.py` hides, each perturbation of K562. Three random halves. The change is prior + t / (t + v) (shift - prior), with the prior
and the sampling variance v of `spaperb.response` and t as named in each row. Writes `shrinkage.csv` beside this file: the squared error,
a mean over genes, contexts and halves.
"""

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from crispr import HIDDEN_PAIRS
from spaperb.contexts import Contexts
from spaperb.response import BY_CHANCE, Response

from spaperb.perturbations import Perturbations
from spaperb.populations import mean_expression

HERE = Path(__file__).parent
N_HALVES = 3


def kang_cells(path: Path) -> ad.AnnData:
    """Training cells of one fold by donor, 2,000 genes."""
    cells = ad.read_h5ad(path)
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    first = sorted(cells.obs["donor"].unique())[0]
    cells = cells[(cells.obs["donor"] != first) | (cells.obs["condition"] == "control")].copy()
    sc.pp.highly_variable_genes(cells, n_top_genes=2000)
    return cells[:, cells.var["highly_variable"]].copy()


def errors(cells: ad.AnnData, condition_key: str, labels_key: str, measured: list[str]) -> dict:
    """Squared errors of each way to shrink, for halves of each perturbation in the given contexts."""
    condition, label = (
        cells.obs[key].astype(str).to_numpy() for key in (condition_key, labels_key)
    )
    values, names = np.unique(condition), list(np.unique(label))
    known = Perturbations.of(values, "control", None, "+")
    arms, labels = known.arms[np.searchsorted(values, condition)], np.searchsorted(names, label)
    rows = []
    for half in range(N_HALVES):
        rng = np.random.default_rng(half)
        is_kept = np.ones(len(arms), dtype=bool)
        for name in known.names:
            for context in measured:
                of = np.flatnonzero((condition == name) & (label == context))
                is_kept[rng.permutation(of)[: len(of) // 2]] = False
        contexts = Contexts.of(cells.X[is_kept], arms[is_kept], labels[is_kept], names)
        response = Response(contexts, known.parts, known.singles)
        for context in measured:
            for sample in response.of_context[contexts.names.index(context)]:
                treatment, i = contexts.treatments[sample.treatment], sample.place
                name = known.names[treatment.perturbation]
                truth = mean_expression(
                    cells.X[(condition == name) & (label == context) & ~is_kept]
                ) - mean_expression(cells.X[(condition == "control") & (label == context)])
                shift, v = treatment.shifts[i], treatment.variances[i]
                known_by = response._known(sample)
                regression = response.regression(*known_by)
                description = response._describe(sample, *known_by)
                prior = description.anchors @ regression.anchor_weights
                scale2, error = description.scale**2, shift - prior
                own = max((error**2 - v).sum(), 0) / scale2.sum()
                each = np.maximum(error**2 - v, 0)
                rho = max(0.0, 1 - v.sum() / (error**2).sum())
                ways = {
                    "of all shifts, times scale²": scale2 * regression.tau2,
                    "of this shift, times scale²": scale2 * own,
                    "of each gene": each,
                    "largest of all shifts' and of each gene": np.maximum(
                        scale2 * regression.tau2, each
                    ),
                    "largest of all shifts' and rho of each gene (default)": np.maximum(
                        scale2 * regression.tau2, rho * each
                    ),
                    "largest of all shifts' and rho of each gene beyond 9 v (of one cell)": (
                        np.maximum(scale2 * regression.tau2, rho * (error**2 - BY_CHANCE * v))
                    ),
                    "largest of this shift's and of each gene": np.maximum(scale2 * own, each),
                }
                row = {
                    way: np.mean((prior + t / np.maximum(t + v, 1e-12) * error - truth) ** 2)
                    for way, t in ways.items()
                }
                rows.append(
                    row
                    | {
                        "the shift as measured": np.mean((shift - truth) ** 2),
                        "the prior": np.mean((prior - truth) ** 2),
                        "no change": np.mean(truth**2),
                    }
                )
    return pd.DataFrame(rows).mean().to_dict()


def main() -> None:
    """Run both data sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kang", type=Path)
    parser.add_argument("crispr", type=Path)
    args = parser.parse_args()
    kang, crispr = kang_cells(args.kang), ad.read_h5ad(args.crispr)
    crispr = crispr[~crispr.obs["perturbation"].isin(HIDDEN_PAIRS)].copy()
    types = [t for t in kang.obs["cell_type"].cat.categories if t != "Megakaryocytes"]
    table = pd.DataFrame(
        {
            "kang": errors(kang, "condition", "cell_type", types),
            "crispr": errors(crispr, "perturbation", "cell_line", ["k562"]),
        }
    )
    table.rename_axis("t").to_csv(HERE / "shrinkage.csv", float_format="%.4g")
    print(table.to_string())


if __name__ == "__main__":
    main()
