"""Nothing hidden reaches a method, failures are recorded, and finished folds are kept."""

import gc
import importlib.util
import json
import os
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import PUBLISHED, small_cells

from spaperb import metrics, populations
from spaperb.evaluation.baselines import BASELINES, MeanShift, NoChange
from spaperb.evaluation.benchmark import Method, SpaPerb, Task, benchmark, make_fold, summary

SETTINGS: dict[str, Any] = {"seeds": (0,), "n_splits": 2, "min_cells": 10}
TWO: dict[str, Method] = {"mean_shift": MeanShift(), "no_change": NoChange()}


class Spy(NoChange):
    """Writes down everything it is given."""

    seen: list = []  # noqa: RUF012  shared by the copies that the benchmark makes

    def fit(self, adata, **setup):
        Spy.seen.append((adata, setup))
        return self

    def predict(self, adata_control):
        Spy.seen.append((adata_control, {}))
        return super().predict(adata_control)


class Failing(NoChange):
    """Fails in one context, in the way it is told."""

    def __init__(self, result):
        self.result = result

    def predict(self, adata_control):
        x = super().predict(adata_control)
        if (adata_control.obs["cell_type"] != "type_1").all():
            return x
        if isinstance(self.result, Exception):
            raise self.result
        return self.result(x)


class Counting(NoChange):
    """Writes a file at every fit."""

    def __init__(self, folder):
        self.folder = folder

    def fit(self, adata, **setup):
        (self.folder / os.urandom(8).hex()).touch()
        return self


def check_untouched(adata, hidden_names, hidden_values):
    """No hidden cell is in any part of an AnnData, nor behind the arrays that it holds."""
    assert not set(adata.obs_names) & hidden_names
    for matrix in (adata.X, *adata.layers.values()):
        assert not np.isin(hidden_values, matrix.data).any()
        assert matrix.data.base is None or matrix.data.base.size == matrix.data.size
    for slot in ("obsm", "obsp", "varm", "varp", "uns"):
        assert not len(getattr(adata, slot))
    assert not adata.is_view
    assert list(adata.var.columns) == []


@pytest.mark.parametrize("held_out", ["cell_type", "donor"])
def test_a_method_never_receives_hidden_cells(held_out):
    adata = small_cells(n_cells=40)
    # Every value of every cell is its own, so that any leak can be recognised.
    adata.X.data = np.arange(1, 1 + adata.X.nnz, dtype=np.float32) / adata.X.nnz
    adata.layers["more"] = adata.X.copy()
    adata.obsm["X_pca"] = np.ones((adata.n_obs, 2))
    adata.uns["secret"] = adata.X
    adata.var["highly_variable"] = True
    Spy.seen.clear()
    benchmark(adata, {"spy": Spy()}, held_out=held_out, n_top_genes=20, **SETTINGS)

    contexts = sorted(adata.obs[held_out].unique())
    assert len(Spy.seen) == 2 * len(contexts)
    for context, (train, setup), (control, _) in zip(
        contexts, Spy.seen[::2], Spy.seen[1::2], strict=True
    ):
        hidden = (adata.obs[held_out] == context) & (adata.obs["condition"] == "stimulated")
        values = adata.X[hidden.to_numpy()].data
        for given in (train, control):
            check_untouched(given, set(adata.obs_names[hidden]), values)
        hidden_control = (adata.obs[held_out] == context) & ~adata.obs_names.isin(train.obs_names)
        hidden_control &= adata.obs["condition"] == "control"
        n_control = (
            (adata.obs[held_out] == context) & (adata.obs["condition"] == "control")
        ).sum()
        assert hidden_control.sum() == n_control // 2
        values = adata.X[hidden_control.to_numpy()].data
        for given in (train, control):
            check_untouched(given, set(adata.obs_names[hidden_control]), values)
        assert train.n_obs == adata.n_obs - hidden.sum() - n_control // 2
        assert set(control.obs[held_out]) == {context}
        assert set(control.obs["condition"]) == {"control"}
        assert setup["held_out"] == held_out
        assert "stimulated" not in str(setup["control"])


def test_genes_are_chosen_without_the_hidden_cells():
    adata = small_cells(n_cells=40)
    task = Task("cell_type", "condition", "control", None, "cell_type", 10, 2)
    hidden = (adata.obs["cell_type"] == "type_0") & (adata.obs["condition"] == "stimulated")
    spoilt = adata.copy()
    x = spoilt.X.toarray()
    x[hidden] = x[hidden][:, ::-1] * 5
    spoilt.X = x
    first, second = (make_fold(a, "type_0", task).train.var_names for a in (adata, spoilt))
    assert first.equals(second)
    assert 10 <= len(first) < 30  # scanpy keeps ties


def test_results_are_the_metrics_of_the_prediction():
    adata = small_cells(n_cells=40)
    results = benchmark(adata, TWO, **SETTINGS)
    assert len(results) == 3 * 2 * len(metrics.HIGHER_IS_BETTER)
    task = Task("cell_type", "condition", "control", None, "cell_type", None, 2)
    fold = make_fold(adata, "type_1", task)
    projection = populations.fit_projection(fold.train.X)
    predicted = MeanShift().fit(fold.train).predict(fold.control)
    # The real change is from the control cells that the method never saw.
    assert fold.control_real.shape == fold.control.shape == (20, 30)
    judged = {"control_real": fold.control_real, "others": fold.others}
    expected = metrics.score(predicted, fold.real, fold.control.X, projection, **judged)
    rows = results[(results["context"] == "type_1") & (results["method"] == "mean_shift")]
    same = {"nan_ok": True}
    assert dict(zip(rows["metric"], rows["value"], strict=True)) == pytest.approx(expected, **same)

    ceiling = metrics.ceiling(fold.real, fold.control.X, projection, 2, 0, **judged)
    assert dict(zip(rows["metric"], rows["ceiling"], strict=True)) == pytest.approx(
        ceiling, **same
    )
    floor = results[(results["context"] == "type_1") & (results["method"] == "no_change")]
    np.testing.assert_allclose(floor["value"], floor["floor"])
    assert (rows["n_control"] == 20).all()
    assert (rows["seconds"] > 0).all()


def test_each_seed_draws_the_control_cells_anew():
    adata = small_cells(n_cells=40)
    task = Task("cell_type", "condition", "control", None, "cell_type", None, 2)
    names = [set(make_fold(adata, "type_1", task, seed).control.obs_names) for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    results = benchmark(adata, TWO, **{**SETTINGS, "seeds": (0, 1)})
    rows = results[results["metric"] == "pearson_delta"]
    for column in ("value", "ceiling"):
        assert (
            rows[rows["method"] == "mean_shift"].groupby("context")[column].nunique().eq(2).all()
        )


def test_shared_control_cells_are_as_before():
    adata = small_cells(n_cells=40)
    task = Task("cell_type", "condition", "control", None, "cell_type", None, 2, False)
    fold = make_fold(adata, "type_1", task)
    assert fold.control.n_obs == 40
    assert fold.control_real is fold.control.X
    results = benchmark(adata, TWO, split_controls=False, **SETTINGS)
    assert (results["n_control"] == 40).all()


class TestOthers:
    """The changes that a prediction should be told from."""

    @staticmethod
    def change(adata, context, condition, before=None):
        in_context = (adata.obs["cell_type"] == context).to_numpy()
        arms = {
            name: adata.X[in_context & (adata.obs["condition"] == name).to_numpy()].mean(0)
            for name in ("control", condition)
        }
        return np.ravel(arms[condition] - (arms["control"] if before is None else before))

    def test_other_contexts(self):
        adata = small_cells()
        task = Task("cell_type", "condition", "control", None, "cell_type", None, 2)
        others = make_fold(adata, "type_1", task).others
        expected = [self.change(adata, name, "stimulated") for name in ("type_0", "type_2")]
        np.testing.assert_allclose(np.sort(others, 0), np.sort(expected, 0), atol=1e-5)

    def test_other_perturbations_from_the_control_cells_of_the_real_change(self):
        adata = small_cells(n_cells=80)
        rng = np.random.default_rng(0)
        is_stimulated = (adata.obs["condition"] == "stimulated").to_numpy()
        names = np.where(is_stimulated, rng.choice(list("ABCD"), adata.n_obs), "control")
        adata.obs["condition"] = names
        task = Task("cell_type", "condition", "control", "B", "cell_type", None, 2)
        fold = make_fold(adata, "type_1", task)
        before = fold.control_real.mean(0)
        expected = [self.change(adata, "type_1", name, before) for name in "ACD"]
        np.testing.assert_allclose(np.sort(fold.others, 0), np.sort(expected, 0), atol=1e-5)

    def test_none(self):
        adata = small_cells(n_cell_types=1)
        task = Task("cell_type", "condition", "control", None, "cell_type", None, 2)
        assert make_fold(adata, "type_0", task).others.shape == (0, 30)


def test_spaperb_is_a_method():
    adata = small_cells(n_cells=20)
    methods = {"spaperb": SpaPerb({"max_epochs": 2}, **PUBLISHED)}
    results = benchmark(adata, methods, **{**SETTINGS, "seeds": (0, 1)})
    assert results["error"].isna().all()
    again = benchmark(adata, methods, **{**SETTINGS, "seeds": (0, 1)})
    pd.testing.assert_frame_equal(results.drop(columns="seconds"), again.drop(columns="seconds"))
    by_seed = results[results["metric"] == "mse_mean"].groupby("seed")["value"].first()
    assert by_seed.nunique() == 2


def test_cells_of_finished_folds_are_let_go():
    cells = []

    class Watched(SpaPerb):
        def fit(self, adata, **setup):
            cells.append(weakref.ref(adata))
            return super().fit(adata, **setup)

    benchmark(small_cells(), {"model": Watched({"max_epochs": 1}, **PUBLISHED)}, **SETTINGS)
    gc.collect()
    assert len(cells) == 3
    assert not any(cell() is not None for cell in cells)


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (RuntimeError("out of ideas"), "RuntimeError: out of ideas"),
        (lambda x: x[:, :-1], "shape (10, 29) instead of (10, 30)"),
        (lambda x: x[:-1], "shape (9, 30)"),
        (lambda x: pd.DataFrame(x), "TypeError: predicted DataFrame, and an array"),
        (lambda x: np.ma.masked_array(x), "predicted MaskedArray"),
        (lambda x: AnnData(x), "predicted AnnData"),
        (lambda x: x * np.nan, "300 NaN or infinite values"),
        (lambda x: x - 100, "300 negative values, down to -100"),
    ],
)
def test_a_fold_that_fails_is_recorded_and_the_rest_go_on(result, error):
    results = benchmark(small_cells(), {"bad": Failing(result), **TWO}, **SETTINGS)
    failed = results[results["error"].notna()]
    assert set(zip(failed["context"], failed["method"], strict=True)) == {("type_1", "bad")}
    assert error in failed["error"].iloc[0]
    assert failed["value"].isna().all()
    is_scored = results["error"].isna() & (results["metric"] == "mse_mean")
    assert results.loc[is_scored, "value"].notna().all()
    assert summary(results).set_index(["method", "metric"])["n_failed"]["bad", "mse_mean"] == 1


class TestFolder:
    def test_a_restarted_run_takes_what_is_done(self, tmp_path):
        (fits := tmp_path / "fits").mkdir()
        settings = {**SETTINGS, "folder": tmp_path / "folds"}
        first = benchmark(small_cells(), {"a": Counting(fits)}, **settings)
        assert len(list(fits.iterdir())) == 3
        again = benchmark(small_cells(), {"a": Counting(fits)}, **settings)
        assert len(list(fits.iterdir())) == 3
        pd.testing.assert_frame_equal(first, again)
        # a fold lost: that one is run again
        rows = {p: json.loads(p.read_text()) for p in (tmp_path / "folds").iterdir()}
        next(p for p, row in rows.items() if row["method"] == "a").unlink()
        benchmark(small_cells(), {"a": Counting(fits)}, **settings)
        assert len(list(fits.iterdir())) == 4

    def test_other_data_or_task_are_not_taken_for_the_same(self, tmp_path):
        (fits := tmp_path / "fits").mkdir()
        folder = tmp_path / "folds"
        for adata, extra in (
            (small_cells(), {}),
            (small_cells(seed=1), {}),
            (small_cells(), {"n_top_genes": 10}),
        ):
            before = len(list(fits.iterdir()))
            benchmark(adata, {"a": Counting(fits)}, folder=folder, **SETTINGS, **extra)
            assert len(list(fits.iterdir())) == before + 3

    def test_contexts_and_seeds_of_numpy_find_floor_and_ceiling_again(self, tmp_path):
        adata = small_cells()
        adata.obs["cell_type"] = adata.obs["cell_type"].cat.codes.astype(int).to_numpy()
        settings = {**SETTINGS, "seeds": np.arange(1), "folder": tmp_path}
        benchmark(adata, {"a": NoChange()}, **settings)
        results = benchmark(adata, {"a": NoChange(), "b": MeanShift()}, **settings)
        expected = benchmark(adata, {"a": NoChange(), "b": MeanShift()}, **SETTINGS)
        pd.testing.assert_frame_equal(
            results.drop(columns="seconds"), expected.drop(columns="seconds")
        )

    def test_other_layers_are_not_taken_for_the_same(self, tmp_path):
        (fits := tmp_path / "fits").mkdir()
        adata = small_cells()
        for factor in (1, 1, 2):
            adata.layers["more"] = factor * adata.X
            benchmark(adata, {"a": Counting(fits)}, folder=tmp_path / "folds", **SETTINGS)
        assert len(list(fits.iterdir())) == 6

    def test_other_files_that_a_method_names_are_not_taken_for_the_same(self, tmp_path):
        (fits := tmp_path / "fits").mkdir()
        method, weights = Counting(fits), tmp_path / "weights"
        vars(method).update(files=[weights, "x" * 10_000], itself=method)
        for content in ("a", "a", "b"):
            weights.write_text(content)
            benchmark(small_cells(), {"a": method}, folder=tmp_path / "folds", **SETTINGS)
        assert len(list(fits.iterdir())) == 6

    def test_a_method_that_cannot_be_told_from_another(self, tmp_path):
        method = NoChange()
        vars(method)["function"] = lambda x: x
        with pytest.raises(ValueError, match="The method 'a' holds what can't be told"):
            benchmark(small_cells(), {"a": method}, folder=tmp_path, **SETTINGS)
        assert benchmark(small_cells(), {"a": method}, **SETTINGS)["error"].isna().all()

    def test_folds_of_edited_code_are_run_again(self, tmp_path):
        (fits := tmp_path / "fits").mkdir()
        settings = {**SETTINGS, "folder": tmp_path / "folds"}
        file = tmp_path / "of_a_user.py"
        code = Path(__file__).read_text()
        for number, edited in enumerate((code, code, code.replace("Writes a file", "Makes one"))):
            file.write_text(edited)
            spec = importlib.util.spec_from_file_location("of_a_user", file)
            sys.modules["of_a_user"] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            benchmark(small_cells(), {"a": module.Counting(fits)}, **settings)
            assert len(list(fits.iterdir())) == (3, 3, 6)[number]
        del sys.modules["of_a_user"]

    def test_folds_of_an_edited_class_without_a_file_are_run_again(self, tmp_path):
        (fits := tmp_path / "fits").mkdir()
        settings = {**SETTINGS, "folder": tmp_path / "folds"}
        for number, factor in enumerate((1, 1, 2)):
            names: dict[str, Any] = {"__name__": "notebook", "Counting": Counting}
            exec(
                "class InNotebook(Counting):\n"
                f"    def predict(self, adata_control):\n"
                f"        return {factor} * adata_control.X.toarray()\n",
                names,
            )
            sys.modules["notebook"] = notebook = types.ModuleType("notebook")
            notebook.__dict__.update(names)
            benchmark(small_cells(), {"a": names["InNotebook"](fits)}, **settings)
            assert len(list(fits.iterdir())) == (3, 3, 6)[number]
        del sys.modules["notebook"]

    def test_failed_folds_are_run_again(self, tmp_path):
        settings = {**SETTINGS, "folder": tmp_path}
        bad = {"bad": Failing(RuntimeError("first time"))}
        assert benchmark(small_cells(), bad, **settings)["error"].notna().any()
        files = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
        benchmark(small_cells(), bad, **settings)
        changed = [p for p, time in files.items() if p.stat().st_mtime_ns != time]
        assert [json.loads(p.read_text())["context"] for p in changed] == ["type_1"]

    def test_every_file_is_one_whole_row(self, tmp_path):
        benchmark(small_cells(), TWO, folder=tmp_path, **SETTINGS)
        rows = [json.loads(p.read_text()) for p in tmp_path.iterdir()]
        # three contexts: two methods, floor, ceiling
        assert len(rows) == 12
        assert all(p.suffix == ".json" for p in tmp_path.iterdir())


class TestParallel:
    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls):
        return benchmark(small_cells(), TWO, **SETTINGS).drop(columns="seconds")

    def test_processes(self, expected):
        results = benchmark(small_cells(), TWO, n_jobs=2, **SETTINGS)
        pd.testing.assert_frame_equal(results.drop(columns="seconds"), expected)

    def test_dask_cluster(self, expected):
        distributed = pytest.importorskip(
            "distributed", reason="dask.distributed is not installed"
        )
        with (
            distributed.LocalCluster(
                n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
            ) as cluster,
            distributed.Client(cluster),
            joblib.parallel_config(backend="dask"),
        ):
            results = benchmark(small_cells(), TWO, **SETTINGS)
        pd.testing.assert_frame_equal(results.drop(columns="seconds"), expected)


def test_progress_is_shown(capsys):
    benchmark(small_cells(), TWO, **SETTINGS)
    assert "Folds: 100%" in capsys.readouterr().out


def test_summary():
    table = pd.DataFrame(
        [
            {"method": "m", "metric": "x", "context": c, "seed": s, "value": v, "error": None}
            for c, values in (("a", (1, 2, 9)), ("b", (3, 4, 5)))
            for s, v in enumerate(values)
        ]
    )
    row = summary(table).iloc[0]
    assert (row["mean"], row["worst"], row["best"]) == (3, 2, 4)
    assert row["spread"] == pytest.approx(np.std([2, 3, 7], ddof=1))


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                {"contexts": ["type_9"]},
                r"type_9 in obs\['cell_type'\] has fewer.*type_0 20 and 20",
            ),
            ({"min_cells": 50}, "every context in obs"),
            ({"held_out": "clinic"}, "no column 'clinic'.*`held_out`"),
            ({"control": "ctrl"}, "No cell has 'ctrl'"),
            ({"labels_key": "type"}, "no column 'type'"),
        ],
    )
    def test_refused(self, change, match):
        with pytest.raises(ValueError, match=match):
            benchmark(small_cells(), TWO, **{**SETTINGS, **change})

    def test_context_with_one_condition(self):
        adata = small_cells()
        keep = (adata.obs["cell_type"] != "type_2") | (adata.obs["condition"] == "control")
        adata = adata[keep].copy()
        with pytest.raises(ValueError, match=r"and type_2 in obs.*type_2 20 and 0"):
            benchmark(adata, TWO, contexts=["type_0", "type_2"], **SETTINGS)
        assert set(benchmark(adata, TWO, **SETTINGS)["context"]) == {"type_0", "type_1"}

    def test_context_of_few_cells(self):
        adata = small_cells(n_cells=9)
        with pytest.raises(ValueError, match="at least 20 control and 10 stimulated"):
            benchmark(adata, TWO, contexts=["type_0"], **SETTINGS)
        with pytest.raises(ValueError, match="at least 10 control and 10 stimulated"):
            benchmark(adata, TWO, contexts=["type_0"], split_controls=False, **SETTINGS)

    def test_the_same_seed_or_context_twice_is_once(self):
        once = benchmark(small_cells(), TWO, contexts=["type_0"], **SETTINGS)
        settings = {**SETTINGS, "seeds": (0, 0), "contexts": ["type_0", "type_0"]}
        twice = benchmark(small_cells(), TWO, **settings)
        pd.testing.assert_frame_equal(once.drop(columns="seconds"), twice.drop(columns="seconds"))

    def test_reserved_names(self):
        with pytest.raises(ValueError, match="taken by the benchmark: ceiling"):
            benchmark(small_cells(), {"ceiling": NoChange()}, **SETTINGS)


def test_the_users_cells_stay_as_they_are():
    from helpers import snapshot

    adata = small_cells()
    before = snapshot(adata)
    benchmark(adata, {**BASELINES, "spaperb": SpaPerb({"max_epochs": 1}, **PUBLISHED)}, **SETTINGS)
    assert snapshot(adata) == before
