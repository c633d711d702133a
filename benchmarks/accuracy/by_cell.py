"""Cells of one type that respond differently: `predict_stimulated(by_cell=True)`.

    python benchmarks/accuracy/by_cell.py FOLDER

`gradient`: simulated types of 150 cells, whose response goes with a state (by a factor of 0 to 2),
one type hidden; `strength` is the correlation over cells of the predicted with the true change
along the type's mean change, before and after cells are made of it. `merged`: two types of Kang et
al. under one label, whose stimulated cells are hidden, or half of them given; each type is judged
by itself. `types`: each type of Kang et al. hidden, by cell those with 80 control cells. Half of
the hidden types' control cells are given, and the real change is measured from the other half.
`without labels` is `setup_anndata(labels_key=None)`. Weights never saw Kang et al.; networks as
they are, without training on the data. Writes `by_cell.csv`.
"""

import warnings
from typing import Any

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
    split,
    without,
)
from joblib import Parallel, delayed

from spaperb import SpaPerbModel, datasets, metrics
from spaperb.populations import dense, fit_projection, mean_expression, variance

PAIRS = (("CD14+ Monocytes", "FCGR3A+ Monocytes"), ("CD4 T cells", "CD8 T cells"))
GRADIENTS = (1.0, 0.5, 0.0)
MIN_CELLS = 80
"""Control cells that have two states."""
HOW = {"by type": False, "by cell": True}


def fitted(cells: ad.AnnData, **kwargs: Any) -> SpaPerbModel:
    """Set up and measure."""
    setup = {"labels_key": kwargs.pop("labels_key", "cell_type"), "stimulated": "stimulated"}
    SpaPerbModel.setup_anndata(cells, **setup)
    model = SpaPerbModel(cells, **kwargs)
    model.train(max_epochs=0, enable_progress_bar=False)
    return model


def gradient(size: float, seed: int) -> list[dict[str, Any]]:
    """Predict simulated cells whose response goes with their state."""
    cells = datasets.simulated(6, 150, gradient=size, seed=seed)
    is_hidden = (cells.obs["cell_type"] == "type_0") & (cells.obs["condition"] == "stimulated")
    train, real = cells[~is_hidden].copy(), cells[is_hidden]
    asked = (cells.obs["cell_type"] == "type_0") & (cells.obs["condition"] == "control")
    query = cells[asked].copy()
    model, rows = fitted(train), []
    true = query.layers["true_stimulated"] - query.layers["true_control"]
    axis = true.mean(axis=0)
    projection = fit_projection(train.X)
    for name, by_cell in HOW.items():
        of_query = {"inplace": False, "by_cell": by_cell}
        predicted = model.predict_stimulated(query, **of_query)
        change = model.predict_stimulated(query, detection=False, **of_query) - dense(query.X)
        made = predicted - dense(query.X)
        of = {"task": "gradient", "context": f"gradient {size}", "method": name, "seed": seed}
        energy = metrics.energy_distance(*map(projection.transform, (predicted, dense(real.X))))
        scores = {"energy_distance": energy}
        if size and by_cell:
            scores["strength"] = np.corrcoef(change @ axis, true @ axis)[0, 1]
        if size:
            scores["strength, cells made"] = np.corrcoef(made @ axis, true @ axis)[0, 1]
        rows.append({**of, **scores})
    return rows


def judged(predicted: np.ndarray, query: ad.AnnData, real: Any, control: Any) -> dict[str, float]:
    """Compare mean changes; predicted cells are those of the query."""
    change = predicted.mean(axis=0) - mean_expression(query.X)
    true = mean_expression(real) - mean_expression(control)
    return {
        "pearson_delta": np.corrcoef(change, true)[0, 1],
        "mse_mean": ((change - true) ** 2).mean(),
    }


def merged(cells: ad.AnnData, pair: tuple[str, str], given: bool, seed: int) -> list[dict]:
    """Predict two types that have one label."""
    rng = np.random.default_rng(seed)
    cells = cells.copy()
    types = cells.obs["cell_type"].astype(str).to_numpy()
    is_pair = np.isin(types, pair)
    cells.obs["cell_type"] = pd.Categorical(np.where(is_pair, "merged", types))
    is_stimulated = (cells.obs["condition"] == "stimulated").to_numpy()
    is_half = rng.random(cells.n_obs) < 0.5
    is_asked = is_pair & ~is_stimulated & is_half
    in_training = ~is_pair | (is_half & (~is_stimulated | given))
    train = cells[in_training].copy()
    chosen = sc.pp.highly_variable_genes(
        train, flavor="seurat", n_top_genes=N_TOP_GENES, inplace=False
    )["highly_variable"].to_numpy()
    train, query, cells = (
        train[:, chosen].copy(),
        cells[is_asked][:, chosen].copy(),
        cells[:, chosen],
    )
    model, rows = fitted(train, pretrained=without(KANG)), []
    kind = "half of the stimulated cells given" if given else "hidden"
    for name, by_cell in HOW.items():
        predicted = model.predict_stimulated(query, inplace=False, by_cell=by_cell)
        for one in pair:
            of = types[is_asked] == one
            real = cells.X[(types == one) & is_stimulated & ~in_training]
            control = cells.X[(types == one) & ~is_stimulated & ~in_training]
            scores = judged(predicted[of], query[of], real, control)
            task = {"task": f"merged, {kind}", "context": one, "method": name, "seed": seed}
            rows.append({**task, **scores})
    return rows


def types(cells: ad.AnnData, name: str, seed: int) -> list[dict]:
    """Predict a hidden type."""
    fold, rows = split(cells, name, seed=seed), []
    projection = fit_projection(fold.train.X)

    def energy(predicted: np.ndarray) -> float:
        return metrics.energy_distance(*map(projection.transform, (predicted, dense(fold.real))))

    model = fitted(fold.train.copy(), pretrained=without(KANG))
    without_labels = fitted(fold.train.copy(), labels_key=None, pretrained=without(KANG))
    bare = fold.control.copy()
    del bare.obs["cell_type"]
    predictions = {
        how: model.predict_stimulated(fold.control, inplace=False, by_cell=by_cell)
        for how, by_cell in HOW.items()
        if not by_cell or fold.control.n_obs >= MIN_CELLS
    }
    predictions["without labels"] = without_labels.predict_stimulated(bare, inplace=False)
    for how, predicted in predictions.items():
        shown = variance(fold.real) > 0
        scores = {
            **judged(predicted, fold.control, fold.real, fold.control_real),
            "energy_distance": energy(predicted) / energy(dense(fold.control.X)),
            "variance_ratio": np.median((variance(predicted) / variance(fold.real))[shown]),
        }
        rows.append({"task": "types", "context": name, "method": how, "seed": seed, **scores})
    return rows


def main() -> None:
    """Run all three."""
    warnings.simplefilter("ignore")
    args = make_parser(__doc__, "folder", "--seeds", "--n-jobs").parse_args()
    kang = log_normalised(args.folder / f"{KANG}.h5ad")
    jobs = [delayed(gradient)(size, seed) for size in GRADIENTS for seed in args.seeds]
    jobs += [
        delayed(merged)(kang, pair, given, seed)
        for pair in PAIRS
        for given in (False, True)
        for seed in args.seeds
    ]
    jobs += [
        delayed(types)(kang, name, seed) for name in paired_types(kang) for seed in args.seeds
    ]
    table = pd.DataFrame([row for rows in Parallel(args.n_jobs)(jobs) for row in rows])
    table.to_csv(HERE / "by_cell.csv", index=False, float_format="%.5g")
    whole = table.assign(context=table["context"].where(table["task"] != "types", "all"))
    means = whole.groupby(["task", "context", "method"], sort=False).mean(numeric_only=True)
    print(means.drop(columns="seed").round(4).to_string())


if __name__ == "__main__":
    main()
