"""The two objectives: modules with inference, generative and loss, line for line."""

from spaperb.module._in_context import HeldOut, InContextModule
from spaperb.module._published import PublishedModule

__all__ = [
    "HeldOut",
    "InContextModule",
    "PublishedModule",
]
