"""Train in one or several processes and write what came out, a file a process.

A script of test_distributed.py.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import scvi
from helpers import SMALL

from spaperb import SpaPerbModel, datasets

# For each objective what one process has, so that its steps are those of two.
ARGUMENTS: dict[str, Any] = {
    "published": {n: {"batch_size": 64 // n, "plan_kwargs": {"lr": 1e-2}} for n in (1, 2)},
    "in_context": {1: {"batch_size": 2, "accumulate_grad_batches": 2}, 2: {"batch_size": 2}},
}


def main() -> None:
    objective, n_processes, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    adata = datasets.simulated(n_cell_types=6, n_cells=60, n_genes=80)
    scvi.settings.seed = 0
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **SMALL[objective])
    several = {"devices": n_processes, "strategy": "ddp_find_unused_parameters_true"}
    model.train(
        10,
        accelerator="cpu",
        early_stopping=False,
        check_val_every_n_epoch=1,
        enable_progress_bar=False,
        **ARGUMENTS[objective][n_processes],
        **(several if n_processes > 1 else {}),
    )
    result = {
        "weights": [w.double().sum().item() for w in model.module.parameters()],
        "predicted": float(model.predict_stimulated(adata, inplace=False).mean()),
        "history": {name: of.iloc[:, 0].tolist() for name, of in model.history.items()},
        "steps": model.trainer.global_step,
    }
    (folder / f"{os.environ.get('LOCAL_RANK', 0)}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
