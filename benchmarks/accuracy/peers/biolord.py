"""biolord (Piran et al. 2024, doi:10.1038/s41587-023-02079-x)."""

import biolord
import numpy as np
import scvi


class Biolord:
    """Known attributes and an unknown rest of each cell; a known one is exchanged."""

    def fit(self, adata, *, held_out, condition_key, stimulated, labels_key, seed, **setup):
        """Train with the settings of scPerturBench, but for its constant dose."""
        scvi.settings.seed = seed
        self.condition_key, self.stimulated = condition_key, stimulated
        attributes = sorted({held_out, labels_key, condition_key})
        biolord.Biolord.setup_anndata(adata, categorical_attributes_keys=attributes)
        chance = np.random.default_rng(seed).random(adata.n_obs)
        adata.obs["split"] = np.where(chance < 0.9, "train", "valid")
        self.train = adata
        self.model = biolord.Biolord(
            adata,
            n_latent=256,
            split_key="split",
            train_split="train",
            valid_split="valid",
            module_params={
                "decoder_width": 1024,
                "decoder_depth": 4,
                "attribute_nn_width": 512,
                "attribute_nn_depth": 2,
                "n_latent_attribute_categorical": 4,
                "gene_likelihood": "normal",
                "reconstruction_penalty": 1e2,
                "unknown_attribute_penalty": 1e1,
                "unknown_attribute_noise_param": 1e-1,
                "attribute_dropout_rate": 0.1,
                "use_batch_norm": False,
                "use_layer_norm": False,
                "seed": seed,
            },
        )
        self.model.train(
            max_epochs=500,
            batch_size=128,
            early_stopping=True,
            early_stopping_patience=20,
            check_val_every_n_epoch=5,
            enable_checkpointing=False,
            plan_kwargs={
                "n_epochs_warmup": 0,
                "latent_lr": 1e-4,
                "latent_wd": 1e-4,
                "decoder_lr": 1e-4,
                "decoder_wd": 1e-4,
                "attribute_nn_lr": 1e-2,
                "attribute_nn_wd": 4e-8,
                "step_size_lr": 45,
                "cosine_scheduler": True,
                "scheduler_final_lr": 1e-5,
            },
        )
        return self

    def predict(self, adata_control):
        """Decode the cells as stimulated; each must be a training cell, which has its own code."""
        cells = self.train[adata_control.obs_names].copy()
        cells.obs[self.condition_key] = self.stimulated
        mean, _ = self.model.predict(cells)
        return np.maximum(mean.X, 0)
