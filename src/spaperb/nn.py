"""The three networks of METHOD.md: encoder E, delta encoder E_delta, decoder D."""

from __future__ import annotations

import torch
from scvi.nn import FCLayers
from torch import nn
from torch.distributions import Normal

BATCH_NORM_MOMENTUM = 0.1
"""PyTorch's default. scvi-tools' 0.01 needs hundreds of minibatches before the running statistics
describe the data, and a few thousand cells give only some ten minibatches an epoch."""


def hidden_layers(n_input: int, n_hidden: int, n_layers: int, dropout_rate: float) -> FCLayers:
    """Stack of ``n_layers`` blocks: linear, batch normalisation, ELU, dropout."""
    layers = FCLayers(
        n_in=n_input,
        n_out=n_hidden,
        n_layers=n_layers,
        n_hidden=n_hidden,
        dropout_rate=dropout_rate,
        use_batch_norm=True,
        activation_fn=nn.ELU,
    )
    for module in layers.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = BATCH_NORM_MOMENTUM
    return layers


class Encoder(nn.Module):
    """E: expression to the posterior of the latent variable, q(z | x) = N(mu(x), sigma(x)).

    Parameters
    ----------
    n_input
        Number of genes, G.
    n_latent
        Number of latent dimensions, L.
    n_hidden
        Units in each hidden layer.
    n_layers
        Number of hidden layers.
    dropout_rate
        Dropout rate of the hidden layers.
    """

    def __init__(
        self, n_input: int, n_latent: int, n_hidden: int, n_layers: int, dropout_rate: float
    ):
        super().__init__()
        self.hidden = hidden_layers(n_input, n_hidden, n_layers, dropout_rate)
        self.mu = nn.Linear(n_hidden, n_latent)
        self.log_var = nn.Linear(n_hidden, n_latent)

    def forward(self, x: torch.Tensor) -> Normal:
        """Map expression ``(n, G)`` to a normal distribution over latent vectors ``(n, L)``."""
        h = self.hidden(x)
        return Normal(self.mu(h), torch.exp(0.5 * self.log_var(h)))


class DeltaEncoder(nn.Module):
    """E_delta: the random vector V_delta to the latent shift Z_delta.

    Parameters
    ----------
    n_input
        Length of V_delta, the number of genes G.
    n_latent
        Number of latent dimensions, L.
    n_hidden
        Units of one hidden layer, or ``None`` for a linear map.
    dropout_rate
        Dropout rate of the hidden layer.
    """

    def __init__(self, n_input: int, n_latent: int, n_hidden: int | None, dropout_rate: float):
        super().__init__()
        self.network = (
            nn.Linear(n_input, n_latent)
            if n_hidden is None
            else nn.Sequential(
                hidden_layers(n_input, n_hidden, 1, dropout_rate), nn.Linear(n_hidden, n_latent)
            )
        )

    def forward(self, v_delta: torch.Tensor) -> torch.Tensor:
        """Map V_delta ``(n, G)`` to Z_delta ``(n, L)``."""
        return self.network(v_delta)


class Decoder(nn.Module):
    """D: latent vectors to expression, with a linear output.

    Parameters
    ----------
    n_latent
        Number of latent dimensions, L.
    n_output
        Number of genes, G.
    n_hidden
        Units in each hidden layer.
    n_layers
        Number of hidden layers.
    dropout_rate
        Dropout rate of the hidden layers.
    """

    def __init__(
        self, n_latent: int, n_output: int, n_hidden: int, n_layers: int, dropout_rate: float
    ):
        super().__init__()
        self.hidden = hidden_layers(n_latent, n_hidden, n_layers, dropout_rate)
        self.output = nn.Linear(n_hidden, n_output)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Map latent vectors ``(n, L)`` to expression ``(n, G)``."""
        return self.output(self.hidden(z))
