"""SpaPerb: predict how cells respond to a stimulus where the response was never measured."""

from importlib.metadata import version

from spaperb import datasets, pl, populations, pp
from spaperb.data import read_mapped
from spaperb.evaluation import baselines, benchmark, metrics
from spaperb.model import SpaPerbModel

__all__ = [
    "SpaPerbModel",
    "baselines",
    "benchmark",
    "datasets",
    "metrics",
    "pl",
    "populations",
    "pp",
    "read_mapped",
]

__version__ = version("spaperb")
