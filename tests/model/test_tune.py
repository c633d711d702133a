"""Settings chosen on left-out contexts, by Ray."""

import warnings

import lightning
import numpy as np
import pytest
import scvi

from spaperb import SpaPerbModel, datasets
from spaperb.model.tune import SCORE, TunableSpaPerbModel


@pytest.fixture
def cells():
    adata = datasets.simulated(n_cell_types=3, n_cells=30, n_genes=50)
    scvi.settings.seed = 0
    TunableSpaPerbModel.setup_anndata(adata)
    return adata


class Seen(lightning.Callback):
    """What a callback that comes after sees at the end."""

    def on_train_end(self, trainer, pl_module):
        self.score = float(trainer.callback_metrics[SCORE])


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [({}, 0.4, 1.0), ({"objective": "published", "n_hidden": 16}, -0.5, 0.4)],
)
def test_the_score_is_that_of_hidden_contexts(cells, settings, low, high):
    seen = Seen()
    model = TunableSpaPerbModel(cells, **settings)
    model.train(1, callbacks=[seen], enable_progress_bar=False)
    assert low < seen.score < high
    assert model.is_trained


@pytest.mark.parametrize("settings", [{"latent_weight": 7.0}, {"objective": "published"}])
def test_files_keep_the_settings(cells, settings, tmp_path):
    model = TunableSpaPerbModel(cells, **settings)
    SpaPerbModel.train(model, 1, enable_progress_bar=False)
    model.save(tmp_path / "model")
    model.export(tmp_path / "file")
    expected = model.predict_stimulated(cells, inplace=False)
    for loaded in (
        TunableSpaPerbModel.load(tmp_path / "model", adata=False),
        TunableSpaPerbModel.load_exported(tmp_path / "file"),
    ):
        assert loaded.module.latent_weight == model.module.latent_weight
        np.testing.assert_array_equal(loaded.predict_stimulated(cells, inplace=False), expected)


def test_several_perturbations_are_refused(cells):
    names = cells.obs["condition"].astype(str).to_numpy(dtype=object)
    names[np.flatnonzero(names != "control")[::2]] = "other"
    cells.obs["condition"] = names
    TunableSpaPerbModel.setup_anndata(cells)
    with pytest.raises(ValueError, match=r"one perturbation, and the model has 2.*stimulated="):
        TunableSpaPerbModel(cells).train(1)


def test_ray_runs_two_trials(cells, tmp_path):
    pytest.importorskip("ray", reason="needs the extra `tune`")
    pytest.importorskip("scib_metrics", reason="needs the extra `tune`")
    from ray import tune
    from scvi.autotune import run_autotune

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        experiment = run_autotune(
            TunableSpaPerbModel,
            cells,
            metrics=SCORE,
            mode="max",
            search_space={
                "model_params": {"objective": tune.grid_search(["in_context", "published"])},
                "train_params": {"max_epochs": 1},
            },
            num_samples=1,
            scheduler="fifo",
            searcher="random",
            seed=0,
            resources={"cpu": 1},
            logging_dir=str(tmp_path),
        )
    table = experiment.result_grid.get_dataframe()
    assert len(table) == 2
    best = experiment.result_grid.get_best_result(SCORE, "max")
    assert best.config["model_params"]["objective"] == "in_context"
