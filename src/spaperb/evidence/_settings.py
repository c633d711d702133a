"""Constants that were chosen, in one place: they are saved with what was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What the method takes for given.

    Where a table of ``benchmarks/accuracy/README.md`` chose a value, or tells what it is worth,
    its section is named in brackets. The others are round numbers that were never compared, or
    those of a baseline.

    Attributes
    ----------
    min_cells
        Cells in each condition that measure a change, unless no context has as many ("Few cells").
        In thirds of a context, which training alone looks at, any number does.
    prior_cells, tiny_mean
        The variance of few cells is shrunk as if so many more had been seen, of the usual ratio of
        variance to mean; that ratio is added as if these cells had this mean ("Few cells").
    max_doses
        Doses of one perturbation that are told apart; more are grouped into as many by rank.
    n_components, n_neighbors
        Principal components of control cells, and nearest cells that tell how near contexts are:
        those of the baseline ``knn_shift``.
    temperature
        Of the softmax over correlations, as in the baseline ``similarity_shift``.
    half_weight
        Cells in the smaller condition that give a measured change half of the greatest weight.
    least_share
        Added to prior weights, so that contexts without near cells are not beyond attention.
    other_perturbation
        Log prior of all other perturbations, next to the query's own or its parts ("What was
        tried").
    least_scale, least_error
        Added to the scales of genes, and to standard errors where they weigh: cells that agree by
        chance are not certain. In units of expression.
    max_pieces
        Pieces of evidence that a query is described by, those with the greatest prior weights.
    twins
        Share of the episodes with a near twin in the evidence: another third of the context
        ("What each part is worth").
    measured
        Share of the twin episodes in which the query is told that it is of the measured third's
        context. They teach the networks to improve a measurement.
    all_kept
        Share of the episodes that keep all the evidence they may; others keep some contexts'
        ("What each part is worth", "What was tried").
    pull
        Held-out changes that weigh as much as the pull of the share of trained against pretrained
        networks to a half ("What was tried").
    max_errors
        Standard errors that a measured change is shrunk by at most ("Measured contexts").
    state_cells, max_states
        Control cells of a state of a context, and states of a context at most ("Cells that respond
        differently").
    max_references
        Stimulated populations that tell of zeros, those with the greatest weights.
    high_distance
        Larger distances are warned of; 1 is the largest of a training context from the others.
    low_likeness
        Cells of a known name that are less like those of training are warned of.
    least_apart
        Least squared distance to the nearest other context, over the sum of squares of the
        context's gene means around their mean. The types of Kang et al. are at 0.13 to 0.4.
    n_deviations
        Standard deviations of sampling noise that cells of a known name may be off. Donors of one
        type in Kang et al. then have a likeness of 0.83 to 1.
    """

    min_cells: int = 5
    prior_cells: float = 10.0
    tiny_mean: float = 0.01
    max_doses: int = 10
    n_components: int = 30
    n_neighbors: int = 50
    temperature: float = 0.03
    half_weight: float = 30.0
    least_share: float = 1e-3
    other_perturbation: float = -4.0
    least_scale: float = 0.05
    least_error: float = 0.03
    max_pieces: int = 32
    twins: float = 0.3
    measured: float = 0.25
    all_kept: float = 0.5
    pull: float = 6.0
    max_errors: float = 2.5
    state_cells: int = 40
    max_states: int = 8
    max_references: int = 30
    high_distance: float = 1.25
    low_likeness: float = 0.75
    least_apart: float = 0.1
    n_deviations: float = 2.0


DEFAULT = Settings()
