"""Evidence: control populations of contexts and of random thirds of them, and measured changes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA

from spaperb._types import CONTROL, NEITHER, STIMULATED, Expression, FloatArray, IntArray
from spaperb.evidence._features import Features
from spaperb.evidence._moments import Measured, Measuring, Noise
from spaperb.evidence._settings import DEFAULT, Settings
from spaperb.populations import Pseudobulk, dense, mean_expression, neighbour_shares, variance

MOMENTS = {"mean", "variance", "detection", "error", "shift", "mean_error", "dispersion"}
"""What is kept in single precision after training."""
WHOLE = 0
"""Value of `third` for a whole context."""
N_THIRDS = 3
MAX_CELLS = 1000
"""Control cells of a context that nearness is judged by: more change nothing and cost time."""
MAX_REFERENCE, MIN_CELLS = 20_000, 50
"""Control cells of all contexts that nearness is judged by, and of each of many contexts."""
EXACT_VALUES = 1_000_000
"""Values of control cells, dense, up to which components are exact: within a second."""
SAME = 1e-12
"""Cells whose variance is less, in squares of the mean, are the same."""
LEAST_MEAN = 0.05
"""Added to means before their logarithm: genes that are hardly seen are then alike."""
LEAST_SQUARE = 1e-8
MIN_DISTANCES = 3
"""Fewer distances of training contexts do not tell what is usual."""
MAX_DISTANCE_VALUES = 10_000_000
"""Distances of cells that are in memory at a time: 80 MB."""
MAX_DISTANCES = 200
"""Measured changes, the first ones, that the largest distance is taken from."""
TINY = 1e-9


class Populations(NamedTuple):
    """Control cells of contexts, P populations: whole contexts first, then random thirds.

    Attributes
    ----------
    context
        Number of each one's context, ``(P,)``.
    third
        0 for a whole context, 1, 2 or 3 for a third of its cells, ``(P,)``.
    n
        Number of cells, ``(P,)``.
    mean, variance, detection, error
        Mean, variance, fraction of cells that express, and standard error of the mean, ``(P, G)``.
    cells
        Principal components of some control cells of each, ``P`` arrays ``(n, n_components)``.
    correlation
        Correlation of the means of any two, ``(P, P)``.
    """

    context: IntArray
    third: IntArray
    n: IntArray
    mean: FloatArray
    variance: FloatArray
    detection: FloatArray
    error: FloatArray
    cells: list[FloatArray]
    correlation: FloatArray

    def pseudobulk(self, p: int) -> Pseudobulk:
        """Pseudobulk of a population, in double precision."""
        mean, variance, detection = (
            x[p].astype(np.float64) for x in (self.mean, self.variance, self.detection)
        )
        return Pseudobulk(mean, variance, detection, int(self.n[p]))


class Changes(NamedTuple):
    """Measured changes, S of them: those of whole contexts first, those of thirds after them.

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
    mean, variance, detection, mean_error
        Mean, variance, detection of the stimulated cells, and the mean's standard error, ``(S,
        G)``; the last is ``(S, 0)`` after training.
    dispersion
        Dispersion of their counts, ``(S, G)``; NaN, or ``(S, 0)``, without counts.
    """

    population: IntArray
    perturbation: IntArray
    dose: FloatArray
    n: IntArray
    shift: FloatArray
    error: FloatArray
    mean: FloatArray
    variance: FloatArray
    detection: FloatArray
    mean_error: FloatArray
    dispersion: FloatArray

    def pseudobulk(self, s: int) -> Pseudobulk:
        """Pseudobulk of the stimulated cells of a change, in double precision."""
        theta = self.dispersion[s].astype(np.float64)
        is_known = theta.size and not np.isnan(theta).any()
        mean, variance, detection = (
            x[s].astype(np.float64) for x in (self.mean, self.variance, self.detection)
        )
        n = int(self.n[s])
        return Pseudobulk(mean, variance, detection, n, theta if is_known else None)


@dataclass(frozen=True)
class Evidence:
    """All that was measured in one data set.

    Attributes
    ----------
    names
        Names of the contexts, those with a measured shift first, ``(K,)``; population ``k`` is
        context ``k`` as a whole.
    parts
        For each perturbation the numbers of those that it combines, its own if it is single.
    populations
        The control populations.
    changes
        The measured changes.
    center, components
        Mean and principal components of the control cells, ``(G,)`` and ``(n_components, G)``.
    ratio, has_mean
        How variances go with means, see ``Noise``.
    unit
        Factor from natural logarithms to those of this data set, one over the logarithm of their
        base. The networks see natural logarithms, whatever the base.
    settings
        Constants that the networks learned with.
    features
        Features of the perturbations, and how changes go with them.
    """

    names: list[Any]
    parts: list[tuple[int, ...]]
    populations: Populations
    changes: Changes
    center: FloatArray
    components: FloatArray
    ratio: FloatArray
    has_mean: bool
    unit: float = 1.0
    settings: Settings = DEFAULT
    features: Features | None = None

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
        parts: list[tuple[int, ...]] | None = None,
        seed: int | None = 0,
        unit: float = 1.0,
        settings: Settings = DEFAULT,
    ) -> Evidence:
        """Measure the changes of training cells, in whole contexts and in random thirds of them.

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
        parts
            For each perturbation the numbers of those that it combines; ``None`` if all are
            single.
        seed
            Seed of the thirds; ``None`` for no thirds.
        unit
            Factor from natural logarithms to those of the expression.
        settings
            Constants.
        """
        wholes = Measuring(x, arms, labels, batches, doses, counts, settings)
        of_wholes = wholes.shifts()
        third = _thirds(arms, labels, batches, seed)
        # Whatever was measured in a context is measured in its thirds, however few their cells.
        some = replace(settings, min_cells=1)
        thirds = Measuring(x, arms, N_THIRDS * labels + third, batches, doses, counts, some)
        is_measured = {(m.code, str(m.perturbation), str(m.dose)) for m in of_wholes}
        if seed is None:
            is_measured = set()
        of_thirds = thirds.shifts(
            lambda code, *treatment: (code // N_THIRDS, *map(str, treatment)) in is_measured
        )

        with_control = np.unique(labels[arms == CONTROL])
        is_paired = np.isin(with_control, [m.code for m in of_wholes])
        codes = np.concatenate([with_control[is_paired], with_control[~is_paired]])
        # Thirds of contexts in which something was measured in a third.
        third_codes = np.unique([m.code for m in of_thirds]).astype(np.int64)
        number = {int(code): k for k, code in enumerate(codes)}

        n_cells = int(np.clip(MAX_REFERENCE // max(len(codes), 1), MIN_CELLS, MAX_CELLS))
        rng = np.random.default_rng(0)
        rows = [np.sort(rng.permutation(wholes.rows(c))[:n_cells]) for c in codes]
        reference = sparse.csr_matrix(x[np.concatenate(rows)], dtype=np.float64)
        pca = _components(reference, settings.n_components)
        rows += [np.sort(rng.permutation(thirds.rows(c))[:n_cells]) for c in third_codes]
        pseudobulks = [wholes.pseudobulk(wholes.rows(c)) for c in codes]
        stimulated = [m.stimulated for m in (*of_wholes, *of_thirds)]
        noise = Noise.of(pseudobulks, stimulated, unit, settings)
        pseudobulks += [thirds.pseudobulk(thirds.rows(c)) for c in third_codes]
        mean = np.array([p.mean for p in pseudobulks])
        populations = Populations(
            context=np.array(
                [*range(len(codes)), *(number[int(c) // N_THIRDS] for c in third_codes)]
            ),
            third=np.concatenate([np.full(len(codes), WHOLE), 1 + third_codes % N_THIRDS]),
            n=np.array([p.n for p in pseudobulks]),
            mean=mean,
            variance=np.array([p.variance for p in pseudobulks]),
            detection=np.array([p.detection for p in pseudobulks]),
            error=np.array([noise.error_of_mean(p) for p in pseudobulks]),
            cells=[(dense(x[r]).astype(np.float64) - pca.mean_) @ pca.components_.T for r in rows],
            correlation=correlations(mean, mean),
        )
        of_third = {int(c): len(codes) + i for i, c in enumerate(third_codes)}
        changes = [(number[m.code], m) for m in of_wholes] + [
            (of_third[m.code], m) for m in of_thirds
        ]
        if parts is None:
            parts = [(p,) for p in range(int(max(arms.max() - STIMULATED + 1, 0)))]
        return cls(
            names=[names[c] for c in codes],
            parts=parts,
            populations=populations,
            changes=_changes(changes, noise, x.shape[1]),
            center=pca.mean_,
            # By rows: ARPACK gives them in reverse, which files do not take.
            components=np.ascontiguousarray(pca.components_),
            ratio=noise.ratio,
            has_mean=noise.has_mean,
            unit=unit,
            settings=settings,
        )

    @property
    def n_genes(self) -> int:
        """Number of genes, G."""
        return self.populations.mean.shape[1]

    @property
    def whole(self) -> IntArray:
        """Numbers of the changes of whole contexts."""
        return np.flatnonzero(self.populations.third[self.changes.population] == WHOLE)

    @property
    def context(self) -> IntArray:
        """Number of the context of each change, ``(S,)``."""
        return self.populations.context[self.changes.population]

    @cached_property
    def thirds(self) -> IntArray:
        """Numbers of each change in the thirds of its context, ``(S, 3)``; -1 for none."""
        changes = self.changes
        doses = np.unique(np.nan_to_num(changes.dose, nan=-1.0), return_inverse=True)[1]
        keys = pd.DataFrame({"k": self.context, "p": changes.perturbation, "d": doses})
        same = keys.groupby(["k", "p", "d"]).ngroup().to_numpy()
        numbers = np.full((same.max(initial=-1) + 1, 1 + N_THIRDS), -1)
        numbers[same, self.populations.third[changes.population]] = np.arange(len(same))
        return numbers[same, 1:]

    @cached_property
    def shown(self) -> IntArray:
        """Numbers of the genes that some cells show; all if there are none."""
        means = (self.populations.mean, self.changes.mean)
        shown = np.flatnonzero(np.any([(mean != 0).any(axis=0) for mean in means], axis=0))
        return shown if len(shown) else np.arange(self.n_genes)

    @property
    def mean_square(self) -> float:
        """Mean square of the changes of whole contexts: the unit of this data set's errors.

        It is that of the genes that some cells show: more silent ones do not count.
        """
        shifts = self.changes.shift[self.whole][:, self.shown]
        return float(max((shifts**2).mean(), LEAST_SQUARE)) if len(shifts) else LEAST_SQUARE

    def keep(self, kept: npt.NDArray[np.bool_] | IntArray) -> Evidence:
        """Forget all changes but some: a mask ``(S,)``, or their numbers."""
        changes = {name: moments[kept] for name, moments in self.changes._asdict().items()}
        return replace(self, changes=Changes(**changes))

    def with_features(self, features: FloatArray) -> Evidence:
        """Learn how changes go with features of the perturbations.

        Parameters
        ----------
        features
            Of each perturbation, ``(P, d)``; NaN for those without.
        """
        changes, whole = self.changes, self.whole
        total = np.zeros((len(features), self.n_genes))
        reliability, n_contexts = np.zeros((2, len(features)))
        known = np.flatnonzero(np.isfinite(features).all(axis=1))
        of, context = changes.perturbation[whole], self.context[whole]
        for k in np.unique(context):
            # Doses are averaged: what counts is how perturbations differ.
            numbers = np.intersect1d(of[context == k], known)
            rows = [whole[(context == k) & (of == p)] for p in numbers]
            means = np.array([changes.shift[r].mean(axis=0) for r in rows])
            n = np.array([changes.n[r].sum() for r in rows])
            if len(numbers) > 1:
                total[numbers] += means - means.mean(axis=0)
                reliability[numbers] += n / (n + self.settings.half_weight)
                n_contexts[numbers] += 1
        with np.errstate(invalid="ignore"):
            means, reliability = total / n_contexts[:, None], reliability / n_contexts
        return replace(self, features=Features.of(features, means, reliability))

    def features_without(self, perturbation: int | None) -> Features | None:
        """What is learned of features without what was measured of a perturbation."""
        if self.features is None or perturbation is None:
            return self.features
        if perturbation not in self._features_without:
            self._features_without[perturbation] = self.features.without(perturbation)
        return self._features_without[perturbation]

    @cached_property
    def _features_without(self) -> dict[int, Features]:
        return {}

    def with_measured(
        self,
        name: Any,
        control: Pseudobulk,
        cells: FloatArray,
        perturbation: int,
        shift: FloatArray,
        dose: float = np.nan,
    ) -> Evidence:
        """Add a change as if it had been measured, with as many stimulated as control cells.

        Parameters
        ----------
        name
            Name of its context, known or new.
        control, cells
            Pseudobulk of the context's control cells, and components of some.
        perturbation, dose
            Number of its perturbation, and its dose.
        shift
            The change, ``(G,)``.
        """
        names, populations = self.names, self.populations
        error = self.error_of_mean(control)
        if name not in names:
            names = [*names, name]
            correlation = correlations(control.mean[None], populations.mean)[0]
            populations = Populations(
                context=np.append(populations.context, len(self.names)),
                third=np.append(populations.third, WHOLE),
                n=np.append(populations.n, control.n),
                mean=np.vstack([populations.mean, control.mean]),
                variance=np.vstack([populations.variance, control.variance]),
                detection=np.vstack([populations.detection, control.detection]),
                error=np.vstack([populations.error, error]),
                cells=[*populations.cells, cells],
                correlation=np.block(
                    [[populations.correlation, correlation[:, None]], [correlation, np.ones(1)]]
                ),
            )
        row = Changes(
            population=np.array(names.index(name)),
            perturbation=np.array(perturbation),
            dose=np.array(dose),
            n=np.array(control.n),
            shift=shift,
            error=np.sqrt(2) * error,
            mean=control.mean + shift,
            variance=control.variance,
            detection=control.detection,
            mean_error=error[: self.changes.mean_error.shape[1]],
            dispersion=np.full(self.changes.dispersion.shape[1], np.nan),
        )
        changes = Changes(
            *(
                np.concatenate([moments, added[None]])
                for moments, added in zip(self.changes, row, strict=True)
            )
        )
        return replace(self, names=names, populations=populations, changes=changes)

    def has_features(self, perturbation: int) -> bool:
        """Whether features of a perturbation are known."""
        return self.features is not None and bool(
            np.isfinite(self.features.values[perturbation]).all()
        )

    def without_thirds(self) -> Evidence:
        """Keep whole contexts alone: thirds are only learned from, and judged by."""
        n = int((self.populations.third == WHOLE).sum())
        populations = {name: x[:n] for name, x in self.populations._asdict().items()}
        populations["correlation"] = populations["correlation"][:, :n]
        return replace(self.keep(self.whole), populations=Populations(**populations))

    def project(self, cells: Expression) -> FloatArray:
        """Components of cells ``(n, G)``, ``(n, n_components)``."""
        return (dense(cells).astype(np.float64) - self.center) @ self.components.T

    def error_of_mean(self, pseudobulk: Pseudobulk) -> FloatArray:
        """Standard error of the mean of a population, ``(G,)``."""
        noise = Noise(self.ratio, self.has_mean, self.settings.prior_cells)
        return noise.error_of_mean(pseudobulk)

    def assign(self, cells: FloatArray) -> IntArray:
        """Context that most of each cell's nearest control cells belong to, ``(n,)``."""
        among = np.arange(len(self.names))
        reference = [self.populations.cells[p] for p in among]
        sizes = [len(c) for c in reference]
        n_neighbors = max(1, min(self.settings.n_neighbors, int(np.median(sizes))))
        owner = np.repeat(among, sizes)
        shares = neighbour_shares(cells, np.concatenate(reference), owner, len(among), n_neighbors)
        return shares.argmax(axis=1)

    def neighbours(self, cells: FloatArray, among: IntArray) -> FloatArray:
        """Share of each of some populations in the nearest control cells, ``(len(among),)``.

        Parameters
        ----------
        cells
            Components of the cells whose neighbours are sought, ``(n, n_components)``.
        among
            Numbers of the populations that may be neighbours.
        """
        sizes = np.array([len(self.populations.cells[p]) for p in among])
        reference = np.concatenate([self.populations.cells[p] for p in among])
        # No more neighbours than a usual context has cells, or small contexts drown in large ones.
        n = max(1, min(self.settings.n_neighbors, int(np.median(sizes))))
        if n >= len(reference):
            return sizes / sizes.sum()
        owner = np.repeat(np.arange(len(among)), sizes)
        total = np.zeros(len(among))
        step = max(1, MAX_DISTANCE_VALUES // len(reference))
        for some in (cells[i : i + step] for i in range(0, len(cells), step)):
            # Squared distances less each cell's own square, which changes no order.
            squares = (reference**2).sum(axis=1) - 2 * some @ reference.T
            nearest = np.argpartition(squares, n - 1, axis=1)[:, :n]
            total += np.bincount(owner[nearest].ravel(), minlength=len(among))
        return total / total.sum()

    def likeness(self, pseudobulk: Pseudobulk, k: int) -> float:
        """How far control cells are those of context ``k``, in [0, 1].

        1 where sampling noise explains all that their means differ by, 0 where they are as far
        from it as the nearest other context, or farther.

        Parameters
        ----------
        pseudobulk
            Pseudobulk of the control cells.
        k
            Number of the context.
        """
        own = self.populations.pseudobulk(k)
        centred = own.mean - own.mean.mean()
        others = [self.populations.pseudobulk(i) for i in range(len(self.names)) if i != k]
        nearest = min((_square(other, own)[0] for other in others), default=0.0)
        reference = max(nearest, self.settings.least_apart * (centred**2).sum(), TINY)
        square, deviation = _square(pseudobulk, own)
        return float(
            np.clip(1 - (square - self.settings.n_deviations * deviation) / reference, 0, 1)
        )

    def distance(
        self,
        pseudobulk: Pseudobulk,
        cells: FloatArray,
        perturbation: int | None,
        besides: int | None = None,
    ) -> float:
        """Distance of control cells from the contexts that a perturbation was measured in.

        That of the mean control expression over all genes, less what sampling noise adds to it; a
        mean over contexts weighted by nearness of cells; infinite if there are none.

        Parameters
        ----------
        pseudobulk
            Pseudobulk of the control cells.
        cells
            Their components, ``(n, n_components)``.
        perturbation
            Number of the perturbation; ``None`` for any.
        besides
            Number of a context to leave out.
        """
        whole = self.whole
        if perturbation is not None:
            whole = whole[self.changes.perturbation[whole] == perturbation]
        among = np.unique(self.changes.population[whole])
        among = among[among != (-1 if besides is None else besides)]
        if not len(among):
            return math.inf
        near = self.neighbours(cells, among)
        return float(near @ [distance(pseudobulk, self.populations.pseudobulk(p)) for p in among])

    def largest_distance(self) -> float:
        """Largest distance of a training context from the others; NaN if they are too few."""
        changes, populations = self.changes, self.populations
        distances = [
            self.distance(
                populations.pseudobulk(k), populations.cells[k], int(changes.perturbation[s]), k
            )
            for s in self.whole[:MAX_DISTANCES]
            for k in [int(changes.population[s])]
        ]
        finite = [d for d in distances if d < math.inf]
        return max(finite) if len(finite) >= MIN_DISTANCES else math.nan

    def compact(self) -> Evidence:
        """Half as large: moments in single precision, without what training alone looks at."""
        changes, populations = self.changes._asdict(), self.populations._asdict()
        none = np.empty((len(self.changes.n), 0))
        changes["mean_error"] = none
        if np.isnan(self.changes.dispersion).all():
            changes["dispersion"] = none
        for moments in (changes, populations):
            for name in MOMENTS & moments.keys():
                moments[name] = moments[name].astype(np.float32)
        features = self.features
        if features is not None:
            features = features._replace(changes=np.empty((len(features.values), 0)))
        return replace(
            self,
            changes=Changes(**changes),
            populations=Populations(**populations),
            features=features,
        )

    def to_plain(self) -> dict[str, Any]:
        """Arrays, lists, numbers and text that :meth:`from_plain` takes."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "settings": asdict(self.settings),
            "parts": [list(parts) for parts in self.parts],
            "populations": self.populations._asdict(),
            "changes": self.changes._asdict(),
            "features": self.features and self.features._asdict(),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Evidence:
        """Restore what :meth:`to_plain` gave."""
        return cls(
            **{
                **plain,
                "settings": Settings(**plain["settings"]),
                "parts": [tuple(parts) for parts in plain["parts"]],
                "populations": Populations(**plain["populations"]),
                "changes": Changes(**plain["changes"]),
                "features": plain["features"] and Features(**plain["features"]),
            }
        )


def _thirds(
    arms: IntArray, labels: IntArray, batches: IntArray | None, seed: int | None
) -> IntArray:
    """Third of each cell, 0 to 2, at random among those of its context, condition and batch."""
    rng = np.random.default_rng(seed)
    batches = np.zeros_like(arms) if batches is None else batches
    keys = [arms, labels, batches]
    # Cells that take no part change nothing of the others' thirds.
    at_random = np.zeros(len(arms))
    at_random[arms != NEITHER] = rng.random((arms != NEITHER).sum())
    order = np.lexsort([at_random, *keys])
    groups = np.stack(keys)[:, order]
    is_first = np.r_[True, (groups[:, 1:] != groups[:, :-1]).any(axis=0)]
    start = np.maximum.accumulate(np.where(is_first, np.arange(len(arms)), 0))
    # A context's batches begin with one third after the other, both conditions of a batch alike:
    # so the few cells of small batches are shared out too.
    used = arms != NEITHER
    first = np.zeros(len(arms), dtype=np.int64)
    first[used] = pd.Series(batches[used]).groupby(labels[used]).rank("dense") - 1
    third = np.empty(len(arms), dtype=np.int64)
    third[order] = (np.arange(len(arms)) - start + first[order]) % N_THIRDS
    return third


def _components(cells: sparse.csr_matrix, n_components: int) -> PCA:
    """Principal components of control cells, ``(n, G)``.

    Sparse and double, whatever the expression is: in single precision its layout chooses other
    nearest cells.
    """
    # No more components than the data have, so that tiny data have at least one.
    n_components = max(1, min(n_components, min(cells.shape) - 1))
    # ARPACK fails on cells that differ only by rounding. Where cells have a low rank it makes up
    # the components that they lack, others each time, so that nearest cells would be random.
    is_same = variance(cells).max() <= SAME * (mean_expression(cells) ** 2).max()
    is_small = n_components == min(cells.shape) or math.prod(cells.shape) <= EXACT_VALUES
    solver = "full" if is_same or is_small else "arpack"
    pca = PCA(n_components, svd_solver=solver, random_state=0)
    return pca.fit(cells if solver == "arpack" else dense(cells))


def _changes(measured: list[tuple[int, Measured]], noise: Noise, n_genes: int) -> Changes:
    """Measured changes and the numbers of their populations, as arrays."""
    stimulated = [m.stimulated for _, m in measured]

    def array(values: list[Any]) -> npt.NDArray:
        return np.array(values).reshape(len(measured), n_genes)

    return Changes(
        population=np.array([p for p, _ in measured], dtype=np.int64),
        perturbation=np.array([m.perturbation for _, m in measured], dtype=np.int64),
        dose=np.array([m.dose for _, m in measured], dtype=np.float64),
        n=np.array([m.n for _, m in measured], dtype=np.int64),
        shift=array([m.shift for _, m in measured]),
        error=array([noise.error_of_shift(m) for _, m in measured]),
        mean=array([p.mean for p in stimulated]),
        variance=array([p.variance for p in stimulated]),
        detection=array([p.detection for p in stimulated]),
        mean_error=array([noise.error_of_mean(p) for p in stimulated]),
        dispersion=array(
            [
                np.full(n_genes, np.nan) if p.dispersion is None else p.dispersion
                for p in stimulated
            ]
        ),
    )


def distance(a: Pseudobulk, b: Pseudobulk) -> float:
    """Distance of two means.

    The expected noise is subtracted from its square, which is never less than that noise.
    """
    noise = (a.variance / a.n).sum() + (b.variance / b.n).sum()
    return math.sqrt(max(((a.mean - b.mean) ** 2).sum() - noise, noise, TINY))


def _square(a: Pseudobulk, b: Pseudobulk) -> tuple[float, float]:
    """Squared distance of two means less the noise in it, and the standard deviation of that."""
    # A few cells have no variance of their own to speak of, and the other population lends its.
    pooled = (a.n * a.variance + b.n * b.variance) / max(a.n + b.n - 2, 1)
    noise = pooled * (1 / a.n + 1 / b.n)
    square = ((a.mean - b.mean) ** 2).sum() - noise.sum()
    return float(square), math.sqrt(2 * (noise**2).sum())


def correlations(a: FloatArray, b: FloatArray) -> FloatArray:
    """Pearson correlation of each row of ``a`` with each of ``b``; 0 for constant rows."""

    def unit(x: FloatArray) -> FloatArray:
        centred = x - x.mean(axis=1, keepdims=True)
        norm = np.linalg.norm(centred, axis=1, keepdims=True)
        return np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 1e-12)

    return unit(a) @ unit(b).T


def log_mean(mean: FloatArray, unit: float = 1.0) -> FloatArray:
    """Logarithm of a mean, with a sign where expression is scaled and means are negative.

    Parameters
    ----------
    mean
        Mean expression.
    unit
        As in :class:`Evidence`.
    """
    mean = mean / unit
    size = np.log(np.abs(mean) + LEAST_MEAN) - np.log(LEAST_MEAN)
    return np.sign(mean) * size + np.log(LEAST_MEAN)
