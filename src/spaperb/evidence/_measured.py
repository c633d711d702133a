"""Control populations of contexts and of their random halves, and their measured changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spaperb._types import Expression, FloatArray, IntArray
from spaperb.contexts import MAX_CELLS, PRIOR_CELLS, Contexts, Noise
from spaperb.pairing import CONTROL
from spaperb.populations import Profile, dense

WHOLE = 0
"""The half of a population that is no half."""
LEAST_MEAN = 0.05
"""Added to means before their logarithm: genes that are hardly seen are then alike."""
LEAST_SQUARE = 1e-8


class Populations(NamedTuple):
    """Control cells of contexts, P populations: whole contexts first, then random halves.

    Attributes
    ----------
    context
        Number of each one's context, ``(P,)``.
    half
        0 for a whole context, 1 or 2 for a half of it, ``(P,)``.
    mean, detection, error
        Mean expression, fraction of cells that express, and standard error of the mean, ``(P, G)``.
    cells
        Principal components of some control cells of each, ``P`` arrays ``(n, n_components)``.
    correlation
        Correlation of the means of any two, ``(P, P)``.
    """

    context: IntArray
    half: IntArray
    mean: FloatArray
    detection: FloatArray
    error: FloatArray
    cells: list[FloatArray]
    correlation: FloatArray


class Changes(NamedTuple):
    """Measured changes, S of them: those of whole contexts first, those of halves after them.

    Attributes
    ----------
    population
        Number of the control population that each was measured in, ``(S,)``.
    perturbation
        Number of its perturbation, ``(S,)``.
    dose
        Its dose, ``(S,)``; NaN without doses.
    n
        Cells in the smaller condition, ``(S,)``.
    shift, error
        Mean of stimulated minus mean of control cells, and its standard error, ``(S, G)``.
    mean, detection, mean_error
        Mean expression and detection of the stimulated cells, and the mean's standard error, ``(S,
        G)``.
    """

    population: IntArray
    perturbation: IntArray
    dose: FloatArray
    n: IntArray
    shift: FloatArray
    error: FloatArray
    mean: FloatArray
    detection: FloatArray
    mean_error: FloatArray


@dataclass(frozen=True)
class Evidence:
    """All that was measured in one data set.

    Attributes
    ----------
    names
        Names of the contexts, ``(K,)``; population ``k`` is context ``k`` as a whole.
    parts
        For each perturbation the numbers of those that it combines, its own if it is single.
    populations
        The control populations.
    changes
        The measured changes.
    center, components
        Mean and principal components of the control cells, ``(G,)`` and ``(n_components, G)``.
    ratio, has_mean
        How variances go with means, as in :class:`spaperb.contexts.Noise`.
    """

    names: list[Any]
    parts: list[tuple[int, ...]]
    populations: Populations
    changes: Changes
    center: FloatArray
    components: FloatArray
    ratio: FloatArray
    has_mean: bool

    @classmethod
    def of(
        cls,
        x: Expression,
        arms: IntArray,
        labels: IntArray,
        names: list[Any],
        batches: IntArray | None = None,
        doses: FloatArray | None = None,
        parts: list[tuple[int, ...]] | None = None,
        seed: int = 0,
    ) -> Evidence:
        """Measure the changes of training cells, in whole contexts and in random halves of them.

        Parameters
        ----------
        x
            Log-normalised expression, ``(n, G)``.
        arms
            For every cell CONTROL, NEITHER, or STIMULATED plus the number of its perturbation,
            ``(n,)``.
        labels
            For every cell the number of its context, ``(n,)``.
        names
            Names of the contexts by that number.
        batches
            For every cell the number of its batch, ``(n,)``.
        doses
            For every cell its dose, ``(n,)``.
        parts
            For each perturbation the numbers of those that it combines; ``None`` if all are single.
        seed
            Seed of the halves.
        """
        contexts = Contexts.of(x, arms, labels, names, batches, doses)
        half = _halves(arms, labels, batches, seed)
        pairs = [(name, h) for name in names for h in (1, 2)]
        halves = Contexts.of(x, arms, 2 * labels + half, pairs, batches, doses)

        number = {name: k for k, name in enumerate(contexts.names)}
        codes = {name: code for code, name in enumerate(names)}
        noise = Noise.of(contexts.control)
        # The halves' cells by the components of all, so that halves and wholes are near each other.
        rng = np.random.default_rng(seed)
        of_halves = []
        for name, h in halves.names:
            is_member = (labels == codes[name]) & (half == h - 1) & (arms == CONTROL)
            rows = rng.permutation(np.flatnonzero(is_member))[:MAX_CELLS]
            of_halves.append(contexts.project(x[np.sort(rows)]))
        profiles = contexts.control + halves.control
        mean = np.array([p.mean for p in profiles])
        populations = Populations(
            context=np.array(
                [*range(len(contexts.names)), *(number[name] for name, _ in halves.names)]
            ),
            half=np.array([WHOLE] * len(contexts.names) + [h for _, h in halves.names]),
            mean=mean,
            detection=np.array([p.detection for p in profiles]),
            error=np.array([_error_of_mean(p, noise.ratio, noise.has_mean) for p in profiles]),
            cells=contexts.cells + of_halves,
            correlation=correlations(mean, mean),
        )
        n_perturbations = int(max(arms.max(), 0))
        return cls(
            contexts.names,
            [(p,) for p in range(n_perturbations)] if parts is None else parts,
            populations,
            _changes(contexts, halves, noise),
            contexts.center,
            contexts.components,
            noise.ratio,
            noise.has_mean,
        )

    @property
    def n_genes(self) -> int:
        """Number of genes, G."""
        return self.populations.mean.shape[1]

    @property
    def whole(self) -> IntArray:
        """Numbers of the changes of whole contexts."""
        return np.flatnonzero(self.populations.half[self.changes.population] == WHOLE)

    @property
    def mean_square(self) -> float:
        """Mean square of the changes of whole contexts: the unit of this data set's errors."""
        return float(max((self.changes.shift[self.whole] ** 2).mean(), LEAST_SQUARE))

    def without(self, context: int, perturbation: int | None = None) -> Evidence:
        """Forget what was measured in a context: of one perturbation, or everything."""
        changes = self.changes
        forgotten = self.populations.context[changes.population] == context
        if perturbation is not None:
            forgotten &= changes.perturbation == perturbation
        return replace(self, changes=Changes(*(moments[~forgotten] for moments in changes)))

    def project(self, cells: Expression) -> FloatArray:
        """Components of cells ``(n, G)``, ``(n, n_components)``."""
        return (dense(cells) - self.center) @ self.components.T

    def error_of_mean(self, profile: Profile) -> FloatArray:
        """Standard error of the mean of a population, ``(G,)``."""
        return _error_of_mean(profile, self.ratio, self.has_mean)

    def to_state(self) -> dict[str, Any]:
        """Arrays and lists that :meth:`from_state` takes, to be saved with a model."""
        return {
            **vars(self),
            "populations": self.populations._asdict(),
            "changes": self.changes._asdict(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Evidence:
        """Restore what :meth:`to_state` gave."""
        populations, changes = Populations(**state["populations"]), Changes(**state["changes"])
        return cls(**{**state, "populations": populations, "changes": changes})


def _halves(arms: IntArray, labels: IntArray, batches: IntArray | None, seed: int) -> IntArray:
    """Half of each cell, 0 or 1, at random among the cells of its context, condition and batch."""
    rng = np.random.default_rng(seed)
    keys = [arms, labels] if batches is None else [arms, labels, batches]
    order = np.lexsort([rng.random(len(arms)), *keys])
    groups = np.stack(keys)[:, order]
    is_first = np.r_[True, (groups[:, 1:] != groups[:, :-1]).any(axis=0)]
    start = np.maximum.accumulate(np.where(is_first, np.arange(len(arms)), 0))
    half = np.empty(len(arms), dtype=np.int64)
    half[order] = (np.arange(len(arms)) - start) % 2
    return half


def _error_of_mean(profile: Profile, ratio: FloatArray, has_mean: bool) -> FloatArray:
    """Standard error of a mean; a few cells lack a variance and get some of the usual one."""
    usual = ratio * (profile.mean if has_mean else 1.0)
    variance = (profile.n * profile.variance + PRIOR_CELLS * usual) / (
        max(profile.n - 1, 0) + PRIOR_CELLS
    )
    return np.sqrt(variance / profile.n)


def _changes(contexts: Contexts, halves: Contexts, noise: Noise) -> Changes:
    """Changes of whole contexts and of halves, one after the other."""
    pieces = [
        (offset + t.paired[i], t, i)
        for measured, offset in ((contexts, 0), (halves, len(contexts.names)))
        for t in measured.treatments
        for i in range(len(t.paired))
    ]

    def of_cells(moment: str) -> npt.NDArray:
        return np.array([getattr(t.stimulated[i], moment) for _, t, i in pieces])

    return Changes(
        population=np.array([p for p, _, _ in pieces]),
        perturbation=np.array([t.perturbation for _, t, _ in pieces]),
        dose=np.array([np.nan if t.dose is None else t.dose for _, t, _ in pieces]),
        n=np.array([t.n[i] for _, t, i in pieces]),
        shift=np.array([t.shifts[i] for _, t, i in pieces]),
        error=np.sqrt([t.variances[i] for _, t, i in pieces]),
        mean=of_cells("mean"),
        detection=of_cells("detection"),
        mean_error=np.array(
            [_error_of_mean(t.stimulated[i], noise.ratio, noise.has_mean) for _, t, i in pieces]
        ),
    )


def correlations(a: FloatArray, b: FloatArray) -> FloatArray:
    """Pearson correlation of each row of ``a`` with each of ``b``; 0 for constant rows."""

    def unit(x: FloatArray) -> FloatArray:
        centred = x - x.mean(axis=1, keepdims=True)
        norm = np.linalg.norm(centred, axis=1, keepdims=True)
        return np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 1e-12)

    return unit(a) @ unit(b).T


def log_level(mean: FloatArray) -> FloatArray:
    """Logarithm of a mean, with a sign where expression is scaled and means are negative."""
    size = np.log(np.abs(mean) + LEAST_MEAN) - np.log(LEAST_MEAN)
    return np.sign(mean) * size + np.log(LEAST_MEAN)
