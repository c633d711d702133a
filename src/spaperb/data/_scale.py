"""The scale of expression, read from its values: log-normalised or not, to which base and total.

Two things tell normalised counts from anything else, once they are transformed back. The values of
each cell add up to the same total, as long as no gene was dropped; and they are whole multiples of
the cell's smallest value, which is one count, whichever genes are left. What shows neither (counts
corrected for ambient RNA, imputed expression) is judged by its largest value alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from anndata import AnnData
from anndata.compat import DaskArray
from scipy import sparse
from scvi.utils import track

from spaperb._messages import warn
from spaperb._types import Expression, FloatArray, IntArray
from spaperb.data._anndata import expression_matrix
from spaperb.data._disk import in_memory
from spaperb.populations import dense

NORMALISE_ADVICE = "sc.pp.normalize_total(adata, target_sum=1e4) and then sc.pp.log1p(adata)"

NEGATIVE = "scaled, or like residuals"
COUNTS = "like raw counts"
NOT_LOGGED = "not log-transformed"
LOGGED_TWICE = "log-transformed twice"
NOT_NORMALISED = "log-transformed without normalisation"
LOG_NORMALISED = "log-normalised"
UNKNOWN = "like neither counts nor normalised counts"
"""Names of scales, which follow "looks" in a sentence. Of expression that is log-normalised to
another base than declared the name is that of :func:`_log_normalised_to`."""

N_SAMPLED = 500
"""Cells that totals and multiples are looked at in, spread evenly over all."""
COMMON_BASES = (math.e, 2, 10)
MOST_LOG = 20
"""Above what is left of a count by a logarithm: log2 of counts per million."""
MOST_COUNTS = 1e7
"""No gene of a cell has so many: a logarithm whose back-transform is larger is none."""
SAME_TOTAL, FEWEST_CELLS = 0.01, 10
"""Totals are the same if nine of ten are within this share of the median, in so many cells."""
NO_GENES_DROPPED = 0.9
"""Least over largest total, above which at most rarely expressed genes were dropped."""
USUAL_TARGET_SUM = 1e4
LARGEST_MULTIPLE, NEAR_MULTIPLE, FEWEST_MULTIPLES = 200, 0.02, 4
"""Multiples up to which single precision is exact enough, how far one may be from a whole number,
and how many different ones make a cell worth looking at."""
ONE_COUNT, UNEVEN = 1e-3, 1.8
"""Counts were not normalised if nine of ten cells' smallest values are within this of 1, and the
totals of the middle eight of ten differ by this factor (2.1 or more in all of eight data sets)."""
FAR = 3.0
"""A query whose median total is as many times beyond all totals of training is on another scale.
Of nine data sets with 500 genes or more, whatever cell type was left out of training,
none was farther from the other cells than by a factor of 2.7."""

ROWS_AT_ONCE = 4096
MANY_BLOCKS = 20
N_CHECKED = 100


@dataclass(frozen=True)
class Scale:
    """What the values of an expression matrix say about it.

    Attributes
    ----------
    nonnegative
        Whether no value is negative.
    counts
        Whether all values are whole numbers, and not all 0.
    base
        Base of the logarithms, declared or that of the training cells.
    looks
        Name of the scale.
    largest
        Largest value.
    total, least_total, most_total
        Median, least and largest total of a cell's back-transformed values over the model's genes,
        of cells that express any; 0 if none does, or values are negative.
    """

    nonnegative: bool
    counts: bool
    base: float
    looks: str
    largest: float
    total: float
    least_total: float
    most_total: float

    @classmethod
    def of(
        cls, x: Expression, base: float = math.e, columns: IntArray | slice = slice(None)
    ) -> Scale:
        """Look at all values, and closer at those of some cells.

        Parameters
        ----------
        x
            Cells by genes.
        base
            Base of the logarithms.
        columns
            Columns of the model's genes.

        Raises
        ------
        ValueError
            If the values are not numbers, or any is NaN or infinite.
        """
        if x.dtype.kind not in "fiub":
            raise ValueError(f"Expression must be numbers; the matrix has the type {x.dtype}.")
        nonnegative, whole, largest, sample = True, True, -math.inf, []
        wanted = np.unique(np.linspace(0, x.shape[0] - 1, N_SAMPLED).astype(int))
        for start, rows in _row_blocks(x):
            for values in _value_blocks(rows):
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"Expression holds {int((~np.isfinite(values)).sum())} or more NaN or "
                        "infinite values. Remove the cells or genes that have them, or repeat the "
                        "step that made them (a division by a library size of zero, say)."
                    )
                nonnegative = nonnegative and bool((values >= 0).all())
                whole = whole and bool((values % 1 == 0).all())
                largest = max(largest, float(values.max()) if values.size else -math.inf)
            some = wanted[(wanted >= start) & (wanted < start + rows.shape[0])] - start
            sample.append(sparse.csr_matrix(rows[some], dtype=float))
        counts = nonnegative and whole and largest > 0
        cells = sparse.vstack(sample, format="csr")
        cells.sum_duplicates()
        cells.eliminate_zeros()
        # A sparse matrix may hold no value, and all its zeros are values too.
        largest = max(largest, 0.0) if sparse.issparse(x) else largest
        totals = np.zeros(1)
        if not nonnegative:
            looks = NEGATIVE
        else:
            looks = COUNTS if counts else _looks(cells, base, largest)
            back = cells.copy()
            back.data = _back(back.data, base)
            sums = np.asarray(back[:, columns].sum(axis=1)).ravel()
            totals = sums[sums > 0] if sums.any() else totals
        spread = [float(of(totals)) for of in (np.median, np.min, np.max)]
        return cls(nonnegative, counts, float(base), looks, largest, *spread)

    @property
    def is_logarithm(self) -> bool:
        """Whether values can be transformed back, as far as is known."""
        return self.looks in (LOG_NORMALISED, NOT_NORMALISED, UNKNOWN)

    @property
    def is_of_all_genes(self) -> bool:
        """Whether no genes were dropped since the normalisation.

        All cells have about one total.
        """
        return self.least_total > NO_GENES_DROPPED * self.most_total

    @property
    def target_sum(self) -> float:
        """Total that cells were normalised to.

        Where genes were dropped nothing tells it. It is no less than the largest total of a cell
        then, and is taken for that or, by custom, 10,000.
        """
        return self.total if self.is_of_all_genes else max(USUAL_TARGET_SUM, self.most_total)

    def __str__(self) -> str:
        """Name of the scale and what was found."""
        found = [f"largest value {self.largest:.4g}"]
        if self.is_logarithm:
            found.append(f"base {_name(self.base)}")
            found.append(f"median total of a cell, transformed back, {self.total:.4g}")
        return f"{self.looks} ({', '.join(found)})"


def log_base(adata: AnnData) -> float | None:
    """Base of the logarithms that ``scanpy.pp.log1p`` noted; ``None`` if there is no note.

    Raises
    ------
    ValueError
        If what it noted is no base.
    """
    if "log1p" not in adata.uns:
        return None
    noted = adata.uns["log1p"]
    base: Any = noted.get("base") if isinstance(noted, Mapping) else None
    if base is None:  # some versions of anndata drop it from a file
        return math.e
    try:
        number = float(base)
    except (TypeError, ValueError):
        number = math.nan
    if not 1 < number < math.inf:
        raise ValueError(
            f"adata.uns['log1p']['base'] is {base!r}, which is no base of logarithms. Put the "
            "base there that expression was log-transformed with, `None` for the natural one: "
            "adata.uns['log1p'] = {'base': None}."
        )
    return number


def is_log_normalised(x: Expression) -> bool:
    """Tell whether expression may be log-normalised: not negative, no counts, no large values."""
    scale = Scale.of(x)
    return scale.nonnegative and not scale.counts and scale.largest <= MOST_LOG


def warn_of_unusual_expression(x: Expression, scale: Scale) -> None:
    """Warn once if expression to be registered is not log-normalised, or is CSC."""
    if scale.counts:
        warn(
            "Expression holds whole numbers only: these look like raw counts, and SpaPerb is made "
            f"for log-normalised expression. Normalise first: {NORMALISE_ADVICE}."
        )
    elif not scale.nonnegative:
        warn(
            "Expression holds negative values (scaled or residual data?). They are used as they "
            "are, and predictions will not be clipped at 0."
        )
    elif scale.looks not in (LOG_NORMALISED, UNKNOWN):
        warn(
            f"Expression looks {scale}, and SpaPerb is made for log-normalised expression. "
            f"{_advice(scale)}"
        )
    if sparse.issparse(x) and x.format == "csc":
        warn(
            "Expression is a CSC matrix, from which single cells are read slowly. Training is "
            "faster after `adata.X = adata.X.tocsr()`."
        )


def check_scale(found: Scale, trained_on: Scale) -> None:
    """Check that cells to predict are on the scale of the training cells.

    Warns once if they seem not to be.

    Raises
    ------
    ValueError
        If they have negative values, and the training cells had none.
    """
    if trained_on.nonnegative and not found.nonnegative:
        raise ValueError(
            "The expression holds negative values, and the model was trained on data without. "
            "Was it scaled? Give the model expression normalised as in training."
        )
    if found.counts and not trained_on.counts:
        warn(
            "The expression holds whole numbers only (raw counts?), and the model was trained on "
            f"normalised data. Normalise first: {NORMALISE_ADVICE}."
        )
    elif _differs(found, trained_on):
        warn(
            "The cells to predict seem to be on another scale than the training cells. They look "
            f"{found}; the training cells look {trained_on}. {_advice_for_query(trained_on)}"
        )


def check_counts(adata: AnnData, counts_layer: str, x: Expression) -> Expression:
    """Return the layer with raw counts, if expression comes from it.

    Raises
    ------
    ValueError
        If the layer is missing, holds anything but counts, or has nothing to do with expression,
        or expression is no natural logarithm.
    """
    counts = expression_matrix(adata, counts_layer, lazy=isinstance(x, DaskArray))
    if not Scale.of(counts).counts:
        raise ValueError(
            f"adata.layers[{counts_layer!r}] (`counts_layer`) must hold raw counts, whole numbers "
            "of at least 0, and holds other values or nothing but 0."
        )
    base = log_base(adata) or math.e
    if not math.isclose(base, math.e):
        raise ValueError(
            f"Counts are drawn for natural logarithms, and expression is to base {_name(base)} "
            f"(adata.uns['log1p']['base']). Normalise it with {NORMALISE_ADVICE}, or leave out "
            "`counts_layer`."
        )
    some = np.linspace(0, adata.n_obs - 1, min(adata.n_obs, N_CHECKED)).astype(int)
    raw, some_x = (dense(in_memory(matrix[some])) for matrix in (counts, x))
    # The exponential of what was never log-transformed may be infinite.
    with np.errstate(over="ignore", invalid="ignore"):
        factors = np.expm1(some_x.astype(float))
        scaled = raw * (factors.sum(1) / np.maximum(raw.sum(1), 1))[:, None]
    is_silent = [matrix.sum(1) == 0 for matrix in (raw, factors)]
    if not (
        np.isfinite(factors).all()
        and np.array_equal(*is_silent)
        and np.allclose(scaled, factors, rtol=0.01, atol=0.01 * max(factors.max(), 1e-9))
    ):
        raise ValueError(
            f"Expression is not log1p of the counts in adata.layers[{counts_layer!r}] "
            "(`counts_layer`) times a factor for each cell, so counts cannot be drawn. Normalise "
            f"it with {NORMALISE_ADVICE}."
        )
    return counts


def _looks(cells: sparse.csr_matrix, base: float, largest: float) -> str:
    """Name the scale of cells without negative values that are no counts."""
    if largest * math.log(base) > math.log(MOST_COUNTS):
        return NOT_LOGGED
    ends = cells.indptr[1:-1]
    back = _back(cells.data, base)
    if _is_normalised(back, ends):
        return NOT_NORMALISED if _has_its_depth(back, ends) else LOG_NORMALISED
    others = {
        NOT_LOGGED: cells.data,
        LOGGED_TWICE: _back(back, base),
        **{_log_normalised_to(other): _back(cells.data, other) for other in COMMON_BASES},
    }
    return next((name for name, back in others.items() if _is_normalised(back, ends)), UNKNOWN)


def _back(values: FloatArray, base: float) -> FloatArray:
    """Transform logarithms back; what was never log-transformed may become infinite."""
    with np.errstate(over="ignore"):
        return np.expm1(values * math.log(base))


def _is_normalised(values: FloatArray, ends: npt.NDArray) -> bool:
    """Whether each cell's values add up to the same, or are multiples of one of them."""
    if not np.isfinite(values).all():
        return False
    return _has_one_total(values, ends) or _is_true_of_most(
        [np.abs(m - np.rint(m)).max() < NEAR_MULTIPLE for m in _multiples(values, ends)], 0.5
    )


def _has_its_depth(values: FloatArray, ends: npt.NDArray) -> bool:
    """Whether cells have the totals that they were measured with."""
    cells = [cell for cell in np.split(values, ends) if cell.size]
    if len(cells) < FEWEST_CELLS:
        return False
    units = [abs(cell.min() - 1) < ONE_COUNT for cell in cells]
    low, high = np.quantile([cell.sum() for cell in cells], [0.1, 0.9])
    return _is_true_of_most(units, 0.9) and high > UNEVEN * low


def _has_one_total(values: FloatArray, ends: npt.NDArray) -> bool:
    """Whether each cell's values add up to the same."""
    totals = np.array([cell.sum() for cell in np.split(values, ends) if cell.size])
    if len(totals) < FEWEST_CELLS:
        return False
    return _is_true_of_most(list(np.abs(totals / np.median(totals) - 1) < SAME_TOTAL), 0.9)


def _multiples(values: FloatArray, ends: npt.NDArray) -> Iterator[FloatArray]:
    """Values of each cell over the smallest, if there are enough different ones."""
    for cell in np.split(values, ends):
        if cell.size:
            multiples = cell / cell.min()
            multiples = multiples[multiples < LARGEST_MULTIPLE]
            if len(np.unique(np.rint(multiples))) >= FEWEST_MULTIPLES:
                yield multiples


def _is_true_of_most(answers: list[Any], share: float) -> bool:
    return len(answers) > 0 and float(np.mean(answers)) > share


def _differs(found: Scale, trained_on: Scale) -> bool:
    """Whether the scales of cells to predict and of training cells are not the same."""
    if found.nonnegative != trained_on.nonnegative:
        return True
    if not found.nonnegative or found.total == 0 or trained_on.total == 0:
        return False
    if found.counts != trained_on.counts:
        return True
    # Training cells of which nothing is known are taken for log-normalised.
    if found.looks != UNKNOWN and {found.looks, trained_on.looks} != {LOG_NORMALISED, UNKNOWN}:
        if found.looks != trained_on.looks:
            return True
    if not (found.is_logarithm and trained_on.is_logarithm):
        return False
    is_near = trained_on.least_total / FAR < found.total < trained_on.most_total * FAR
    return not (math.isclose(found.base, trained_on.base) and is_near)


def _advice(scale: Scale) -> str:
    """What to call if training cells are on a scale that SpaPerb is not made for."""
    if scale.looks == NOT_LOGGED:
        return f"Call {NORMALISE_ADVICE}; the latter alone if the cells are normalised already."
    if scale.looks == LOGGED_TWICE:
        return f"Start from the counts, and take logarithms once: {NORMALISE_ADVICE}."
    if scale.looks == NOT_NORMALISED:
        return (
            f"Start from the counts: {NORMALISE_ADVICE}. Cells that were brought to one depth in "
            "another way (counts that SCTransform corrected, say) can stay as they are."
        )
    base = next(b for b in COMMON_BASES if scale.looks == _log_normalised_to(b))
    noted = None if base == math.e else base
    return (
        f"By adata.uns['log1p']['base'] (or without it) the base would be {_name(scale.base)}. "
        f"Put the right one there: adata.uns['log1p'] = {{'base': {noted}}}."
    )


def _advice_for_query(trained_on: Scale) -> str:
    """What to call if cells to predict are on another scale."""
    if not trained_on.is_logarithm:
        return (
            "Bring them to that scale, or better train on log-normalised cells: "
            f"{NORMALISE_ADVICE}."
        )
    target = f"{trained_on.target_sum:.6g}" if trained_on.is_of_all_genes else "..."
    is_natural = math.isclose(trained_on.base, math.e)
    base = "" if is_natural else f", base={_name(trained_on.base)}"
    return (
        "Normalise their counts as those of the training cells, with the same target sum over the "
        f"same genes and the same base: sc.pp.normalize_total(adata, target_sum={target}) and "
        f"then sc.pp.log1p(adata{base})."
    )


def _log_normalised_to(base: float) -> str:
    """Name of the scale of logarithms to another base than declared."""
    return f"log-normalised to base {_name(base)}"


def _name(base: float) -> str:
    return "e" if math.isclose(base, math.e) else f"{base:.6g}"


def _row_blocks(x: Expression) -> Iterator[tuple[int, Expression]]:
    """All rows, and the number of the first: a dask array block by block, in memory."""
    if not isinstance(x, DaskArray):
        yield 0, x
        return
    start = 0
    for rows in track(x.blocks, description="Checking", disable=x.numblocks[0] < MANY_BLOCKS):
        yield start, rows.compute()
        start += rows.shape[0]


def _value_blocks(x: Expression) -> Iterator[np.ndarray]:
    """All stored values, in blocks that are small next to the matrix."""
    values = x.data if sparse.issparse(x) else x
    step = ROWS_AT_ONCE if values.ndim == 2 else ROWS_AT_ONCE * 1024
    for start in range(0, len(values), step):
        yield values[start : start + step]
