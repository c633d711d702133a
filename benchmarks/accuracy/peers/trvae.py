"""trVAE: a conditional variational auto-encoder whose conditions are made alike in one layer.

After Lotfollahi et al. 2020, doi:10.1093/bioinformatics/btaa800: the first layer of the decoder is
regularised by the maximum mean discrepancy between conditions, and a cell is predicted by encoding
it with its own condition and decoding it with another. This is our own, short version of it.
"""

import copy
import itertools

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from spaperb.populations import dense

# Sizes, losses and training are those of scPerturBench (bm2-lab/scPerturBench, mytrVAE.py of
# Cellular_context_generalization/o.o.d.) and, where it leaves them out, scArches' defaults, which
# it uses; only the layer with the discrepancy is the paper's and not scArches' default.
N_HIDDEN = 128
N_LATENT = 10
DROPOUT = 0.2
VALIDATION = 0.1
LEARNING_RATE = 1e-3
EPSILON = 0.01
WEIGHT_DECAY = 0.04
MOST_GRADIENT = 100.0
LEAST_VARIANCE = 1e-4
SCALES = (
    *(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0),
    *(1e2, 1e3, 1e4, 1e5, 1e6),
)
"""Variances of the Gaussian kernels whose sum is the kernel of the discrepancy."""


class TrVAE:
    """Train on the cells of all conditions, then decode control cells as stimulated ones.

    Parameters
    ----------
    max_epochs
        Epochs at most.
    patience
        Epochs without a better loss of the validation cells until training ends.
    n_anneal
        Epochs until the Kullback-Leibler divergence has its full weight.
    batch_size
        Cells of a minibatch, drawn so that conditions are equally frequent.
    """

    def __init__(
        self,
        max_epochs: int = 1000,
        patience: int = 100,
        n_anneal: int = 200,
        batch_size: int = 512,
    ):
        self.max_epochs = max_epochs
        self.patience = patience
        self.n_anneal = n_anneal
        self.batch_size = batch_size

    def fit(self, adata, *, condition_key, control, stimulated, seed, **setup):
        """Train; the weights are those of the epoch with the best validation loss."""
        torch.manual_seed(seed)
        names = adata.obs[condition_key].astype(str).to_numpy()
        self.conditions, codes = np.unique(names, return_inverse=True)
        self.control, self.stimulated = str(control), str(stimulated)
        x = torch.as_tensor(dense(adata.X), dtype=torch.float32)
        c = functional.one_hot(torch.as_tensor(codes)).float()

        order = torch.randperm(len(x))
        valid, train = order.tensor_split([round(VALIDATION * len(x))])
        of_condition = c[train].sum(0)
        chances = (c[train] / of_condition.clamp(min=1)).sum(1)
        self.network = _Network(x.shape[1], c.shape[1])
        optimiser = torch.optim.Adam(
            self.network.parameters(),
            lr=LEARNING_RATE,
            eps=EPSILON,
            weight_decay=WEIGHT_DECAY,
        )
        lowest, best, best_epoch = np.inf, None, 0
        for epoch in range(self.max_epochs):
            self.network.train()
            drawn = train[torch.multinomial(chances, len(train), replacement=True)]
            for rows in drawn.split(self.batch_size):
                if len(rows) == 1:  # batch normalisation needs two cells
                    continue
                weight = min(epoch / self.n_anneal, 1.0)
                optimiser.zero_grad()
                self.network.loss(x[rows], c[rows], weight).backward()
                nn.utils.clip_grad_value_(self.network.parameters(), MOST_GRADIENT)
                optimiser.step()
            self.network.eval()
            with torch.no_grad():
                loss = float(self.network.loss(x[valid], c[valid], 1.0))
            if loss < lowest:
                lowest, best_epoch = loss, epoch
                best = copy.deepcopy(self.network.state_dict())
            if epoch - best_epoch >= self.patience:
                break
        self.network.load_state_dict(best)
        return self

    @torch.no_grad()
    def predict(self, adata_control):
        """Encode as control, decode as stimulated; the decoder's last layer is never negative."""
        x = torch.as_tensor(dense(adata_control.X), dtype=torch.float32)
        source, target = (
            torch.as_tensor(self.conditions == name).float().expand(len(x), -1)
            for name in (self.control, self.stimulated)
        )
        self.network.eval()
        z = self.network.posterior(x, source).sample()
        return self.network.decode(z, target)[0].numpy()


class _Network(nn.Module):
    """Encoder and decoder, both told the condition as ``(n, n_conditions)`` of zeros and a one."""

    def __init__(self, n_genes: int, n_conditions: int):
        super().__init__()
        self.encoder = nn.Sequential(
            *_layer(n_genes + n_conditions, N_HIDDEN), *_layer(N_HIDDEN, N_HIDDEN)
        )
        self.mean = nn.Linear(N_HIDDEN, N_LATENT)
        self.log_variance = nn.Linear(N_HIDDEN, N_LATENT)
        self.first = nn.Sequential(*_layer(N_LATENT + n_conditions, N_HIDDEN))
        self.rest = nn.Sequential(
            *_layer(N_HIDDEN, N_HIDDEN), nn.Linear(N_HIDDEN, n_genes), nn.ReLU()
        )

    def posterior(self, x: torch.Tensor, c: torch.Tensor) -> torch.distributions.Normal:
        """Distribution of the latent vectors of cells, ``(n, n_latent)``."""
        hidden = self.encoder(torch.cat([x, c], dim=1))
        variance = self.log_variance(hidden).exp() + LEAST_VARIANCE
        return torch.distributions.Normal(self.mean(hidden), variance.sqrt())

    def decode(self, z: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return expression ``(n, n_genes)`` and the first layer ``(n, n_hidden)``."""
        first = self.first(torch.cat([z, c], dim=1))
        return self.rest(first), first

    def loss(self, x: torch.Tensor, c: torch.Tensor, weight: float) -> torch.Tensor:
        """Squared error, weighted divergence from the prior, and discrepancy of conditions."""
        posterior = self.posterior(x, c)
        predicted, first = self.decode(posterior.rsample(), c)
        prior = torch.distributions.Normal(0.0, 1.0)
        divergence = torch.distributions.kl_divergence(posterior, prior).sum(1).mean()
        groups = [group for k in c.T if len(group := first[k == 1])]
        pairs = itertools.combinations(groups, 2)
        discrepancy = sum((_discrepancy(a, b) for a, b in pairs), start=first.new_zeros(()))
        return (predicted - x).square().sum(1).mean() + weight * divergence + discrepancy


def _layer(n_in: int, n_out: int) -> list[nn.Module]:
    """Make a hidden layer."""
    return [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU(), nn.Dropout(DROPOUT)]


def _discrepancy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared maximum mean discrepancy between the rows of two matrices, at all scales."""
    return _kernel(a, a).mean() + _kernel(b, b).mean() - 2 * _kernel(a, b).mean()


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of Gaussian kernels between rows, ``(n_a, n_b)``."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    precisions = 1 / a.new_tensor(SCALES)[:, None, None]
    return torch.exp(-squares.clamp(min=0) * precisions / 2).sum(0)
