"""scGen, as pertpy ships it, on the folds of kang.py: an environment and a command of its own.

    python3 -m venv .venv-scgen
    .venv-scgen/bin/pip install -r benchmarks/accuracy/scgen-requirements.txt -e .
    .venv-scgen/bin/python benchmarks/accuracy/scgen.py kang_pbmc_ifnb.h5ad

100 epochs, everything else as by default; predictions are clipped at 0, which can only help them.
Writes `kang_scgen.csv` and `kang_scgen_summary.csv` beside this file.
"""

import numpy as np
import pertpy as pt
import scvi
from common import N_TOP_GENES, log_normalised, make_parser, write

from spaperb.evaluation.benchmark import benchmark


class ScGen:
    """Latent arithmetic on a variational auto-encoder (Lotfollahi et al. 2019)."""

    def fit(self, adata, *, condition_key, control, labels_key, seed, **setup):
        """Train on the training cells."""
        scvi.settings.seed = seed
        self.control = control
        (self.stimulated,) = set(adata.obs[condition_key].unique()) - {control}
        pt.tl.Scgen.setup_anndata(adata, batch_key=condition_key, labels_key=labels_key)
        self.model = pt.tl.Scgen(adata)
        self.model.train(max_epochs=100, enable_progress_bar=False)

    def predict(self, adata_control):
        """Add the mean latent difference and decode."""
        predicted, _ = self.model.predict(
            ctrl_key=self.control, stim_key=self.stimulated, adata_to_predict=adata_control
        )
        return np.maximum(predicted.X, 0)


def main() -> None:
    """Run the benchmark."""
    args = make_parser(__doc__, "file", "--folds", "--seeds", "--n-jobs").parse_args()
    adata = log_normalised(args.file)
    results = benchmark(
        adata,
        {"scgen": ScGen()},
        n_top_genes=N_TOP_GENES,
        seeds=args.seeds,
        n_jobs=args.n_jobs,
        folder=args.folds,
    )
    write(results, "kang_scgen")


if __name__ == "__main__":
    main()
