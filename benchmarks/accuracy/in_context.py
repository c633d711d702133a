"""The in-context networks on hidden cell types: from scratch, pretrained, fine-tuned.

    python benchmarks/accuracy/in_context.py FOLDER

FOLDER holds the data sets. Weights are pretrained on seven sets that are not Kang et al.; its
stimulated cells of
the hidden type are used for nothing but the score of the mean change. Writes `in_context.csv`
beside this file, a row for each
hidden type, way and seed, and `in_context_summary.csv`.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from spaperb.in_context import InContextNetwork, Settings, predict, train

from spaperb.baselines import KNNShift
from spaperb.benchmark import Fold, Task, make_fold
from spaperb.evidence import Evidence, Query, describe
from spaperb.populations import mean_expression, variance

HERE = Path(__file__).parent
SETS = (
    "mouse_spleen_lps_jaitin",
    "human_trachea_smoking",
    "human_pbmc_covid_combat",
    "mouse_embryo_tal1",
    "pig_airway_cftr",
    "mouse_lung_tumor_zilionis",
    "mouse_oligo_stress_marques",
)
KANG = Task("cell_type", "condition", "control", None, "cell_type", 2000, 0)
LEAST_CELLS, LEAST_HIDDEN, LEAST_FEW = 20, 50, 30
N_NETWORKS = 2
NINE_TENTHS = 1.645
SCRATCH = Settings(n_steps=250)
PRETRAIN = Settings(n_steps=350)
FINE = Settings(n_steps=100, learning_rate=1e-3, penalty=1.0)


def read(path: Path) -> ad.AnnData:
    """Read counts and normalise each cell by itself."""
    cells = ad.read_h5ad(path)
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells


def measure(cells: ad.AnnData, context_key: str, seed: int = 0) -> Evidence:
    """Measure the changes of all conditions but the control."""
    contexts = cells.obs[context_key].astype("category").cat
    conditions = [c for c in np.unique(cells.obs["condition"]) if c != "control"]
    arms = np.zeros(cells.n_obs, dtype=int)
    for i, condition in enumerate(conditions):
        arms[(cells.obs["condition"] == condition).to_numpy()] = 1 + i
    labels = contexts.codes.to_numpy().astype(int)
    return Evidence.of(cells.X, arms, labels, list(contexts.categories), seed=seed)


def pretraining_set(path: Path) -> Evidence:
    """Contexts with enough cells in two conditions; the 2,000 most variable genes."""
    cells = read(path)
    sizes = pd.crosstab(cells.obs["context"], cells.obs["condition"])
    enough = sizes >= LEAST_CELLS
    pairs = list(zip(cells.obs["context"], cells.obs["condition"], strict=True))
    has_control = enough["control"]
    cells = cells[[bool(enough.loc[c, p] and has_control[c]) for c, p in pairs]].copy()
    if cells.n_vars > 2000:
        chosen = sc.pp.highly_variable_genes(
            cells, flavor="seurat", n_top_genes=2000, inplace=False
        )["highly_variable"].to_numpy()
        cells = cells[:, chosen].copy()
    return measure(cells, "context")


def hidden_types(kang: ad.AnnData) -> list[str]:
    """Cell types that are hidden in turn."""
    sizes = pd.crosstab(kang.obs["cell_type"], kang.obs["condition"])
    return list(sizes.index[sizes.min(axis=1) >= LEAST_HIDDEN])


def change(
    networks: Sequence[InContextNetwork], evidence: Evidence, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Mean change of an unmeasured context, averaged over networks, and its error scale."""
    query = Query.of_population(evidence, evidence.names.index(name), 0)
    description = describe(evidence, query, evidence.whole)
    means, sigmas = zip(*(predict(network, description) for network in networks), strict=True)
    return np.mean(means, axis=0), np.sqrt(np.mean(np.square(sigmas), axis=0))


def score(change: np.ndarray, fold: Fold, sigma: np.ndarray | None = None) -> dict[str, float]:
    """Score a mean change, and the share of genes within 90 % intervals of it."""
    control, real = mean_expression(fold.control.X), mean_expression(fold.real)
    predicted = np.maximum(control + change, 0)
    scores = {
        "pearson_delta": float(np.corrcoef(predicted - control, real - control)[0, 1]),
        "mse": float(1e3 * np.mean((predicted - real) ** 2)),
    }
    if sigma is not None:
        noise = sum(variance(x) / x.shape[0] for x in (fold.control.X, fold.real))
        inside = np.abs(predicted - real) <= NINE_TENTHS * np.sqrt(sigma**2 + noise)
        scores["coverage"] = float(inside.mean())
    return scores


def few(kang: ad.AnnData, hidden: str, n: int, draw: int) -> Fold:
    """Hide all stimulated cells but those of a few types drawn at random."""
    of_type = kang.obs["cell_type"].to_numpy()
    is_control = (kang.obs["condition"] == "control").to_numpy()
    sizes = pd.Series(of_type[is_control]).value_counts()
    others = sorted(sizes.index[(sizes >= LEAST_FEW) & (sizes.index != hidden)])
    # Hidden types have draws of their own, or nearly the same few types would serve all.
    seed = [draw, n, hidden_types(kang).index(hidden)]
    chosen = np.random.default_rng(seed).permutation(others)[:n]
    return make_fold(kang[is_control | np.isin(of_type, [hidden, *chosen])], hidden, KANG)


def networks_of(
    evidence: Sequence[Evidence],
    settings: Settings,
    seed: int,
    start: Sequence[InContextNetwork | None] = (None,) * N_NETWORKS,
) -> list[InContextNetwork]:
    """Some networks with seeds of their own."""
    return [
        train(evidence, settings, N_NETWORKS * seed + i, first) for i, first in enumerate(start)
    ]


def untrained(evidence: Evidence) -> InContextNetwork:
    """The prior alone."""
    return train([evidence], dataclasses.replace(SCRATCH, n_steps=1, learning_rate=0.0), 0)


def run(
    fold: Fold,
    name: str,
    pretrained: Sequence[Sequence[InContextNetwork]],
    from_scratch: bool,
) -> Iterator[dict[str, Any]]:
    """Score every way and seed on a fold."""
    evidence = measure(fold.train, "cell_type")
    knn = KNNShift().fit(
        fold.train,
        held_out="cell_type",
        condition_key="condition",
        control="control",
        stimulated=None,
        labels_key="cell_type",
        seed=0,
    )
    of_knn = mean_expression(knn.predict(fold.control)) - mean_expression(fold.control.X)
    yield {"way": "knn_shift", "seed": 0, **score(of_knn, fold)}
    of_prior, _ = change([untrained(evidence)], evidence, name)
    yield {"way": "prior", "seed": 0, **score(of_prior, fold)}
    for seed, networks in enumerate(pretrained):
        ways = {"untouched": networks, "fine-tuned": networks_of([evidence], FINE, seed, networks)}
        if from_scratch:
            ways["from scratch"] = networks_of([evidence], SCRATCH, seed)
        changes = {way: change(trained, evidence, name) for way, trained in ways.items()}
        for way, (mean, sigma) in changes.items():
            yield {"way": way, "seed": seed, **score(mean, fold, sigma)}
        for way in list(ways)[1:]:
            mean = (changes["untouched"][0] + changes[way][0]) / 2
            yield {"way": f"mean of untouched and {way}", "seed": seed, **score(mean, fold)}


def main() -> None:
    """Pretrain, and predict every hidden type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    sets = [pretraining_set(args.folder / f"{name}.h5ad") for name in SETS]
    pretrained = [networks_of(sets, PRETRAIN, seed) for seed in range(args.seeds)]
    print(f"pretrained in {time.perf_counter() - start:.0f} s", flush=True)
    kang = read(args.folder / "kang_pbmc_ifnb.h5ad")
    types = hidden_types(kang)
    cases = [("kang-loco", name, 0) for name in types]
    cases += [(f"kang-few {n}", name, d) for n in (2, 3) for d in (0, 1) for name in types]
    rows: list[dict[str, Any]] = []
    for protocol, name, drawn in cases:
        if protocol == "kang-loco":
            fold = make_fold(kang, name, KANG)
        else:
            fold = few(kang, name, int(protocol.split()[1]), drawn)
        case = {"protocol": protocol, "context": name, "draw": drawn}
        rows += [
            case | row for row in run(fold, name, pretrained, from_scratch=protocol == "kang-loco")
        ]
        # After each fold, so that a run that is stopped leaves what it has.
        table = pd.DataFrame(rows)
        table.to_csv(HERE / "in_context.csv", index=False, float_format="%.4g")
        summary = summarised(table)
        summary.to_csv(HERE / "in_context_summary.csv", float_format="%.4g")
        print(f"{protocol}, {name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(summary.to_string())


def summarised(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over types of medians over seeds; deviation over seeds of means over types."""
    keys, scores = ["protocol", "way"], ["pearson_delta", "mse", "coverage"]
    cases = table.groupby([*keys, "context", "draw"], sort=False)[scores].median()
    seeds = table.groupby([*keys, "seed"], sort=False)[scores].mean()
    return (
        cases.groupby(keys, sort=False)
        .mean()
        .join(seeds.groupby(keys, sort=False).std().add_suffix("_spread"))
    )


if __name__ == "__main__":
    main()
