"""From cells of any AnnData to layers of predicted ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from anndata import AnnData
from scipy import sparse
from scvi import settings

from spaperb._types import Expression, FloatArray
from spaperb.cells import How
from spaperb.data import Query, Target, as_dask, check_counts, is_on_disk, select_rows
from spaperb.model._base import SpaPerbBase
from spaperb.model._networks import Predictor

if TYPE_CHECKING:
    import dask.array

DELTA_KEY = "X_spaperb_delta"
SMALLEST = 1e-6
"""V_delta is not drawn below it, where the normal quantile is infinite."""

PredictRows = Callable[[Query, np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]]
"""From a query and rows of it to these rows, some at a time, and their stimulated expression."""


class Asked(NamedTuple):
    """How cells are to be predicted: arguments of :meth:`PredictionMixin.predict_stimulated`."""

    target: Target
    n_samples: int
    give_mean: bool
    by_cell: bool
    seed: int
    how: How
    minimum: float
    chunk_size: int


class PredictionMixin(SpaPerbBase):
    """Predict stimulated cells."""

    def predict_stimulated(
        self,
        adata: AnnData | None = None,
        perturbation: Any | None = None,
        dose: float | None = None,
        *,
        indices: Any | None = None,
        batch_size: int | None = None,
        n_samples: int = 1,
        give_mean: bool = True,
        seed: int = 0,
        detection: bool = True,
        by_cell: bool = False,
        sample: bool = False,
        key_added: str | None = None,
        latent: bool = False,
        features: Any | None = None,
        inplace: bool = True,
    ) -> np.ndarray | dask.array.Array | None:
        """Predict what cells would look like after the stimulus, X_stim'.

        The in-context model predicts the mean change of each context (its cell type) and makes
        cells of it that have exactly that mean. The published model decodes D(Z + Z_delta).

        Every cell given is predicted, whatever its condition. For a control cell this is the
        stimulated cell it would have become. For a cell that is stimulated already it is that cell
        with the learned shift added once more, which no data speak for: leave such cells out with
        ``indices`` where it matters.

        The cells may be new: of cell types that were never seen, without condition or cell type
        column, with genes in another order. Genes are matched by name; cell types, batches and the
        control value by value or spelling. A cell type is its cells: their change is predicted
        from their own control cells, and what training measured under its name counts as far as
        these are alike.

        Parameters
        ----------
        adata
            Cells to predict, normalised as in training; ``None`` for the AnnData of the model.
        perturbation
            Name of the perturbation, needed if the model knows several. A combination of known
            perturbations, ``"A+B"``, need not be in the training data, and neither need one that
            the model has features of.
        dose
            Dose, needed if the model was set up with ``dose_key``. Doses that are not in the
            training data lie between those that are; outside of their range there is a warning.
        indices
            Positions or boolean mask of the cells to predict; ``None`` for all.
        batch_size
            Cells to predict at once; ``None`` for ``scvi.settings.batch_size``.
        n_samples
            Number of draws to average over: of V_delta (and of z, with ``give_mean=False``); in
            context of which cells change, and of V_delta with ``give_mean=False``.
        give_mean
            Whether to take the predicted mean of the change, rather than changes drawn by V_delta
            from its predicted distribution; in the published model, the posterior's mean for z.
        seed
            Seed of the draws. Those of V_delta are the same for all cells in context. In the
            published model a cell's draws depend on its row, and in context on its rank among the
            cells of its type, so that their mean is the predicted one.
        detection
            In context: whether the change of a gene's mean also changes how many cells
            express it, so that silent genes stay silent in most cells, or is added to every cell.
            Expression with negative values has no zeros to predict and always gets the latter.
        by_cell
            In context: whether cells of one type may respond differently. Control cells are taken
            in neighbourhoods of some 40, each with a change of its own, predicted from
            neighbourhoods of the training cells. The mean change of a type stays what it is
            without. The first such call measures the training cells again.
        sample
            Whether to draw raw counts rather than to predict log-normalised expression
            (:mod:`spaperb.cells`), from the control cells' own counts. Needs the in-context
            objective, a model set up with ``counts_layer``, and that layer in ``adata``. Normalise
            the layer by the control cells' size factors.
        key_added
            Name of the layer, which ends with ``"_counts"`` if they are sampled. By default
            ``"spaperb_stimulated"``; if the model knows several perturbations
            ``"spaperb_<perturbation>"``, and with doses ``"spaperb_<perturbation>_<dose>"``.
        latent
            Whether to keep the latent vectors too.
        features
            Features of a perturbation that was never measured, ``(d,)``, as those that the model
            was set up with (``perturbation_features``), unless these hold it.
        inplace
            Whether to write to ``adata``, or to return the predicted layer and write nothing.

        Returns
        -------
        None, numpy.ndarray or dask.array.Array
            ``None``, or if ``inplace=False`` an array ``(n_obs, n_vars)``, float32: predicted
            log-normalised expression, NaN for cells not selected and for genes that the model does
            not know. It is never negative if the training data held no negative value. Where
            expression is on disk (a dask array, a backed AnnData, or :func:`spaperb.read_mapped`),
            it is a dask array that predicts a block when it is asked for one, to be written with
            ``adata.write_zarr``.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If there is no AnnData, the perturbation is unknown and has no features, features do
            not fit the model, ``by_cell`` is asked of too few cells or of a model without data, a
            dose is missing, negative or not known to the model, counts cannot
            be sampled, genes of the model are missing, the layer that the model was set up with is
            missing, latent vectors are wanted of cells on disk, or expression is NaN, infinite, or
            negative where the training data were not.
        IndexError
            If ``indices`` do not fit ``adata``.

        Notes
        -----
        Sets the following fields:

        - ``adata.layers[key_added]``: predicted expression, float32
        - ``adata.uns["spaperb"][key_added]``: what made it (model, version, seed, ...)
        - ``adata.obsm["X_" + key_added]``: with ``latent=True``, predicted cells as by
          :meth:`get_latent_representation` (Z_stim'), ``(n_obs, n_latent)``
        - ``adata.obsm["X_spaperb_delta"]``: with ``latent=True``, how far they moved there
          (Z_delta), ``(n_obs, n_latent)``

        If ``adata`` is a view, AnnData turns the object that you hold into a copy with these
        fields; the object that it was a view of stays as it is.
        """
        target = self._target(perturbation, dose, features)
        adata, query = self._query(adata, with_contexts=self.objective == "in_context")
        chunk_size = check_sizes(n_samples, batch_size)
        if by_cell and self.objective == "published":
            raise ValueError(
                "The published objective knows no states of cells. Leave out `by_cell=True`, or "
                'use the default, `objective="in_context"`.'
            )
        if sample:
            if n_samples > 1:
                raise ValueError("Counts are drawn once: `sample=True` needs `n_samples=1`.")
            query = query._replace(counts=self._counts(adata, query))
        if is_on_disk(query.x) and latent:
            raise ValueError(
                "Latent vectors are computed at once, and expression is on disk. Leave out "
                "`latent=True`, or load the cells, `adata.to_memory()`."
            )
        if inplace and key_added is None:
            key_added = self._layer_name(target) + ("_counts" if sample else "")
        rows = select_rows(indices, adata.n_obs)
        is_nonnegative = self.state.scale.nonnegative
        how: How = "detection" if detection and is_nonnegative else "shift"
        asked = Asked(
            target=target,
            n_samples=n_samples,
            give_mean=give_mean,
            by_cell=by_cell,
            seed=seed,
            how="counts" if sample else how,
            minimum=0.0 if is_nonnegative else -np.inf,
            chunk_size=chunk_size,
        )
        networks = self._published(query, asked)
        predict = self._maker(query, rows, asked) if networks is None else networks.make
        in_all: Callable[..., Any] = predict_lazily if is_on_disk(query.x) else predict_now
        predicted = in_all(predict, query, rows)
        if not inplace:
            return predicted
        adata.layers[key_added] = predicted
        if latent:
            z_stim, z_delta = self._latent(query, rows, networks, predicted)
            adata.obsm[f"X_{key_added}"] = z_stim
            adata.obsm[DELTA_KEY] = z_delta
        made_by = self._made_by(asked)
        adata.uns["spaperb"] = {**adata.uns.get("spaperb", {}), key_added: made_by}
        return None

    def _published(self, query: Query, asked: Asked) -> Predictor | None:
        """What predicts by the published networks alone; ``None`` in context."""
        if self.objective == "in_context":
            return None
        # The networks of this moment, if they are to predict later.
        module = copy.deepcopy(self.module) if is_on_disk(query.x) else self.module
        return Predictor(
            module,
            asked.target,
            n_samples=asked.n_samples,
            give_mean=asked.give_mean,
            seed=asked.seed,
            minimum=asked.minimum,
            batch_size=asked.chunk_size,
        )

    def _maker(self, query: Query, rows: np.ndarray, asked: Asked) -> PredictRows:
        """What makes cells of the changes of their contexts."""
        v_delta: FloatArray | None = None
        if not asked.give_mean:
            rng = np.random.default_rng(asked.seed)
            v_delta = rng.uniform(SMALLEST, 1, (asked.n_samples, len(query.columns)))
        learned = self._learned_states() if asked.by_cell else self._learned()
        maker = learned.maker(
            learned.assign(query),
            rows,
            asked.target,
            v_delta,
            asked.by_cell,
            how=asked.how,
            seed=asked.seed,
            n_samples=asked.n_samples,
            minimum=asked.minimum,
        )
        return maker.make

    def _made_by(self, asked: Asked) -> dict[str, Any]:
        """What a layer was made by, for ``adata.uns``."""
        target = asked.target
        return {
            "model": type(self).__name__,
            "version": version("spaperb"),
            "objective": self.objective,
            "perturbation": target.name,
            **({} if target.dose is None else {"dose": target.dose}),
            **({} if target.features is None else {"features": target.features}),
            "detection": self.objective == "in_context" and asked.how == "detection",
            "by_cell": asked.by_cell,
            "sample": asked.how == "counts",
            "seed": asked.seed,
            "n_samples": asked.n_samples,
            "give_mean": asked.give_mean,
        }

    def _latent(
        self, query: Query, rows: np.ndarray, networks: Predictor | None, predicted: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Latent vectors of predicted cells and how far they moved; NaN for others."""
        if networks is not None:
            shape = (2, query.x.shape[0], self.module.n_latent)
            z_stim, z_delta = np.full(shape, np.nan, dtype=np.float32)
            for some, (_, *z) in networks.predict(query, rows):
                z_stim[some], z_delta[some] = z
            return z_stim, z_delta
        evidence = self._learned().evidence
        shape = (2, query.x.shape[0], len(evidence.components))
        z_stim, z_delta = np.full(shape, np.nan, dtype=np.float32)
        for start in range(0, len(rows), query.chunk_rows):
            some = rows[start : start + query.chunk_rows]
            z_stim[some] = evidence.project(predicted[np.ix_(some, query.columns)])
            z_delta[some] = z_stim[some] - evidence.project(query.rows(some))
        return z_stim, z_delta

    def _layer_name(self, target: Target) -> str:
        """Name of the layer of a perturbation."""
        # HDF5 takes a slash for a folder.
        name = target.name.replace("/", "_")
        others = {str(other) for other in self.perturbations} - {target.name}
        if name in {other.replace("/", "_") for other in others}:
            raise ValueError(
                f"{target.name} and another perturbation would share the layer spaperb_{name}, "
                "since a name of a layer cannot hold a slash. Name the layer, `key_added=`."
            )
        is_one_of_several = len(self.perturbations) > 1 or target.features is not None
        name = name if is_one_of_several else "stimulated"
        dose = "" if target.dose is None else f"_{target.dose:.12g}"
        return f"spaperb_{name}{dose}"

    def _counts(self, adata: AnnData, query: Query) -> Any:
        """Raw counts of the cells to predict."""
        layer = self._setup["counts_layer"]
        if layer is None or self.objective == "published":
            raise ValueError(
                "Counts are drawn by a model with the in-context objective that was set up with "
                "`counts_layer=`, the layer with raw counts."
            )
        counts = check_counts(adata, layer, query.x)
        return counts.tocsr() if sparse.issparse(counts) else counts


def check_sizes(n_samples: int, batch_size: int | None) -> int:
    """Check how many draws are averaged, and return the number of cells predicted at once."""
    if n_samples < 1:
        raise ValueError(f"`n_samples` must be at least 1; it is {n_samples}.")
    if (chunk_size := settings.batch_size if batch_size is None else batch_size) < 1:
        raise ValueError(f"`batch_size` must be at least 1; it is {chunk_size}.")
    return chunk_size


def predict_now(predict: PredictRows, query: Query, rows: np.ndarray) -> np.ndarray:
    """Predict cells at once, with a progress bar where that takes long.

    The arguments and what is returned are those of :func:`predict_lazily`, but for a NumPy array.
    """
    predicted = np.full(query.x.shape, np.nan, dtype=np.float32)
    for block in query.blocks("Predicting"):
        here = rows[rows // query.block_rows == block]
        for some, prediction in predict(query, here):
            predicted[np.ix_(some, query.columns)] = prediction
    return predicted


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
        Predicted expression of all genes of the query, ``(n_obs, n_vars)``, float32, NaN where not
        known.
    """
    from dask import array as da

    n_obs, n_vars = query.x.shape
    is_wanted = np.zeros(n_obs, dtype=bool)
    is_wanted[rows] = True
    x = as_dask(query.x)
    sources = [x] if query.counts is None else [x, as_dask(query.counts).rechunk(x.chunks)]
    # Expression would be sent along with each block.
    columns, known = query.columns, query._replace(x=None, counts=None)

    def block(places: np.ndarray, *sources: Expression) -> np.ndarray:
        predicted = np.full((len(places), n_vars), np.nan, dtype=np.float32)
        first = int(places[0, 0])
        counts = sources[1] if len(sources) > 1 else None
        here = known._replace(x=sources[0], counts=counts, first=first)
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
