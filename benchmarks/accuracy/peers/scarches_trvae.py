"""trVAE (Lotfollahi et al. 2020, doi:10.1093/bioinformatics/btaa800) as scArches ships it."""

import numpy as np
import scarches
import torch


class ScArchesTrVae:
    """A conditional autoencoder, its latent vectors regularised to be alike in all conditions."""

    def fit(self, adata, *, condition_key, control, stimulated, seed, **setup):
        """Train with the settings of scPerturBench."""
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  its split knows no other seed
        self.control, self.stimulated = control, stimulated
        adata.X = adata.X.toarray()
        self.model = scarches.models.TRVAE(
            adata,
            condition_key=condition_key,
            conditions=adata.obs[condition_key].unique().tolist(),
            hidden_layer_sizes=[128, 128],
            recon_loss="mse",
            dr_rate=0.2,
            use_bn=True,
        )
        self.model.train(
            n_epochs=1000,
            alpha_epoch_anneal=200,
            batch_size=512,
            clip_value=100,
            early_stopping_kwargs={
                "early_stopping_metric": "val_unweighted_loss",
                "threshold": 0,
                "patience": 100,
                "reduce_lr": False,
            },
        )
        return self

    @torch.no_grad()
    def predict(self, adata_control):
        """Encode as control, decode as stimulated; the decoder's last layer is never negative."""
        network = self.model.model.eval()
        source, target = (
            torch.full((adata_control.n_obs,), network.condition_encoder[name])
            for name in (self.control, self.stimulated)
        )
        z = network.get_latent(torch.as_tensor(adata_control.X.toarray()), source)
        return network.decoder(z, target)[0].numpy()
