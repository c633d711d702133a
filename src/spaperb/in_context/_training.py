"""Training in episodes: from scratch, over several data sets, or on from pretrained weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from spaperb._types import FloatArray
from spaperb.evidence import Description, Episode, Evidence, draw
from spaperb.in_context._networks import Answer, Constants, InContextNetwork, tensors

N_FIRST = 64
"""Episodes that constants are taken from."""
LEAST_DEVIATION = 0.05
"""An input that never varies is not blown up where it does."""
BLOCK = 200_000
"""Pairs of a gene and a piece of evidence predicted at a time: some 100 MB."""


@dataclass(frozen=True)
class Settings:
    """How networks are built and trained."""

    n_latent: int = 16
    n_hidden: int = 48
    n_steps: int = 350
    n_episodes: int = 4
    n_genes: int = 512
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    latent_weight: float = 1.0
    sigma_weight: float = 0.01
    penalty: float = 0.0
    """Weight of the squared distance from the pretrained weights."""
    max_norm: float = 1.0


def fit_constants(evidence: Sequence[Evidence], seed: int, n_genes: int = 512) -> Constants:
    """Mean and deviation of the inputs of some episodes; every data set counts the same."""
    rng = np.random.default_rng([seed, 0])
    inputs: list[list[FloatArray]] = [[], [], []]
    for i in range(N_FIRST):
        description = draw(evidence[i % len(evidence)], rng, n_genes).description
        for kind, x in zip(
            inputs,
            (description.state, description.pieces, description.relations),
            strict=True,
        ):
            kind.append(x.reshape(-1, x.shape[-1]))
    return Constants(
        *(
            (x.mean(axis=0), np.maximum(x.std(axis=0), LEAST_DEVIATION))
            for x in map(np.concatenate, inputs)
        )
    )


def loss_of(
    network: InContextNetwork, episode: Episode, unit: float, settings: Settings
) -> torch.Tensor:
    """Loss of an episode; ``unit`` is the mean square of the data set's changes."""
    answer: Answer = network(*tensors(episode.description))
    after, target, error = tensors((episode.after, episode.target, episode.error))
    squares = (answer.mean - target) ** 2
    reconstruction = squares.mean() / unit
    latent = functional.smooth_l1_loss(answer.z_delta, network.encode(after) - answer.z_ctrl)
    # The error scale learns from the errors, and leaves the mean alone.
    variance = answer.sigma**2 + error**2
    likelihood = 0.5 * (variance.log() + squares.detach() / variance).mean()
    return episode.weight * (
        reconstruction + settings.latent_weight * latent + settings.sigma_weight * likelihood
    )


def train(
    evidence: Sequence[Evidence],
    settings: Settings,
    seed: int,
    start: InContextNetwork | None = None,
) -> InContextNetwork:
    """Train a network, the same to the last bit for the same seed on the same CPU.

    Parameters
    ----------
    evidence
        What was measured in each data set; an episode is drawn from one of them, each as often.
    settings
        Settings.
    seed
        Seed of weights and episodes.
    start
        Pretrained network to start from, which is left as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        constants = fit_constants(evidence, seed) if start is None else start.constants
        n_latent, n_hidden = (
            (settings.n_latent, settings.n_hidden)
            if start is None
            else (start.n_latent, start.n_hidden)
        )
        network = InContextNetwork(constants, n_latent, n_hidden)
    if start is not None:
        network.load_state_dict(start.state_dict())
    first = [p.detach().clone() for p in network.parameters()]
    optimiser = torch.optim.AdamW(
        network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.n_steps
    )
    rng = np.random.default_rng([seed, 1])
    units = [e.mean_square for e in evidence]
    for _ in range(settings.n_steps):
        optimiser.zero_grad()
        for _ in range(settings.n_episodes):
            i = int(rng.integers(len(evidence)))
            episode = draw(evidence[i], rng, settings.n_genes)
            loss = loss_of(network, episode, units[i], settings)
            (loss / settings.n_episodes).backward()
        if settings.penalty:
            moved = torch.stack(
                [((p - p0) ** 2).sum() for p, p0 in zip(network.parameters(), first, strict=True)]
            )
            (settings.penalty * moved.sum()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.max_norm)
        optimiser.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def predict(network: InContextNetwork, description: Description) -> tuple[FloatArray, FloatArray]:
    """Mean change of each gene and its error scale, ``(G,)`` both."""
    state, pieces, relations, log_prior, shifts, scale = tensors(description)
    step = max(1, BLOCK // len(shifts))
    answers = [
        network(state[g], pieces[:, g], relations, log_prior, shifts[:, g], scale[g])
        for g in (slice(i, i + step) for i in range(0, len(state), step))
    ]
    mean, sigma = (torch.cat([getattr(a, k) for a in answers]) for k in ("mean", "sigma"))
    return mean.double().numpy(), sigma.double().numpy()
