"""InContextModule: inference, generative and loss of the in-context objective."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import nn
from torch.nn.functional import smooth_l1_loss

from spaperb._types import FloatArray
from spaperb.evidence import Description, Episode
from spaperb.nn import Constants, InContextNetwork, tensors

BLOCK = 200_000
"""Pairs of a gene and a piece of evidence predicted at a time: some 100 MB."""
HALF = 0.5
"""Share of the trained networks that held-out changes have to speak against."""
TINY = 1e-12


class Predicted(NamedTuple):
    """Predicted change of each gene, ``(G,)``: its mean, and the scale of its error."""

    mean: FloatArray
    sigma: FloatArray


class InContextModule(BaseModuleClass):
    """Networks shared by all genes, whose delta encoder attends over measured changes.

    With the state u_g of gene g in the query, each piece of evidence x_sg on it (a change that was
    measured elsewhere), and how the piece relates to the query, r_s (:mod:`spaperb.evidence`)::

        Z_ctrl  = E(u_g)                  h_sg = H(x_sg, r_s, Z_ctrl)
        a_sg    = softmax_s( l(h_sg) + log prior_s )
        Z_delta, gate, sigma = E_delta(sum_s a_sg h_sg, Z_ctrl)
        change  = (sum_s a_sg Delta_sg) (1 + gate) + c_g (D(Z_ctrl + Z_delta) - D(Z_ctrl))
        change(V_delta) = change + sigma Phi^-1(V_delta),    V_delta ~ U(0, 1)

    An *episode* leaves a measured change Delta, of standard error se, out and predicts it from the
    rest::

        L_reconstruction = mean_g (change - Delta)^2 / unit
        L_latent         = SmoothL1(Z_delta, E(u after) - Z_ctrl)
        L_noise          = mean_g log v + (change - Delta)^2 / v,    v = sigma^2 + se^2
        Loss = 100 L_latent + 100 L_reconstruction + 0.5 L_noise

    The unit is the mean square of the data set's changes, of genes that some cell shows. L_noise
    is minus twice the log-likelihood of the measured change; it teaches sigma alone, and takes the
    place of the text's L_KL, since Z_ctrl is no random draw here.

    Each of several networks learns from episodes of its own, without a share of the measured
    changes that is held out of it. It starts from pretrained weights, with inputs standardised as
    these data are. Their mean predicts, together with that of the pretrained networks as they
    were::

        change = (1 - share) change_pretrained + share change_trained

    where the share is chosen on changes that were held out of training (:meth:`choose_share`).

    Parameters
    ----------
    n_latent
        Latent dimensions of a gene, L.
    n_hidden
        Units in each hidden layer.
    n_networks
        Number of networks, F.
    latent_weight, reconstruction_weight, noise_weight
        Weights of the three terms.

    Raises
    ------
    ValueError
        If there is no network.
    """

    def __init__(
        self,
        n_latent: int = 16,
        n_hidden: int = 48,
        n_networks: int = 3,
        latent_weight: float = 100.0,
        reconstruction_weight: float = 100.0,
        noise_weight: float = 0.5,
    ):
        super().__init__()
        if n_networks < 1:
            raise ValueError(f"`n_networks` must be at least 1; it is {n_networks}.")
        self.n_latent, self.n_hidden = n_latent, n_hidden
        self.latent_weight = latent_weight
        self.reconstruction_weight = reconstruction_weight
        self.noise_weight = noise_weight
        self.networks = nn.ModuleList(
            InContextNetwork(Constants.none(), n_latent, n_hidden) for _ in range(n_networks)
        )
        self.pretrained: nn.ModuleList | None = None
        self.register_buffer("share", torch.tensor(1.0))

    @property
    def settings(self) -> dict[str, Any]:
        """What training depends on beside the shapes of the weights."""
        names = ("latent_weight", "reconstruction_weight", "noise_weight")
        return {"objective": "in_context", **{name: getattr(self, name) for name in names}}

    def start_from(self, networks: Sequence[InContextNetwork]) -> Self:
        """Start from pretrained networks, which are kept beside those that are trained."""
        self.pretrained = nn.ModuleList(copy.deepcopy(network) for network in networks)
        self.pretrained.requires_grad_(False)
        self.share.fill_(HALF)
        for i, network in enumerate(self.networks):
            network.load_state_dict(self.pretrained[i % len(self.pretrained)].state_dict())
        return self

    @property
    def all_networks(self) -> list[InContextNetwork]:
        """The trained networks."""
        return cast(list[InContextNetwork], list(self.networks))

    def standardise_by(self, constants: Sequence[Constants]) -> None:
        """Take the constants that the inputs of each trained network are standardised by."""
        for network, of_network in zip(self.all_networks, constants, strict=True):
            network.standardise_by(of_network)

    def _get_inference_input(
        self, tensors: dict[str, torch.Tensor], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        return {name: tensors[name] for name in ("state", "pieces", "relations", "log_prior")}

    def _get_generative_input(
        self,
        tensors: dict[str, torch.Tensor],
        inference_outputs: dict[str, torch.Tensor],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        return {**inference_outputs, "shifts": tensors["shifts"], "scale": tensors["scale"]}

    @auto_move_data
    def inference(
        self,
        state: torch.Tensor,
        pieces: torch.Tensor,
        relations: torch.Tensor,
        log_prior: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Z_ctrl, attention, and what it gathers, of B episodes of each of F networks.

        Parameters
        ----------
        state, pieces, relations, log_prior
            Descriptions (:class:`spaperb.evidence.Description`), stacked ``(F, B, ...)``.

        Returns
        -------
        dict
            ``z_ctrl`` ``(F, B, G, L)``, ``attention`` ``(F, B, M, G)``, ``context`` ``(F, B, G,
            n_hidden)``.
        """
        inferred = [
            network.infer(*of_network)
            for network, *of_network in zip(
                self.all_networks, state, pieces, relations, log_prior, strict=True
            )
        ]
        return {name: torch.stack([i[name] for i in inferred]) for name in inferred[0]}

    @auto_move_data
    def generative(
        self,
        z_ctrl: torch.Tensor,
        attention: torch.Tensor,
        context: torch.Tensor,
        shifts: torch.Tensor,
        scale: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Change of each gene.

        Returns
        -------
        dict
            ``change`` and ``sigma`` ``(F, B, G)``, ``z_delta`` ``(F, B, G, L)``.
        """
        answers = [
            network.generate(*of_network)
            for network, *of_network in zip(
                self.all_networks, z_ctrl, attention, context, shifts, scale, strict=True
            )
        ]
        return {
            "change": torch.stack([a.mean for a in answers]),
            "sigma": torch.stack([a.sigma for a in answers]),
            "z_delta": torch.stack([a.z_delta for a in answers]),
        }

    def loss(
        self,
        tensors: dict[str, torch.Tensor],
        inference_outputs: dict[str, torch.Tensor],
        generative_outputs: dict[str, torch.Tensor],
    ) -> LossOutput:
        """Compute the objective on episodes.

        Parameters
        ----------
        tensors
            Episodes: their descriptions, ``after``, ``target``, ``error``, ``weight`` and
            ``unit``.
        inference_outputs
            Output of :meth:`inference`.
        generative_outputs
            Output of :meth:`generative`.

        Returns
        -------
        LossOutput
            The scalar ``loss``; ``reconstruction_loss``, one value an episode;
            ``extra_metrics["latent_loss"]``.
        """
        squares = (generative_outputs["change"] - tensors["target"]) ** 2
        l_reconstruction = squares.mean(-1) / tensors["unit"]
        z_after = torch.stack(
            [
                network.encode(u)
                for network, u in zip(self.all_networks, tensors["after"], strict=True)
            ]
        )
        latent_change = z_after - inference_outputs["z_ctrl"]
        l_latent = smooth_l1_loss(generative_outputs["z_delta"], latent_change, reduction="none")
        l_latent = l_latent.mean((-1, -2))
        # The error scale learns from the errors, and leaves the mean alone.
        variance = generative_outputs["sigma"] ** 2 + tensors["error"] ** 2
        l_noise = (variance.log() + squares.detach() / variance).mean(-1)
        loss = tensors["weight"] * (
            self.latent_weight * l_latent
            + self.reconstruction_weight * l_reconstruction
            + self.noise_weight * l_noise
        )
        return LossOutput(
            loss=loss.mean(),
            reconstruction_loss=l_reconstruction.ravel(),
            kl_local=torch.zeros_like(l_reconstruction.ravel()),
            extra_metrics={"latent_loss": l_latent.mean()},
        )

    def choose_share(self, held_out: Sequence[HeldOut], pull: float) -> None:
        """Choose the share of the trained networks by least squares on held-out changes.

        With few of them it stays near a half.

        Parameters
        ----------
        held_out
            Changes that networks did not learn from, and what is predicted of them.
        pull
            Held-out changes that weigh as much as the pull to a half.
        """
        gain = size = 0.0
        for episode, trained, pretrained in held_out:
            if pretrained is None:
                return
            moved = trained.mean - pretrained.mean
            unit = episode.weight / max((episode.target**2).mean(), TINY)
            gain += unit * ((episode.target - pretrained.mean) * moved).mean()
            size += unit * (moved**2).mean()
        if held_out:
            pull /= len(held_out)
            share = (gain + pull * HALF * size) / max((1 + pull) * size, TINY)
            self.share.fill_(min(max(share, 0.0), 1.0))

    def predict(self, description: Description) -> Predicted:
        """Predict a change by the trained and the pretrained networks, by their shares."""
        return self.mix(self.predict_trained(description), self.predict_pretrained(description))

    def predict_trained(self, description: Description, only: int | None = None) -> Predicted:
        """Predict a change by the trained networks, or by one of them."""
        networks = self.all_networks
        if only is not None:
            networks = [networks[only]]
        return mean_of([predict(network, description) for network in networks])

    def predict_pretrained(self, description: Description) -> Predicted | None:
        """Predict a change by the pretrained networks, ``None`` if there are none."""
        if self.pretrained is None:
            return None
        networks = cast(list[InContextNetwork], list(self.pretrained))
        return mean_of([predict(network, description) for network in networks])

    def mix(self, trained: Predicted, pretrained: Predicted | None) -> Predicted:
        """Mix predictions, and their error variances, by their shares."""
        if pretrained is None:
            return trained
        share = float(self.share)
        return Predicted(
            (1 - share) * pretrained.mean + share * trained.mean,
            np.sqrt((1 - share) * pretrained.sigma**2 + share * trained.sigma**2),
        )


class HeldOut(NamedTuple):
    """A measured change that a network did not learn from, and what is predicted of it."""

    episode: Episode
    trained: Predicted
    pretrained: Predicted | None


def mean_of(predictions: Sequence[Predicted]) -> Predicted:
    """Mean of predictions, and of their error variances."""
    means, sigmas = zip(*predictions, strict=True)
    return Predicted(np.mean(means, axis=0), np.sqrt(np.mean(np.square(sigmas), axis=0)))


@torch.inference_mode()
def predict(network: nn.Module, description: Description) -> Predicted:
    """Predict a change by one network."""
    device = next(network.parameters()).device
    state, pieces, relations, log_prior, shifts, scale = (
        t.to(device) for t in tensors(description)
    )
    step = max(1, BLOCK // len(shifts))
    answers = [
        network(state[g], pieces[:, g], relations, log_prior, shifts[:, g], scale[g])
        for g in (slice(i, i + step) for i in range(0, len(state), step))
    ]
    mean, sigma = (torch.cat([getattr(a, k) for a in answers]).cpu() for k in ("mean", "sigma"))
    return Predicted(mean.double().numpy(), sigma.double().numpy())
