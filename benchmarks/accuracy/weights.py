"""Pretrained weights that never saw the data set that they are judged on."""

from pathlib import Path

from spaperb.nn import data_sets_of

FOLDER = Path(__file__).parents[2] / "pretraining" / "weights"


def without(data_set: str) -> Path:
    """Return the file of weights that were trained on all data sets but one.

    Raises
    ------
    ValueError
        If the file says that they saw it.
    """
    path = FOLDER / f"without_{data_set}.safetensors"
    if data_set in data_sets_of(path):
        raise ValueError(f"The weights in {path} were trained on {data_set}.")
    return path
