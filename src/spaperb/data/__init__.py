"""What cells and their columns mean."""

from spaperb.data._conditions import control_cells
from spaperb.data._labels import match_labels
from spaperb.data._scale import Scale

__all__ = ["Scale", "control_cells", "match_labels"]
