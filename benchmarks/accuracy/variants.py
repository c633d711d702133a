"""Every variant tried for the residual objective, with its score on inner folds: the log behind the defaults.

    python benchmarks/accuracy/variants.py kang_pbmc_ifnb.h5ad --crispr crispr_multi.h5ad

An inner fold hides one context as a fold of the benchmark does, and inside its training cells a second one, which is
predicted and scored; the first context's stimulated cells are not used at all. Four sets of folds:

- kang: Kang et al. 2018, 2,000 genes, every third pair of an outer and an inner cell type
- kang_small: the same with 40 cells a type and condition and 300 genes
- crispr: nine targets in four cell lines (Norman et al. 2019, McFaline-Figueroa et al. 2023), one line hidden
- simulated: eight types, 60 cells each, half or a fifth of the response a type's own

Variants of the response are scored by the mean change alone; those that need a network, and those of whole cells, on
every tenth fold of kang, in rows of their own. Writes `variants.csv` beside this file.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from joblib import Parallel, delayed
from sklearn.ensemble import ExtraTreesRegressor, HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from spaperb.contexts import Contexts
from spaperb.response import Regression, Response, Subject, describe

from spaperb import datasets, metrics, populations, response
from spaperb.benchmark import SpaPerb, Task, make_fold
from spaperb.perturbations import Target

HERE = Path(__file__).parent
MIN_CELLS = 50


class Inner(NamedTuple):
    """Training cells and the two populations of the context that they miss."""

    train: ad.AnnData
    name: str
    control: ad.AnnData
    real: ad.AnnData


def inner_fold(cells: ad.AnnData, name: str, key: str = "cell_type") -> Inner:
    """Hide a context of training cells."""
    of_context = cells.obs[key] == name
    control = cells.obs["condition"] == "control"
    return Inner(
        cells[~of_context | control].copy(),
        name,
        cells[of_context & control].copy(),
        cells[of_context & ~control].copy(),
    )


def kang_folds(path: Path) -> Iterator[Inner]:
    """All inner folds of Kang et al. by cell type."""
    adata = ad.read_h5ad(path)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sizes = adata.obs.groupby(["cell_type", "condition"], observed=True).size().unstack()
    types = sizes.index[sizes.min(axis=1) >= MIN_CELLS]
    task = Task("cell_type", "condition", "control", None, "cell_type", 2000, 0)
    for outer in types:
        cells = make_fold(adata, outer, task).train
        for inner in types.drop(outer):
            yield inner_fold(cells, inner)


def small(fold: Inner) -> Inner:
    """40 cells a type and condition, 300 genes chosen on the training cells."""
    rng = np.random.default_rng(0)
    genes = sc.pp.highly_variable_genes(fold.train, n_top_genes=300, inplace=False)
    genes = genes["highly_variable"].to_numpy()

    def some(cells: ad.AnnData) -> ad.AnnData:
        groups = cells.obs.groupby(["cell_type", "condition"], observed=True).indices.values()
        rows = np.concatenate([rng.permutation(rows)[:40] for rows in groups])
        return cells[np.sort(rows), genes].copy()

    return Inner(some(fold.train), fold.name, some(fold.control), fold.real[:, genes].copy())


def crispr_folds(path: Path) -> Iterator[Inner]:
    """Each of the nine shared targets in each cell line."""
    adata = ad.read_h5ad(path)
    shared = adata.obs.groupby("perturbation", observed=True)["cell_line"].nunique()
    for target in shared.index[shared == 4].drop("control"):
        cells = adata[adata.obs["perturbation"].isin(["control", target])].copy()
        cells.obs["condition"] = np.where(
            cells.obs["perturbation"] == "control", "control", "stimulated"
        )
        cells.obs["cell_type"] = cells.obs["cell_line"].astype("category")
        for line in cells.obs["cell_type"].cat.categories:
            yield inner_fold(cells, line)


def simulated_folds() -> Iterator[Inner]:
    """Four types of each of eight simulated data sets."""
    for seed in range(4):
        for shared in (0.5, 0.8):
            cells = datasets.simulated(n_cells=60, n_genes=400, shared_response=shared, seed=seed)
            for name in ("type_0", "type_1", "type_2", "type_3"):
                yield inner_fold(cells, name)


def contexts_of(fold: Inner) -> Contexts:
    """Contexts of the training cells."""
    labels = fold.train.obs["cell_type"].astype("category").cat
    arms = (fold.train.obs["condition"] != "control").to_numpy().astype(int)
    return Contexts.of(
        fold.train.X, arms, labels.codes.to_numpy().astype(int), list(labels.categories)
    )


class Other(Regression):
    """Another regression than the default, or one without scaling genes."""

    def __init__(self, default, make=None, scaled=True):
        super().__init__(
            [self.scaled(d, scaled) for d in default.descriptions],
            default.shifts,
            default.variances,
            default.weights,
            default.pull_to,
        )
        self.make, self.is_scaled = make, scaled

    @staticmethod
    def scaled(description, is_scaled):
        """Take away the scale, if genes are not to be scaled."""
        if is_scaled:
            return description
        return description._replace(scale=np.ones_like(description.scale))

    @property
    def forest(self):
        """The other regression, fitted."""
        if self.make is None:
            return None
        if "fitted" not in vars(self):
            x = np.concatenate([self.inputs(d) for d in self.descriptions])
            y = ((self.shifts - self.priors) / self.scale).ravel()
            model, weight = self.make(), (self.weights[:, None] * self.scale**2).ravel()
            step = (
                {f"{model.steps[-1][0]}__sample_weight": weight}
                if hasattr(model, "steps")
                else {"sample_weight": weight}
            )
            self.fitted = model.fit(x, y, **step)
        return self.fitted

    def predict(self, description):
        """As the default does it, with the scale that this one uses."""
        return super().predict(self.scaled(description, self.is_scaled))


def forest(leaf: int) -> ExtraTreesRegressor:
    """Forest of a fixed leaf."""
    return ExtraTreesRegressor(100, min_samples_leaf=leaf, max_features=0.7, random_state=0)


REGRESSIONS = {
    "anchors alone": (None, True),
    "forest, leaves of 5": (lambda: forest(5), True),
    "forest, leaves of 10": (lambda: forest(10), True),
    "forest, leaves of 40": (lambda: forest(40), True),
    "forest, genes not scaled": (lambda: forest(10), False),
    "boosted trees": (
        lambda: HistGradientBoostingRegressor(
            max_iter=80, learning_rate=0.05, min_samples_leaf=30, random_state=0
        ),
        True,
    ),
    "ridge": (lambda: make_pipeline(StandardScaler(), RidgeCV([1, 10, 100])), True),
    "perceptron": (
        lambda: make_pipeline(
            StandardScaler(),
            MLPRegressor(hidden_layer_sizes=(32, 32), max_iter=30, random_state=0),
        ),
        True,
    ),
}


def score(change: np.ndarray, fold: Inner) -> dict[str, float]:
    """Score a mean change."""
    control, real = (populations.mean_expression(x.X) for x in (fold.control, fold.real))
    predicted = np.maximum(control + change, 0)
    return {
        "pearson_delta": float(
            np.nan_to_num(np.corrcoef(predicted - control, real - control)[0, 1])
        )
        if np.ptp(predicted - control) > 0
        else 0.0,
        "mse_mean": float(np.mean((predicted - real) ** 2)),
    }


def responses(fold: Inner) -> dict[str, dict[str, float]]:
    """Scores of all variants of the response."""
    contexts = contexts_of(fold)
    k = contexts.names.index(fold.name)
    profile, cells = contexts.control[k], contexts.cells[k]

    def default() -> Regression:
        return Response(contexts, [(0,)], [0]).regression(contexts=True, perturbations=False)

    (treatment,) = contexts.treatments
    paired = np.arange(len(treatment.paired))
    description = describe(contexts, treatment, paired, profile, cells)
    anchors = description.anchors
    changes = {"no change": np.zeros(len(anchors))}
    changes |= dict(zip(response.ANCHORS, anchors.T, strict=True))
    changes["anchors, equal weights"] = anchors.mean(axis=1)
    for pull in (0.0, 0.1):
        response.PULL, before = pull, response.PULL
        weights = default().anchor_weights
        response.PULL = before
        changes[f"anchors, pull {pull}"] = anchors @ weights
    for name, (make, scaled) in REGRESSIONS.items():
        changes[name] = Other(default(), make, scaled).predict(description)
    response.MIN_LEARNABLE, before = 0.1, response.MIN_LEARNABLE
    changes["forest, where a tenth is signal"] = default().predict(description)
    response.MIN_LEARNABLE = before
    changes["RESPONSE (default)"] = default().predict(description)
    return {name: score(change, fold) for name, change in changes.items()}


def networks(fold: Inner) -> dict[str, dict[str, float]]:
    """Scores of the network alone, of its shares, and of whole cells."""
    setup = {"condition_key": "condition", "control": "control", "stimulated": None}
    setup |= {"labels_key": "cell_type", "seed": 0}
    rows = {}
    model = SpaPerb(objective="residual").fit(fold.train, **setup).model
    transfer = model._transfer
    k = transfer.contexts.names.index(fold.name)
    n = transfer.network_changes[0, k].astype(float)
    subject = Subject(transfer.contexts.control[k], transfer.contexts.cells[k], k)
    rows["network alone"] = score(n, fold)
    for share in (0.0, 0.1, 0.2, 0.5):
        mixed = dataclasses.replace(transfer, network_share=share)
        target = Target("stimulated", 0, (0,))
        change = mixed.change(subject, target, n, is_control=True).mean
        rows[f"network_share {share}"] = score(change, fold)
    projection = populations.fit_projection(fold.train.X)
    kept = ("pearson_delta", "mse_mean", "energy_distance", "variance_ratio")
    kept += ("zero_fraction_error", "deg_overlap")
    robust = SpaPerb(objective="residual", response=False, criterion="smooth_l1")
    cells = {
        "cells: default": model.predict_stimulated(fold.control, inplace=False),
        "cells: detection=False": model.predict_stimulated(
            fold.control, inplace=False, detection=False
        ),
        "cells: response=False, smooth_l1": robust.fit(fold.train, **setup).predict(fold.control),
        "cells: control": fold.control.X,
    }
    model.response = False  # the same network, as trained without the response
    cells["cells: response=False"] = model.predict_stimulated(fold.control, inplace=False)
    for name, predicted in cells.items():
        scores = metrics.score(predicted, fold.real.X, fold.control.X, projection)
        rows[name] = {metric: scores[metric] for metric in kept}
    for row in rows.values():
        if "energy_distance" in row:
            row["energy_of_no_change"] = (
                row["energy_distance"] / rows["cells: control"]["energy_distance"]
            )
    return rows


def main() -> None:
    """Run all variants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="Kang et al., raw counts")
    parser.add_argument("--crispr", type=Path)
    parser.add_argument("--n-jobs", type=int, default=2)
    args = parser.parse_args()
    kang = list(kang_folds(args.file))
    sets = {
        "kang, every third": (responses, kang[::3]),
        "kang_small, every third": (responses, [small(fold) for fold in kang[::3]]),
        "crispr": (responses, list(crispr_folds(args.crispr)) if args.crispr else []),
        "simulated": (responses, list(simulated_folds())),
        "kang, every tenth": (networks, kang[::10]),
    }
    rows = []
    for name, (run, folds) in sets.items():
        results = Parallel(n_jobs=args.n_jobs)(delayed(run)(fold) for fold in folds)
        for variant in results[0] if results else ():
            mean = pd.DataFrame([result[variant] for result in results]).mean()
            rows.append({"folds": name, "n": len(folds), "variant": variant, **mean})
        table = pd.DataFrame(rows)
        table.to_csv(HERE / "variants.csv", index=False, float_format="%.4g")
    print(table.to_string())


if __name__ == "__main__":
    main()
