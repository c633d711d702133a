"""The in-context networks: E, H, attention, E_delta and D know a gene by its looks alone.

With the inputs of :mod:`spaperb.evidence` (genes g, pieces of evidence s)::

    Z_ctrl    = E(u_g)                      h_sg = H(x_sg, r_s, Z_ctrl)
    a_sg      = softmax_s( l(h_sg) + log prior_s )
    Z_delta, gate, sigma = E_delta(sum_s a_sg h_sg, Z_ctrl)
    change_g  = (sum_s a_sg Delta_sg) (1 + gate) + c_g (D(Z_ctrl + Z_delta) - D(Z_ctrl))

V_delta, uniform on (0, 1), draws a change through the normal quantile function::

    change_g(V) = change_g + c_g sigma_g Phi^-1(V_g)

The last layers start at zero: untrained, the change is the prior-weighted mean of the shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from spaperb._types import FloatArray
from spaperb.evidence import EVIDENCE_FEATURES, RELATIONS, STATE_FEATURES, Description

MAX_INPUT = 5.0
"""Standardised inputs are clipped here: data unlike any in training lead less far astray."""
LEAST_DEVIATION = 0.05
"""An input that never varies is not blown up where it does."""
FIRST_SIGMA = 0.1
"""sigma of an untrained network, in units of c."""


class Constants(NamedTuple):
    """Mean and deviation that inputs are standardised by: fixed, saved with the weights."""

    state: tuple[FloatArray, FloatArray]
    pieces: tuple[FloatArray, FloatArray]
    relations: tuple[FloatArray, FloatArray]

    @classmethod
    def none(cls) -> Constants:
        """Constants that leave inputs as they are."""
        sizes = (len(STATE_FEATURES), len(EVIDENCE_FEATURES), len(RELATIONS))
        return cls(*((np.zeros(n), np.ones(n)) for n in sizes))

    @classmethod
    def of(cls, descriptions: Sequence[Description]) -> Constants:
        """Mean and deviation of some descriptions' inputs."""
        inputs = (
            np.concatenate([np.reshape(x, (-1, x.shape[-1])) for x in kind])
            for kind in zip(*((d.state, d.pieces, d.relations) for d in descriptions), strict=True)
        )
        return cls(*((x.mean(axis=0), np.maximum(x.std(axis=0), LEAST_DEVIATION)) for x in inputs))


class Answer(NamedTuple):
    """Predicted change of each gene, ``(..., G)`` each.

    Attributes
    ----------
    mean
        Change of the mean.
    sigma
        Error scale: the change's error beyond sampling noise has this standard deviation.
    z_ctrl, z_delta
        Latent state of the control cells and its shift, ``(..., G, L)``.
    attention
        a, ``(..., M, G)``.
    """

    mean: torch.Tensor
    sigma: torch.Tensor
    z_ctrl: torch.Tensor
    z_delta: torch.Tensor
    attention: torch.Tensor


class Standardise(nn.Module):
    """Inputs less their usual mean over their usual deviation, clipped."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, mean: FloatArray, deviation: FloatArray):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("deviation", torch.as_tensor(deviation, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Standardise the last axis."""
        return ((x - self.mean) / self.deviation).clamp(-MAX_INPUT, MAX_INPUT)


def zero_linear(n_input: int) -> nn.Linear:
    """Last layer with one output, which starts at zero."""
    layer = nn.Linear(n_input, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class EvidenceEncoder(nn.Module):
    """H: a piece of evidence on a gene, how it relates to the query, and Z_ctrl, to h.

    The first layer comes in three parts, so that what is the same for all genes, or for all
    pieces, is computed once.
    """

    def __init__(self, n_latent: int, n_hidden: int):
        super().__init__()
        self.of_pieces = nn.Linear(len(EVIDENCE_FEATURES), n_hidden)
        self.of_relations = nn.Linear(len(RELATIONS), n_hidden, bias=False)
        self.of_latent = nn.Linear(n_latent, n_hidden, bias=False)
        self.last = nn.Sequential(nn.ELU(), nn.Linear(n_hidden, n_hidden), nn.ELU())

    def forward(
        self, pieces: torch.Tensor, relations: torch.Tensor, z_ctrl: torch.Tensor
    ) -> torch.Tensor:
        """Map x ``(..., M, G, n_evidence)``, r ``(..., M, n_relations)``, Z_ctrl to h."""
        first = self.of_pieces(pieces) + self.of_relations(relations).unsqueeze(-2)
        return self.last(first + self.of_latent(z_ctrl).unsqueeze(-3))


class GeneDeltaEncoder(nn.Module):
    """E_delta: what attention gathered, and Z_ctrl, to Z_delta, gate and error scale."""

    def __init__(self, n_latent: int, n_hidden: int):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(n_hidden + n_latent, n_hidden), nn.ELU())
        self.latent = nn.Linear(n_hidden, n_latent)
        self.gate = zero_linear(n_hidden)
        self.log_sigma = zero_linear(n_hidden)

    def forward(
        self, context: torch.Tensor, z_ctrl: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map ``(..., G, n_hidden)``, ``(..., G, L)`` to Z_delta, gate and sigma / c."""
        hidden = self.hidden(torch.cat([context, z_ctrl], dim=-1))
        sigma = FIRST_SIGMA * self.log_sigma(hidden)[..., 0].exp()
        return self.latent(hidden), self.gate(hidden)[..., 0], sigma


class InContextNetwork(nn.Module):
    """E, H, attention, E_delta and D.

    Parameters
    ----------
    constants
        What inputs are standardised by.
    n_latent
        Latent dimensions of a gene, L.
    n_hidden
        Units of each hidden layer.
    """

    def __init__(self, constants: Constants, n_latent: int = 16, n_hidden: int = 48):
        super().__init__()
        self.n_latent, self.n_hidden = n_latent, n_hidden
        self.of_state = Standardise(*constants.state)
        self.of_pieces = Standardise(*constants.pieces)
        self.of_relations = Standardise(*constants.relations)
        self.encoder = nn.Sequential(
            nn.Linear(len(STATE_FEATURES), n_hidden), nn.ELU(), nn.Linear(n_hidden, n_latent)
        )
        self.evidence_encoder = EvidenceEncoder(n_latent, n_hidden)
        self.score = zero_linear(n_hidden)
        self.delta_encoder = GeneDeltaEncoder(n_latent, n_hidden)
        self.decoder = nn.Sequential(
            nn.Linear(n_latent, n_hidden), nn.ELU(), zero_linear(n_hidden)
        )

    def standardise_by(self, constants: Constants) -> None:
        """Take other constants."""
        for part, (mean, deviation) in zip(
            (self.of_state, self.of_pieces, self.of_relations), constants, strict=True
        ):
            part.mean.copy_(torch.as_tensor(mean))
            part.deviation.copy_(torch.as_tensor(deviation))

    def encode(self, state: torch.Tensor) -> torch.Tensor:
        """E: states u ``(..., G, n_state)`` to Z ``(..., G, L)``."""
        return self.encoder(self.of_state(state))

    def infer(
        self,
        state: torch.Tensor,
        pieces: torch.Tensor,
        relations: torch.Tensor,
        log_prior: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Z_ctrl, the attention a, and what it gathers, sum_s a_sg h_sg.

        The arguments are of a :class:`spaperb.evidence.Description`; several of one shape may be
        stacked along leading axes. Pieces with a log prior of minus infinity are padding and
        change nothing.
        """
        z_ctrl = self.encode(state)
        h = self.evidence_encoder(self.of_pieces(pieces), self.of_relations(relations), z_ctrl)
        attention = torch.softmax(self.score(h)[..., 0] + log_prior[..., None], dim=-2)
        context = (attention[..., None] * h).sum(dim=-3)
        return {"z_ctrl": z_ctrl, "attention": attention, "context": context}

    def generate(
        self,
        z_ctrl: torch.Tensor,
        attention: torch.Tensor,
        context: torch.Tensor,
        shifts: torch.Tensor,
        scale: torch.Tensor,
    ) -> Answer:
        """Change of each gene and its error scale."""
        z_delta, gate, sigma = self.delta_encoder(context, z_ctrl)
        correction = (self.decoder(z_ctrl + z_delta) - self.decoder(z_ctrl))[..., 0]
        mean = (attention * shifts).sum(dim=-2) * (1 + gate) + scale * correction
        return Answer(mean, scale * sigma, z_ctrl, z_delta, attention)

    def forward(
        self,
        state: torch.Tensor,
        pieces: torch.Tensor,
        relations: torch.Tensor,
        log_prior: torch.Tensor,
        shifts: torch.Tensor,
        scale: torch.Tensor,
    ) -> Answer:
        """Predict changes from their descriptions."""
        return self.generate(
            **self.infer(state, pieces, relations, log_prior), shifts=shifts, scale=scale
        )


def tensors(arrays: tuple[FloatArray, ...]) -> list[torch.Tensor]:
    """Arrays in single precision."""
    return [torch.from_numpy(np.asarray(a, dtype=np.float32)) for a in arrays]
