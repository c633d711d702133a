from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from scipy import sparse

from spaperb import pl

RNG = np.random.default_rng(0)
GENES = [f"gene_{i}" for i in range(12)]
PREDICTED, REAL, CONTROL = (RNG.random((n, 12)) for n in (17, 19, 18))


def labels(ax):
    return {text.get_text() for text in ax.texts}


class TestMeanExpressionScatter:
    def test_points_are_the_means(self):
        ax = pl.mean_expression(PREDICTED, REAL, GENES)
        (points,) = ax.collections
        np.testing.assert_allclose(
            points.get_offsets(), np.column_stack([REAL.mean(0), PREDICTED.mean(0)])
        )

    def test_genes_that_really_changed_most_are_labelled(self):
        real = CONTROL.mean(0)[None].repeat(5, axis=0)
        real[:, [3, 7]] += [5, -5]
        ax = pl.mean_expression(PREDICTED, real, GENES, control=CONTROL, n_labels=2)
        assert labels(ax) == {"gene_3", "gene_7"}
        assert len(ax.collections) == 2

    def test_genes_with_the_largest_error_are_labelled_without_controls(self):
        predicted = REAL.copy()
        predicted[:, 5] += 3
        assert labels(pl.mean_expression(predicted, REAL, GENES, n_labels=1)) == {"gene_5"}

    def test_legend_tells_the_score(self):
        ax = pl.mean_expression(REAL, REAL, GENES, n_labels=0, title="all")
        assert ax.get_legend().get_texts()[0].get_text() == "predicted, R² = 1.00"
        assert ax.get_title() == "all"


class TestMeanChange:
    def test_points_are_the_changes_and_top_degs_are_named(self):
        real = CONTROL[:17] + np.eye(12)[3] * 5
        ax = pl.mean_change(PREDICTED, real, CONTROL, GENES, n_labels=1)
        assert labels(ax) == {"gene_3"}
        points = np.concatenate([c.get_offsets() for c in ax.collections])
        expected = np.column_stack([x.mean(0) - CONTROL.mean(0) for x in (real, PREDICTED)])
        np.testing.assert_allclose(np.sort(points, axis=0), np.sort(expected, axis=0))

    def test_legend_tells_the_score(self):
        ax = pl.mean_change(REAL, REAL, CONTROL, GENES, title="all")
        assert ax.get_legend().get_title().get_text() == "r = 1.00, top DEGs r = 1.00"
        assert ax.get_title() == "all"


class TestBenchmark:
    @staticmethod
    def results():
        scaled = {"good": (0.9, 0.7), "bad": (0.2, -0.4), "failed": (0.5, np.nan)}
        return pd.DataFrame(
            [
                {
                    "method": m,
                    "context": f"type_{i}",
                    "metric": "mse_mean",
                    "scaled": value + shift,
                }
                for m, values in scaled.items()
                for i, value in enumerate(values)
                for shift in (-0.1, 0.0, 0.1)
            ]
        )

    def test_values_are_medians_sorted_by_their_mean(self):
        ax = pl.benchmark(self.results(), "mse_mean")
        names = [tick.get_text() for tick in ax.get_yticklabels()]
        assert names == ["good", "failed", "bad"]
        columns = [tick.get_text() for tick in ax.get_xticklabels()]
        assert columns == ["type_0", "type_1", "mean"]
        image = ax.images[0].get_array()
        np.testing.assert_allclose(image[0], [0.9, 0.7, 0.8])
        assert image.mask[1].tolist() == [False, True, False]
        assert "-0.40" in labels(ax)

    def test_metric_without_a_scale(self):
        with pytest.raises(ValueError, match=r"no scaled values of 'variance_ratio'; .*mse_mean"):
            pl.benchmark(self.results(), "variance_ratio")


class TestUmap:
    def test_every_cell_is_a_point_of_its_populations_colour(self):
        ax = pl.umap({"control": CONTROL, "predicted": sparse.csr_matrix(PREDICTED)})
        cells = ax.collections[0]
        assert len(cells.get_offsets()) == 35
        counts = np.unique(cells.get_facecolor(), axis=0, return_counts=True)[1]
        assert sorted(counts) == [17, 18]
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert names == ["control (18)", "predicted (17)"]

    def test_more_populations_than_colours(self):
        with pytest.raises(ValueError, match="9 populations, and colours of 8"):
            pl.umap(dict.fromkeys("abcdefghi", CONTROL))

    @pytest.mark.parametrize("n", [1, 2, 5, 14])
    def test_few_cells(self, n):
        cells = {"control": CONTROL[:n], "real": CONTROL[n : n + 1], "predicted": PREDICTED[:n]}
        points = pl.umap(cells).collections[0].get_offsets()
        assert len(points) == 2 * n + 1
        assert np.isfinite(points).all()
        assert len(np.unique(points, axis=0)) == len(points)

    def test_fewer_than_three(self):
        with pytest.raises(ValueError, match="at least 3 cells, and there are 2"):
            pl.umap({"control": CONTROL[:1], "real": CONTROL[1:2]})

    def test_seed(self):
        first, second = (
            pl.umap({"control": CONTROL}, seed=1).collections[0].get_offsets() for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)


class TestLatent:
    Z = RNG.normal(size=(20, 5))
    DELTA = np.repeat([[3.0, 0, 0, 0, 0]], 20, axis=0)
    GROUPS = ["a"] * 8 + ["b"] * 12

    def test_an_arrow_for_each_group_from_its_mean_to_where_it_goes(self):
        ax = pl.latent(self.Z, self.DELTA, self.GROUPS)
        cells = np.concatenate([c.get_offsets() for c in ax.collections if len(c.get_offsets())])
        assert len(cells) == 20
        annotations = [text for text in ax.texts if isinstance(text, Annotation)]
        arrows = [(np.array(a.xyann), np.array(a.xy)) for a in annotations]
        np.testing.assert_allclose(arrows[0][0], cells[:8].mean(axis=0))
        np.testing.assert_allclose(arrows[1][0], cells[8:].mean(axis=0))
        shifts = [end - start for start, end in arrows]
        np.testing.assert_allclose(shifts[0], shifts[1])
        # The shift is what cells vary by most: it lies on the first component.
        assert abs(shifts[0][0]) > 2.5
        for _, (x, y) in arrows:
            assert ax.get_xlim()[0] < x < ax.get_xlim()[1]
            assert ax.get_ylim()[0] < y < ax.get_ylim()[1]
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a (8)", "b (12)"]

    def test_more_groups_than_colours(self):
        names = [f"type {i}" for i in range(10)]
        ax = pl.latent(self.Z, self.DELTA, np.repeat(names, 2))
        assert len([text for text in ax.texts if isinstance(text, Annotation)]) == 10
        assert [text.get_text() for text in ax.texts if text.get_text()] == names

    def test_arrays_of_different_cells(self):
        with pytest.raises(ValueError, match=r"same cells.*\(20, 5\), \(19, 5\) and \(20,\)"):
            pl.latent(self.Z, self.DELTA[1:], self.GROUPS)


HISTORY = {
    name: pd.DataFrame({name: np.linspace(start, 1.0, 4)}, index=pd.RangeIndex(4, name="epoch"))
    for name, start in (
        ("train_loss", 5.0),
        ("validation_loss", 4.0),
        ("kl_local_train", 3.0),
        ("kl_local_validation", 2.0),
    )
}


class TestHistory:
    def test_lines_are_the_logged_values(self):
        for term, starts in (("loss", [5.0, 4.0]), ("kl_local", [3.0, 2.0])):
            ax = pl.history(HISTORY, term)
            assert [line.get_ydata()[0] for line in ax.lines] == starts
            assert ax.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
            assert [line.get_label() for line in ax.lines] == ["training", "validation"]

    def test_of_a_model(self, trained):
        assert len(pl.history(trained.history, "latent_loss").lines[0].get_xdata()) == 3

    def test_without_validation(self):
        ax = pl.history({"train_loss": HISTORY["train_loss"]})
        assert [line.get_label() for line in ax.lines] == ["training"]

    def test_an_empty_one(self):
        with pytest.raises(ValueError, match="no epoch was trained"):
            pl.history({})

    def test_a_term_that_was_not_logged(self):
        with pytest.raises(ValueError, match="'elbow' was not logged; there are: loss, kl_local"):
            pl.history(HISTORY, "elbow")


PLOTS: dict[str, Any] = {
    "mean_expression": lambda **kwargs: pl.mean_expression(
        PREDICTED, REAL, GENES, control=CONTROL, **kwargs
    ),
    "mean_change": lambda **kwargs: pl.mean_change(PREDICTED, REAL, CONTROL, GENES, **kwargs),
    "response": lambda **kwargs: pl.response(response_rows(), n_labels=3, **kwargs),
    "benchmark": lambda **kwargs: pl.benchmark(TestBenchmark.results(), "mse_mean", **kwargs),
    "umap": lambda **kwargs: pl.umap({"control": CONTROL, "predicted": PREDICTED}, **kwargs),
    "latent": lambda **kwargs: pl.latent(
        TestLatent.Z, TestLatent.DELTA, TestLatent.GROUPS, **kwargs
    ),
    "history": lambda **kwargs: pl.history(HISTORY, **kwargs),
}


def response_rows():
    """A response table of one group and twelve genes."""
    change = np.linspace(-1, 1, 12)
    half = np.linspace(0.2, 0.6, 12)
    return pd.DataFrame(
        {
            "group": "a",
            "gene": GENES,
            "mean_change": change,
            "lower": change - half,
            "upper": change + half,
            "score": change / half,
            "distance": 0.3,
        }
    )


@pytest.fixture
def _flat_umap(monkeypatch):
    """Principal components instead of a UMAP, whose last digits differ between processors."""

    def first_two(cells, **kwargs):
        cells.obsm["X_umap"] = cells.obsm["X_pca"][:, :2]

    monkeypatch.setattr(pl.sc.tl, "umap", first_two)


@pytest.mark.skipif(
    tuple(map(int, matplotlib.__version__.split(".")[:2])) < (3, 11),
    reason="the pictures are matplotlib 3.11's, and 3.10 draws text otherwise",
)
@pytest.mark.usefixtures("_flat_umap")
@pytest.mark.mpl_image_compare(baseline_dir="images", style="default", savefig_kwargs={"dpi": 60})
@pytest.mark.parametrize("name", PLOTS)
def test_picture(name):
    return PLOTS[name]().figure


@pytest.mark.parametrize("name", PLOTS)
def test_settings_of_matplotlib(name):
    with plt.rc_context({"font.size": 17.0, "axes.facecolor": "0.9"}):
        ax = PLOTS[name]()
    assert ax.xaxis.label.get_fontsize() == 17.0 or name == "benchmark"
    assert ax.get_facecolor()[:3] == (0.9, 0.9, 0.9)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_axes_and_file_of_the_user(plot, tmp_path):
    ax = Figure().subplots()
    assert plot(ax=ax, save=tmp_path / "plot.png") is ax
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert not plt.get_fignums()
