"""Evidence of the training cells, and minibatches of episodes to learn from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.utils import track
from torch.utils.data import DataLoader, Dataset, Sampler

from spaperb._messages import format_list, warn
from spaperb._types import NEITHER, IntArray
from spaperb.data._disk import in_memory, rows_of_block
from spaperb.data._features import FeatureTable
from spaperb.data._registry import (
    DOSE_KEY,
    condition_arms,
    perturbations_of,
    registered_codes,
)
from spaperb.data._scale import log_base
from spaperb.data._splitters import N_BATCHES, StratifiedSplitter
from spaperb.evidence import (
    Episode,
    Evidence,
    Plan,
    Settings,
    draw,
    draw_genes,
    make_episode,
    make_folds,
    states_of,
)
from spaperb.nn import Constants, tensors

N_GENES, MIN_GENES = 512, 128
"""Genes of an episode: more cost time and change nothing."""
N_PAIRS = 4096
"""Pairs of a gene and a piece of evidence in an episode: the more pieces, the fewer genes."""
N_FIRST = 64
"""Episodes that constants are taken from."""
MAX_HELD_OUT = 40
"""Held-out changes of each network that validation is of: some of the thousands of a screen."""
MIN_CHANGES = 2
"""Measured changes that networks can be trained on from scratch."""


def measure(
    manager: AnnDataManager,
    used: IntArray,
    labels: IntArray | None = None,
    names: list[Any] | None = None,
) -> Evidence:
    """Measure the changes of the cells that a model was set up with.

    Parameters
    ----------
    manager
        Manager of the model's AnnData.
    used
        Positions of the cells that may be looked at.
    labels, names
        For every cell the number of its context, and the contexts' names; ``None`` for the cell
        types. Others are measured as wholes only, to be predicted from and not learned from.
    """
    known = perturbations_of(manager.registry)
    codes = known.arms[registered_codes(manager, "condition")]
    arms = np.full(len(codes), NEITHER)
    arms[used] = codes[used]
    batches = doses = counts = None
    if REGISTRY_KEYS.BATCH_KEY in manager.data_registry:
        batches = registered_codes(manager, REGISTRY_KEYS.BATCH_KEY)
    if DOSE_KEY in manager.data_registry:
        doses = np.asarray(manager.get_from_registry(DOSE_KEY), dtype=np.float64).ravel()
    if (layer := manager.registry["setup_args"]["counts_layer"]) is not None:
        counts = _by_rows(manager.adata.layers[layer])
    evidence = Evidence.of(
        x=_by_rows(manager.get_from_registry(REGISTRY_KEYS.X_KEY)),
        arms=arms,
        labels=registered_codes(manager, REGISTRY_KEYS.LABELS_KEY) if labels is None else labels,
        names=names
        or list(manager.get_state_registry(REGISTRY_KEYS.LABELS_KEY).categorical_mapping),
        batches=batches,
        doses=doses,
        counts=counts,
        parts=known.parts,
        seed=0 if labels is None else None,
        unit=1 / math.log(log_base(manager.adata) or math.e),
        settings=Settings(),  # not the default: benchmarks change it here
    )
    table = manager.registry["setup_args"]["perturbation_features"]
    if table is None:
        return evidence
    return evidence.with_features(FeatureTable(**table).of(known.names))


def measure_states(manager: AnnDataManager, used: IntArray, evidence: Evidence) -> Evidence:
    """Measure the changes of the states of each context.

    Parameters
    ----------
    manager, used
        As for :func:`measure`.
    evidence
        What was measured of the contexts: its components tell states apart.
    """
    x = _by_rows(manager.get_from_registry(REGISTRY_KEYS.X_KEY))
    arms = np.full(x.shape[0], NEITHER)
    arms[used] = condition_arms(manager)[used]
    cells = np.zeros((x.shape[0], len(evidence.components)))
    n_rows = rows_of_block(x.shape[1])
    for start in track(range(0, len(used), n_rows), "Finding states", disable=len(used) < n_rows):
        some = np.sort(used)[start : start + n_rows]
        cells[some] = evidence.project(in_memory(x[some]))
    labels = registered_codes(manager, REGISTRY_KEYS.LABELS_KEY)
    doses = None
    if DOSE_KEY in manager.data_registry:
        doses = np.asarray(manager.get_from_registry(DOSE_KEY), dtype=np.float64).ravel()
    states, contexts = states_of(cells, arms, labels, doses, evidence.settings)
    used = used[states[used] >= 0]
    return measure(manager, used, states, list(range(len(contexts)))).compact()


def _by_rows(x: Any) -> Any:
    return x.tocsr() if sparse.issparse(x) else x


class EpisodeSplitter(StratifiedSplitter):
    """Measure training and validation cells, and load episodes of their changes.

    Measured changes are held out in as many folds as there are networks: each network learns from
    what is left of its fold, and the validation loss is that of the held-out changes.

    Parameters
    ----------
    adata_manager, **kwargs
        As for :class:`~spaperb.data.StratifiedSplitter`; ``batch_size`` counts the episodes
        of each network in a minibatch.
    n_networks
        Number of networks.
    pretrained
        Whether they are pretrained. Training stops before it begins where nothing can be held out.

    Raises
    ------
    ValueError
        If ``batch_size`` is below 1, or fewer than two changes were measured and the networks are
        not pretrained.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        *,
        n_networks: int = 3,
        pretrained: bool = False,
        **kwargs: Any,
    ):
        if kwargs.get("batch_size", 1) < 1:
            raise ValueError(
                "`batch_size` counts episodes and must be at least 1; it is "
                f"{kwargs['batch_size']}."
            )
        super().__init__(adata_manager, **kwargs)
        self.n_networks, self.pretrained = n_networks, pretrained

    @property
    def n_batches(self) -> int:
        """Minibatches in an epoch of training."""
        return N_BATCHES

    def setup(self, stage: str | None = None) -> None:
        """Take the split, measure, and hold changes out."""
        super().setup(stage)
        self._measure()
        self._warn_of_one_armed_types()
        n_changes = len(self.evidence.whole)
        if self.pretrained:
            if not self.folds and self.trainer is not None and self.trainer.max_epochs:
                self.trainer.fit_loop.max_epochs = 0
                names = [self.evidence.names[k] for k in np.unique(self.evidence.context)]
                warn(
                    f"Changes were measured in {len(names)} context(s), {format_list(names)}: too "
                    "few to train on. All predictions rest on what was measured there, and on the "
                    "pretrained networks as they are."
                )
        elif n_changes < MIN_CHANGES:
            raise ValueError(
                f"The networks learn from measured changes, at least {MIN_CHANGES}, and there is "
                f"{n_changes}. Use the pretrained ones, `pretrained=True`, or add contexts with "
                "control and stimulated cells."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the split and the seed of a checkpoint, and measure by them."""
        super().load_state_dict(state_dict)
        self._measure()

    def _measure(self) -> None:
        used = np.concatenate([self.train_idx, self.val_idx]).astype(np.int64)
        self.evidence = measure(self.adata_manager, used)
        self._check_perturbations(set(self.evidence.changes.perturbation.tolist()))
        self.folds = make_folds(self.evidence, self.n_networks)
        # Without folds all networks learn from everything, and nothing is held out.
        of_folds = [[fold.evidence] for fold in self.folds]
        sets = of_folds or [[self.evidence]] * self.n_networks
        self.episodes = Episodes(sets, self.batch_size, self._n_genes, self.seed)

    @property
    def _n_genes(self) -> int:
        """Genes of an episode."""
        n_pieces = min(len(self.evidence.whole), self.evidence.settings.max_pieces)
        return int(np.clip(N_PAIRS // max(n_pieces, 1), MIN_GENES, N_GENES))

    def constants(self) -> list[Constants]:
        """Mean and deviation of the inputs of some episodes, of each network."""

        def of_network(evidence: Evidence) -> Constants:
            rng = np.random.default_rng(0)
            drawn = [draw(evidence, rng, self._n_genes) for _ in range(N_FIRST)]
            return Constants.of([episode.description for episode in drawn])

        return [of_network(evidence) for ((evidence, _),) in self.episodes.evidence]

    def train_dataloader(self) -> DataLoader:
        """Return training episodes, drawn anew at each epoch."""
        sampler = EpisodeSampler(self.n_batches)
        sampler.set_epoch(self.first_epoch)
        return self._load(self.episodes, sampler)

    def val_dataloader(self) -> DataLoader:
        """Return episodes of held-out changes, or of the training ones if none could be."""
        if not self.folds:
            return self._load(self.episodes, EpisodeSampler(1, fixed=True))
        plans = [fold.held_out[:MAX_HELD_OUT] for fold in self.folds]
        held_out = HeldOutEpisodes(self.evidence, plans, self.batch_size, self._n_genes, self.seed)
        return self._load(held_out, EpisodeSampler(len(held_out.batches), fixed=True))

    def test_dataloader(self) -> None:
        """Test cells are not looked at."""


class EpisodeSampler(Sampler[tuple[int, int]]):
    """Tell the loader which minibatch of which epoch is due.

    Parameters
    ----------
    n_batches
        Minibatches in an epoch.
    fixed
        Whether each epoch has the same minibatches, for validation.
    """

    def __init__(self, n_batches: int, fixed: bool = False):
        self.n_batches, self.fixed, self.epoch = n_batches, fixed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; Lightning calls this at each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = 0 if self.fixed else self.epoch
        # Where set_epoch is never called (a distributed sampler around this one) passes differ
        # too.
        self.epoch += 1
        for step in range(self.n_batches):
            yield epoch, step


class Episodes(Dataset):
    """Draw episodes, a function of the seed, the epoch and the minibatch alone.

    Parameters
    ----------
    evidence
        For each network what it learns from: one data set, or several that are drawn as often.
    n_episodes
        Episodes of each network in a minibatch.
    n_genes
        Genes of an episode.
    seed
        Seed of the draws.
    """

    def __init__(
        self, evidence: Sequence[Sequence[Evidence]], n_episodes: int, n_genes: int, seed: int
    ):
        self.evidence = [[(e, e.mean_square) for e in sets] for sets in evidence]
        self.n_episodes, self.n_genes, self.seed = n_episodes, n_genes, seed

    def __getitem__(self, at: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Draw a minibatch of an epoch."""
        drawn = []
        for f, sets in enumerate(self.evidence):
            rng = np.random.default_rng([self.seed, *at, f])
            for _ in range(self.n_episodes):
                evidence, unit = sets[int(rng.integers(len(sets)))]
                drawn.append((draw(evidence, rng, self.n_genes), unit))
        return stacked(drawn, len(self.evidence))


class HeldOutEpisodes(Dataset):
    """Held-out episodes, the same at each pass.

    Parameters
    ----------
    evidence
        All evidence.
    plans
        For each network the plans of the changes that were held out of what it learns from.
    n_episodes, n_genes, seed
        As for :class:`Episodes`.
    """

    def __init__(
        self,
        evidence: Evidence,
        plans: Sequence[Sequence[Plan]],
        n_episodes: int,
        n_genes: int,
        seed: int,
    ):
        rng = np.random.default_rng(seed)
        n_batches = -(-max(map(len, plans)) // n_episodes)
        unit = evidence.mean_square
        self.batches = []
        for batch in range(n_batches):
            places = range(batch * n_episodes, (batch + 1) * n_episodes)
            episodes = [
                (make_episode(evidence, of[i % len(of)], draw_genes(evidence, rng, n_genes)), unit)
                for of in plans
                for i in places
            ]
            self.batches.append(stacked(episodes, len(plans)))

    def __getitem__(self, at: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return a minibatch."""
        return self.batches[at[1]]


def stacked(episodes: Sequence[tuple[Episode, float]], n_networks: int) -> dict[str, torch.Tensor]:
    """Stack episodes and their units, ``(n_networks, B, ...)``, and pad their evidence."""
    n_pieces = max(len(e.description.shifts) for e, _ in episodes)

    def padded(x: np.ndarray, value: float = 0.0) -> np.ndarray:
        width = [(0, n_pieces - len(x))] + [(0, 0)] * (x.ndim - 1)
        return np.pad(x, width, constant_values=value)

    columns = {
        "state": [e.description.state for e, _ in episodes],
        "pieces": [padded(e.description.pieces) for e, _ in episodes],
        "relations": [padded(e.description.relations) for e, _ in episodes],
        "log_prior": [padded(e.description.log_prior, -np.inf) for e, _ in episodes],
        "shifts": [padded(e.description.shifts) for e, _ in episodes],
        "scale": [e.description.scale for e, _ in episodes],
        "after": [e.after for e, _ in episodes],
        "target": [e.target for e, _ in episodes],
        "error": [e.error for e, _ in episodes],
        "weight": [np.array(e.weight) for e, _ in episodes],
        "unit": [np.array(unit) for _, unit in episodes],
    }
    whole = tensors(tuple(np.stack(column) for column in columns.values()))
    return {
        name: t.reshape(n_networks, -1, *t.shape[1:])
        for name, t in zip(columns, whole, strict=True)
    }
