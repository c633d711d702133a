"""The networks: of cells (published objective), and of genes in context (in-context objective)."""

from spaperb.nn._cells import LEAST_DOSE, Decoder, DeltaEncoder, Encoder, PerturbationEmbedding
from spaperb.nn._genes import Answer, Constants, GeneDeltaEncoder, InContextNetwork, tensors
from spaperb.nn._weights import data_sets_of, read_weights, shipped_weights, write_weights

__all__ = [
    "LEAST_DOSE",
    "Answer",
    "Constants",
    "Decoder",
    "DeltaEncoder",
    "Encoder",
    "GeneDeltaEncoder",
    "InContextNetwork",
    "PerturbationEmbedding",
    "data_sets_of",
    "read_weights",
    "shipped_weights",
    "tensors",
    "write_weights",
]
