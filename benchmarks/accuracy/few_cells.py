"""What a change that was measured with few cells is worth, against leaving it out.

    python benchmarks/accuracy/few_cells.py

Six simulated types of 100 control and 100 stimulated cells, of one of which only n stimulated
cells are given; n = 0 leaves it out. 100 further stimulated cells of that type are the truth.
Writes `few_cells.csv` beside this file, a row n and seed: the squared error of the mean change
over that of "no change", how many genes' true changes the 90 % intervals hold, and how many genes
of those whose interval leaves out 0 have the wrong sign.
"""

import numpy as np
import pandas as pd
from common import HERE, trained
from joblib import Parallel, delayed

from spaperb import datasets

SIZES = (0, 1, 2, 3, 5, 10, 30, 100)
N_CELLS = 100
HIDDEN = "type_0"


def run(n: int, seed: int) -> dict[str, float]:
    """Train with n stimulated cells of the type, and predict its change."""
    cells = datasets.simulated(6, 2 * N_CELLS, seed=seed)
    of = cells.obs.groupby(["cell_type", "condition"], observed=True).indices
    rng = np.random.default_rng(seed)
    rows = {group: rng.permutation(rows) for group, rows in of.items()}
    truth = cells[rows[HIDDEN, "stimulated"][N_CELLS:]]
    kept = [r[:N_CELLS] for group, r in rows.items() if group != (HIDDEN, "stimulated")]
    train = cells[np.sort(np.concatenate([*kept, rows[HIDDEN, "stimulated"][:n]]))].copy()
    model = trained(train, seed)
    control = train[(train.obs["cell_type"] == HIDDEN) & (train.obs["condition"] == "control")]
    table = model.predict_response(control.copy()).set_index("gene").loc[cells.var_names]
    real = truth.X.toarray().mean(0) - control.X.toarray().mean(0)
    change = table["mean_change"].to_numpy()
    is_sure = table["score"].abs().to_numpy() > 1
    return {
        "n": n,
        "seed": seed,
        "error": ((change - real) ** 2).sum() / (real**2).sum(),
        "coverage": ((table["lower"] <= real) & (real <= table["upper"])).mean(),
        "n_sure": is_sure.sum(),
        "n_wrong_sign": (is_sure & (np.sign(change) != np.sign(real))).sum(),
        "distance": table["distance"].iloc[0],
    }


def main() -> None:
    """Run all sizes."""
    settings = [(n, seed) for n in SIZES for seed in range(3)]
    table = pd.DataFrame(Parallel(n_jobs=2)(delayed(run)(*setting) for setting in settings))
    table.to_csv(HERE / "few_cells.csv", index=False, float_format="%.4g")
    by = table.groupby("n").agg(["mean", "std"])
    print(by.drop(columns="seed").round(3).to_string())


if __name__ == "__main__":
    main()
