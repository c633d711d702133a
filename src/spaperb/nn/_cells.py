"""The networks.

Encoder E, delta encoder E_delta, decoder D, and the embedding of perturbations.
"""

from __future__ import annotations

import torch
from scvi.nn import FCLayers
from torch import nn
from torch.distributions import Normal

from spaperb._compat import adjust_layers

BATCH_NORM_MOMENTUM = 0.1
"""PyTorch's default. scvi-tools' 0.01 needs hundreds of minibatches before the running statistics
describe the data, and a few thousand cells give only some ten minibatches an epoch."""
MAX_LOG_VAR = 40.0
"""Beyond it the posterior's deviation would be infinite or 0, for cells unlike training."""
LEAST_DOSE = 1e-30
"""Has the effect of none, and a logarithm."""


class Dropout(nn.Dropout):
    """PyTorch's dropout, with a mask that a CPU draws four times as fast.

    On a CPU PyTorch takes 64 random bits for each unit's fate, one unit after the other, a sixth
    of all training time here. This takes 16, so that the rate is exact to 1 / 131,072. Elsewhere
    it is PyTorch's own.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Set a share p of ``x`` to zero, and scale the rest by 1 / (1 - p)."""
        if not self.training or x.device.type != "cpu" or not 0 < self.p < 1:
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        is_kept = bits >= round(self.p * 2**16) - 2**15
        return x * is_kept.to(x.dtype).div_(1 - self.p)


def hidden_layers(
    n_input: int, n_hidden: int, n_layers: int, dropout_rate: float, n_batch: int = 0
) -> FCLayers:
    """Stack of ``n_layers`` blocks: linear, batch normalisation, ELU, dropout.

    With two batches or more every linear layer sees a cell's batch, one-hot, beside its input.
    """
    layers = FCLayers(
        n_in=n_input,
        n_out=n_hidden,
        n_layers=n_layers,
        n_hidden=n_hidden,
        n_cat_list=[n_batch] if n_batch > 1 else None,
        dropout_rate=dropout_rate,
        use_batch_norm=True,
        activation_fn=nn.ELU,
    )
    adjust_layers(layers, BATCH_NORM_MOMENTUM, lambda: Dropout(dropout_rate))
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
    n_batch
        Number of batches; fewer than two are no covariate.
    """

    def __init__(
        self,
        n_input: int,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        dropout_rate: float,
        n_batch: int = 0,
    ):
        super().__init__()
        self.hidden = hidden_layers(n_input, n_hidden, n_layers, dropout_rate, n_batch)
        self.mu = nn.Linear(n_hidden, n_latent)
        self.log_var = nn.Linear(n_hidden, n_latent)

    def forward(self, x: torch.Tensor, batch: torch.Tensor | None = None) -> Normal:
        """Map expression ``(n, G)`` to a normal distribution over latent vectors ``(n, L)``.

        ``batch`` holds numbers, ``(n, 1)``, or shares of the batches, ``(n, n_batch)``.
        """
        h = self.hidden(x, batch)
        log_var = self.log_var(h).clamp(-MAX_LOG_VAR, MAX_LOG_VAR)
        # Not validated: NaN is for training to find, once an epoch and with its causes.
        return Normal(self.mu(h), torch.exp(0.5 * log_var), validate_args=False)


class PerturbationEmbedding(nn.Module):
    """The vector e of a perturbation: the sum of its parts' vectors, ``sum_p s_p(d) e_p``.

    s_p is 1 without doses; with them it is the Hill function of the dose d, which rises from 0 at
    no dose to 1, with the half-effective dose k_p and the steepness h_p learned::

        s_p(d) = d^h_p / (d^h_p + k_p^h_p) = sigmoid(h_p (log d - log k_p))

    Parameters
    ----------
    n_perturbations
        Number of perturbations, P.
    n_latent
        Length of the vectors.
    dosed
        Whether perturbations have doses.

    References
    ----------
    Hill (1910), Journal of Physiology 40, iv-vii.
    """

    def __init__(self, n_perturbations: int, n_latent: int, dosed: bool):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(n_perturbations, n_latent) / n_latent**0.5)
        self.dosed = dosed
        if dosed:
            self.log_half = nn.Parameter(torch.zeros(n_perturbations))
            self.log_steepness = nn.Parameter(torch.zeros(n_perturbations))

    def forward(self, composition: torch.Tensor, dose: torch.Tensor | None) -> torch.Tensor:
        """Map compositions ``(n, P)``, and doses ``(n, 1)``, to vectors ``(n, L)``."""
        if self.dosed and dose is not None:
            # Control cells may have no dose; they have no parts either.
            log_dose = dose.nan_to_num(0.0).clamp(min=LEAST_DOSE).log()
            steepness = self.log_steepness.exp()
            composition = composition * torch.sigmoid(steepness * (log_dose - self.log_half))
        return composition @ self.vectors


class DeltaEncoder(nn.Module):
    """E_delta: from the random vector V_delta, and a perturbation's vector e, to Z_delta.

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
    n_embedding
        Length of e, 0 if there is only one perturbation.
    """

    def __init__(
        self,
        n_input: int,
        n_latent: int,
        n_hidden: int | None,
        dropout_rate: float,
        n_embedding: int = 0,
    ):
        super().__init__()
        n_input = n_input + n_embedding
        self.network = (
            nn.Linear(n_input, n_latent)
            if n_hidden is None
            else nn.Sequential(
                hidden_layers(n_input, n_hidden, 1, dropout_rate), nn.Linear(n_hidden, n_latent)
            )
        )

    def forward(self, v_delta: torch.Tensor, e: torch.Tensor | None = None) -> torch.Tensor:
        """Map V_delta ``(n, G)``, and e ``(n, n_embedding)``, to Z_delta ``(n, L)``."""
        return self.network(v_delta if e is None else torch.cat([v_delta, e], dim=1))


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
    n_batch
        Number of batches; fewer than two are no covariate.
    """

    def __init__(
        self,
        n_latent: int,
        n_output: int,
        n_hidden: int,
        n_layers: int,
        dropout_rate: float,
        n_batch: int = 0,
    ):
        super().__init__()
        self.hidden = hidden_layers(n_latent, n_hidden, n_layers, dropout_rate, n_batch)
        self.output = nn.Linear(n_hidden, n_output)

    def forward(self, z: torch.Tensor, batch: torch.Tensor | None = None) -> torch.Tensor:
        """Map latent vectors ``(n, L)`` to expression ``(n, G)``; ``batch`` as in the encoder."""
        return self.output(self.hidden(z, batch))
