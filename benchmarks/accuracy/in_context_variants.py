"""Variants of the in-context networks, scored without a hidden cell of the benchmark.

    python benchmarks/accuracy/in_context_variants.py FOLDER [NAME ...]

Three kinds of folds:

- elsewhere: pretrain on six of the seven sets, predict each context of the seventh, untouched
- inner: from scratch on the training cells of a fold of Kang et al., with a second cell type hidden
among them, which is
  predicted; every third pair of an outer and an inner type
- fine: as inner, from weights pretrained on the seven sets

Scores are of the mean change: `pearson_delta`, and `mse` over that of the prior alone. Adds to
`in_context_variants.csv`.
"""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from in_context import (
    FINE,
    KANG,
    N_NETWORKS,
    PRETRAIN,
    SCRATCH,
    SETS,
    hidden_types,
    measure,
    networks_of,
    pretraining_set,
    read,
    untrained,
)
from spaperb.in_context import InContextNetwork, Settings, predict

from spaperb import datasets
from spaperb.benchmark import make_fold
from spaperb.evidence import Evidence, Query, _episodes, describe

HERE = Path(__file__).parent


def simulated(n: int) -> list[Evidence]:
    """Simulated sets of random settings."""
    rng = np.random.default_rng(0)
    sets = []
    for seed in range(n):
        shared = rng.uniform(0.3, 0.9)
        cells = datasets.simulated(
            n_cell_types=int(rng.integers(4, 10)),
            n_cells=int(rng.integers(30, 200)),
            n_genes=1000,
            shared_response=shared,
            lineage_response=rng.uniform(0, 1 - shared),
            response_scale=rng.uniform(0.5, 2.0),
            library_size=rng.uniform(800, 5000),
            seed=seed,
        )
        sets.append(measure(cells, "cell_type"))
    return sets


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "latent_weight 0": {"latent_weight": 0.0},
    "latent_weight 0.1": {"latent_weight": 0.1},
    "learning_rate 2e-3": {"learning_rate": 2e-3},
    "learning_rate 1e-2": {"learning_rate": 1e-2},
    "1,000 steps": {"n_steps": 1000},
    "150 steps": {"n_steps": 150},
    "32 units": {"n_hidden": 32},
    "64 units": {"n_hidden": 64},
    "no twins": {"TWINS": 0.0},
    "twins in half": {"TWINS": 0.5},
    "all kept in 8 of 10": {"ALL_KEPT": 0.8},
    "all kept in 2 of 10": {"ALL_KEPT": 0.2},
    "no weight decay": {"weight_decay": 0.0},
    "8 episodes": {"n_episodes": 8},
    "8 simulated sets too": {"simulated": 8},
    "simulated sets alone": {"simulated": 8, "real": False},
    # Of fine-tuning.
    "penalty 0": {"penalty": 0.0},
    "penalty 0.1": {"penalty": 0.1},
    "penalty 0.1, learning_rate 3e-3": {"penalty": 0.1, "learning_rate": 3e-3},
    "penalty 0.01, learning_rate 3e-3": {"penalty": 0.01, "learning_rate": 3e-3},
    "untouched": {"n_steps": 1, "learning_rate": 0.0},
}


def scores(networks: list[InContextNetwork], evidence: Evidence, target: int) -> dict[str, float]:
    """Score the prediction of a measured change from other contexts' changes."""
    changes = evidence.changes
    population = int(changes.population[target])
    kept = evidence.whole[changes.population[evidence.whole] != population]
    query = Query.of_population(evidence, population, int(changes.perturbation[target]))
    description = describe(evidence, query, kept)
    real, control = changes.shift[target], query.mean

    def of(change: np.ndarray) -> tuple[float, float]:
        change = np.maximum(control + change, 0) - control
        return float(np.corrcoef(change, real)[0, 1]), float(np.mean((change - real) ** 2))

    r, mse = of(np.mean([predict(n, description)[0] for n in networks], axis=0))
    r_prior, mse_prior = of(predict(untrained(evidence), description)[0])
    return {"pearson_delta": r, "gain": r - r_prior, "mse_of_prior": mse / mse_prior}


def elsewhere(
    sets: dict[str, Evidence], more: list[Evidence], settings: Settings, real: bool
) -> Iterator[tuple[str, pd.Series]]:
    """Scores on each set without training on it."""
    for name, evidence in sets.items():
        others = [e for other, e in sets.items() if other != name and real]
        networks = networks_of(others + more, settings, 0)
        rows = [scores(networks, evidence, int(s)) for s in evidence.whole]
        yield name, pd.DataFrame(rows).mean()


def inner(
    folds: list[tuple[str, Evidence, str]],
    settings: Settings,
    pretrained: Sequence[InContextNetwork | None] = (None,) * N_NETWORKS,
) -> Iterator[tuple[str, pd.Series]]:
    """Scores on inner folds, trained on each from scratch or from pretrained weights."""
    for outer, evidence, name in folds:
        population = evidence.changes.population[evidence.whole]
        target = int(evidence.whole[population == evidence.names.index(name)][0])
        known = evidence.without(evidence.names.index(name))
        networks = networks_of([known], settings, 0, pretrained)
        yield f"{outer}: {name}", pd.Series(scores(networks, evidence, target))


@contextlib.contextmanager
def patched(variant: dict[str, Any]) -> Iterator[None]:
    """Change constants of the episodes."""
    with contextlib.ExitStack() as stack:
        for name in ("TWINS", "MEASURED", "ALL_KEPT"):
            if name in variant:
                stack.enter_context(mock.patch.object(_episodes, name, variant[name]))
        yield


def main() -> None:
    """Run variants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="variants, all by default")
    parser.add_argument(
        "--folds", choices=["elsewhere", "inner", "fine"], nargs="*", default=["elsewhere"]
    )
    args = parser.parse_args()
    sets = {name: pretraining_set(args.folder / f"{name}.h5ad") for name in SETS}
    folds = []
    if {"inner", "fine"} & set(args.folds):
        kang = read(args.folder / "kang_pbmc_ifnb.h5ad")
        for outer in hidden_types(kang):
            evidence = measure(make_fold(kang, outer, KANG).train, "cell_type")
            folds += [(outer, evidence, i) for i in hidden_types(kang) if i != outer]
        folds = folds[::3]
    pretrained = networks_of(list(sets.values()), PRETRAIN, 0) if "fine" in args.folds else []
    file = HERE / "in_context_variants.csv"
    for name in args.names or VARIANTS:
        variant = VARIANTS[name]
        changes = {k: v for k, v in variant.items() if hasattr(PRETRAIN, k)}
        for kind in args.folds:
            start = time.perf_counter()
            with patched(variant):
                if kind == "elsewhere":
                    rows = dict(
                        elsewhere(
                            sets,
                            simulated(variant.get("simulated", 0)),
                            dataclasses.replace(PRETRAIN, **changes),
                            variant.get("real", True),
                        )
                    )
                elif kind == "inner":
                    rows = dict(inner(folds, dataclasses.replace(SCRATCH, **changes)))
                else:
                    settings = dataclasses.replace(FINE, **changes)
                    rows = dict(inner(folds, settings, pretrained))
            table = pd.DataFrame(rows).T.rename_axis("fold").reset_index()
            table.insert(0, "variant", name)
            table.insert(0, "folds", kind)
            table.to_csv(
                file, mode="a", header=not file.exists(), index=False, float_format="%.4g"
            )
            seconds = time.perf_counter() - start
            print(kind, name, *table.iloc[:, 3:].mean().round(4), f"{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
