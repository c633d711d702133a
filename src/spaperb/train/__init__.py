"""How training runs: plans, callbacks, checkpoints."""

from spaperb.train._callbacks import StopOnInterrupt, StopOnNonFinite
from spaperb.train._identity import check_unchanged, data_digests, digest
from spaperb.train._plan import InContextTrainingPlan, SpaPerbTrainingPlan
from spaperb.train._runner import SaveTraining, SpaPerbTrainRunner, one_thread, quiet_training

__all__ = [
    "InContextTrainingPlan",
    "SaveTraining",
    "SpaPerbTrainRunner",
    "SpaPerbTrainingPlan",
    "StopOnInterrupt",
    "StopOnNonFinite",
    "check_unchanged",
    "data_digests",
    "digest",
    "one_thread",
    "quiet_training",
]
