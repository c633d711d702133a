"""A predicted change holds little of the sampling noise of the control cells.

Not none: a gene's change depends on its level, and the level is known with noise. Networks that
learned from changes measured with the query's own control cells took back a third of it here.
"""

import numpy as np
import pytest
import scvi
from helpers import QUIET

from spaperb import SpaPerbModel, datasets

N_TYPES, N_CELLS = 5, 120
pytestmark = pytest.mark.filterwarnings("ignore:The model knows none of")


def noise_taken_back(seed: int, **training) -> float:
    """Share of the noise of a hidden type's control cells that its predicted change takes off.

    Two halves of the control cells differ by noise alone. So the changes that are predicted from
    them should not differ with it.
    """
    cells = datasets.simulated(n_cell_types=N_TYPES, n_cells=N_CELLS, n_genes=400, seed=seed)
    is_hidden = (cells.obs["cell_type"] == "type_0").to_numpy()
    is_control = (cells.obs["condition"] == "control").to_numpy()
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(is_hidden & is_control))
    scvi.settings.seed = seed
    train = cells[~is_hidden].copy()
    SpaPerbModel.setup_anndata(train)
    model = SpaPerbModel(train)
    model.train(**training, **QUIET)
    changes, means = [], []
    for half in np.array_split(rows, 2):
        control = cells[np.sort(half)].copy()
        table = model.predict_response(control).set_index("gene").loc[cells.var_names]
        changes.append(table["mean_change"].to_numpy())
        means.append(control.X.mean(axis=0).A1)
    noise = means[0] - means[1]
    return -float((changes[0] - changes[1]) @ noise / (noise @ noise))


def test_the_pretrained_networks_take_little_noise_back():
    shares = [noise_taken_back(seed, max_epochs=0) for seed in range(8)]
    assert np.mean(shares) < 0.18


def test_trained_networks_take_little_noise_back():
    shares = [noise_taken_back(seed) for seed in range(2)]
    assert np.mean(shares) < 0.14
