"""SpaPerbModel: what a user sees of SpaPerb."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import lightning
import numpy as np
import pandas as pd

# scvi-tools 1.4.2 uses rich.pretty in `view_anndata_setup` without importing it.
import rich.pretty  # noqa: F401
import torch
from anndata import AnnData
from lightning.pytorch.callbacks import LambdaCallback
from scipy import sparse
from scvi import REGISTRY_KEYS, settings
from scvi.data import AnnDataManager
from scvi.data.fields import CategoricalObsField, LayerField, NumericalObsField
from scvi.model.base import BaseModelClass, UnsupervisedTrainingMixin, VAEMixin
from scvi.module.base import BaseModuleClass
from scvi.utils import setup_anndata_dsp

from spaperb._messages import check_choice, format_list
from spaperb._types import STIMULATED
from spaperb.cells import How, Survey
from spaperb.data import (
    CONDITION_KEY,
    DOSE_KEY,
    MIN_PAIRS,
    EpisodeSplitter,
    PairedDataSplitter,
    Perturbations,
    Query,
    Scale,
    StratifiedSplitter,
    Target,
    as_list,
    batch_shares,
    check_anndata,
    check_categories,
    check_column,
    check_conditions,
    check_counts,
    check_doses,
    check_genes,
    check_named_once,
    check_no_view,
    condition_arms,
    control_cells,
    expression_matrix,
    is_on_disk,
    log_base,
    make_query,
    measure,
    perturbations_of,
    perturbations_with_pairs,
    registered_codes,
    select_rows,
    warn_of_unusual_expression,
    warn_of_whole_names,
)
from spaperb.model._files import SavingMixin
from spaperb.model._networks import Predictor, encode
from spaperb.model._prediction import PredictRows, predict_lazily
from spaperb.model._table import response_table
from spaperb.model._transfer import Transfer, populations_of
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
    quiet_training,
)

if TYPE_CHECKING:
    import dask.array

DELTA_KEY = "X_spaperb_delta"

SMALLEST = 1e-6
"""V_delta is not drawn below it, where the normal quantile is infinite."""
STRUCTURE = "<saved>"
"""In the place of a file of weights: a saved model brings its own."""


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


class SpaPerbModel(SavingMixin, VAEMixin, UnsupervisedTrainingMixin, BaseModelClass):
    """Predict stimulated cells from control cells.

    SpaPerb learns from control and stimulated cells of some cell types (patients, studies) and
    predicts what the control cells of another would look like after the stimulus.

    The default objective learns in context: networks that all genes share attend over the changes
    that were measured (:class:`~spaperb.module.InContextModule`). They come pretrained, so that few
    measured contexts will do, even one. ``objective="published"`` is the model of the paper.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`~spaperb.SpaPerbModel.setup_anndata`.
    registry
        Registry of a saved model, for a model without data; :meth:`load` passes it.
    objective
        ``"in_context"`` or ``"published"``.
    pretrained
        Whether the in-context networks start from the weights that come with the package, or a file
        of such weights. Training goes on from them, and a share of each prediction stays theirs,
        about half.
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
        # scvi-tools keeps what binds a model to its data for as long as the process lives.
        managers = getattr(type(self), "_per_instance_manager_store", {})
        weakref.finalize(self, managers.pop, self.id, None)
        self._digests: dict[str, dict[str, str]] = {}
        if adata is not None:
            # The AnnData holds the codes of its latest set-up, maybe of a model of another class.
            self.adata_manager.validate()
            self._check_unchanged()
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
        self.objective = objective
        parts = OBJECTIVES[objective]
        self._module_cls, self._data_splitter_cls, self._training_plan_cls, _ = parts
        check_arguments(f'objective="{objective}"', parts.module, module_kwargs)
        if objective == "in_context":
            module_kwargs = self._start(pretrained, module_kwargs)
            pretrained = STRUCTURE if self.module.pretrained is not None else False
        else:
            self._publish(module_kwargs)
        # What training learned of the contexts; `load` puts the saved values here.
        self.transfer_: dict[str, Any] = {}
        self._transfer: Transfer | None = None
        # Tells the cells that the positions of the split are of.
        self.split_of_ = ""
        # Without data there is nothing to look at, and `load` puts the saved values here.
        self.expression_kind_: dict[str, Any] = {}
        self.dose_ranges_: list[tuple[float, float]] = []
        if adata is not None:
            x = self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)
            self.expression_kind_ = vars(Scale.of(x, log_base(adata) or math.e))
            if objective == "published" and DOSE_KEY in self.adata_manager.data_registry:
                # Dose curves start in the middle.
                half = self._doses()["median"].clip(lower=LEAST_DOSE).to_numpy()
                self.module.perturbations.log_half.data.copy_(torch.from_numpy(np.log(half)))
        self._model_summary_string = f"SpaPerbModel with objective: {objective}"
        if objective == "in_context":
            of = "from scratch" if self.module.pretrained is None else "pretrained"
            self._model_summary_string += f", {len(self.module.networks)} networks, {of}"
        self.init_params_ = self._get_init_params(locals())

    def _start(
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

    def _publish(self, module_kwargs: dict[str, Any]) -> None:
        """Make the published networks."""
        known = perturbations_of(self.registry)
        dosed = self.registry["setup_args"]["dose_key"] is not None
        self.module = PublishedModule(
            n_input=self.summary_stats.n_vars,
            composition=known.composition if len(known.names) > 1 or dosed else None,
            dosed=dosed,
            n_batch=self.summary_stats.get("n_batch", 0),
            **module_kwargs,
        )

    @classmethod
    @setup_anndata_dsp.dedent
    def setup_anndata(
        cls,
        adata: AnnData,
        condition_key: str = "condition",
        control: Any = "control",
        stimulated: Any | Sequence[Any] | None = None,
        labels_key: str = "cell_type",
        layer: str | None = None,
        batch_key: str | None = None,
        dose_key: str | None = None,
        combination_separator: str | None = "+",
        counts_layer: str | None = None,
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
            perturbation of its own. Cells with further values take no part in training, and neither
            do perturbations without control cells of their cell type (and batch).
        labels_key
            Column of ``adata.obs`` with the cell type; only cells of one type are paired.
        %(param_layer)s
        batch_key
            Column of ``adata.obs`` with the batch: only cells of one batch are paired, and changes
            are measured within batches. The published networks know the batch.
        dose_key
            Column of ``adata.obs`` with the dose of each stimulated cell, a number of at least 0 in
            any unit. The parts of a combination have the cell's dose each. Stimulated cells at a
            dose of 0 are not measured where the perturbation has other doses.
        combination_separator
            What joins the parts of a combination, as in ``"A+B"``. A value that holds it is a
            combination if each part is also a perturbation of its own; parts that name the control drop
            out. ``None`` takes each value for a perturbation of its own.
        counts_layer
            Layer with the raw counts that expression comes from, if stimulated counts are to be drawn
            (``predict_stimulated(sample=True)``).

        Raises
        ------
        ValueError
            If ``adata`` is a view, a column is absent, has missing values or values of several kinds, the control or a stimulated value does
            not occur, there is only one condition, no cell type (in one batch) has both, doses are
            missing, negative or not numbers, counts are none or not those of expression, expression is empty, NaN, infinite or not in memory, or
            gene names repeat. ``adata`` is unchanged then.

        Notes
        -----
        Sets the following fields, as every scvi-tools model does:

        - ``adata.obs["_scvi_condition"]``, ``["_scvi_labels"]``, ``["_scvi_batch"]``: codes
        - ``adata.uns["_scvi_uuid"]``, ``["_scvi_manager_uuid"]``: what binds data to a model
        """
        stimulated = as_list(stimulated)
        setup_method_args = cls._get_setup_method_args(**locals())
        check_anndata(adata)
        check_no_view(adata)
        x = expression_matrix(adata, layer)
        scale = Scale.of(x, log_base(adata) or math.e)
        columns = {
            "condition_key": condition_key,
            "labels_key": labels_key,
            "batch_key": batch_key,
        }
        for argument, key in columns.items():
            if key is not None:
                check_categories(adata, argument, key)
        is_training_data = "source_registry" not in kwargs
        if is_training_data:
            check_conditions(adata, condition_key, control, stimulated)
            stimulated = perturbations_with_pairs(
                adata, condition_key, control, stimulated, labels_key, batch_key
            )
            if counts_layer is not None:
                check_counts(adata, counts_layer, x)
            if dose_key is not None:
                check_doses(adata, dose_key, condition_key, stimulated)
            warn_of_whole_names(Perturbations.of(stimulated, control, None, combination_separator))
            setup_method_args["setup_args"]["stimulated"] = stimulated
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
            # Once more, from itself: after another set-up of the AnnData scvi-tools gives a model
            # its codes again, and the same ones only if it has a registry to take them from.
            first = adata_manager
            adata_manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
            adata_manager.register_fields(adata, source_registry=first.registry)
        cls.register_manager(adata_manager)

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

        Ctrl-C ends training after the current minibatch and leaves a model that can be used; a second one ends all at
        once. A loss that is NaN or infinite ends it with an error, and the model has the weights of the last good epoch.

        Cells are split into those for training, those for validation and those for testing. Those
        for testing (where ``train_size`` and ``validation_size`` add up to less than 1, or the third
        part of ``external_indexing``) are looked at by nothing; ``test_indices`` tells them. The
        others are measured for the in-context objective, which learns from episodes: a measured
        change is left out and predicted from the rest. Each of its networks leaves some contexts
        out altogether, which validation and intervals are of. From pretrained weights it does not
        train on fewer than three contexts (with several perturbations, measured changes): the
        pretrained networks predict then. The published networks learn from pairs of training cells,
        and early stopping watches those of validation.

        It trains on the set-up that the model was made from, whatever the AnnData was set up for
        since.

        Parameters
        ----------
        max_epochs
            Epochs at most. By default 25 of ten minibatches of episodes; 0 leaves pretrained networks
            as they are, and only measures. For the published objective scvi-tools' rule, 400 for up
            to 20,000 cells and fewer for more, in each of which each cell of a type's larger
            condition is visited once.
        batch_size
            Episodes of each network in a minibatch, 4 by default; for the published objective
            pairs, 256 by default and at least 2.
        early_stopping
            Whether to stop when validation stops to improve: on held-out episodes, or on pairs of a
            tenth of the cells, the same at each epoch; cells that were left out are never looked at.
            scvi-tools waits 45 epochs for an improvement (``early_stopping_patience``), which are
            more than the in-context objective has by default.
        early_stopping_monitor
            The logged quantity to watch.
        checkpoint
            File to save the state of training to after each epoch, replacing that of the epoch before.
        ckpt_path
            Such a file, to go on from. A new model of the same AnnData and settings, trained with the same arguments, ends
            as training without the interruption would have: on a CPU with the same weights to the last bit. The file holds
            the split of the cells, the seed of the pairs, early stopping and the random state; ``history`` begins anew.
        **kwargs
            Further arguments of :meth:`scvi.model.base.UnsupervisedTrainingMixin.train`:
            ``accelerator``, ``devices``, ``train_size``, ``validation_size``, ``plan_kwargs`` (see
            :class:`~spaperb.train.SpaPerbTrainingPlan`), ``datasplitter_kwargs`` (see
            :class:`~spaperb.data.PairedDataSplitter`) and those of
            :class:`scvi.train.Trainer`.

        Raises
        ------
        ValueError
            If the model has no data, or data that changed since they were set up, ``max_epochs`` is
            below 1 or no whole number, there is nothing to make episodes of, there are fewer than two pairs in a minibatch, a perturbation has all of its
            pairs left out of training, or early stopping has no validation pairs to watch, or the
            checkpoint is of training with other cells, genes or settings or of more epochs, is
            damaged, or holds more than data (it is a pickle, which could run code, and is looked
            through first).
            The model is then as it was before.
        FloatingPointError
            If the loss or a weight became NaN or infinite.
        OSError
            If the checkpoint cannot be read or written.
        """
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
        is_pretrained = self.objective == "in_context" and self.module.pretrained is not None
        if max_epochs is not None and (
            not isinstance(max_epochs, Integral) or max_epochs < (0 if is_pretrained else 1)
        ):
            raise ValueError(
                "`max_epochs` must be a whole number and at least 1 (0 for pretrained networks as "
                f"they are); it is {max_epochs!r}."
            )
        if batch_size is None:
            batch_size = OBJECTIVES[self.objective].batch_size
        if batch_size < 1:  # scvi-tools would take 0 for its own default.
            least = 1 if self.objective == "in_context" else MIN_PAIRS
            raise ValueError(f"`batch_size` must be at least {least}; it is {batch_size}.")
        self._check_data()
        if self.objective == "in_context":
            if max_epochs is None:
                max_epochs = N_EPOCHS
            own = {"n_networks": len(self.module.networks), "pretrained": is_pretrained}
            kwargs["datasplitter_kwargs"] = {**(kwargs.get("datasplitter_kwargs") or {}), **own}
            if "gradient_clip_val" not in (kwargs.get("trainer_config") or {}):
                kwargs.setdefault("gradient_clip_val", CLIP)
        # A model and its trainer hold each other, so models that were let go are in memory until Python's collector comes
        # by, which it does rarely: after a hundred trainings, say.
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
            with interrupt, quiet_training():
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
                self._transfer, self.transfer_ = None, {}
            raise
        # Again, since Lightning starts nothing where no epoch was left to train.
        self._begin(self.trainer)
        if self.objective == "in_context":
            self._learn_contexts()

    def _begin(self, trainer: lightning.Trainer) -> None:
        """Let go of what other weights taught, and keep which cells training uses.

        As it starts, since a model may be used or saved before training ends, if it ever does.
        """
        self._transfer, self.transfer_ = None, {}
        splitter: StratifiedSplitter = trainer.datamodule
        self.train_indices = splitter.train_idx
        self.validation_indices = splitter.val_idx
        self.test_indices = splitter.test_idx
        self.split_of_ = digest(splitter.adata_manager.adata.obs_names)
        if DOSE_KEY in splitter.adata_manager.data_registry:
            doses = self._doses(self._used())
            self.dose_ranges_ = list(zip(doses["min"], doses["max"], strict=True))

    def _used(self) -> np.ndarray:
        """Positions of the cells that are looked at: all but those for testing."""
        return np.concatenate([self.train_indices, self.validation_indices]).astype(np.int64)

    def _learn_contexts(self) -> Transfer:
        """Measure the contexts of the training data, and learn how far predictions may be off."""
        if self.adata is None:
            raise RuntimeError(
                "This model was saved before its training ended (a checkpoint, say), without what it "
                "learns of the contexts then. Load it with the training AnnData, "
                "`SpaPerbModel.load(path, adata)`."
            )
        if digest(self.adata.obs_names) != self.split_of_:
            raise RuntimeError(
                "This model was saved before its training ended (a checkpoint, say), and the "
                "AnnData has other cells, or the same in another order, than those that were split "
                "into training and test. Load it with the training AnnData as it was."
            )
        self.module.eval()
        learned = Transfer.learn(measure(self.adata_manager, self._used()), self.module)
        self._transfer, self.transfer_ = learned, learned.to_state()
        return learned

    def _doses(self, used: np.ndarray | slice = slice(None)) -> pd.DataFrame:
        """Lowest, highest and median dose of each perturbation in some cells."""
        arms = condition_arms(self.adata_manager)[used]
        doses = np.asarray(self.adata_manager.get_from_registry(DOSE_KEY), dtype=float).ravel()
        of_arm = pd.Series(doses[used]).groupby(arms).agg(["min", "max", "median"])
        return of_arm.reindex(STIMULATED + np.arange(len(self.perturbations)))

    @property
    def perturbations(self) -> list[Any]:
        """Names of the perturbations that the model is trained on."""
        return perturbations_of(self.registry).names

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
        sample: bool = False,
        key_added: str | None = None,
        latent: bool = False,
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
            perturbations, ``"A+B"``, need not be in the training data.
        dose
            Dose, needed if the model was set up with ``dose_key``. Doses that are not in the training
            data lie between those that are; outside of their range there is a warning.
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
        sample
            Whether to draw raw counts rather than to predict log-normalised expression
            (:mod:`spaperb.cells`), from the control cells' own counts. Needs the in-context objective, a model set up with
            ``counts_layer``, and that layer in ``adata``. Normalise the layer by the control cells' size factors.
        key_added
            Name of the layer, which ends with ``"_counts"`` if they are sampled. By default ``"spaperb_stimulated"``; if the model knows several
            perturbations ``"spaperb_<perturbation>"``, and with doses ``"spaperb_<perturbation>_<dose>"``.
        latent
            Whether to keep the latent vectors too.
        inplace
            Whether to write to ``adata``, or to return the predicted layer and write nothing.

        Returns
        -------
        None, numpy.ndarray or dask.array.Array
            ``None``, or if ``inplace=False`` an array ``(n_obs, n_vars)``, float32: predicted
            log-normalised expression, NaN for cells not selected and for genes that the model does not
            know. It is never negative if the training data held no negative value. Where expression is on
            disk (a dask array, a backed AnnData, or :func:`spaperb.read_mapped`), it is a dask array that predicts a block when it is asked
            for one, to be written with ``adata.write_zarr``.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If there is no AnnData, the perturbation is unknown or a dose is missing, negative or not
            known to the model, counts cannot be sampled, genes of the model are missing, the layer that the model was
            set up with is missing, latent vectors are wanted of cells on disk, or expression is NaN, infinite, or negative where the
            training data were not.
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
        adata, query, target = self._query(adata, perturbation, dose)
        if n_samples < 1:
            raise ValueError(f"`n_samples` must be at least 1; it is {n_samples}.")
        if (chunk_size := settings.batch_size if batch_size is None else batch_size) < 1:
            raise ValueError(f"`batch_size` must be at least 1; it is {chunk_size}.")
        if sample:
            if n_samples > 1:
                raise ValueError("Counts are drawn once: `sample=True` needs `n_samples=1`.")
            query = query._replace(counts=self._counts(adata, query))
        if (on_disk := is_on_disk(query.x)) and latent:
            raise ValueError(
                "Latent vectors are computed at once, and expression is on disk. Leave out `latent=True`, or load the "
                "cells, `adata.to_memory()`."
            )
        if inplace and key_added is None:
            key_added = self._layer_name(target) + ("_counts" if sample else "")
        rows = select_rows(indices, adata.n_obs)
        is_nonnegative = self.expression_kind_["nonnegative"]
        how: How = "detection" if detection and is_nonnegative else "shift"
        how = "counts" if sample else how

        minimum = 0.0 if is_nonnegative else -np.inf
        networks: Predictor | None = None
        if self.objective == "published":
            # The networks of this moment, if they are to predict later.
            module = copy.deepcopy(self.module) if on_disk else self.module
            networks = Predictor(module, target, n_samples, give_mean, seed, minimum, chunk_size)
            predict: PredictRows = networks.make
        else:
            labels, is_control = self._known_of_cells(adata)
            learned = self._learned()
            v_delta = None
            if not give_mean:
                rng = np.random.default_rng(seed)
                v_delta = rng.uniform(SMALLEST, 1, (n_samples, len(query.columns)))
            predict = learned.maker(
                query,
                learned.assign(query, labels),
                is_control,
                rows,
                target,
                v_delta,
                how=how,
                seed=seed,
                n_samples=n_samples,
                minimum=minimum,
            ).make
        predicted: Any
        if on_disk:
            predicted = predict_lazily(predict, query, rows)
        else:
            predicted = np.full(adata.shape, np.nan, dtype=np.float32)
            for block in query.blocks("Predicting"):
                here = rows[rows // query.block_rows == block]
                for some, prediction in predict(query, here):
                    predicted[np.ix_(some, query.columns)] = prediction
        if not inplace:
            return predicted
        adata.layers[key_added] = predicted
        if latent:
            z_stim, z_delta = self._latent(query, rows, networks, predicted)
            adata.obsm[f"X_{key_added}"] = z_stim
            adata.obsm[DELTA_KEY] = z_delta
        made_by = {
            "model": type(self).__name__,
            "version": version("spaperb"),
            "objective": self.objective,
            "perturbation": target.name,
            **({} if target.dose is None else {"dose": target.dose}),
            "detection": self.objective == "in_context" and how == "detection",
            "sample": sample,
            "seed": seed,
            "n_samples": n_samples,
            "give_mean": give_mean,
        }
        adata.uns["spaperb"] = {**adata.uns.get("spaperb", {}), key_added: made_by}
        return None

    def _latent(
        self, query: Query, rows: np.ndarray, networks: Predictor | None, predicted: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Latent vectors of predicted cells and how far they moved, NaN for cells not predicted."""
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

    def get_elbo(self, *args: Any, **kwargs: Any) -> float:
        """Evidence lower bound of cells, of a published model; see :class:`scvi.model.base.VAEMixin`."""
        self._check_published("get_elbo")
        return super().get_elbo(*args, **kwargs)

    def get_reconstruction_error(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Reconstruction error of cells, of a published model; see :class:`scvi.model.base.VAEMixin`."""
        self._check_published("get_reconstruction_error")
        return super().get_reconstruction_error(*args, **kwargs)

    def get_marginal_ll(self, *args: Any, **kwargs: Any) -> Any:
        """Marginal likelihood of cells, of a published model; see :class:`scvi.model.base.VAEMixin`."""
        self._check_published("get_marginal_ll")
        return super().get_marginal_ll(*args, **kwargs)

    def _check_published(self, method: str) -> None:
        """Refuse what only networks of cells have."""
        if self.objective == "in_context":
            raise ValueError(
                f"`{method}` is of networks that encode cells, and the in-context networks encode "
                'genes. Use `objective="published"`; how well held-out changes are predicted is in '
                "`history`."
            )

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Any | None = None,
        give_mean: bool = True,
        mc_samples: int = 5_000,
        batch_size: int | None = None,
        return_dist: bool = False,
        dataloader: Iterator[dict[str, torch.Tensor | None]] | None = None,
        *,
        seed: int = 0,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Encode cells, Z.

        The in-context networks encode genes, not cells. Cells are encoded by the 30 principal
        components of the training control cells that tell how near contexts are; the published
        model's encoder is E.

        The cells may be new, as for :meth:`predict_stimulated`: of any cell type and condition or
        without these columns, with genes in another order. Nothing is written to them.

        Parameters
        ----------
        adata
            Cells to encode, normalised as in training; ``None`` for the AnnData of the model.
        indices
            Positions or boolean mask of the cells to encode; ``None`` for all.
        give_mean
            Whether to take the posterior's mean for z, rather than a draw from the posterior.
        mc_samples
            Has no effect: the mean of this posterior is known. It is there as scvi-tools has it.
        batch_size
            Cells to encode at once; ``None`` for ``scvi.settings.batch_size``.
        return_dist
            Whether to return the posterior's mean and variance instead of z.
        dataloader
            Minibatches of registered data to encode instead, as scvi-tools does.
        seed
            Seed of the draws. A cell's draw depends on it and on the cell's row alone.

        Returns
        -------
        numpy.ndarray or tuple of numpy.ndarray
            Latent vectors ``(n_cells, n_latent)`` in the order of ``indices``; with ``return_dist``
            the posterior's mean and variance, of that shape each.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        IndexError
            If ``indices`` are out of range.
        TypeError
            If ``adata`` is no AnnData.
        ValueError
            If there are no cells, genes of the model are missing, the expression is unlike that of
            training, ``batch_size`` is below 1, or ``indices`` are neither positions nor a mask.
        """
        if self.objective == "in_context" and (dataloader is not None or return_dist):
            raise ValueError(
                "The in-context model encodes cells by principal components, which have no "
                "posterior and take no `dataloader`. Leave `return_dist` and `dataloader` out, "
                'or use `objective="published"`.'
            )
        if dataloader is not None:
            return super().get_latent_representation(
                adata, indices, give_mean, mc_samples, batch_size, return_dist, dataloader
            )
        adata, query = self._cells(adata)
        if (chunk_size := settings.batch_size if batch_size is None else batch_size) < 1:
            raise ValueError(f"`batch_size` must be at least 1; it is {chunk_size}.")
        rows = select_rows(indices, adata.n_obs)
        if self.objective == "in_context":
            evidence = self._learned().evidence
            step = query.chunk_rows
            parts = [
                evidence.project(query.rows(rows[i : i + step])) for i in range(0, len(rows), step)
            ]
            empty = np.empty((0, len(evidence.components)))
            return np.concatenate([empty, *parts]).astype(np.float32)
        z, mean, variance = encode(self.module, query, rows, give_mean, seed, chunk_size)
        return (mean, variance) if return_dist else z

    def get_delta_representation(
        self, dose: float | None = None, n_samples: int = 1000, seed: int = 0
    ) -> pd.DataFrame:
        """Latent effect of each perturbation, for clustering them, say.

        In context the mean change that was measured in the training contexts, as
        :meth:`get_latent_representation` encodes it; of the published model Z_delta.

        Parameters
        ----------
        dose
            Dose of all perturbations; ``None`` for the highest training dose of each. In context
            the measured dose that is nearest.
        n_samples, seed
            Number of draws of V_delta to average over, the same for all perturbations, and their
            seed; in context nothing is drawn.

        Returns
        -------
        pandas.DataFrame
            One row a perturbation, ``(P, n_latent)``.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If the model has no doses and one is given.
        """
        self._check_if_trained(warn=False)
        self.module.eval()
        known = perturbations_of(self.registry)
        if self.objective == "in_context":
            if dose is not None:
                self._target(known.names[0], dose)
            effects = self._learned().effects(len(known.names), dose)
            return pd.DataFrame(effects, index=pd.Index(known.names, name="perturbation"))
        rng = np.random.default_rng(seed)
        v_delta = rng.random((n_samples, self.module.n_input), dtype=np.float32)
        rows = []
        for name in known.names:
            target = known.find(name)
            highest = target.dose_range(self.dose_ranges_)[1] if self.dose_ranges_ else None
            target = self._target(name, highest if dose is None else dose)
            rows.append(self.module.shift(torch.from_numpy(v_delta), target).mean(0).cpu().numpy())
        return pd.DataFrame(rows, index=pd.Index(known.names, name="perturbation"))

    def _target(self, perturbation: Any | None, dose: float | None) -> Target:
        """Find what the user asks for among what the model knows."""
        known, dose_key = perturbations_of(self.registry), self.registry["setup_args"]["dose_key"]
        return known.target(perturbation, dose, dose_key, self.dose_ranges_)

    def _layer_name(self, target: Target) -> str:
        """Name of the layer of a perturbation."""
        # HDF5 takes a slash for a folder.
        name = target.name.replace("/", "_")
        others = {str(other) for other in self.perturbations} - {target.name}
        if name in {other.replace("/", "_") for other in others}:
            raise ValueError(
                f"{target.name} and another perturbation would share the layer spaperb_{name}, since a name of a layer "
                "cannot hold a slash. Name the layer, `key_added=`."
            )
        name = name if len(self.perturbations) > 1 else "stimulated"
        dose = "" if target.dose is None else f"_{target.dose:.12g}"
        return f"spaperb_{name}{dose}"

    def predict_response(
        self,
        adata: AnnData | None = None,
        perturbation: Any | None = None,
        dose: float | None = None,
        *,
        groupby: str | None = None,
        level: float = 0.9,
    ) -> pd.DataFrame:
        """Tell which genes change in which cells, by how much, and how sure that is.

        Parameters
        ----------
        adata
            Cells as for :meth:`predict_stimulated`; ``None`` for the AnnData of the model. Where the condition
            column is there and a group has control cells, only these are taken.
        perturbation, dose
            As for :meth:`predict_stimulated`.
        groupby
            Column of ``adata.obs`` with the groups; ``None`` for the cell type's.
        level
            Share of genes whose mean change an interval should contain, in (0, 1).

        Returns
        -------
        pandas.DataFrame
            One row a group and gene, the surest changes of a group first:

            - ``group``, ``gene``
            - ``mean_control``, ``mean_change``: log-normalised units
            - ``lower``, ``upper``: interval of the mean change that an experiment with as many stimulated as there are
              control cells would find
            - ``log2_fold_change``: of the means, transformed back with the base of the training
              cells, and 0.01 counts per 10,000 added to each: a millionth of the target sum that
              these were normalised to. If genes were dropped since, that is taken for 10,000 or,
              if larger, what the largest cell adds up to
            - ``score``: mean change over half the interval's width; beyond 1 or -1 the interval leaves out 0. For
              ``gseapy.prerank`` or ``decoupler``
            - ``responding``: fraction of cells that begin or cease to express the gene or, if their level changes by
              more than 0.1, express it
            - ``distance``: how far the group's control cells are from training contexts in which the perturbation was
              measured, over the largest such distance of a training context; 0 where it was measured in the
              group itself, above 1 beyond what training saw

            Without ``responding`` where training expression is negative (scaled, say), and without
            ``log2_fold_change`` where it is no logarithm; a warning says so.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If ``groupby`` is no column or has no value for some cell, ``level`` is not in (0, 1),
            the objective is the published one, or :meth:`predict_stimulated` would refuse.
        """
        if not 0 < level < 1:
            raise ValueError(f"`level` must be between 0 and 1; it is {level}.")
        if self.objective == "published":
            raise ValueError(
                "The published objective knows no error of its predictions. Use the default, "
                '`objective="in_context"`.'
            )
        adata, query, target = self._query(adata, perturbation, dose)
        labels, is_control = self._known_of_cells(adata)
        groupby = groupby or self.registry["setup_args"]["labels_key"]
        check_column(adata, "groupby", groupby)
        of_group = pd.Series(np.arange(adata.n_obs)).groupby(adata.obs[groupby].to_numpy()).indices
        groups = {
            name: rows[is_control[rows]] if is_control[rows].any() else rows
            for name, rows in of_group.items()
        }
        learned = self._learned()
        context = learned.assign(query, labels)
        of_groups = np.concatenate(list(groups.values()))
        survey = Survey.of(query, populations_of(context.codes, is_control, of_groups))
        changes = learned.changes(survey, target)
        learned.warn_of(changes, context.names)
        var_names = self.get_var_names().tolist()
        scale = Scale(**self.expression_kind_)
        return response_table(groups, context.codes, query, changes, var_names, level, scale)

    def _counts(self, adata: AnnData, query: Query) -> Any:
        """Raw counts of the cells to predict."""
        layer = self.registry["setup_args"]["counts_layer"]
        if layer is None or self.objective == "published":
            raise ValueError(
                "Counts are drawn by a model with the in-context objective that was set up with "
                "`counts_layer=`, the layer with raw counts."
            )
        counts = check_counts(adata, layer, query.x)
        return counts.tocsr() if sparse.issparse(counts) else counts

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

    def _learned(self) -> Transfer:
        """What training learned of the contexts, from the saved state if the model was loaded."""
        if self._transfer is None and self.transfer_:
            self._transfer = Transfer.from_state(self.transfer_, self.module)
        elif self._transfer is None:
            if self.adata is not None:
                self._check_data()
            return self._learn_contexts()
        return self._transfer

    def _known_of_cells(self, adata: AnnData) -> tuple[np.ndarray | None, np.ndarray]:
        """Cell types of cells, if there are any, and which cells are not known to be stimulated."""
        setup = self.registry["setup_args"]
        labels, conditions = (
            adata.obs[setup[key]] if setup[key] in adata.obs else None
            for key in ("labels_key", "condition_key")
        )
        is_control = np.ones(adata.n_obs, dtype=bool)
        if conditions is not None:
            is_control = control_cells(conditions, setup["control"], self.perturbations)
        return None if labels is None else labels.to_numpy(), is_control

    def _query(
        self, adata: AnnData | None, perturbation: Any | None, dose: float | None
    ) -> tuple[AnnData, Query, Target]:
        """Check the cells to predict and what is asked of them."""
        self._check_if_trained(warn=False)
        target = self._target(perturbation, dose)
        return *self._cells(adata), target

    def _cells(self, adata: AnnData | None) -> tuple[AnnData, Query]:
        """Check the cells that the networks are to see."""
        self._check_if_trained(warn=False)
        if adata is None and (adata := self.adata) is None:
            raise ValueError("This model was loaded without data: pass the cells, an AnnData.")
        check_anndata(adata)
        setup = self.registry["setup_args"]
        for key in ("labels_key", "condition_key"):
            check_named_once(adata, key, setup[key])
        batches = None
        if self.objective == "published" and self.module.n_batch > 1:
            known = self.get_state_registry(REGISTRY_KEYS.BATCH_KEY).categorical_mapping
            batches = batch_shares(adata, setup["batch_key"], known)
        trained_on = Scale(**self.expression_kind_)
        var_names = np.asarray(self.get_var_names())
        return adata, make_query(adata, var_names, setup["layer"], trained_on, batches)

    def _validate_anndata(
        self, adata: AnnData | None = None, *args: Any, **kwargs: Any
    ) -> AnnData:
        """Check gene names too: scvi-tools checks only how many there are."""
        if (checked := self.adata if adata is None else adata) is not None:
            check_genes(checked, self.get_var_names())
        return super()._validate_anndata(adata, *args, **kwargs)


FIXED_ARGUMENTS = ("n_input", "composition", "dosed", "n_batch")
"""Arguments of modules that follow from the data."""


def check_arguments(of: str, made: type, given: Mapping[str, Any]) -> None:
    """Refuse keywords that what is made does not take."""
    taken = [name for name in signature(made).parameters if name not in FIXED_ARGUMENTS]
    if unknown := [name for name in given if name not in taken]:
        raise TypeError(f"{of} takes no {format_list(unknown)}. It takes: {format_list(taken)}.")
