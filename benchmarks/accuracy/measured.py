"""How near to a measurement a change is predicted that was measured in the context itself.

    python benchmarks/accuracy/measured.py FOLDER

FOLDER holds the data sets of `pretraining/data_sets.csv`; weights never saw the set. The cells of
each context are shared out into thirds at random. One third is the measurement, the other two are
the truth (24 changes of a set at most). Writes `measured.csv` beside this file, a row a change:
the squared error, less the noise of the truth, over the squared change; of the measurement, of
what the networks make of it, and of the measurement shrunk towards that, which is what the model
predicts.
"""

import numpy as np
import pandas as pd
from common import HERE, data_sets, make_parser, networks_without, read_set, truth_of

from spaperb.evidence import ContextQuery, Evidence, describe, shrunk
from spaperb.module import InContextModule

N_CHANGES = 24


def errors(evidence: Evidence, module: InContextModule) -> list[dict[str, float]]:
    """Errors of some changes of a data set."""
    changes, populations = evidence.changes, evidence.populations
    third, context = populations.third[changes.population], evidence.context
    rows = []
    whole = evidence.whole[(evidence.thirds[evidence.whole] >= 0).all(axis=1)]
    for s in np.random.default_rng(0).permutation(whole)[:N_CHANGES].tolist():
        own, *truth = evidence.thirds[s].tolist()
        here = np.flatnonzero((context == context[s]) & (third == 1))
        elsewhere = evidence.whole[context[evidence.whole] != context[s]]
        kept = np.concatenate([elsewhere, here])
        query = ContextQuery.of_change(evidence, s, int(changes.population[own]))
        predicted = module.predict(describe(evidence, query, kept)).mean
        measured, error = changes.shift[own], changes.error[own]
        ways = {
            "measurement": measured,
            "networks": predicted,
            "shrunk": shrunk(measured, error, predicted, evidence.settings.max_errors),
        }
        real, noise = truth_of(evidence, truth)
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
