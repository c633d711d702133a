"""Genes that change: which are found, in which direction, and weights for those that do.

Genes are ranked by Wilcoxon scores (:func:`spaperb.populations.wilcoxon_scores`), predicted cells
against the control cells that they were predicted from, real cells against theirs. *Differentially
expressed genes* (DEGs) are either a fixed number of top genes, or *called*: all whose Benjamini-
Hochberg false discovery rate is below 0.05.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control, norm
from sklearn.metrics import average_precision_score

from spaperb._types import FloatArray, IntArray
from spaperb.evaluation.metrics._changes import Changes

N_DEGS = 100
FDR = 0.05


def top_genes(scores: FloatArray, n: int = N_DEGS) -> IntArray:
    """Columns of the ``n`` genes of the largest absolute score, the largest first."""
    return np.argsort(-np.abs(scores), kind="stable")[:n]


def gene_weights(scores_real: FloatArray) -> FloatArray:
    """Weights of genes by how clearly they change in the real cells, ``(G,)``; their sum is 1.

    The squares of the absolute scores, scaled to [0, 1]. All genes weigh the same where the scores
    do not differ. The authors score each perturbation against all others, by a t test.

    Parameters
    ----------
    scores_real
        :func:`~spaperb.populations.wilcoxon_scores` of real against control cells, ``(G,)``.

    References
    ----------
    Mejia et al. (2025), Diversity by design, arXiv 2506.22641.
    """
    size = np.abs(scores_real)
    weights = (size - size.min()) ** 2
    if not weights.any():
        weights = np.ones_like(size)
    return weights / weights.sum()


def called_genes(scores: FloatArray, fdr: float = FDR) -> npt.NDArray[np.bool_]:
    """Mask of the genes with a false discovery rate below ``fdr``, ``(G,)``.

    Two-sided P values of the normal distribution, as scanpy gives them, corrected by Benjamini
    and Hochberg (1995), Journal of the Royal Statistical Society B 57, 289-300.
    """
    return false_discovery_control(2 * norm.sf(np.abs(scores))) < fdr


def deg_precision(scores_predicted: FloatArray, scores_real: FloatArray) -> float:
    """Fraction of the genes called in predicted cells that are called in real ones, in [0, 1].

    NaN where none is called in the real cells; 0 where none is called in the predicted cells: an
    empty list finds nothing. More cells call more genes, so compare predictions of the same number
    of cells.

    Parameters
    ----------
    scores_predicted, scores_real
        As for :func:`deg_overlap`.
    """
    predicted, real = called_genes(scores_predicted), called_genes(scores_real)
    if not real.any():
        return float("nan")
    return float((predicted & real).sum() / max(1, predicted.sum()))


def deg_recall(scores_predicted: FloatArray, scores_real: FloatArray) -> float:
    """Fraction of the genes called in real cells that are called in predicted ones, in [0, 1].

    NaN where none is called in the real cells. Arguments as for :func:`deg_precision`.
    """
    predicted, real = called_genes(scores_predicted), called_genes(scores_real)
    return float((predicted & real).sum() / real.sum()) if real.any() else float("nan")


def deg_average_precision(scores_predicted: FloatArray, scores_real: FloatArray) -> float:
    """Area under the precision-recall curve of the genes called in real cells, in [0, 1].

    Genes are ranked by the absolute score in predicted cells. A random ranking has the fraction of
    called genes; NaN where none is called. Arguments as for :func:`deg_precision`.
    """
    real = called_genes(scores_real)
    if not real.any():
        return float("nan")
    return float(average_precision_score(real, np.abs(scores_predicted)))


def deg_direction(scores_predicted: FloatArray, scores_real: FloatArray) -> float:
    """Fraction of the genes called in both that change in the same direction, in [0, 1].

    NaN where none is called in both, as for "no change", which calls none. So look at
    :func:`deg_recall` beside it: a prediction that calls one gene can have 1. Arguments as for
    :func:`deg_precision`.
    """
    both = called_genes(scores_predicted) & called_genes(scores_real)
    same = np.sign(scores_predicted) == np.sign(scores_real)
    return float(same[both].mean()) if both.any() else float("nan")


def deg_overlap(scores_predicted: FloatArray, scores_real: FloatArray, n: int = N_DEGS) -> float:
    """Fraction of the top real genes found again among the top predicted ones, in [0, 1].

    Parameters
    ----------
    scores_predicted
        :func:`~spaperb.populations.wilcoxon_scores` of predicted against control cells, ``(G,)``.
    scores_real
        :func:`~spaperb.populations.wilcoxon_scores` of real against control cells, ``(G,)``.
    n
        Number of top genes, in both directions. Genes of the same score share the last places.
    """
    predicted, real = _share_on_top(scores_predicted, n), _share_on_top(scores_real, n)
    return float(predicted @ real / real.sum())


def sign_accuracy(changes: Changes, genes: IntArray) -> float:
    """Fraction of genes whose predicted mean changes in the direction of the real mean, in [0, 1].

    A predicted change of exactly 0 is counted as wrong.

    Parameters
    ----------
    changes
        Predicted and real mean changes.
    genes
        Columns to judge, the top DEGs say.
    """
    return float(np.mean((np.sign(changes.predicted) == np.sign(changes.real))[genes]))


def _share_on_top(scores: FloatArray, n: int) -> FloatArray:
    """Probability of each gene to be among the ``n`` on top, ties in random order, ``(G,)``."""
    size = np.abs(scores)
    last = np.sort(size)[-min(n, len(size))]
    above, tied = size > last, size == last
    return above + tied * (min(n, len(size)) - above.sum()) / tied.sum()
