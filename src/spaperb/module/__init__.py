"""The two objectives: modules with inference, generative and loss, line for line."""

from spaperb.module._in_context import HeldOut, InContextModule
from spaperb.module._published import CONDITION_KEY, DOSE_KEY, PublishedModule

__all__ = ["CONDITION_KEY", "DOSE_KEY", "HeldOut", "InContextModule", "PublishedModule"]
