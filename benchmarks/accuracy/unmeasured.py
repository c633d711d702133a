"""Perturbations that were measured nowhere, predicted from their features.

    python benchmarks/accuracy/unmeasured.py FOLDER

Simulated screens (`datasets.simulated_screen`): 30 perturbations in three types, of which six are
left out everywhere, with features that tell 80 %, 50 % and nothing of the response; the truth is
known. `crispr_multi.h5ad`: each of the nine targets that all four lines share is left out
everywhere; its features are the gene groups below; half of a line's control cells are given, and
the real change is measured from the other half. Weights never saw the screens. Writes
`unmeasured.csv`.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scvi
from common import HERE, make_parser, without
from joblib import Parallel, delayed
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from spaperb import SpaPerbModel, datasets
from spaperb.populations import mean_expression

SHARES = (0.8, 0.5, 0.0)
N_HIDDEN = 6
SETUP = {"condition_key": "condition", "labels_key": "cell_type"}
PENALTIES = np.logspace(-2, 5, 15)
GROUPS = {
    "kinase": "MAP2K3 MAP2K6 MAP3K21 MAP4K3 MAP4K5 MAPK1 PLK4 SGK1 HK2 TGFBR2",
    "protein kinase": "MAP2K3 MAP2K6 MAP3K21 MAP4K3 MAP4K5 MAPK1 PLK4 SGK1 TGFBR2",
    "MAP kinase cascade": "MAP2K3 MAP2K6 MAP3K21 MAP4K3 MAP4K5 MAPK1",
    "MAP kinase kinase": "MAP2K3 MAP2K6",
    "MAP kinase kinase kinase kinase": "MAP4K3 MAP4K5",
    "transcription factor": "FOXO4 KLF1",
    "acts on chromatin": "KMT2A FOXO4 KLF1",
    "metabolism and transport": "HK2 NIT1 SLC38A2",
    "at the cell membrane": "TGFBR2 SLC38A2",
}
"""Gene groups of the targets, by the names that the HUGO committee groups genes by."""

Changes = dict[str, dict[str, np.ndarray]]
"""Mean change by context and perturbation, ``(G,)``."""


class Screen(NamedTuple):
    """Training cells, control cells to predict from, features, and what is to be predicted."""

    name: str
    train: ad.AnnData
    control: dict[str, ad.AnnData]
    features: pd.DataFrame
    truth: Changes


def simulated(share: float, seed: int) -> Screen:
    """Simulate a screen and leave perturbations out."""
    cells = datasets.simulated_screen(feature_share=share, seed=seed)
    hidden = [f"perturbation_{p}" for p in range(N_HIDDEN)]
    condition, types = cells.obs["condition"], cells.obs["cell_type"]
    true = cells.layers["true_stimulated"] - cells.layers["true_control"]
    return Screen(
        f"simulated, {share:.0%} told",
        cells[~condition.isin(hidden)].copy(),
        {t: cells[(types == t) & (condition == "control")].copy() for t in types.cat.categories},
        cells.uns["perturbation_features"],
        {
            t: {p: true[(types == t) & (condition == p)].mean(axis=0) for p in hidden}
            for t in types.cat.categories
        },
    )


def crispr(cells: ad.AnnData, hidden: str, seed: int) -> Screen:
    """Leave a target out everywhere, and half of the control cells."""
    cells = cells.copy()
    cells.obs["condition"], cells.obs["cell_type"] = (
        cells.obs["perturbation"],
        cells.obs["cell_line"],
    )
    is_control = (cells.obs["condition"] == "control").to_numpy()
    is_given = np.zeros(cells.n_obs, dtype=bool)
    rng = np.random.default_rng(seed)
    lines = cells.obs["cell_type"].unique()
    for line in lines:
        of_line = np.flatnonzero(is_control & (cells.obs["cell_type"] == line).to_numpy())
        is_given[rng.permutation(of_line)[: len(of_line) // 2]] = True
    is_hidden = cells.obs["condition"].str.split("+").map(lambda parts: hidden in parts).to_numpy()
    truth, control = {}, {}
    for line in lines:
        of_line = (cells.obs["cell_type"] == line).to_numpy()
        control[line] = cells[is_given & of_line].copy()
        real = cells.X[of_line & (cells.obs["condition"] == hidden).to_numpy()]
        other = cells.X[of_line & is_control & ~is_given]
        truth[line] = {hidden: mean_expression(real) - mean_expression(other)}
    names = sorted({p for name in cells.obs["condition"].unique() for p in name.split("+")})
    features = pd.DataFrame(
        {group: [float(n in of.split()) for n in names] for group, of in GROUPS.items()}, names
    )
    return Screen(
        "crispr_multi",
        cells[~is_hidden & (~is_control | is_given)].copy(),
        {
            line: cells[is_given & (cells.obs["cell_type"] == line).to_numpy()].copy()
            for line in lines
        },
        features.drop(index="control"),
        truth,
    )


def by_model(screen: Screen, seed: int) -> Changes:
    """Predict by the model, set up with features."""
    scvi.settings.seed = seed
    SpaPerbModel.setup_anndata(screen.train, perturbation_features=screen.features, **SETUP)
    model = SpaPerbModel(screen.train, pretrained=without("crispr_multi"))
    model.train(enable_progress_bar=False)
    return {
        context: {
            p: np.nanmean(model.predict_stimulated(cells, p, inplace=False), axis=0)
            - mean_expression(cells.X)
            for p in screen.truth[context]
        }
        for context, cells in screen.control.items()
    }


def by_weights(make: Callable[[pd.DataFrame, np.ndarray, np.ndarray], np.ndarray]) -> Any:
    """Predict by what other perturbations do in the context, and features.

    Parameters
    ----------
    make
        From features of the others (standardised) and their changes, and features of the one that
        is asked for, to its change.
    """

    def predict(screen: Screen, seed: int) -> Changes:
        condition = screen.train.obs["condition"]
        scaler = StandardScaler().fit(screen.features)
        predicted: Changes = {}
        for context, cells in screen.control.items():
            here = (screen.train.obs["cell_type"] == context).to_numpy()
            names = [n for n in condition[here].unique() if n in screen.features.index]
            before = mean_expression(cells.X)
            changes = np.array(
                [
                    mean_expression(screen.train.X[here & (condition == n).to_numpy()]) - before
                    for n in names
                ]
            )
            values = scaler.transform(screen.features.loc[names])
            predicted[context] = {
                p: make(values, changes, scaler.transform(screen.features.loc[[p]])[0])
                for p in screen.truth[context]
            }
        return predicted

    return predict


def mean_of_all(values: np.ndarray, changes: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Mean over perturbations."""
    return changes.mean(axis=0)


def nearest(n: int) -> Callable[..., np.ndarray]:
    """Mean over the perturbations with the nearest features."""

    def make(values: np.ndarray, changes: np.ndarray, asked: np.ndarray) -> np.ndarray:
        order = np.argsort(((values - asked) ** 2).sum(axis=1), kind="stable")
        return changes[order[:n]].mean(axis=0)

    return make


def ridge(values: np.ndarray, changes: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Ridge regression, whose penalty is chosen by leaving perturbations out."""
    return RidgeCV(PENALTIES).fit(values, changes).predict(asked[None])[0]


METHODS = {
    "spaperb_in_context": by_model,
    "mean over perturbations": by_weights(mean_of_all),
    "nearest by features": by_weights(nearest(1)),
    "five nearest by features": by_weights(nearest(5)),
    "ridge from features": by_weights(ridge),
}


def run(screen: Screen, seed: int) -> list[dict[str, Any]]:
    """Predict a screen's hidden perturbations by all methods."""
    warnings.simplefilter("ignore")
    rows = []
    for method, predict in METHODS.items():
        predicted = predict(screen, seed)
        for context, truth in screen.truth.items():
            for name, true in truth.items():
                change = predicted[context][name]
                flat = min(change.std(), true.std()) < 1e-12
                rows.append(
                    {
                        "data": screen.name,
                        "context": context,
                        "perturbation": name,
                        "method": method,
                        "seed": seed,
                        "pearson_delta": 0.0 if flat else np.corrcoef(change, true)[0, 1],
                        "mse_mean": ((change - true) ** 2).mean(),
                    }
                )
    return rows


def main() -> None:
    """Run all screens."""
    args = make_parser(__doc__, "folder", "--seeds", "--n-jobs").parse_args()
    cells = ad.read_h5ad(args.folder / "crispr_multi.h5ad")
    lines = cells.obs.groupby("perturbation", observed=True)["cell_line"].nunique()
    targets = lines.index[lines == 4].drop("control")
    screens = [(simulated(share, seed), seed) for share in SHARES for seed in args.seeds]
    screens += [(crispr(cells, target, args.seeds[0]), args.seeds[0]) for target in targets]
    rows = Parallel(args.n_jobs)(delayed(run)(*screen) for screen in screens)
    table = pd.DataFrame([row for of_screen in rows for row in of_screen])
    table.to_csv(HERE / "unmeasured.csv", index=False, float_format="%.6g")
    means = table.groupby(["data", "method"], sort=False)[["pearson_delta", "mse_mean"]]
    print(means.mean().unstack(0).round(4).to_string())


if __name__ == "__main__":
    main()
