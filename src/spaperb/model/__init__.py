"""The model: what a user sees of SpaPerb."""

from spaperb.model._model import SpaPerbModel

__all__ = [
    "SpaPerbModel",
]
