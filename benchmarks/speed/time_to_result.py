"""Seconds until the residual objective is good: what batches, learning rates and early stopping buy.

    python benchmarks/speed/time_to_result.py kang_pbmc_ifnb.h5ad

Kang et al. 2018, 2,000 genes. Inside the training cells of the fold that hides each of some cell types (whose stimulated cells are left out of everything), the network alone is
scored after every epoch on a second hidden type: the `pearson_delta` of its mean change of that type's control cells. Its final score is the mean of
the last fifth of the epochs. Writes `time_to_result.csv` beside this file: for each setting the epoch and the seconds (without scoring) at which
98 % of the first one's final score is reached, and the final score; and the seconds that learning the response takes after training.
"""

import argparse
import math
import time
from pathlib import Path

import anndata as ad
import lightning
import machine
import numpy as np
import pandas as pd
import scanpy as sc
import scvi

from spaperb import SpaPerbModel
from spaperb.benchmark import Task, make_fold
from spaperb.metrics import pearson_delta
from spaperb.model import RESIDUAL_MINIBATCHES

HERE = Path(__file__).parent
FOLDS = [
    ("B cells", "CD4 T cells"),
    ("CD14+ Monocytes", "NK cells"),
    ("CD8 T cells", "FCGR3A+ Monocytes"),
]
ENOUGH = 0.98
SETTINGS = {
    "default: 256 pairs, lr 0.001": {},
    "128 pairs": {"batch_size": 128},
    "512 pairs": {"batch_size": 512},
    "512 pairs, lr 0.002": {"batch_size": 512, "plan_kwargs": {"lr": 2e-3}},
    "lr 0.003": {"plan_kwargs": {"lr": 3e-3}},
    "lr 0.0003": {"plan_kwargs": {"lr": 3e-4}},
    "early stopping, patience 10": {"early_stopping": True, "early_stopping_patience": 10},
    "lr falls on a plateau": {"plan_kwargs": {"reduce_lr_on_plateau": True, "lr_patience": 10}},
    "bfloat16": {"precision": "bf16-mixed"},
}


class Score(lightning.Callback):
    """Score the network on hidden cells after each epoch, off the clock."""

    def __init__(self, model, control, real):
        self.model, self.control, self.real = model, control, real
        self.seconds, self.scores, self.used = [], [], 0.0

    def on_train_epoch_start(self, trainer, pl_module):
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        """Stop it, and score."""
        self.used += time.perf_counter() - self.start
        self.model.is_trained_ = True
        predicted = self.model.predict_stimulated(self.control, inplace=False)
        self.model.module.train()
        self.seconds.append(self.used)
        self.scores.append(pearson_delta(predicted, self.real, self.control.X))


def run(cells: ad.AnnData, hidden: str, inner: str, setting: dict, seed: int) -> dict:
    """Train with one setting on one inner fold."""
    task = Task("cell_type", "condition", "control", None, "cell_type", 2000, 0)
    outer = make_fold(cells, hidden, task).train
    fold = make_fold(outer, inner, task)
    scvi.settings.seed = seed
    SpaPerbModel.setup_anndata(fold.train)
    model = SpaPerbModel(fold.train, objective="residual", response=False)
    score = Score(model, fold.control, fold.real)
    # As many cells are seen in all settings.
    epochs = math.ceil(RESIDUAL_MINIBATCHES * 2 * 256 / fold.train.n_obs)
    model.train(
        epochs,
        **{"early_stopping": False, "check_val_every_n_epoch": 1, **setting},
        enable_progress_bar=False,
        callbacks=[score],
    )
    return {"seconds": np.array(score.seconds), "scores": np.array(score.scores)}


def response_seconds(cells: ad.AnnData, hidden: str) -> float:
    """Seconds that learning the response takes, once the network is trained."""
    task = Task("cell_type", "condition", "control", None, "cell_type", 2000, 0)
    fold = make_fold(cells, hidden, task)
    SpaPerbModel.setup_anndata(fold.train)
    model = SpaPerbModel(fold.train, objective="residual")
    model.train(1, enable_progress_bar=False, early_stopping=False)
    start = time.perf_counter()
    model._learn_contexts()
    model.predict_stimulated(fold.control, inplace=False)
    return time.perf_counter() - start


def main() -> None:
    """Run all settings on all folds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="raw counts, with obs condition and cell_type")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=HERE / "time_to_result.csv")
    args = parser.parse_args()
    cells = ad.read_h5ad(args.file)
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    rows = []
    for fold in FOLDS:
        for seed in args.seeds:
            enough = math.nan
            for name in args.settings:
                curve = run(cells, *fold, SETTINGS[name], seed)
                final = curve["scores"][-max(1, len(curve["scores"]) // 5) :].mean()
                if math.isnan(enough):
                    enough = ENOUGH * final
                reached = np.flatnonzero(curve["scores"] >= enough)
                at = reached[0] if len(reached) else None
                rows.append(
                    {
                        "hidden": fold[0],
                        "inner": fold[1],
                        "setting": name,
                        "seed": seed,
                        "epochs": len(curve["scores"]),
                        "seconds": curve["seconds"][-1],
                        "final": final,
                        "epoch_98": math.nan if at is None else at + 1,
                        "seconds_98": math.nan if at is None else curve["seconds"][at],
                    }
                )
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table["response_seconds"] = response_seconds(cells, FOLDS[0][0])
    table["machine"] = machine.describe()
    table.to_csv(args.output, index=False, float_format="%.4g")
    measures = ["epochs", "seconds", "final", "epoch_98", "seconds_98"]
    print(table.groupby("setting", sort=False)[measures].mean().round(3).to_string())


if __name__ == "__main__":
    main()
