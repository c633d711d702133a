"""From cells of any AnnData to predicted expression: genes by name, chunks, noise of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scvi.utils import track

from spaperb._types import Expression
from spaperb.module import SpaPerbModule
from spaperb.perturbations import Target
from spaperb.populations import dense
from spaperb.validation import (
    NORMALISE_ADVICE,
    ExpressionKind,
    expression_kind,
    expression_matrix,
    listed,
    warn,
)

PROGRESS_FROM_CHUNKS = 20
"""Shorter predictions take under a few seconds and show no progress bar."""


Respond = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""From the positions of a chunk's cells within the rows to predict, their expression ``(n, G)`` and the
number of the draw to their stimulated expression ``(n, G)``."""


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
        return np.ascontiguousarray(dense(self.x[rows])[:, self.columns], dtype=np.float32)

    def raw(self, rows: np.ndarray) -> np.ndarray:
        """Dense raw counts of the model's genes, ``(len(rows), G)``."""
        return dense(self.counts[rows])[:, self.columns].astype(np.float64)


class Prediction(NamedTuple):
    """Predicted expression ``(n, G)`` and the latent vectors behind it ``(n, L)``."""

    px_stim: np.ndarray
    z_stim: np.ndarray
    z_delta: np.ndarray


def make_query(
    adata: AnnData,
    var_names: np.ndarray,
    layer: str | None,
    trained_on: ExpressionKind,
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
        What the training expression was like.
    batches
        For every cell the shares of the model's batches, ``(n, n_batch)``.

    Raises
    ------
    ValueError
        If genes of the model are missing, or the expression is unlike the model's.
    """
    x = expression_matrix(adata, layer)
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
    kind = expression_kind(x)
    if trained_on.nonnegative and not kind.nonnegative:
        raise ValueError(
            "The expression holds negative values, and the model was trained on data without. "
            "Was it scaled? Give the model expression normalised as in training."
        )
    if kind.counts and not trained_on.counts:
        warn(
            "The expression holds whole numbers only (raw counts?), and the model was trained on "
            f"normalised data. Normalise first: {NORMALISE_ADVICE}."
        )
    if sparse.issparse(x) and x.format == "csc":
        x = x.tocsr()
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


def predict_rows(
    module: SpaPerbModule,
    query: Query,
    rows: np.ndarray,
    batch_size: int,
    n_samples: int,
    give_mean: bool,
    seed: int,
    minimum: float | None,
    write: Callable[[np.ndarray, Prediction], None],
    target: Target,
    respond: Respond | None = None,
) -> None:
    """Predict cells chunk by chunk and hand each chunk to ``write``.

    The noise of a cell depends on ``seed`` and on the cell's row alone, not on the rows or the
    chunk that it is predicted with.

    Parameters
    ----------
    module
        Trained module.
    query
        Expression to read.
    rows
        Rows of ``query`` to predict.
    batch_size
        Cells a chunk.
    n_samples
        Draws of the noise to average over.
    give_mean
        Whether z is the posterior's mean, or a draw from the posterior.
    seed
        Seed of the noise.
    minimum
        Lower bound that predictions are clipped at, or ``None``.
    write
        Called with the positions within ``rows`` and their prediction.
    target
        The perturbation.
    respond
        Makes X_stim' instead of the module.
    """
    module.eval()
    e = module.embed(target)
    chunks = list(_chunks(len(rows), batch_size))
    for chunk in track(
        chunks, description="Predicting", disable=len(chunks) < PROGRESS_FROM_CHUNKS
    ):
        x = torch.from_numpy(query.rows(rows[chunk]))
        batch = None if query.batches is None else torch.from_numpy(query.batches[rows[chunk]])
        draws = []
        for sample in range(n_samples):
            rngs = [_cell_rng(seed, sample, row) for row in rows[chunk]]
            eps = None if give_mean else _draw(rngs, "standard_normal", module.n_latent)
            v_delta = None if module.v_delta is not None else _draw(rngs, "random", module.n_input)
            prediction = module.predict(x, v_delta, eps, e, batch)
            if respond is not None:
                px_stim = respond(chunk, x.numpy(), sample)
                prediction["px_stim"] = torch.from_numpy(px_stim).to(prediction["z_stim"].device)
            draws.append(prediction)
        mean = {
            key: torch.stack([d[key] for d in draws]).mean(0).cpu().numpy() for key in draws[0]
        }
        if minimum is not None:
            mean["px_stim"] = np.maximum(mean["px_stim"], minimum)
        write(chunk, Prediction(**mean))


def mean_change(
    module: SpaPerbModule, query: Query, rows: np.ndarray, target: Target, batch_size: int
) -> np.ndarray:
    """Mean change that a trained module predicts of control cells, rows of a query, ``(G,)``."""
    batches = None if query.batches is None else query.batches[rows]
    cells = Query(query.x[rows], query.columns, batches)
    predicted, before = np.zeros((2, len(query.columns)))

    def add(chunk: np.ndarray, prediction: Prediction) -> None:
        predicted[:] += prediction.px_stim.sum(axis=0, dtype=np.float64)
        before[:] += cells.rows(chunk).sum(axis=0, dtype=np.float64)

    predict_rows(
        module,
        cells,
        np.arange(len(rows)),
        batch_size=batch_size,
        n_samples=1,
        give_mean=True,
        seed=0,
        minimum=None,
        write=add,
        target=target,
    )
    return (predicted - before) / len(rows)


def _chunks(n: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, n, size):
        yield np.arange(start, min(start + size, n))


def _cell_rng(seed: int, sample: int, row: int) -> np.random.Generator:
    """Return a stream of random numbers of one cell's own (Philox, counted in 256 bits)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, sample, int(row)]))


def _draw(rngs: list[np.random.Generator], kind: str, n: int) -> torch.Tensor:
    """Random numbers of each cell, ``(n_cells, n)``."""
    return torch.from_numpy(np.stack([getattr(rng, kind)(n, dtype=np.float32) for rng in rngs]))
