"""What a pilot experiment is worth: a few measured cells of a new context, or a few perturbations.

    python benchmarks/accuracy/pilot.py FOLDER

`cells`: n stimulated cells of a hidden type of Kang et al., or of each of the nine targets in a
hidden line of `crispr_multi.h5ad`, are given with the other contexts'; the others of them, with
half of the context's control cells that no model saw, are the truth. `perturbations`: all cells of
some targets are given in the hidden line, and the others are predicted. `pilot alone` is the mean
of the given stimulated cells less that of the given control cells (of `perturbations`, the mean
change of the given ones). Weights never saw the set. Writes `pilot.csv` and `pilot.png`.
"""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from common import (
    HERE,
    KANG,
    N_TOP_GENES,
    log_normalised,
    make_parser,
    paired_types,
    trained,
    without,
)
from joblib import Parallel, delayed
from matplotlib.figure import Figure

from spaperb.populations import mean_expression

SIZES = (0, 5, 10, 30)
N_GIVEN = (0, 1, 3, 6)
SCREEN = "crispr_multi"


class Pilot(NamedTuple):
    """Cells of a data set, the hidden context, what of it is given, and what is asked for."""

    kind: str
    data_set: str
    context: str
    n: int
    given: dict[str, int | None]
    """Stimulated cells that are given of each perturbation; `None` for all."""
    asked: list[str]


def pilots(kang: ad.AnnData, screen: ad.AnnData, seed: int) -> Iterator[Pilot]:
    """All experiments of a seed."""
    for n in SIZES:
        for name in paired_types(kang):
            yield Pilot("cells", KANG, name, n, {"stimulated": n}, ["stimulated"])
    lines = screen.obs.groupby("condition", observed=True)["cell_type"].nunique()
    targets = lines.index[lines == 4].drop("control").tolist()
    order = np.random.default_rng(seed).permutation(targets).tolist()
    for line in sorted(set(screen.obs["cell_type"]) - {"k562"}):
        for n in SIZES:
            yield Pilot("cells", SCREEN, line, n, dict.fromkeys(targets, n), targets)
        for n in N_GIVEN:
            # The same three are asked for, however many of the others are given.
            yield Pilot("perturbations", SCREEN, line, n, dict.fromkeys(order[:n]), order[-3:])


def run(cells: ad.AnnData, pilot: Pilot, seed: int) -> list[dict[str, Any]]:
    """Train with the pilot and predict."""
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(seed)
    condition = cells.obs["condition"].astype(str).to_numpy()
    is_here = (cells.obs["cell_type"] == pilot.context).to_numpy()

    def shuffled(name: str) -> np.ndarray:
        return rng.permutation(np.flatnonzero(is_here & (condition == name)))

    if cells.n_vars > N_TOP_GENES:
        # Genes are chosen without the context's stimulated cells, whatever of them is given.
        others = cells[~is_here | (condition == "control")]
        chosen = sc.pp.highly_variable_genes(
            others, flavor="seurat", n_top_genes=N_TOP_GENES, inplace=False
        )
        cells = cells[:, chosen["highly_variable"].to_numpy()].copy()
    control = shuffled("control")
    given_control, true_control = np.array_split(control, 2)
    order = {name: shuffled(name) for name in sorted(set(condition[is_here]) - {"control"})}
    given = {name: rows[: pilot.given.get(name, 0)] for name, rows in order.items()}
    rest = {name: rows[max(SIZES) :] for name, rows in order.items()}
    of_context = np.concatenate([given_control, *given.values()]).astype(int)
    train = cells[np.sort(np.concatenate([np.flatnonzero(~is_here), of_context]))].copy()
    model = trained(train, seed, without(pilot.data_set))
    query = cells[given_control].copy()
    before, measured = mean_expression(query.X), [n for n in given if len(given[n])]
    shifts = {n: mean_expression(cells.X[given[n]]) - before for n in measured}
    rows = []
    for name in pilot.asked:
        real = cells.X[rest[name] if pilot.kind == "cells" else order[name]]
        true = mean_expression(real) - mean_expression(cells.X[true_control])
        table = model.predict_response(query, name if len(model.perturbations) > 1 else None)
        table = table.set_index("gene").loc[cells.var_names]
        alone = shifts.get(name) if pilot.kind == "cells" else None
        if pilot.kind == "perturbations" and shifts:
            alone = np.mean(list(shifts.values()), axis=0)
        for method, change in {
            "spaperb_in_context": table["mean_change"].to_numpy(),
            "pilot alone": alone,
        }.items():
            if change is not None:
                rows.append(
                    {
                        "kind": pilot.kind,
                        "data_set": pilot.data_set,
                        "context": pilot.context,
                        "perturbation": name,
                        "n": pilot.n,
                        "method": method,
                        "seed": seed,
                        "pearson_delta": np.corrcoef(change, true)[0, 1],
                        "mse_mean": ((change - true) ** 2).mean(),
                        "half_width": (table["upper"] - table["lower"]).mean() / 2
                        if method != "pilot alone"
                        else np.nan,
                    }
                )
    return rows


def draw(table: pd.DataFrame) -> None:
    """Draw error and width against what was measured."""
    groups = table.groupby(["kind", "data_set"], sort=False)
    figure = Figure(figsize=(4 * len(groups), 6), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False)
    for (upper, lower), ((kind, data_set), rows) in zip(axes.T, groups, strict=True):
        for method, of in rows.groupby("method", sort=False):
            means = of.groupby("n")[["mse_mean", "half_width"]].mean()
            upper.plot(means.index, 1e3 * means["mse_mean"], marker="o", label=method)
            if method != "pilot alone":
                lower.plot(means.index, means["half_width"], marker="o", label=method)
        upper.set(title=f"{data_set}, {kind}", ylabel="mse_mean × 10³", yscale="log")
        lower.set(xlabel=f"{kind} measured", ylabel="half-width of intervals", ylim=(0, None))
    axes[0, 0].legend(frameon=False)
    figure.savefig(HERE / "pilot.png", dpi=150)


def main() -> None:
    """Run all pilots."""
    args = make_parser(__doc__, "folder", "--seeds", "--n-jobs").parse_args()
    kang = log_normalised(args.folder / f"{KANG}.h5ad")
    screen = ad.read_h5ad(args.folder / f"{SCREEN}.h5ad")
    screen.obs = screen.obs.rename(columns={"perturbation": "condition", "cell_line": "cell_type"})
    sets = {KANG: kang, SCREEN: screen}
    settings = [(p, seed) for seed in args.seeds for p in pilots(kang, screen, seed)]
    rows = Parallel(args.n_jobs)(delayed(run)(sets[p.data_set], p, seed) for p, seed in settings)
    table = pd.DataFrame([row for of in rows for row in of])
    table.to_csv(HERE / "pilot.csv", index=False, float_format="%.5g")
    draw(table)
    by = table.groupby(["kind", "data_set", "method", "n"], sort=False)
    print(by[["pearson_delta", "mse_mean", "half_width"]].mean().round(4).to_string())


if __name__ == "__main__":
    main()
