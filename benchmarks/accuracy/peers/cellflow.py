"""CellFlow (Klein et al. 2025, doi:10.1101/2025.04.11.648220)."""

import cellflow
import jax
import numpy as np
import optax
from cellflow.preprocessing import centered_pca, project_pca, reconstruct_pca


class CellFlow:
    """Flow matching between control and stimulated cells in principal components."""

    def fit(self, adata, *, held_out, condition_key, control, stimulated, seed, **setup):
        """Train networks of an eighth of the default width, which CPUs can do."""
        self.wanted = {condition_key: stimulated, "is_control": False}
        self.held_out, self.train = held_out, adata
        adata.X = adata.X.toarray()
        centered_pca(adata, n_comps=50, keep_centered_data=False)
        is_control = (adata.obs[condition_key] == control).to_numpy()
        adata.obs["is_control"] = is_control
        # A context is told by the mean of its control cells, a condition by its place in a list.
        context = adata.obs[held_out].astype(str).to_numpy()
        adata.uns["contexts"] = {
            name: adata.obsm["X_pca"][is_control & (context == name)].mean(0)
            for name in np.unique(context[is_control])
        }
        conditions = np.unique(adata.obs[condition_key].astype(str))
        adata.uns["conditions"] = dict(zip(conditions, np.eye(len(conditions)), strict=True))
        # Control cells without stimulated ones beside them are refused, and the other way round.
        paired = set(context[is_control]) & set(context[~is_control])
        self.model = cellflow.model.CellFlow(adata[np.isin(context, list(paired))].copy())
        self.model.prepare_data(
            sample_rep="X_pca",
            control_key="is_control",
            perturbation_covariates={"conditions": [condition_key]},
            perturbation_covariate_reps={"conditions": "conditions"},
            sample_covariates=[held_out],
            sample_covariate_reps={held_out: "contexts"},
            split_covariates=[held_out],
        )
        self.model.prepare_model(
            condition_embedding_dim=32,
            time_freqs=128,
            time_encoder_dims=(256, 256, 256),
            hidden_dims=(256, 256, 256),
            decoder_dims=(512, 512, 512),
            optimizer=optax.adam(1e-4),
            seed=seed,
        )
        self.model.train(num_iterations=2000, batch_size=256, valid_freq=2001)
        return self

    def predict(self, adata_control):
        """Carry the control cells along the flow and come back from the components."""
        cells = adata_control.copy()
        cells.X = cells.X.toarray()
        project_pca(cells, ref_adata=self.train)
        cells.obs["is_control"] = True
        cells.uns = self.train.uns
        wanted = cells.obs[[self.held_out]].iloc[:1].assign(**self.wanted)
        (moved,) = jax.device_get(self.model.predict(cells, covariate_data=wanted)).values()
        cells.obsm["X_pca"] = moved
        reconstruct_pca(cells, ref_adata=self.train)
        return np.maximum(cells.layers["X_recon"], 0)
