"""The inputs of the networks: how evidence relates to a query, and what it says of genes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse
from scipy.special import log_softmax, logsumexp, softmax

from spaperb._types import FloatArray, IntArray
from spaperb.evidence._measured import Evidence, correlations, log_mean
from spaperb.populations import Pseudobulk

RELATIONS = (
    "share of the nearest control cells",
    "correlation of control means",
    "n / (n + 30)",
    "same context",
    "same perturbation",
    "part of the combination",
    "log ratio of doses",
)
STATE_FEATURES = (
    "log mean",
    "detection",
    "error of the mean / c",
    "prior mean / c",
    "mean / c",
    "deviation / c",
    "precise mean / c",
    "mean of other perturbations here / c",
    "log c",
)
EVIDENCE_FEATURES = (
    "shift / c",
    "error / c",
    "log fold change",
    "log mean",
    "detection",
    "log mean less the query's",
    "detection less the query's",
)
ERROR = EVIDENCE_FEATURES.index("error / c")
TINY = 1e-300
NO_TARGET = -1
"""In place of the number of a perturbation that is not asked for."""
NEW = -1
"""In place of the number of a perturbation that was never measured."""


class ContextQuery(NamedTuple):
    """Control cells whose change is asked for, and the perturbation.

    Attributes
    ----------
    mean, detection, error
        Of the control cells, as in :class:`Populations`, ``(G,)``.
    cells
        Principal components of control cells, ``(n, n_components)``.
    correlation
        Correlation of their mean with that of each control population of the evidence, ``(P,)``.
    context
        Number of the context whose name they have, ``None`` for a new one.
    likeness
        How far they are that context's cells, in [0, 1].
    parts
        Numbers of the perturbations asked for: one, or those of a combination.
    perturbation
        Number of the perturbation or of the combination, ``None`` if it was never measured.
    dose
        Dose asked for; NaN without doses.
    features
        Standardised features of a perturbation that was never measured, ``(d,)``.
    """

    mean: FloatArray
    detection: FloatArray
    error: FloatArray
    cells: FloatArray
    correlation: FloatArray
    context: int | None
    likeness: float
    parts: tuple[int, ...]
    perturbation: int | None
    dose: float = np.nan
    features: FloatArray | None = None

    @classmethod
    def of(
        cls,
        evidence: Evidence,
        pseudobulk: Pseudobulk,
        cells: FloatArray,
        parts: tuple[int, ...],
        perturbation: int | None,
        dose: float = np.nan,
        context: int | None = None,
        likeness: float = 1.0,
        features: FloatArray | None = None,
    ) -> ContextQuery:
        """Ask for cells that may be new, by their pseudobulk and components."""
        return cls(
            mean=pseudobulk.mean,
            detection=pseudobulk.detection,
            error=evidence.error_of_mean(pseudobulk),
            cells=cells,
            correlation=correlations(pseudobulk.mean[None], evidence.populations.mean)[0],
            context=context,
            likeness=likeness,
            parts=parts,
            perturbation=perturbation,
            dose=dose,
            features=features,
        )

    @classmethod
    def of_change(
        cls, evidence: Evidence, s: int, population: int | None = None, is_known: bool = True
    ) -> ContextQuery:
        """Ask for a measured change, in its population or another one."""
        changes = evidence.changes
        if population is None:
            population = int(changes.population[s])
        perturbation, dose = int(changes.perturbation[s]), float(changes.dose[s])
        return cls.of_population(evidence, population, perturbation, dose, is_known)

    @classmethod
    def of_population(
        cls,
        evidence: Evidence,
        population: int,
        perturbation: int,
        dose: float = np.nan,
        is_known: bool = True,
    ) -> ContextQuery:
        """Ask for a population of the evidence; ``is_known`` tells which context it is of."""
        p = evidence.populations
        return cls(
            mean=p.mean[population],
            detection=p.detection[population],
            error=p.error[population],
            cells=p.cells[population],
            correlation=p.correlation[population],
            context=int(p.context[population]) if is_known else None,
            likeness=1.0,
            parts=evidence.parts[perturbation],
            perturbation=perturbation,
            dose=dose,
        )


class Pieces(NamedTuple):
    """Evidence that a query may be described by, M pieces of S measured changes.

    A piece is a measured change, or what features make of those of one context.

    Attributes
    ----------
    shares
        Shares of the changes in each piece, ``(M, S)``.
    population
        Number of its control population, ``(M,)``.
    perturbation
        Number of its perturbation; that of the query (or NEW) where features tell, ``(M,)``.
    dose
        Its dose, NaN without doses, ``(M,)``.
    n
        Cells in the smaller condition, ``(M,)``.
    likeness
        1 for a measured change; where features tell, how much they do, ``(M,)``.
    is_told
        Whether features tell, ``(M,)``.
    """

    shares: sparse.csr_matrix
    population: IntArray
    perturbation: IntArray
    dose: FloatArray
    n: FloatArray
    likeness: FloatArray
    is_told: npt.NDArray[np.bool_]

    @classmethod
    def measured(cls, evidence: Evidence, kept: IntArray) -> Pieces:
        """Take measured changes, a piece each."""
        changes, m = evidence.changes, len(kept)
        shape = (m, len(changes.population))
        return cls(
            sparse.csr_matrix((np.ones(m), (np.arange(m), kept)), shape),
            changes.population[kept],
            changes.perturbation[kept],
            changes.dose[kept],
            changes.n[kept].astype(np.float64),
            np.ones(m),
            np.zeros(m, dtype=bool),
        )

    @classmethod
    def told(cls, evidence: Evidence, query: ContextQuery, kept: IntArray) -> list[Pieces]:
        """What features tell of a perturbation in each context where others were measured."""
        changes = evidence.changes
        # A perturbation that is left out takes no part in what is learned of features either.
        features, asked = evidence.features_without(query.perturbation), query.features
        if asked is None and features is not None and query.perturbation is not None:
            asked = features.values[query.perturbation]
        if features is None or asked is None or not np.isfinite(asked).all():
            return []
        pieces = []
        for population in np.unique(changes.population[kept]):
            here = kept[changes.population[kept] == population]
            numbers = np.unique(changes.perturbation[here])
            of_dose = sparse.csr_matrix(_dose_shares_of(evidence, query, here, numbers))
            n = of_dose @ changes.n[here].astype(np.float64)
            reliability = n / (n + evidence.settings.half_weight)
            known, weights = features.weights(asked, numbers, reliability)
            if not len(known):
                continue
            shares = sparse.csr_matrix(weights @ of_dose[known])
            columns, shape = here[shares.indices], (1, len(changes.population))
            pieces.append(
                cls(
                    sparse.csr_matrix((shares.data, columns, [0, len(columns)]), shape),
                    np.array([population]),
                    np.array([NEW if query.perturbation is None else query.perturbation]),
                    np.array([query.dose]),
                    np.array([1 / (weights**2 / n[known]).sum()]),
                    np.array([features.skill]),
                    np.array([True]),
                )
            )
        return pieces

    @classmethod
    def of(cls, evidence: Evidence, query: ContextQuery, kept: IntArray) -> Pieces:
        """Take changes, and what features tell if none is of the perturbation or its parts."""
        measured = cls.measured(evidence, kept)
        targets = [*query.parts, NEW if query.perturbation is None else query.perturbation]
        if np.isin(measured.perturbation, targets).any():
            return measured
        shares, *others = zip(measured, *cls.told(evidence, query, kept), strict=True)
        columns: list[Any] = [np.concatenate(column) for column in others]
        return cls(sparse.vstack(shares, format="csr"), *columns)

    def take(self, some: IntArray) -> Pieces:
        """Take some of the pieces."""
        columns: list[Any] = [x[some] for x in self]
        return Pieces(*columns)


class Relation(NamedTuple):
    """How M pieces of evidence relate to a query.

    Attributes
    ----------
    kept
        Numbers of the changes that they are made of, ``(n,)``.
    shares
        Shares of these in each piece, ``(M, n)``.
    population
        Number of the control population of each piece, ``(M,)``.
    perturbation
        Number of its perturbation, ``(M,)``.
    is_told
        Whether features tell it, ``(M,)``.
    relations
        r, ``(M, n_relations)``.
    log_prior
        Logarithm of the prior weights, which add up to 1, ``(M,)``.
    by_target
        Weights by perturbation and dose alone, which add up to 1, ``(M,)``.
    factor
        What a shift is multiplied by: shifts of the parts of a combination add up, ``(M,)``.
    here
        Mean shift of other perturbations in the query's context, ``(G,)``.
    """

    kept: IntArray
    shares: sparse.csr_matrix
    population: IntArray
    perturbation: IntArray
    is_told: npt.NDArray[np.bool_]
    relations: FloatArray
    log_prior: FloatArray
    by_target: FloatArray
    factor: FloatArray
    here: FloatArray


class Description(NamedTuple):
    """What the networks are given of a query: M pieces of evidence, G genes.

    Attributes
    ----------
    state
        u, ``(G, n_state)``.
    pieces
        x, ``(M, G, n_evidence)``.
    relations
        r, ``(M, n_relations)``.
    log_prior
        Logarithm of the prior weights, which add up to 1, ``(M,)``.
    shifts
        Shifts of the evidence, ``(M, G)``.
    scale
        c, the scale of each gene's change, ``(G,)``.
    """

    state: FloatArray
    pieces: FloatArray
    relations: FloatArray
    log_prior: FloatArray
    shifts: FloatArray
    scale: FloatArray


def describe(
    evidence: Evidence, query: ContextQuery, kept: IntArray, genes: IntArray | slice = slice(None)
) -> Description:
    """Describe a query by some of the evidence, and by nothing else.

    Parameters
    ----------
    evidence
        What was measured.
    query
        What is asked for.
    kept
        Numbers of the changes that may be used, ``(n,)``, at least one.
    genes
        Genes to describe; relations are of all genes, whichever these are.
    """
    return describe_related(evidence, query, relate(evidence, query, kept), genes)


def describe_related(
    evidence: Evidence,
    query: ContextQuery,
    relation: Relation,
    genes: IntArray | slice = slice(None),
) -> Description:
    """Describe a query whose relations to the evidence are known."""
    changes, populations = evidence.changes, evidence.populations
    kept, shares, of, _, is_told, relations, log_prior, by_target, factor, here = relation
    shift, stimulated = (
        shares @ moments[kept][:, genes] for moments in (changes.shift, changes.mean)
    )
    square = shares.power(2) @ changes.error[kept][:, genes] ** 2
    if is_told.any() and (features := evidence.features_without(query.perturbation)) is not None:
        square = square + is_told[:, None] * features.error[genes] ** 2
    shifts, errors = factor[:, None] * shift, factor[:, None] * np.sqrt(square)
    unit = evidence.unit
    scale = np.abs(shifts).max(axis=0) + evidence.settings.least_scale * unit
    before = stimulated - shift
    of_control = log_mean(populations.mean[of][:, genes], unit)
    detection = populations.detection[of][:, genes]
    log_mean_q, detection_q = log_mean(query.mean[genes], unit), query.detection[genes]
    pieces = np.stack(
        [
            shifts / scale,
            errors / scale,
            # Of the control cells that the shift was measured against, batch by batch.
            log_mean(stimulated, unit) - log_mean(before, unit),
            of_control,
            detection,
            of_control - log_mean_q,
            detection - detection_q,
        ],
        axis=-1,
    )
    mean = by_target @ shifts
    precise = by_target[:, None] / (errors + evidence.settings.least_error * unit) ** 2
    summaries = [
        np.exp(log_prior) @ shifts / scale,
        mean / scale,
        np.sqrt(by_target @ (shifts - mean) ** 2) / scale,
        (precise * shifts).sum(axis=0) / precise.sum(axis=0) / scale,
        here[genes] / scale,
        np.log(scale / unit),
    ]
    state = np.column_stack([log_mean_q, detection_q, query.error[genes] / scale, *summaries])
    return Description(state, pieces, relations, log_prior, shifts, scale)


def agreement(description: Description, perturbation: IntArray) -> tuple[FloatArray, FloatArray]:
    """Square of the mean of the evidence, and mean of its squares, errors among them, ``(G,)``.

    Weights are the prior ones. The ratio is 1 where all pieces say the same and are sure of it,
    and near 0 where they cancel, or are noise. Parts of a combination need not say the same: each
    perturbation is compared with itself.

    Parameters
    ----------
    description
        The query, described by M pieces of evidence.
    perturbation
        Number of the perturbation of each, ``(M,)``.
    """
    weights, shifts = np.exp(description.log_prior), description.shifts
    errors = description.pieces[..., ERROR] * description.scale
    agreed = np.zeros(shifts.shape[1])
    for p in np.unique(perturbation):
        of = perturbation == p
        agreed += (weights[of] @ shifts[of]) ** 2 / max(weights[of].sum(), TINY)
    return agreed, weights @ (shifts**2 + errors**2)


def state_after(
    description: Description,
    mean: FloatArray,
    detection: FloatArray,
    error: FloatArray,
    unit: float,
) -> FloatArray:
    """State of the query once stimulated: u with stimulated in place of control cells."""
    after = description.state.copy()
    after[:, 0], after[:, 1] = log_mean(mean, unit), detection
    after[:, 2] = error / description.scale
    return after


def relate(evidence: Evidence, query: ContextQuery, kept: IntArray) -> Relation:
    """Relate pieces of evidence to a query, a limited number of them.

    The prior weight of a piece is half the share of its context's cells among the query's nearest,
    half the softmax of correlations. With w = likeness n / (n + 30), pieces of the query's own
    context get share + (1 - share) w, and those of other contexts on the same perturbation are
    multiplied by 1 - w. Other perturbations have a small share together. Between two doses weights
    go by their logarithms, and the parts of a combination have equal weights. What features tell
    of a perturbation counts as that perturbation.
    """
    settings = evidence.settings
    here = others_here(evidence, query, kept)
    pieces = Pieces.of(evidence, query, kept)
    of, inverse = np.unique(pieces.population, return_inverse=True)
    near, correlation = evidence.neighbours(query.cells, of), query.correlation[of]
    similar = softmax(correlation / settings.temperature)
    perturbation, doses = pieces.perturbation, pieces.dose
    is_same = perturbation == (NEW if query.perturbation is None else query.perturbation)
    is_part = np.isin(perturbation, query.parts) & ~is_same
    is_target = is_same | is_part
    context = evidence.populations.context[pieces.population]
    is_here = context == (-1 if query.context is None else query.context)
    reliability = pieces.n / (pieces.n + settings.half_weight)
    has_dose = (doses > 0) & (query.dose > 0)
    log_ratio = np.log(np.divide(query.dose, doses, out=np.ones_like(doses), where=has_dose))
    relations = np.column_stack(
        [
            near[inverse],
            correlation[inverse],
            reliability,
            query.likeness * is_here,
            pieces.likeness * is_same,
            is_part,
            log_ratio,
        ]
    )
    share = ((near + similar) / 2)[inverse]
    own = query.likeness * is_here * reliability
    taken = max(own[is_target], default=0.0)
    share = np.where(is_here, share + (1 - share) * own, share * (1 - taken * is_target))
    by_target = log_dose_weights(perturbation, doses, query.dose, settings.least_share)
    log_prior = np.log(share + settings.least_share) + by_target

    some = foremost(log_prior, np.where(is_target, perturbation, NO_TARGET), settings.max_pieces)
    pieces, relations = pieces.take(some), relations[some]
    perturbation, doses = perturbation[some], doses[some]
    is_target, is_part = is_target[some], is_part[some]
    log_prior, by_target = (
        balanced(
            weights[some],
            perturbation,
            is_target,
            is_part,
            query.parts,
            settings.other_perturbation,
        )
        for weights in (log_prior, by_target)
    )
    factor = np.where(is_part, float(len(query.parts)), 1.0)
    for p in np.unique(perturbation[is_part & (doses > 0)]) if query.dose > 0 else []:
        # Below the lowest dose of a part its change falls to nothing in proportion.
        of = is_part & (doses > 0) & (perturbation == p)
        factor[of] *= min(1.0, query.dose / doses[of].min())
    kept = pd.unique(pieces.shares.indices)
    return Relation(
        kept=kept,
        shares=pieces.shares[:, kept],
        population=pieces.population,
        perturbation=perturbation,
        is_told=pieces.is_told,
        relations=relations,
        log_prior=log_softmax(log_prior),
        by_target=softmax(by_target),
        factor=factor,
        here=here,
    )


def balanced(
    log_weights: FloatArray,
    perturbation: IntArray,
    is_target: npt.NDArray[np.bool_],
    is_part: npt.NDArray[np.bool_],
    parts: tuple[int, ...],
    log_others: float,
) -> FloatArray:
    """Logarithms of weights, balanced between perturbations, ``(M,)``.

    All other perturbations together have a small share, however many they are; each part of a
    combination has as much to say as the others, however often it was measured.
    """
    weights = log_weights.copy()
    if is_target.any() and not is_target.all():
        of_target, of_others = logsumexp(weights[is_target]), logsumexp(weights[~is_target])
        weights[~is_target] += of_target + log_others - of_others
    pieces = {int(p): is_part & (perturbation == p) for p in np.unique(perturbation[is_part])}
    totals = {p: logsumexp(weights[of]) for p, of in pieces.items()}
    for p, of in pieces.items():
        weights[of] += np.mean(list(totals.values())) - totals[p] + np.log(parts.count(p))
    return weights


def foremost(log_prior: FloatArray, target: IntArray, n: int) -> IntArray:
    """Positions of the n pieces with the greatest weights, in their order.

    Each part of a combination gets as many places, however often it was measured; other
    perturbations fill the rest.
    """
    if len(target) <= n:
        return np.arange(len(target))
    rank = pd.Series(-log_prior).groupby(target).rank("first").to_numpy()
    return np.sort(np.lexsort((-log_prior, rank, target == NO_TARGET))[:n])


def log_dose_weights(
    perturbation: IntArray, doses: FloatArray, dose: float, least: float
) -> FloatArray:
    """Logarithm of the weight of each piece by its dose, ``(M,)``; 0 without doses.

    Of each perturbation's doses the two that the dose asked for lies between share the weight, by
    logarithm; beyond them the nearest has all of it.
    """
    weights = np.ones(len(doses))
    if not dose > 0:
        return np.zeros(len(doses))
    for p in np.unique(perturbation):
        of = np.flatnonzero((perturbation == p) & (doses > 0))
        levels = np.unique(doses[of])
        if len(levels):
            weights[of] = dose_shares(levels, dose)[np.searchsorted(levels, doses[of])]
    return np.log(np.maximum(weights, least))


def _dose_shares_of(
    evidence: Evidence, query: ContextQuery, here: IntArray, numbers: IntArray
) -> FloatArray:
    """Share of each change of a context in its perturbation at the query's dose, (n, M)."""
    perturbation, doses = evidence.changes.perturbation[here], evidence.changes.dose[here]
    weights = np.exp(log_dose_weights(perturbation, doses, query.dose, TINY))
    is_of = perturbation == numbers[:, None]
    of = weights * is_of
    lowest = np.where(is_of & (doses > 0), doses, np.inf).min(axis=1, keepdims=True)
    # Below its lowest dose a change falls to nothing in proportion.
    factor = np.minimum(1.0, query.dose / lowest) if query.dose > 0 else 1.0
    return np.where(np.isfinite(lowest), factor, 1.0) * of / of.sum(axis=1, keepdims=True)


def dose_shares(levels: FloatArray, dose: float) -> FloatArray:
    """Shares of measured doses, in ascending order, in a dose: by logarithm, ``(n_levels,)``."""
    at = np.log(np.clip(dose, levels[0], levels[-1]))
    return np.array([np.interp(at, np.log(levels), e) for e in np.eye(len(levels))])


def others_here(evidence: Evidence, query: ContextQuery, kept: IntArray) -> FloatArray:
    """Mean shift of other perturbations in the query's context, times `likeness`, ``(G,)``."""
    is_here = evidence.context[kept] == (-1 if query.context is None else query.context)
    asked, perturbation = set(query.parts), evidence.changes.perturbation
    others = [s for s in kept[is_here] if asked.isdisjoint(evidence.parts[perturbation[s]])]
    if not others:
        return np.zeros(evidence.n_genes)
    return query.likeness * evidence.changes.shift[others].mean(axis=0)


def shrunk(
    measured: FloatArray, error: FloatArray, towards: FloatArray, max_errors: float
) -> FloatArray:
    """Shrink a measured change, ``(G,)``, as far as its standard errors leave room.

    By the factor of James and Stein, and no gene by more than ``max_errors`` standard
    errors.
    """
    distance = max(((towards - measured) ** 2).sum(), TINY)
    moved = min(1.0, (error**2).sum() / distance) * (towards - measured)
    return measured + np.clip(moved, -max_errors * error, max_errors * error)
