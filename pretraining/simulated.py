"""Simulated data sets with several perturbations, combinations of them, and doses.

Few public sets hold these, and the networks have to learn what such relations mean. Cells are
negative binomial, as in :func:`spaperb.datasets.simulated`. The response to a perturbation is
partly that of all contexts, partly that of a lineage, and partly a context's own; perturbations of
a set have some of their response in common; the parts of a combination add up, less some of what
they have in common, and with some response of its own; doses follow a Hill curve.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from scipy import sparse

from spaperb.evidence import Evidence

N_GENES = 800


def simulated_evidence(seed: int) -> Evidence:
    """Simulate and measure a data set: with combinations if the seed is even, else with doses."""
    rng = np.random.default_rng([seed, 7])
    has_doses = bool(seed % 2)
    n_contexts, n_single = int(rng.integers(2, 6)), int(rng.integers(2, 7))
    parts = [(p,) for p in range(n_single)]
    if not has_doses:
        pairs = rng.permutation(list(combinations(range(n_single), 2)))
        parts += [tuple(map(int, pair)) for pair in pairs[: int(rng.integers(1, 7))]]
    doses = np.geomspace(1, 10 ** rng.uniform(1, 3), int(rng.integers(2, 5)))
    if not has_doses:
        doses = np.array([np.nan])
    effects = _effects(rng, n_contexts, parts)
    half, steepness = rng.uniform(0.2, 0.8) * doses[-1], rng.uniform(0.7, 2.0)

    baseline = rng.normal(0.0, 1.5, N_GENES)
    of_context = rng.normal(0.0, 1.0, (n_contexts, N_GENES)) * (rng.random(N_GENES) < 0.3)
    n_cells = int(rng.choice([30, 60, 120]))
    x, arms, labels, of_dose = [], [], [], []
    library = float(rng.choice([1000, 3000, 8000]))
    for k in range(n_contexts):
        log_control = baseline + of_context[k]
        x.append(_cells(rng, log_control, 2 * n_cells, library))
        arms += [0] * (2 * n_cells)
        labels += [k] * (2 * n_cells)
        of_dose += [np.nan] * (2 * n_cells)
        for p in range(len(parts)):
            # Not all is measured everywhere, but something is in each context.
            if p and rng.random() < 0.25:
                continue
            for dose in doses:
                effect = 1.0
                if has_doses:
                    effect = dose**steepness / (dose**steepness + half**steepness)
                x.append(_cells(rng, log_control + effect * effects[k, p], n_cells, library))
                arms += [1 + p] * n_cells
                labels += [k] * n_cells
                of_dose += [dose] * n_cells
    return Evidence.of(
        sparse.csr_matrix(np.concatenate(x)),
        np.array(arms),
        np.array(labels),
        [f"context_{k}" for k in range(n_contexts)],
        doses=np.array(of_dose) if has_doses else None,
        parts=parts,
        seed=seed,
    )


def _effects(
    rng: np.random.Generator, n_contexts: int, parts: list[tuple[int, ...]]
) -> np.ndarray:
    """Log fold changes of each context and perturbation, ``(K, P, G)``."""
    shared, common = rng.uniform(0.2, 0.9), rng.uniform(0.0, 0.5)
    responds = rng.random(N_GENES) < rng.uniform(0.05, 0.3)
    scale = rng.uniform(0.3, 1.2) * responds
    n_single = sum(len(of) == 1 for of in parts)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0.0, 1.0, (*shape, N_GENES))

    general = np.sqrt(shared) * normal(1) + np.sqrt(1 - shared) * normal(n_contexts)
    own = np.sqrt(shared) * normal(1, n_single) + np.sqrt(1 - shared) * normal(
        n_contexts, n_single
    )
    strength = rng.lognormal(0.0, 0.5, (1, n_single, 1))
    own = strength * np.sqrt(1 - common) * own
    general = np.sqrt(common) * general
    synergy, keeps = rng.uniform(0.0, 0.4), rng.uniform(0.0, 1.0)
    effects = []
    for of in parts:
        effect = own[:, list(of)].sum(axis=1) + (1 + keeps * (len(of) - 1)) * general
        if len(of) > 1:
            effect = effect + synergy * normal(n_contexts)
        effects.append(scale * effect)
    return np.stack(effects, axis=1)


def _cells(
    rng: np.random.Generator, log_expression: np.ndarray, n: int, library: float
) -> np.ndarray:
    """Log-normalised cells of one expression, ``(n, G)``."""
    proportions = np.exp(log_expression) / np.exp(log_expression).sum()
    expected = library * rng.lognormal(0.0, 0.3, (n, 1)) * proportions
    counts = rng.poisson(expected * rng.gamma(5.0, 1 / 5.0, expected.shape)).astype(np.float32)
    return np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
