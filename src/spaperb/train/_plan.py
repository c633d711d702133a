"""Training plans: optimisers, what is logged, and what checkpoints hold."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from scvi.module.base import BaseModuleClass, LossOutput
from scvi.train import TrainingPlan

from spaperb._files import plain
from spaperb.data import DOSE_KEY, N_BATCHES, PairedDataSplitter
from spaperb.train._identity import _expression_digest, digest

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
                f"Unknown argument(s) in `plan_kwargs`: {', '.join(sorted(unknown))}. See "
                "spaperb.train.SpaPerbTrainingPlan and scvi.train.TrainingPlan for those known."
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
        """Create optimisers that update all parameters in one pass, which is a tenth faster."""
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
        """What training has in common with any that goes on from its checkpoints.

        Digests of the data, and the settings of the model.
        """
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
            If the checkpoint holds no state of this class's training, or that of other training or
            of more epochs. Nothing was taken from it then.
        """
        if "spaperb" not in checkpoint or "optimizer_states" not in checkpoint:
            raise ValueError(
                "The checkpoint holds no state of SpaPerb's training. Go on from a file that "
                "`checkpoint=` wrote."
            )
        self._resumed = checkpoint["spaperb"]
        found = self._resumed["identity"]
        if others := [name for name, own in self._identity.items() if found.get(name) != own]:
            raise ValueError(
                f"The checkpoint was saved by training with other {', '.join(others)}. Go on with "
                "a new model of the same AnnData and settings."
            )
        if (epoch := checkpoint["epoch"] + 1) > self.trainer.max_epochs:
            raise ValueError(
                f"The checkpoint is of epoch {epoch}, and `max_epochs` is "
                f"{self.trainer.max_epochs}."
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
                f"The checkpoint is of training that was planned with `max_epochs={epochs:g}`, "
                f"and it is {self.trainer.max_epochs} now. The learning rate rises and falls over "
                "all epochs: go on with the same number."
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
        """Clip the gradient's norm.

        Lightning does not where low precision meets a fused optimiser.
        """
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


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of PyTorch's generators by kind of device.

    The processor, and what training runs on.
    """
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
