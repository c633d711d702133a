"""From the mean change of a population to its cells, which have that mean to the last digits."""

from spaperb.cells._counts import CountChange, Sample
from spaperb.cells._detection import Detection
from spaperb.cells._making import CellMaker, How, PopulationChange
from spaperb.cells._order import Part, Survey, order_of

__all__ = [
    "CellMaker",
    "CountChange",
    "Detection",
    "How",
    "Part",
    "PopulationChange",
    "Sample",
    "Survey",
    "order_of",
]
