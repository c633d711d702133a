"""SpaPerb: predict how cells respond to a stimulus where the response was never measured."""

from importlib.metadata import version

from spaperb import baselines, benchmark, datasets, metrics, pl, populations
from spaperb.disk import read_mapped
from spaperb.model import SpaPerbModel

__all__ = [
    "SpaPerbModel",
    "baselines",
    "benchmark",
    "datasets",
    "metrics",
    "pl",
    "populations",
    "read_mapped",
]

__version__ = version("spaperb")
