"""PublishedModule: inference, generative and loss of the published objective, line for line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import mse_loss, smooth_l1_loss

from spaperb._messages import check_choice
from spaperb.data import CONDITION_KEY, DOSE_KEY, Target
from spaperb.nn import Decoder, DeltaEncoder, Encoder, PerturbationEmbedding

CRITERIA: dict[str, Callable[..., torch.Tensor]] = {
    "smooth_l1": smooth_l1_loss,
    "mse": mse_loss,
}


class PublishedModule(BaseModuleClass):
    """The networks and the objective of the paper.

    With the encoder E, the delta encoder E_delta, the decoder D and pairs of a control and a
    stimulated cell::

        Z_ctrl  = E(X_ctrl)           Z_stim  = E(X_stim)
        Z_delta = E_delta(V_delta)    Z_stim' = Z_ctrl + Z_delta    X_stim' = D(Z_stim')

        L_latent         = SmoothL1(Z_delta, Z_stim - Z_ctrl)
        L_reconstruction = SmoothL1(X_stim', X_stim)
        L_KL             = KL( N(mu, sigma) || N(0, I) )
        Loss = 100 L_latent + 100 L_reconstruction + 0.5 L_KL

    Every term is a mean over features and over pairs, so that the three weights are on one scale.
    L_KL is the mean of the control cell's and the stimulated cell's divergence.

    **Several perturbations.** Perturbations differ by their embedding e, the sum over the parts of
    a combination, each scaled by a learned monotone function of the dose (see
    :class:`~spaperb.nn.PerturbationEmbedding`); with one perturbation and no doses there is none::

        Z_delta = E_delta(V_delta, e)    e = sum over parts p of s_p(dose) e_p

    **Batches.** With two batches or more, E and D see a cell's batch, one-hot, at every layer.

    A minibatch of pairs is flat: n control rows, then their n partners, in the same order.

    Parameters
    ----------
    n_input
        Number of genes, G.
    n_latent
        Number of latent dimensions, L.
    n_hidden
        Units in each hidden layer of the encoder and the decoder.
    n_layers
        Number of hidden layers of the encoder and of the decoder.
    n_hidden_delta
        Units of the delta encoder's hidden layer; ``None`` makes the delta encoder linear.
    dropout_rate
        Dropout rate of all hidden layers.
    latent_weight
        Weight of L_latent.
    reconstruction_weight
        Weight of L_reconstruction.
    kl_weight
        Weight of L_KL.
    kl_on
        Whose divergence L_KL averages: ``"both"`` cells of a pair, as the ELBO asks for every x,
        or only the ``"control"`` cell's, as in the authors' released code.
    delta_noise
        ``"fresh"`` draws V_delta anew for every cell and every step; ``"fixed"`` keeps one draw,
        saved with the model, for all cells, as in the authors' released code.
    criterion
        Error of expression, ``"smooth_l1"`` or ``"mse"``.
    composition
        How often each of P perturbations is a part of each value of the condition column,
        ``(n_conditions, P)``; ``None`` for one perturbation.
    dosed
        Whether perturbations have doses.
    n_batch
        Number of batches.

    References
    ----------
    Tang et al. (2024), scPerb, Journal of Advanced Research, doi:10.1016/j.jare.2024.10.035.
    """

    def __init__(
        self,
        n_input: int,
        n_latent: int = 100,
        n_hidden: int = 800,
        n_layers: int = 2,
        n_hidden_delta: int | None = None,
        dropout_rate: float = 0.2,
        latent_weight: float = 100.0,
        reconstruction_weight: float = 100.0,
        kl_weight: float = 0.5,
        kl_on: Literal["both", "control"] = "both",
        delta_noise: Literal["fresh", "fixed"] = "fresh",
        criterion: Literal["smooth_l1", "mse"] = "smooth_l1",
        composition: npt.NDArray[np.float32] | None = None,
        dosed: bool = False,
        n_batch: int = 0,
    ):
        super().__init__()
        check_choice("criterion", criterion, tuple(CRITERIA))
        check_choice("kl_on", kl_on, ("both", "control"))
        check_choice("delta_noise", delta_noise, ("fresh", "fixed"))
        self.n_input = n_input
        self.n_latent = n_latent
        self.latent_weight = latent_weight
        self.reconstruction_weight = reconstruction_weight
        self.kl_weight = kl_weight
        self.kl_on = kl_on
        self.criterion = CRITERIA[criterion]
        self.dropout_rate = dropout_rate
        self.n_batch = n_batch
        self.encoder = Encoder(n_input, n_latent, n_hidden, n_layers, dropout_rate, n_batch)
        n_perturbations = 1 if composition is None else composition.shape[1]
        has_embedding = n_perturbations > 1 or dosed
        self.delta_encoder = DeltaEncoder(
            n_input, n_latent, n_hidden_delta, dropout_rate, n_latent if has_embedding else 0
        )
        self.decoder = Decoder(n_latent, n_input, n_hidden, n_layers, dropout_rate, n_batch)
        self.perturbations = (
            PerturbationEmbedding(n_perturbations, n_latent, dosed) if has_embedding else None
        )
        self.register_buffer(
            "composition", torch.as_tensor(composition) if has_embedding else None
        )
        self.register_buffer("v_delta", torch.rand(n_input) if delta_noise == "fixed" else None)

    @property
    def settings(self) -> dict[str, Any]:
        """What training depends on beside the shapes of the weights."""
        names = ("kl_on", "dropout_rate", "latent_weight", "reconstruction_weight", "kl_weight")
        return {
            "objective": "published",
            "criterion": self.criterion.__name__,
            **{name: getattr(self, name) for name in names},
        }

    def _get_inference_input(
        self, tensors: dict[str, torch.Tensor], **kwargs: Any
    ) -> dict[str, torch.Tensor | None]:
        return {
            "x": tensors[REGISTRY_KEYS.X_KEY],
            "batch": tensors.get(REGISTRY_KEYS.BATCH_KEY),
        }

    def _get_generative_input(
        self,
        tensors: dict[str, torch.Tensor],
        inference_outputs: dict[str, Any],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor | None]:
        return {
            "z": inference_outputs["z"],
            "batch": tensors.get(REGISTRY_KEYS.BATCH_KEY),
            "condition": tensors.get(CONDITION_KEY),
            "dose": tensors.get(DOSE_KEY),
        }

    @auto_move_data
    def inference(self, x: torch.Tensor, batch: torch.Tensor | None = None) -> dict[str, Any]:
        """Encode cells, E: one pass for both halves of a paired minibatch.

        Parameters
        ----------
        x
            Log-normalised expression ``(n_cells, G)``.
        batch
            Number of each cell's batch, ``(n_cells, 1)``.

        Returns
        -------
        dict
            ``qz``, the posterior N(mu, sigma), and ``z = mu + sigma * eps``, ``(n_cells, L)``.
        """
        qz = self.encoder(x, batch)
        return {"qz": qz, "z": qz.rsample()}

    @auto_move_data
    def generative(
        self,
        z: torch.Tensor,
        batch: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        dose: torch.Tensor | None = None,
        paired: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Decode latent vectors, D.

        Parameters
        ----------
        z
            Latent vectors ``(n_cells, L)``; paired: ``(2n, L)``, n control rows, then n partners.
        batch
            Number of each cell's batch, ``(n_cells, 1)``.
        condition
            Number of each cell's value of the condition column, ``(n_cells, 1)``.
        dose
            Each cell's dose, ``(n_cells, 1)``.
        paired
            Whether to predict the stimulated partners of the control half, X_stim', rather than to
            reconstruct every cell from its own z, D(Z).

        Returns
        -------
        dict
            ``px``, ``(n, G)`` if paired, else ``(n_cells, G)``; if paired also ``z_delta``,
            ``(n, L)``.
        """
        if not paired:
            return {"px": self.decoder(z, batch)}
        z_ctrl, _ = z.chunk(2)
        n = len(z_ctrl)
        e = None
        if self.perturbations is not None and condition is not None:
            # The partners' perturbations.
            composition = self.composition[condition[n:, 0].long()]
            e = self.perturbations(composition, None if dose is None else dose[n:])
        z_delta = self.delta_encoder(self.draw_v_delta(n), e)
        batch_ctrl = None if batch is None else batch[:n]
        return {"z_delta": z_delta, "px": self.decoder(z_ctrl + z_delta, batch_ctrl)}

    def loss(
        self,
        tensors: dict[str, torch.Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, torch.Tensor],
        kl_weight: float = 1.0,
        paired: bool = False,
    ) -> LossOutput:
        """Compute the objective on pairs, or a plain VAE's loss on single cells.

        Parameters
        ----------
        tensors
            Minibatch with the registry's keys; paired: n control rows, then their n partners.
        inference_outputs
            Output of :meth:`inference`.
        generative_outputs
            Output of :meth:`generative` with the same ``paired``.
        kl_weight
            Warm-up factor on the module's own ``kl_weight``; the training plan sets it.
        paired
            Whether the minibatch holds pairs. Without pairs there is no latent term, and the
            reconstruction is the criterion of D(Z) and X of each cell.

        Returns
        -------
        LossOutput
            The scalar ``loss``; ``reconstruction_loss`` and ``kl_local``, unweighted means over
            features, one value a pair (or a cell); paired: ``extra_metrics["latent_loss"]``.
        """
        x, px = tensors[REGISTRY_KEYS.X_KEY], generative_outputs["px"]
        qz, z = inference_outputs["qz"], inference_outputs["z"]
        kl = kl_divergence(qz, Normal(torch.zeros_like(qz.loc), torch.ones_like(qz.scale))).mean(1)

        if not paired:
            l_latent = px.new_zeros(())
            l_reconstruction = self.criterion(px, x, reduction="none").mean(1)
            l_kl = kl
        else:
            _, x_stim = x.chunk(2)
            z_ctrl, z_stim = z.chunk(2)
            kl_ctrl, kl_stim = kl.chunk(2)
            l_latent = smooth_l1_loss(generative_outputs["z_delta"], z_stim - z_ctrl)
            l_reconstruction = self.criterion(px, x_stim, reduction="none").mean(1)
            l_kl = kl_ctrl if self.kl_on == "control" else 0.5 * (kl_ctrl + kl_stim)

        loss = (
            self.latent_weight * l_latent
            + self.reconstruction_weight * l_reconstruction.mean()
            + kl_weight * self.kl_weight * l_kl.mean()
        )
        return LossOutput(
            loss=loss,
            reconstruction_loss=l_reconstruction,
            kl_local=l_kl,
            extra_metrics={"latent_loss": l_latent} if paired else {},
        )

    def draw_v_delta(self, n: int) -> torch.Tensor:
        """V_delta for ``n`` cells, ``(n, G)``: uniform on (0, 1), or the saved draw if fixed."""
        if self.v_delta is not None:
            return self.v_delta.expand(n, -1)
        return torch.rand(n, self.n_input, device=self.device)

    @torch.inference_mode()
    @auto_move_data
    def encode(
        self, x: torch.Tensor, batch: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Encode cells, E, without a draw.

        Parameters
        ----------
        x
            Log-normalised expression ``(n, G)``.
        batch
            Shares of the batches, ``(n, n_batch)``: one-hot for a known batch.

        Returns
        -------
        dict
            ``mean`` and ``variance`` of the posterior, each ``(n, L)``.
        """
        qz = self.encoder(x, batch)
        return {"mean": qz.loc, "variance": qz.scale.square()}

    @torch.inference_mode()
    @auto_move_data
    def predict(
        self,
        x: torch.Tensor,
        v_delta: torch.Tensor | None = None,
        eps: torch.Tensor | None = None,
        e: torch.Tensor | None = None,
        batch: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Predict stimulated cells, X_stim' of the objective.

        Parameters
        ----------
        x
            Log-normalised expression ``(n, G)``.
        v_delta
            V_delta, ``(n, G)``; not used if the module keeps a fixed draw.
        eps
            Standard normal noise ``(n, L)`` for z = mu + sigma * eps; ``None`` for z = mu.
        e
            Embedding of the perturbation, ``(1, L)``, of :meth:`embed`.
        batch
            Shares of the batches, ``(n, n_batch)``: one-hot for a known batch.

        Returns
        -------
        dict
            ``px_stim`` ``(n, G)``, ``z_stim`` and ``z_delta``, each ``(n, L)``.
        """
        qz = self.encoder(x, batch)
        z = qz.loc if eps is None else qz.loc + qz.scale * eps
        z_delta = self.delta_encoder(
            v_delta if self.v_delta is None else self.draw_v_delta(len(x)),
            None if e is None else e.expand(len(x), -1),
        )
        px_stim = self.decoder(z + z_delta, batch)
        return {"px_stim": px_stim, "z_stim": z + z_delta, "z_delta": z_delta}

    @torch.inference_mode()
    def embed(self, target: Target) -> torch.Tensor | None:
        """Embed a perturbation, e, ``(1, L)``; ``None`` if the module has only one."""
        if self.perturbations is None:
            return None
        composition = torch.zeros(1, self.composition.shape[1], device=self.device)
        for part in target.parts:
            composition[0, part] += 1
        dose = None if target.dose is None else torch.full((1, 1), target.dose, device=self.device)
        return self.perturbations(composition, dose)

    @torch.inference_mode()
    @auto_move_data
    def shift(self, v_delta: torch.Tensor, target: Target) -> torch.Tensor:
        """Latent shift of a perturbation, Z_delta, for draws of V_delta ``(n, G)``, ``(n, L)``."""
        e = self.embed(target)
        return self.delta_encoder(
            v_delta if self.v_delta is None else self.draw_v_delta(len(v_delta)),
            None if e is None else e.expand(len(v_delta), -1),
        )
