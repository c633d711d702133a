"""The mean change of a context that was never stimulated, learned across genes.

A handful of contexts is too few to learn from, but every gene of every context is a sample. Each paired
training context is left out in turn and described, gene by gene, by what the *other* contexts say of it
(their changes, weighted in four ways, and the gene's expression here and there); a regression that all
genes share learns the left-out change from that description. Describing the context in question by all
training contexts and applying the regression predicts it: training imitates the test.

With Delta_s the measured shift of context s, v_s its sampling variance, w_s = n_s / (n_s + 30) its weight,
phi_a(s) what anchor a says of s without s, and f(s) all of its features (see :func:`describe`)::

    a*     = argmin_{a >= 0} sum_s w_s |Delta_s - sum_a a_a phi_a(s)|^2 + lambda |a - rho / 4|^2
    t_s    = (Delta_s - sum_a a*_a phi_a(s)) / scale(s)
    R(q)   = sum_a a*_a phi_a(q) + scale(q) * forest(f(q) / scale(q)),     forest: f(s) / scale(s) -> t_s

rho is the share of the shifts' squares that sampling noise does not explain, so that noise is pulled to "no
change", and below a tenth is it. The forest's leaves grow with the noise of t, and where less than three tenths of
t is more than noise there is none. A context whose shift was measured keeps it as far as it
was measured well, R = prior + t (Delta - prior), t = tau^2 / (tau^2 + v). The prior is the anchors'
leave-one-out value or, where the shift was measured with few cells, all that is predicted without it.
tau^2 is the larger of two estimates of its squared error beyond noise: that of all shifts, in
proportion to scale^2, and the gene's own, rho ((Delta - prior)^2 - v), with the rho of this shift's
Delta - prior; of few cells up to 9 v are taken off in place of v.

With several perturbations every shift of every perturbation is a sample s, and the mean shift of the other perturbations
in a context is one more anchor of the shifts there. The shift of a combination that was never measured is
composed of the responses R_p to its parts in the same context::

    R = b_0 m + b_1 sum_p (R_p - m)

where m is what single perturbations have in common there: their mean, times the mean inner product of two of them over its
square (unrelated perturbations have nothing in common and add up, the same one twice gives what one gives). b is 1 where no
combination was measured to learn it from. A dose between two that were measured gets a mean of their responses, by its logarithm; below
the lowest, the response falls to nothing in proportion to the dose, and above the highest it stays.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.special import softmax
from sklearn.ensemble import ExtraTreesRegressor

from spaperb._types import FloatArray, IntArray
from spaperb.contexts import Contexts, Treatment, distance
from spaperb.perturbations import CLOSE, Target
from spaperb.populations import Profile

ANCHORS = ("neighbour_shift", "similarity_shift", "mean_shift", "precise_shift")
"""What other contexts say; the mean shift of other perturbations comes after them."""
TEMPERATURE = 0.03
"""Of the softmax over correlations of control profiles, as in the baseline ``similarity_shift``."""
PULL = 0.5
"""lambda, in units of the anchors' mean square."""
MIN_RELIABILITY = 0.1
"""Shifts of less are taken for noise."""
MIN_LEARNABLE = 0.3
"""Where less of what the anchors leave is more than noise, a forest learns the noise."""
N_TREES = 100
FEW_CELLS = 50
"""A shift that was measured in fewer cells is held against all that is predicted without it, forest and all. With several
perturbations that takes too many forests, and the anchors have to do."""
BY_CHANCE = 9.0
"""Squared errors that chance explains where a single cell measured a shift, in sampling variances: the means of few cells
have long tails. It falls to 1 with FEW_CELLS."""
LEAF = 10
"""Samples in a leaf of the forest at least; more where the samples are noisy."""
SCALE_FLOOR = 0.05
LOG_FLOOR = 0.05
MAX_SAMPLES = 200_000
TINY = 1e-9
MIN_DISTANCES = 3
"""Fewer distances of training contexts do not tell what is usual."""
MAX_SHIFTS = 200
"""Shifts that a regression learns from; of more, as many at random."""


Situation = Literal["alone", "beside", "combined"]
"""What was measured in a context whose change is predicted: nothing; other perturbations, or the change itself; or, of a
combination that was not, all its parts."""


class Sample(NamedTuple):
    """A measured shift: its treatment, its place among the treatment's paired contexts, and its context."""

    treatment: int
    place: int
    context: int


class Subject(NamedTuple):
    """A context to predict: profile and components of its control cells, and its number if it has the name of a training context.

    What was measured in that context counts as far as the cells are ``alike``, in [0, 1].
    """

    profile: Profile
    cells: FloatArray
    number: int | None = None
    alike: float = 1.0


class Description(NamedTuple):
    """What is known of one context's change without it."""

    anchors: FloatArray
    """Estimates of the change, ``(G, n_anchors)``."""
    features: FloatArray
    """All features, in log-normalised units, ``(G, F)``."""
    scale: FloatArray
    """Largest change of each gene in the other shifts, ``(G,)``."""
    references: list[Profile]
    """Stimulated populations that it was made of."""
    weights: FloatArray
    """Weight of each of them."""


class Change(NamedTuple):
    """Predicted change of a context.

    ``mean``, ``(G,)``; for each gene how far it was ``measured``, in [0, 1], the sampling variance that the measurement brought
    into it, ``noise``, and the share of the ``unmeasured`` error that is left; the ``scale`` of each gene's change; stimulated
    populations that it resembles, ``references``, and their ``weights``.
    """

    mean: FloatArray
    measured: FloatArray
    noise: FloatArray
    unmeasured: FloatArray
    scale: FloatArray
    references: list[Profile]
    weights: FloatArray

    @classmethod
    def predicted(cls, mean: FloatArray, description: Description) -> Change:
        """Change of which nothing was measured."""
        nothing = np.zeros_like(mean)
        scale, references, weights = description[2:]
        return cls(mean, nothing, nothing, np.ones_like(mean), scale, references, weights)

    @classmethod
    def improved(
        cls,
        mean: FloatArray,
        trust: FloatArray,
        variance: FloatArray,
        scale: FloatArray,
        references: list[Profile],
        weights: FloatArray,
    ) -> Change:
        """Change that was measured, with a sampling variance, and trusted so far."""
        return cls(mean, trust, trust**2 * variance, (1 - trust) ** 2, scale, references, weights)

    @classmethod
    def mixed(cls, changes: Sequence[Change], shares: FloatArray) -> Change:
        """Mean of changes, as of doses between two that were measured.

        Shares of less than 1 in all make the change, and the scale of its error, smaller; they do not
        make it better known.
        """
        parts = shares / shares.sum()
        means = {
            name: shares @ np.array([getattr(c, name) for c in changes])
            for name in ("mean", "measured", "noise", "scale")
        }
        return cls(
            **means,
            unmeasured=parts @ np.array([c.unmeasured for c in changes]),
            references=[reference for c in changes for reference in c.references],
            weights=np.concatenate(
                [part * c.weights for part, c in zip(parts, changes, strict=True)]
            ),
        )


def describe(
    contexts: Contexts,
    treatment: Treatment,
    others: IntArray,
    profile: Profile,
    cells: FloatArray,
    elsewhere: FloatArray | None = None,
) -> Description:
    """Describe a context's change by what was measured in other contexts.

    Parameters
    ----------
    contexts
        The training contexts.
    treatment
        The perturbation.
    others
        Places, among the treatment's paired contexts, of those that may be used.
    profile
        Profile of the context's control cells.
    cells
        Components of its control cells, ``(n, n_components)``.
    elsewhere
        Mean shift of other perturbations in the context, ``(G,)``.
    """
    shifts, variances = treatment.shifts[others], treatment.variances[others]
    control = np.array([contexts.control[k].mean for k in treatment.paired[others]])
    references = [treatment.stimulated[i] for i in others]
    stimulated = np.array([reference.mean for reference in references])
    near = contexts.neighbours(cells, treatment.paired[others])
    alike = softmax([_correlation(profile.mean, mean) / TEMPERATURE for mean in control])
    precise = 1 / (variances + 1e-3)
    anchors = np.column_stack(
        [near @ shifts, alike @ shifts, shifts.mean(0), (precise * shifts).sum(0) / precise.sum(0)]
    )
    # Means below 0 (scaled data) have no logarithm and count as not expressed.
    log_control, log_stimulated = (
        np.log(np.maximum(x, 0) + LOG_FLOOR) for x in (control, stimulated)
    )
    fold_change = near @ (log_stimulated - log_control)
    features = [
        anchors[:, :3],
        shifts.min(0),
        shifts.max(0),
        profile.mean,
        profile.detection,
        near @ control,
        control.mean(0),
        near @ stimulated,
        fold_change,
        np.sqrt(near @ variances),
    ]
    scale = np.abs(shifts).max(0) + SCALE_FLOOR
    if elsewhere is not None:
        anchors = np.column_stack([anchors, elsewhere])
        features.append(elsewhere)
    return Description(anchors, np.column_stack(features), scale, references, near)


def describe_by_perturbations(
    shifts: FloatArray, references: list[Profile], profile: Profile
) -> Description:
    """Describe a context's change by the shifts of other perturbations there, ``(M, G)``."""
    mean = shifts.mean(0)
    features = [mean, shifts.min(0), shifts.max(0), profile.mean, profile.detection]
    return Description(
        mean[:, None],
        np.column_stack(features),
        np.abs(shifts).max(0) + SCALE_FLOOR,
        references,
        np.full(len(references), 1 / len(references)),
    )


def describe_combination(
    common: FloatArray, parts: Sequence[Change], profile: Profile
) -> Description:
    """Describe the change of a combination by those of its parts and by what perturbations have in ``common``."""
    changes = np.array([part.mean for part in parts])
    own = (changes - common).sum(0)
    features = [common, own, changes.min(0), changes.max(0), profile.mean, profile.detection]
    return Description(
        np.column_stack([common, own]),
        np.column_stack(features),
        np.abs(changes).max(0) + SCALE_FLOOR,
        [reference for part in parts for reference in part.references],
        np.concatenate([part.weights for part in parts]) / len(parts),
    )


class Regression:
    """A change from its description: weighted anchors, and a forest for what they leave.

    Parameters
    ----------
    descriptions
        Descriptions of S measured shifts, each made without it.
    shifts, variances
        The shifts and their sampling variances, ``(S, G)``.
    weights
        Weights of the shifts, ``(S,)``.
    pull_to
        Weights that the anchors are pulled to, ``(n_anchors,)``.
    """

    def __init__(
        self,
        descriptions: list[Description],
        shifts: FloatArray,
        variances: FloatArray,
        weights: FloatArray,
        pull_to: FloatArray,
    ):
        self.descriptions, self.shifts, self.variances = descriptions, shifts, variances
        self.weights, self.pull_to = weights, pull_to

    @cached_property
    def anchor_weights(self) -> FloatArray:
        """a*, the weights of the anchors, ``(n_anchors,)``."""
        if not (self.pull_to.any() and self.descriptions):
            return self.pull_to
        root = np.sqrt(self.weights)
        m = np.concatenate([r * d.anchors for r, d in zip(root, self.descriptions, strict=True)])
        y = np.concatenate([r * shift for r, shift in zip(root, self.shifts, strict=True)])
        pull = np.sqrt(PULL * max((m**2).sum(), 1e-12) / len(self.pull_to))
        m = np.concatenate([m, pull * np.eye(len(self.pull_to))])
        return nnls(m, np.concatenate([y, pull * self.pull_to]))[0]

    @cached_property
    def forest(self) -> ExtraTreesRegressor | None:
        """Regression of the anchors' scaled error, ``None`` where there is nothing to learn."""
        if not self.descriptions:
            return None
        errors = self.shifts - self.priors
        share = reliability(errors, self.variances, self.weights)
        if share < MIN_LEARNABLE:
            return None
        leaf = LEAF * max(1.0, (1 - share) / share)
        x = np.concatenate([self.inputs(d) for d in self.descriptions])
        y, weight = (errors / self.scale).ravel(), (self.weights[:, None] * self.scale**2).ravel()
        if len(y) > MAX_SAMPLES:
            some = np.random.default_rng(0).choice(len(y), MAX_SAMPLES, replace=False)
            x, y, weight = x[some], y[some], weight[some]
        forest = ExtraTreesRegressor(
            N_TREES,
            min_samples_leaf=int(min(leaf, max(1, len(y) // 2))),
            max_features=0.7,
            random_state=0,
        )
        return forest.fit(x, y, weight)

    @cached_property
    def priors(self) -> FloatArray:
        """What the anchors say of each shift without it, ``(S, G)``."""
        return np.array([d.anchors @ self.anchor_weights for d in self.descriptions])

    @cached_property
    def scale(self) -> FloatArray:
        """Scale of each shift's genes, ``(S, G)``."""
        return np.array([d.scale for d in self.descriptions])

    @cached_property
    def tau2(self) -> float:
        """Variance of the anchors' error beyond sampling noise, for a gene of scale 1."""
        squares = (self.shifts - self.priors) ** 2 - self.variances
        w = self.weights[:, None]
        return max((w * squares).sum() / (w * self.scale**2).sum(), 0.0)

    def predict(self, description: Description) -> FloatArray:
        """Predict a change that was not measured, R, ``(G,)``."""
        change = description.anchors @ self.anchor_weights
        if self.forest is not None:
            change = change + description.scale * self.forest.predict(self.inputs(description))
        return change

    def measured(
        self,
        prior: FloatArray,
        scale: FloatArray,
        shift: FloatArray,
        variance: FloatArray,
        by_chance: float,
    ) -> tuple[FloatArray, FloatArray]:
        """Improve a measured shift by what is known without it, its ``prior``.

        Returns
        -------
        tuple of numpy.ndarray
            The change, ``(G,)``, and for each gene how far the measurement is trusted, in [0, 1].
        """
        error = shift - prior
        rho = reliability(error[None], variance[None], np.ones(1))
        # What no other shift hints at may still be there, and large: the gene's own error counts too,
        # as far as chance does not explain it.
        tau2 = np.maximum(scale**2 * self.tau2, rho * (error**2 - by_chance * variance))
        trust = tau2 / np.maximum(tau2 + variance, 1e-12)
        return prior + trust * error, trust

    def inputs(self, description: Description) -> FloatArray:
        """Features over the gene's scale, so that one regression serves weak and strong genes."""
        anchor = description.anchors @ self.anchor_weights
        features = np.column_stack([description.features, anchor])
        return np.column_stack([features / description.scale[:, None], description.scale])


class Response:
    """Predict the mean change of contexts, measured or not.

    Parameters
    ----------
    contexts
        The training contexts.
    parts
        For each perturbation the numbers of those that it combines, its own if it is single.
    singles
        Numbers of the perturbations that tell what single ones have in common.
    """

    def __init__(self, contexts: Contexts, parts: list[tuple[int, ...]], singles: list[int]):
        self.contexts = contexts
        self.parts = parts
        self.singles = singles
        self._part_sets = [frozenset(of) for of in parts]
        self.samples = [
            Sample(t, i, int(k))
            for t, treatment in enumerate(contexts.treatments)
            for i, k in enumerate(treatment.paired)
        ]
        self.of_context: dict[int, list[Sample]] = {}
        for sample in self.samples:
            self.of_context.setdefault(sample.context, []).append(sample)
        self._of_perturbation: dict[int, list[int]] = {}
        for t, treatment in enumerate(contexts.treatments):
            self._of_perturbation.setdefault(treatment.perturbation, []).append(t)
        self._regressions: dict[tuple[bool, bool], Regression] = {}

    def distance(self, subject: Subject, perturbation: int) -> float:
        """Distance of a context's control cells from those of contexts that the perturbation was measured in.

        The distance of two contexts is that of their mean control expression over all genes, less what sampling noise adds to it;
        the mean over contexts is weighted by nearness of cells. 0 where the perturbation was measured in the context itself.
        """
        if perturbation in map(self._perturbation, self._measured_in(subject.number)):
            if subject.alike == 1:
                return 0.0
            new = subject._replace(number=None)
            return (1 - subject.alike) * self._distance(new, perturbation)
        return self._distance(subject, perturbation)

    @cached_property
    def usual_distance(self) -> float:
        """Largest distance of a training context from the others that a perturbation was measured in; NaN if they are too few."""
        control, cells = self.contexts.control, self.contexts.cells
        distances = [
            self._distance(Subject(control[k], cells[k], k), self._perturbation(s))
            for s in self.samples[:MAX_SHIFTS]
            for k in [s.context]
        ]
        finite = [d for d in distances if d < math.inf]
        return max(finite) if len(finite) >= MIN_DISTANCES else math.nan

    def _distance(self, subject: Subject, perturbation: int) -> float:
        """Distance from contexts but the subject itself, infinite if there are none."""
        paired = [t.paired for t in self.contexts.treatments if t.perturbation == perturbation]
        among = np.unique(np.concatenate(paired))
        among = among[among != subject.number]
        if not len(among):
            return math.inf
        near = self.contexts.neighbours(subject.cells, among)
        profiles = [self.contexts.control[k] for k in among]
        return float(near @ [distance(subject.profile, profile) for profile in profiles])

    @cached_property
    def is_reliable(self) -> bool:
        """Whether the measured shifts are more than noise."""
        return reliability(*self._measurements(self.samples)) >= MIN_RELIABILITY

    def predict(self, subject: Subject, target: Target) -> Change:
        """Predict the change of a context after a perturbation, or a combination of known ones."""
        if subject.number is not None and subject.alike < 1:
            new = self.predict(subject._replace(number=None), target)
            if subject.alike == 0:
                return new
            own = self.predict(subject._replace(alike=1.0), target)
            shares = np.array([subject.alike, 1 - subject.alike])
            return Change.mixed([own, new], shares)
        if target.number is not None:
            return self.at_dose(subject, target.number, target.dose)
        parts = [self.at_dose(subject, part, target.dose) for part in target.parts]
        common = self._common(subject, target.dose)
        description = describe_combination(common, parts, subject.profile)
        change = Change.predicted(self.by_parts.predict(description), description)
        # It is known as far as its parts are; the network knows no more of how they combine.
        return change._replace(measured=np.min([part.measured for part in parts], axis=0))

    def at_dose(self, subject: Subject, perturbation: int, dose: float | None) -> Change:
        """Predict the change after a perturbation of the training data, at any dose."""
        weights = self.dose_weights(perturbation, dose)
        changes = [self.at(subject, t) for t in weights]
        return Change.mixed(changes, np.array(list(weights.values())))

    def dose_weights(self, perturbation: int, dose: float | None) -> dict[int, float]:
        """Weights of the treatments between whose doses a dose lies; below the lowest their sum is less than 1."""
        of = self._of_perturbation[perturbation]
        levels = [self.contexts.treatments[t].dose or 0.0 for t in of]
        if dose is None:
            return {of[-1]: 1.0}
        same = np.flatnonzero(np.isclose(levels, dose, rtol=CLOSE, atol=0))
        if len(same):
            return {of[same[0]]: 1.0}
        above = bisect_left(levels, dose)
        if above == len(of):
            return {of[-1]: 1.0}
        high = levels[above]
        low = levels[above - 1] if above else 0.0
        at = math.log(dose / low) / math.log(high / low) if low > 0 else max(dose / high, TINY)
        return {of[above - 1]: 1 - at, of[above]: at} if above else {of[above]: at}

    def at(self, subject: Subject, t: int) -> Change:
        """Predict the change after treatment ``t`` of the training data."""
        treatment = self.contexts.treatments[t]
        here = [s for s in self._measured_in(subject.number) if s.treatment == t]
        if here:
            return self._measured(here[0])
        elsewhere = self._elsewhere(subject.number, treatment.perturbation)
        description = describe(
            self.contexts,
            treatment,
            np.arange(len(treatment.paired)),
            subject.profile,
            subject.cells,
            self._shifts(elsewhere).mean(0) if elsewhere else None,
        )
        mean = self.regression(contexts=True, perturbations=bool(elsewhere)).predict(description)
        return Change.predicted(mean, description)

    def _measured(self, sample: Sample) -> Change:
        treatment, i = self.contexts.treatments[sample.treatment], sample.place
        shift, variance = treatment.shifts[i], treatment.variances[i]
        weights = np.eye(len(treatment.paired))[i]
        known = self._known(sample)
        if not any(known):
            # With a single measured shift there is nothing to improve it by.
            scale = np.abs(shift) + SCALE_FLOOR
            trust = np.ones_like(shift)
            return Change.improved(shift, trust, variance, scale, treatment.stimulated, weights)
        regression = self.regression(*known)
        description = self._describe(sample, *known)
        prior, scale = description.anchors @ regression.anchor_weights, description.scale
        references = treatment.stimulated
        is_few = treatment.n[i] < FEW_CELLS
        if is_few and len(treatment.paired) > 1 and len(self.contexts.treatments) == 1:
            without = self.without(sample.context, treatment.perturbation)
            predicted = without.at(self._subject(sample.context), 0)
            prior, _, _, _, scale, references, weights = predicted
        by_chance = 1 + (BY_CHANCE - 1) * max(0.0, 1 - treatment.n[i] / FEW_CELLS) ** 2
        mean, trust = regression.measured(prior, scale, shift, variance, by_chance)
        return Change.improved(mean, trust, variance, scale, references, weights)

    def _subject(self, k: int) -> Subject:
        return Subject(self.contexts.control[k], self.contexts.cells[k], k)

    def without(self, k: int, perturbation: int | None) -> Response:
        """Forget what was measured of a perturbation in a context, or all that was measured there."""
        return Response(self.contexts.without(k, perturbation), self.parts, self.singles)

    def regression(self, contexts: bool, perturbations: bool) -> Regression:
        """Return the regression of changes that other contexts, or other perturbations there, tell of."""
        key = contexts, perturbations
        if key not in self._regressions:
            self._regressions[key] = self._fit(contexts, perturbations)
        return self._regressions[key]

    def _fit(self, contexts: bool, perturbations: bool) -> Regression:
        known = [(s, *self._known(s)) for s in self.samples]
        samples = [s for s, c, p in known if c >= contexts and p >= perturbations]
        if len(samples) > MAX_SHIFTS:
            some = np.random.default_rng(0).choice(len(samples), MAX_SHIFTS, replace=False)
            samples = [samples[i] for i in np.sort(some)]
        n_anchors = len(ANCHORS) * contexts + perturbations
        # A single shift has a reliability too, though nothing to be learned from.
        measurements = self._measurements(samples or self.samples)
        share = reliability(*measurements)
        pull_to = np.full(n_anchors, 0.0 if share < MIN_RELIABILITY else share / n_anchors)
        descriptions = [self._describe(s, contexts, perturbations) for s in samples]
        return Regression(descriptions, *measurements, pull_to)

    @cached_property
    def by_parts(self) -> Regression:
        """Regression of the changes of combinations, from those of their parts."""
        samples: list[Sample] = []
        descriptions: list[Description] = []
        for sample in self.samples:
            if not self.is_composed(sample) or len(samples) == MAX_SHIFTS:
                continue
            treatment, k = self.contexts.treatments[sample.treatment], sample.context
            parts = self.parts[treatment.perturbation]
            subject = self._subject(k)
            changes = [self.at_dose(subject, part, treatment.dose) for part in parts]
            common = self._common(subject, treatment.dose)
            descriptions.append(describe_combination(common, changes, subject.profile))
            samples.append(sample)
        return Regression(descriptions, *self._measurements(samples), np.ones(2))

    def is_composed(self, sample: Sample) -> bool:
        """Whether a measured shift is that of a combination, all of whose parts were measured in its context too."""
        parts = self.parts[self._perturbation(sample)]
        measured = {self._perturbation(s) for s in self.of_context[sample.context]}
        return len(parts) > 1 and measured.issuperset(parts)

    def _describe(self, sample: Sample, contexts: bool, perturbations: bool) -> Description:
        """Describe a measured shift without it."""
        t, i, k = sample
        treatment, profile = self.contexts.treatments[t], self.contexts.control[k]
        elsewhere = self._elsewhere(k, treatment.perturbation) if perturbations else []
        if not contexts:
            references = [
                self.contexts.treatments[s.treatment].stimulated[s.place] for s in elsewhere
            ]
            return describe_by_perturbations(self._shifts(elsewhere), references, profile)
        others = np.delete(np.arange(len(treatment.paired)), i)
        mean = self._shifts(elsewhere).mean(0) if elsewhere else None
        return describe(self.contexts, treatment, others, profile, self.contexts.cells[k], mean)

    def _known(self, sample: Sample) -> tuple[bool, bool]:
        """Whether other contexts, and other perturbations in its context, tell of a measured shift."""
        treatment = self.contexts.treatments[sample.treatment]
        elsewhere = self._elsewhere(sample.context, treatment.perturbation)
        return len(treatment.paired) > 1, bool(elsewhere)

    def _elsewhere(self, k: int | None, perturbation: int) -> list[Sample]:
        """Shifts of perturbations without a common part, measured in context ``k``."""
        parts, perturbation_of = self._part_sets[perturbation], self._perturbation
        return [
            s
            for s in self._measured_in(k)
            if parts.isdisjoint(self._part_sets[perturbation_of(s)])
        ]

    def _common(self, subject: Subject, dose: float | None) -> FloatArray:
        """What single perturbations have in common in a context, m, ``(G,)``."""
        common = {
            k: self._common_of(k, dose)
            for k in ([subject.number] if subject.number in self.of_context else self.of_context)
        }
        found = {k: m for k, m in common.items() if m is not None}
        if not found:
            return np.zeros(len(subject.profile.mean))
        among = np.array(list(found))
        near = self.contexts.neighbours(subject.cells, among) if len(found) > 1 else np.ones(1)
        return near @ np.array(list(found.values()))

    def _common_of(self, k: int, dose: float | None) -> FloatArray | None:
        shifts: dict[int, FloatArray] = {}
        for s in self.of_context[k]:
            p = self._perturbation(s)
            if p in self.singles and (w := self.dose_weights(p, dose).get(s.treatment)):
                shifts[p] = shifts.get(p, 0) + w * self._shifts([s])[0]
        if len(shifts) < 2:
            return None
        d = np.array(list(shifts.values()))
        mean, n = d.mean(0), len(d)
        inner = ((d.sum(0) ** 2).sum() - (d**2).sum()) / (n * (n - 1))
        return np.clip(inner / max((mean**2).sum(), 1e-12), 0, 1) * mean

    def _measured_in(self, k: int | None) -> list[Sample]:
        """Shifts measured in a context; ``None`` is no training context."""
        return [] if k is None else self.of_context.get(k, [])

    def _perturbation(self, sample: Sample) -> int:
        return self.contexts.treatments[sample.treatment].perturbation

    def _shifts(self, samples: list[Sample]) -> FloatArray:
        return np.array([self.contexts.treatments[s.treatment].shifts[s.place] for s in samples])

    def _measurements(self, samples: list[Sample]) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Shifts and their variances, ``(S, G)``, and their weights, ``(S,)``."""
        of = [(self.contexts.treatments[s.treatment], s.place) for s in samples]
        return (
            np.array([t.shifts[i] for t, i in of]),
            np.array([t.variances[i] for t, i in of]),
            np.array([t.weights[i] for t, i in of]),
        )


def reliability(values: FloatArray, variances: FloatArray, weights: FloatArray) -> float:
    """Share of the squares of ``values`` ``(S, G)`` that sampling noise does not explain, rho."""
    w = weights[:, None]
    return max(0.0, 1 - (w * variances).sum() / max((w * values**2).sum(), 1e-12))


def _correlation(a: FloatArray, b: FloatArray) -> float:
    """Pearson correlation, 0 where one of both is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float(a @ b / norm) if norm > 0 else 0.0
