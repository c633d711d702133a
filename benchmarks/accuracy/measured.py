"""How near to a measurement a change is predicted that was measured in the context itself.

    python benchmarks/accuracy/measured.py FOLDER

FOLDER holds the data sets of `pretraining/data_sets.csv`; weights never saw the set. The cells of each
context are halved at random. One half is the measurement, the other half the truth (24 changes of a set at
most). Writes `measured.csv` beside this file, a row a change: the squared error, less the noise of the
truth, over the squared change; of the measurement, of what the networks make of it, and of the
measurement shrunk towards that, which is what the model predicts.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from weights import FOLDER, without

from spaperb.evidence import ContextQuery, Evidence, describe, shrunk
from spaperb.module import InContextModule
from spaperb.nn import read_weights

sys.path.insert(0, str(FOLDER.parent))
from pretrain import read_set

HERE = Path(__file__).parent
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    tables = []
    for _, row in pd.read_csv(FOLDER.parent / "data_sets.csv").iterrows():
        networks = read_weights(without(row["name"]))
        sizes = networks[0].n_latent, networks[0].n_hidden
        module = InContextModule(*sizes, len(networks)).start_from(networks)
        of_set = errors(read_set(folder, row), module)
        tables.append(pd.DataFrame(of_set).assign(data_set=row["name"]))
    table = pd.concat(tables).set_index("data_set")
    table.to_csv(HERE / "measured.csv", float_format="%.4g")
    print(table.groupby(level=0, sort=False).mean().round(3).to_string())


if __name__ == "__main__":
    main()
