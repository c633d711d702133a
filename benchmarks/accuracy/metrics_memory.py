"""Peak memory and time of all metrics on 100,000 predicted, real and control cells.

    python benchmarks/accuracy/metrics_memory.py

Simulated counts, 2,000 genes; predicted cells dense in single precision, the others CSR. Prints
one line and writes `metrics_memory.csv` beside this file.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from spaperb import metrics, populations

HERE = Path(__file__).parent


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-cells", type=int, default=100_000)
    parser.add_argument("--n-genes", type=int, default=2_000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.3, 0.3, args.n_genes)

    def cells(factor: float) -> sparse.csr_matrix:
        blocks = [
            sparse.csr_matrix(
                np.log1p(rng.poisson(rate * factor, (1000, args.n_genes)), dtype="f4")
            )
            for _ in range(args.n_cells // 1000)
        ]
        return sparse.vstack(blocks, format="csr")

    control, real = cells(1.0), cells(1.5)
    predicted = cells(1.4).toarray()
    inputs = predicted.nbytes + sum(
        a.nbytes for x in (control, real) for a in (x.data, x.indices, x.indptr)
    )
    start = time.perf_counter()
    projection = populations.fit_projection(control[:: max(1, args.n_cells // 5000)])
    metrics.score(predicted, real, control, projection)
    row = {
        "n_cells": args.n_cells,
        "n_genes": args.n_genes,
        "inputs_gb": inputs / 1e9,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "seconds": time.perf_counter() - start,
    }
    pd.DataFrame([row]).to_csv(HERE / "metrics_memory.csv", index=False, float_format="%.3g")
    print(row)


if __name__ == "__main__":
    main()
