"""From cells of any AnnData to predicted expression: genes by name, chunks, noise of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scvi.utils import track

from spaperb._types import Expression
from spaperb.data._scale import Scale, check_scale, log_base
from spaperb.disk import as_dask, in_memory
from spaperb.module import SpaPerbModule
from spaperb.perturbations import Target
from spaperb.populations import dense
from spaperb.validation import expression_matrix, listed, warn

if TYPE_CHECKING:
    import dask.array

PROGRESS_FROM_CHUNKS = 20
"""Shorter predictions take under a few seconds and show no progress bar."""
BLOCK = 128
"""Cells that pass the networks together on a processor, whose matrix products round otherwise with other numbers of rows, and some
processors' by the place of a row too."""


class Cells(NamedTuple):
    """Some cells to predict, in memory."""

    rows: np.ndarray
    """Their rows in the query, ``(n,)``."""
    x: np.ndarray
    """Expression of the model's genes, float32, ``(n, G)``."""
    batches: np.ndarray | None
    """Shares of the model's batches, ``(n, n_batch)``; ``None`` without batches."""
    counts: np.ndarray | None
    """Raw counts of the model's genes, ``(n, G)``, where they are needed."""


Respond = Callable[[Cells, int], np.ndarray]
"""From cells and the number of the draw to their stimulated expression, ``(n, G)``."""


class Query(NamedTuple):
    """Expression of cells to predict and where the model's genes are in it."""

    x: Expression
    columns: np.ndarray
    """For every gene of the model its column in ``x``, ``(G,)``."""
    batches: np.ndarray | None = None
    """For every cell the shares of the model's batches, ``(n, n_batch)``; ``None`` without batches."""
    counts: Expression = None
    """Raw counts of the same cells and columns as ``x``, where they are needed."""

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Dense float32 expression of the model's genes, ``(len(rows), G)``."""
        x = dense(in_memory(self.x[rows]))
        return np.ascontiguousarray(x[:, self.columns], dtype=np.float32)

    def raw(self, rows: np.ndarray) -> np.ndarray:
        """Dense raw counts of the model's genes, ``(len(rows), G)``."""
        return dense(in_memory(self.counts[rows]))[:, self.columns].astype(np.float64)

    def chunk(self, rows: np.ndarray) -> Cells:
        """Read some cells."""
        batches = None if self.batches is None else self.batches[rows]
        counts = None if self.counts is None else self.raw(rows)
        return Cells(rows, self.rows(rows), batches, counts)


class Prediction(NamedTuple):
    """Predicted expression ``(n, G)`` and, where wanted, the latent vectors behind it ``(n, L)``."""

    px_stim: np.ndarray
    z_stim: np.ndarray | None = None
    z_delta: np.ndarray | None = None


def make_query(
    adata: AnnData,
    var_names: np.ndarray,
    layer: str | None,
    trained_on: Scale,
    batches: np.ndarray | None = None,
) -> Query:
    """Find the model's genes in an AnnData and check that its expression fits the model's.

    Parameters
    ----------
    adata
        Cells to predict, with at least the model's genes, in any order.
    var_names
        Gene names of the model, ``(G,)``.
    layer
        Layer that the model was set up with; ``None`` for ``X``.
    trained_on
        Scale of the training expression.
    batches
        For every cell the shares of the model's batches, ``(n, n_batch)``.

    Raises
    ------
    ValueError
        If genes of the model are missing, or expression is NaN, infinite, or negative where that
        of the training cells was not. There is a warning if it is on another scale.
    """
    x = expression_matrix(adata, layer, lazy=True)
    columns = adata.var_names.get_indexer(var_names)
    if (columns < 0).any():
        missing = var_names[columns < 0]
        raise ValueError(
            f"{len(missing)} of the model's {len(var_names)} genes are missing in the AnnData: "
            f"{listed(missing)}. Add them (with zeros only if they were measured and not "
            "seen), or train a model on the genes that both have."
        )
    if n_extra := adata.n_vars - len(var_names):
        warn(
            f"{n_extra} of {adata.n_vars} genes are unknown to the model and ignored; their "
            "predictions are NaN."
        )
    if sparse.issparse(x) and x.format == "csc":
        x = x.tocsr()
    check_scale(Scale.of(x, log_base(adata) or trained_on.base, columns), trained_on)
    return Query(x, columns, batches)


def batch_shares(adata: AnnData, batch_key: str, known: Sequence[Any]) -> np.ndarray:
    """For every cell the shares of the model's batches: one-hot, or all alike for a batch that it does not know.

    So a cell of an unknown batch, or of none, is taken for one of the average training batch.

    Parameters
    ----------
    adata
        Cells to predict, with or without the batch column.
    batch_key
        Column of ``adata.obs`` with the batch.
    known
        The model's batches.
    """
    shares = np.full((adata.n_obs, len(known)), 1 / len(known), dtype=np.float32)
    if batch_key in adata.obs:
        codes = pd.Index(known).get_indexer(adata.obs[batch_key].to_numpy())
        shares[codes >= 0] = np.eye(len(known), dtype=np.float32)[codes[codes >= 0]]
    return shares


def select_rows(indices: object, n_obs: int) -> np.ndarray:
    """Turn positions or a boolean mask into positions.

    Raises
    ------
    IndexError
        If a position is out of range or a mask has the wrong length.
    """
    if indices is None:
        return np.arange(n_obs)
    selected = np.atleast_1d(np.asarray(indices))
    return np.arange(n_obs)[selected if selected.size else selected.astype(int)]


@dataclass
class Predictor:
    """Predicts chunks of cells, here or in another process.

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
    respond
        Makes X_stim' instead of the module.
    latent
        Whether latent vectors are wanted; without them and with ``respond`` the module has nothing to do.
    """

    module: SpaPerbModule
    target: Target
    n_samples: int = 1
    give_mean: bool = True
    seed: int = 0
    minimum: float = -np.inf
    respond: Respond | None = None
    latent: bool = False

    def __post_init__(self) -> None:
        self.module.eval()
        self.e = self.module.embed(self.target)

    def __call__(self, cells: Cells) -> Prediction:
        """Predict some cells."""
        draws: list[Any] = [self._draw(cells, sample) for sample in range(self.n_samples)]
        px_stim = np.mean([draw.px_stim for draw in draws], axis=0)
        px_stim = np.maximum(px_stim, self.minimum)
        if not self.latent:
            return Prediction(px_stim)
        return Prediction(px_stim, *(np.mean([d[i] for d in draws], axis=0) for i in (1, 2)))

    def _draw(self, cells: Cells, sample: int) -> Prediction:
        decoded: dict[str, np.ndarray] = {}
        if self.latent or self.respond is None:
            rngs = [_cell_rng(self.seed, sample, row) for row in cells.rows]
            module = self.module
            eps = None if self.give_mean else _noise(rngs, "standard_normal", module.n_latent)
            v_delta = (
                None if module.v_delta is not None else _noise(rngs, "random", module.n_input)
            )
            batch = None if cells.batches is None else torch.from_numpy(cells.batches)
            x = torch.from_numpy(cells.x)
            inputs = {"x": x, "v_delta": v_delta, "eps": eps, "batch": batch}
            decoded = _decode(module, self.e, cells.rows, inputs)
        if self.respond is not None:
            decoded["px_stim"] = self.respond(cells, sample)
        return Prediction(**decoded)


def _decode(
    module: SpaPerbModule,
    e: torch.Tensor | None,
    rows: np.ndarray,
    inputs: dict[str, torch.Tensor | None],
) -> dict[str, np.ndarray]:
    """Pass cells through the networks.

    On a processor in blocks of one size, each cell at the place in its block that its row gives it, so that
    neither the size of a chunk nor the choice of the other cells shows in a last digit.
    """
    if module.device.type == "cpu":
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
    blocks = [
        module.predict(e=e, **dict(zip(given, block, strict=True)))
        for block in zip(*padded, strict=True)
    ]
    return {key: torch.cat([b[key] for b in blocks]).cpu()[at].numpy() for key in blocks[0]}


def predict_rows(
    predictor: Predictor, query: Query, rows: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, Prediction]]:
    """Predict cells chunk by chunk, with a progress bar: the rows of each chunk and their prediction.

    Parameters
    ----------
    predictor
        What predicts.
    query
        The cells.
    rows
        Rows of ``query`` to predict.
    batch_size
        Cells a chunk.
    """
    chunks = list(_chunks(rows, batch_size))
    for chunk in track(
        chunks, description="Predicting", disable=len(chunks) < PROGRESS_FROM_CHUNKS
    ):
        yield chunk, predictor(query.chunk(chunk))


def predict_lazily(
    predictor: Predictor, query: Query, rows: np.ndarray, batch_size: int
) -> dask.array.Array:
    """Predict cells when they are asked for, block by block of a dask array.

    Parameters
    ----------
    predictor
        What predicts.
    query
        Cells on disk.
    rows
        Rows of ``query`` to predict; the others are NaN.
    batch_size
        Cells to predict at once in a block.

    Returns
    -------
    dask.array.Array
        Predicted expression of all genes of the query, ``(n_obs, n_vars)``, float32, NaN where not known.
    """
    from dask import array as da

    n_obs, n_vars = query.x.shape
    is_wanted = np.zeros(n_obs, dtype=bool)
    is_wanted[rows] = True
    x = as_dask(query.x)
    # The networks of this moment, whatever becomes of the model before the layer is computed.
    predictor = copy.deepcopy(predictor)
    sources = [x] if query.counts is None else [x, as_dask(query.counts).rechunk(x.chunks)]
    # Not the query itself, whose expression would be sent along with each block.
    columns, batches = query.columns, query.batches

    def block(places: np.ndarray, *sources: Expression) -> np.ndarray:
        predicted = np.full((len(places), n_vars), np.nan, dtype=np.float32)
        first = int(places[0, 0])
        here = Query(sources[0], columns, counts=sources[1] if len(sources) > 1 else None)
        wanted = np.flatnonzero(is_wanted[places[:, 0]])
        for chunk in _chunks(wanted, batch_size):
            cells, rows = here.chunk(chunk), first + chunk
            shares = None if batches is None else batches[rows]
            prediction = predictor(cells._replace(rows=rows, batches=shares))
            predicted[np.ix_(chunk, columns)] = prediction.px_stim
        return predicted

    places = da.arange(n_obs, chunks=(x.chunks[0],))[:, None]
    return da.map_blocks(
        block,
        places,
        *sources,
        dtype=np.float32,
        chunks=x.chunks,
        meta=np.empty((0, 0), np.float32),
    )


def mean_change(
    module: SpaPerbModule, query: Query, rows: np.ndarray, target: Target
) -> np.ndarray:
    """Mean change that a trained module predicts of control cells, rows of a query, ``(G,)``."""
    predictor = Predictor(module, target)
    predicted, before = np.zeros((2, len(query.columns)))
    for places in _chunks(np.arange(len(rows)), BLOCK):
        # Noise by place among the cells, so that the change does not depend on where in the query they are.
        cells = query.chunk(rows[places])._replace(rows=places)
        predicted += predictor(cells).px_stim.sum(axis=0, dtype=np.float64)
        before += cells.x.sum(axis=0, dtype=np.float64)
    return (predicted - before) / len(rows)


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _cell_rng(seed: int, sample: int, row: int) -> np.random.Generator:
    """Return a stream of random numbers of one cell's own (Philox, counted in 256 bits)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, sample, int(row)]))


def _noise(rngs: list[np.random.Generator], kind: str, n: int) -> torch.Tensor:
    """Random numbers of each cell, ``(n_cells, n)``."""
    return torch.from_numpy(np.stack([getattr(rng, kind)(n, dtype=np.float32) for rng in rngs]))
