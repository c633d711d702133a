"""The split of cells into training, validation and test, and flat minibatches of pairs."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS, settings
from scvi.data import AnnDataManager
from scvi.dataloaders import DataSplitter
from torch.utils.data import DataLoader, Dataset, Sampler

from spaperb._messages import format_list, warn
from spaperb._types import NEITHER, STIMULATED, IntArray
from spaperb.data._pairs import Stratum, random_pairs, split_strata
from spaperb.data._registry import (
    _categories,
    condition_arms,
    perturbations_of,
    registered_codes,
    stratum_labels,
)

N_BATCHES = 10
"""Minibatches of episodes in an epoch."""
MIN_PAIRS = 2
"""Batch normalisation needs two rows."""


class PairedBatchSampler(Sampler[IntArray]):
    """Draw pairs and yield flat minibatches: n control positions, then their n partners.

    The pairs of an epoch are spread evenly over its minibatches, so that none is left with a
    single pair. Each pass draws new pairs, a function of ``seed`` and the epoch alone.

    Parameters
    ----------
    strata
        Cells that may become partners.
    batch_size
        Pairs a minibatch at most (one more where the alternative is a minibatch of one pair).
    seed
        Seed of the draws.
    fixed
        Yield the same pairs in the same order in each pass, for validation.
    """

    def __init__(self, strata: list[Stratum], batch_size: int, seed: int, fixed: bool = False):
        self.strata = strata
        self.fixed = fixed
        self.epoch = 0
        self.seed = seed
        self.n_pairs = sum(stratum.n_pairs for stratum in strata)
        self.n_batches = min(-(-self.n_pairs // batch_size), self.n_pairs // MIN_PAIRS)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass draws; Lightning calls this at each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[IntArray]:
        rng = np.random.default_rng([self.seed, 0 if self.fixed else self.epoch])
        # Where set_epoch is never called (a distributed sampler around this one) passes still
        # differ.
        self.epoch += 1
        pairs = random_pairs(self.strata, rng)
        if not self.fixed:
            pairs = rng.permutation(pairs)
        for batch in np.array_split(pairs, self.n_batches):
            yield batch.T.ravel()


class StratifiedSplitter(DataSplitter):
    """Split cells by condition, cell type and batch.

    Each combination of condition, cell type and batch gives its share to training, validation and
    test, so that no partner is missing in one of them by accident. A checkpoint of training holds
    the split and the seed, so that training that goes on from it goes on with them.

    Parameters
    ----------
    adata_manager
        Manager of an AnnData set up by :meth:`spaperb.SpaPerbModel.setup_anndata`.
    train_size
        Fraction of the cells for training, 0.9 by default.
    validation_size
        Fraction of the cells for validation, by default all that training leaves.
    shuffle_set_split
        Whether to split at random, seeded by ``scvi.settings.seed`` (without one by the operating
        system), or in the cells' order.
    batch_size
        Pairs, or episodes of each network, a minibatch.
    load_sparse_tensor
        Whether to load sparse rows as sparse tensors and make them dense on the device.
    external_indexing
        Training, validation and test positions to use instead of a split.
    distributed_sampler
        Ignored: Lightning distributes the sampler itself.
    **data_loader_kwargs
        Further arguments of :class:`torch.utils.data.DataLoader`, ``num_workers`` say.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int = 256,
        load_sparse_tensor: bool = False,
        external_indexing: list[IntArray] | None = None,
        distributed_sampler: bool = False,
        **data_loader_kwargs: Any,
    ):
        self.seed = secrets.randbits(63) if settings.seed is None else settings.seed
        self.arms = condition_arms(adata_manager)
        self.labels = stratum_labels(adata_manager)
        if external_indexing is None:
            external_indexing = stratified_split(
                (2 + self.arms.max()) * self.labels + self.arms,
                0.9 if train_size is None else train_size,
                validation_size,
                np.random.default_rng(self.seed) if shuffle_set_split else None,
                self.labels,
            )
        super().__init__(
            adata_manager,
            load_sparse_tensor=load_sparse_tensor,
            external_indexing=external_indexing,
            drop_last=True,  # silences a warning about small last minibatches
        )
        self.batch_size = batch_size
        self.data_loader_kwargs = {
            "num_workers": settings.dl_num_workers,
            "persistent_workers": settings.dl_persistent_workers,
            **data_loader_kwargs,
        }

    @property
    def n_batches(self) -> int:
        """Minibatches in an epoch of training."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the split and the seed, for a checkpoint."""
        parts = (self.train_idx, self.val_idx, self.test_idx)
        split = [torch.from_numpy(np.asarray(part, dtype=np.int64)) for part in parts]
        return {"split": split, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the split and the seed of a checkpoint."""
        self.train_idx, self.val_idx, self.test_idx = (
            part.numpy() for part in state_dict["split"]
        )
        self.seed = state_dict["seed"]

    @property
    def first_epoch(self) -> int:
        """Epoch that training begins with: Lightning tells samplers later than loaders ask."""
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_progress.current.processed

    def _load(self, dataset: Dataset, sampler: Sampler) -> DataLoader:
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            # A generator of the loader's own leaves the global random state to the networks.
            generator=torch.Generator(),
            **self.data_loader_kwargs,
        )

    def _perturbations(self, strata: list[Stratum]) -> set[int]:
        return {int(self.arms[stratum.stimulated[0]]) - STIMULATED for stratum in strata}

    def _check_perturbations(self, learned: set[int]) -> None:
        """Refuse a split that leaves a perturbation out of what is learned from."""
        names = perturbations_of(self.adata_manager.registry).names
        all_strata = split_strata(np.arange(len(self.arms)), self.arms, self.labels)
        if left_out := self._perturbations(all_strata) - learned:
            raise ValueError(
                "All pairs of these perturbations are left for validation or testing: "
                f"{format_list([names[p] for p in sorted(left_out)])}. The model would know their "
                "names and nothing else. Leave them out when setting up (`stimulated=` names the "
                "others) or give some of their cells to training."
            )

    def _warn_of_one_armed_types(self) -> None:
        types = _categories(self.adata_manager, REGISTRY_KEYS.LABELS_KEY)
        codes = registered_codes(self.adata_manager, REGISTRY_KEYS.LABELS_KEY)
        all_cells = np.arange(len(codes))
        paired = {codes[s.control[0]] for s in split_strata(all_cells, self.arms, self.labels)}
        unpaired = [types[c] for c in np.unique(codes[self.arms != NEITHER]) if c not in paired]
        if unpaired:
            warn(
                "These cell types have no control and stimulated cells to pair (within a batch, "
                f"where one is registered) and take no part in training: {format_list(unpaired)}."
            )


class PairedDataSplitter(StratifiedSplitter):
    """Load cells in pairs of a control and a stimulated cell.

    Parameters
    ----------
    adata_manager, batch_size, **kwargs
        As for :class:`StratifiedSplitter`.

    Raises
    ------
    ValueError
        If ``batch_size`` is below 2, the training cells give fewer than two pairs, or none of a
        perturbation that others have pairs of.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        *,
        batch_size: int = 256,
        **kwargs: Any,
    ):
        if batch_size < MIN_PAIRS:
            raise ValueError(
                f"`batch_size` counts pairs and must be at least {MIN_PAIRS}, because batch "
                f"normalisation needs two rows; it is {batch_size}."
            )
        super().__init__(adata_manager, batch_size=batch_size, **kwargs)

    @property
    def n_batches(self) -> int:
        """Minibatches in an epoch of training."""
        return len(self._sampler(self.external_indexing[0]))

    def setup(self, stage: str | None = None) -> None:
        """Take the split and check that it leaves pairs where pairs are needed."""
        super().setup(stage)
        strata = split_strata(np.asarray(self.train_idx), self.arms, self.labels)
        if (n_pairs := sum(stratum.n_pairs for stratum in strata)) < MIN_PAIRS:
            raise ValueError(
                f"The training cells give {n_pairs} pairs of a control and a stimulated cell of "
                "one cell type (and batch, where one is registered), and training needs at least "
                f"{MIN_PAIRS}. Add cells, raise `train_size`, or check the condition, cell type "
                "and batch columns."
            )
        self._check_perturbations(self._perturbations(strata))
        stops_early = self.trainer is not None and self.trainer.early_stopping_callback is not None
        if stops_early and self.val_dataloader() is None:
            raise ValueError(
                "Early stopping watches the validation pairs, and the validation cells give fewer "
                f"than {MIN_PAIRS} pairs. Pass `early_stopping=False`, lower `train_size`, or add "
                "cells."
            )
        self._warn_of_one_armed_types()

    def train_dataloader(self) -> DataLoader:
        """Return training pairs, drawn anew at each epoch."""
        sampler = self._sampler(self.train_idx)
        sampler.set_epoch(self.first_epoch)
        return self._loader(sampler)

    def val_dataloader(self) -> DataLoader | None:
        """Return validation pairs, the same at each epoch; ``None`` where there are none."""
        return self._fixed_loader(self.val_idx)

    def test_dataloader(self) -> DataLoader | None:
        """Return test pairs, the same each time; ``None`` where there are none."""
        return self._fixed_loader(self.test_idx)

    def _sampler(self, indices: IntArray, fixed: bool = False) -> PairedBatchSampler:
        indices = np.asarray(indices, dtype=np.int64)
        strata = split_strata(indices, self.arms, self.labels)
        return PairedBatchSampler(strata, self.batch_size, self.seed, fixed)

    def _fixed_loader(self, indices: IntArray) -> DataLoader | None:
        sampler = self._sampler(indices, fixed=True)
        return self._loader(sampler) if len(sampler) else None

    def _loader(self, sampler: PairedBatchSampler) -> DataLoader:
        cells = self.adata_manager.create_torch_dataset(load_sparse_tensor=self.load_sparse_tensor)
        return self._load(cells, sampler)


def stratified_split(
    labels: IntArray,
    train_size: float,
    validation_size: float | None,
    rng: np.random.Generator | None,
    strata: IntArray | None = None,
) -> list[IntArray]:
    """Split positions into training, validation and test within each label.

    Each label keeps at least one cell for training; the rest is rounded to the nearest number.
    Labels so small that all of their cells would be for training give one now and then, as often
    as is their share.

    Parameters
    ----------
    labels
        Label of every cell, ``(n_obs,)``.
    train_size
        Fraction for training, in (0, 1].
    validation_size
        Fraction for validation; ``None`` for ``1 - train_size``. What is left is for testing.
    rng
        Source of randomness; ``None`` splits in the cells' order.
    strata
        Stratum of every cell, ``(n_obs,)``: labels of one give cells together. ``None``: each
        label is one.

    Returns
    -------
    list of numpy.ndarray
        Sorted positions for training, validation and test.

    Raises
    ------
    ValueError
        If the fractions are out of range or add up to more than one.
    """
    if validation_size is None:
        validation_size = 1 - train_size
    if not 0 < train_size <= 1 or validation_size < 0 or train_size + validation_size > 1 + 1e-9:
        raise ValueError(
            "`train_size` must be in (0, 1], `validation_size` at least 0, and both together at "
            f"most 1; they are {train_size} and {validation_size}."
        )
    parts: tuple[list[IntArray], ...] = ([], [], [])
    owed: dict[int, float] = {}
    left = 0.0
    for label in np.unique(labels):
        cells = np.flatnonzero(labels == label)
        if rng is not None:
            cells = rng.permutation(cells)
        n_train = max(1, round(train_size * len(cells)))
        share = (1 - train_size) * len(cells)
        stratum = int(label if strata is None else strata[cells[0]])
        if n_train == len(cells) > 1 and share > 0:
            # All arms of a stratum give a cell, or none does, so that partners go together.
            if stratum not in owed:
                left, owed[stratum] = divmod(left + share, 1)[::-1]
            n_train -= owed[stratum] >= 1
        n_train_and_val = max(n_train, round((train_size + validation_size) * len(cells)))
        for part, chosen in zip(parts, np.split(cells, [n_train, n_train_and_val]), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) for part in parts]
