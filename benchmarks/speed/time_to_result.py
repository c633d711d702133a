"""Seconds until the model is good: what epochs, learning rates, minibatches and bfloat16 buy.

    python benchmarks/speed/time_to_result.py kang_pbmc_ifnb.h5ad

Kang et al. 2018, 2,000 genes. Inside the training cells of the fold that hides each of some cell
types (whose stimulated cells are left out of everything), each setting is trained and scored on a
second hidden type: the `pearson_delta` of its mean change of that type's control cells. Weights
never saw Kang et al. Writes `time_to_result.csv` beside this file: for each fold, setting and seed
the score and the seconds that training took, of which all but epochs goes into measuring the
contexts.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import scvi
from common import HERE, Clock, write

from spaperb import SpaPerbModel
from spaperb.evaluation.metrics import pearson_delta

sys.path.append(str(HERE.parents[1]))

from benchmarks.accuracy.common import KANG, log_normalised, split, without

FOLDS = [
    ("B cells", "CD4 T cells"),
    ("CD14+ Monocytes", "NK cells"),
    ("CD8 T cells", "FCGR3A+ Monocytes"),
]
FINE = {"pretrained": without(KANG)}
SCRATCH = {"pretrained": False}
PUBLISHED = {"objective": "published"}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "untouched": (FINE, {"max_epochs": 0}),
    "8 epochs": (FINE, {"max_epochs": 8}),
    "default: 25 epochs, 4 episodes, lr 0.005": (FINE, {}),
    "75 epochs": (FINE, {"max_epochs": 75}),
    "16 episodes": (FINE, {"batch_size": 16}),
    "lr 0.0015": (FINE, {"plan_kwargs": {"lr": 0.0015}}),
    "lr 0.015": (FINE, {"plan_kwargs": {"lr": 0.015}}),
    "from scratch, 10 epochs": (SCRATCH, {"max_epochs": 10}),
    "from scratch: 25 epochs": (SCRATCH, {}),
    "from scratch, 75 epochs": (SCRATCH, {"max_epochs": 75}),
    "published, 60 epochs": (PUBLISHED, {"max_epochs": 60}),
    "published, 60 epochs, bfloat16": (PUBLISHED, {"max_epochs": 60, "precision": "bf16-mixed"}),
}
"""Arguments of the model and of training."""


def run(cells: ad.AnnData, hidden: str, inner: str, setting: str, seed: int) -> dict[str, Any]:
    """Train with one setting on one inner fold, and score it."""
    fold = split(split(cells, hidden).train, inner)
    of_model, of_training = SETTINGS[setting]
    scvi.settings.seed = seed
    SpaPerbModel.setup_anndata(fold.train)
    model = SpaPerbModel(fold.train, **of_model)
    clock = Clock()
    start = time.perf_counter()
    model.train(**of_training, callbacks=[clock], enable_progress_bar=False)
    seconds = time.perf_counter() - start
    predicted = model.predict_stimulated(fold.control, inplace=False)
    return {
        "hidden": hidden,
        "inner": inner,
        "setting": setting,
        "seed": seed,
        "epochs": len(clock.seconds),
        "seconds": seconds,
        "other_seconds": seconds - clock.seconds.sum(),
        "pearson_delta": pearson_delta(predicted, fold.real, fold.control.X),
    }


def main() -> None:
    """Run all settings on all folds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="raw counts, with obs condition and cell_type")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    cells = log_normalised(args.file)
    rows = []
    for fold in FOLDS:
        for seed in args.seeds:
            for setting in SETTINGS:
                rows.append(run(cells, *fold, setting, seed))
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    write(table, "time_to_result")
    measures = ["epochs", "seconds", "other_seconds", "pearson_delta"]
    print(table.groupby("setting", sort=False)[measures].mean().round(3).to_string())


if __name__ == "__main__":
    main()
