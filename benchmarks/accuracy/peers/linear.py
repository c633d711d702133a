"""A latent linear model: a context's change is linear in where its control cells are.

In the manner of the linear model of Ahlmann-Eltze, Huber and Anders 2025,
doi:10.1038/s41592-025-02772-6: principal components of the training cells, and a ridge regression
between them, here from the control mean of a context to its change.
"""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV

from spaperb.populations import dense


class LatentLinear:
    """Ridge regression in principal components, its penalty chosen by leaving out contexts.

    Parameters
    ----------
    n_components
        Components at most.
    """

    def __init__(self, n_components: int = 50):
        self.n_components = n_components

    def fit(self, adata, *, held_out, condition_key, control, stimulated, seed, **setup):
        """Learn from the contexts that have cells in both conditions."""
        x = dense(adata.X)
        self.pca = PCA(min(self.n_components, *x.shape), random_state=seed)
        z = self.pca.fit_transform(x)
        context, condition = (adata.obs[key].to_numpy() for key in (held_out, condition_key))
        arms = [condition == control, condition == stimulated]
        pairs = [[z[arm & (context == k)] for arm in arms] for k in np.unique(context)]
        means = np.array(
            [[cells.mean(0) for cells in pair] for pair in pairs if all(map(len, pair))]
        )
        self.ridge = RidgeCV(alphas=np.logspace(-2, 4, 25))
        self.ridge.fit(means[:, 0], means[:, 1] - means[:, 0])
        return self

    def predict(self, adata_control):
        """Add the change of the mean control cell to all cells; no value falls below 0."""
        x = dense(adata_control.X)
        change = self.ridge.predict(self.pca.transform(x).mean(0, keepdims=True))
        return np.maximum(x + change @ self.pca.components_, 0)
