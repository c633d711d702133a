"""How near to a measurement a change is predicted that was measured in the context itself.

    python benchmarks/accuracy/measured.py FOLDER

FOLDER holds the data sets of `pretraining/data_sets.csv`; weights never saw the set. The cells of
each context are halved at random. One half is the measurement, the other half the truth (24
changes of a set at most). Writes `measured.csv` beside this file, a row a change: the squared
error, less the noise of the truth, over the squared change; of the measurement, of what the
networks make of it, and of the measurement shrunk towards that, which is what the model predicts.
"""

import numpy as np
import pandas as pd
from common import HERE, data_sets, make_parser, networks_without, read_set

from spaperb.evidence import ContextQuery, Evidence, describe, shrunk
from spaperb.module import InContextModule

N_CHANGES = 24


def errors(evidence: Evidence, module: InContextModule) -> list[dict[str, float]]:
    """Errors of some changes of a data set."""
    changes, populations = evidence.changes, evidence.populations
    half, context = populations.half[changes.population], evidence.context
    rows = []
    for truth in np.random.default_rng(0).permutation(np.flatnonzero(half == 2))[:N_CHANGES]:
        here = np.flatnonzero((context == context[truth]) & (half == 1))
        same = here[changes.perturbation[here] == changes.perturbation[truth]]
        if not len(same):
            continue
        elsewhere = evidence.whole[context[evidence.whole] != context[truth]]
        kept = np.concatenate([elsewhere, here])
        query = ContextQuery.of_change(evidence, int(truth), int(changes.population[same[0]]))
        predicted = module.predict(describe(evidence, query, kept)).mean
        (measured,), (error,) = changes.shift[same], changes.error[same]
        ways = {
            "measurement": measured,
            "networks": predicted,
            "shrunk": shrunk(measured, error, predicted),
        }
        real, noise = changes.shift[truth], (changes.error[truth] ** 2).sum()
        rows.append(
            {way: (((x - real) ** 2).sum() - noise) / (real**2).sum() for way, x in ways.items()}
        )
    return rows


def main() -> None:
    """Run all sets."""
    folder = make_parser(__doc__, "folder").parse_args().folder
    tables = []
    for _, row in data_sets().iterrows():
        of_set = errors(read_set(folder, row), networks_without(row["name"]))
        tables.append(pd.DataFrame(of_set).assign(data_set=row["name"]))
    table = pd.concat(tables).set_index("data_set")
    table.to_csv(HERE / "measured.csv", float_format="%.4g")
    print(table.groupby(level=0, sort=False).mean().round(3).to_string())


if __name__ == "__main__":
    main()
