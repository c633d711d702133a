"""Kang et al. 2018: what more training cells, and more training contexts, are worth.

    python benchmarks/accuracy/learning_curve.py kang_pbmc_ifnb.h5ad

The folds of `kang.py` with a part of the training cells, three random parts each: a share of the
cells of every type and condition, or a few contexts (the others lose their stimulated cells if
contexts are cell types, all cells if they are donors). The hidden cells and the control cells of
their context are always the same. The method is the default model with weights that never saw Kang
et al., beside the best simple rule. Writes `learning_curve.csv` (median over parts; with the
ceiling, half of the real cells against the other) and a figure beside this file.
"""

from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import HERE, KANG, MIN_CELLS, N_TOP_GENES, log_normalised, make_parser, without

from spaperb.evaluation.baselines import KNNShift, OwnTypeShift
from spaperb.evaluation.benchmark import Method, SpaPerb, benchmark

SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
N_CONTEXTS = {"cell_type": (1, 2, 3, 4, 6), "donor": (1, 2, 3, 5, 7)}
RULES: dict[str, tuple[str, Method]] = {
    "cell_type": ("knn_shift", KNNShift()),
    "donor": ("own_type_shift", OwnTypeShift()),
}
METRICS = {"pearson_delta": 1.0, "mse_mean": 1e3}


class Part:
    """A method that sees a part of the training cells.

    Parameters
    ----------
    method
        The method.
    share
        Share of the cells of each type and condition that are kept, at least one.
    n_contexts
        Contexts with a response that are kept; ``None`` for all.
    """

    def __init__(self, method: Method, share: float = 1.0, n_contexts: int | None = None):
        self.method, self.share, self.n_contexts = method, share, n_contexts

    def fit(self, adata: ad.AnnData, *, held_out: str, seed: int, **setup: Any) -> "Part":
        """Fit on a part of the cells."""
        rng = np.random.default_rng(seed)
        context, condition = adata.obs[held_out], adata.obs["condition"]
        sizes = pd.crosstab(context, condition)
        # What is hidden has no stimulated cells, and stays as it is.
        is_hidden = context.isin(sizes.index[sizes["stimulated"] == 0]).to_numpy()
        kept = np.ones(adata.n_obs, dtype=bool)
        if self.n_contexts is not None:
            paired = sizes.index[sizes.min(axis=1) >= MIN_CELLS].to_numpy(dtype=object)
            kept = context.isin(rng.permutation(paired)[: self.n_contexts]).to_numpy() | is_hidden
            if held_out == "cell_type":
                kept |= (condition == "control").to_numpy()
        if self.share < 1:
            groups = adata.obs[~is_hidden].groupby(["cell_type", "condition"], observed=True)
            for names in groups.groups.values():
                n = max(1, round(self.share * len(names)))
                kept[adata.obs_names.get_indexer(rng.permutation(names)[n:])] = False
        self.method.fit(adata[kept].copy(), held_out=held_out, seed=seed, **setup)
        return self

    def predict(self, adata_control: ad.AnnData) -> np.ndarray:
        """Predict all control cells."""
        return self.method.predict(adata_control)


def curves(adata: ad.AnnData, held_out: str, n_jobs: int) -> pd.DataFrame:
    """Score both methods with every part."""
    parts = {("cells", share): {"share": share} for share in SHARES}
    parts |= {("contexts", n): {"n_contexts": n} for n in N_CONTEXTS[held_out]}
    rule, baseline = RULES[held_out]
    spaperb = SpaPerb(pretrained=without(KANG))
    methods = {
        f"{name}|{of}|{x}": Part(method, **part)
        for (of, x), part in parts.items()
        for name, method in (("spaperb_in_context", spaperb), (rule, baseline))
    }
    results = benchmark(
        adata,
        methods,
        held_out=held_out,
        min_cells=MIN_CELLS,
        n_top_genes=N_TOP_GENES,
        n_splits=20,
        n_jobs=n_jobs,
    )
    if (failed := results["error"].dropna()).any():
        raise RuntimeError(f"A fold failed: {failed.iloc[0]}")
    results = results[results["metric"].isin(METRICS)]
    results[["method", "of", "x"]] = results["method"].str.split("|", expand=True).to_numpy()
    keys = ["of", "x", "method", "metric", "context"]
    table = results.groupby(keys, sort=False)[["value", "ceiling"]].median().reset_index()
    return table.assign(held_out=held_out, x=table["x"].astype(float))


def plot(table: pd.DataFrame, path: Path) -> None:
    """Mean over contexts by cells and by contexts; each context a thin line."""
    figure, panels = plt.subplots(len(METRICS), 4, figsize=(13, 6), layout="constrained")
    columns = [(held_out, of) for held_out in N_CONTEXTS for of in ("cells", "contexts")]
    for row, (metric, unit) in zip(panels, METRICS.items(), strict=True):
        for panel, (held_out, of) in zip(row, columns, strict=True):
            of_panel = table.query("held_out == @held_out and of == @of and metric == @metric")
            values = of_panel.assign(value=of_panel["value"] * unit)
            for color, (method, rows) in zip(
                ("C7", "C0"), values.groupby("method", sort=True), strict=True
            ):
                by_context = rows.pivot(index="x", columns="context", values="value")
                panel.plot(by_context, color=color, linewidth=0.5, alpha=0.5)
                panel.plot(by_context.mean(axis=1), "o-", color=color, label=method)
            ceiling = of_panel.groupby("context")["ceiling"].first().mean() * unit
            panel.axhline(ceiling, color="black", linestyle=":", label="ceiling")
            if of == "cells":
                panel.set_xscale("log")
            panel.set_xlabel(
                "share of training cells"
                if of == "cells"
                else f"training {held_out}s".replace("_", " ")
            )
            panel.set_title(f"hidden: {held_out}".replace("_", " "))
        row[0].set_ylabel(metric if unit == 1 else f"{metric} × {unit:.0f}")
    for panel in panels[0]:
        panel.legend(loc="lower right", fontsize="x-small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run both protocols."""
    args = make_parser(__doc__, "file", "--n-jobs").parse_args()
    adata = log_normalised(args.file)
    table = pd.concat([curves(adata, held_out, args.n_jobs) for held_out in N_CONTEXTS])
    order = ["held_out", "of", "x", "method", "metric", "context", "value", "ceiling"]
    table = table[order]
    table.to_csv(HERE / "learning_curve.csv", index=False, float_format="%.4g")
    plot(table, HERE / "learning_curve.png")
    means = table.groupby(["metric", "held_out", "of", "x", "method"])["value"].mean()
    print(means.unstack().to_string())


if __name__ == "__main__":
    main()
