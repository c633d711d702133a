"""The response table: which genes change in which cells, by how much, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from spaperb._messages import warn
from spaperb._types import IntArray
from spaperb.cells import Survey
from spaperb.data import Query, Scale, check_column
from spaperb.model._base import SpaPerbBase
from spaperb.model._contexts import ContextChange, populations_of, some_of
from spaperb.populations import Pseudobulk

MAX_CELLS = 10_000
"""Cells of a group that its means are taken from."""
TINY = 1e-300
PSEUDOCOUNT = 1e-6
"""Share of the target sum added to both means of a fold change: 0.01 counts per 10,000."""


class ResponseMixin(SpaPerbBase):
    """Tell which genes respond."""

    def predict_response(
        self,
        adata: AnnData | None = None,
        perturbation: Any | None = None,
        dose: float | None = None,
        *,
        groupby: str | None = None,
        confidence_level: float = 0.9,
        features: Any | None = None,
    ) -> pd.DataFrame:
        """Tell which genes change in which cells, by how much, and how sure that is.

        Parameters
        ----------
        adata
            Cells as for :meth:`predict_stimulated`; ``None`` for the AnnData of the model. Where
            the condition column is there and a group has control cells, only these are taken.
        perturbation, dose
            As for :meth:`predict_stimulated`.
        groupby
            Column of ``adata.obs`` with the groups; ``None`` for the cell type's, or for the types
            that cells without such a column are taken for.
        confidence_level
            Share of genes whose mean change an interval should contain, in (0, 1).
        features
            As for :meth:`predict_stimulated`.

        Returns
        -------
        pandas.DataFrame
            One row a group and gene, the surest changes of a group first:

            - ``group``, ``gene``
            - ``mean_control``, ``mean_change``: log-normalised units
            - ``lower``, ``upper``: interval of the mean change that an experiment with as many
              stimulated as there are control cells would find
            - ``log2_fold_change``: of the means, transformed back with the base of the training
              cells, and 0.01 counts per 10,000 added to each: a millionth of the target sum that
              these were normalised to. If genes were dropped since, that is taken for 10,000 or,
              if larger, what the largest cell adds up to
            - ``score``: mean change over half the interval's width; beyond 1 or -1 the interval
              leaves out 0. For ``gseapy.prerank`` or ``decoupler``
            - ``responding``: fraction of cells that begin or cease to express the gene or, if
              their mean where expressed changes by more than 0.1, express it
            - ``agreement``: how far the measured changes that a prediction rests on say the same,
              in [0, 1]: the square of their mean over the mean of their squares, with their
              standard errors among these. Near 0 they cancel, or are noise, and the direction is a
              guess. Where one context counts it tells how sure that one is
            - ``group_agreement``: the same over all genes, sum over sum
            - ``distance``: how far the group's control cells are from training contexts in which
              the perturbation was measured, over the largest such distance of a training context;
              0 where it was measured in the group itself, above 1 beyond what training saw

            Without ``responding`` where training expression is negative (scaled, say), and without
            ``log2_fold_change`` where it is no logarithm; a warning says so.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If ``groupby`` is no column or has no value for some cell, ``confidence_level`` is not
            in (0, 1), the objective is the published one, or :meth:`predict_stimulated` would
            refuse.
        """
        self._check_intervals(confidence_level)
        target = self._target(perturbation, dose, features)
        adata, query = self._query(adata, with_contexts=True)
        learned = self._learned()
        query = learned.assign(query)
        if groupby is None and (key := self._setup["labels_key"]) in adata.obs:
            groupby = key
        if groupby is None:
            names = np.array(query.context_names, dtype=object)[query.context]
        else:
            check_column(adata, "groupby", groupby)
            names = adata.obs[groupby].to_numpy()
        of_group = pd.Series(np.arange(adata.n_obs)).groupby(names).indices
        groups = {
            name: rows[query.is_control[rows]] if query.is_control[rows].any() else rows
            for name, rows in of_group.items()
        }
        survey = Survey.of(query, populations_of(query, np.concatenate(list(groups.values()))))
        changes = learned.changes(survey, target)
        var_names = self.get_var_names().tolist()
        return response_table(
            groups, query, changes, var_names, self.state.scale, confidence_level
        )


def response_table(
    groups: Mapping[Any, IntArray],
    query: Query,
    changes: Mapping[int, ContextChange],
    var_names: Sequence[str],
    scale: Scale,
    confidence_level: float,
) -> pd.DataFrame:
    """Put the changes of groups of cells into a table.

    Parameters
    ----------
    groups
        Rows of the cells of each group. A group of several contexts has the mean of their changes
        and of their half-widths, by its share of cells.
    query
        The cells, with their contexts.
    changes
        Change of each context.
    var_names
        Gene names, ``(G,)``.
    scale
        Scale of the training expression.
    confidence_level
        Confidence level of the intervals, in (0, 1).

    Returns
    -------
    pandas.DataFrame
        See :meth:`spaperb.SpaPerbModel.predict_response`.
    """
    tables, codes = [], query.context
    for name, rows in groups.items():
        table = sum(
            (codes[rows] == code).mean()
            * _columns(
                Pseudobulk.of(query.rows(some_of(rows[codes[rows] == code], MAX_CELLS))),
                changes[int(code)],
                confidence_level,
            )
            for code in np.unique(codes[rows])
        )
        table.insert(0, "gene", np.asarray(var_names))
        table.insert(0, "group", name)
        tables.append(_finished(table, scale))
    if not scale.is_logarithm:
        missing = ["`log2_fold_change`, which transforms logarithms back"]
        if not scale.nonnegative:
            missing.append("`responding`, which takes zeros for silent genes")
        warn(
            f"The table has no column {' and no '.join(missing)}: the training cells look "
            f"{scale}. Train on log-normalised expression to have all columns."
        )
    return pd.concat(tables, ignore_index=True)


def _columns(control: Pseudobulk, change: ContextChange, confidence_level: float) -> pd.DataFrame:
    """What is averaged over the contexts of a group, from its own control cells."""
    return pd.DataFrame(
        {
            "mean_control": control.mean,
            "mean_change": change.mean,
            "half_width": change._replace(control=control).half_width(confidence_level),
            "responding": change.detection.responding(control),
            "agreed": change.agreed,
            "spread": change.spread,
            "distance": change.distance,
        }
    )


def _finished(table: pd.DataFrame, scale: Scale) -> pd.DataFrame:
    """Ends of the intervals, fold changes, and the surest changes first."""
    change, half = table["mean_change"], table.pop("half_width")
    agreed, spread = table.pop("agreed"), table.pop("spread")
    table = table.assign(
        lower=change - half,
        upper=change + half,
        score=np.where(change == 0, 0.0, change / half),
        agreement=np.divide(agreed, spread, out=np.zeros(len(agreed)), where=spread > 0),
        group_agreement=agreed.sum() / max(spread.sum(), TINY),
    )
    order = table["score"].abs().sort_values(ascending=False, kind="stable").index
    names = ["group", "gene", "mean_control", "mean_change", "lower", "upper"]
    if scale.is_logarithm:
        control = table["mean_control"]
        table["log2_fold_change"] = log2_fold_change(control, control + change, scale)
        names.append("log2_fold_change")
    names += ["score", "responding"] if scale.nonnegative else ["score"]
    return table.loc[order, [*names, "agreement", "group_agreement", "distance"]]


def log2_fold_change(before: pd.Series, after: pd.Series, scale: Scale) -> pd.Series:
    """Logarithm to base 2 of the ratio of mean expression, transformed back, after over before.

    Parameters
    ----------
    before, after
        Mean log-normalised expression; what is negative counts as 0.
    scale
        Scale of the expression: the base, and the target sum that the pseudocount is a share of.
    """
    pseudocount = PSEUDOCOUNT * scale.target_sum
    natural = (mean.clip(lower=0) * math.log(scale.base) for mean in (before, after))
    # The logarithm of exp(x) - 1 + pseudocount, of an x too large for an exponential too.
    first, last = (x + np.log1p((pseudocount - 1) * np.exp(-x)) for x in natural)
    return (last - first) / math.log(2)
