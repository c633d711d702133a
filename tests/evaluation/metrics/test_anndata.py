"""Two AnnData, as cell-eval takes them: the same scores, and cell-eval's own."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import populations_of
from scipy import sparse

from spaperb import metrics, populations

GENES = [f"gene_{i}" for i in range(12)]
RNG = np.random.default_rng(0)
CONTROL, CONTROL_REAL = (populations_of(seed)[2] for seed in (0, 1))
REAL = {name: populations_of(i)[1] for i, name in enumerate("abcdef")}
PREDICTED = {name: x[::2] + RNG.random((len(x[::2]), 12)) / 5 for name, x in REAL.items()}


def both(**kwargs) -> tuple[AnnData, AnnData]:
    return metrics.as_anndata(
        PREDICTED,
        REAL,
        CONTROL,
        kwargs.pop("control_real", CONTROL_REAL),
        var_names=GENES,
        **kwargs,
    )


def test_scores_are_those_of_each_perturbation():
    predicted, real = both()
    table = metrics.evaluate_anndata(predicted, real, n_splits=2)
    assert list(table.columns) == ["perturbation", "metric", "value", "floor", "ceiling", "scaled"]
    assert table["perturbation"].unique().tolist() == list("abcdef")
    projection = populations.fit_projection(real.X)
    changes = {name: x.mean(0) - CONTROL_REAL.mean(0) for name, x in REAL.items()}
    for name in "ad":
        expected = metrics.evaluate(
            PREDICTED[name],
            REAL[name],
            CONTROL,
            projection,
            2,
            control_real=CONTROL_REAL,
            others=np.array([changes[other] for other in changes if other != name]),
        )
        found = table[table["perturbation"] == name]
        np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-6)
        np.testing.assert_allclose(found["ceiling"], expected["ceiling"], rtol=1e-6)


def test_other_names_and_orders_are_the_same_cells():
    expected = metrics.evaluate_anndata(*both(), n_splits=2)
    predicted, real = both(perturbation_key="drug", control_name="DMSO")
    rng = np.random.default_rng(1)
    predicted = predicted[rng.permutation(predicted.n_obs), rng.permutation(12)].copy()
    predicted.X = predicted.X.toarray()
    before = predicted.copy()
    result = metrics.evaluate_anndata(
        predicted, real, perturbation_key="drug", control="DMSO", n_splits=2
    )
    np.testing.assert_allclose(result["value"], expected["value"], rtol=1e-5)
    np.testing.assert_array_equal(predicted.X, before.X)


def test_numbers_for_names_are_the_same_as_text():
    predicted, real = both()
    expected = metrics.evaluate_anndata(predicted, real, n_splits=2)
    numbers = {name: i for i, name in enumerate(["non-targeting", *"abcdef"])}
    predicted.obs["target"] = predicted.obs["target"].astype(str).map(numbers)
    real.obs["target"] = real.obs["target"].astype(str).map(numbers).astype(str)
    result = metrics.evaluate_anndata(predicted, real, control=0, n_splits=2)
    np.testing.assert_array_equal(result["value"], expected["value"])


def test_written_and_read_again(tmp_path):
    sides = []
    for name, side in zip(("predicted", "real"), both(), strict=True):
        side.write_h5ad(tmp_path / f"{name}.h5ad")
        sides.append(ad.read_h5ad(tmp_path / f"{name}.h5ad"))
    expected = metrics.evaluate_anndata(*both(), n_splits=2)
    result = metrics.evaluate_anndata(*sides, n_splits=2)
    np.testing.assert_array_equal(result["value"], expected["value"])


def test_one_perturbation_has_no_others():
    one = metrics.as_anndata(
        {"a": PREDICTED["a"]}, {"a": sparse.csr_matrix(REAL["a"])}, CONTROL, var_names=GENES
    )
    table = metrics.evaluate_anndata(*one, n_splits=2).set_index("metric")
    assert np.isnan(table.loc["discrimination", "value"])
    assert table.loc["pearson_delta", "value"] > 0.5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"perturbation_key": "drug"}, "no column 'drug'"),
        ({"control": "DMSO"}, "No cell of `predicted` has 'DMSO'"),
    ],
)
def test_wrong_names(change, match):
    with pytest.raises(ValueError, match=match):
        metrics.evaluate_anndata(*both(), **change)


@pytest.mark.parametrize("side", [0, 1])
def test_expression_that_is_not_log_normalised(side):
    """cell-eval takes counts too, and would be right to; here they would give wrong numbers."""
    sides = both()
    name = ("predicted", "real")[side]
    sides[side].X = np.round(np.expm1(sides[side].X.toarray())) * 3
    with pytest.raises(ValueError, match=f"X of `{name}` is not log-normalised"):
        metrics.evaluate_anndata(*sides)


def test_other_perturbations_or_genes():
    predicted, real = both()
    some = predicted[predicted.obs["target"] != "b"].copy()
    with pytest.raises(ValueError, match="perturbations must be the same: b only among the real"):
        metrics.evaluate_anndata(some, real)
    with pytest.raises(ValueError, match="genes must be the same: gene_11 only among the real"):
        metrics.evaluate_anndata(predicted[:, :11].copy(), real)
    with pytest.raises(ValueError, match="perturbations must be the same"):
        metrics.as_anndata({"a": CONTROL}, {"b": CONTROL}, CONTROL, var_names=GENES)
    with pytest.raises(ValueError, match="has the name of the control cells, 'a'"):
        both(control_name="a")
    with pytest.raises(ValueError, match="cells by the same genes"):
        metrics.as_anndata({"a": CONTROL[:, 1:]}, {"a": CONTROL}, CONTROL, var_names=GENES)


def test_cell_eval_finds_the_same():
    """cell-eval2 0.20, each side with its own control cells, and no gene left out."""
    cell_eval = pytest.importorskip(
        "cell_eval2", reason="cell-eval2 is not installed; `pip install cell-eval2` runs this test"
    )
    default = cell_eval.EvalConfig(version="v1", input_type="lognorm", target_sum=None)
    config = replace(
        default,
        control_source="pred",
        filter=replace(default.filter, filter_gene_min_cpm_cell=None),
        discrimination=replace(
            default.discrimination,
            distance="cosine",
            rank_denominator="n-1",
            tie_policy="midrank",
            exclude_target_gene=False,
        ),
        de=replace(default.de, fdr_scope="per_pert", backend="scanpy"),
    )
    predicted, real = both()
    theirs = pd.DataFrame(
        cell_eval.compute_metrics(predicted, real, config=config, validate_input=False).to_dicts()
    ).pivot_table(index="perturbation", columns="metric", values="value")
    ours = metrics.evaluate_anndata(predicted, real, n_splits=2)
    ours = ours.pivot(index="perturbation", columns="metric", values="value")
    for name, their_name in {
        "mse_mean": "mse",
        "pearson_delta": "pearson_delta",
        "discrimination": "discrimination_score_cosine",
        "deg_recall": "de_sig_genes_recall",
    }.items():
        np.testing.assert_allclose(ours[name], theirs[their_name], rtol=1e-5, err_msg=name)
    # They rank genes by the corrected P value, which has more ties than the score.
    gap = ours["deg_average_precision"] - theirs["pr_auc"]
    assert gap.abs().max() < 0.03
