"""Cells through the published networks: chunks, and noise of each cell's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from spaperb.data import Cells, Query, Target
from spaperb.module import PublishedModule

BLOCK = 128
"""Cells that pass the networks together on a processor. Matrix products round
differently with other numbers of rows, and on some processors by a row's place."""


class Prediction(NamedTuple):
    """Predicted expression ``(n, G)`` and the latent vectors behind it ``(n, L)``."""

    px_stim: np.ndarray
    z_stim: np.ndarray
    z_delta: np.ndarray


@dataclass
class Predictor:
    """Predicts chunks of cells by the networks alone, here or in another process.

    The noise of a cell depends on ``seed`` and on the cell's row alone, not on the rows or the
    chunk that it is predicted with.

    Attributes
    ----------
    module
        Trained module.
    target
        The perturbation.
    n_samples
        Draws of the noise to average over.
    give_mean
        Whether z is the posterior's mean, or a draw from the posterior.
    seed
        Seed of the noise.
    minimum
        Lower bound that predictions are clipped at.
    batch_size
        Cells that are predicted at once.
    """

    module: PublishedModule
    target: Target
    n_samples: int = 1
    give_mean: bool = True
    seed: int = 0
    minimum: float = -np.inf
    batch_size: int = BLOCK

    def __post_init__(self) -> None:
        self.module.eval()
        self.e = self.module.embed(self.target)

    def __call__(self, cells: Cells) -> Prediction:
        """Predict some cells."""
        draws = [self._draw(cells, sample) for sample in range(self.n_samples)]
        mean = Prediction(*(np.mean(values, axis=0) for values in zip(*draws, strict=True)))
        return mean._replace(px_stim=np.maximum(mean.px_stim, self.minimum))

    def predict(self, query: Query, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Prediction]]:
        """Predict some rows of a query chunk by chunk."""
        for chunk in _chunks(rows, self.batch_size):
            yield chunk, self(query.chunk(chunk))

    def make(self, query: Query, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Predict the expression of some rows, without the latent vectors."""
        for chunk, prediction in self.predict(query, rows):
            yield chunk, prediction.px_stim

    def _draw(self, cells: Cells, sample: int) -> Prediction:
        rngs = [_cell_rng(self.seed, sample, row) for row in cells.rows]
        module = self.module
        eps = None if self.give_mean else _noise(rngs, "standard_normal", module.n_latent)
        v_delta = None if module.v_delta is not None else _noise(rngs, "random", module.n_input)
        batch = None if cells.batches is None else torch.from_numpy(cells.batches)
        x = torch.from_numpy(cells.x)
        inputs = {"x": x, "v_delta": v_delta, "eps": eps, "batch": batch}
        return Prediction(**_decode(module, self.e, cells.rows, inputs))


def _decode(
    module: PublishedModule,
    e: torch.Tensor | None,
    rows: np.ndarray,
    inputs: dict[str, torch.Tensor | None],
) -> dict[str, np.ndarray]:
    """Pass cells through the networks."""
    return _in_blocks(functools.partial(module.predict, e=e), module.device, rows, inputs)


def encode(
    module: PublishedModule,
    query: Query,
    rows: np.ndarray,
    give_mean: bool,
    seed: int,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latent vectors of cells, z, and the mean and variance of their posterior, ``(n, L)`` each.

    Parameters
    ----------
    module
        Trained module.
    query
        The cells.
    rows
        Rows of ``query`` to encode.
    give_mean
        Whether z is the posterior's mean, or a draw from the posterior.
    seed
        Seed of the draws: those that a prediction with this seed begins with.
    batch_size
        Cells to encode at once.
    """
    module.eval()
    encoded: list[np.ndarray] = [np.empty((3, 0, module.n_latent), dtype=np.float32)]
    for some in _chunks(rows, batch_size):
        cells = query.chunk(some)
        batch = None if cells.batches is None else torch.from_numpy(cells.batches)
        inputs = {"x": torch.from_numpy(cells.x), "batch": batch}
        mean, variance = _in_blocks(module.encode, module.device, some, inputs).values()
        z = mean
        if not give_mean:
            rngs = [_cell_rng(seed, 0, row) for row in some]
            z = mean + np.sqrt(variance) * _noise(rngs, "standard_normal", z.shape[1]).numpy()
        encoded.append(np.stack([z, mean, variance]))
    z, mean, variance = np.concatenate(encoded, axis=1)
    return z, mean, variance


def _in_blocks(
    call: Callable[..., dict[str, torch.Tensor]],
    device: torch.device,
    rows: np.ndarray,
    inputs: dict[str, torch.Tensor | None],
) -> dict[str, np.ndarray]:
    """Call a network with cells.

    On a processor in blocks of one size, each cell at the place in its block that its row gives
    it, so that neither the size of a chunk nor the choice of the other cells shows in a last
    digit.
    """
    if device.type == "cpu":
        size, place = BLOCK, rows % BLOCK
        # Cells of one place go into one block after another.
        slots = place + BLOCK * pd.Series(place).groupby(place).cumcount().to_numpy()
    else:
        size, slots = len(rows), np.arange(len(rows))
    at, n_slots = torch.from_numpy(slots), -(-(slots.max() + 1) // size) * size
    given = {name: values for name, values in inputs.items() if values is not None}
    padded = [
        values.new_zeros(n_slots, values.shape[1]).index_copy(0, at, values).split(size)
        for values in given.values()
    ]
    blocks = [call(**dict(zip(given, block, strict=True))) for block in zip(*padded, strict=True)]
    return {key: torch.cat([b[key] for b in blocks]).cpu()[at].numpy() for key in blocks[0]}


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _cell_rng(seed: int, sample: int, row: int) -> np.random.Generator:
    """Return a stream of random numbers of one cell's own (Philox, counted in 256 bits)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, sample, int(row)]))


def _noise(rngs: list[np.random.Generator], kind: str, n: int) -> torch.Tensor:
    """Random numbers of each cell, ``(n_cells, n)``."""
    return torch.from_numpy(np.stack([getattr(rng, kind)(n, dtype=np.float32) for rng in rngs]))
