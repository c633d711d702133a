"""Measured changes, how they relate to a query, and episodes to learn from."""

from spaperb.evidence._episodes import Episode, draw
from spaperb.evidence._measured import Changes, Evidence, Populations
from spaperb.evidence._relations import (
    EVIDENCE_FEATURES,
    RELATIONS,
    STATE_FEATURES,
    Description,
    Query,
    describe,
)

__all__ = [
    "EVIDENCE_FEATURES",
    "RELATIONS",
    "STATE_FEATURES",
    "Changes",
    "Description",
    "Episode",
    "Evidence",
    "Populations",
    "Query",
    "describe",
    "draw",
]
