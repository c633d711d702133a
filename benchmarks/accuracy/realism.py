"""How much sampled cells look like real ones: drawn counts, and cells of other kinds.

    python benchmarks/accuracy/realism.py kang_pbmc_ifnb.h5ad

Kang et al. 2018, each cell type's stimulated cells hidden as in `kang.py`; weights never saw these
cells. Sampled counts are normalised as the control cells were, by their size factor, and log1p.
`auc` is how well a logistic regression on 50 principal components of the training cells tells
predicted from real stimulated cells (five folds; 0.5: not at all); "half of the real cells" stands
for the best that can be, and "real mean change, sampled" for counts that are drawn as ours are, of
the change that the hidden cells have. Writes `realism.csv` beside this file.
"""

import anndata as ad
import numpy as np
import pandas as pd
from common import (
    HERE,
    KANG,
    log_normalised,
    make_parser,
    paired_types,
    split,
    task_of,
    trained,
    without,
)

from spaperb import baselines, metrics
from spaperb.cells import CountChange, Sample, order_of
from spaperb.populations import dense, dispersion, fit_projection, project, rate, scale_of, size_of

METRICS = ["pearson_delta", "mse_mean", "energy_distance", "variance_ratio"]
METRICS += ["zero_fraction_error", "deg_overlap", "correlation_error"]


def sampled_with(change: np.ndarray, control: ad.AnnData) -> np.ndarray:
    """Counts drawn with a mean change and the control counts' dispersion, log-normalised."""
    x, counts = dense(control.X), dense(control.layers["counts"]).astype(float)
    ranks = np.repeat(np.arange(len(x), dtype=np.uint32)[:, None], x.shape[1], axis=1)
    order = order_of(ranks, np.full_like(ranks, len(x)), seed=0, draw=0)
    scale = scale_of(x, counts)
    size = size_of(counts, scale)
    drawn = CountChange.of(
        Sample(x, counts, order, rate(counts, size)), change, dispersion(counts, size)
    )
    return np.log1p(drawn.apply(counts, size, order) * scale[:, None])


def main() -> None:
    """Run all types."""
    parser = make_parser(__doc__, "file", "--seeds")
    parser.set_defaults(seeds=[0])
    args = parser.parse_args()
    cells = log_normalised(args.file)
    cells.layers["counts"] = ad.read_h5ad(args.file).X
    setup = task_of().setup(seed=0)
    rows = []
    for name in paired_types(cells):
        fold = split(cells, name)
        projection = fit_projection(fold.train.X)
        control, real = dense(fold.control.X), dense(fold.real)
        half = np.random.default_rng(0).permutation(len(real))
        for seed in args.seeds:
            model = trained(fold.train, seed, without(KANG), counts_layer="counts")
            mean = model.predict_stimulated(fold.control, inplace=False)
            counts = model.predict_stimulated(fold.control, sample=True, inplace=False)
            scale = scale_of(control, dense(fold.control.layers["counts"]))
            change = real.mean(axis=0) - dense(fold.control_real).mean(axis=0)
            predictions = {
                "real mean change, sampled": (sampled_with(change, fold.control), real),
                "spaperb_in_context, sampled": (np.log1p(counts * scale[:, None]), real),
                "spaperb_in_context": (mean, real),
                "knn_shift": (baselines.KNNShift().fit(fold.train, **setup), real),
                "nearest_cells": (baselines.NearestCells().fit(fold.train, **setup), real),
                "no_change": (control, real),
                "half of the real cells": (real[half[::2]], real[half[1::2]]),
            }
            for method, (predicted, truth) in predictions.items():
                if hasattr(predicted, "predict"):
                    predicted = predicted.predict(fold.control)
                scores = metrics.score(predicted, truth, control, projection, **fold.judged())
                p, s = project(predicted, projection), project(truth, projection)
                rows.append(
                    {"context": name, "seed": seed, "method": method}
                    | {metric: scores[metric] for metric in METRICS}
                    | {"auc": metrics.classifier_auc(p, s)}
                )
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "realism.csv", index=False, float_format="%.4g")
    numbers = table.drop(columns=["seed"])
    print(numbers.groupby("method").mean(numeric_only=True).round(3).to_string())
    sampled = numbers[numbers["method"] == "spaperb_in_context, sampled"]
    print(sampled.groupby("context").mean(numeric_only=True).round(3).to_string())


if __name__ == "__main__":
    main()
