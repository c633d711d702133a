import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
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
        counts = np.unique(cells.get_facecolors(), axis=0, return_counts=True)[1]
        assert sorted(counts) == [17, 18]
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert names == ["control (18)", "predicted (17)"]

    def test_seed(self):
        first, second = (
            pl.umap({"control": CONTROL}, seed=1).collections[0].get_offsets() for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "plot",
    [
        lambda **kwargs: pl.mean_expression(PREDICTED, REAL, GENES, **kwargs),
        lambda **kwargs: pl.umap({"control": CONTROL}, **kwargs),
        lambda **kwargs: pl.mean_change(PREDICTED, REAL, CONTROL, GENES, **kwargs),
        lambda **kwargs: pl.benchmark(TestBenchmark.results(), "mse_mean", **kwargs),
    ],
)
def test_axes_and_file_of_the_user(plot, tmp_path):
    ax = Figure().subplots()
    assert plot(ax=ax, save=tmp_path / "plot.png") is ax
    assert (tmp_path / "plot.png").stat().st_size > 1000
