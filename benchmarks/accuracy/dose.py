"""A simulated dose series: a cell type that was never stimulated, at doses never given.

    python benchmarks/accuracy/dose.py

Eight types, 60 cells of each at each of five doses from 0.1 to 30, whose response follows a Hill
function of the dose with half-dose 2 and coefficient 1. One type's stimulated cells are hidden;
its control cells are predicted at the given doses and between them. Scored against the noise-free
truth: `pearson_delta`, `mse_mean`, and the effect, the projection of the change of mean on the
true change at a dose of 1,000 (0 no change, 1 the full response). A Hill function fitted to each
method's effects gives the half-dose it implies. Writes `dose.csv`, `dose_half.csv` and `dose.png`
beside this file.
"""

import numpy as np
import pandas as pd
from anndata import AnnData
from common import HERE, trained
from matplotlib.figure import Figure
from scipy.optimize import curve_fit

from spaperb import datasets

GIVEN = [0.1, 0.5, 2.0, 8.0, 30.0]
ASKED = [0.03, 0.1, 0.22, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 100.0]
FULL = 1000.0
HIDDEN = "type_0"
CURVE = {"half_dose": 2.0, "steepness": 1.0}
CELLS = {"n_cells": 60 * len(GIVEN), "n_genes": 500}
SEEDS = range(3)


def truth(seed: int, dose: float) -> np.ndarray:
    """Noise-free mean change of the hidden type at a dose."""
    cells = datasets.simulated(doses=[dose], seed=seed, **CURVE, **CELLS)
    of_type = (cells.obs["cell_type"] == HIDDEN) & (cells.obs["condition"] == "control")
    layers = cells[of_type.to_numpy()].layers
    return layers["true_stimulated"].mean(0) - layers["true_control"].mean(0)


def mean_shift(train: AnnData, dose: float) -> np.ndarray:
    """Mean over the training types of the change at a dose that was given."""
    x = pd.DataFrame(train.X.toarray())
    means = x.groupby([train.obs["cell_type"].to_numpy(), train.obs["dose"].to_numpy()]).mean()
    return (means.xs(dose, level=1) - means.xs(0.0, level=1)).mean().to_numpy()


def run(seed: int) -> list[dict]:
    """Train on one data set and predict the hidden type at all doses."""
    cells = datasets.simulated(doses=GIVEN, seed=seed, **CURVE, **CELLS)
    of_type = cells.obs["cell_type"] == HIDDEN
    control = cells[(of_type & (cells.obs["condition"] == "control")).to_numpy()].copy()
    train = cells[(~of_type | (cells.obs["condition"] == "control")).to_numpy()].copy()
    model = trained(train, seed, dose_key="dose")

    measured = control.X.toarray().mean(0)
    full = truth(seed, FULL)
    shifts = {dose: mean_shift(train, dose) for dose in GIVEN}
    rows = []
    for dose in ASKED:
        nearest = min(GIVEN, key=lambda given: abs(np.log(given / dose)))
        real = truth(seed, dose)
        predicted = model.predict_stimulated(control, dose=dose, inplace=False)
        changes = {
            "truth": real,
            "mean shift at the nearest dose": shifts[nearest],
            "spaperb_in_context": predicted.mean(0) - measured,
        }
        for name, change in changes.items():
            rows.append(
                {
                    "seed": seed,
                    "dose": dose,
                    "given": dose in GIVEN,
                    "method": name,
                    "effect": change @ full / (full @ full),
                    "pearson_delta": np.corrcoef(change, real)[0, 1],
                    "mse_mean": np.mean((change - real) ** 2),
                }
            )
    return rows


def half_dose(effects: pd.DataFrame) -> pd.Series:
    """Hill function fitted to effects: full effect, half-dose and coefficient."""

    def hill(dose, full, log_half, h):
        return full / (1 + np.exp(h * (log_half - np.log(dose))))

    full, log_half, h = curve_fit(hill, effects["dose"], effects["effect"], p0=[1, 0, 1])[0]
    return pd.Series({"full": full, "half_dose": np.exp(log_half), "coefficient": h})


def main() -> None:
    """Run all seeds."""
    table = pd.DataFrame([row for seed in SEEDS for row in run(seed)])
    table.to_csv(HERE / "dose.csv", index=False, float_format="%.4g")
    curves = table.groupby(["method", "seed"])[["dose", "effect"]].apply(half_dose)
    curves.to_csv(HERE / "dose_half.csv", float_format="%.4g")
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for name, of_method in table.groupby("method", sort=False):
        effect = of_method.groupby("dose")["effect"].agg(["mean", "min", "max"])
        style = {"color": "black", "linestyle": "--"} if name == "truth" else {"marker": "o"}
        (line,) = ax.plot(effect.index, effect["mean"], label=name, markersize=4, **style)
        ax.fill_between(
            effect.index, effect["min"], effect["max"], color=line.get_color(), alpha=0.15
        )
    for dose in GIVEN:
        ax.axvline(dose, color="grey", linewidth=0.4)
    ax.set(
        xscale="log", xlabel="dose (grey: in the training data)", ylabel="effect in a hidden type"
    )
    ax.legend(frameon=False)
    figure.savefig(HERE / "dose.png", dpi=150)
    mean = table.groupby(["method", "dose"])[["effect", "pearson_delta", "mse_mean"]].mean()
    print(mean.unstack(0).round(3).to_string())
    print(curves.groupby("method").agg(["mean", "min", "max"]).round(2).to_string())


if __name__ == "__main__":
    main()
