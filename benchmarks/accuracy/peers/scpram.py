"""scPRAM (Jiang et al. 2024, doi:10.1093/bioinformatics/btae265)."""

import anndata as ad
import numpy as np
import torch
from scpram.models import SCPRAM


class ScPram:
    """Cells matched by optimal transport in a latent space, then attention to similar ones."""

    def fit(self, adata, *, held_out, condition_key, control, stimulated, seed, **setup):
        """Train with the settings of scPerturBench."""
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  for whatever the tool draws with it
        self.train = adata
        self.keys = {
            "condition_key": condition_key,
            "cell_type_key": held_out,
            "ctrl_key": control,
            "stim_key": stimulated,
            "pred_key": "predicted",
        }
        self.model = SCPRAM(input_dim=adata.n_vars, device="cpu")
        self.model.train_SCPRAM(adata, epochs=100)
        return self

    def predict(self, adata_control):
        """Predict the control cells; they stand for all training cells of their context."""
        key = self.keys["cell_type_key"]
        (context,) = adata_control.obs[key].unique()
        others = self.train[self.train.obs[key] != context]
        cells = ad.concat([others, adata_control], index_unique="-")
        predicted = self.model.predict(cells, context, self.keys, ratio=0.005)
        return np.maximum(predicted.X, 0)
