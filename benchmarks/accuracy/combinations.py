"""A combination without an example: predicted as one, or as the sum of its parts.

    python benchmarks/accuracy/combinations.py

Data sets of `pretraining/simulated.py` with other seeds than those of the pretraining; weights
that never saw the real combinations. The combinations of a set are hidden, and each is predicted
where its parts were measured: by the networks, as the sum of the parts' predicted changes, and as
the sum of their measured shifts, from one third of a context's cells; the other two are the truth.
Writes `combinations.csv` beside this file: for each combination and way the squared error, less
the noise of the truth, over the squared change.
"""

import numpy as np
import pandas as pd
from common import HERE, networks_without, simulated_evidence, truth_of

from spaperb.evidence import ContextQuery, Evidence, describe
from spaperb.module import InContextModule

SEEDS = range(100, 120, 2)
"""Even seeds are those of sets with combinations."""


def errors(evidence: Evidence, module: InContextModule) -> list[dict[str, float]]:
    """Errors of each combination whose parts were measured in the same context."""
    changes = evidence.changes
    is_single = np.array([len(evidence.parts[p]) == 1 for p in changes.perturbation])
    singles = evidence.whole[is_single[evidence.whole]]
    rows = []
    for s in evidence.whole[~is_single[evidence.whole]].tolist():
        # One third of the context is asked for, and the others tell the truth.
        first, *others = [t for t in evidence.thirds[s].tolist() if t >= 0]
        asked = ContextQuery.of_change(evidence, first)._replace(perturbation=None)
        here = np.flatnonzero(is_single & (changes.population == changes.population[first]))
        parts = here[np.isin(changes.perturbation[here], asked.parts)].tolist()
        if len(parts) < len(asked.parts):
            continue
        kept = np.concatenate([singles[evidence.context[singles] != asked.context], here])
        of_parts = [
            describe(evidence, ContextQuery.of_change(evidence, part), kept) for part in parts
        ]
        predicted = {
            "the networks": module.predict(describe(evidence, asked, kept)).mean,
            "sum of predicted changes": sum(module.predict(of).mean for of in of_parts),
            "sum of measured shifts": changes.shift[parts].sum(axis=0),
        }
        truth, noise = truth_of(evidence, others)
        rows.append(
            {
                way: (((x - truth) ** 2).sum() - noise) / (truth**2).sum()
                for way, x in predicted.items()
            }
        )
    return rows


def main() -> None:
    """Run all sets."""
    module = networks_without("crispr_multi")
    tables = []
    for seed in SEEDS:
        rows = errors(simulated_evidence(seed), module)
        tables.append(pd.DataFrame(rows).assign(seed=seed))
    table = pd.concat(tables)
    table.to_csv(HERE / "combinations.csv", index=False, float_format="%.6g")
    print(table.groupby("seed").mean().round(3).to_string())
    print(table.drop(columns="seed").mean().round(3).to_string())


if __name__ == "__main__":
    main()
