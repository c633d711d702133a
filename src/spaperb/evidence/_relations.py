"""The inputs of the networks: how evidence relates to a query, and what it says of genes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, softmax

from spaperb._types import FloatArray, IntArray
from spaperb.contexts import HALF_WEIGHT, N_NEIGHBORS
from spaperb.evidence._measured import Evidence, correlations, log_level
from spaperb.populations import Profile

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
    "log level",
    "detection",
    "error of the mean / c",
    "prior mean / c",
    "mean / c",
    "deviation / c",
    "precise mean / c",
    "log c",
)
EVIDENCE_FEATURES = (
    "shift / c",
    "error / c",
    "log fold change",
    "log level",
    "detection",
    "log level less the query's",
    "detection less the query's",
)
TEMPERATURE = 0.03
"""Of the softmax over correlations, as in the baseline ``similarity_shift``."""
LEAST_SCALE = 0.05
LEAST_SHARE = 1e-3
"""Added to prior weights, so that contexts without near cells are not beyond attention."""
OTHER_PERTURBATION = -4.0
"""Log prior of other perturbations, next to the query's own or a part of it."""
LEAST_ERROR = 0.03
"""Added to standard errors where they weigh: cells that agree by chance are not certain."""


class Query(NamedTuple):
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
        Number of the context that they are known to belong to, ``None`` for a new one.
    parts
        Numbers of the perturbations asked for: one, or those of a combination.
    perturbation
        Number of the perturbation or of the combination, ``None`` if it was never measured.
    dose
        Dose asked for; NaN without doses.
    """

    mean: FloatArray
    detection: FloatArray
    error: FloatArray
    cells: FloatArray
    correlation: FloatArray
    context: int | None
    parts: tuple[int, ...]
    perturbation: int | None
    dose: float = np.nan

    @classmethod
    def of(
        cls,
        evidence: Evidence,
        profile: Profile,
        cells: FloatArray,
        parts: tuple[int, ...],
        perturbation: int | None,
        dose: float = np.nan,
        context: int | None = None,
    ) -> Query:
        """Ask for cells that may be new: their profile and components (``Evidence.project``)."""
        return cls(
            profile.mean,
            profile.detection,
            evidence.error_of_mean(profile),
            cells,
            correlations(profile.mean[None], evidence.populations.mean)[0],
            context,
            parts,
            perturbation,
            dose,
        )

    @classmethod
    def of_population(
        cls,
        evidence: Evidence,
        population: int,
        perturbation: int,
        dose: float = np.nan,
        is_known: bool = True,
    ) -> Query:
        """Ask for a population of the evidence; ``is_known`` tells which context it is of."""
        p = evidence.populations
        return cls(
            p.mean[population],
            p.detection[population],
            p.error[population],
            p.cells[population],
            p.correlation[population],
            int(p.context[population]) if is_known else None,
            evidence.parts[perturbation],
            perturbation,
            dose,
        )


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
    evidence: Evidence, query: Query, kept: IntArray, genes: IntArray | slice = slice(None)
) -> Description:
    """Describe a query by some of the evidence, and by nothing else.

    Parameters
    ----------
    evidence
        What was measured.
    query
        What is asked for.
    kept
        Numbers of the changes that may be used, ``(M,)``.
    genes
        Genes to describe; relations are of all genes, whichever these are.
    """
    changes, populations = evidence.changes, evidence.populations
    of = changes.population[kept]
    relations, log_prior, of_target = relate(evidence, query, kept)
    shifts, errors = changes.shift[kept][:, genes], changes.error[kept][:, genes]
    stimulated = changes.mean[kept][:, genes]
    scale = np.abs(shifts).max(axis=0) + LEAST_SCALE
    level, detection = (
        log_level(populations.mean[of][:, genes]),
        populations.detection[of][:, genes],
    )
    level_q, detection_q = log_level(query.mean[genes]), query.detection[genes]
    pieces = np.stack(
        [
            shifts / scale,
            errors / scale,
            # Of the control cells that the shift was measured against, batch by batch.
            log_level(stimulated) - log_level(stimulated - shifts),
            level,
            detection,
            level - level_q,
            detection - detection_q,
        ],
        axis=-1,
    )
    mean = of_target @ shifts
    precise = of_target[:, None] / (errors + LEAST_ERROR) ** 2
    summaries = [
        np.exp(log_prior) @ shifts / scale,
        mean / scale,
        np.sqrt(of_target @ (shifts - mean) ** 2) / scale,
        (precise * shifts).sum(axis=0) / precise.sum(axis=0) / scale,
        np.log(scale),
    ]
    state = np.column_stack([level_q, detection_q, query.error[genes] / scale, *summaries])
    return Description(state, pieces, relations, log_prior, shifts, scale)


def state_after(
    description: Description, mean: FloatArray, detection: FloatArray, error: FloatArray
) -> FloatArray:
    """State of the query once stimulated: u with stimulated in place of control cells."""
    after = description.state.copy()
    after[:, 0], after[:, 1], after[:, 2] = log_level(mean), detection, error / description.scale
    return after


def relate(
    evidence: Evidence, query: Query, kept: IntArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Relate pieces of evidence to a query.

    Returns
    -------
    tuple of numpy.ndarray
        r, ``(M, n_relations)``; log prior, ``(M,)``; weights by perturbation and dose alone,
        ``(M,)``.
    """
    changes = evidence.changes
    of, inverse = np.unique(changes.population[kept], return_inverse=True)
    near, correlation = nearest_shares(evidence, query, of), query.correlation[of]
    alike = softmax(correlation / TEMPERATURE)
    context = evidence.populations.context[of][inverse]
    perturbation = changes.perturbation[kept]
    is_same = perturbation == (-1 if query.perturbation is None else query.perturbation)
    is_part = np.isin(perturbation, query.parts) & ~is_same
    doses = changes.dose[kept]
    has_dose = (doses > 0) & (query.dose > 0)
    log_ratio = np.log(np.divide(query.dose, doses, out=np.ones_like(doses), where=has_dose))
    relations = np.column_stack(
        [
            near[inverse],
            correlation[inverse],
            changes.n[kept] / (changes.n[kept] + HALF_WEIGHT),
            context == (-1 if query.context is None else query.context),
            is_same,
            is_part,
            log_ratio,
        ]
    )
    by_target = np.where(is_same | is_part, 0.0, OTHER_PERTURBATION) - np.abs(log_ratio)
    by_context = np.log((near + alike) / 2 + LEAST_SHARE)[inverse]
    return relations, log_softmax(by_context + by_target), softmax(by_target)


def nearest_shares(evidence: Evidence, query: Query, among: IntArray) -> FloatArray:
    """Share of each of some populations in the query's nearest cells, ``(len(among),)``."""
    cells = [evidence.populations.cells[p] for p in among]
    sizes = np.array([len(c) for c in cells])
    reference = np.concatenate(cells)
    # No more neighbours than a usual population has cells, or small ones drown in large ones.
    n = max(1, min(N_NEIGHBORS, int(np.median(sizes))))
    if n >= len(reference):
        return sizes / sizes.sum()
    # Squared distances less the query's own square, which changes no order.
    squares = (reference**2).sum(axis=1) - 2 * query.cells @ reference.T
    nearest = np.argpartition(squares, n - 1, axis=1)[:, :n]
    owner = np.repeat(np.arange(len(among)), sizes)[nearest]
    return np.bincount(owner.ravel(), minlength=len(among)) / owner.size
