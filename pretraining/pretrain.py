"""Pretrain the in-context networks on the data sets of `data_sets.csv`, and on all but one.

Some simulated sets (`simulated.py`) take part each time.

    python pretraining/pretrain.py FOLDER
    python pretraining/pretrain.py FOLDER --only without_kang_pbmc_ifnb

FOLDER holds the data sets, `<name>.h5ad`. Writes the weights that come with the package,
`src/spaperb/weights/spaperb.safetensors`, those that never saw one data set,
`weights/without_<name>.safetensors` beside this file, and `log.csv`: the loss of each epoch, and
the checksum of each file. On one kind of machine the files are the same to the last bit. More data
sets take a line in `data_sets.csv` each; a data set is a study, with whatever contexts and
perturbations.
"""

import argparse
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import HERE, SEED, WEIGHTS, data_sets, read_set
from scvi.train import Trainer
from simulated import simulated_evidence
from torch.utils.data import DataLoader

from spaperb.data import N_BATCHES
from spaperb.data._episodes import N_FIRST, N_GENES, Episodes, EpisodeSampler
from spaperb.evidence import Evidence, draw
from spaperb.module import InContextModule
from spaperb.nn import Constants, shipped_weights, write_weights
from spaperb.train import InContextTrainingPlan

N_SIMULATED, TIMES = 4, 3
"""Simulated data sets, half with combinations and half with doses; real ones count three times."""
N_NETWORKS, N_EPOCHS, N_EPISODES = 3, 90, 4


def pretrain(sets: Sequence[Evidence]) -> tuple[InContextModule, pd.Series]:
    """Train networks on episodes of several data sets, and return the loss."""
    torch.manual_seed(SEED)
    module = InContextModule(n_networks=N_NETWORKS)
    rng = np.random.default_rng(SEED)
    first = [draw(sets[i % len(sets)], rng, N_GENES).description for i in range(N_FIRST)]
    module.standardise_by([Constants.of(first)] * N_NETWORKS)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=N_EPOCHS,
        gradient_clip_val=100.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    episodes = Episodes([sets] * N_NETWORKS, N_EPISODES, N_GENES, SEED)
    loader = DataLoader(episodes, sampler=EpisodeSampler(N_BATCHES), batch_size=None)
    trainer.fit(InContextTrainingPlan(module), loader)
    module.eval()
    return module, trainer.logger.history["train_loss"]["train_loss"]


def main() -> None:
    """Write all weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", metavar="FILE", help="names of files, without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sets = {row["name"]: read_set(args.folder, row) for _, row in data_sets().iterrows()}
    simulated = [simulated_evidence(seed) for seed in range(N_SIMULATED)]
    files = {f"without_{name}": [n for n in sets if n != name] for name in sets}
    files = {"spaperb": list(sets)} | files
    log = HERE / "log.csv"
    logs = [pd.read_csv(log)] if args.only and log.exists() else []
    for file, names in files.items():
        if args.only and file not in args.only:
            continue
        start = time.perf_counter()
        module, losses = pretrain([*TIMES * [sets[name] for name in names], *simulated])
        path = WEIGHTS / f"{file}.safetensors"
        path = shipped_weights() if file == "spaperb" else path
        write_weights(list(module.networks), path, names)
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        logs = [old[old["file"] != file] for old in logs]
        logs.append(
            pd.DataFrame(
                {
                    "file": file,
                    "epoch": range(1, len(losses) + 1),
                    "loss": np.round(losses.to_numpy(dtype=float), 4),
                    "sha256": checksum,
                }
            )
        )
        pd.concat(logs).to_csv(log, index=False)
        print(f"{file}: {time.perf_counter() - start:.0f} s, {checksum[:12]}", flush=True)


if __name__ == "__main__":
    main()
