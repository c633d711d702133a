"""Latent vectors of cells and of perturbations, and what scvi-tools asks of networks of cells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from spaperb.data import perturbations_of, select_rows
from spaperb.model._base import SpaPerbBase
from spaperb.model._networks import encode
from spaperb.model._prediction import check_sizes


class LatentMixin(SpaPerbBase):
    """Encode cells and perturbations."""

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Any | None = None,
        give_mean: bool = True,
        mc_samples: int = 5_000,
        batch_size: int | None = None,
        return_dist: bool = False,
        dataloader: Iterator[dict[str, torch.Tensor | None]] | None = None,
        *,
        seed: int = 0,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Encode cells, Z.

        The in-context networks encode genes, not cells. Cells are encoded by the 30 principal
        components of the training control cells that tell how near contexts are; the published
        model's encoder is E.

        The cells may be new, as for :meth:`predict_stimulated`: of any cell type and condition or
        without these columns, with genes in another order. Nothing is written to them.

        Parameters
        ----------
        adata
            Cells to encode, normalised as in training; ``None`` for the AnnData of the model.
        indices
            Positions or boolean mask of the cells to encode; ``None`` for all.
        give_mean
            Whether to take the posterior's mean for z, rather than a draw from the posterior.
        mc_samples
            Has no effect: the mean of this posterior is known. It is there as scvi-tools has it.
        batch_size
            Cells to encode at once; ``None`` for ``scvi.settings.batch_size``.
        return_dist
            Whether to return the posterior's mean and variance instead of z.
        dataloader
            Minibatches of registered data to encode instead, as scvi-tools does.
        seed
            Seed of the draws. A cell's draw depends on it and on the cell's row alone.

        Returns
        -------
        numpy.ndarray or tuple of numpy.ndarray
            Latent vectors ``(n_cells, n_latent)`` in the order of ``indices``; with
            ``return_dist`` the posterior's mean and variance, of that shape each.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        IndexError
            If ``indices`` are out of range.
        TypeError
            If ``adata`` is no AnnData.
        ValueError
            If there are no cells, genes of the model are missing, the expression is unlike that of
            training, ``batch_size`` is below 1, or ``indices`` are neither positions nor a mask.
        """
        if self.objective == "in_context" and (dataloader is not None or return_dist):
            raise ValueError(
                "The in-context model encodes cells by principal components, which have no "
                "posterior and take no `dataloader`. Leave `return_dist` and `dataloader` out, "
                'or use `objective="published"`.'
            )
        if dataloader is not None:
            return super().get_latent_representation(
                adata, indices, give_mean, mc_samples, batch_size, return_dist, dataloader
            )
        adata, query = self._query(adata)
        chunk_size = check_sizes(1, batch_size)
        rows = select_rows(indices, adata.n_obs)
        if self.objective == "in_context":
            evidence = self._learned().evidence
            step = query.chunk_rows
            parts = [
                evidence.project(query.rows(rows[i : i + step])) for i in range(0, len(rows), step)
            ]
            empty = np.empty((0, len(evidence.components)))
            return np.concatenate([empty, *parts]).astype(np.float32)
        z, mean, variance = encode(self.module, query, rows, give_mean, seed, chunk_size)
        return (mean, variance) if return_dist else z

    def get_delta_representation(
        self, dose: float | None = None, n_samples: int = 1000, seed: int = 0
    ) -> pd.DataFrame:
        """Latent effect of each perturbation, for clustering them, say.

        In context the mean change that was measured in the training contexts, as
        :meth:`get_latent_representation` encodes it; of the published model Z_delta.

        Parameters
        ----------
        dose
            Dose of all perturbations; ``None`` for the highest training dose of each. In context
            the measured dose that is nearest.
        n_samples, seed
            Number of draws of V_delta to average over, the same for all perturbations, and their
            seed; in context nothing is drawn.

        Returns
        -------
        pandas.DataFrame
            One row a perturbation, ``(P, n_latent)``.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If the model has no doses and one is given.
        """
        self._check_if_trained(warn=False)
        self.module.eval()
        known = perturbations_of(self.registry)
        if self.objective == "in_context":
            if dose is not None:
                self._target(known.names[0], dose)
            effects = self._learned().effects(len(known.names), dose)
            return pd.DataFrame(effects, index=pd.Index(known.names, name="perturbation"))
        rng = np.random.default_rng(seed)
        v_delta = rng.random((n_samples, self.module.n_input), dtype=np.float32)
        rows = []
        for name in known.names:
            target = known.find(name)
            highest = (
                target.dose_range(self.state.dose_ranges)[1] if self.state.dose_ranges else None
            )
            target = self._target(name, highest if dose is None else dose)
            rows.append(self.module.shift(torch.from_numpy(v_delta), target).mean(0).cpu().numpy())
        return pd.DataFrame(rows, index=pd.Index(known.names, name="perturbation"))

    def get_elbo(self, *args: Any, **kwargs: Any) -> float:
        """Evidence lower bound of cells, of a published model.

        It does not say how well the model predicts. The published loss asks D(Z + Z_delta) to be a
        stimulated cell. It never asks D(Z) to be the cell itself, and the bound measures just
        that. Both terms are means over features, where the bound of a likelihood has sums.

        Parameters
        ----------
        *args, **kwargs
            As for :meth:`scvi.model.base.VAEMixin.get_elbo`.

        Raises
        ------
        ValueError
            If the objective is in context.
        """
        self._check_published("get_elbo")
        return super().get_elbo(*args, **kwargs)

    def get_reconstruction_error(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Reconstruction error of cells by D(Z), of a published model.

        A mean over features. As for :meth:`get_elbo`, training never asked for it to be small.

        Parameters
        ----------
        *args, **kwargs
            As for :meth:`scvi.model.base.VAEMixin.get_reconstruction_error`.

        Raises
        ------
        ValueError
            If the objective is in context.
        """
        self._check_published("get_reconstruction_error")
        return super().get_reconstruction_error(*args, **kwargs)

    def get_marginal_ll(self, *args: Any, **kwargs: Any) -> Any:
        """Marginal likelihood of cells, of a published model, with the limits of :meth:`get_elbo`.

        Parameters
        ----------
        *args, **kwargs
            As for :meth:`scvi.model.base.VAEMixin.get_marginal_ll`.

        Raises
        ------
        ValueError
            If the objective is in context.
        """
        self._check_published("get_marginal_ll")
        return super().get_marginal_ll(*args, **kwargs)

    def _check_published(self, method: str) -> None:
        """Refuse what only networks of cells have."""
        if self.objective == "in_context":
            raise ValueError(
                f"`{method}` is of networks that encode cells, and the in-context networks encode "
                'genes. Use `objective="published"`; how well held-out changes are predicted is '
                "in `history`."
            )
