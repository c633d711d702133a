"""Simulated cells whose response to stimuli is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy import sparse


def simulated(
    n_cell_types: int = 8,
    n_cells: int = 100,
    n_genes: int = 500,
    n_donors: int = 4,
    *,
    n_lineages: int = 2,
    marker_fraction: float = 0.1,
    response_fraction: float = 0.2,
    shared_response: float = 0.8,
    lineage_response: float = 0.0,
    response_scale: float = 1.5,
    library_size: float = 2000.0,
    dropout: float = 0.2,
    doses: Sequence[float] | None = None,
    half_dose: float = 1.0,
    steepness: float = 1.0,
    gradient: float = 0.0,
    seed: int = 0,
) -> AnnData:
    r"""Simulate control and stimulated cells of several types, with the truth beside them.

    A cell of type :math:`t` from donor :math:`d` expresses gene :math:`g` in proportion to
    :math:`\exp(\beta_g + \tau_{tg} + \delta_{dg} + c\,\rho_{tg})`, with :math:`c = 1` if it is
    stimulated, else 0. The response :math:`\rho_{tg} = \sqrt{s}\,u_g + \sqrt{l}\,v_{l(t)g} +
    \sqrt{1-s-l}\,w_{tg}` is partly shared by all types, partly by the types of a lineage, and
    partly a type's own, and zero outside the responding genes; both signs occur (induced and
    repressed genes). Counts are Poisson draws around the proportions, times the cell's library
    size, times gamma noise; each is then lost with probability ``dropout``.

    With ``doses`` the cells of each type and condition get them in turn, and the response is
    scaled by the Hill function :math:`d^h / (d^h + k^h)` of the dose :math:`d`.

    With a ``gradient`` :math:`a` cells of a type differ by a state :math:`z`, uniform on (0, 1):
    a tenth of the genes follow it, and the response is scaled by :math:`1 + a(2z - 1)`.

    Parameters
    ----------
    n_cell_types
        Number of cell types.
    n_cells
        Number of cells of each type in each condition.
    n_genes
        Number of genes.
    n_donors
        Number of donors; every donor gives cells of every type and condition.
    n_lineages
        Number of lineages that the cell types belong to in turn.
    marker_fraction
        Fraction of the genes that set a lineage apart, and a type within its lineage.
    response_fraction
        Fraction of the genes that respond.
    shared_response
        Share :math:`s` of the response's variance that all cell types have in common, in [0, 1].
    lineage_response
        Share :math:`l` that the types of a lineage have in common, so that the response can be
        told from what a type is, in [0, 1 - s].
    response_scale
        Standard deviation of the response in natural-log units; 0 for no response at all.
    library_size
        Median counts a cell, before dropout.
    dropout
        Probability that a gene of a cell is lost, in [0, 1).
    doses
        Doses of the stimulus; ``None`` for a stimulus without doses.
    half_dose
        Dose :math:`k` of half of the full response.
    steepness
        Hill coefficient :math:`h`.
    gradient
        How far the response goes with a cell's state, :math:`a`, in [0, 1]; 0 for no states.
    seed
        Seed.

    Returns
    -------
    anndata.AnnData
        Annotated data ``(2 * n_cell_types * n_cells, n_genes)``:

        - ``X``: log-normalised expression (10,000 counts a cell, ``log1p``), CSR float32
        - ``layers["counts"]``: counts, CSR float32
        - ``layers["true_control"]``, ``layers["true_stimulated"]``: the answer for every cell,
          whatever its condition: ``log1p`` of its expected counts per 10,000 without and with the
          stimulus, before any sampling noise
        - ``obs``: ``condition`` (control, stimulated), ``cell_type``, ``donor``; with doses
          ``dose``, 0 for control cells, whose ``true_stimulated`` is of the dose that their turn
          would have given them; with a gradient ``state``
        - ``var["responds"]``: whether the gene responds
    """
    rng = np.random.default_rng(seed)
    baseline = rng.normal(0.0, 1.5, n_genes)
    lineage = np.arange(n_cell_types) % n_lineages
    type_effect = _markers(n_lineages, n_genes, marker_fraction, rng)[lineage] + 0.5 * _markers(
        n_cell_types, n_genes, marker_fraction, rng
    )
    donor_effect = rng.normal(0.0, 0.1, (n_donors, n_genes))
    responds = np.zeros(n_genes, dtype=bool)
    responds[rng.choice(n_genes, round(response_fraction * n_genes), replace=False)] = True
    shared = rng.normal(0.0, 1.0, n_genes)
    own = rng.normal(0.0, 1.0, (n_cell_types, n_genes))
    of_lineage = np.random.default_rng([seed, 1]).normal(0.0, 1.0, (n_lineages, n_genes))[lineage]
    response = (
        np.sqrt(shared_response) * shared
        + np.sqrt(lineage_response) * of_lineage
        + np.sqrt(1 - shared_response - lineage_response) * own
    )
    response *= response_scale * responds

    cell_type, stimulated, turn = (
        axis.ravel()
        for axis in np.meshgrid(np.arange(n_cell_types), [0, 1], np.arange(n_cells), indexing="ij")
    )
    n_obs = len(cell_type)
    donor = rng.integers(n_donors, size=n_obs)
    log_control = baseline + type_effect[cell_type] + donor_effect[donor]
    state = np.random.default_rng([seed, 2]).random(n_obs)
    if gradient:
        program = _markers(1, n_genes, marker_fraction, np.random.default_rng([seed, 3]))
        log_control = log_control + (2 * state - 1)[:, None] * program
    control = _proportions(log_control)
    effect = np.ones(n_obs)
    if doses is not None:
        dose = np.asarray(doses, dtype=float)[turn % len(doses)]
        effect = dose**steepness / (dose**steepness + half_dose**steepness)
    effect = effect * (1 + gradient * (2 * state - 1))
    treated = _proportions(log_control + effect[:, None] * response[cell_type])

    obs = pd.DataFrame(
        {
            "condition": pd.Categorical.from_codes(stimulated, ["control", "stimulated"]),
            "cell_type": _named(cell_type, "type", n_cell_types),
            "donor": _named(donor, "donor", n_donors),
        }
    )
    if doses is not None:
        obs["dose"] = np.where(stimulated == 1, dose, 0.0)
    if gradient:
        obs["state"] = state
    expressed = np.where(stimulated[:, None] == 1, treated, control)
    adata = _drawn(expressed, obs, rng, library_size, dropout)
    adata.var["responds"] = responds
    adata.layers["true_control"] = np.log1p(1e4 * control).astype(np.float32)
    adata.layers["true_stimulated"] = np.log1p(1e4 * treated).astype(np.float32)
    return adata


def simulated_screen(
    n_perturbations: int = 30,
    n_cell_types: int = 3,
    n_cells: int = 50,
    n_genes: int = 500,
    n_features: int = 5,
    *,
    feature_share: float = 0.8,
    shared_response: float = 0.8,
    marker_fraction: float = 0.1,
    response_fraction: float = 0.3,
    response_scale: float = 1.0,
    library_size: float = 2000.0,
    dropout: float = 0.2,
    seed: int = 0,
) -> AnnData:
    r"""Simulate a screen of perturbations whose effects depend on what they are.

    Perturbation :math:`p` has features :math:`f_p`, normal draws. Cells of type :math:`t` respond
    by :math:`\rho_{tpg} = \sqrt{a}\, f_p \cdot U_{tg} / \sqrt{d} + \sqrt{1-a}\, w_{tpg}` in
    natural-log units, where d is the number of features: partly as the features tell, partly in
    a way of the perturbation's own. Each of both is partly the same in all types. Cells are drawn
    as in :func:`simulated`.

    Parameters
    ----------
    n_perturbations
        Number of perturbations.
    n_cell_types
        Number of cell types.
    n_cells
        Cells of each type and perturbation; there are four times as many control cells of a type.
    n_genes
        Number of genes.
    n_features
        Number of features, d.
    feature_share
        Share :math:`a` of the response's variance that the features tell, in [0, 1].
    shared_response
        Share of the response's variance that all cell types have in common, in [0, 1].
    marker_fraction
        Fraction of the genes that set a type apart.
    response_fraction
        Fraction of the genes that respond.
    response_scale
        Standard deviation of the response in natural-log units.
    library_size, dropout, seed
        As in :func:`simulated`.

    Returns
    -------
    anndata.AnnData
        Annotated data, with ``X``, ``layers["counts"]`` and ``layers["true_control"]`` as in
        :func:`simulated`, and:

        - ``layers["true_stimulated"]``: the same with the cell's own perturbation; for control
          cells without any
        - ``obs``: ``condition`` (control, perturbation_0, ...), ``cell_type``
        - ``uns["perturbation_features"]``: the features, a row a perturbation
        - ``var["responds"]``: whether the gene responds
    """
    rng = np.random.default_rng(seed)
    baseline = rng.normal(0.0, 1.5, n_genes)
    type_effect = _markers(n_cell_types, n_genes, marker_fraction, rng)
    responds = rng.random(n_genes) < response_fraction
    features = rng.normal(0.0, 1.0, (n_perturbations, n_features))

    def partly_shared(n: int) -> np.ndarray:
        of_all, own = rng.normal(size=(n, n_genes)), rng.normal(size=(n_cell_types, n, n_genes))
        return np.sqrt(shared_response) * of_all + np.sqrt(1 - shared_response) * own

    told = features @ partly_shared(n_features) / np.sqrt(n_features)
    untold = partly_shared(n_perturbations)
    response = np.sqrt(feature_share) * told + np.sqrt(1 - feature_share) * untold
    response *= response_scale * responds

    sizes = np.full((n_cell_types, 1 + n_perturbations), n_cells)
    sizes[:, 0] *= 4
    cell_type, condition = (
        np.repeat(axis.ravel(), sizes.ravel()) for axis in np.indices(sizes.shape)
    )
    log_control = baseline + type_effect[cell_type]
    without = np.zeros((n_cell_types, 1, n_genes))
    with_control = np.concatenate([without, response], axis=1)
    treated = _proportions(log_control + with_control[cell_type, condition])
    names = [f"perturbation_{p}" for p in range(n_perturbations)]
    obs = pd.DataFrame(
        {
            "condition": pd.Categorical.from_codes(condition, ["control", *names]),
            "cell_type": _named(cell_type, "type", n_cell_types),
        }
    )
    adata = _drawn(treated, obs, rng, library_size, dropout)
    adata.var["responds"] = responds
    adata.layers["true_control"] = np.log1p(1e4 * _proportions(log_control)).astype(np.float32)
    adata.layers["true_stimulated"] = np.log1p(1e4 * treated).astype(np.float32)
    columns = [f"feature_{i}" for i in range(n_features)]
    adata.uns["perturbation_features"] = pd.DataFrame(features, index=names, columns=columns)
    return adata


def _drawn(
    expressed: np.ndarray,
    obs: pd.DataFrame,
    rng: np.random.Generator,
    library_size: float,
    dropout: float,
) -> AnnData:
    """Counts of cells that express genes in some proportions, and their normalised expression."""
    depth = library_size * rng.lognormal(0.0, 0.3, (len(expressed), 1))
    expected = depth * expressed
    counts = rng.poisson(expected * rng.gamma(5.0, 1 / 5.0, expected.shape))
    counts *= rng.random(counts.shape) >= dropout
    adata = AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=obs.set_index(pd.Index([f"cell_{i}" for i in range(len(obs))])),
        var=pd.DataFrame(index=[f"gene_{i}" for i in range(expressed.shape[1])]),
    )
    adata.layers["counts"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


def _proportions(log_expression: np.ndarray) -> np.ndarray:
    expression = np.exp(log_expression)
    return expression / expression.sum(axis=1, keepdims=True)


def _markers(n: int, n_genes: int, fraction: float, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0.0, 1.5, (n, n_genes)) * (rng.random((n, n_genes)) < fraction)


def _named(codes: np.ndarray, name: str, n: int) -> pd.Categorical:
    return pd.Categorical.from_codes(codes, [f"{name}_{i}" for i in range(n)])
