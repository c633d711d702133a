"""The in-context objective: E, E_delta and D shared by all genes, with attention over the measured changes."""

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
