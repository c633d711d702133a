"""What tells this change from others: other perturbations of the context, or other contexts.

A prediction that is the same for all, the mean change say, can correlate well with each. These
scores ask whether it is nearer to the right change than to others that were measured. ``others``
are their real mean changes, ``(n_others, G)``: of other perturbations in the same context, or of
the same perturbation in other contexts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.metrics.pairwise import cosine_similarity

from spaperb._types import FloatArray
from spaperb.evaluation.metrics._changes import Changes, correlation


def discrimination(changes: Changes, others: FloatArray) -> float:
    """Fraction of other changes that are less like the prediction than the right one, in [0, 1].

    Likeness is the cosine; ties count half, so that "no change" has 0.5. Between contexts the
    others are those that a method learned from: a mean of their changes is like each of them,
    noise included, and is below 0.5.

    Parameters
    ----------
    changes
        Predicted and real mean change.
    others
        Other real mean changes, ``(n_others, G)``.

    References
    ----------
    The perturbation discrimination score of the Virtual Cell Challenge 2026 (cell-eval2), which
    also leaves out the genes that were perturbed.
    """
    candidates = np.concatenate([changes.real[None], others])
    return _rank(cosine_similarity(changes.predicted[None], candidates)[0])


def centroid_accuracy(changes: Changes, others: FloatArray) -> float:
    """Fraction of other changes further from the prediction than the right one, in [0, 1].

    Distance is Euclidean: unlike :func:`discrimination`, the size of the change counts. Between
    perturbations of one context this is the distance between centroids of predicted and real
    cells. Ties count half.

    Parameters
    ----------
    changes, others
        As for :func:`discrimination`.

    References
    ----------
    Viñas Torné et al. (2025), Systema, Nature Biotechnology.
    """
    candidates = np.concatenate([changes.real[None], others])
    return _rank(-np.linalg.norm(candidates - changes.predicted, axis=1))


def pearson_delta_specific(changes: Changes, others: FloatArray) -> float:
    """Pearson correlation over genes of what the changes have beyond the mean of the others.

    Between perturbations of one context it is that of Systema, with the mean of the perturbed
    centroids for a reference in place of the control cells. The reference is on both sides, so "no
    change" is somewhat above 0: look at the floor.

    Parameters
    ----------
    changes, others
        As for :func:`discrimination`.

    Returns
    -------
    float
        Correlation in [-1, 1]; 0 for a prediction that is the mean of the others itself.

    References
    ----------
    Viñas Torné et al. (2025), Systema, Nature Biotechnology.
    """
    common = others.mean(axis=0)
    return correlation(changes.predicted - common, changes.real - common)


def _rank(likeness: npt.NDArray) -> float:
    """Fraction of all but the first that are less than the first."""
    first, rest = likeness[0], likeness[1:]
    is_tied = np.isclose(rest, first, rtol=1e-9, atol=1e-12)
    return float(np.mean(np.where(is_tied, 0.5, rest < first)))
