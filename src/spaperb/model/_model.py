"""SpaPerbModel.

Set-up, networks and training. What it does then is in the mixins beside this file.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from lightning.pytorch.callbacks import LambdaCallback
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import CategoricalObsField, LayerField, NumericalObsField
from scvi.model.base import UnsupervisedTrainingMixin, VAEMixin
from scvi.module.base import BaseModuleClass
from scvi.utils import setup_anndata_dsp

from spaperb._compat import forget_with
from spaperb._messages import check_choice, format_list
from spaperb._types import CONTROL, STIMULATED
from spaperb.data import (
    CLUSTER_NAME,
    CLUSTERS,
    CONDITION_KEY,
    DOSE_KEY,
    MIN_PAIRS,
    EpisodeSplitter,
    FeatureTable,
    PairedDataSplitter,
    Perturbations,
    Scale,
    StratifiedSplitter,
    as_list,
    check_anndata,
    check_categories,
    check_conditions,
    check_counts,
    check_doses,
    check_genes,
    check_no_view,
    condition_arms,
    expression_matrix,
    find_clusters,
    log_base,
    measure,
    measure_states,
    name_clusters,
    perturbations_of,
    perturbations_with_pairs,
    registered_codes,
    warn_of_unusual_expression,
    warn_of_whole_names,
)
from spaperb.model._base import SpaPerbBase
from spaperb.model._contexts import ContextPredictor
from spaperb.model._files import FilesMixin
from spaperb.model._latent import LatentMixin
from spaperb.model._prediction import PredictionMixin
from spaperb.model._response import ResponseMixin
from spaperb.model._state import State
from spaperb.model._suggest import SuggestMixin
from spaperb.module import InContextModule, PublishedModule
from spaperb.nn import LEAST_DOSE, read_weights, shipped_weights
from spaperb.train import (
    InContextTrainingPlan,
    SpaPerbTrainingPlan,
    SpaPerbTrainRunner,
    StopOnInterrupt,
    StopOnNonFinite,
    check_unchanged,
    data_digests,
    digest,
    one_thread,
    quiet_training,
)

STRUCTURE = "<saved>"
"""In the place of a file of weights: a saved model brings its own."""
FIXED_ARGUMENTS = ("n_input", "composition", "dosed", "n_batch")
"""Arguments of modules that follow from the data."""


class Objective(NamedTuple):
    """What belongs to an objective."""

    module: type[BaseModuleClass]
    splitter: type[StratifiedSplitter]
    plan: type[SpaPerbTrainingPlan]
    batch_size: int


OBJECTIVES = {
    "in_context": Objective(InContextModule, EpisodeSplitter, InContextTrainingPlan, 4),
    "published": Objective(PublishedModule, PairedDataSplitter, SpaPerbTrainingPlan, 256),
}
N_EPOCHS = 25
"""Epochs of the in-context networks."""
CLIP = 100.0
"""Largest norm of a gradient of the in-context loss."""


class SpaPerbModel(
    PredictionMixin,
    ResponseMixin,
    SuggestMixin,
    LatentMixin,
    FilesMixin,
    VAEMixin,
    UnsupervisedTrainingMixin,
    SpaPerbBase,
):
    """Predict stimulated cells from control cells.

    SpaPerb learns from control and stimulated cells of some cell types (patients, studies) and
    predicts what the control cells of another would look like after the stimulus.

    The default objective learns in context: networks that all genes share attend over the changes
    that were measured (:class:`~spaperb.module.InContextModule`). They come pretrained, so that
    few measured contexts will do, even one. ``objective="published"`` is the model of the paper.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`~spaperb.SpaPerbModel.setup_anndata`.
    registry
        Registry of a saved model, for a model without data; :meth:`load` passes it.
    objective
        ``"in_context"`` or ``"published"``.
    pretrained
        Whether the in-context networks start from the weights that come with the package, or a
        file of such weights. Training goes on from them, and a share of each prediction stays
        theirs, about half.
    **module_kwargs
        Further arguments of :class:`~spaperb.module.InContextModule` or of
        :class:`~spaperb.module.PublishedModule`. Pretrained networks have the sizes of their file.

    Raises
    ------
    ValueError
        If the objective is unknown or takes no weights, or the weights are damaged, of another
        version, or of other sizes than those asked for.
    TypeError
        If the objective's module takes no such argument, or ``pretrained`` is of another type.
    FileNotFoundError
        If there is no file of weights.

    Examples
    --------
    >>> SpaPerbModel.setup_anndata(adata)
    >>> model = SpaPerbModel(adata)
    >>> model.train()
    >>> model.predict_stimulated(adata)  # writes adata.layers["spaperb_stimulated"]

    References
    ----------
    Tang et al. (2024), scPerb, Journal of Advanced Research, doi:10.1016/j.jare.2024.10.035.
    """

    _module_cls = InContextModule
    _data_splitter_cls = EpisodeSplitter
    _training_plan_cls = InContextTrainingPlan
    _train_runner_cls = SpaPerbTrainRunner

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        objective: Literal["in_context", "published"] = "in_context",
        pretrained: bool | str | Path = True,
        **module_kwargs: Any,
    ):
        if registry is None:
            check_anndata(adata)
        super().__init__(adata, registry)
        forget_with(self)
        self._digests: dict[str, dict[str, str]] = {}
        if adata is not None:
            # The AnnData holds the codes of its latest set-up, maybe of a model of another class.
            self.adata_manager.validate()
            self._check_unchanged()
        _check_objective(objective, pretrained, module_kwargs)
        self.objective = objective
        parts = OBJECTIVES[objective]
        self._module_cls, self._data_splitter_cls, self._training_plan_cls, _ = parts
        self._model_summary_string = f"SpaPerbModel with objective: {objective}"
        if objective == "in_context":
            module_kwargs = self._make_in_context(pretrained, module_kwargs)
            pretrained = STRUCTURE if self.module.pretrained is not None else False
            of = "from scratch" if self.module.pretrained is None else "pretrained"
            self._model_summary_string += f", {len(self.module.networks)} networks, {of}"
        else:
            self._make_published(module_kwargs)
        # Without data there is nothing to look at, and `load` puts the saved state here.
        if adata is not None:
            x = self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)
            self.state = State(Scale.of(x, log_base(adata) or math.e))
        self.init_params_ = self._get_init_params(locals())

    def _make_in_context(
        self, pretrained: bool | str | Path, module_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Make in-context networks, and return the arguments that make such ones again."""
        if pretrained is False or pretrained == STRUCTURE:
            self.module = InContextModule(**module_kwargs)
            if pretrained:
                self.module.start_from(self.module.all_networks)
            return module_kwargs
        networks = read_weights(shipped_weights() if pretrained is True else pretrained)
        sizes = {
            "n_latent": networks[0].n_latent,
            "n_hidden": networks[0].n_hidden,
            "n_networks": len(networks),
        }
        if others := {k: v for k, v in sizes.items() if module_kwargs.get(k, v) != v}:
            raise ValueError(
                f"The pretrained networks have {others}, and the model is asked for other sizes. "
                "Leave these arguments out, or pass `pretrained=False`."
            )
        module_kwargs = {**module_kwargs, **sizes}
        self.module = InContextModule(**module_kwargs).start_from(networks)
        return module_kwargs

    def _make_published(self, module_kwargs: dict[str, Any]) -> None:
        """Make the published networks."""
        known = perturbations_of(self.registry)
        dosed = self._setup["dose_key"] is not None
        self.module = PublishedModule(
            n_input=self.summary_stats.n_vars,
            composition=known.composition if len(known.names) > 1 or dosed else None,
            dosed=dosed,
            n_batch=self.summary_stats.get("n_batch", 0),
            **module_kwargs,
        )
        if dosed and self.adata is not None:
            # Dose curves start in the middle.
            half = self._doses()["median"].clip(lower=LEAST_DOSE).to_numpy()
            self.module.perturbations.log_half.data.copy_(torch.from_numpy(np.log(half)))

    @classmethod
    @setup_anndata_dsp.dedent
    def setup_anndata(
        cls,
        adata: AnnData,
        condition_key: str = "condition",
        control: Any = "control",
        stimulated: Any | Sequence[Any] | None = None,
        labels_key: str | None = "cell_type",
        layer: str | None = None,
        batch_key: str | None = None,
        dose_key: str | None = None,
        combination_separator: str | None = "+",
        counts_layer: str | None = None,
        perturbation_features: pd.DataFrame | Mapping[Any, Any] | str | None = None,
        **kwargs: Any,
    ) -> None:
        """%(summary)s.

        Expression must be normalised and log-transformed, as by ``scanpy.pp.normalize_total``
        and ``scanpy.pp.log1p``; there is a warning if it looks otherwise. The base of the
        logarithms is ``adata.uns["log1p"]["base"]``, where scanpy notes it, or the natural one.

        Parameters
        ----------
        %(param_adata)s
        condition_key
            Column of ``adata.obs`` that tells control from stimulated cells.
        control
            Value of control cells in that column.
        stimulated
            Value of stimulated cells, or several; ``None`` takes every other value. Each is a
            perturbation of its own. Cells with further values take no part in training, and
            neither do perturbations without control cells of their cell type (and batch).
        labels_key
            Column of ``adata.obs`` with the cell type; only cells of one type are paired. ``None``
            if types are not known: clusters of the control cells stand in for them (scanpy's
            Leiden), and each stimulated cell is put into the one that it was of. Cells to predict
            then need no column.
        %(param_layer)s
        batch_key
            Column of ``adata.obs`` with the batch: only cells of one batch are paired, and changes
            are measured within batches. The published networks know the batch.
        dose_key
            Column of ``adata.obs`` with the dose of each stimulated cell, a number of at least 0
            in any unit. The parts of a combination have the cell's dose each. Stimulated cells at
            a dose of 0 are not measured where the perturbation has other doses.
        combination_separator
            What joins the parts of a combination, as in ``"A+B"``. A value that holds it is a
            combination if each part is also a perturbation of its own; parts that name the control
            drop out. ``None`` takes each value for a perturbation of its own.
        counts_layer
            Layer with the raw counts that expression comes from, if stimulated counts are to be
            drawn (``predict_stimulated(sample=True)``).
        perturbation_features
            Features of the perturbations, ``(d,)`` each, such as a drug's fingerprint or a gene's
            embedding, to predict perturbations that were never measured: a table with a row a
            perturbation, a vector for each by its name, or a key of such a table in ``adata.uns``
            or of a vector for each cell in ``adata.obsm``. They are standardised. The table may
            hold perturbations that the data do not.

        Raises
        ------
        ValueError
            If ``adata`` is a view, a column is absent, has missing values or values of several
            kinds, the control or a stimulated value does not occur, there is only one condition,
            no cell type (in one batch) has both, doses are missing, negative or not numbers,
            counts are none or not those of expression, features are missing for a perturbation,
            differ in length or are the same for all, there are too few control cells to cluster or
            a column ``spaperb_cluster`` of your own, expression is empty, NaN, infinite or not
            in memory, or gene names repeat. ``adata`` is unchanged then.

        Notes
        -----
        Sets the following fields, as every scvi-tools model does:

        - ``adata.obs["_scvi_condition"]``, ``["_scvi_labels"]``, ``["_scvi_batch"]``: codes
        - ``adata.obs["spaperb_cluster"]``, with ``labels_key=None``: the clusters
        - ``adata.uns["_scvi_uuid"]``, ``["_scvi_manager_uuid"]``: what binds data to a model
        """
        if labels_key is None:
            cls._setup_clusters(**{k: v for k, v in locals().items() if k != "cls"})
            return
        stimulated = as_list(stimulated)
        setup_method_args = cls._get_setup_method_args(**locals())
        check_anndata(adata)
        check_no_view(adata)
        x = expression_matrix(adata, layer)
        scale = Scale.of(x, log_base(adata) or math.e)
        setup = setup_method_args["setup_args"]
        is_training_data = "source_registry" not in kwargs
        if not is_training_data and labels_key == CLUSTERS and CLUSTERS not in adata.obs:
            raise ValueError(
                "The model was set up with clusters for cell types (`labels_key=None`), and this "
                f"AnnData has no adata.obs[{CLUSTERS!r}]. Load it with the AnnData as set-up left "
                "it (keep that column when you write it), or without data, and pass the cells to "
                "`predict_stimulated`."
            )
        for argument in ("condition_key", "labels_key", "batch_key"):
            if setup[argument] is not None:
                check_categories(adata, argument, setup[argument])
        if is_training_data:
            check_conditions(adata, condition_key, control, stimulated)
            setup["stimulated"] = stimulated = perturbations_with_pairs(
                adata, condition_key, control, stimulated, labels_key, batch_key
            )
            if counts_layer is not None:
                check_counts(adata, counts_layer, x)
            if dose_key is not None:
                check_doses(adata, dose_key, condition_key, stimulated)
            known = Perturbations.of(stimulated, control, None, combination_separator)
            warn_of_whole_names(known)
            if perturbation_features is not None:
                table = FeatureTable.read(
                    adata, perturbation_features, condition_key, control, known.singles
                )
                setup["perturbation_features"] = table._asdict()
        else:
            state = kwargs["source_registry"]["field_registries"][REGISTRY_KEYS.X_KEY]
            check_genes(adata, state["state_registry"]["column_names"])
        warn_of_unusual_expression(x, scale)

        fields = [
            # Not corrected to C order: the user's matrix is the user's.
            LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=False, correct_data_format=False),
            CategoricalObsField(CONDITION_KEY, condition_key),
            CategoricalObsField(REGISTRY_KEYS.LABELS_KEY, labels_key),
        ]
        if batch_key is not None:
            fields.append(CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key))
        if dose_key is not None:
            fields.append(NumericalObsField(DOSE_KEY, dose_key))
        adata_manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        adata_manager.register_fields(adata, **kwargs)
        if is_training_data:
            # Again, from the first registry: so scvi-tools can restore the same codes if the
            # AnnData is set up for another model later.
            first = adata_manager
            adata_manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
            adata_manager.register_fields(adata, source_registry=first.registry)
        cls.register_manager(adata_manager)

    @classmethod
    def _setup_clusters(
        cls, adata: AnnData, labels_key: None, kwargs: dict[str, Any], **setup: Any
    ) -> None:
        """Set data up with clusters for cell types; they stay as they were if that fails."""
        check_anndata(adata)
        check_no_view(adata)
        key, control = setup["condition_key"], setup["control"]
        check_categories(adata, "condition_key", key)
        stimulated = as_list(setup["stimulated"])
        check_conditions(adata, key, control, stimulated)
        codes, values = pd.factorize(adata.obs[key].astype(object))
        arms = Perturbations.of(list(values), control, stimulated).arms[codes]
        if setup["dose_key"] in adata.obs:
            # Each dose of a perturbation moves cells by a shift of its own.
            treatments = (
                pd.Series(arms).astype(str) + adata.obs[setup["dose_key"]].astype(str).to_numpy()
            )
            arms = np.where(arms > CONTROL, STIMULATED + pd.factorize(treatments)[0], arms)
        before = adata.obs.get(CLUSTERS)
        if before is not None and not before.astype(str).str.fullmatch(CLUSTER_NAME).all():
            raise ValueError(
                f"adata.obs[{CLUSTERS!r}] is not what an earlier set-up wrote, and would be "
                f"replaced. Rename it, or pass it: `labels_key={CLUSTERS!r}`."
            )
        clusters = find_clusters(expression_matrix(adata, setup["layer"]), arms)
        adata.obs[CLUSTERS] = name_clusters(clusters, adata.obs_names)
        try:
            cls.setup_anndata(adata, labels_key=CLUSTERS, **setup, **kwargs)
        except BaseException:
            del adata.obs[CLUSTERS]
            if before is not None:
                adata.obs[CLUSTERS] = before
            raise

    def train(
        self,
        max_epochs: int | None = None,
        *,
        batch_size: int | None = None,
        early_stopping: bool = True,
        early_stopping_monitor: str = "validation_loss",
        checkpoint: str | Path | None = None,
        ckpt_path: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """Train the model.

        Ctrl-C ends training after the current minibatch and leaves a model that can be used; a
        second one ends all at once. A loss that is NaN or infinite ends it with an error, and the
        model has the weights of the last good epoch.

        Cells are split into those for training, those for validation and those for testing. Those
        for testing (where ``train_size`` and ``validation_size`` add up to less than 1, or the
        third part of ``external_indexing``) are looked at by nothing; ``test_indices`` tells them.
        The others are measured for the in-context objective, which learns from episodes: a
        measured change is left out and predicted from the rest. Each of its networks leaves some
        contexts out; validation and intervals are computed on those. With fewer than three
        contexts (with several perturbations, measured changes) pretrained networks are not
        trained, and predict as they are. The published networks learn from pairs of training
        cells, and early stopping watches those of validation.

        It trains on the set-up that the model was made from, whatever the AnnData was set up for
        since.

        Parameters
        ----------
        max_epochs
            Epochs at most. By default 25 of ten minibatches of episodes; 0 leaves pretrained
            networks as they are, and only measures. For the published objective scvi-tools' rule,
            400 for up to 20,000 cells and fewer for more, in each of which each cell of a type's
            larger condition is visited once.
        batch_size
            Episodes of each network in a minibatch, 4 by default; for the published objective
            pairs, 256 by default and at least 2.
        early_stopping
            Whether to stop when validation stops to improve: on held-out episodes, or on pairs of
            a tenth of the cells, the same at each epoch; cells that were left out are never looked
            at. scvi-tools waits 45 epochs for an improvement (``early_stopping_patience``), which
            are more than the in-context objective has by default.
        early_stopping_monitor
            The logged quantity to watch.
        checkpoint
            File to save the state of training to after each epoch, replacing that of the epoch
            before.
        ckpt_path
            Such a file, to go on from. A new model of the same AnnData and settings, trained with
            the same arguments, ends as training without the interruption would have: on a CPU with
            the same weights to the last bit. The file holds the split of the cells, the seed of
            the pairs, early stopping and the random state; ``history`` begins anew.
        **kwargs
            Further arguments of :meth:`scvi.model.base.UnsupervisedTrainingMixin.train`:
            ``accelerator``, ``devices``, ``train_size``, ``validation_size``, ``plan_kwargs`` (see
            :class:`~spaperb.train.SpaPerbTrainingPlan`), ``datasplitter_kwargs`` (see
            :class:`~spaperb.data.PairedDataSplitter`) and those of
            :class:`scvi.train.Trainer`.

        Raises
        ------
        ValueError
            If the model has no data, or data that changed since they were set up, ``max_epochs``
            is below 1 (0 for pretrained networks) or no whole number, there is nothing to make
            episodes of, there are fewer than two pairs in a minibatch, a perturbation has all of
            its pairs left out of training, or early stopping has no validation pairs to watch, or
            the checkpoint is of training with other cells, genes or settings or of more epochs, is
            damaged, or holds more than data (it is a pickle, which could run code, and is looked
            through first). The model is then as it was before.
        FloatingPointError
            If the loss or a weight became NaN or infinite.
        OSError
            If the checkpoint cannot be read or written.
        """
        if batch_size is None:
            batch_size = OBJECTIVES[self.objective].batch_size
        self._check_training(max_epochs, batch_size, kwargs)
        is_in_context = self.objective == "in_context"
        if is_in_context:
            max_epochs = N_EPOCHS if max_epochs is None else max_epochs
            kwargs = self._with_networks(kwargs)
        # A model and its trainer hold each other, so models that were let go are in memory until
        # Python's collector comes by, which it does rarely: after a hundred trainings, say.
        gc.collect()
        finite, interrupt = StopOnNonFinite(), StopOnInterrupt()
        keep_split = LambdaCallback(on_train_start=lambda trainer, _: self._begin(trainer))
        callbacks = [*(kwargs.pop("callbacks", None) or []), keep_split, finite, interrupt]
        was_trained = self.is_trained
        if not self.history:
            # Else scvi-tools would append to it, and only to the terms that it has.
            self.is_trained_ = False
        # Lightning trains in the mode that it finds, and a trained model is in that of prediction.
        self.module.train()
        try:
            with interrupt, quiet_training(), one_thread() if is_in_context else nullcontext():
                super().train(
                    max_epochs=max_epochs,
                    batch_size=batch_size,
                    early_stopping=early_stopping,
                    early_stopping_monitor=early_stopping_monitor,
                    checkpoint=checkpoint,
                    ckpt_path=ckpt_path,
                    callbacks=callbacks,
                    **kwargs,
                )
        except BaseException as error:
            self.module.eval()
            is_good = isinstance(error, FloatingPointError) and finite.n_good > 0
            self.is_trained_ = was_trained or is_good
            if finite.has_begun:
                self.state.predictor = None
            raise
        # Again, since Lightning starts nothing where no epoch was left to train.
        self._begin(self.trainer)
        if is_in_context:
            with one_thread():
                self._learn()

    def _check_training(
        self, max_epochs: int | None, batch_size: int, kwargs: Mapping[str, Any]
    ) -> None:
        """Refuse to train without data, with data that changed, or on nothing."""
        if self.adata is None:
            raise ValueError(
                "This model was loaded without data. Load it with the training AnnData, "
                "`SpaPerbModel.load(path, adata)`, to train it further."
            )
        if kwargs.get("datamodule") is not None:
            raise ValueError(
                "SpaPerb trains on pairs that it draws itself and takes no `datamodule`. Pass the "
                "AnnData to SpaPerbModel, and loader options as `datasplitter_kwargs`."
            )
        least = 0 if self._is_pretrained else 1
        if max_epochs is not None and not (
            isinstance(max_epochs, Integral) and max_epochs >= least
        ):
            raise ValueError(
                "`max_epochs` must be a whole number and at least 1 (0 for pretrained networks as "
                f"they are); it is {max_epochs!r}."
            )
        if batch_size < 1:  # scvi-tools would take 0 for its own default.
            least = 1 if self.objective == "in_context" else MIN_PAIRS
            raise ValueError(f"`batch_size` must be at least {least}; it is {batch_size}.")
        self._check_data()

    @property
    def _is_pretrained(self) -> bool:
        return self.objective == "in_context" and self.module.pretrained is not None

    def _with_networks(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of training, with what the in-context networks add to them."""
        own = {"n_networks": len(self.module.networks), "pretrained": self._is_pretrained}
        kwargs = {
            **kwargs,
            "datasplitter_kwargs": {**(kwargs.get("datasplitter_kwargs") or {}), **own},
        }
        if "gradient_clip_val" not in (kwargs.get("trainer_config") or {}):
            kwargs.setdefault("gradient_clip_val", CLIP)
        return kwargs

    def _begin(self, trainer: lightning.Trainer) -> None:
        """Let go of what other weights taught, and keep which cells training uses.

        As it starts, since a model may be used or saved before training ends, if it ever does.
        """
        self.state.predictor = None
        splitter: StratifiedSplitter = trainer.datamodule
        self.train_indices = splitter.train_idx
        self.validation_indices = splitter.val_idx
        self.test_indices = splitter.test_idx
        self.state.split_of = digest(splitter.adata_manager.adata.obs_names)
        if DOSE_KEY in splitter.adata_manager.data_registry:
            doses = self._doses(self._used())
            self.state.dose_ranges = list(zip(doses["min"], doses["max"], strict=True))

    def _used(self) -> np.ndarray:
        """Positions of the cells that are looked at: all but those for testing."""
        return np.concatenate([self.train_indices, self.validation_indices]).astype(np.int64)

    def _learn(self) -> ContextPredictor:
        """Measure the contexts of the training data, and learn how far predictions may be off."""
        if self.adata is None:
            raise RuntimeError(
                "This model was saved before its training ended (a checkpoint, say), without what "
                "it learns of the contexts then. Load it with the training AnnData, "
                "`SpaPerbModel.load(path, adata)`."
            )
        self._check_split("was saved before its training ended (a checkpoint, say)")
        self.module.eval()
        evidence = measure(self.adata_manager, self._used())
        self.state.predictor = ContextPredictor.learn(evidence, self.module)
        return self.state.predictor

    def _learned(self) -> ContextPredictor:
        """What training learned of the contexts.

        Of a model saved before its end it is learned now.
        """
        if self.state.predictor is None and self.adata is not None:
            self._check_data()
        return self._learn() if self.state.predictor is None else self.state.predictor

    def _check_split(self, why: str) -> None:
        """Check that the AnnData has the cells that were split into training and test."""
        if digest(self.adata.obs_names) != self.state.split_of:
            raise RuntimeError(
                f"This model {why}, and the AnnData has other cells, or the same in another "
                "order, than those that were split into training and test. Load it with the "
                "training AnnData as it was."
            )

    def _learned_states(self) -> ContextPredictor:
        """What training learned of the contexts, with their states: measured when first needed."""
        predictor = self._learned()
        if predictor.states is None:
            if self.adata is None:
                raise ValueError(
                    "`by_cell=True` measures states of the training cells, and this model was "
                    "loaded without data. Load it with the training AnnData, "
                    "`SpaPerbModel.load(path, adata)`, or predict by cell before it is saved."
                )
            self._check_split("measures states of its training cells")
            self._check_data()
            predictor.states = measure_states(self.adata_manager, self._used(), predictor.evidence)
        return predictor

    def _doses(self, used: np.ndarray | slice = slice(None)) -> pd.DataFrame:
        """Lowest, highest and median dose of each perturbation in some cells."""
        arms = condition_arms(self.adata_manager)[used]
        doses = np.asarray(self.adata_manager.get_from_registry(DOSE_KEY), dtype=float).ravel()
        of_arm = pd.Series(doses[used]).groupby(arms).agg(["min", "max", "median"])
        return of_arm.reindex(STIMULATED + np.arange(len(self.perturbations)))

    def _check_data(self) -> None:
        """Refuse data that changed, and give them this model's set-up again after another."""
        check_genes(self.adata, self.get_var_names())
        self._check_unchanged()
        self._validate_anndata()

    def _check_unchanged(self) -> None:
        """Compare the data with themselves as they were when this model was first given them."""
        manager = self.adata_manager
        if manager.id not in self._digests:
            self._digests[manager.id] = data_digests(manager, registered_codes)
        check_unchanged(self._digests[manager.id], data_digests(manager))


def _check_objective(objective: str, pretrained: Any, module_kwargs: Mapping[str, Any]) -> None:
    """Refuse an unknown objective, and arguments that are not of it."""
    check_choice("objective", objective, tuple(OBJECTIVES))
    if not isinstance(pretrained, bool | str | Path):
        raise TypeError(
            "`pretrained` must be True (the weights that come with SpaPerb), False (none) or a "
            f"file of weights; it is {pretrained!r}."
        )
    if objective == "published" and not isinstance(pretrained, bool):
        raise ValueError(
            'objective="published" is trained from scratch and takes no file of `pretrained` '
            f"weights; it is {str(pretrained)!r}. Leave it out."
        )
    made = OBJECTIVES[objective].module
    taken = [name for name in signature(made).parameters if name not in FIXED_ARGUMENTS]
    if unknown := [name for name in module_kwargs if name not in taken]:
        raise TypeError(
            f'objective="{objective}" takes no {format_list(unknown)}. It takes: '
            f"{format_list(taken)}."
        )
