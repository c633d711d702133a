import signal
import threading

import lightning
import numpy as np
import pytest
import torch

from spaperb import SpaPerbModel
from spaperb.module import SpaPerbModule
from spaperb.train import SpaPerbTrainingPlan

COMPONENTS = ["latent_loss", "reconstruction_loss", "kl_local"]


def test_defaults_are_the_published_ones():
    plan = SpaPerbTrainingPlan(SpaPerbModule(5, n_hidden=4))
    optimizer = plan.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    defaults = {k: optimizer.defaults[k] for k in ("lr", "weight_decay", "eps")}
    assert defaults == {"lr": 1e-3, "weight_decay": 1e-2, "eps": 1e-8}
    assert plan.kl_weight == 1


def test_optimiser_can_be_changed():
    plan = SpaPerbTrainingPlan(SpaPerbModule(5, n_hidden=4), optimizer="Adam", lr=0.1)
    optimizer = plan.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["lr"] == 0.1


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match=r"Unknown argument.*`plan_kwargs`: learning_rate"):
        SpaPerbTrainingPlan(SpaPerbModule(5, n_hidden=4), learning_rate=0.1)


def test_components_are_logged(trained):
    for name in COMPONENTS:
        for part in ("train", "validation"):
            assert len(trained.history[f"{name}_{part}"]) == 3


def test_logged_components_add_up_to_the_loss(trained):
    h = {name: trained.history[f"{name}_validation"].iloc[-1].item() for name in COMPONENTS}
    expected = 100 * h["latent_loss"] + 100 * h["reconstruction_loss"] + 0.5 * h["kl_local"]
    assert trained.history["validation_loss"].iloc[-1].item() == pytest.approx(expected, rel=1e-4)


def test_kl_warm_up_can_be_asked_for():
    assert SpaPerbTrainingPlan(SpaPerbModule(5, n_hidden=4), n_epochs_kl_warmup=4).kl_weight == 0


class Interrupt(lightning.Callback):
    """Press Ctrl-C in the second epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_leaves_a_usable_model(adata):
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, objective="residual")
    before = signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match=r"interrupted in epoch 2 of 50.*that of this moment"):
        model.train(50, callbacks=[Interrupt()], enable_progress_bar=False)
    assert signal.getsignal(signal.SIGINT) is before
    assert model.is_trained
    assert not model.module.training
    assert len(model.history["train_loss"]) == 2
    assert np.isfinite(model.predict_stimulated(adata, inplace=False)).all()


def test_ctrl_c_is_left_alone_in_other_threads(adata):
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata)
    thread = threading.Thread(
        target=model.train, args=[1], kwargs={"enable_progress_bar": False, "accelerator": "cpu"}
    )
    thread.start()
    thread.join()
    assert model.is_trained


def test_a_trained_model_goes_on_in_training_mode(adata):
    """With dropout, and batch normalisation that follows the data."""
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata)
    norm = next(m for m in model.module.modules() if isinstance(m, torch.nn.BatchNorm1d))
    model.train(1, enable_progress_bar=False)
    before = norm.running_mean.clone()
    model.train(1, enable_progress_bar=False)
    assert not torch.equal(norm.running_mean, before)
    assert not model.module.training
