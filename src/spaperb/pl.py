"""Plots of predicted and real cells. Each takes arrays and tables, and returns matplotlib Axes.

Without ``ax`` a plot opens a figure of its own, with matplotlib's settings, which are scanpy's
after :func:`scanpy.set_figure_params`. Colours are told apart by colour-blind readers too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from adjustText import adjust_text
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy import sparse
from sklearn.decomposition import PCA

from spaperb import populations
from spaperb._files import atomic_write
from spaperb._types import Expression
from spaperb.evaluation import metrics

PALETTE = ["#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
"""Colours of Okabe and Ito (2008)."""
N_NEIGHBORS = 15
"""Neighbours of a cell in a UMAP."""
MOST_MOVES = 100
"""Rounds in which labels move apart."""


def mean_expression(
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
    ax = _axes(ax, 5, 5)
    x, y = populations.mean_expression(real), populations.mean_expression(predicted)
    change = x - y
    if control is not None:
        y_control = populations.mean_expression(control)
        change = x - y_control
        label = f"no change, R² = {metrics.r2_mean(control, real):.2f}"
        ax.scatter(x, y_control, s=6, color=PALETTE[0], label=label, rasterized=True)
    label = f"predicted, R² = {metrics.r2_mean(predicted, real):.2f}"
    ax.scatter(x, y, s=6, color=PALETTE[2], label=label, rasterized=True)
    ax.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle="--")
    ax.set(xlabel="real stimulated mean", ylabel="predicted mean", title=title or "")
    ax.legend(loc="upper left", frameon=False)
    _label(ax, x, y, var_names, metrics.top_genes(change, n_labels))
    return _finish(ax, save)


def mean_change(
    predicted: Expression,
    real: Expression,
    control: Expression,
    var_names: Sequence[str],
    *,
    n_labels: int = 10,
    title: str | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Plot each gene's predicted mean change against its real mean change.

    The 100 top differentially expressed genes (Wilcoxon, real against control) are coloured, and
    the first of them labelled.

    Parameters
    ----------
    predicted
        Predicted stimulated cells, ``(n_predicted, G)``.
    real
        Real stimulated cells, ``(n_real, G)``.
    control
        Control cells, ``(n_control, G)``.
    var_names
        Gene names, ``(G,)``.
    n_labels
        Number of genes to label.
    title
        Title of the plot.
    ax
        Axes to draw on.
    save
        File to save the figure to.
    """
    ax = _axes(ax, 5, 5)
    mean_control = populations.mean_expression(control)
    x = populations.mean_expression(real) - mean_control
    y = populations.mean_expression(predicted) - mean_control
    degs = metrics.top_genes(populations.wilcoxon_scores(real, control))
    for genes, color, name in (
        (np.setdiff1d(np.arange(len(x)), degs), PALETTE[0], "other genes"),
        (degs, PALETTE[2], f"{len(degs)} top DEGs"),
    ):
        ax.scatter(x[genes], y[genes], s=8, color=color, label=name, rasterized=True)
    ax.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle="--")
    ax.axhline(0, color="black", linewidth=0.4)
    ax.axvline(0, color="black", linewidth=0.4)
    r_all = metrics.pearson_delta(predicted, real, control)
    r_degs = metrics.pearson_delta(predicted, real, control, degs)
    ax.legend(
        loc="upper left",
        framealpha=0.9,
        edgecolor="none",
        title=f"r = {r_all:.2f}, top DEGs r = {r_degs:.2f}",
    )
    ax.set(xlabel="real mean change", ylabel="predicted mean change", title=title or "")
    _label(ax, x, y, var_names, degs[:n_labels])
    return _finish(ax, save)


def response(
    table: pd.DataFrame,
    group: Any | None = None,
    *,
    n_labels: int = 15,
    title: str | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Plot each gene's predicted mean change against how sure it is, like a volcano plot.

    Sure is the absolute score: the change over half the width of its interval. Above 1, the dashed
    line, the interval leaves out 0 and the gene is coloured. The surest genes are labelled and
    show their interval.

    Parameters
    ----------
    table
        Output of :meth:`spaperb.SpaPerbModel.predict_response`.
    group
        Group to show; may be left out if the table has only one.
    n_labels
        Number of genes to label.
    title
        Title; by default the group and its distance from training.
    ax
        Axes to draw on.
    save
        File to save the figure to.

    Raises
    ------
    ValueError
        If the table has no such group, or several and none is named.
    """
    groups = table["group"].unique()
    if group is None and len(groups) == 1:
        group = groups[0]
    if group not in groups:
        raise ValueError(
            f"Pass one of the table's groups as `group=`: {', '.join(map(str, groups))}."
        )
    of_group = table[table["group"] == group].reset_index(drop=True)
    ax = _axes(ax, 6, 5)
    x, y = of_group["mean_change"].to_numpy(), of_group["score"].abs().to_numpy()
    for chosen, color, name in (
        (y <= 1, PALETTE[0], "interval holds 0"),
        ((y > 1) & (x < 0), PALETTE[1], "falls"),
        ((y > 1) & (x > 0), PALETTE[2], "rises"),
    ):
        label = f"{name} ({chosen.sum()})"
        ax.scatter(x[chosen], y[chosen], s=8, color=color, label=label, rasterized=True)
    surest = np.argsort(-y, kind="stable")[:n_labels]
    half = (of_group["upper"] - of_group["lower"]).to_numpy()[surest] / 2
    ax.errorbar(
        x[surest], y[surest], xerr=half, fmt="none", ecolor="black", elinewidth=0.6, alpha=0.5
    )
    ax.axhline(1, color="black", linewidth=0.8, linestyle="--")
    ax.axvline(0, color="black", linewidth=0.4)
    distance = of_group["distance"].iloc[0]
    ax.set(
        xlabel="predicted mean change, with interval",
        ylabel="|change| / half-width of the interval",
        title=title or f"{group}, distance {distance:.2f}",
    )
    ax.legend(frameon=False)
    _label(ax, x, y, of_group["gene"].tolist(), surest)
    return _finish(ax, save)


def benchmark(
    results: pd.DataFrame,
    metric: str = "pearson_delta",
    *,
    title: str | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw a heat map of methods by contexts, between floor (0) and ceiling (1).

    Each cell shows the median over seeds; methods are sorted by their mean over contexts, which is
    the last column. Values below the floor are marked in another colour, failed folds are left
    white.

    Parameters
    ----------
    results
        Output of :func:`spaperb.evaluation.benchmark.benchmark`.
    metric
        Metric to show; one with a floor-to-ceiling scale, so not ``"variance_ratio"``.
    title
        Title; the metric by default.
    ax
        Axes to draw on.
    save
        File to save the figure to.

    Raises
    ------
    ValueError
        If the results hold no scaled values of the metric.
    """
    table = results[results["metric"] == metric].pivot_table(
        index="method", columns="context", values="scaled", aggfunc="median", observed=True
    )
    if table.empty:
        known = sorted(results.loc[results["scaled"].notna(), "metric"].unique())
        raise ValueError(
            f"There are no scaled values of {metric!r}; there are of: "
            f"{', '.join(known) or 'none'}."
        )
    table = table.assign(mean=table.mean(axis=1)).sort_values("mean", ascending=False)
    n_methods, n_columns = table.shape
    ax = _axes(ax, 2.2 + 0.75 * n_columns, 1.5 + 0.36 * n_methods)
    colors = colormaps["cividis"].with_extremes(under="#E69F00", bad="white")
    values = table.to_numpy()
    image = ax.imshow(values, cmap=colors, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = 0 <= value < 0.5
            ax.text(
                column,
                row,
                f"{value:z.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    ax.axvline(n_columns - 1.5, color="white", linewidth=3)
    ax.set_xticks(range(n_columns), table.columns, rotation=40, ha="right")
    ax.set_yticks(range(n_methods), table.index)
    ax.set_title(title or metric)
    if (figure := ax.get_figure(root=True)) is not None:
        bar = figure.colorbar(image, ax=ax, extend="min", ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["floor", "0.5", "ceiling"])
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

    The embedding is scanpy's: 50 principal components, 15 neighbours, UMAP; with fewer cells fewer
    of both.

    Parameters
    ----------
    populations
        Log-normalised expression of each population, ``(n_cells, G)``, by its name; eight at most.
    title
        Title of the plot.
    seed
        Seed of the embedding.
    ax
        Axes to draw on.
    save
        File to save the figure to.

    Raises
    ------
    ValueError
        If there are more populations than colours that can be told apart, or fewer than three
        cells in all.
    """
    if len(populations) > len(PALETTE):
        raise ValueError(
            f"There are {len(populations)} populations, and colours of {len(PALETTE)} can be told "
            "apart. Leave some out, or use scanpy.pl.umap."
        )
    if (n_cells := sum(x.shape[0] for x in populations.values())) < 3:
        raise ValueError(f"A UMAP takes at least 3 cells, and there are {n_cells} in all.")
    ax = _axes(ax, 6, 4.5)
    cells = ad.concat(
        {name: ad.AnnData(sparse.csr_matrix(x)) for name, x in populations.items()},
        label="population",
        index_unique="-",
    )
    n_comps = min(50, min(cells.shape) - 1)
    sc.pp.pca(cells, n_comps=n_comps, random_state=seed)
    sc.pp.neighbors(cells, n_neighbors=min(N_NEIGHBORS, cells.n_obs - 1), random_state=seed)
    # Where all cells are neighbours, their graph has no shape to start from.
    start = "spectral" if cells.n_obs > N_NEIGHBORS else "random"
    sc.tl.umap(cells, init_pos=start, random_state=seed)
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


def latent(
    z: np.ndarray,
    z_delta: np.ndarray,
    groups: Sequence[Any] | pd.Series,
    *,
    title: str | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw control cells in the latent space, and where the stimulus takes each group.

    On the first two principal components of the cells before and after their shift. More than
    seven groups share colours, and are named where their arrows end too.

    Parameters
    ----------
    z
        Latent vectors of control cells, ``(n, L)``:
        :meth:`~spaperb.SpaPerbModel.get_latent_representation`.
    z_delta
        Latent shift of each, Z_delta, ``(n, L)``: ``adata.obsm["X_spaperb_delta"]``.
    groups
        Group of each cell, a cell type say, ``(n,)``.
    title
        Title of the plot.
    ax
        Axes to draw on.
    save
        File to save the figure to.

    Raises
    ------
    ValueError
        If the three are not of the same cells.
    """
    z, z_delta, groups = np.asarray(z), np.asarray(z_delta), np.asarray(groups, dtype=str)
    if not (z.shape == z_delta.shape and len(groups) == len(z)):
        raise ValueError(
            "`z`, `z_delta` and `groups` must be of the same cells; they are of shapes "
            f"{z.shape}, {z_delta.shape} and {groups.shape}."
        )
    ax = _axes(ax, 6, 4.5)
    pca = PCA(2, random_state=0).fit(np.concatenate([z, z + z_delta]))
    before, after = pca.transform(z), pca.transform(z + z_delta)
    names = np.unique(groups)
    colors = PALETTE[1:]
    for name, color in zip(names, itertools.cycle(colors), strict=False):
        of_group = groups == name
        x, y = before[of_group].T
        ax.scatter(x, y, s=6, color=color, linewidths=0, alpha=0.5, rasterized=True)
        ax.scatter([], [], color=color, label=f"{name} ({of_group.sum():,})")
        ax.annotate(
            "",
            after[of_group].mean(axis=0),
            before[of_group].mean(axis=0),
            arrowprops={"arrowstyle": "-|>", "color": "black", "fc": color, "linewidth": 1.2},
        )
    # Annotations do not stretch the axes.
    ends = np.array([after[groups == name].mean(axis=0) for name in names])
    ax.update_datalim(ends)
    ax.autoscale_view()
    if len(names) > len(colors):
        _label(ax, ends[:, 0], ends[:, 1], names.tolist(), np.arange(len(names)))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    shares = pca.explained_variance_ratio_
    ax.set(xlabel=f"latent PC 1 ({shares[0]:.0%})", ylabel=f"latent PC 2 ({shares[1]:.0%})")
    ax.set_title(title or "")
    return _finish(ax, save)


def history(
    history: Mapping[str, pd.DataFrame],
    term: str = "loss",
    *,
    title: str | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Plot how a term of the loss fell while training, for training and validation pairs.

    Parameters
    ----------
    history
        ``model.history``.
    term
        ``"loss"``, ``"reconstruction_loss"``, ``"latent_loss"``, ``"kl_local"`` or another logged
        one.
    title
        Title of the plot.
    ax
        Axes to draw on.
    save
        File to save the figure to.

    Raises
    ------
    ValueError
        If the term was not logged, or nothing was.
    """
    if not history:
        raise ValueError(
            "The history is empty: no epoch was trained, or none was left to train after a "
            "checkpoint."
        )
    names = {"training": f"{term}_train", "validation": f"{term}_validation"}
    if term == "loss":
        names = {"training": "train_loss", "validation": "validation_loss"}
    if not (logged := {label: key for label, key in names.items() if key in history}):
        known = sorted({key.removesuffix("_train") for key in history if key.endswith("_train")})
        raise ValueError(f"{term!r} was not logged; there are: {', '.join(['loss', *known])}.")
    ax = _axes(ax, 5, 3.5)
    for (label, key), color in zip(logged.items(), PALETTE[1:], strict=False):
        values = history[key].iloc[:, 0].astype(float)
        ax.plot(values.index + 1, values, color=color, label=label)
    ax.set(xlabel="epoch", ylabel=term.replace("_", " "), title=title or "")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    return _finish(ax, save)


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    return ax if ax is not None else plt.subplots(figsize=(width, height), layout="constrained")[1]


def _label(
    ax: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], chosen: np.ndarray
) -> None:
    texts = [ax.text(x[i], y[i], names[i], fontsize=8) for i in chosen]
    if texts:
        line = {"arrowstyle": "-", "linewidth": 0.5}
        # By default labels move for half a second, so that a picture would depend on how busy the
        # machine is.
        adjust_text(texts, x=x, y=y, ax=ax, arrowprops=line, iter_lim=MOST_MOVES)


def _finish(ax: Axes, save: str | Path | None) -> Axes:
    figure = ax.get_figure(root=True)
    if save is not None and figure is not None:
        with atomic_write(Path(save), overwrite=True) as path:
            figure.savefig(path)
    return ax
