"""Kang et al. 2018, leave one context out: both objectives and every baseline.

    python benchmarks/accuracy/kang.py kang_pbmc_ifnb.h5ad --held-out cell_type
    python benchmarks/accuracy/kang.py kang_pbmc_ifnb.h5ad --held-out donor

Writes `kang_<held out>.csv` (one row a context, method, seed and metric), `kang_<held out>_summary.csv` and a figure
for each of two metrics beside this file. `--folds DIR` keeps finished folds, so that a run can be continued;
`--only METHOD ...` runs some methods and replaces their rows alone.
"""

import argparse
from pathlib import Path

import report
from reading import log_normalised
from weights import without

from spaperb.evaluation.baselines import BASELINES, OwnTypeShift
from spaperb.evaluation.benchmark import SpaPerb, benchmark


def main() -> None:
    """Run one protocol."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "file", type=Path, help="raw counts, with obs condition, cell_type and donor"
    )
    parser.add_argument("--held-out", choices=["cell_type", "donor"], required=True)
    parser.add_argument("--folds", type=Path)
    parser.add_argument("--only", nargs="+", metavar="METHOD")
    parser.add_argument("--n-jobs", type=int, default=2)
    args = parser.parse_args()

    adata = log_normalised(args.file)
    methods = {
        "spaperb_in_context": SpaPerb(pretrained=without("kang_pbmc_ifnb")),
        "spaperb_published": SpaPerb(objective="published"),
        **BASELINES,
    }
    if args.held_out == "donor":
        methods["own_type_shift"] = OwnTypeShift()
    known = set(methods)
    if args.only:
        methods = {name: methods[name] for name in args.only}
    results = benchmark(
        adata,
        methods,
        held_out=args.held_out,
        n_top_genes=2000,
        n_jobs=args.n_jobs,
        folder=args.folds,
    )
    metrics = ["pearson_delta", "energy_distance"]
    report.write(results, f"kang_{args.held_out}", metrics, known - set(methods))


if __name__ == "__main__":
    main()
