import numpy as np
import pytest
from helpers import small_cells
from scipy import sparse
from scipy.special import softmax
from sklearn.decomposition import PCA

from spaperb import baselines, datasets

TYPES = ["type_1", "type_2"]


@pytest.fixture
def split():
    """Training cells without the stimulated cells of type_0, and its control cells."""
    adata = small_cells()
    of_type = adata.obs["cell_type"] == "type_0"
    hidden = of_type & (adata.obs["condition"] == "stimulated")
    return adata[~hidden].copy(), adata[of_type & ~hidden].copy()


def mean(adata, cell_type, condition):
    chosen = (adata.obs["cell_type"] == cell_type) & (adata.obs["condition"] == condition)
    return adata.X.toarray()[chosen].mean(0)


def shifts(train):
    return np.array([mean(train, t, "stimulated") - mean(train, t, "control") for t in TYPES])


def similarities(train, control):
    pseudobulk = control.X.toarray().mean(0)
    return np.array([np.corrcoef(pseudobulk, mean(train, t, "control"))[0, 1] for t in TYPES])


def shifted(control, shift):
    return np.maximum(control.X.toarray() + shift, 0)


def check(method, split, expected, **tolerance):
    train, control = split
    predicted = method.fit(train).predict(control)
    np.testing.assert_allclose(predicted, expected, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


def test_no_change(split):
    check(baselines.NoChange(), split, split[1].X.toarray())


def test_mean_shift(split):
    train, control = split
    check(baselines.MeanShift(), split, shifted(control, shifts(train).mean(0)))


def test_nearest_shift(split):
    train, control = split
    nearest = np.argmax(similarities(train, control))
    check(baselines.NearestShift(), split, shifted(control, shifts(train)[nearest]))


def test_similarity_shift(split):
    train, control = split
    weights = softmax(similarities(train, control) / 0.03)
    check(baselines.SimilarityShift(), split, shifted(control, weights @ shifts(train)))


def test_similarity_shift_between_its_limits(split):
    train, control = split
    check(baselines.SimilarityShift(1e6), split, shifted(control, shifts(train).mean(0)))
    nearest = np.argmax(similarities(train, control))
    check(baselines.SimilarityShift(1e-6), split, shifted(control, shifts(train)[nearest]))


def test_pca_shift(split):
    train, control = split
    pca = PCA(5).fit(train.X.toarray())
    z = pca.transform(control.X.toarray()) + shifts(train).mean(0) @ pca.components_.T
    expected = np.maximum(pca.inverse_transform(z), 0)
    check(baselines.PCAShift(5), split, expected, rtol=1e-3, atol=1e-3)


def test_knn_shift(split):
    train, control = split
    chosen = (train.obs["condition"] == "control") & train.obs["cell_type"].isin(TYPES)
    x, labels = train.X.toarray()[chosen], train.obs["cell_type"].to_numpy()[chosen]
    pca = PCA(3).fit(x)
    distances = np.linalg.norm(
        pca.transform(control.X.toarray())[:, None] - pca.transform(x)[None], axis=2
    )
    nearest = labels[np.argsort(distances, axis=1)[:, :7]]
    share = np.stack([(nearest == t).mean(1) for t in TYPES], axis=1)
    check(baselines.KNNShift(7, 3), split, shifted(control, share @ shifts(train)))


def test_nearest_cells_are_real_cells_of_the_nearest_type(split):
    train, control = split
    nearest = TYPES[np.argmax(similarities(train, control))]
    chosen = (train.obs["cell_type"] == nearest) & (train.obs["condition"] == "stimulated")
    real = {row.tobytes() for row in train.X.toarray()[chosen].astype(float)}
    predicted = baselines.NearestCells().fit(train).predict(control)
    assert predicted.shape == control.shape
    assert {row.tobytes() for row in predicted} == real


def test_nearest_cells_are_repeated_where_they_are_few(split):
    train, control = split
    stimulated = train.obs["condition"] == "stimulated"
    few = train[~stimulated | (np.arange(train.n_obs) % 4 == 0)].copy()
    assert baselines.NearestCells().fit(few).predict(control).shape == control.shape


@pytest.fixture(scope="module")
def by_lineage():
    """Cells without the stimulated ones of type_0, and these."""
    adata = datasets.simulated(n_cells=50, n_genes=200, shared_response=0.3, lineage_response=0.6)
    of_type = adata.obs["cell_type"] == "type_0"
    hidden = of_type & (adata.obs["condition"] == "stimulated")
    return (
        adata[~hidden].copy(),
        adata[of_type & ~hidden].copy(),
        mean(adata, "type_0", "stimulated"),
    )


def forest_of(train, control):
    return baselines.GeneForest().fit(train).predict(control)


def of_types(train, *types):
    return train[train.obs["cell_type"].isin(types)].copy()


@pytest.mark.parametrize("control_is_known", [True, False])
def test_gene_forest_beats_the_mean_shift(by_lineage, control_is_known):
    train, control, real = by_lineage
    if not control_is_known:
        train = train[train.obs["cell_type"] != "type_0"].copy()
    of_forest, of_mean = (
        np.mean((method.fit(train).predict(control).mean(0) - real) ** 2)
        for method in (baselines.GeneForest(), baselines.MeanShift())
    )
    assert of_forest < 0.7 * of_mean


def test_gene_forest_twice_is_the_same(by_lineage):
    train, control, _ = by_lineage
    np.testing.assert_array_equal(forest_of(train, control), forest_of(train, control))


def test_gene_forest_in_another_order(by_lineage):
    train, control, _ = by_lineage
    rng = np.random.default_rng(0)
    genes, of_train, of_control = map(rng.permutation, (train.n_vars, train.n_obs, control.n_obs))
    predicted = forest_of(train[of_train, genes].copy(), control[of_control, genes].copy())
    expected = forest_of(train, control)[of_control][:, genes]
    # Rounding decides between splits of a tree that are equally good.
    np.testing.assert_allclose(predicted, expected, atol=0.02)


def test_gene_forest_of_two_contexts(by_lineage):
    train, control, real = by_lineage
    predicted = forest_of(of_types(train, "type_1", "type_2"), control).mean(0)
    no_change = control.X.toarray().mean(0)
    assert np.mean((predicted - real) ** 2) < np.mean((no_change - real) ** 2)


def test_gene_forest_of_one_context_is_the_mean_shift(by_lineage):
    train, control, _ = by_lineage
    one = of_types(train, "type_0", "type_1")
    expected = baselines.MeanShift().fit(one).predict(control)
    np.testing.assert_array_equal(forest_of(one, control), expected)


def test_gene_forest_takes_no_shift_of_too_few_cells(by_lineage):
    train, control, _ = by_lineage
    of_type = train.obs["cell_type"] == "type_1"
    stimulated = train.obs["condition"] == "stimulated"
    few = train[~(of_type & stimulated) | ((of_type & stimulated).cumsum() <= 2)].copy()
    without = train[~(of_type & stimulated)].copy()
    np.testing.assert_array_equal(forest_of(few, control), forest_of(without, control))


def test_gene_forest_changes_nothing_where_shifts_are_noise():
    adata = datasets.simulated(n_cells=50, n_genes=200, response_scale=0.0)
    control = adata[adata.obs["condition"] == "control"].copy()
    np.testing.assert_array_equal(forest_of(adata, control), control.X.toarray())


def test_gene_forest_of_negative_data(by_lineage):
    train, control, _ = (x.copy() for x in by_lineage)
    for x in (train, control):
        x.X = x.X.toarray() - 5
    predicted = forest_of(train, control)
    assert np.isfinite(predicted).all()
    assert predicted.min() < 0


def test_own_type_shift():
    adata = small_cells()
    hidden = (adata.obs["donor"] == "donor_0") & (adata.obs["condition"] == "stimulated")
    train = adata[~hidden].copy()
    control = adata[(adata.obs["donor"] == "donor_0") & (adata.obs["condition"] == "control")]
    own = {t: mean(train, t, "stimulated") - mean(train, t, "control") for t in ["type_0", *TYPES]}
    expected = shifted(control, np.array([own[t] for t in control.obs["cell_type"]]))
    method = baselines.OwnTypeShift().fit(train, held_out="donor", labels_key="cell_type")
    np.testing.assert_allclose(method.predict(control), expected, rtol=1e-5, atol=1e-6)


def test_own_type_shift_of_an_unknown_type_is_the_mean(split):
    train, control = split
    check(baselines.OwnTypeShift(), split, shifted(control, shifts(train).mean(0)))


@pytest.mark.parametrize("stimulated", [None, "IFN"])
def test_other_names(stimulated):
    adata = small_cells()
    expected = baselines.MeanShift().fit(adata).shifts
    adata.obs = adata.obs.rename(columns={"condition": "drug", "cell_type": "type"})
    adata.obs["drug"] = adata.obs["drug"].cat.rename_categories(["none", "IFN"])
    method = baselines.MeanShift().fit(
        adata, condition_key="drug", control="none", stimulated=stimulated, held_out="type"
    )
    np.testing.assert_array_equal(method.shifts, expected)


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_dense_and_sparse_cells_give_the_same(name, split):
    train, control = split
    expected = baselines.BASELINES[name].fit(train).predict(control)
    for x in (train, control):
        x.X = sparse.csr_matrix(x.X).toarray()
    predicted = baselines.BASELINES[name].fit(train).predict(control)
    np.testing.assert_allclose(predicted, expected, rtol=1e-3, atol=1e-3)


def test_negative_data_are_not_clipped(split):
    train, control = split
    for x in (train, control):
        x.X = x.X.toarray() - 5
    assert baselines.MeanShift().fit(train).predict(control).min() < 0


def test_no_context_with_both_conditions(adata):
    control = adata[adata.obs["condition"] == "control"].copy()
    with pytest.raises(ValueError, match=r"No value of obs\['cell_type'\] has control and stim"):
        baselines.MeanShift().fit(control)
