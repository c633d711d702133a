"""What all parts of the model share: what it was set up with, and what training learned."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.model.base import BaseModelClass

from spaperb._messages import shown
from spaperb.data import (
    FeatureTable,
    Query,
    Target,
    check_anndata,
    check_genes,
    make_query,
    perturbations_of,
)
from spaperb.model._contexts import ContextPredictor
from spaperb.model._state import State


class SpaPerbBase(BaseModelClass):
    """A model's objective, module and state, and what it is asked for."""

    objective: str
    module: Any
    state: State

    @property
    def perturbations(self) -> list[Any]:
        """Names of the perturbations that the model is trained on."""
        return perturbations_of(self.registry).names

    def get_var_names(self, legacy_mudata_format: bool = False) -> np.ndarray:
        """Names of the genes that the model was set up with, in the networks' order.

        Those of its AnnData may have been changed since.

        Parameters
        ----------
        legacy_mudata_format
            Ignored; scvi-tools passes it.
        """
        names = self.get_state_registry(REGISTRY_KEYS.X_KEY).column_names
        return np.asarray(names).astype(str).astype(object)

    @property
    def _setup(self) -> dict[str, Any]:
        """Arguments that the data were set up with."""
        return self.registry["setup_args"]

    def _learned(self) -> ContextPredictor:
        """What training learned of the contexts."""
        raise NotImplementedError

    def _learned_states(self) -> ContextPredictor:
        """The same, with what was measured of the states of contexts."""
        raise NotImplementedError

    def _target(
        self, perturbation: Any | None, dose: float | None, features: Any | None = None
    ) -> Target:
        """Find what the user asks for among what the model knows, or has features of."""
        self._check_if_trained(warn=False)
        known = perturbations_of(self.registry)
        table = self._setup["perturbation_features"]
        is_measured = perturbation is None or known.knows(perturbation)
        if features is not None:
            self._check_features(perturbation, is_measured)
        if table is not None and not is_measured and self.objective == "in_context":
            table = FeatureTable(**table)
            features = table.find(perturbation, features, known.names, known.control)
        return known.target(
            perturbation, dose, self._setup["dose_key"], self.state.dose_ranges, features
        )

    def _check_features(self, perturbation: Any | None, is_measured: bool) -> None:
        """Refuse features of a perturbation that was measured, and where none are known."""
        if self.objective == "published":
            raise ValueError(
                "The published objective predicts measured perturbations alone and takes no "
                '`features`. Use the default, `objective="in_context"`.'
            )
        if self._setup["perturbation_features"] is None:
            raise ValueError(
                "The model was set up without features of perturbations and takes no `features`. "
                "Set it up with `perturbation_features=` to train one that does."
            )
        if perturbation is None:
            raise ValueError(
                "`features` are of a perturbation that was never measured: name it, "
                "`perturbation=`."
            )
        if is_measured:
            raise ValueError(
                f"{shown(perturbation)} was measured, so what was measured tells of it. Leave out "
                "`features`, or pass the name of a perturbation that was never measured."
            )

    def _check_intervals(self, confidence_level: float) -> None:
        """Refuse a level that is none, and intervals of a model that knows none."""
        if not 0 < confidence_level < 1:
            raise ValueError(
                f"`confidence_level` must be between 0 and 1; it is {confidence_level}."
            )
        if self.objective == "published":
            raise ValueError(
                "The published objective knows no error of its predictions. Use the default, "
                '`objective="in_context"`.'
            )

    def _query(self, adata: AnnData | None, with_contexts: bool = False) -> tuple[AnnData, Query]:
        """Check the cells to predict, with what tells their contexts if these have a say."""
        self._check_if_trained(warn=False)
        if adata is None and (adata := self.adata) is None:
            raise ValueError("This model was loaded without data: pass the cells, an AnnData.")
        check_anndata(adata)
        known_batches = None
        if self.objective == "published" and self.module.n_batch > 1:
            state = self.get_state_registry(REGISTRY_KEYS.BATCH_KEY)
            known_batches = state.categorical_mapping
        query = make_query(
            adata,
            np.asarray(self.get_var_names()),
            self._setup,
            self.state.scale,
            self.perturbations if with_contexts else None,
            known_batches,
        )
        return adata, query

    def _validate_anndata(
        self, adata: AnnData | None = None, *args: Any, **kwargs: Any
    ) -> AnnData:
        """Check gene names too: scvi-tools checks only how many there are."""
        if (checked := self.adata if adata is None else adata) is not None:
            check_genes(checked, self.get_var_names())
        return super()._validate_anndata(adata, *args, **kwargs)
