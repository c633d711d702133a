"""From cells of any AnnData to layers of predicted ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from spaperb._types import Expression
from spaperb.data import Query, as_dask

if TYPE_CHECKING:
    import dask.array


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
