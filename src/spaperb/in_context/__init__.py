"""The in-context objective: networks shared by all genes, attention over measured changes."""

from spaperb.in_context._networks import Answer, Constants, InContextNetwork
from spaperb.in_context._training import Settings, fit_constants, loss_of, predict, train

__all__ = [
    "Answer",
    "Constants",
    "InContextNetwork",
    "Settings",
    "fit_constants",
    "loss_of",
    "predict",
    "train",
]
