import copy
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import lightning
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from helpers import (
    BATCH_SIZE,
    IN_CONTEXT,
    PUBLISHED,
    QUIET,
    SMALL,
    Trap,
    flip_byte_of_weight,
    small_cells,
    train_small,
    weights,
)
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from spaperb import SpaPerbModel
from spaperb.module import InContextModule, PublishedModule
from spaperb.train._callbacks import StopOnInterrupt
from spaperb.train._plan import InContextTrainingPlan, SpaPerbTrainingPlan

BOTH = pytest.mark.parametrize("objective", list(SMALL))
COMPONENTS = ["latent_loss", "reconstruction_loss", "kl_local"]


def test_defaults_are_the_published_ones():
    plan = SpaPerbTrainingPlan(PublishedModule(5, n_hidden=4))
    optimizer = plan.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    defaults = {k: optimizer.defaults[k] for k in ("lr", "weight_decay", "eps")}
    assert defaults == {"lr": 1e-3, "weight_decay": 1e-2, "eps": 1e-8}
    assert plan.kl_weight == 1


def test_optimiser_can_be_changed():
    plan = SpaPerbTrainingPlan(PublishedModule(5, n_hidden=4), optimizer="Adam", lr=0.1)
    optimizer = plan.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["lr"] == 0.1


class KeepRates(lightning.Callback):
    """Note the learning rate of each step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_learning_rate_rises_and_falls_in_context(adata):
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **IN_CONTEXT)
    keep = KeepRates()
    model.train(2, batch_size=1, plan_kwargs={"lr": 0.01}, callbacks=[keep], **QUIET)
    assert type(model.trainer.optimizers[0]) is torch.optim.AdamW
    rates = np.array(keep.rates)
    assert len(rates) == 20
    assert rates[0] == pytest.approx(0.01 / 25)
    assert rates.max() == pytest.approx(0.01, rel=1e-3)
    top = rates.argmax()
    assert top in (5, 6)
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(
    ("plan", "module"),
    [
        (SpaPerbTrainingPlan, lambda: PublishedModule(5, n_hidden=4)),
        (InContextTrainingPlan, lambda: InContextModule(n_hidden=4, n_networks=1)),
    ],
)
def test_unknown_arguments_are_refused(plan, module):
    with pytest.raises(TypeError, match=r"Unknown argument.*`plan_kwargs`: learning_rate"):
        plan(module(), learning_rate=0.1)


def test_components_are_logged(either):
    for name in COMPONENTS:
        for part in ("train", "validation"):
            assert len(either.history[f"{name}_{part}"]) == 3


def test_logged_components_add_up_to_the_loss(trained):
    h = {name: trained.history[f"{name}_validation"].iloc[-1].item() for name in COMPONENTS}
    expected = 100 * h["latent_loss"] + 100 * h["reconstruction_loss"] + 0.5 * h["kl_local"]
    assert trained.history["validation_loss"].iloc[-1].item() == pytest.approx(expected, rel=1e-4)


def test_kl_warm_up_can_be_asked_for():
    assert SpaPerbTrainingPlan(PublishedModule(5, n_hidden=4), n_epochs_kl_warmup=4).kl_weight == 0


def test_mixed_precision_is_the_same_but_for_rounding(adata):
    predicted = []
    for precision in (None, "bf16-mixed"):
        scvi.settings.seed = 0
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **IN_CONTEXT)
        model.train(5, batch_size=2, precision=precision, **QUIET)
        assert weights(model).isfinite().all()
        assert {p.dtype for p in model.module.parameters()} == {torch.float32}
        predicted.append(model.predict_stimulated(adata, inplace=False))
    assert not np.array_equal(*predicted)
    # Of each type's mean: which cell is the last to be silent may hang on the last digit.
    means = [pd.DataFrame(x).groupby(adata.obs["cell_type"].to_numpy()).mean() for x in predicted]
    np.testing.assert_allclose(means[0], means[1], atol=0.03)


TRAINING = """
import os
from helpers import *

SpaPerbModel.setup_anndata(adata := small_cells())
model = SpaPerbModel(adata, **IN_CONTEXT)
"""


def run(code: str, *prefix: str) -> str:
    """Run a script in a process of its own, and return all that it prints."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", TRAINING + code],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class TestOutput:
    """What a training prints and logs."""

    @pytest.fixture
    def model(self, adata) -> SpaPerbModel:
        SpaPerbModel.setup_anndata(adata)
        return SpaPerbModel(adata, **IN_CONTEXT)

    def test_nothing_without_a_progress_bar(self):
        """On a machine with many cores too, of which Lightning would use more for loading."""
        many_cores = "os.cpu_count = lambda: 8; os.sched_getaffinity = lambda _: range(8)\n"
        assert run(many_cores + "model.train(2, batch_size=2, enable_progress_bar=False)") == ""

    def test_the_progress_bar_alone(self):
        """The second training too."""
        printed = run("for _ in range(2): model.train(2, batch_size=2)")
        lines = [line for line in re.split(r"[\r\n]+", printed) if line.strip()]
        assert [line for line in lines if not re.match(r"Training:|Epoch \d/2:", line)] == []
        assert sum("2/2 [" in line and "100%" in line for line in lines) >= 2

    def test_why_it_stopped_early(self, model, capsys):
        model.train(9, early_stopping_patience=1, early_stopping_min_delta=1e9, **QUIET)
        assert re.match(
            "Monitored metric validation_loss did not improve", capsys.readouterr().out
        )

    def test_what_callbacks_say(self, model, caplog):
        say = LambdaCallback(on_fit_start=lambda *_: rank_zero_info("We start."))
        model.train(9, callbacks=[say, Timer({"seconds": 0})], **QUIET)
        first, second = (record.message for record in caplog.records)
        assert first == "We start."
        assert second.startswith("Time limit reached.")

    @pytest.mark.parametrize("name", ["", ".utilities.rank_zero"])
    def test_those_who_set_the_level_get_all(self, model, caplog, name):
        level = logging.DEBUG if name == "" else logging.INFO
        with caplog.at_level(level, f"lightning.pytorch{name}"):
            model.train(1, **QUIET)
        assert "GPU available" in caplog.text
        assert "`max_epochs=1` reached" in caplog.text

    @pytest.mark.parametrize("fails", [False, True])
    def test_other_trainings_are_told_of_as_before(self, model, caplog, fails):
        def fail(*_):
            raise OSError("no luck")

        filters = list(warnings.filters)
        if fails:
            with pytest.raises(OSError, match="no luck"):
                model.train(1, callbacks=[LambdaCallback(on_train_start=fail)], **QUIET)
        else:
            model.train(1, **QUIET)
        assert caplog.text == ""
        assert list(warnings.filters) == filters
        lightning.Trainer(logger=False, enable_checkpointing=False)
        assert "GPU available" in caplog.text

    @pytest.mark.parametrize(
        ("objective", "batch_size", "asked", "expected"),
        [
            ("in_context", 2, {}, 10),
            ("in_context", 2, {"log_every_n_steps": 3}, 3),
            ("published", 16, {}, 4),
            ("published", 2, {}, 10),
            ("published", 16, {"log_every_n_steps": 3}, 3),
            ("published", 2, {"log_every_n_steps": 20}, 20),
            ("published", 2, {"trainer_config": {"log_every_n_steps": 5}}, 5),
        ],
    )
    def test_steps_between_logs(self, adata, objective, batch_size, asked, expected):
        """As many as an epoch has minibatches, if that is less than scvi-tools' 10."""
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **SMALL[objective])
        model.train(1, batch_size=batch_size, **asked, **QUIET)
        assert model.trainer.log_every_n_steps == expected


@pytest.fixture
def ctrl_c():
    """Ctrl-C as it is in a session: tests may run in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupt(lightning.Callback):
    """Press Ctrl-C in the second epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 0:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
@BOTH
def test_ctrl_c_leaves_a_usable_model(adata, objective):
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **SMALL[objective])
    before = signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match=r"interrupted in epoch 2 of 50.*that of this moment"):
        model.train(50, batch_size=BATCH_SIZE[objective], callbacks=[Interrupt()], **QUIET)
    assert signal.getsignal(signal.SIGINT) is before
    assert model.is_trained
    assert not model.module.training
    assert len(model.history["train_loss"]) == 2
    assert np.isfinite(model.predict_stimulated(adata, inplace=False)).all()


class InterruptSetup(lightning.Callback):
    """Press Ctrl-C before there is anything to keep."""

    def setup(self, trainer, pl_module, stage):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_is_given_back_however_early_it_comes(adata):
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **IN_CONTEXT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        model.train(2, callbacks=[InterruptSetup()], **QUIET)
    assert signal.getsignal(signal.SIGINT) is before
    assert not model.is_trained


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("whose", ["ignored", "another library's"])
def test_ctrl_c_that_is_not_pythons_is_left_alone(adata, whose):
    pressed = []
    handler = signal.SIG_IGN if whose == "ignored" else lambda *_: pressed.append(whose)
    signal.signal(signal.SIGINT, handler)
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **IN_CONTEXT)
    model.train(3, batch_size=2, callbacks=[Interrupt()], **QUIET)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(model.history["train_loss"]) == 3
    assert pressed == ([] if whose == "ignored" else [whose])


def test_ctrl_c_that_python_does_not_know_is_left_alone(monkeypatch):
    """A handler that was installed by C has no name in Python."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopOnInterrupt() as stop:
        stop.on_fit_start(lightning.Trainer(logger=False, enable_checkpointing=False), None)
    assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN


def test_in_the_background_ctrl_c_is_ignored():
    """A shell starts jobs so, that Ctrl-C for another does not end them."""
    if shutil.which("sh") is None:
        pytest.skip("there is no shell here to start a job in the background")
    code = """
import signal
from lightning.pytorch.callbacks import LambdaCallback

press = LambdaCallback(on_train_batch_start=lambda *_: os.kill(os.getpid(), signal.SIGINT))
model.train(3, batch_size=2, callbacks=[press], **QUIET)
print(len(model.history["train_loss"]), signal.getsignal(signal.SIGINT).name)
"""
    assert run(code, "sh", "-c", '"$@" & wait $!', "sh") == "3 SIG_IGN\n"


def test_ctrl_c_is_left_alone_in_other_threads(adata):
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **IN_CONTEXT)
    thread = threading.Thread(
        target=model.train, args=[1], kwargs={"enable_progress_bar": False, "accelerator": "cpu"}
    )
    thread.start()
    thread.join()
    assert model.is_trained


def test_a_trained_model_goes_on_in_training_mode(adata):
    """With dropout, and batch normalisation that follows the data."""
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **PUBLISHED)
    norm = next(m for m in model.module.modules() if isinstance(m, torch.nn.BatchNorm1d))
    model.train(1, enable_progress_bar=False)
    before = norm.running_mean.clone()
    model.train(1, enable_progress_bar=False)
    assert not torch.equal(norm.running_mean, before)
    assert not model.module.training


class LetLoose(lightning.Callback):
    """Raise the learning rate beyond bounds in the third epoch; keep the weights from before."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.before = weights(trainer._model)
            trainer.optimizers[0].param_groups[0]["lr"] = 1e30


class TestNonFinite:
    @pytest.fixture(params=list(SMALL))
    def model(self, adata, request) -> SpaPerbModel:
        SpaPerbModel.setup_anndata(adata)
        return SpaPerbModel(adata, **SMALL[request.param])

    def test_training_ends_and_the_last_good_weights_stay(self, model):
        loose = LetLoose()
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(FloatingPointError, match=r"in epoch 3, at .*weights of epoch 2 again"):
            model.train(9, batch_size=BATCH_SIZE[model.objective], callbacks=[loose], **QUIET)
        assert signal.getsignal(signal.SIGINT) is before
        assert torch.equal(weights(model), loose.before)
        assert not model.module.training
        assert np.isfinite(model.predict_stimulated(inplace=False)).all()
        model.train(2, batch_size=BATCH_SIZE[model.objective], **QUIET)
        assert len(model.history["train_loss"]) == 4

    def test_likely_causes_are_named(self, model):
        with pytest.raises(FloatingPointError) as error:
            model.train(
                1, batch_size=BATCH_SIZE[model.objective], plan_kwargs={"lr": 1e30}, **QUIET
            )
        largest = f"largest value is {model.adata.X.max():g}"
        for cause in ("minibatch 2 of", "it is 1e+30", largest, "it is 32-true"):
            assert cause in str(error.value)

    def test_without_a_good_epoch_the_model_is_untrained(self, model):
        before = weights(model)
        with pytest.raises(FloatingPointError, match="weights of epoch 0 again"):
            model.train(
                1, batch_size=BATCH_SIZE[model.objective], plan_kwargs={"lr": 1e30}, **QUIET
            )
        assert torch.equal(weights(model), before)
        assert not model.is_trained

    def test_weights_are_looked_at_too(self, model):
        class Spoil(lightning.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if trainer.is_last_batch:
                    next(pl_module.parameters()).data[0] = np.inf

        with pytest.raises(FloatingPointError, match="at its last step"):
            model.train(1, batch_size=BATCH_SIZE[model.objective], callbacks=[Spoil()], **QUIET)


class Fail(lightning.Callback):
    """An error of somebody else's, at the end of an epoch."""

    def __init__(self, epoch=1):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("of somebody else's")


class TestOtherErrors:
    @pytest.fixture
    def model(self, adata) -> SpaPerbModel:
        model = train_small(adata, objective="in_context")
        assert model.state.predictor is not None
        return model

    def test_before_training_nothing_is_lost(self, model, tmp_path):
        before = weights(model), copy.deepcopy(model.state.to_plain())
        with pytest.raises(FileNotFoundError):
            model.train(2, ckpt_path=tmp_path / "none.ckpt", **QUIET)
        assert torch.equal(weights(model), before[0])
        np.testing.assert_equal(model.state.to_plain(), before[1])
        assert model.is_trained
        assert not model.module.training

    def test_while_training_what_was_learned_of_the_old_weights_goes(self, model):
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(RuntimeError, match="of somebody else's"):
            model.train(3, batch_size=2, callbacks=[Fail()], **QUIET)
        assert signal.getsignal(signal.SIGINT) is before
        assert not model.module.training
        assert model.state.predictor is None
        found = model.predict_stimulated(inplace=False)
        model._learn()
        np.testing.assert_array_equal(found, model.predict_stimulated(inplace=False))


@pytest.mark.parametrize(
    ("settings", "max_epochs"),
    [
        *[(IN_CONTEXT, 0), (IN_CONTEXT, -1), (PUBLISHED, 0), (PUBLISHED, -1), ({}, -1)],
        *[(IN_CONTEXT, 2.5), (PUBLISHED, 2.0), ({}, 0.0)],
    ],
)
def test_at_least_one_epoch(adata, settings, max_epochs):
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **settings)
    with pytest.raises(ValueError, match=rf"a whole number and at least 1 .*; it is {max_epochs}"):
        model.train(max_epochs, **QUIET)
    assert not model.is_trained


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, 100.0),
        ({"gradient_clip_val": 3.0}, 3.0),
        ({"gradient_clip_val": None}, None),
        ({"trainer_config": {"gradient_clip_val": 2.0}}, 2.0),
    ],
)
def test_gradients_are_clipped_in_context(adata, asked, expected):
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **IN_CONTEXT)
    model.train(1, batch_size=1, **asked, **QUIET)
    assert model.trainer.gradient_clip_val == expected


class KeepNorms(lightning.Callback):
    """Note the norm of each step's gradient."""

    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


@pytest.mark.parametrize("precision", [None, "bf16-mixed"])
def test_clipped_gradients_are_no_larger(adata, precision):
    norms = []
    for largest in (None, 0.5):
        scvi.settings.seed = 0
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata, **IN_CONTEXT)
        keep = KeepNorms()
        clip = {"gradient_clip_val": largest, "precision": precision}
        model.train(1, batch_size=1, callbacks=[keep], **clip, **QUIET)
        norms.append(keep.norms)
    free, clipped = norms
    assert min(free) > 0.5
    np.testing.assert_allclose(clipped, 0.5, rtol=1e-4)


@pytest.mark.parametrize("n_networks", [1, 5])
def test_any_number_of_networks(adata, n_networks):
    """Of three contexts, of which each network leaves some out."""
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **{**IN_CONTEXT, "n_networks": n_networks})
    model.train(1, batch_size=1, **QUIET)
    assert np.isfinite(model.history["validation_loss"].to_numpy(dtype=float)).all()
    assert np.isfinite(model.predict_stimulated(inplace=False)).all()


class TestPretrained:
    """Networks that start from pretrained weights."""

    @staticmethod
    def predict(model) -> np.ndarray:
        return model.predict_stimulated(inplace=False)

    def test_no_epoch_leaves_the_networks_as_they_are(self, adata):
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata)
        before = [p.clone() for p in model.module.parameters()]
        model.train(0, **QUIET)
        assert model.is_trained
        assert all(
            torch.equal(*pair) for pair in zip(before, model.module.parameters(), strict=True)
        )
        assert np.isfinite(self.predict(model)).all()

    def test_training_moves_the_networks_and_not_the_pretrained_ones(self, adata):
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata)
        before = {name: p.clone() for name, p in model.module.named_parameters()}
        model.train(1, batch_size=1, **QUIET)
        assert len(model.history["train_loss"]) == 1
        after = dict(model.module.named_parameters())
        same = {name for name in before if torch.equal(before[name], after[name])}
        pretrained = {name for name in before if name.startswith("pretrained.")}
        assert pretrained
        assert pretrained <= same
        moved = {name.split(".")[1] for name in before.keys() - same}
        assert moved == {str(i) for i in range(len(model.module.networks))}

    @pytest.mark.parametrize(
        ("n_cell_types", "told"),
        [(1, r"1 context\(s\), type_0"), (2, r"2 context\(s\), type_0, type_1")],
    )
    def test_too_few_contexts_to_train_on_are_told(self, n_cell_types, told):
        cells = small_cells(n_cell_types=n_cell_types)
        SpaPerbModel.setup_anndata(cells)
        model, untouched = SpaPerbModel(cells), SpaPerbModel(cells)
        with pytest.warns(UserWarning, match=rf"measured in {told}: too few"):
            model.train(**QUIET)
        untouched.train(0, **QUIET)
        assert model.is_trained
        assert torch.equal(weights(model), weights(untouched))
        np.testing.assert_array_equal(self.predict(model), self.predict(untouched))

    def test_from_scratch_one_context_is_too_few(self):
        cells = small_cells(n_cell_types=1)
        SpaPerbModel.setup_anndata(cells)
        model = SpaPerbModel(cells, **IN_CONTEXT)
        with pytest.raises(ValueError, match=r"at least 2, and there is 1\. Use the pretrained"):
            model.train(1, **QUIET)
        assert not model.is_trained


class KeepCheckpoint(lightning.Callback):
    """Copy the checkpoint of an epoch away."""

    def __init__(self, path, epoch):
        self.path, self.epoch = path, epoch
        self.copy = path.with_name("kept.ckpt")

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            shutil.copy(self.path, self.copy)


PLATEAU: dict[str, Any] = {
    "plan_kwargs": {
        "reduce_lr_on_plateau": True,
        "lr_patience": 0,
        "lr_threshold": 10.0,
        "lr_scheduler_metric": "validation_loss",
    }
}


class TestCheckpoint:
    def model(self, objective="in_context", **kwargs) -> SpaPerbModel:
        adata = small_cells()
        SpaPerbModel.setup_anndata(adata)
        return SpaPerbModel(adata, **{**SMALL[objective], **kwargs})

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "training.ckpt"

    @pytest.mark.parametrize("seed", [0, None])
    @pytest.mark.parametrize(
        ("objective", "train_kwargs"),
        [
            ("in_context", {}),
            ("published", {}),
            ("in_context", {"early_stopping": False}),
            ("published", {"early_stopping": False}),
            ("in_context", {"datasplitter_kwargs": {"num_workers": 2}}),
            ("published", {"datasplitter_kwargs": {"num_workers": 2}}),
            ("published", {"plan_kwargs": {"n_epochs_kl_warmup": 6}}),
            ("in_context", PLATEAU),
            ("published", PLATEAU),
        ],
        ids=[
            "in context",
            "published",
            "in context, no validation",
            "published, no validation",
            "in context, loaders",
            "published, loaders",
            "published, warm-up",
            "in context, plateau",
            "published, plateau",
        ],
    )
    def test_training_goes_on_as_if_never_interrupted(self, path, seed, objective, train_kwargs):
        batch_size = BATCH_SIZE[objective]
        arguments = {"max_epochs": 4, "batch_size": batch_size, **QUIET, **train_kwargs}
        scvi.settings.seed = seed
        keep = KeepCheckpoint(path, epoch=2)
        whole = self.model(objective)
        whole.train(checkpoint=path, callbacks=[keep], **arguments)

        torch.manual_seed(99)
        resumed = self.model(objective)
        assert not torch.equal(weights(resumed), weights(whole))
        resumed.train(ckpt_path=keep.copy, **arguments)
        assert torch.equal(weights(resumed), weights(whole))
        assert len(resumed.history["train_loss"]) == 2
        np.testing.assert_array_equal(resumed.train_indices, whole.train_indices)
        np.testing.assert_array_equal(
            resumed.predict_stimulated(inplace=False), whole.predict_stimulated(inplace=False)
        )

    def test_pretrained_networks_go_on_too(self, path):
        arguments = {"max_epochs": 2, "batch_size": 1, **QUIET}
        keep = KeepCheckpoint(path, epoch=1)
        whole, resumed = (SpaPerbModel(self.model().adata) for _ in range(2))
        whole.train(checkpoint=path, callbacks=[keep], **arguments)
        resumed.train(ckpt_path=keep.copy, **arguments)
        assert torch.equal(weights(resumed), weights(whole))
        np.testing.assert_array_equal(
            resumed.predict_stimulated(inplace=False), whole.predict_stimulated(inplace=False)
        )

    def test_saving_changes_nothing(self, path):
        models = []
        for checkpoint in (path, None):
            scvi.settings.seed = 0
            models.append(self.model())
            models[-1].train(3, batch_size=2, checkpoint=checkpoint, **QUIET)
        assert torch.equal(*map(weights, models))
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    @pytest.mark.parametrize(
        ("when", "step", "same"),
        [({"every_n_epochs": 1}, 10, True), ({"every_n_train_steps": 6}, 6, False)],
        ids=["at the end of an epoch", "in the middle of one"],
    )
    def test_lightnings_checkpoints(self, tmp_path, monkeypatch, when, step, same):
        # Where scvi-tools adds a checkpoint of its own.
        monkeypatch.setattr(scvi.settings, "logging_dir", str(tmp_path / "scvi"))
        saved = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **when)
        whole, resumed = self.model(), self.model()
        arguments = {"max_epochs": 2, "batch_size": 2, **QUIET}
        whole.train(callbacks=[saved], enable_checkpointing=True, **arguments)
        resumed.train(ckpt_path=tmp_path / f"step={step}.ckpt", **arguments)
        assert resumed.trainer.global_step == whole.trainer.global_step
        assert torch.equal(weights(resumed), weights(whole)) == same

    @BOTH
    def test_training_that_had_stopped_early_stays_stopped(self, path, objective):
        arguments = {"batch_size": BATCH_SIZE[objective], "early_stopping_patience": 1, **QUIET}
        arguments["early_stopping_min_delta"] = 1e6
        whole = self.model(objective)
        whole.train(9, checkpoint=path, **arguments)
        assert len(whole.history["train_loss"]) == 2
        resumed = self.model(objective)
        resumed.train(9, ckpt_path=path, **arguments)
        assert torch.equal(weights(resumed), weights(whole))
        assert resumed.is_trained

    def test_training_that_had_ended_has_nothing_left_to_do(self, path):
        """It may have been killed after its last checkpoint, before the model was saved."""
        whole, resumed = self.model(), self.model()
        whole.train(2, batch_size=2, checkpoint=path, **QUIET)
        resumed.train(2, batch_size=2, ckpt_path=path, **QUIET)
        assert torch.equal(weights(resumed), weights(whole))
        np.testing.assert_array_equal(
            resumed.predict_stimulated(inplace=False), whole.predict_stimulated(inplace=False)
        )
        assert not resumed.history
        resumed.train(2, batch_size=2, **QUIET)
        assert len(resumed.history["train_loss"]) == 2

    @pytest.mark.usefixtures("ctrl_c")
    def test_an_epoch_that_was_cut_short_is_not_saved(self, path):
        model = self.model()
        with pytest.warns(UserWarning, match="interrupted in epoch 2"):
            model.train(9, batch_size=2, checkpoint=path, callbacks=[Interrupt()], **QUIET)
        assert torch.load(path)["epoch"] == 0

    @pytest.mark.parametrize(
        ("change", "others"),
        [
            (lambda adata: adata[1:].copy(), "cells, expression"),
            (lambda adata: adata[::-1].copy(), "cells, expression"),
            (lambda adata: adata[:, ::-1].copy(), "genes, expression"),
            (lambda adata: ad.AnnData(0.9 * adata.X, adata.obs, adata.var), "expression"),
        ],
        ids=["fewer cells", "their order", "order of genes", "their expression"],
    )
    def test_other_data_are_refused(self, path, change, others):
        self.model().train(1, batch_size=2, checkpoint=path, **QUIET)
        model = train_small(change(small_cells()), objective="in_context")
        before = weights(model), copy.deepcopy(model.state.to_plain())
        n_epochs = len(model.history["train_loss"])
        with pytest.raises(ValueError, match=rf"training with other {others}\. Go on with"):
            model.train(4, ckpt_path=path, **QUIET)
        assert torch.equal(weights(model), before[0])
        np.testing.assert_equal(model.state.to_plain(), before[1])
        assert len(model.history["train_loss"]) == n_epochs
        assert model.is_trained
        assert not model.module.training

    @pytest.mark.parametrize(
        ("settings", "other"),
        [
            (PUBLISHED, "settings, networks"),
            ({**IN_CONTEXT, "noise_weight": 1.0}, "settings"),
            ({**IN_CONTEXT, "n_hidden": 8}, "networks"),
        ],
        ids=["objective", "weight", "size"],
    )
    def test_another_model_is_refused(self, path, settings, other):
        self.model().train(1, batch_size=2, checkpoint=path, **QUIET)
        model = SpaPerbModel(self.model().adata, **settings)
        before = weights(model)
        with pytest.raises(ValueError, match=rf"training with other {other}\. Go on with"):
            model.train(2, ckpt_path=path, **QUIET)
        assert torch.equal(weights(model), before)
        assert not model.is_trained

    def test_the_same_model_in_other_words(self, path):
        class Mine(SpaPerbModel):
            def __init__(self, adata, *args, **kwargs):
                super().__init__(adata, *args, **kwargs)

        self.model("published").train(1, batch_size=2, checkpoint=path, **QUIET)
        adata = small_cells()
        Mine.setup_anndata(adata)
        model = Mine(adata, kl_weight=np.float32(0.5), **PUBLISHED)
        model.train(2, batch_size=2, ckpt_path=path, **QUIET)
        assert len(model.history["train_loss"]) == 1

    def test_in_context_epochs_are_as_planned(self, path):
        self.model().train(2, batch_size=2, checkpoint=path, **QUIET)
        with pytest.raises(ValueError, match="planned with `max_epochs=2`, and it is 4 now"):
            self.model().train(4, batch_size=2, ckpt_path=path, **QUIET)

    def test_weights_alone_are_no_state_of_training(self, tmp_path, monkeypatch):
        monkeypatch.setattr(scvi.settings, "logging_dir", str(tmp_path / "scvi"))
        saved = ModelCheckpoint(tmp_path, "weights", save_weights_only=True)
        arguments = {"batch_size": 2, **QUIET}
        self.model().train(1, callbacks=[saved], enable_checkpointing=True, **arguments)
        with pytest.raises(ValueError, match="holds no state of SpaPerb's training"):
            self.model().train(2, ckpt_path=tmp_path / "weights.ckpt", **arguments)

    def test_a_flipped_byte_of_a_weight(self, path):
        model = self.model()
        model.train(1, batch_size=2, checkpoint=path, **QUIET)
        flip_byte_of_weight(path, model)
        with pytest.raises(ValueError, match=r"could not be read: .* is not what was written"):
            self.model().train(2, ckpt_path=path, **QUIET)

    def test_more_epochs_than_asked_for_are_refused(self, path):
        self.model().train(3, batch_size=2, checkpoint=path, **QUIET)
        model = self.model()
        with pytest.raises(ValueError, match="of epoch 3, and `max_epochs` is 2"):
            model.train(2, ckpt_path=path, **QUIET)
        assert not model.is_trained

    @BOTH
    def test_going_on_twice(self, path, objective):
        arguments = {"max_epochs": 4, "batch_size": BATCH_SIZE[objective], **QUIET}
        arguments["checkpoint"] = path
        whole = self.model(objective)
        whole.train(**arguments)
        path.unlink()
        scvi.settings.seed = 0
        for epoch in (1, 3):
            model = self.model(objective)
            with pytest.raises(RuntimeError, match="of somebody else's"):
                model.train(
                    ckpt_path=path if path.exists() else None,
                    callbacks=[Fail(epoch)],
                    **arguments,
                )
        resumed = self.model(objective)
        resumed.train(ckpt_path=path, **arguments)
        assert torch.equal(weights(resumed), weights(whole))

    def test_more_epochs_than_at_first(self, path):
        """The published networks end as if all epochs had been asked for at once."""
        arguments = {"batch_size": 16, "checkpoint": path, **QUIET}
        whole = self.model("published")
        whole.train(5, **arguments)
        scvi.settings.seed = 0
        self.model("published").train(1, **arguments)
        for max_epochs in (3, 5):
            resumed = self.model("published")
            resumed.train(max_epochs, ckpt_path=path, **arguments)
        assert torch.equal(weights(resumed), weights(whole))

    def test_numbers_of_numpy(self, path):
        arguments = {
            "batch_size": np.int64(2),
            "plan_kwargs": {"lr": np.float64(1e-3)},
            "early_stopping_patience": np.int64(3),
            **QUIET,
        }
        scvi.settings.seed = np.int64(1)
        self.model("published").train(1, checkpoint=path, **arguments)
        resumed = self.model("published")
        resumed.train(2, ckpt_path=path, **arguments)
        assert len(resumed.history["train_loss"]) == 1

    def test_nan_in_the_first_epoch_that_goes_on(self, path):
        arguments = {"max_epochs": 3, "batch_size": 2, **QUIET}
        keep = KeepCheckpoint(path, epoch=2)
        self.model().train(checkpoint=path, callbacks=[keep], **arguments)
        resumed = self.model()
        with pytest.raises(FloatingPointError, match=r"epoch 3, .*weights of epoch 2 again"):
            resumed.train(ckpt_path=keep.copy, callbacks=[LetLoose()], **arguments)
        assert resumed.is_trained

    def test_a_folder(self, tmp_path):
        with pytest.raises(IsADirectoryError, match="Give the path of a file"):
            self.model().train(1, checkpoint=tmp_path, **QUIET)

    def test_absent_file(self, path):
        with pytest.raises(FileNotFoundError, match=r"training\.ckpt"):
            self.model().train(1, ckpt_path=path, **QUIET)

    def test_a_trap_is_refused_and_does_not_go_off(self, path, tmp_path):
        self.model().train(1, batch_size=2, checkpoint=path, **QUIET)
        torch.save({**torch.load(path), "x": Trap(tmp_path / "mark")}, path)
        with pytest.raises(ValueError, match=r"training\.ckpt holds more than data.*mkdir"):
            self.model().train(2, ckpt_path=path, **QUIET)
        assert not (tmp_path / "mark").exists()

    def test_a_truncated_file(self, path):
        self.model().train(1, batch_size=2, checkpoint=path, **QUIET)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"training\.ckpt could not be read"):
            self.model().train(2, ckpt_path=path, **QUIET)


def test_in_context_networks_train_with_one_thread_and_leave_the_number_alone(adata):
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, **IN_CONTEXT)
    seen = []
    look = LambdaCallback(on_train_epoch_end=lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model.train(1, callbacks=[look], **QUIET)
        with pytest.raises(RuntimeError, match="of somebody else's"):
            model.train(3, callbacks=[Fail()], **QUIET)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]
