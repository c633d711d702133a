"""Sampled counts.

The mean asked for, the distribution of stimulated counts, and cells that stay themselves.
"""

import anndata as ad
import numpy as np
import pytest
import scvi
from helpers import IN_CONTEXT, QUIET, even, snapshot
from scipy import stats

from spaperb import SpaPerbModel, datasets
from spaperb.cells import CountChange, Sample
from spaperb.evaluation.benchmark import Task, make_fold
from spaperb.populations import dispersion, rate, scale_of, size_of

TASK = Task("cell_type", "condition", "control", None, "cell_type", None, 0)


@pytest.fixture(scope="module")
def cells():
    """Negative binomial counts of 2,000 cells, with their size factors, and log-normalised."""
    rng = np.random.default_rng(0)
    size = rng.lognormal(0, 0.3, 2000)
    p, theta = rng.gamma(1, 2, 30), np.full(30, 2.0)
    counts = rng.poisson(size[:, None] * p * rng.gamma(theta, 1 / theta, (2000, 30)))
    return np.log1p(counts * 10 / size[:, None]), counts.astype(float), size


def sample_of(x, counts, order):
    return Sample(x, counts, order, rate(counts, size_of(counts, scale_of(x, counts))))


def test_moments(cells):
    x, counts, size = cells
    np.testing.assert_allclose(size_of(counts, scale_of(x, counts)), size / 10, rtol=1e-6)
    assert np.median(np.abs(dispersion(counts, size) - 2)) < 0.5


@pytest.mark.parametrize("fold", [0.3, 1.0, 4.0])
def test_stimulated_counts_are_negative_binomial(cells, fold):
    _, counts, _ = cells
    size, theta = np.ones(len(counts)), np.full(30, 2.0)
    rng = np.random.default_rng(1)
    before = np.full(30, 3.0)
    x = rng.poisson(before * rng.gamma(theta, 1 / theta, counts.shape)).astype(float)
    y = CountChange(before, fold * before, theta).apply(x, size, rng.random(x.shape))
    mean = fold * 3.0
    assert y.mean() == pytest.approx(mean, rel=0.03)
    assert y.var() == pytest.approx(mean + mean**2 / 2, rel=0.06)
    assert (y == 0).mean() == pytest.approx(stats.nbinom.pmf(0, 2, 2 / (2 + mean)), abs=0.01)
    # and a cell with more counts has more afterwards
    if fold != 1:
        assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(x.T, y.T, strict=True)]) > 0.4
    else:
        np.testing.assert_array_equal(x, y)


def test_the_mean_is_the_one_asked_for(cells):
    x, counts, _ = cells
    order = even(len(x), 30)
    change = np.random.default_rng(2).normal(0, 0.7, 30)
    found = CountChange.of(
        sample_of(x, counts, order),
        change,
        np.full(30, 2.0),
    )
    scale = scale_of(x, counts)
    y = found.apply(counts, size_of(counts, scale), order)
    target = np.maximum(x.mean(0) + change, 0)
    errors = np.log1p(y * scale[:, None]).mean(0) - target
    # by half of the step that one count more in a cell makes, and the last digit of a rate
    step = np.log1p(scale.max()) / len(x)
    assert np.abs(errors).max() < 0.5 * step + 2e-4


def test_no_change_changes_no_count(cells):
    x, counts, _ = cells
    order = even(len(x), 30)
    found = CountChange.of(
        sample_of(x, counts, order),
        np.zeros(30),
        np.full(30, 2.0),
    )
    size = size_of(counts, scale_of(x, counts))
    np.testing.assert_array_equal(found.apply(counts, size, order), counts)


def test_empty_cells_and_silent_genes(cells):
    x, counts, _ = (np.array(part[:50]) for part in cells)
    counts[0] = x[0] = 0
    counts[:, 0] = x[:, 0] = 0
    order = even(50, 30)
    found = CountChange.of(
        sample_of(x, counts, order),
        np.full(30, 0.5),
        np.full(30, 2.0),
    )
    y = found.apply(counts, size_of(counts, scale_of(x, counts)), order)
    assert np.isfinite(y).all()
    assert (y[0] == 0).all()
    assert y[:, 0].any()


class TestModel:
    @pytest.fixture(scope="class")
    @classmethod
    def fold(cls):
        return make_fold(datasets.simulated(n_cells=60, n_genes=150), "type_0", TASK)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, fold):
        scvi.settings.seed = 0
        train = fold.train.copy()
        SpaPerbModel.setup_anndata(train, counts_layer="counts")
        model = SpaPerbModel(train, **IN_CONTEXT)
        with pytest.warns(UserWarning, match="type_0"):
            model.train(max_epochs=2, batch_size=64, **QUIET)
        return model

    def test_counts_are_whole_and_repeat(self, model, fold):
        control = fold.control.copy()
        model.predict_stimulated(control, sample=True)
        layer = control.layers["spaperb_stimulated_counts"]
        assert ((layer >= 0) & (layer % 1 == 0)).all()
        assert control.uns["spaperb"]["spaperb_stimulated_counts"]["sample"]
        again = model.predict_stimulated(fold.control, sample=True, inplace=False, batch_size=7)
        np.testing.assert_array_equal(again, layer)
        other = model.predict_stimulated(fold.control, sample=True, inplace=False, seed=1)
        assert not np.array_equal(other, layer)

    def test_they_look_like_real_ones(self, model, fold):
        raw = fold.control.layers["counts"].toarray()
        scale = scale_of(fold.control.X.toarray(), raw)
        counts = model.predict_stimulated(fold.control, sample=True, inplace=False)
        sampled, real = np.log1p(counts * scale[:, None]), fold.real.toarray()
        mean = model.predict_stimulated(fold.control, inplace=False)
        assert np.corrcoef(sampled.mean(0), mean.mean(0))[0, 1] > 0.99
        assert np.abs((sampled == 0).mean(0) - (real == 0).mean(0)).mean() < 0.1
        expressed = real.mean(0) > 0.05
        ratio = np.median((sampled.var(0) / np.maximum(real.var(0), 1e-9))[expressed])
        assert 0.7 < ratio < 1.3

    def test_saved_and_loaded(self, model, fold, tmp_path):
        model.save(tmp_path / "model")
        loaded = SpaPerbModel.load(tmp_path / "model", adata=False)
        np.testing.assert_array_equal(
            loaded.predict_stimulated(fold.control, sample=True, inplace=False),
            model.predict_stimulated(fold.control, sample=True, inplace=False),
        )

    def test_wrong_counts(self, model, fold):
        cells = fold.train.copy()
        before = snapshot(cells)
        for layer, message in (
            ("raw", "no layer 'raw'"),
            ("true_control", "must hold raw counts"),
        ):
            with pytest.raises(ValueError, match=message):
                SpaPerbModel.setup_anndata(cells, counts_layer=layer)
        assert snapshot(cells) == before
        cells.layers["counts"] = cells.layers["counts"][::-1].copy()
        with pytest.raises(ValueError, match=r"not log1p of the counts"):
            SpaPerbModel.setup_anndata(cells, counts_layer="counts")
        cells.layers["counts"] = fold.train.layers["counts"]
        silent = cells.copy()
        silent.X[0] = 0
        million = cells.copy()
        million.X = million.X * 1e6
        for other in (silent, million):
            with pytest.raises(ValueError, match=r"not log1p of the counts"):
                SpaPerbModel.setup_anndata(other, counts_layer="counts")
        bare = ad.AnnData(fold.control.X, obs=fold.control.obs, var=fold.control.var)
        with pytest.raises(ValueError, match="no layer 'counts'"):
            model.predict_stimulated(bare, sample=True)
        with pytest.raises(ValueError, match="needs `n_samples=1`"):
            model.predict_stimulated(fold.control, sample=True, n_samples=2)

    def test_a_model_without_counts(self, trained, query):
        with pytest.raises(ValueError, match="set up with `counts_layer=`"):
            trained.predict_stimulated(query, sample=True)
