"""What cells and their columns mean."""

from spaperb.data._conditions import control_cells
from spaperb.data._labels import match_labels

__all__ = ["control_cells", "match_labels"]
