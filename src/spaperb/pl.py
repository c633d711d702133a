"""Plots of predicted and real cells. Each takes arrays and returns matplotlib Axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import sparse

from spaperb._types import Expression
from spaperb.metrics import mean_expression, r2_mean

# Okabe and Ito's colours, told apart by colour-blind readers too.
PALETTE = ["#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]


def mean_expression_scatter(
    predicted: Expression,
    real: Expression,
    var_names: Sequence[str],
    *,
    control: Expression | None = None,
    n_labels: int = 10,
    title: str | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Plot each gene's predicted mean against its real mean.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``.
    real
        Real stimulated cells, ``(n_real, G)``.
    var_names
        Gene names, ``(G,)``.
    control
        Control cells, ``(n_control, G)``, to show "no change" in grey and to label the genes that
        really changed most; without them the genes of the largest error are labelled.
    n_labels
        Number of genes to label.
    title
        Title of the plot.
    ax
        Axes to draw on.
    save
        File to save the figure to.
    """
    ax = ax if ax is not None else Figure(figsize=(5, 5), layout="constrained").subplots()
    mean_predicted, mean_real = mean_expression(predicted), mean_expression(real)
    if control is not None:
        mean_control = mean_expression(control)
        ax.scatter(
            mean_real,
            mean_control,
            s=6,
            color=PALETTE[0],
            label=f"no change, R² = {r2_mean(control, real):.2f}",
            rasterized=True,
        )
    ax.scatter(
        mean_real,
        mean_predicted,
        s=6,
        color=PALETTE[2],
        label=f"predicted, R² = {r2_mean(predicted, real):.2f}",
        rasterized=True,
    )
    ax.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle="--")
    ax.set_xlabel("real stimulated mean")
    ax.set_ylabel("predicted mean")
    ax.legend(loc="upper left", frameon=False)
    if title:
        ax.set_title(title)
    change = mean_real - (mean_predicted if control is None else mean_control)
    _label(ax, mean_real, mean_predicted, var_names, np.argsort(-np.abs(change))[:n_labels])
    return _finish(ax, save)


def umap(
    populations: Mapping[str, Expression],
    *,
    title: str | None = None,
    seed: int = 0,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Embed populations of cells together and colour them by population.

    The embedding is scanpy's: 50 principal components, 15 neighbours, UMAP.

    Parameters
    ----------
    populations
        Log-normalised expression of each population, ``(n_cells, G)``, by its name.
    title
        Title of the plot.
    seed
        Seed of the embedding.
    ax
        Axes to draw on.
    save
        File to save the figure to.
    """
    ax = ax if ax is not None else Figure(figsize=(6, 4.5), layout="constrained").subplots()
    cells = ad.concat(
        {name: ad.AnnData(sparse.csr_matrix(x)) for name, x in populations.items()},
        label="population",
        index_unique="-",
    )
    n_comps = min(50, min(cells.shape) - 1)
    sc.pp.pca(cells, n_comps=n_comps, random_state=seed)
    sc.pp.neighbors(cells, n_neighbors=min(15, cells.n_obs - 1), random_state=seed)
    sc.tl.umap(cells, random_state=seed)
    # In random order, so that no population hides another.
    order = np.random.default_rng(seed).permutation(cells.n_obs)
    colors = dict(zip(populations, PALETTE, strict=False))
    names = cells.obs["population"].to_numpy()[order]
    x, y = cells.obsm["X_umap"][order].T
    ax.scatter(
        x,
        y,
        s=min(20, 12_000 / cells.n_obs),
        c=[colors[name] for name in names],
        linewidths=0,
        rasterized=True,
    )
    for name, color in colors.items():
        ax.scatter([], [], color=color, label=f"{name} ({(names == name).sum():,})")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", title=title or "")
    return _finish(ax, save)


def _label(
    ax: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], chosen: np.ndarray
) -> None:
    texts = [ax.text(x[i], y[i], names[i], fontsize=8) for i in chosen]
    if texts:
        adjust_text(texts, x=x, y=y, ax=ax, arrowprops={"arrowstyle": "-", "linewidth": 0.5})


def _finish(ax: Axes, save: str | Path | None) -> Axes:
    figure = ax.get_figure(root=True)
    if save is not None and figure is not None:
        figure.savefig(save, dpi=150)
    return ax
