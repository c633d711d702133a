"""What is known of contexts (cell types, say): moments of their cells, measured shifts, neighbours in control space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse
from scvi.utils import track
from sklearn.decomposition import PCA

from spaperb._types import Expression, FloatArray, IntArray
from spaperb.pairing import CONTROL, STIMULATED
from spaperb.populations import Profile, dense, mean_expression, neighbour_shares, variance

N_COMPONENTS = 30
N_NEIGHBORS = 50
MIN_MEASURED = 3
"""Fewer cells in a condition measure no shift, unless there are no better contexts: one has no variance at all."""
EXACT_VALUES = 1_000_000
"""Values of control cells, dense, up to which components are computed exactly: within a second."""
SAME = 1e-12
"""Cells whose variance is less, in squares of the mean, are the same."""
MAX_CELLS = 1000
"""Control cells of a context that nearness is judged by: more change nothing and cost time."""
HALF_WEIGHT = 30
"""Cells in the smaller condition that give a measured shift half of the greatest weight."""
PRIOR_CELLS = 10
"""Cells that what other contexts say of a variance counts as."""
TINY_MEAN = 0.01
"""Mean that the usual ratio of variance to mean counts as, in each of these cells."""
MANY_CELLS = 300_000
"""Measuring so many takes more than a few seconds, and shows progress."""
LEAST_APART = 0.1
"""Contexts are never taken for nearer, in squared distances over those of a context's genes from their mean: the
types of Kang et al. are 0.13 to 0.4 from the nearest other one."""
N_DEVIATIONS = 2.0
"""Standard deviations of sampling noise that cells may be off. Donors of one type in Kang et al. then have a likeness of 0.83 to 1."""
TINY = 1e-9
MAX_DOSES = 10
"""Doses of one perturbation that are told apart; more are grouped into as many by rank."""


class Treatment(NamedTuple):
    """What was measured of one perturbation (at one dose), in P *paired* contexts.

    A context is paired if both conditions have at least three cells. Its *shift* is the mean of its stimulated cells minus
    the mean of its control cells. Where batches are registered it is measured within each batch, and
    averaged with the weights n m / (n + m) of n control and m stimulated cells.

    Attributes
    ----------
    perturbation
        Number of the perturbation.
    dose
        Its dose, ``None`` without doses.
    paired
        Numbers of the paired contexts, ``(P,)``.
    stimulated
        Profile of each one's stimulated cells, ``P`` of them.
    shifts
        Shift of each, ``(P, G)``.
    variances
        Sampling variance of each shift, ``(P, G)``.
    n
        Cells in the smaller condition of each, ``(P,)``.
    """

    perturbation: int
    dose: float | None
    paired: IntArray
    stimulated: list[Profile]
    shifts: FloatArray
    variances: FloatArray
    n: IntArray

    @property
    def weights(self) -> FloatArray:
        """Weight of each shift, ``(P,)``."""
        return weight_of(self.n)


def weight_of(n: IntArray) -> FloatArray:
    """Weight of a shift that was measured with n cells."""
    return n / (n + HALF_WEIGHT)


class Measured(NamedTuple):
    """Control and stimulated cells of one context, by batch, and the share of each batch in the shift."""

    by_control: list[Profile]
    by_stimulated: list[Profile]
    shares: FloatArray

    @property
    def stimulated(self) -> Profile:
        """Profile of the stimulated cells."""
        return Profile.mixed(self.by_stimulated, self.shares)

    @property
    def control(self) -> Profile:
        """Profile of the control cells."""
        return Profile.mixed(self.by_control, self.shares)

    @property
    def shift(self) -> FloatArray:
        """Shift, ``(G,)``."""
        return self.stimulated.mean - self.control.mean

    @property
    def n(self) -> int:
        """Cells in the smaller condition."""
        return min(
            sum(p.n for p in profiles) for profiles in (self.by_control, self.by_stimulated)
        )


class Noise(NamedTuple):
    """How the variance of a gene's cells goes with their mean, for groups too small to tell their own.

    The variance of n cells is shrunk towards ``ratio`` times their mean, and that mean towards that of the
    control cells: as if PRIOR_CELLS more cells had been seen. Few cells happen not to show many genes at all, and these are not
    certain. Where expression is negative, variance has nothing to do with the mean, and ``ratio`` is the variance itself.
    """

    ratio: FloatArray
    has_mean: bool

    @classmethod
    def of(cls, profiles: list[Profile]) -> Noise:
        """Pool the control cells of all contexts."""
        has_mean = all((p.mean >= 0).all() for p in profiles)
        squares = np.sum([p.n * p.variance for p in profiles], axis=0)
        degrees = np.array([max(p.n - 1, 0) for p in profiles])
        total = degrees @ np.array(
            [p.mean if has_mean else np.ones_like(p.mean) for p in profiles]
        )
        # A gene that no control cell shows varies as the others do.
        usual = squares.sum() / max(total.sum(), TINY)
        ratio = (squares + PRIOR_CELLS * TINY_MEAN * usual) / (total + PRIOR_CELLS * TINY_MEAN)
        return cls(ratio, has_mean)

    def variance_of_shift(self, measured: Measured) -> FloatArray:
        """Sampling variance of a measured shift, ``(G,)``."""
        of_arms = [
            self._of_mean(batches, measured.shares, measured.control.mean)
            for batches in (measured.by_control, measured.by_stimulated)
        ]
        return np.sum(of_arms, axis=0)

    def _of_mean(
        self, batches: list[Profile], shares: FloatArray, expected: FloatArray
    ) -> FloatArray:
        """Sampling variance of the mean of cells in batches, whose cells vary alike, ``(G,)``."""
        n = np.array([p.n for p in batches])
        mean = (n @ np.array([p.mean for p in batches]) + PRIOR_CELLS * expected) / (
            n.sum() + PRIOR_CELLS
        )
        prior = self.ratio * (mean if self.has_mean else 1.0)
        squares = n @ np.array([p.variance for p in batches])
        variance = (squares + PRIOR_CELLS * prior) / ((n - 1).sum() + PRIOR_CELLS)
        return (shares**2 / n).sum() * variance


@dataclass
class Contexts:
    """Contexts of the training cells that have control cells, K of them, and what was measured there.

    Attributes
    ----------
    names
        Names of the contexts, those with a measured shift first, ``(K,)``.
    control
        Profile of each context's control cells, ``K`` of them.
    treatments
        What was measured of each perturbation and dose.
    center, components
        Mean and principal components of the control cells, ``(G,)`` and ``(n_components, G)``.
    cells
        Components of the control cells of each context, ``K`` arrays ``(n, n_components)``.
    """

    names: list[Any]
    control: list[Profile]
    treatments: list[Treatment]
    center: FloatArray
    components: FloatArray
    cells: list[FloatArray]

    @classmethod
    def of(
        cls,
        x: Expression,
        arms: IntArray,
        labels: IntArray,
        names: list[Any],
        batches: IntArray | None = None,
        doses: FloatArray | None = None,
        counts: Expression | None = None,
    ) -> Contexts:
        """Measure the contexts of training cells.

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
        counts
            Raw counts, ``(n, G)``.
        """
        cells = _Cells(
            x, counts, arms, labels, np.zeros_like(arms) if batches is None else batches
        )
        treated = [
            (perturbation, dose, cells.paired(rows))
            for perturbation, dose, rows in _treatments(arms, doses)
        ]
        with_control = np.unique(labels[arms == CONTROL])
        is_paired = np.isin(with_control, [code for *_, paired in treated for code in paired])
        codes = np.concatenate([with_control[is_paired], with_control[~is_paired]])
        numbers = {code: k for k, code in enumerate(codes)}

        rng = np.random.default_rng(0)
        control = [np.flatnonzero((labels == c) & (arms == CONTROL)) for c in codes]
        rows = [np.sort(rng.permutation(r)[:MAX_CELLS]) for r in control]
        # Sparse and double, whatever the expression is: in single precision its layout chooses other nearest cells.
        some = sparse.csr_matrix(x[np.concatenate(rows)], dtype=np.float64)
        # No more components than the data have, so that tiny data have at least one.
        n_components = max(1, min(N_COMPONENTS, min(some.shape) - 1))
        # ARPACK finds no component of cells that are all the same but for rounding, and makes up those that cells of a lower
        # rank lack anew each time, so that chance says which of equally near cells are the nearest.
        is_same = variance(some).max() <= SAME * (mean_expression(some) ** 2).max()
        is_small = n_components == min(some.shape) or math.prod(some.shape) <= EXACT_VALUES
        solver = "full" if is_same or is_small else "arpack"
        pca = PCA(n_components, svd_solver=solver, random_state=0)
        pca.fit(some if solver == "arpack" else dense(some))
        profiles = [cells.control_profile(r) for r in control]
        noise = Noise.of(profiles)
        contexts = cls(
            names=[names[c] for c in codes],
            control=profiles,
            treatments=[
                cells.measure(perturbation, dose, paired, numbers, noise)
                for perturbation, dose, paired in treated
                if paired
            ],
            center=pca.mean_,
            components=pca.components_,
            cells=[],
        )
        contexts.cells = [contexts.project(x[r]) for r in rows]
        return contexts

    def without(self, context: int, perturbation: int | None) -> Contexts:
        """Forget what was measured of a perturbation in a context, or all that was measured there."""

        def rest(treatment: Treatment) -> Treatment:
            kept = np.flatnonzero(treatment.paired != context)
            return treatment._replace(
                stimulated=[treatment.stimulated[i] for i in kept],
                **{
                    name: getattr(treatment, name)[kept]
                    for name in ("paired", "shifts", "variances", "n")
                },
            )

        treatments = [
            rest(t) if perturbation is None or t.perturbation == perturbation else t
            for t in self.treatments
        ]
        return replace(self, treatments=[t for t in treatments if len(t.paired)])

    def likeness(self, profile: Profile, k: int) -> float:
        """How far control cells are those of context ``k``, in [0, 1].

        1 where sampling noise explains all that their means differ by, 0 where they are as far from it as the
        nearest other context, or farther.

        Parameters
        ----------
        profile
            Profile of the control cells.
        k
            Number of the context.
        """
        own = self.control[k]
        centred = own.mean - own.mean.mean()
        others = [c for i, c in enumerate(self.control) if i != k]
        nearest = min((_square(c, own)[0] for c in others), default=0.0)
        reference = max(nearest, LEAST_APART * (centred**2).sum(), TINY)
        square, deviation = _square(profile, own)
        return float(np.clip(1 - (square - N_DEVIATIONS * deviation) / reference, 0, 1))

    def project(self, cells: Expression) -> FloatArray:
        """Components of cells ``(n, G)``, ``(n, n_components)``."""
        return (dense(cells).astype(np.float64) - self.center) @ self.components.T

    def neighbours(self, cells: npt.NDArray, among: IntArray) -> FloatArray:
        """Share of each context ``among`` some in the nearest control cells, ``(len(among),)``.

        Parameters
        ----------
        cells
            Components of the cells whose neighbours are sought, ``(n, n_components)``.
        among
            Numbers of the contexts that may be neighbours.
        """
        return self._shares(cells, among).mean(axis=0)

    def assign(self, cells: npt.NDArray) -> IntArray:
        """Context that most of each cell's nearest control cells belong to, ``(n,)``."""
        return self._shares(cells, np.arange(len(self.cells))).argmax(axis=1)

    def _shares(self, cells: npt.NDArray, among: IntArray) -> FloatArray:
        reference = [self.cells[k] for k in among]
        sizes = [len(cells) for cells in reference]
        # No more neighbours than a usual context has cells, or small contexts drown in large ones.
        n_neighbors = max(1, min(N_NEIGHBORS, int(np.median(sizes))))
        owner = np.repeat(np.arange(len(among)), sizes)
        return neighbour_shares(cells, np.concatenate(reference), owner, len(among), n_neighbors)

    def to_state(self) -> dict[str, Any]:
        """Arrays and lists that :meth:`from_state` takes, to be saved with a model."""
        return {
            **vars(self),
            "control": [tuple(profile) for profile in self.control],
            "treatments": [
                {**t._asdict(), "stimulated": [tuple(profile) for profile in t.stimulated]}
                for t in self.treatments
            ],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Contexts:
        """Restore what :meth:`to_state` gave."""
        treatments = [
            Treatment(**{**t, "stimulated": [Profile(*profile) for profile in t["stimulated"]]})
            for t in state["treatments"]
        ]
        control = [Profile(*profile) for profile in state["control"]]
        return cls(**{**state, "control": control, "treatments": treatments})


def distance(a: Profile, b: Profile) -> float:
    """Distance of two means, less what sampling noise adds to it, but not less than noise can tell."""
    noise = (a.variance / a.n).sum() + (b.variance / b.n).sum()
    return math.sqrt(max(((a.mean - b.mean) ** 2).sum() - noise, noise, TINY))


def _square(a: Profile, b: Profile) -> tuple[float, float]:
    """Squared distance of two means less the sampling noise in it, and the standard deviation of that."""
    # A few cells have no variance of their own to speak of, and the other population lends its.
    variance = (a.n * a.variance + b.n * b.variance) / max(a.n + b.n - 2, 1)
    noise = variance * (1 / a.n + 1 / b.n)
    square = ((a.mean - b.mean) ** 2).sum() - noise.sum()
    return float(square), math.sqrt(2 * (noise**2).sum())


@dataclass
class _Cells:
    """Training cells, to be measured context by context and within batches."""

    x: Expression
    counts: Expression | None
    arms: IntArray
    labels: IntArray
    batches: IntArray

    def __post_init__(self) -> None:
        is_control = np.flatnonzero(self.arms == CONTROL)
        self.control = {
            group: is_control[rows]
            for group, rows in _groups(self.labels[is_control], self.batches[is_control])
        }
        self.control_profiles: dict[tuple[int, int], Profile] = {}

    def paired(self, stimulated: IntArray) -> dict[int, dict[int, IntArray]]:
        """Stimulated cells of each paired context, by batch, of batches that have control cells."""
        by_context: dict[int, dict[int, IntArray]] = {}
        for group, rows in _groups(self.labels[stimulated], self.batches[stimulated]):
            if group in self.control:
                by_context.setdefault(group[0], {})[group[1]] = stimulated[rows]
        sizes = {
            code: min(
                sum(len(self.control[code, batch]) for batch in by_batch),
                sum(map(len, by_batch.values())),
            )
            for code, by_batch in by_context.items()
        }
        least = min(MIN_MEASURED, max(sizes.values(), default=0))
        return {code: rows for code, rows in by_context.items() if sizes[code] >= least}

    def measure(
        self,
        perturbation: int,
        dose: float | None,
        paired: dict[int, dict[int, IntArray]],
        numbers: dict[int, int],
        noise: Noise,
    ) -> Treatment:
        """Measure the shift of each paired context."""
        is_short = self.x.shape[0] < MANY_CELLS or len(paired) < 2
        by_context = track(paired.items(), description="Measuring contexts", disable=is_short)
        measured = [self._measure(code, by_batch) for code, by_batch in by_context]
        return Treatment(
            perturbation,
            dose,
            np.array([numbers[code] for code in paired]),
            [m.stimulated for m in measured],
            np.array([m.shift for m in measured]),
            np.array([noise.variance_of_shift(m) for m in measured]),
            np.array([m.n for m in measured]),
        )

    def _measure(self, code: int, by_batch: dict[int, IntArray]) -> Measured:
        control = [self.control_profile(self.control[code, batch]) for batch in by_batch]
        stimulated = [
            Profile.of(self.x[rows], None if self.counts is None else self.counts[rows])
            for rows in by_batch.values()
        ]
        n_c, n_s = (np.array([p.n for p in profiles]) for profiles in (control, stimulated))
        shares = n_c * n_s / (n_c + n_s)
        return Measured(control, stimulated, shares / shares.sum())

    def control_profile(self, rows: IntArray) -> Profile:
        """Profile of control cells, measured once: without batches a context is its only batch."""
        key = int(rows[0]), len(rows)
        if key not in self.control_profiles:
            self.control_profiles[key] = Profile.of(self.x[rows])
        return self.control_profiles[key]


def _groups(*keys: IntArray) -> Iterator[tuple[tuple[int, ...], IntArray]]:
    """Combinations of keys in ascending order, and the positions that have them."""
    groups = pd.DataFrame(dict(enumerate(keys))).groupby(list(range(len(keys)))).indices
    for group in sorted(groups):
        yield tuple(int(key) for key in group), groups[group]


def _treatments(
    arms: IntArray, doses: FloatArray | None
) -> Iterator[tuple[int, float | None, IntArray]]:
    """Each perturbation, or each of its doses: its number, dose, and cells."""
    stimulated = np.flatnonzero(arms >= STIMULATED)
    for perturbation, of_perturbation in pd.Series(stimulated).groupby(
        arms[stimulated] - STIMULATED
    ):
        rows = of_perturbation.to_numpy()
        if doses is None:
            yield int(perturbation), None, rows
            continue
        levels = doses[rows]
        if len(np.unique(levels)) > MAX_DOSES:
            ranks = pd.qcut(levels, MAX_DOSES, labels=False, duplicates="drop")
            levels = pd.Series(levels).groupby(ranks).transform("median").to_numpy()
        for level in np.unique(levels):
            yield int(perturbation), float(level), rows[levels == level]
