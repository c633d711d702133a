"""CPA (Lotfollahi et al. 2023, doi:10.15252/msb.202211517), the compositional autoencoder."""

import anndata as ad
import cpa
import numpy as np


class Cpa:
    """A latent sum of cell, perturbation and covariates, learned against an adversary."""

    def fit(self, adata, **setup):
        """Keep the cells: what is predicted has to be among those that a model is made with."""
        self.train, self.setup = adata, setup
        return self

    def predict(self, adata_control):
        """Train, then predict the control cells as stimulated; no value falls below 0."""
        setup = self.setup
        chance = np.random.default_rng(setup["seed"]).random(self.train.n_obs)
        self.train.obs["split"] = np.where(chance < 0.9, "train", "valid")
        query = adata_control.copy()
        query.obs[setup["condition_key"]] = setup["stimulated"]
        query.obs["split"] = "ood"
        cells = ad.concat([self.train, query], index_unique="-")
        cells.obs["dose"] = "1.0"
        cpa.CPA.setup_anndata(
            cells,
            perturbation_key=setup["condition_key"],
            control_group=setup["control"],
            dosage_key="dose",
            categorical_covariate_keys=sorted({setup["held_out"], setup["labels_key"]}),
            is_count_data=False,
            max_comb_len=1,
        )
        # The settings of the tool's own tutorial on these cells, with a likelihood of
        # log-normalised values instead of counts.
        model = cpa.CPA(
            cells,
            split_key="split",
            train_split="train",
            valid_split="valid",
            test_split="ood",
            n_latent=64,
            recon_loss="gauss",
            doser_type="linear",
            n_hidden_encoder=128,
            n_layers_encoder=2,
            n_hidden_decoder=512,
            n_layers_decoder=2,
            use_batch_norm_encoder=True,
            use_layer_norm_encoder=False,
            use_batch_norm_decoder=False,
            use_layer_norm_decoder=True,
            dropout_rate_encoder=0.0,
            dropout_rate_decoder=0.1,
            variational=False,
            seed=setup["seed"],
        )
        model.train(
            max_epochs=2000,
            use_gpu=False,
            batch_size=512,
            early_stopping_patience=5,
            check_val_every_n_epoch=5,
            save_path="model",
            plan_kwargs={
                "n_epochs_kl_warmup": None,
                "n_epochs_pretrain_ae": 30,
                "n_epochs_adv_warmup": 50,
                "n_epochs_mixup_warmup": 0,
                "mixup_alpha": 0.0,
                "adv_steps": None,
                "n_hidden_adv": 64,
                "n_layers_adv": 3,
                "use_batch_norm_adv": True,
                "use_layer_norm_adv": False,
                "dropout_rate_adv": 0.3,
                "reg_adv": 20.0,
                "pen_adv": 5.0,
                "lr": 3e-4,
                "wd": 4e-7,
                "adv_lr": 3e-4,
                "adv_wd": 4e-7,
                "adv_loss": "cce",
                "doser_lr": 3e-4,
                "doser_wd": 4e-7,
                "do_clip_grad": True,
                "gradient_clip_value": 1.0,
                "step_size_lr": 10,
            },
        )
        query = cells[cells.obs["split"] == "ood"].copy()
        model.predict(query, batch_size=2048)
        return np.maximum(query.obsm["CPA_pred"], 0)
