"""Measured changes, how they relate to a query, and episodes to learn from."""

from spaperb.evidence._episodes import (
    Episode,
    Fold,
    Plan,
    draw,
    draw_genes,
    forget_perturbation,
    is_told,
    leave_out,
    make_episode,
    make_folds,
    plan_held_out,
)
from spaperb.evidence._measured import Changes, Evidence, Populations
from spaperb.evidence._moments import CLOSE
from spaperb.evidence._relations import (
    EVIDENCE_FEATURES,
    RELATIONS,
    STATE_FEATURES,
    ContextQuery,
    Description,
    Relation,
    agreement,
    describe,
    describe_related,
    dose_shares,
    relate,
    shrunk,
)
from spaperb.evidence._settings import Settings
from spaperb.evidence._states import MAX_STATE_CELLS, find_states, nearest_state, states_of
from spaperb.evidence._suggest import Choice, suggest

__all__ = [
    "CLOSE",
    "EVIDENCE_FEATURES",
    "MAX_STATE_CELLS",
    "RELATIONS",
    "STATE_FEATURES",
    "Changes",
    "Choice",
    "ContextQuery",
    "Description",
    "Episode",
    "Evidence",
    "Fold",
    "Plan",
    "Populations",
    "Relation",
    "Settings",
    "agreement",
    "describe",
    "describe_related",
    "dose_shares",
    "draw",
    "draw_genes",
    "find_states",
    "forget_perturbation",
    "is_told",
    "leave_out",
    "make_episode",
    "make_folds",
    "nearest_state",
    "plan_held_out",
    "relate",
    "shrunk",
    "states_of",
    "suggest",
]
