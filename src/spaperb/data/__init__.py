"""What cells and their columns mean."""

from spaperb.data._labels import match_labels

__all__ = ["match_labels"]
