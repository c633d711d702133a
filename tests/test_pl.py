import numpy as np
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
    ],
)
def test_axes_and_file_of_the_user(plot, tmp_path):
    ax = Figure().subplots()
    assert plot(ax=ax, save=tmp_path / "plot.png") is ax
    assert (tmp_path / "plot.png").stat().st_size > 1000
