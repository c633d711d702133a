"""From cells of any AnnData to predicted expression: genes by name, chunks, noise of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scvi.utils import track

from spaperb._types import Expression
from spaperb.data import Scale, match_labels
from spaperb.data._scale import check_scale, log_base
from spaperb.disk import as_dask, in_memory, rows_of_block
from spaperb.module import PublishedModule
from spaperb.perturbations import Target
from spaperb.populations import dense
from spaperb.validation import (
    check_named_once,
    expression_matrix,
    listed,
    missing_genes_hint,
    warn,
)

if TYPE_CHECKING:
    import dask.array

MANY_BLOCKS = 5
"""So many blocks take more than a few seconds, and show a progress bar."""
CHUNK_VALUES = 1_000_000
"""Values of cells that are made dense at a time."""
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


class Query(NamedTuple):
    """Expression of cells to predict and where the model's genes are in it."""

    x: Expression
    columns: np.ndarray
    """For every gene of the model its column in ``x``, ``(G,)``."""
    batches: np.ndarray | None = None
    """For every cell the shares of the model's batches, ``(n, n_batch)``; ``None`` without batches."""
    counts: Expression = None
    """Raw counts of the same cells and columns as ``x``, where they are needed."""
    first: int = 0
    """Row of the first cell of ``x`` and ``counts``, which may be a part of the cells only."""

    @property
    def block_rows(self) -> int:
        """Rows of a block, which cells on disk are read by."""
        return rows_of_block(self.x.shape[1])

    def blocks(self, description: str) -> Iterable[int]:
        """Numbers of the blocks, with a progress bar where going through them takes long."""
        n_blocks = -(-self.x.shape[0] // self.block_rows)
        return track(range(n_blocks), description=description, disable=n_blocks < MANY_BLOCKS)

    @property
    def chunk_rows(self) -> int:
        """Rows that are made dense at a time."""
        return max(1, CHUNK_VALUES // self.x.shape[1])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Dense float32 expression of the model's genes, ``(len(rows), G)``."""
        x = dense(in_memory(self.x[rows - self.first]))
        return np.ascontiguousarray(x[:, self.columns], dtype=np.float32)

    def raw(self, rows: np.ndarray) -> np.ndarray:
        """Dense raw counts of the model's genes, ``(len(rows), G)``."""
        counts = dense(in_memory(self.counts[rows - self.first]))
        return counts[:, self.columns].astype(np.float64)

    def chunk(self, rows: np.ndarray) -> Cells:
        """Read some cells."""
        batches = None if self.batches is None else self.batches[rows]
        counts = None if self.counts is None else self.raw(rows)
        return Cells(rows, self.rows(rows), batches, counts)


class Prediction(NamedTuple):
    """Predicted expression ``(n, G)`` and the latent vectors behind it ``(n, L)``."""

    px_stim: np.ndarray
    z_stim: np.ndarray
    z_delta: np.ndarray


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
            f"{listed(missing)}.{missing_genes_hint(adata, missing)} Add those that are not there "
            "(with zeros only if they were measured and not seen), or train a model on the genes "
            "that both have."
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
        check_named_once(adata, "batch_key", batch_key)
        batches = adata.obs[batch_key].astype(object)
        found = list(batches.dropna().unique())
        numbers = match_labels(found, known)
        if new := [batch for batch in found if batch not in numbers]:
            none = "none" if len(new) == len(found) else f"{len(numbers)}"
            warn(
                f"The model knows {none} of the {len(found)} batches in adata.obs[{batch_key!r}]. It takes cells of these for cells of an "
                f"average batch: {listed(new)}. Batches of training: {listed(known)}."
            )
        codes = batches.map(numbers).fillna(-1).to_numpy(dtype=np.int64)
        shares[codes >= 0] = np.eye(len(known), dtype=np.float32)[codes[codes >= 0]]
    return shares


def select_rows(indices: object, n_obs: int) -> np.ndarray:
    """Turn positions or a boolean mask into positions.

    Raises
    ------
    IndexError
        If a position is out of range or a mask has the wrong length.
    ValueError
        If they are neither positions nor a mask, have missing values, or could be both: 0 and 1
        only, as many as there are cells, which are more than two.
    """
    if indices is None:
        return np.arange(n_obs)
    # Not by NumPy's type, which a mask with missing values has none of.
    selected = pd.array(np.atleast_1d(np.asarray(indices)))
    if n_missing := int(selected.isna().sum()):
        raise ValueError(
            f"`indices` has no value for {n_missing} of {len(selected)} cells. Fill a mask in, "
            "`mask.fillna(False)`, and leave positions out that are missing."
        )
    is_mask = pd.api.types.is_bool_dtype(selected)
    if len(selected) and not (is_mask or pd.api.types.is_integer_dtype(selected)):
        raise ValueError(
            f"`indices` must be positions (whole numbers) or a boolean mask; it has {selected.dtype} "
            f"values: {listed(selected[:3])}. Names of cells become positions by "
            "`adata.obs_names.get_indexer(names)`, other numbers by `.astype(int)`."
        )
    rows = selected.to_numpy(dtype=bool if is_mask else int)
    if not is_mask and len(rows) == n_obs > 2 and set(rows) <= {0, 1}:
        raise ValueError(
            f"`indices` holds {n_obs} numbers, as many as there are cells, all of them 0 or 1: a "
            "mask, it seems, and as positions these would be the first two cells only. Pass a mask "
            "as `mask.astype(bool)`, positions each once."
        )
    return np.arange(n_obs)[rows]


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

    On a processor in blocks of one size, each cell at the place in its block that its row gives it, so that
    neither the size of a chunk nor the choice of the other cells shows in a last digit.
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


PredictRows = Callable[[Query, np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]]
"""From a query, or a block of it, and some rows to these, some at a time, and their stimulated expression, ``(n, G)``."""


def predict_lazily(predict: PredictRows, query: Query, rows: np.ndarray) -> dask.array.Array:
    """Predict cells when they are asked for, block by block of a dask array.

    Parameters
    ----------
    predict
        What predicts. It holds all that it needs, since the model may be another by then.
    query
        Cells on disk.
    rows
        Rows of ``query`` to predict; the others are NaN.

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
    sources = [x] if query.counts is None else [x, as_dask(query.counts).rechunk(x.chunks)]
    # Not the query itself, whose expression would be sent along with each block.
    columns, batches = query.columns, query.batches

    def block(places: np.ndarray, *sources: Expression) -> np.ndarray:
        predicted = np.full((len(places), n_vars), np.nan, dtype=np.float32)
        first = int(places[0, 0])
        counts = sources[1] if len(sources) > 1 else None
        here = Query(sources[0], columns, batches, counts, first)
        wanted = first + np.flatnonzero(is_wanted[places[:, 0]])
        for some, prediction in predict(here, wanted):
            predicted[np.ix_(some - first, columns)] = prediction
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


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _cell_rng(seed: int, sample: int, row: int) -> np.random.Generator:
    """Return a stream of random numbers of one cell's own (Philox, counted in 256 bits)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, sample, int(row)]))


def _noise(rngs: list[np.random.Generator], kind: str, n: int) -> torch.Tensor:
    """Random numbers of each cell, ``(n_cells, n)``."""
    return torch.from_numpy(np.stack([getattr(rng, kind)(n, dtype=np.float32) for rng in rngs]))
