"""Whether it pays to measure what `suggest_measurements` suggests: greedy against random choice.

    python benchmarks/accuracy/suggest.py FOLDER

Data sets with four contexts or more of one perturbation: one context is measured, each in turn,
and more are chosen one at a time. `screen`: 30 simulated perturbations in 8 types, of which each
was measured in one type at random, and pairs of both are chosen. After each measurement its real
change is given, and all that is not measured is predicted from it by pretrained networks that
never saw the set, without training. `error` is the squared error over the squared change, both
less the noise of measuring (for the screen, of the true change), summed over what is not measured
and divided by the number of all changes. Random choices: mean of ten (three in the screen). Writes
`suggest.csv` and `suggest.png`.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import HERE, data_sets, make_parser, networks_without, read_set
from joblib import Parallel, delayed
from matplotlib.figure import Figure

from spaperb import datasets
from spaperb.evidence import ContextQuery, Evidence, describe, suggest
from spaperb.module import InContextModule

MIN_CONTEXTS = 4
N_RANDOM = 10
N_SCREEN, EVERY = 40, 10
"""Pairs that are chosen in the screen, and after how many the rest is predicted."""
SEEDS = (0, 1, 2)


def predict(evidence: Evidence, module: InContextModule, s: int, kept: list[int]) -> np.ndarray:
    """Predict a change from some others."""
    query = ContextQuery.of_change(evidence, s)
    return module.predict(describe(evidence, query, np.array(sorted(kept)))).mean


def error_left(
    evidence: Evidence,
    module: InContextModule,
    truth: np.ndarray,
    noise: np.ndarray,
    kept: list[int],
) -> float:
    """Relative error of all that was not measured."""
    errors = []
    for s in evidence.whole.tolist():
        if s not in kept:
            square = ((predict(evidence, module, s, kept) - truth[s]) ** 2).sum() - noise[s]
            errors.append(square / max((truth[s] ** 2).sum() - noise[s], noise[s]))
    return float(np.sum(errors) / len(evidence.whole))


def greedy(evidence: Evidence, kept: list[int], rng: np.random.Generator) -> int:
    """Choose what the package suggests."""
    changes = evidence.changes
    left = [s for s in evidence.whole.tolist() if s not in kept]
    contexts = np.unique(evidence.context)
    numbers = np.column_stack(
        [np.searchsorted(contexts, evidence.context[left]), changes.perturbation[left]]
    )
    bulks = [evidence.populations.pseudobulk(k) for k in contexts]
    known = evidence.keep(np.array(sorted(kept)))
    (choice,) = suggest(known, bulks, contexts.tolist(), numbers, 1)
    is_chosen = (numbers == [choice.context, choice.perturbation]).all(axis=1)
    return left[int(np.flatnonzero(is_chosen)[0])]


def random(evidence: Evidence, kept: list[int], rng: np.random.Generator) -> int:
    """Choose at random."""
    return int(rng.choice([s for s in evidence.whole.tolist() if s not in kept]))


Choose = Callable[[Evidence, list[int], np.random.Generator], int]


def run(
    name: str,
    evidence: Evidence,
    module: InContextModule,
    truth: np.ndarray,
    noise: np.ndarray,
    start: list[int],
    choose: Choose,
    steps: int,
    every: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Measure one change after another."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    kept, rows = list(start), []
    for step in range(steps + 1):
        if step % every == 0:
            error = error_left(evidence, module, truth, noise, kept)
            of = {"data_set": name, "start": start[0], "choice": choose.__name__, "seed": seed}
            rows.append({**of, "measured": len(kept), "error": error})
        if step < steps:
            kept.append(choose(evidence, kept, rng))
    return rows


def simulated_screen(seed: int) -> tuple[Evidence, np.ndarray]:
    """Measure a simulated screen, and tell the true changes."""
    cells = datasets.simulated_screen(30, 8, 40, 300, seed=seed)
    arms = cells.obs["condition"].cat.codes.to_numpy().astype(int)
    types = cells.obs["cell_type"].cat
    labels = types.codes.to_numpy().astype(int)
    evidence = Evidence.of(cells.X, arms, labels, list(types.categories), seed=None)
    true = cells.layers["true_stimulated"] - cells.layers["true_control"]
    changes = evidence.changes
    names = [types.categories.get_loc(evidence.names[k]) for k in evidence.context]
    return evidence, np.array(
        [
            true[(labels == k) & (arms == 1 + p)].mean(axis=0)
            for k, p in zip(names, changes.perturbation, strict=True)
        ]
    )


def main() -> None:
    """Run all sets."""
    args = make_parser(__doc__, "folder", "--n-jobs").parse_args()
    jobs = []
    for row in data_sets().to_dict("records"):
        evidence = read_set(args.folder, row).without_thirds()
        changes = evidence.changes
        is_single = len(np.unique(changes.perturbation)) == 1
        if not is_single or len(evidence.whole) < MIN_CONTEXTS:
            continue
        given = (row["name"], evidence, networks_without(row["name"]), changes.shift)
        noise = (changes.error**2).sum(axis=1)
        for start in evidence.whole.tolist():
            for choose, seeds in ((greedy, range(1)), (random, range(N_RANDOM))):
                steps = len(evidence.whole) - 2
                jobs += [
                    delayed(run)(*given, noise, [start], choose, steps, 1, seed) for seed in seeds
                ]
    for screen in SEEDS:
        evidence, truth = simulated_screen(screen)
        module = networks_without("crispr_multi")
        rng = np.random.default_rng(screen)
        of = evidence.changes.perturbation
        start = [int(rng.choice(np.flatnonzero(of == p))) for p in np.unique(of)]
        given = ("screen", evidence, module, truth, np.zeros(len(truth)), start)
        for choose, seeds in ((greedy, range(1)), (random, range(N_RANDOM // 3))):
            jobs += [delayed(run)(*given, choose, N_SCREEN, EVERY, seed) for seed in seeds]
    table = pd.DataFrame([row for rows in Parallel(args.n_jobs)(jobs) for row in rows])
    table.to_csv(HERE / "suggest.csv", index=False, float_format="%.5g")
    means = table.groupby(["data_set", "measured", "choice"], sort=False)["error"].mean().unstack()
    print(means.round(3).to_string())
    sets = table["data_set"].unique()
    figure = Figure(figsize=(3 * len(sets), 3), layout="constrained")
    for axes, name in zip(np.ravel(figure.subplots(1, len(sets))), sets, strict=True):
        for choice, errors in means.loc[name].items():
            axes.plot(errors.index, errors, marker="o", markersize=3, label=choice)
        axes.set(title=name, xlabel="changes measured", ylabel="error left", ylim=(0, None))
        axes.title.set_fontsize(8)
        axes.legend(frameon=False)
    figure.savefig(HERE / "suggest.png", dpi=150)


if __name__ == "__main__":
    main()
