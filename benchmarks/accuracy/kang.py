"""Kang et al. 2018, leave one context out: both objectives and every baseline.

    python benchmarks/accuracy/kang.py kang_pbmc_ifnb.h5ad --held-out cell_type
    python benchmarks/accuracy/kang.py kang_pbmc_ifnb.h5ad --held-out donor

Writes `kang_<held out>.csv` (one row a context, method, seed and metric),
`kang_<held out>_summary.csv` and a figure for each of two metrics beside this file. `--folds DIR`
keeps finished folds, so that a run can be continued; `--only METHOD ...` runs some methods and
replaces their rows alone.
"""

from common import KANG, N_TOP_GENES, chosen, log_normalised, make_parser, without, write

from spaperb.evaluation.baselines import BASELINES, OwnTypeShift
from spaperb.evaluation.benchmark import SpaPerb, benchmark


def main() -> None:
    """Run one protocol."""
    parser = make_parser(__doc__, "file", "--seeds", "--folds", "--only", "--n-jobs")
    parser.add_argument("--held-out", choices=["cell_type", "donor"], required=True)
    args = parser.parse_args()

    adata = log_normalised(args.file)
    known = {
        "spaperb_in_context": SpaPerb(pretrained=without(KANG)),
        "spaperb_published": SpaPerb(objective="published"),
        **BASELINES,
    }
    if args.held_out == "donor":
        known["own_type_shift"] = OwnTypeShift()
    methods = chosen(known, args.only)
    results = benchmark(
        adata,
        methods,
        held_out=args.held_out,
        n_top_genes=N_TOP_GENES,
        seeds=args.seeds,
        n_jobs=args.n_jobs,
        folder=args.folds,
    )
    metrics = ["pearson_delta", "energy_distance"]
    write(results, f"kang_{args.held_out}", metrics, set(known) - set(methods))


if __name__ == "__main__":
    main()
