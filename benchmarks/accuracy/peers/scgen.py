"""scGen (Lotfollahi et al. 2019, doi:10.1038/s41592-019-0494-8) as pertpy ships it."""

import numpy as np
import pertpy as pt


class ScGen:
    """Latent arithmetic on a variational auto-encoder."""

    def fit(self, adata, *, condition_key, control, stimulated, labels_key, seed, **setup):
        """Train for 100 epochs, everything else as by default."""
        self.conditions = {"ctrl_key": control, "stim_key": stimulated}
        pt.tl.Scgen.setup_anndata(adata, batch_key=condition_key, labels_key=labels_key)
        self.model = pt.tl.Scgen(adata)
        self.model.train(max_epochs=100, seed=seed)
        return self

    def predict(self, adata_control):
        """Add the mean latent difference and decode; no value falls below 0."""
        predicted, _ = self.model.predict(**self.conditions, adata_to_predict=adata_control)
        return np.maximum(predicted.X, 0)
