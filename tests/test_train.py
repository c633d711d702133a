import pytest
import torch

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
