"""Ends of training: at Ctrl-C, and at a loss that is not finite."""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Self

import lightning
import torch
from scvi import REGISTRY_KEYS

from spaperb._messages import warn


class StopOnNonFinite(lightning.Callback):
    """End training with an error when the loss or a weight is NaN or infinite.

    The model gets the weights of the last good epoch again. Looks once an epoch, so that a GPU
    need not wait at each minibatch.

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
            "The loss or the weights became NaN or infinite in epoch "
            f"{trainer.current_epoch + 1}, at {where}. The model has the weights of epoch "
            f"{trainer.current_epoch} again. Likely causes: a learning rate that is too high (it "
            f"is {rate:g}; `plan_kwargs={{'lr': ...}}`), expression that is not log-normalised "
            f"(its largest value is {x.max():g}), or low precision (it is {trainer.precision})."
        )

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Let the copy of the weights go: the model keeps its trainer, and that its callbacks."""
        self._weights.clear()
        self._losses.clear()

    def _keep(self, pl_module: lightning.LightningModule) -> None:
        self._weights = {name: w.clone() for name, w in pl_module.state_dict().items()}


class StopOnInterrupt(lightning.Callback, AbstractContextManager["StopOnInterrupt"]):
    """End training after the current minibatch at Ctrl-C, as if that had been its last.

    A second Ctrl-C ends all at once. Lightning alone would leave the interpreter, and the model
    untrained. Training runs within it as a context, which gives Ctrl-C back however training ends:
    after an error Lightning calls no ``teardown``, and puts back the handler that it found, which
    is this one.

    Only Python's own Ctrl-C is taken over. Where it is ignored (a shell starts background jobs so)
    or belongs to another library, it stays so.
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
                    f"Training is interrupted in epoch {trainer.current_epoch + 1} of "
                    f"{trainer.max_epochs}; the model is that of this moment. Press Ctrl-C again "
                    "to end all at once."
                )

            signal.signal(signal.SIGINT, stop)

    def __exit__(self, *error: object) -> None:
        """Give Ctrl-C back."""
        if self._is_pythons:
            signal.signal(signal.SIGINT, signal.default_int_handler)
