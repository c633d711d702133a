"""How training runs: optimiser defaults, pairs into the module's loss, checkpoints, and an end at Ctrl-C or NaN."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal, Self

import lightning
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from lightning.pytorch.callbacks import Checkpoint
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.module.base import BaseModuleClass, LossOutput
from scvi.train import TrainingPlan, TrainRunner, merge_kwargs

from spaperb.dataloaders import N_BATCHES, PairedDataSplitter
from spaperb.files import check_writable, written_whole
from spaperb.module import CONDITION_KEY, DOSE_KEY
from spaperb.populations import dense
from spaperb.saving import check_pickle, plain
from spaperb.validation import warn

N_LOOKED_AT = 100
"""Cells whose expression tells whether it is still the same."""

TorchOptimizerCreator = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


class SpaPerbTrainingPlan(TrainingPlan):
    """Train on pairs with AdamW.

    Differs from :class:`scvi.train.TrainingPlan` in its defaults, all of them stated here, in that
    it trains on pairs, and in that it also logs ``latent_loss_train`` and
    ``latent_loss_validation`` beside ``reconstruction_loss_*`` and ``kl_local_*``. The logged
    components are unweighted means over features.

    Parameters
    ----------
    module
        The module to train.
    optimizer
        ``"AdamW"`` (the authors' choice), ``"Adam"``, or ``"Custom"`` with ``optimizer_creator``.
    lr
        Learning rate.
    weight_decay
        Weight decay of the optimiser; PyTorch's default for AdamW.
    eps
        Denominator constant of the optimiser; PyTorch's default.
    n_epochs_kl_warmup
        Epochs over which the KL term reaches its weight; the published objective has no warm-up.
    **kwargs
        Further arguments of :class:`scvi.train.TrainingPlan`.

    Raises
    ------
    TypeError
        If an argument is none of these.
    """

    minibatches_are: ClassVar[dict[str, bool]] = {"paired": True}

    def __init__(
        self,
        module: BaseModuleClass,
        *,
        optimizer: Literal["Adam", "AdamW", "Custom"] = "AdamW",
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
        n_epochs_kl_warmup: int | None = 0,
        **kwargs: Any,
    ):
        # scvi-tools hands unknown arguments to the loss, which fails much later and less clearly.
        if unknown := set(kwargs) - set(signature(TrainingPlan.__init__).parameters):
            raise TypeError(
                f"Unknown argument(s) in `plan_kwargs`: {', '.join(sorted(unknown))}. "
                "See spaperb.train.SpaPerbTrainingPlan and scvi.train.TrainingPlan for those known."
            )
        super().__init__(
            module,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            n_epochs_kl_warmup=n_epochs_kl_warmup,
            **self.minibatches_are,
            **kwargs,
        )
        self._resumed: dict[str, Any] | None = None

    def get_optimizer_creator(self) -> TorchOptimizerCreator:
        """Create optimisers that update all parameters in one pass, a tenth faster than one parameter at a time."""
        if self.optimizer_name not in ("Adam", "AdamW"):
            return super().get_optimizer_creator()
        optimizer = getattr(torch.optim, self.optimizer_name)
        settings = {"lr": self.lr, "eps": self.eps, "weight_decay": self.weight_decay}
        return functools.partial(optimizer, **settings, fused=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass a minibatch through the module."""
        return super().forward(*args, generative_kwargs=self.minibatches_are, **kwargs)

    def compute_and_log_metrics(
        self, loss_output: LossOutput, metrics: dict[str, Any], mode: str
    ) -> None:
        """Log the latent loss, then what scvi-tools logs.

        scvi-tools would log it too, but in inference mode, where several processes cannot
        average it.
        """
        self.log(
            f"latent_loss_{mode}",
            loss_output.extra_metrics["latent_loss"].detach(),
            on_step=self.on_step,
            on_epoch=self.on_epoch,
            batch_size=loss_output.n_obs_minibatch,
            sync_dist=self.use_sync_dist,
        )
        super().compute_and_log_metrics(
            dataclasses.replace(loss_output, extra_metrics={}), metrics, mode
        )

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What training has in common with any that goes on from its checkpoints: digests of the data, and the settings of the model."""
        splitter: PairedDataSplitter = self.trainer.datamodule
        manager = splitter.adata_manager
        cells: list[npt.ArrayLike] = [manager.adata.obs_names, splitter.arms, splitter.labels]
        if DOSE_KEY in manager.data_registry:
            cells.append(np.ravel(manager.get_from_registry(DOSE_KEY)).astype(float))
        weights = self.module.state_dict()
        return {
            "cells": digest(*cells),
            "genes": digest(manager.adata.var_names),
            "expression": _expression_digest(manager),
            "settings": self.module.settings,
            "networks": {name: list(weight.shape) for name, weight in weights.items()},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning's checkpoints lack for the same result as without an interruption."""
        at_epoch_end = self.trainer.is_last_batch
        monitored = self.trainer.callback_metrics.get(self.lr_scheduler_metric)
        checkpoint["spaperb"] = {
            "identity": self._identity,
            "random_states": _random_states(self.device),
            # A learning rate that falls on a plateau is set after the checkpoint of its epoch.
            "monitored": monitored if at_epoch_end and self.reduce_lr_on_plateau else None,
        }
        for name in checkpoint.keys() - {"state_dict"}:
            checkpoint[name] = plain(checkpoint[name])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep that until training starts.

        Raises
        ------
        ValueError
            If the checkpoint holds no state of this class's training, or that of other training or of more epochs. Nothing was
            taken from it then.
        """
        if "spaperb" not in checkpoint or "optimizer_states" not in checkpoint:
            raise ValueError(
                "The checkpoint holds no state of SpaPerb's training. Go on from a file that `checkpoint=` wrote."
            )
        self._resumed = checkpoint["spaperb"]
        found = self._resumed["identity"]
        if others := [name for name, own in self._identity.items() if found.get(name) != own]:
            raise ValueError(
                f"The checkpoint was saved by training with other {', '.join(others)}. Go on with a new model of the same AnnData "
                "and settings."
            )
        if (epoch := checkpoint["epoch"] + 1) > self.trainer.max_epochs:
            raise ValueError(
                f"The checkpoint is of epoch {epoch}, and `max_epochs` is {self.trainer.max_epochs}."
            )

    def on_train_start(self) -> None:
        """Go on where the checkpoint was made."""
        super().on_train_start()
        if self._resumed is None:
            return
        if self._resumed["monitored"] is not None and self.reduce_lr_on_plateau:
            self.lr_schedulers().step(self._resumed["monitored"])
        stopping = self.trainer.early_stopping_callback
        if stopping is not None and stopping.stopped_epoch > 0:
            self.trainer.should_stop = True
        _set_random_states(self._resumed["random_states"])
        self._resumed = None


class InContextTrainingPlan(SpaPerbTrainingPlan):
    """Train on episodes with AdamW, a learning rate that rises and falls, and inputs standardised.

    Parameters
    ----------
    module
        The module to train.
    lr
        Highest learning rate, after three tenths of training; it starts at a 25th of it and ends
        near 0.
    **kwargs
        Further arguments of :class:`SpaPerbTrainingPlan`.

    References
    ----------
    Smith and Topin (2019), Super-convergence, SPIE 11006.
    """

    minibatches_are: ClassVar[dict[str, bool]] = {}

    def __init__(self, module: BaseModuleClass, *, lr: float = 5e-3, **kwargs: Any):
        super().__init__(module, lr=lr, **kwargs)

    def on_train_start(self) -> None:
        """Standardise inputs as they are in some episodes of these data."""
        super().on_train_start()
        if (episodes := self.trainer.datamodule) is not None:
            self.module.standardise_by(episodes.constants())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep that until training starts.

        Raises
        ------
        ValueError
            As for :class:`SpaPerbTrainingPlan`, or if training was planned with other epochs: the
            learning rate rises and falls over all of them.
        """
        super().on_load_checkpoint(checkpoint)
        planned = [s["total_steps"] for s in checkpoint["lr_schedulers"] if "total_steps" in s]
        if planned and planned[0] != self._n_steps:
            epochs = self.trainer.max_epochs * planned[0] / self._n_steps
            raise ValueError(
                f"The checkpoint is of training that was planned with `max_epochs={epochs:g}`, and "
                f"it is {self.trainer.max_epochs} now. The learning rate rises and falls over all "
                "epochs: go on with the same number."
            )

    @property
    def _n_steps(self) -> int:
        """Steps of all epochs; Lightning's own number would load the data before their time."""
        trainer = self.trainer
        of_epoch = math.ceil(N_BATCHES / trainer.world_size / trainer.accumulate_grad_batches)
        return max(1, trainer.max_epochs * of_epoch)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm: Lightning does not where low precision meets a fused optimiser."""
        if gradient_clip_val is None or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
            return
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, gradient_clip_val)

    def configure_optimizers(self) -> dict[str, Any]:
        """Let the learning rate rise and fall once."""
        optimisers = super().configure_optimizers()
        if self.reduce_lr_on_plateau:
            return optimisers
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimisers["optimizer"], self.lr, self._n_steps
        )
        return {**optimisers, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data_digests(
    manager: AnnDataManager, codes: Callable[[AnnDataManager, str], npt.NDArray] | None = None
) -> dict[str, str]:
    """Digests of the data that a model is made from, by what they are called.

    Parameters
    ----------
    manager
        Manager of the model's AnnData.
    codes
        What gives the code of every cell in a registered column, in the registry's categories; by
        default the values that the column has now.
    """
    codes = codes or _current_codes
    digests = {"the expression": _expression_digest(manager)}
    for key in (CONDITION_KEY, REGISTRY_KEYS.LABELS_KEY, REGISTRY_KEYS.BATCH_KEY):
        if key in manager.data_registry:
            name = manager.get_state_registry(key).original_key
            digests[f"adata.obs[{name!r}]"] = digest(codes(manager, key))
    if DOSE_KEY in manager.data_registry:
        name = manager.data_registry[DOSE_KEY].attr_key
        digests[f"adata.obs[{name!r}]"] = digest(manager.adata.obs.get(name, []))
    return digests


def _current_codes(manager: AnnDataManager, key: str) -> npt.NDArray:
    state = manager.get_state_registry(key)
    column = manager.adata.obs.get(state.original_key, [])
    return pd.Index(state.categorical_mapping).get_indexer(np.asarray(column))


def _expression_digest(manager: AnnDataManager) -> str:
    some = dense(manager.get_from_registry(REGISTRY_KEYS.X_KEY)[:N_LOOKED_AT])
    return digest(some.ravel().astype(np.float32))


def digest(*columns: npt.ArrayLike) -> str:
    """Digest of columns, in their order."""
    hashes = [pd.util.hash_array(np.asarray(column)) for column in columns]
    return hashlib.sha256(np.concatenate(hashes).tobytes()).hexdigest()


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of PyTorch's generators by kind of device: the processor, and what training runs on."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    for kind, state in states.items():
        # A checkpoint may come from another kind of device.
        if kind != "cpu" and (device := getattr(torch, kind)).is_available():
            device.set_rng_state(state.cpu())


class SpaPerbTrainRunner(TrainRunner):
    """Run training, and save its state after each epoch if asked to.

    Parameters
    ----------
    *args, **kwargs
        As for :class:`scvi.train.TrainRunner`. What ``ckpt_path`` names is looked through before Lightning unpickles it.
    checkpoint
        File for the state of training; ``None`` for none.
    """

    def __init__(self, *args: Any, checkpoint: str | Path | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        asked = merge_kwargs(kwargs.get("trainer_config"), kwargs, name="trainer")
        if "log_every_n_steps" not in asked:
            # Lightning warns where an epoch has fewer minibatches.
            n_batches = self.data_splitter.n_batches // self.trainer.world_size
            n_steps = self.trainer.log_every_n_steps
            self.trainer.log_every_n_steps = min(n_steps, max(1, n_batches))
        if self.ckpt_path is not None:
            check_pickle(Path(self.ckpt_path))
        if checkpoint is not None:
            check_writable(Path(checkpoint))
            # Not handed to scvi-tools' trainer, which takes no checkpoint callbacks without its own.
            self.trainer.callbacks.append(SaveTraining(Path(checkpoint)))


class SaveTraining(Checkpoint):
    """Save the state of training after each epoch, whole or not at all; a checkpoint callback runs after early stopping.

    Parameters
    ----------
    path
        File, replaced each time.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save it, unless the epoch was cut short by Ctrl-C."""
        if not trainer.is_last_batch:
            return
        # Lightning's own writing moves a file from the folder of temporary files, which is no single step between disks.
        writer = written_whole(self.path, overwrite=True)
        with writer if trainer.is_global_zero else nullcontext(self.path) as path:
            trainer.save_checkpoint(path, weights_only=False)


class StopOnNonFinite(lightning.Callback):
    """End training with an error when the loss or a weight is NaN or infinite, and go back to the last good epoch's weights.

    Looks once an epoch, so that a GPU need not wait at each minibatch.

    Attributes
    ----------
    n_good
        Epochs that ended well.
    has_begun
        Whether weights may be others than before.
    """

    def __init__(self) -> None:
        self.n_good = 0
        self.has_begun = False
        self._losses: list[torch.Tensor] = []
        self._weights: dict[str, torch.Tensor] = {}

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Remember the first weights, of a checkpoint if training goes on from one."""
        self.has_begun = True
        self.n_good = trainer.current_epoch
        self._keep(pl_module)

    def on_load_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Take note that the weights are those of a checkpoint by now."""
        self.has_begun = True

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the loss, where it is."""
        self._losses.append(outputs["loss"].detach())

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Look at the losses and the weights.

        Raises
        ------
        FloatingPointError
            If one is not finite.
        """
        if not self._losses:
            return
        losses = torch.stack(self._losses)
        weights = [w for w in pl_module.state_dict().values() if w.is_floating_point()]
        is_finite = torch.stack([losses.isfinite().all(), *(w.isfinite().all() for w in weights)])
        if is_finite.all():
            self.n_good += 1
            self._losses.clear()
            self._keep(pl_module)
            return
        pl_module.load_state_dict(self._weights)
        bad = torch.nonzero(~losses.isfinite())
        where = f"minibatch {int(bad[0]) + 1} of {len(losses)}" if len(bad) else "its last step"
        x = trainer.datamodule.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)
        rate = pl_module.lr
        raise FloatingPointError(
            f"The loss or the weights became NaN or infinite in epoch {trainer.current_epoch + 1}, at {where}. The "
            f"model has the weights of epoch {trainer.current_epoch} again. Likely causes: a learning rate that is "
            f"too high (it is {rate:g}; `plan_kwargs={{'lr': ...}}`), expression that is not log-normalised (its "
            f"largest value is {x.max():g}), or low precision (it is {trainer.precision})."
        )

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Let the copy of the weights go: the model keeps its trainer, and that its callbacks."""
        self._weights.clear()
        self._losses.clear()

    def _keep(self, pl_module: lightning.LightningModule) -> None:
        self._weights = {name: w.clone() for name, w in pl_module.state_dict().items()}


@contextmanager
def quiet_training() -> Iterator[None]:
    """Leave the progress bar and what the user must know of what a training prints.

    Lightning also tells of the machine, of its other products and of how a training ended as planned.
    What its callbacks and the user's say stays, and so does all of it for those who set the level of
    its logger.
    """
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    is_left_alone = logger.level != logging.NOTSET or logger.isEnabledFor(logging.DEBUG)

    def is_of_interest(record: logging.LogRecord) -> bool:
        path = Path(record.pathname)
        is_lightnings = path.is_relative_to(Path(lightning.__file__).parent)
        is_callbacks = path.parent.name == "callbacks"
        return is_left_alone or record.levelno > logging.INFO or is_callbacks or not is_lightnings

    logger.addFilter(is_of_interest)
    try:
        with warnings.catch_warnings():
            # Lightning makes a `LeafSpec` of each loader it is given, which PyTorch deprecates.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            # As scvi-tools means to; it looks for the words of an earlier Lightning.
            warnings.filterwarnings("ignore", r".*does not have many workers", UserWarning)
            yield
    finally:
        logger.removeFilter(is_of_interest)


class StopOnInterrupt(lightning.Callback, AbstractContextManager["StopOnInterrupt"]):
    """End training after the current minibatch at Ctrl-C, as if that had been its last; a second Ctrl-C ends all at once.

    Lightning alone would leave the interpreter, and the model untrained. Training runs within it as a context, which gives Ctrl-C back
    however training ends: after an error Lightning calls no ``teardown``, and puts back the handler that it found, which is this one.

    Only Python's own Ctrl-C is taken over. Where it is ignored (a shell starts background jobs so) or
    belongs to another library, it stays so.
    """

    def __init__(self) -> None:
        self._is_pythons = False

    def __enter__(self) -> Self:
        """Look whether Ctrl-C is Python's own, in the main thread; there is none in others."""
        is_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGINT)
        self._is_pythons = is_main and handler is signal.default_int_handler
        return self

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Take over Ctrl-C of the only process."""
        if self._is_pythons and trainer.world_size == 1:

            def stop(number: int, frame: FrameType | None) -> None:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                trainer.should_stop = True
                warn(
                    f"Training is interrupted in epoch {trainer.current_epoch + 1} of {trainer.max_epochs}; the model "
                    "is that of this moment. Press Ctrl-C again to end all at once."
                )

            signal.signal(signal.SIGINT, stop)

    def __exit__(self, *error: object) -> None:
        """Give Ctrl-C back."""
        if self._is_pythons:
            signal.signal(signal.SIGINT, signal.default_int_handler)
