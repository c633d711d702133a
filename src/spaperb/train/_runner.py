"""How training runs: what is printed, and its state after each epoch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from scvi.train import TrainRunner, merge_kwargs
from threadpoolctl import threadpool_limits

from spaperb._files import atomic_write, check_pickle, check_writable


class SpaPerbTrainRunner(TrainRunner):
    """Run training, and save its state after each epoch if asked to.

    Parameters
    ----------
    *args, **kwargs
        As for :class:`scvi.train.TrainRunner`. What ``ckpt_path`` names is looked through before
        Lightning unpickles it.
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
            # Not handed to scvi-tools' trainer, which takes no checkpoint callbacks without its
            # own.
            self.trainer.callbacks.append(SaveTraining(Path(checkpoint)))


class SaveTraining(Checkpoint):
    """Save the state of training after each epoch, by an atomic write.

    A checkpoint callback runs after early stopping.

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
        # Lightning's own writing moves a file from the folder of temporary files, which is no
        # single step between disks.
        writer = atomic_write(self.path, overwrite=True)
        with writer if trainer.is_global_zero else nullcontext(self.path) as path:
            trainer.save_checkpoint(path, weights_only=False)


@contextmanager
def quiet_training() -> Iterator[None]:
    """Leave the progress bar and what the user must know of what a training prints.

    Lightning also tells of the machine, of its other products and of how a training ended as
    planned. What its callbacks and the user's say stays, and so does all of it for those who set
    the level of its logger.
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, in PyTorch and NumPy.

    Networks of a few thousand weights, and products of small arrays, take longer with several.
    Strategies that start processes set a number of their own.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(n_threads)
