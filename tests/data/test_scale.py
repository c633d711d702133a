"""What scale expression is on.

Never a wrong notice, none missed, and fold changes on any scale.
"""

import json
import math
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scvi
from dask import array as da
from helpers import QUIET, real_cells, small_cells, train_small
from scipy import sparse

from spaperb import SpaPerbModel, datasets
from spaperb.data._scale import (
    COUNTS,
    LOG_NORMALISED,
    LOGGED_TWICE,
    N_SAMPLED,
    NEGATIVE,
    NOT_LOGGED,
    NOT_NORMALISED,
    ROWS_AT_ONCE,
    UNKNOWN,
    Scale,
    check_scale,
    log_base,
)
from spaperb.model._response import log2_fold_change

REAL = (
    "human_pbmc_covid_combat",
    "human_trachea_smoking",
    "kang_pbmc_ifnb",
    "mouse_embryo_tal1",
    "mouse_lung_tumor_zilionis",
    "mouse_oligo_stress_marques",
    "mouse_spleen_lps_jaitin",
    "pig_airway_cftr",
)
"""Data sets with counts."""


def read(name: str) -> ad.AnnData:
    """Cells with counts in X and the context in ``obs["context"]``."""
    if name == "simulated":
        adata = datasets.simulated()
        adata.X = adata.layers["counts"]
    else:
        adata = real_cells(name)
    for key in ("cell_type", "cell_line"):
        if key in adata.obs:
            adata.obs["context"] = adata.obs[key]
    return adata


def normalised(counts, target_sum=1e4, base=None, log=True):
    cells = ad.AnnData(counts.copy())
    sc.pp.normalize_total(cells, target_sum=target_sum)
    if log:
        sc.pp.log1p(cells, base=base)
    return cells.X


def with_values(x, change):
    """The same sparse matrix with other stored values."""
    x = x.copy()
    x.data = change(x.data)
    return x


def ambient_corrected(counts):
    rng = np.random.default_rng(0)

    def change(values):
        noise = rng.normal(0, 0.05, values.size)
        return np.maximum(0.9 * values + noise, 0).astype(np.float32)

    return with_values(counts, change)


def gene_sets(adata):
    """All genes, the most variable, and few at random."""
    cells = ad.AnnData(normalised(adata.X))
    sc.pp.highly_variable_genes(cells, n_top_genes=min(2000, adata.n_vars // 2))
    few = np.random.default_rng(0).permutation(adata.n_vars)[: min(500, adata.n_vars // 2)]
    return {
        "all": np.arange(adata.n_vars),
        "variable": np.flatnonzero(cells.var["highly_variable"]),
        "few": few,
    }


def others(counts):
    """The same cells on other scales than 10,000 counts and natural logarithms."""
    logged, corrected = normalised(counts), ambient_corrected(counts)
    return {
        "ambient-corrected, not logged": (corrected, NOT_LOGGED),
        "normalised, not logged": (normalised(counts, log=False), NOT_LOGGED),
        "to the median, not logged": (normalised(counts, None, log=False), NOT_LOGGED),
        "corrected, not logged": (normalised(corrected, log=False), NOT_LOGGED),
        "logged twice": (with_values(logged, np.log1p), LOGGED_TWICE),
        "logged counts": (with_values(counts, np.log1p), NOT_NORMALISED),
        "base 2, not noted": (normalised(counts, base=2), "log-normalised to base 2"),
        "base 10, not noted": (normalised(counts, base=10), "log-normalised to base 10"),
        "raw": (counts, COUNTS),
    }


class TestNames:
    @pytest.mark.parametrize("name", [*REAL, "simulated"])
    def test_no_notice_is_wrong_and_none_is_missed(self, name):
        adata = read(name)
        right = {
            "10,000": (normalised(adata.X), math.e),
            "a million": (normalised(adata.X, 1e6), math.e),
            "the median": (normalised(adata.X, None), math.e),
            "base 2": (normalised(adata.X, base=2), 2.0),
            "base 10": (normalised(adata.X, base=10), 10.0),
            "a million, base 10": (normalised(adata.X, 1e6, base=10), 10.0),
        }
        corrected = normalised(ambient_corrected(adata.X))
        for genes_name, genes in gene_sets(adata).items():
            for case, (x, base) in right.items():
                assert Scale.of(x[:, genes], base).looks == LOG_NORMALISED, (case, genes_name)
            for case, (x, looks) in others(adata.X).items():
                assert Scale.of(x[:, genes]).looks == looks, (case, genes_name)
            assert Scale.of(right["10,000"][0][:, genes], 2).looks == "log-normalised to base e"
            # Nothing tells a part of the genes from anything else then, which gets no notice.
            known = LOG_NORMALISED if genes_name == "all" else UNKNOWN
            assert Scale.of(corrected[:, genes]).looks == known

    def test_a_panel_of_genes_that_was_normalised_before(self):
        scale = Scale.of(read("crispr_multi").X)
        assert scale.looks == LOG_NORMALISED
        assert scale.most_total > 10 * scale.least_total

    def test_residuals(self):
        adata = datasets.simulated(n_cells=50)
        residuals = sc.experimental.pp.normalize_pearson_residuals(
            ad.AnnData(adata.layers["counts"]), inplace=False
        )["X"]
        sc.pp.scale(adata)
        for x in (residuals, adata.X):
            scale = Scale.of(x)
            assert scale.looks == NEGATIVE
            assert not scale.nonnegative

    def test_counts_of_one_depth_need_no_normalisation(self):
        adata = datasets.simulated(n_cells=50)
        adata.X = adata.layers["counts"]
        sc.pp.downsample_counts(adata, counts_per_cell=1000)
        x = with_values(adata.X, np.log1p)
        assert Scale.of(x).looks == LOG_NORMALISED
        assert Scale.of(x[:, :300]).looks == LOG_NORMALISED


class TestQueries:
    @pytest.mark.parametrize("name", [*REAL, "simulated", "crispr_multi"])
    def test_another_cell_type_is_no_other_scale(self, name):
        adata = read(name)
        is_panel = name == "crispr_multi"
        logged = adata.X if is_panel else normalised(adata.X)
        sets = {"all": np.arange(adata.n_vars)} if is_panel else gene_sets(adata)
        condition = adata.obs["perturbation" if is_panel else "condition"]
        for genes in sets.values():
            x = logged[:, genes]
            for context in adata.obs["context"].unique():
                is_context = (adata.obs["context"] == context).to_numpy()
                trained_on = Scale.of(x[~is_context])
                arms = [is_context & (condition == arm).to_numpy() for arm in condition.unique()]
                one = np.flatnonzero(is_context)[:1]
                for cells in (is_context, one, *(arm for arm in arms if arm.any())):
                    with warnings.catch_warnings():
                        warnings.simplefilter("error")
                        check_scale(Scale.of(x[cells]), trained_on)

    @pytest.mark.parametrize("name", [*REAL, "simulated"])
    def test_another_scale_is_noticed(self, name):
        adata = read(name)
        is_new = (adata.obs["context"] == adata.obs["context"].iloc[0]).to_numpy()
        logged = normalised(adata.X)
        all_genes = gene_sets(adata)
        for genes in (all_genes["all"], all_genes["variable"]):
            trained_on = Scale.of(logged[~is_new][:, genes])
            queries = {
                case: Scale.of(x[is_new][:, genes]) for case, (x, _) in others(adata.X).items()
            }
            for target in (1e3, 1e5, 1e6):
                x = normalised(adata.X, target)[is_new]
                queries[f"{target:g}"] = Scale.of(x[:, genes])
            queries["base 2"] = Scale.of(normalised(adata.X, base=2)[is_new][:, genes], 2)
            for case, found in queries.items():
                message = "whole numbers" if case == "raw" else "on another scale"
                with pytest.warns(UserWarning, match=message) as record:
                    check_scale(found, trained_on)
                assert len(record) == 1, case

    def test_totals_are_of_the_models_genes(self, trained, query):
        extra = ad.AnnData(np.full((query.n_obs, 3), 8.0, np.float32), obs=query.obs)
        extra.var_names = [f"other_{i}" for i in range(3)]
        wide = ad.concat([extra, query], axis="var")
        with pytest.warns(UserWarning, match="unknown to the model") as record:
            trained.predict_stimulated(wide, inplace=False)
        assert len(record) == 1

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            (lambda q: sc.pp.log1p(q), "log-transformed twice"),
            (lambda q: note(q, to_base(q, 2), 2), r"log-normalised \(.*base 2.*total.*1e\+04"),
            (lambda q: note(q, to_base(q, 2), None), "log-normalised to base 2"),
            (lambda q: note(q, of_total(q, 1e6), None), r"log-normalised \(.*base e.*1e\+06"),
            (lambda q: note(q, np.expm1(q.X.toarray()), None), "not log-transformed"),
        ],
    )
    def test_one_warning_names_both_scales_and_the_remedy(
        self, trained, query, tmp_path, change, found
    ):
        change(query)
        remedy = r"normalize_total\(adata, target_sum=10000\) and then sc\.pp\.log1p\(adata\)"
        message = rf"look {found}.*the training cells look log-normalised.*1e\+04.*{remedy}"
        trained.export(tmp_path / "model.safetensors")
        trained.save(tmp_path / "saved")
        for model in (
            trained,
            SpaPerbModel.load(tmp_path / "saved", adata=False),
            SpaPerbModel.load_exported(tmp_path / "model.safetensors"),
        ):
            with pytest.warns(UserWarning, match=message) as record:
                model.predict_stimulated(query, inplace=False)
            assert len(record) == 1

    def test_cells_of_another_base_fit_a_model_of_that_base(self, query):
        adata = small_cells()
        note(adata, to_base(adata, 2), 2)
        model = train_small(adata)
        assert model.state.scale.base == 2.0
        note(query, to_base(query, 2), 2)
        model.predict_stimulated(query)
        del query.uns["log1p"]
        model.predict_stimulated(query)
        natural = small_cells(seed=1)
        message = r"log-normalised to base e.*the training cells look.*log1p\(adata, base=2\)"
        del natural.uns["log1p"]
        with pytest.warns(UserWarning, match=message):
            model.predict_stimulated(natural)

    def test_counts_and_scaled_cells_are_other_scales_both_ways(self, trained, query):
        logged = Scale.of(query.X)
        counts = Scale.of(datasets.simulated().layers["counts"])
        scaled = Scale.of(query.X.toarray() - 1)
        check_scale(counts, counts)
        check_scale(scaled, scaled)
        for trained_on in (counts, scaled):
            with pytest.warns(UserWarning, match="better train on log-normalised cells"):
                check_scale(logged, trained_on)
        with pytest.raises(ValueError, match=r"negative values.*Was it scaled\?"):
            check_scale(scaled, logged)

    def test_the_target_sum_is_told_where_all_genes_are_known(self):
        adata = datasets.simulated(n_cells=50)
        million = Scale.of(of_total(adata, 1e6))
        for genes, target in ((slice(None), "10000"), (slice(300), r"\.\.\.")):
            with pytest.warns(UserWarning, match=rf"target_sum={target}\)"):
                check_scale(million, Scale.of(adata.X[:, genes]))

    def test_silent_cells_have_no_scale(self, trained, query):
        query.X = np.zeros(query.shape, dtype=np.float32)
        trained.predict_stimulated(query)


def note(adata, x, base):
    adata.X = x
    adata.uns["log1p"] = {"base": base}


def to_base(adata, base):
    return adata.X / math.log(base)


def of_total(adata, total):
    return np.log1p(np.expm1(adata.X.toarray()) * total / 1e4)


class TestOf:
    @pytest.mark.parametrize(
        ("values", "nonnegative", "counts"),
        [
            ([[0.5, 1.0]], True, False),
            ([[2.0, 1.0]], True, True),
            ([[-2.0, 1.0]], False, False),
            ([[0.0, 0.0]], True, False),
        ],
    )
    @pytest.mark.parametrize("convert", [np.array, sparse.csr_matrix, sparse.csc_matrix])
    def test_kinds(self, values, nonnegative, counts, convert):
        scale = Scale.of(convert(values))
        assert (scale.nonnegative, scale.counts) == (nonnegative, counts)
        assert scale.largest == np.max(values)

    @pytest.mark.parametrize("row", [0, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 3])
    def test_every_block_is_looked_at(self, row):
        x = np.ones((2 * ROWS_AT_ONCE + 5, 2))
        x[row, 1] = -0.5
        scale = Scale.of(x)
        assert not scale.nonnegative
        assert not scale.counts
        x[row, 1] = np.nan
        with pytest.raises(ValueError, match="NaN or infinite"):
            Scale.of(x)

    @pytest.mark.parametrize("n_cells", [1, 7, 2 * N_SAMPLED + 3])
    def test_every_form_of_a_matrix_has_the_same(self, n_cells):
        x = datasets.simulated(n_cells=70, n_genes=60).X[:n_cells]
        columns = np.arange(0, 60, 2)
        expected = Scale.of(x, columns=columns)
        assert expected.looks == LOG_NORMALISED
        dense = x.toarray()
        twice = sparse.csr_matrix(
            (np.repeat(x.data / 2, 2), np.repeat(x.indices, 2), 2 * x.indptr), x.shape
        )
        sparse_blocks = da.from_array(dense, chunks=(100, 60)).map_blocks(sparse.csr_matrix)
        for other in (
            dense,
            np.asfortranarray(dense),
            x.tocsc(),
            sparse.csr_array(x),
            twice,
            da.from_array(dense, chunks=(100, 25)),
            sparse_blocks,
        ):
            before = other.copy()
            found = Scale.of(other, columns=columns)
            assert found.looks == expected.looks
            np.testing.assert_allclose(found.total, expected.total, rtol=1e-5)
            if sparse.issparse(other):
                assert np.array_equal(other.data, before.data)

    def test_a_dask_array_is_read_once(self):
        read = []

        def block(values, block_info=None):
            read.append(block_info[0]["chunk-location"])
            return values

        x = datasets.simulated(n_cells=30, n_genes=20).X.toarray()
        lazy = da.from_array(x, chunks=(100, 20)).map_blocks(block, meta=x[:0])
        Scale.of(lazy)
        assert len(read) == len(set(read)) == lazy.npartitions

    def test_it_is_kept_as_plain_numbers_and_text(self, trained):
        kept = vars(trained.state.scale)
        assert json.loads(json.dumps(kept)) == kept
        assert kept["looks"] == LOG_NORMALISED
        np.testing.assert_allclose([kept["total"], kept["least_total"]], 1e4, rtol=1e-5)


class TestBase:
    def test_as_scanpy_notes_it(self, adata, tmp_path):
        for base, expected in ((None, math.e), (2, 2.0), (10, 10.0)):
            adata.uns["log1p"] = {"base": base}
            assert log_base(adata) == expected
            adata.write_h5ad(tmp_path / "cells.h5ad")
            assert log_base(ad.read_h5ad(tmp_path / "cells.h5ad")) == expected
        adata.uns["log1p"] = {}
        assert log_base(adata) == math.e
        del adata.uns["log1p"]
        assert log_base(adata) is None

    @pytest.mark.parametrize("base", [1, 0, -2, np.nan, np.inf, "two"])
    def test_no_base(self, adata, base):
        adata.uns["log1p"] = {"base": base}
        with pytest.raises(ValueError, match=rf"is {base!r}, which is no base.*'base': None"):
            SpaPerbModel.setup_anndata(adata)
        assert "_scvi_labels" not in adata.obs

    def test_counts_are_drawn_for_natural_logarithms(self):
        adata = datasets.simulated(n_cells=30)
        note(adata, to_base(adata, 2), 2)
        with pytest.raises(ValueError, match=r"natural logarithms.*to base 2 .*`counts_layer`"):
            SpaPerbModel.setup_anndata(adata, counts_layer="counts")
        SpaPerbModel.setup_anndata(adata)


class TestSetUp:
    @pytest.mark.parametrize(
        ("change", "found", "remedy"),
        [
            (lambda a: np.expm1(a.X.toarray()), "not log-transformed", "the latter alone"),
            (
                lambda a: ambient_corrected(a.layers["counts"]) + 0,
                r"not log-transformed \(largest value",
                r"sc\.pp\.normalize_total",
            ),
            (lambda a: np.log1p(a.X.toarray()), "log-transformed twice", "take logarithms once"),
            (
                lambda a: with_values(a.layers["counts"], np.log1p),
                "log-transformed without normalisation",
                r"Start from the counts: sc\.pp\.normalize_total",
            ),
            (lambda a: to_base(a, 2), "log-normalised to base 2", r"\{'base': 2\}"),
        ],
    )
    def test_one_warning_says_what_was_found_and_what_to_call(self, change, found, remedy):
        adata = datasets.simulated(n_cells=40)
        adata.X = change(adata)
        with pytest.warns(UserWarning, match=f"Expression looks {found}.*{remedy}") as record:
            SpaPerbModel.setup_anndata(adata)
        assert len(record) == 1


def table_cells(base, target_sum):
    """Simulated cells, normalised in some way."""
    adata = datasets.simulated(n_cells=60, n_genes=200)
    adata.X = adata.layers["counts"].copy()
    sc.pp.normalize_total(adata, target_sum=target_sum)
    sc.pp.log1p(adata, base=base)
    return adata


class TestFoldChanges:
    @pytest.mark.parametrize("target_sum", [1e4, 1e6])
    @pytest.mark.parametrize("base", [None, 2, 10])
    def test_the_same_cells_have_the_same_on_any_scale(self, base, target_sum):
        """Means of logarithms to any base are one number transformed back; of another target sum
        they are where cells do not differ, and 1 is added to what they have."""

        def found(adata, base):
            before, after = (
                pd.Series(adata.X[(adata.obs["condition"] == arm).to_numpy()].mean(0).A1)
                for arm in ("control", "stimulated")
            )
            return log2_fold_change(before, after, Scale.of(adata.X, base or math.e)).to_numpy()

        real, reference = table_cells(base, target_sum), table_cells(None, target_sum)
        np.testing.assert_allclose(found(real, base), found(reference, None), atol=1e-4)
        means = []
        for adata in (real, table_cells(None, 1e4)):
            counts = adata.layers["counts"]
            of_arm = [
                counts[(adata.obs["condition"] == arm).to_numpy()].sum(0).A1
                for arm in ("control", "stimulated")
            ]
            same = ad.AnnData(sparse.csr_matrix(np.repeat(of_arm, 20, axis=0)))
            same.obs["condition"] = np.repeat(["control", "stimulated"], 20)
            same.obs_names = same.obs_names.astype(str)
            is_reference = adata is not real
            sc.pp.normalize_total(same, target_sum=1e4 if is_reference else target_sum)
            sc.pp.log1p(same, base=None if is_reference else base)
            means.append(found(same, None if is_reference else base))
        np.testing.assert_allclose(means[0], means[1], atol=1e-5)
        share = np.array(of_arm) / np.sum(of_arm, axis=1, keepdims=True)
        np.testing.assert_allclose(means[0], np.diff(np.log2(share + 1e-6), axis=0)[0], atol=1e-5)

    def test_the_target_sum_is_no_less_than_known_where_genes_were_dropped(self):
        for target_sum in (1e3, 1e4, 1e6):
            x = table_cells(None, target_sum).X
            assert Scale.of(x).target_sum == pytest.approx(target_sum, rel=1e-5)
            part = Scale.of(x[:, :50])
            assert not part.is_of_all_genes
            if target_sum <= 1e4:
                assert part.target_sum == 1e4
            else:
                assert 2e5 < part.target_sum < 1e6
        assert Scale.of(np.zeros((20, 5))).target_sum == 1e4

    def test_means_too_large_for_an_exponential(self):
        scale = Scale(True, False, 2.0, UNKNOWN, 5e3, 1e4, 1e4, 1e4)
        change = log2_fold_change(pd.Series([4000.0, 0.0]), pd.Series([5000.0, 5000.0]), scale)
        np.testing.assert_allclose(change, [1000.0, 5000 - math.log2(0.01)])

    def test_of_a_table(self):
        tables = []
        for base in (None, 2, 10):
            adata = table_cells(base, 1e4)
            SpaPerbModel.setup_anndata(adata)
            scvi.settings.seed = 0
            model = SpaPerbModel(adata)
            model.train(max_epochs=1, batch_size=1, **QUIET)
            table = model.predict_response(adata).set_index(["group", "gene"]).sort_index()
            tables.append(table)
            m0, m1 = (table["mean_control"] * math.log(base or math.e), None)
            m1 = m0 + table["mean_change"] * math.log(base or math.e)
            back = [np.expm1(m.clip(lower=0)) + 0.01 for m in (m0, m1)]
            np.testing.assert_allclose(
                table["log2_fold_change"], np.log2(back[1] / back[0]), atol=1e-4
            )
        natural, *with_base = (table["log2_fold_change"] for table in tables)
        for other in with_base:
            np.testing.assert_allclose(other, natural, atol=1e-3)
