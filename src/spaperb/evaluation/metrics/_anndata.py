"""Predicted and real cells of several perturbations in two AnnData, as cell-eval takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from spaperb._messages import format_list
from spaperb._types import Expression
from spaperb.data import MOST_LOG, check_column, expression_matrix, is_log_normalised
from spaperb.evaluation.metrics._evaluate import N_SPLITS, check_populations, evaluate
from spaperb.populations import Projection, fit_projection, mean_expression

PERTURBATION_KEY = "target"
CONTROL = "non-targeting"


def as_anndata(
    predicted: Mapping[str, Expression],
    real: Mapping[str, Expression],
    control: Expression,
    control_real: Expression | None = None,
    *,
    var_names: Sequence[str],
    perturbation_key: str = PERTURBATION_KEY,
    control_name: str = CONTROL,
) -> tuple[AnnData, AnnData]:
    """Put cells into the two AnnData that cell-eval compares; write them with ``write_h5ad``.

    Parameters
    ----------
    predicted
        Predicted cells of each perturbation, ``(n, G)``, log-normalised.
    real
        Real cells of the same perturbations.
    control
        Control cells that were predicted from.
    control_real
        Control cells beside the real ones; ``None`` takes ``control`` for both.
    var_names
        Names of the genes.
    perturbation_key
        Column of ``obs`` for the perturbation; the default is cell-eval's.
    control_name
        Value of control cells in that column.

    Returns
    -------
    tuple of AnnData
        Predicted and real cells, each with its control cells.

    Raises
    ------
    ValueError
        If the perturbations differ, one has the name of the control, the genes differ, or values
        are not finite.

    References
    ----------
    https://github.com/ArcInstitute/cell-eval2
    """
    _check_same(set(predicted), set(real))
    if control_name in predicted:
        raise ValueError(
            f"A perturbation has the name of the control cells, {control_name!r}. Choose another "
            "`control_name`."
        )
    control_real = control if control_real is None else control_real
    sides = []
    for cells, before in ((predicted, control), (real, control_real)):
        populations = {control_name: before, **cells}
        check_populations(populations)
        matrices = [sparse.csr_matrix(x) for x in populations.values()]
        names = np.repeat(list(populations), [x.shape[0] for x in matrices])
        side = ad.AnnData(
            sparse.vstack(matrices, format="csr"),
            obs=pd.DataFrame(
                {perturbation_key: pd.Categorical(names)},
                index=[f"cell_{i}" for i in range(len(names))],
            ),
            var=pd.DataFrame(index=pd.Index(var_names, dtype=str)),
        )
        sides.append(side)
    return sides[0], sides[1]


def evaluate_anndata(
    predicted: AnnData,
    real: AnnData,
    *,
    perturbation_key: str = PERTURBATION_KEY,
    control: Any = CONTROL,
    projection: Projection | None = None,
    n_splits: int = N_SPLITS,
    seed: int = 0,
) -> pd.DataFrame:
    """Score every perturbation of two AnnData, as cell-eval takes them.

    The changes of the other perturbations are those that each prediction should be told from
    (``others`` of :func:`evaluate`).

    Parameters
    ----------
    predicted
        Predicted cells of all perturbations and the control cells that they were predicted from,
        log-normalised in ``X``.
    real
        Real cells of the same perturbations, and control cells: others than those of
        ``predicted``, or the sampling noise of the control cells is in both changes.
    perturbation_key
        Column of ``obs`` with the perturbation.
    control
        Value of control cells in that column.
    projection
        Components for distances; ``None`` fits them to all real cells. Better fit them to the
        cells that the model was trained on.
    n_splits, seed
        As for :func:`evaluate`.

    Returns
    -------
    pandas.DataFrame
        ``perturbation``, and the columns of :func:`evaluate`.

    Raises
    ------
    ValueError
        If a column or the control cells are missing, perturbations or genes differ, or ``X`` is
        not log-normalised. The order of genes may differ.
    """
    conditions = []
    for name, adata in (("predicted", predicted), ("real", real)):
        check_column(adata, "perturbation_key", perturbation_key)
        condition = adata.obs[perturbation_key].astype(str).to_numpy()
        if str(control) not in condition:
            raise ValueError(
                f"No cell of `{name}` has {control!r} in obs[{perturbation_key!r}]. Name the "
                "control cells by `control`."
            )
        if not is_log_normalised(expression_matrix(adata, None)):
            raise ValueError(
                f"X of `{name}` is not log-normalised: it holds counts, negative values or some "
                f"above {MOST_LOG}. Put log-normalised expression into X on both sides."
            )
        conditions.append(condition)
    of_predicted, of_real = conditions
    _check_same(set(of_predicted), set(of_real))
    _check_same(set(predicted.var_names), set(real.var_names), "genes")
    x = _by_rows(predicted)[:, predicted.var_names.get_indexer(real.var_names)]
    x_real = _by_rows(real)
    projection = fit_projection(x_real) if projection is None else projection
    before, before_real = x[of_predicted == str(control)], x_real[of_real == str(control)]
    names = sorted(set(of_real) - {str(control)})
    if not names:
        raise ValueError(f"All cells are control cells, {control!r}: there is nothing to judge.")
    changes = np.array([mean_expression(x_real[of_real == name]) for name in names])
    changes -= mean_expression(before_real)
    tables = [
        evaluate(
            x[of_predicted == name],
            x_real[of_real == name],
            before,
            projection,
            n_splits,
            seed,
            control_real=before_real,
            others=np.delete(changes, i, axis=0) if len(names) > 1 else None,
        ).assign(perturbation=name)
        for i, name in enumerate(names)
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[["perturbation", *table.columns.drop("perturbation")]]


def _by_rows(adata: AnnData) -> Expression:
    x = expression_matrix(adata, None)
    return x.tocsr() if sparse.issparse(x) else x


def _check_same(predicted: set[str], real: set[str], what: str = "perturbations") -> None:
    if predicted != real:
        found = [
            f"{format_list(some)} only among the {side} ones"
            for side, some in (("predicted", predicted - real), ("real", real - predicted))
            if some
        ]
        raise ValueError(f"Predicted and real {what} must be the same: {'; '.join(found)}.")
