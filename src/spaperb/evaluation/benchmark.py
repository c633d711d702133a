"""Leave-one-context-out: hide a context's stimulated cells, predict them, score, for any method.

A *method* is any object with two calls::

    fit(adata, *, held_out, condition_key, control, stimulated, labels_key, seed)
    predict(adata_control) -> array (n_control_cells, n_genes)

``fit`` gets the training cells and, as keywords, the names of their obs columns and a seed; take
what you need and the rest as ``**setup``. The hidden cells never reach a method: what it gets is a
new AnnData, copied from the other cells alone. Everything in
:data:`spaperb.evaluation.baselines.BASELINES` is a method, and :class:`SpaPerb` makes one of the
model.

Half of the hidden context's control cells are hidden too. The method predicts from the others,
and the real change is measured from these: with the same control cells on both sides, their
sampling noise would be in the predicted and in the real change (Nicol, Shivakumar and Irizarry
2026, bioRxiv 2026.05.07.723486). Each seed draws the halves anew.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import PicklingError
from types import CodeType
from typing import Any, NamedTuple, Protocol

import anndata as ad
import joblib
import numpy as np
import pandas as pd
import scanpy as sc
import scvi
from anndata import AnnData
from scipy import sparse
from scvi.utils import track

from spaperb import populations
from spaperb._files import atomic_write
from spaperb._messages import format_list
from spaperb._types import Expression, FloatArray
from spaperb.data import (
    MOST_LOG,
    check_column,
    check_one_stimulus,
    expression_matrix,
    is_log_normalised,
)
from spaperb.evaluation import metrics
from spaperb.evaluation.metrics import HIGHER_IS_BETTER
from spaperb.model import SpaPerbModel
from spaperb.populations import mean_expression

MIN_CELLS = 10
"""Fewer cells in a condition give scores of noise."""

MIN_OTHERS = 3
"""Other perturbations in the context that a prediction is told from; if fewer, other contexts."""
N_SPLITS = 10

FLOOR, CEILING = "floor", "ceiling"
OF_RUN = ["n_control", "n_stimulated", "seconds", "error"]
"""Columns that tell how a fold went."""


class Method(Protocol):
    """Anything that predicts stimulated cells from control cells."""

    @property
    def fit(self) -> Callable[..., Any]:
        """Learn from training cells."""

    def predict(self, adata_control: AnnData) -> np.ndarray:
        """Return predicted expression of control cells, ``(n, G)``."""


class SpaPerb:
    """:class:`spaperb.SpaPerbModel` as a method of the benchmark.

    Parameters
    ----------
    train_kwargs
        Arguments of :meth:`spaperb.SpaPerbModel.train`.
    all_perturbations
        Whether to learn from the other perturbations in the training cells too.
    **model_kwargs
        Arguments of :class:`spaperb.SpaPerbModel`.
    """

    def __init__(
        self,
        train_kwargs: Mapping[str, Any] | None = None,
        all_perturbations: bool = False,
        **model_kwargs: Any,
    ):
        self.train_kwargs = dict(train_kwargs or {})
        self.all_perturbations = all_perturbations
        self.model_kwargs = model_kwargs

    def fit(
        self,
        adata: AnnData,
        *,
        condition_key: str,
        control: Any,
        stimulated: Any | None,
        labels_key: str,
        seed: int,
        **setup: Any,
    ) -> SpaPerb:
        """Set up and train a model; pairs are within ``labels_key``, whatever is held out."""
        with _quiet():
            scvi.settings.seed = seed
        SpaPerbModel.setup_anndata(
            adata,
            condition_key=condition_key,
            control=control,
            stimulated=None if self.all_perturbations else stimulated,
            labels_key=labels_key,
        )
        self.perturbation = stimulated
        self.model = SpaPerbModel(adata, **self.model_kwargs)
        with _quiet():
            self.model.train(**{"enable_progress_bar": False, **self.train_kwargs})
        # Or scvi-tools keeps the cells of every fold until the process ends.
        self.model.deregister_manager(adata)
        return self

    def predict(self, adata_control: AnnData) -> np.ndarray:
        """Predict the control cells."""
        return np.asarray(
            self.model.predict_stimulated(adata_control, self.perturbation, inplace=False)
        )


@dataclass(frozen=True)
class Task:
    """What is hidden and how cells are told apart: the arguments of :func:`benchmark`."""

    held_out: str
    condition_key: str
    control: Any
    stimulated: Any | None
    labels_key: str
    n_top_genes: int | None
    n_splits: int
    split_controls: bool = True

    def setup(self, seed: int) -> dict[str, Any]:
        """Keywords of a method's ``fit``."""
        keys = ("held_out", "condition_key", "control", "stimulated", "labels_key")
        return {**{key: getattr(self, key) for key in keys}, "seed": seed}

    def arms(self, adata: AnnData) -> tuple[np.ndarray, np.ndarray]:
        """Masks of the control and of the stimulated cells."""
        condition = adata.obs[self.condition_key].to_numpy()
        is_control = condition == self.control
        return is_control, (
            ~is_control if self.stimulated is None else condition == self.stimulated
        )


class Fold(NamedTuple):
    """One context's cells: what methods may see, and apart from it the hidden cells.

    Attributes
    ----------
    train
        Training cells.
    control
        Control cells of the hidden context, to predict from; they are among ``train``.
    real
        Hidden stimulated cells, ``(n, G)``.
    control_real
        Control cells that the real change is measured from, ``(n, G)``: hidden ones, or those of
        ``control``.
    others
        Real mean changes that the prediction should be told from, ``(n_others, G)``: of the
        context's other perturbations if three or more were measured, else of the other contexts.
    """

    train: AnnData
    control: AnnData
    real: Expression
    control_real: Expression
    others: FloatArray

    def judged(self) -> dict[str, Any]:
        """Keywords of :func:`spaperb.evaluation.metrics.evaluate` beside the cells."""
        return {"control_real": self.control_real, "others": self.others}


def benchmark(
    adata: AnnData,
    methods: Mapping[str, Method],
    *,
    held_out: str = "cell_type",
    condition_key: str = "condition",
    control: Any = "control",
    stimulated: Any | None = None,
    labels_key: str = "cell_type",
    contexts: Sequence[Any] | None = None,
    min_cells: int = 50,
    n_top_genes: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    n_splits: int = N_SPLITS,
    split_controls: bool = True,
    n_jobs: int | None = None,
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """Hide each context's stimulated cells in turn and score every method's prediction of them.

    Parameters
    ----------
    adata
        Cells with log-normalised ``X``. Normalise each cell by itself (to a fixed total), so that
        nothing of the hidden cells is in the others.
    methods
        Methods by name. Each fold trains a deep copy.
    held_out
        Column of ``adata.obs`` with the contexts: cell types, donors, cell lines, ...
    condition_key
        Column of ``adata.obs`` that tells control from stimulated cells.
    control
        Value of control cells in that column.
    stimulated
        Value of stimulated cells; ``None`` if there is only one beside the control. Cells with
        further values stay in the training cells.
    labels_key
        Column of ``adata.obs`` with the cell type.
    contexts
        Contexts to hide; ``None`` for all with at least ``min_cells`` in both conditions.
    min_cells
        Cells in both conditions that a context must have to be hidden by default, at least 10.
    n_top_genes
        Number of genes to keep, the most variable (scanpy's ``"seurat"`` flavour) of the training
        cells of each fold; ``None`` for all.
    seeds
        Seeds; every method is run with each, and each draws the halves of the control cells.
    n_splits
        Random splits of the real cells for the ceiling of each seed.
    split_controls
        Whether half of the hidden context's control cells are kept from the methods, and the real
        change is measured from these. ``False`` takes all of them for both: scores of changes that
        depend on these cells are then too high, those of weak changes most.
    n_jobs
        Folds to run at once, as joblib counts; ``joblib.parallel_config`` chooses where (a dask or
        Ray cluster, say).
    folder
        Folder for one small file a finished fold. A restarted run takes what is there, as long as
        data, task, method and code are the same, and runs the rest; failed folds are run again.
        Code is that of this package and of the file that defines the method.

    Returns
    -------
    pandas.DataFrame
        One row for each context, method, seed and metric: ``context``, ``method``, ``seed``,
        ``metric``, ``value``, ``floor``, ``ceiling``, ``scaled`` (0 at the floor, 1 at the
        ceiling), ``n_control``, ``n_stimulated``, ``seconds`` (training and prediction),
        ``error``. A fold that failed has its error, and NaN for values.

    Raises
    ------
    ValueError
        If columns, conditions or contexts are wrong, a context has fewer than 10 stimulated or 20
        control cells (10 if they are not split), or genes are to be chosen and ``X`` is not
        log-normalised.
    """
    task = Task(
        held_out,
        condition_key,
        control,
        stimulated,
        labels_key,
        n_top_genes,
        n_splits,
        split_controls,
    )
    contexts = list(dict.fromkeys(_contexts(adata, task, contexts, min_cells)))
    seeds = list(dict.fromkeys(int(seed) for seed in seeds))
    chooses = n_top_genes is not None and n_top_genes < adata.n_vars
    if chooses and not is_log_normalised(expression_matrix(adata, None)):
        raise ValueError(
            "`n_top_genes` chooses genes by log-normalised expression, and X holds other values: "
            f"counts, negative ones (as after scaling) or some above {MOST_LOG}. Put "
            "log-normalised expression into X (from raw, say: `adata.X = adata.raw[:, "
            "adata.var_names].X`), or choose the genes before and leave `n_top_genes` out."
        )
    if taken := {FLOOR, CEILING} & set(methods):
        raise ValueError(
            f"These names of methods are taken by the benchmark: {format_list(taken)}."
        )
    cells = _plain(adata, np.ones(adata.n_obs, dtype=bool))
    named: dict[str, Method | None] = {FLOOR: None, CEILING: None, **methods}
    runs = [
        (context, name, method, seed)
        for context in contexts
        for name, method in named.items()
        for seed in seeds
    ]
    files: list[Path | None] = [None] * len(runs)
    if folder is not None:
        everything = [cells.X, dict(cells.layers), cells.obs, cells.var_names.to_numpy()]
        data = joblib.hash([task, *everything])
        keys = {name: _key(name, method, data) for name, method in named.items()}
        files = [_file(folder, keys[name], context, seed) for context, name, _, seed in runs]
    done = [_read(file, *run) for file, run in zip(files, runs, strict=True)]
    todo = [i for i, row in enumerate(done) if row is None]
    rows = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")(
        joblib.delayed(_run)(i, cells, task, *runs[i]) for i in todo
    )
    for i, row in track(rows, description="Folds", total=len(todo), disable=not todo):
        done[i] = row
        _write(row, files[i])
    wide = pd.DataFrame([row for row in done if row is not None])
    return tidy(wide.reindex(columns=["context", "method", "seed", *OF_RUN, *HIGHER_IS_BETTER]))


def tidy(folds: pd.DataFrame) -> pd.DataFrame:
    """Give each metric a row, between floor and ceiling.

    Parameters
    ----------
    folds
        A row a fold and a column a metric, with floors and ceilings as methods of their own. Their
        folds are told apart by all columns but metrics, the method, and how the run went.

    Returns
    -------
    pandas.DataFrame
        As :func:`benchmark` returns it.
    """
    names = [name for name in HIGHER_IS_BETTER if name in folds]
    long = folds.melt(id_vars=folds.columns.drop(names), var_name="metric", value_vars=names)
    is_limit = long["method"].isin([FLOOR, CEILING])
    keys = [*folds.columns.drop([*names, "method", *OF_RUN]), "metric"]
    limits = long[is_limit].pivot(index=keys, columns="method", values="value")
    table = long[~is_limit].merge(limits.reset_index(), on=keys, how="left", validate="m:1")
    table["scaled"] = metrics.scaled(table)
    order = ["context", "method", "seed", "metric", "value", "floor", "ceiling", "scaled"]
    return table[[*order, *table.columns.drop(order)]]


def summary(results: pd.DataFrame, value: str = "value") -> pd.DataFrame:
    """Average results over contexts: the mean of each context's median over seeds.

    Parameters
    ----------
    results
        Output of :func:`benchmark`.
    value
        Column to average, ``"value"`` or ``"scaled"``.

    Returns
    -------
    pandas.DataFrame
        For each method and metric ``mean``; ``spread``, the standard deviation over seeds of the
        mean over contexts (NaN with one seed); ``worst`` and ``best``, the lowest and the highest
        of the contexts' medians; ``n_failed``, the folds that failed, which the means leave out.
    """
    keys = ["method", "metric"]
    by_context = results.groupby([*keys, "context"], sort=False)[value].median()
    by_seed = results.groupby([*keys, "seed"], sort=False)[value].mean()
    return pd.DataFrame(
        {
            "mean": by_context.groupby(keys, sort=False).mean(),
            "spread": by_seed.groupby(keys, sort=False).std(),
            "worst": by_context.groupby(keys, sort=False).min(),
            "best": by_context.groupby(keys, sort=False).max(),
            "n_failed": results["error"]
            .notna()
            .groupby([results[k] for k in keys], sort=False)
            .sum(),
        }
    ).reset_index()


def make_fold(adata: AnnData, context: Any, task: Task, seed: int = 0) -> Fold:
    """Split cells into those a method may see and the hidden ones, with genes of the former.

    Parameters
    ----------
    adata
        All cells.
    context
        Context whose stimulated cells are hidden, and half of its control cells.
    task
        The task.
    seed
        Seed of the halves of the control cells.
    """
    is_control, is_stimulated = task.arms(adata)
    in_context = adata.obs[task.held_out].to_numpy() == context
    is_real = in_context & is_stimulated
    is_control_real = np.zeros(adata.n_obs, dtype=bool)
    if task.split_controls:
        order = np.random.default_rng(seed).permutation(np.flatnonzero(in_context & is_control))
        is_control_real[order[: len(order) // 2]] = True
    hidden = is_real | is_control_real
    train = _plain(adata, ~hidden)
    if task.n_top_genes is not None and task.n_top_genes < adata.n_vars:
        chosen = sc.pp.highly_variable_genes(
            train, flavor="seurat", n_top_genes=task.n_top_genes, inplace=False
        )["highly_variable"].to_numpy()
    else:
        chosen = np.ones(adata.n_vars, dtype=bool)
    train = train[:, chosen].copy()
    control = train[(in_context & is_control)[~hidden]].copy()
    x = expression_matrix(adata, None)
    x = x.tocsr() if sparse.issparse(x) else x
    real = x[is_real][:, chosen]
    control_real = x[is_control_real][:, chosen] if task.split_controls else control.X
    return Fold(train, control, real, control_real, _others(train, context, control_real, task))


def _others(train: AnnData, context: Any, control_real: Expression, task: Task) -> FloatArray:
    """Measure changes of other perturbations in the context, or of other contexts."""
    condition = train.obs[task.condition_key].to_numpy()
    of_context = train.obs[task.held_out].to_numpy()
    before = mean_expression(control_real)
    perturbed = [
        (of_context == context) & (condition == name)
        for name in pd.unique(condition[of_context == context])
        if name != task.control
    ]
    others = [
        mean_expression(train.X[cells]) - before for cells in perturbed if cells.sum() >= MIN_CELLS
    ]
    if len(others) < MIN_OTHERS:
        is_control, is_stimulated = task.arms(train)
        arms = [
            (is_control & (of_context == name), is_stimulated & (of_context == name))
            for name in pd.unique(of_context)
            if name != context
        ]
        others = [
            mean_expression(train.X[after]) - mean_expression(train.X[first])
            for first, after in arms
            if min(first.sum(), after.sum()) >= MIN_CELLS
        ]
    return np.array(others).reshape(len(others), train.n_vars)


def _plain(adata: AnnData, rows: np.ndarray) -> AnnData:
    """Copy rows of X, layers and obs; everything else may have been computed with hidden cells."""
    x = expression_matrix(adata, None)
    obs = adata.obs[rows].copy()
    for key in obs.columns[obs.dtypes == "category"]:
        obs[key] = obs[key].cat.remove_unused_categories()
    return ad.AnnData(
        x[rows].tocsr() if sparse.issparse(x) else x[rows].copy(),
        obs=obs,
        var=pd.DataFrame(index=adata.var_names.copy()),
        # anndata 0.13 has X among the layers, named None.
        layers={k: layer[rows].copy() for k, layer in adata.layers.items() if k is not None},
    )


def _contexts(
    adata: AnnData, task: Task, contexts: Sequence[Any] | None, min_cells: int
) -> list[Any]:
    """Contexts to hide, each with enough cells in both conditions."""
    for argument in ("condition_key", "labels_key", "held_out"):
        check_column(adata, argument, getattr(task, argument))
    check_one_stimulus(adata, task.condition_key, task.control, task.stimulated)
    is_control, is_stimulated = task.arms(adata)
    of_context = adata.obs[task.held_out].to_numpy()
    counts = {
        context: (
            int((is_control & (of_context == context)).sum()),
            int((is_stimulated & (of_context == context)).sum()),
        )
        for context in pd.unique(of_context)
    }
    found = format_list([f"{context} {c} and {s}" for context, (c, s) in counts.items()])
    least = MIN_CELLS if contexts is not None else max(min_cells, MIN_CELLS)
    # Half of the control cells are hidden too.
    needed = max(least, 2 * MIN_CELLS) if task.split_controls else least, least

    def is_enough(context: Any) -> bool:
        return all(n >= m for n, m in zip(counts.get(context, (0, 0)), needed, strict=True))

    if contexts is None:
        contexts = sorted(filter(is_enough, counts))
    too_small = [context for context in contexts if not is_enough(context)]
    if too_small or not contexts:
        raise ValueError(
            f"A context needs at least {needed[0]} control and {needed[1]} stimulated cells to be "
            f"hidden, and {format_list(too_small) if too_small else 'every context'} in "
            f"obs[{task.held_out!r}] has fewer. Control and stimulated cells: {found}."
        )
    return list(contexts)


def _run(
    number: int,
    cells: AnnData,
    task: Task,
    context: Any,
    name: str,
    method: Method | None,
    seed: int,
) -> tuple[int, dict[str, Any]]:
    """Run one fold; what goes wrong in it is its result."""
    row: dict[str, Any] = {"context": context, "method": name, "seed": seed}
    try:
        fold = make_fold(cells, context, task, seed)
        row |= {"n_control": fold.control.n_obs, "n_stimulated": fold.real.shape[0]}
        projection = populations.fit_projection(fold.train.X)
        if name == CEILING:
            row |= metrics.ceiling(
                fold.real, fold.control.X, projection, task.n_splits, seed, **fold.judged()
            )
        else:
            start = time.perf_counter()
            predicted = fold.control.X if method is None else _predict(method, fold, task, seed)
            row["seconds"] = time.perf_counter() - start
            row |= metrics.score(predicted, fold.real, fold.control.X, projection, **fold.judged())
    except Exception as error:  # noqa: BLE001  a method may fail in any way, and the others go on
        row["error"] = f"{type(error).__name__}: {error}"
    return number, row


def _predict(method: Method, fold: Fold, task: Task, seed: int) -> np.ndarray:
    """Train a copy of the method on copies of the cells, and check what it predicts."""
    train, control = fold.train.copy(), fold.control.copy()
    with warnings.catch_warnings():
        # Hiding a context's stimulated cells is what we do here.
        warnings.filterwarnings("ignore", message=".*(take no part in training|to train on)")
        fitted = copy.deepcopy(method)
        fitted.fit(train, **task.setup(seed))
        answer = fitted.predict(control)
    if isinstance(answer, AnnData | pd.DataFrame | np.ma.MaskedArray):
        raise TypeError(
            f"predicted {type(answer).__name__}, and an array of cells by genes is needed, in the "
            "order of the control cells"
        )
    predicted = np.asarray(populations.dense(answer))
    expected = (fold.control.n_obs, fold.control.n_vars)
    if predicted.shape != expected:
        raise ValueError(f"predicted an array of shape {predicted.shape} instead of {expected}")
    if not np.isfinite(predicted).all():
        raise ValueError(f"predicted {(~np.isfinite(predicted)).sum()} NaN or infinite values")
    if fold.train.X.min() >= 0 and predicted.min() < 0:
        raise ValueError(
            f"predicted {(predicted < 0).sum()} negative values, down to {predicted.min():.3g}, "
            "for data that have none"
        )
    return predicted


def _key(name: str, method: Method | None, data: str) -> str:
    """Digest of all that a method's folds depend on, but for the context and the seed.

    The data and the task, the method with its arguments, this package with its weights, the code
    that defines the method, and files that it names: other weights. What that code imports from
    elsewhere is not looked at.
    """
    try:
        # Of a copy: what the method did before may have left traces in it.
        parts = [name, copy.deepcopy(method), *_code_of(method, set())]
        return joblib.hash([data, _code_of_package(), *map(joblib.hash, parts)])
    except (PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"The method {name!r} holds what can't be told from another ({error}), so finished "
            "folds can't be kept. Leave `folder` out, or give it no lambdas or local functions."
        ) from error


def _code_of(value: Any, seen: set[int]) -> Iterator[Any]:
    """Code and bytes of files that an attribute of a method adds."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, str | Path):
        # A text that is too long for a path is none.
        with suppress(OSError, ValueError):
            if Path(value).is_file():
                yield Path(value).read_bytes()
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _code_of(item, seen)
    elif hasattr(value, "fit"):
        for cls in type(value).__mro__:
            if cls.__module__.partition(".")[0] not in ("builtins", "typing", "spaperb"):
                yield from _code_of_class(cls)
        yield from _code_of(getattr(value, "__dict__", {}), seen)


def _code_of_class(cls: type) -> Iterator[Any]:
    """File that defines a class, or, as in a notebook, its functions and plain attributes."""
    try:
        yield Path(inspect.getfile(cls)).read_bytes()
    except (OSError, TypeError):
        for name, value in sorted(vars(cls).items()):
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if inspect.isfunction(function):
                yield name, function.__defaults__, *_instructions(function.__code__)
            elif isinstance(value, str | int | float | tuple | list | dict | np.ndarray):
                yield name, value


def _instructions(code: CodeType) -> Iterator[Any]:
    """What code does, without the place where it stands."""
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:
            yield repr(constant)


@functools.cache
def _code_of_package() -> str:
    files = [path for path in sorted(Path(__file__).parents[1].rglob("*")) if path.is_file()]
    return joblib.hash([path.read_bytes() for path in files if path.suffix != ".pyc"])


def _file(folder: str | Path, key: str, context: Any, seed: int) -> Path:
    """File of a finished fold, named after all that its result depends on."""
    return Path(folder) / f"{joblib.hash([key, str(context), seed])}.json"


def _read(
    file: Path | None, context: Any, name: str, method: Method | None, seed: int
) -> dict[str, Any] | None:
    """Result of a fold that was finished without an error, if there is one."""
    if file is None or not file.exists():
        return None
    row = json.loads(file.read_text())
    # Values of NumPy are text in the file.
    return None if row.get("error") else row | {"context": context, "method": name, "seed": seed}


def _write(row: dict[str, Any], file: Path | None) -> None:
    """Write a fold's result whole or not at all."""
    if file is None:
        return
    with atomic_write(file, overwrite=True) as path:
        path.write_text(json.dumps(row, default=str))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's notes on the seed and the machine out of a benchmark's output."""
    loggers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
