"""Settings chosen on left-out training contexts, with scvi-tools' autotune on Ray.

The loss of validation pairs says how well cells of known contexts are predicted; what counts is a
context whose response was never measured. So each training context's response is hidden in turn
from a model with the settings of the trial, as :func:`spaperb.evaluation.benchmark.benchmark`
does, and the score is a mean over contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from anndata import AnnData
from scvi import settings

from spaperb.data import expression_matrix
from spaperb.evaluation.benchmark import MIN_CELLS, SpaPerb, benchmark
from spaperb.model._model import SpaPerbModel

SCORE = "leave_one_context_out"
"""Name of the score, for the ``metrics`` of ``scvi.autotune.run_autotune``."""


class TunableSpaPerbModel(SpaPerbModel):
    """A model whose training first scores its own settings on left-out training contexts.

    The score is the ``pearson_delta`` of :mod:`spaperb.evaluation.metrics`, a mean over the cell
    types with ten cells or more in both conditions, and reported as ``"leave_one_context_out"``. A
    trial costs one training for each cell type and one more. Batches and doses take no part in the
    score.

    Examples
    --------
    >>> from ray import tune
    >>> from scvi.autotune import run_autotune
    >>> TunableSpaPerbModel.setup_anndata(adata)
    >>> experiment = run_autotune(
    ...     TunableSpaPerbModel,
    ...     adata,
    ...     metrics="leave_one_context_out",
    ...     mode="max",
    ...     search_space={"model_params": {"reconstruction_weight": tune.choice([10.0, 100.0])}},
    ...     num_samples=3,
    ... )
    """

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        objective: Literal["in_context", "published"] = "in_context",
        pretrained: bool | str | Path = True,
        **module_kwargs: Any,
    ):
        # With the arguments of the model, by which scvi-tools makes it again when it is loaded.
        super().__init__(adata, registry, objective, pretrained, **module_kwargs)
        self._settings = {"objective": objective, "pretrained": pretrained, **module_kwargs}

    def train(
        self,
        max_epochs: int | None = None,
        *,
        callbacks: Sequence[lightning.Callback] | None = None,
        logger: Any = None,
        **kwargs: Any,
    ) -> None:
        """Score the settings, then train with them.

        Parameters
        ----------
        max_epochs, callbacks, logger, **kwargs
            As for :meth:`spaperb.SpaPerbModel.train`.

        Raises
        ------
        ValueError
            If the model has several perturbations, or no cell type has enough cells.
        """
        if len(self.perturbations) > 1:
            raise ValueError(
                "Settings are scored with one perturbation, and the model has "
                f"{len(self.perturbations)}. Set up the AnnData with one of them, `stimulated=`."
            )
        score = self._score({"max_epochs": max_epochs, **kwargs})
        super().train(
            max_epochs, callbacks=[_Report(score), *(callbacks or [])], logger=logger, **kwargs
        )

    def _score(self, train_kwargs: dict[str, Any]) -> float:
        """Mean score over cell types."""
        setup, adata = self.registry["setup_args"], self.adata
        (stimulated,) = self.perturbations
        results = benchmark(
            AnnData(expression_matrix(adata, setup["layer"]), obs=adata.obs, var=adata.var[[]]),
            {"model": SpaPerb(train_kwargs, **self._settings)},
            held_out=setup["labels_key"],
            condition_key=setup["condition_key"],
            control=setup["control"],
            stimulated=stimulated,
            labels_key=setup["labels_key"],
            min_cells=MIN_CELLS,
            seeds=[settings.seed or 0],
            n_splits=1,
        )
        if (failed := results["error"].dropna()).any():
            raise RuntimeError(f"A left-out context could not be predicted: {failed.iloc[0]}")
        return float(results.loc[results["metric"] == "pearson_delta", "value"].mean())


class _Report(lightning.Callback):
    """Put a score where Ray looks for metrics."""

    def __init__(self, score: float):
        self.score = score

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Add it to what was logged."""
        trainer.callback_metrics[SCORE] = torch.tensor(self.score)
