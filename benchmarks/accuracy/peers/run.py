"""Other tools on the folds of kang.py by cell type, one environment each.

    python benchmarks/accuracy/peers/run.py kang_pbmc_ifnb.h5ad

Makes the environments that are missing, each with the version of Python that its tool wants
(`python3.12`, ... must be on the path) and the pinned packages of `requirements/<name>.txt`. A
tool that cannot be installed is named and left out. Writes `kang_peers.csv` and
`kang_peers_summary.csv` beside those of kang.py. `--folds DIR` keeps finished folds; `--only NAME
...` runs some tools and replaces their rows alone.
"""

import subprocess
import sys
from pathlib import Path

import pandas as pd

sys.path.append(str(Path(__file__).parents[1]))

from common import N_TOP_GENES, log_normalised, make_parser, write
from peers._environment import InEnvironment, environment
from peers.linear import LatentLinear
from peers.trvae import TrVAE

from spaperb.evaluation.benchmark import benchmark

OWN = {"linear": LatentLinear(), "trvae": TrVAE()}
"""Peers that need nothing but what this package needs."""
PYTHON = {
    "scgen": "3.12",
    "scpram": "3.10",
    "biolord": "3.11",
    "cpa": "3.10",
    "scarches_trvae": "3.10",
    "cellflow": "3.11",
}
"""Version of Python of the other peers' environments."""
SLOW = {"biolord", "scpram"}
"""Peers that take more than five minutes a fold: one seed."""
METRICS = ["pearson_delta", "pearson_delta_degs", "weighted_r2_delta", "r2_mean", "mse_mean"]
METRICS += ["energy_distance", "variance_ratio", "zero_fraction_error", "sign_accuracy"]
ENVIRONMENTS = Path(".venv-peers")


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, "file", "--folds", "--seeds", "--only", "--n-jobs")
    help_ = f"folder of the environments (default: {ENVIRONMENTS})"
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help=help_)
    args = parser.parse_args()

    adata = log_normalised(args.file)
    known = [*OWN, *PYTHON]
    methods = {}
    for name in args.only or known:
        if name in OWN:
            methods[name] = OWN[name]
            continue
        try:
            python = environment(name, PYTHON[name], args.environments)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{name} is left out: {error}")
        else:
            methods[name] = InEnvironment(name, python)
    results = [
        benchmark(
            adata,
            {name: methods[name] for name in names},
            stimulated="stimulated",
            n_top_genes=N_TOP_GENES,
            seeds=seeds,
            n_jobs=args.n_jobs,
            folder=args.folds,
        )
        for names, seeds in (
            ([name for name in methods if name not in SLOW], args.seeds),
            ([name for name in methods if name in SLOW], args.seeds[:1]),
        )
        if names
    ]
    whole = pd.concat(results)
    whole = whole[whole["metric"].isin(METRICS)]
    write(whole, "kang_peers", stay=set(known) - set(methods))


if __name__ == "__main__":
    main()
