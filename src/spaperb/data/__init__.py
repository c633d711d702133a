"""What cells and their columns mean."""

from spaperb.data._anndata import check_anndata, check_genes, check_no_view, expression_matrix
from spaperb.data._clusters import CLUSTER_NAME, CLUSTERS, find_clusters, name_clusters
from spaperb.data._columns import check_categories, check_column, check_named_once
from spaperb.data._conditions import (
    as_list,
    check_conditions,
    check_doses,
    check_one_stimulus,
    control_cells,
    perturbations_with_pairs,
)
from spaperb.data._disk import as_dask, is_on_disk, read_mapped
from spaperb.data._episodes import EpisodeSplitter, measure, measure_states
from spaperb.data._features import FeatureTable
from spaperb.data._labels import match_labels
from spaperb.data._perturbations import Perturbations, Target, warn_of_whole_names
from spaperb.data._query import Cells, Query, batch_shares, make_query, select_rows
from spaperb.data._registry import (
    CONDITION_KEY,
    DOSE_KEY,
    condition_arms,
    perturbations_of,
    registered_codes,
)
from spaperb.data._scale import (
    MOST_LOG,
    NORMALISE_ADVICE,
    Scale,
    check_counts,
    is_log_normalised,
    log_base,
    warn_of_unusual_expression,
)
from spaperb.data._splitters import MIN_PAIRS, N_BATCHES, PairedDataSplitter, StratifiedSplitter

__all__ = [
    "CLUSTERS",
    "CLUSTER_NAME",
    "CONDITION_KEY",
    "DOSE_KEY",
    "MIN_PAIRS",
    "MOST_LOG",
    "NORMALISE_ADVICE",
    "N_BATCHES",
    "Cells",
    "EpisodeSplitter",
    "FeatureTable",
    "PairedDataSplitter",
    "Perturbations",
    "Query",
    "Scale",
    "StratifiedSplitter",
    "Target",
    "as_dask",
    "as_list",
    "batch_shares",
    "check_anndata",
    "check_categories",
    "check_column",
    "check_conditions",
    "check_counts",
    "check_doses",
    "check_genes",
    "check_named_once",
    "check_no_view",
    "check_one_stimulus",
    "condition_arms",
    "control_cells",
    "expression_matrix",
    "find_clusters",
    "is_log_normalised",
    "is_on_disk",
    "log_base",
    "make_query",
    "match_labels",
    "measure",
    "measure_states",
    "name_clusters",
    "perturbations_of",
    "perturbations_with_pairs",
    "read_mapped",
    "registered_codes",
    "select_rows",
    "warn_of_unusual_expression",
    "warn_of_whole_names",
]
