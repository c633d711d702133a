"""The command line, as a person meets it."""

import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
import zarr
from helpers import drop_layers, small_cells
from matplotlib import pyplot as plt
from scipy import sparse

from spaperb import SpaPerbModel
from spaperb.cli import main
from spaperb.nn import Constants, InContextNetwork, write_weights

HIDE = ["--hide", "type_1"]
LAYER = "spaperb_stimulated"
# The hidden one.
pytestmark = pytest.mark.filterwarnings("ignore:These cell types have no control:UserWarning")


def four_types() -> ad.AnnData:
    """Of which three are left to train on where one is hidden."""
    return small_cells(n_cell_types=4, n_genes=60)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def file(folder):
    four_types().write_h5ad(folder / "cells.h5ad")
    return "cells.h5ad"


@pytest.fixture
def counts_file(folder):
    from spaperb import datasets

    adata = datasets.simulated(n_cell_types=4, n_cells=20, n_genes=60)
    adata.X = adata.layers["counts"].copy()
    drop_layers(adata)
    adata.obs = adata.obs.rename(columns={"condition": "stim", "cell_type": "cell"})
    adata.obs["stim"] = (adata.obs["stim"] == "stimulated").astype(int)
    adata.write_h5ad(folder / "counts.h5ad")
    return "counts.h5ad"


def predict(*arguments, output="out.h5ad"):
    return main(["predict", *arguments, "--output", output, "--max-epochs", "2"])


class TestRuns:
    def test_demo(self, folder, capsys):
        assert main(["demo", "--max-epochs", "2"]) == 0
        out = capsys.readouterr().out
        for word in ("not real cells", "SpaPerb", "no change", "mean shift", "pearson_delta"):
            assert word in out
        written = {path.name for path in (folder / "spaperb_demo").iterdir()}
        assert written == {"predicted.h5ad", "umap.png", "mean_expression.png"}

    @pytest.mark.parametrize("objective", ["in_context", "published"])
    def test_predict(self, file, folder, capsys, objective):
        arguments = ("--n-top-genes", "40", "--plots", "plots", "--objective", objective)
        assert predict(file, *HIDE, *arguments) == 0
        out = capsys.readouterr().out
        assert "Hiding the 20 stimulated cells of type_1" in out
        assert "Epoch 2/2" in out
        result = ad.read_h5ad("out.h5ad")
        assert result.shape == (160, 40)
        assert result.uns["spaperb"][LAYER]["objective"] == objective
        assert np.isfinite(result.layers["spaperb_stimulated"]).all()
        hidden = result.obs["spaperb_hidden"]
        assert hidden.sum() == 20
        assert set(result.obs.loc[hidden, "cell_type"]) == {"type_1"}
        assert sorted(p.name for p in folder.iterdir()) == ["cells.h5ad", "out.h5ad", "plots"]

    def test_hidden_cells_change_nothing(self, folder):
        """Genes, training and prediction are the same whatever the hidden cells are."""
        adata = four_types()
        hidden = (adata.obs["cell_type"] == "type_1") & (adata.obs["condition"] == "stimulated")
        for name, factor in (("plain", 1.0), ("spoilt", 1.5)):
            copy = adata.copy()
            x = copy.X.toarray()
            x[hidden] = x[hidden][:, ::-1] * factor
            copy.X = x
            copy.write_h5ad(f"{name}.h5ad")
            output = f"{name}_out.h5ad"
            assert predict(f"{name}.h5ad", *HIDE, "--n-top-genes", "40", output=output) == 0
        plain, spoilt = ad.read_h5ad("plain_out.h5ad"), ad.read_h5ad("spoilt_out.h5ad")
        assert plain.var_names.equals(spoilt.var_names)
        np.testing.assert_array_equal(
            plain[~hidden].layers["spaperb_stimulated"],
            spoilt[~hidden].layers["spaperb_stimulated"],
        )

    def test_only_types_that_lack_cells_without_being_hidden_are_told_of(self, folder):
        adata = four_types()
        is_lost = (adata.obs["cell_type"] == "type_2") & (adata.obs["condition"] == "stimulated")
        adata[~is_lost].write_h5ad("cells.h5ad")
        with pytest.warns(UserWarning, match="no part in training.*: type_1, type_2"):
            assert predict("cells.h5ad", *HIDE) == 0

    def test_nothing_hidden_gives_no_score(self, file, capsys):
        assert predict(file, "--plots", "plots") == 0
        out = capsys.readouterr().out
        assert "nothing to score honestly" in out
        assert "pearson_delta" not in out

    def test_counts_other_names_and_numbers_as_values(self, counts_file):
        code = predict(
            counts_file, "--normalize", "--condition-key", "stim", "--control", "0",
            "--stimulated", "1", "--labels-key", "cell", *HIDE,
        )  # fmt: skip
        assert code == 0
        result = ad.read_h5ad("out.h5ad")
        assert result.layers["counts"].max() == result.layers["counts"].max().round() > 1
        assert result.X.max() < 10

    def test_same_seed_same_file_content(self, file):
        layers = []
        for output, seed in (("a.h5ad", "0"), ("b.h5ad", "0"), ("c.h5ad", "1")):
            assert predict(file, "--seed", seed, output=output) == 0
            layers.append(ad.read_h5ad(output).layers["spaperb_stimulated"])
        np.testing.assert_array_equal(layers[0], layers[1])
        assert not np.array_equal(layers[0], layers[2])

    def test_output_is_replaced_only_if_asked(self, file, folder, capsys):
        (folder / "out.h5ad").write_text("precious")
        assert predict(file) == 1
        assert "out.h5ad exists. Pass --overwrite" in capsys.readouterr().err
        assert (folder / "out.h5ad").read_text() == "precious"
        assert predict(file, "--overwrite") == 0
        assert ad.read_h5ad("out.h5ad").n_obs == 160

    def test_output_made_meanwhile_is_kept(self, file, folder, monkeypatch, capsys):
        def predict_and_make_output(model, adata, key_added):
            adata.layers[key_added] = np.ones(adata.shape, dtype=np.float32)
            (folder / "out.h5ad").write_text("precious")

        monkeypatch.setattr("spaperb.cli.SpaPerbModel.predict_stimulated", predict_and_make_output)
        assert predict(file) == 1
        assert "out.h5ad was made by another process" in capsys.readouterr().err
        assert (folder / "out.h5ad").read_text() == "precious"
        assert (np.load(next(folder.glob("out_*.npz")))["spaperb_stimulated"] == 1).all()

    def test_full_disk(self, file, folder):
        """In a process of its own, which HDF5 must not crash."""
        pytest.importorskip("resource")
        (folder / "out.h5ad").write_text("precious")
        code = (
            "import resource, sys; from spaperb.cli import main\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        arguments = ["predict", file, "--output", "out.h5ad", "--max-epochs", "2", "--overwrite"]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 1
        (error,) = (line for line in done.stderr.splitlines() if "rror" in line)
        assert error.startswith(
            "spaperb: error: out.h5ad could not be written, and is as it was: "
            "[Errno 27] File too large. The prediction (numpy.load reads it) could not be written "
            "to ., "
        )
        assert error.endswith(" either, and is lost.")
        assert (folder / "out.h5ad").read_text() == "precious"
        assert sorted(p.name for p in folder.iterdir()) == ["cells.h5ad", "out.h5ad"]

    @pytest.mark.parametrize("option", ["--output", "--plots"])
    def test_nothing_is_trained_for_a_folder_that_cannot_be_made(
        self, file, folder, monkeypatch, capsys, option
    ):
        monkeypatch.setattr("spaperb.cli.SpaPerbModel.train", None)
        arguments = ["predict", file, "--output", "out.h5ad", option, f"{file}/out.h5ad"]
        assert main(arguments) == 1
        assert "no file can be made in" in capsys.readouterr().err
        assert [p.name for p in folder.iterdir()] == ["cells.h5ad"]


class TestPretrainedWeights:
    def test_too_few_types_to_train_on_are_told(self, folder):
        small_cells(n_genes=60).write_h5ad("cells.h5ad")
        with pytest.warns(UserWarning, match="measured in 2 context.*too few to train on"):
            assert predict("cells.h5ad", *HIDE) == 0
        assert np.isfinite(ad.read_h5ad("out.h5ad").layers[LAYER]).all()

    def test_weights_of_ones_own(self, file):
        torch.manual_seed(0)
        write_weights([InContextNetwork(Constants.none(), 4, 8)], Path("own.safetensors"), ["one"])
        layers = []
        for output, own in (("a.h5ad", ["--pretrained", "own.safetensors"]), ("b.h5ad", [])):
            assert predict(file, *own, output=output) == 0
            layers.append(ad.read_h5ad(output).layers[LAYER])
        assert not np.allclose(*layers)

    def test_as_they_are(self, file):
        command = ["predict", file, *HIDE, "--output", "a.h5ad", "--max-epochs", "0"]
        assert main(command) == 0
        assert np.isfinite(ad.read_h5ad("a.h5ad").layers[LAYER]).all()

    def test_the_published_objective_has_none(self, file, folder, capsys):
        arguments = ["--objective", "published", "--pretrained", "own.safetensors"]
        assert predict(file, *arguments) == 1
        assert "takes no file of `pretrained` weights" in capsys.readouterr().err
        assert not (folder / "out.h5ad").exists()

    def test_no_such_weights(self, file, folder, capsys):
        assert predict(file, "--pretrained", "none.safetensors") == 1
        error = capsys.readouterr().err
        assert "spaperb: error: There is no file none.safetensors" in error
        assert not (folder / "out.h5ad").exists()


class TestFilesOfCells:
    @pytest.mark.parametrize("output", ["out.h5ad", "out.zarr"])
    @pytest.mark.parametrize("version", [2, 3])
    def test_stores_give_what_files_give(self, file, version, output):
        with ad.settings.override(zarr_write_format=version):
            ad.read_h5ad(file).write_zarr("cells.zarr")
            assert predict("cells.zarr", *HIDE, "--n-top-genes", "40", output=output) == 0
        assert predict(file, *HIDE, "--n-top-genes", "40", output="expected.h5ad") == 0
        found = ad.read_zarr(output) if output == "out.zarr" else ad.read_h5ad(output)
        expected = ad.read_h5ad("expected.h5ad")
        np.testing.assert_array_equal(found.layers[LAYER], expected.layers[LAYER])
        assert (found.X != expected.X).sum() == 0
        pd.testing.assert_frame_equal(found.obs, expected.obs)
        pd.testing.assert_frame_equal(found.var, expected.var)

    def test_a_store_is_replaced_only_if_asked(self, file, folder, capsys):
        assert predict(file, output="out.zarr") == 0
        before = ad.read_zarr("out.zarr")
        assert predict(file, "--seed", "1", output="out.zarr") == 1
        assert "out.zarr exists. Pass --overwrite" in capsys.readouterr().err
        np.testing.assert_array_equal(ad.read_zarr("out.zarr").layers[LAYER], before.layers[LAYER])
        assert predict(file, "--seed", "1", "--overwrite", output="out.zarr") == 0
        assert (ad.read_zarr("out.zarr").layers[LAYER] != before.layers[LAYER]).any()
        assert sorted(p.name for p in folder.iterdir()) == ["cells.h5ad", "out.zarr"]

    @pytest.mark.parametrize("output", ["out.h5ad", "out.zarr"])
    def test_nullable_strings_come_back_as_they_were(self, folder, output):
        """As anndata 0.13 writes them; missing values too."""
        adata = four_types()
        adata.obs_names = pd.Index(adata.obs_names, dtype="string")
        adata.var_names = pd.Index(adata.var_names, dtype="string")
        for key in ("condition", "cell_type"):
            adata.obs[key] = adata.obs[key].astype("string")
        adata.obs["note"] = pd.array(["a", pd.NA, "b", "c"] * 40, dtype="string")
        adata.var["long_name"] = adata.var_names + " of a mouse"
        with ad.settings.override(allow_write_nullable_strings=True):
            adata.write_h5ad("cells.h5ad", convert_strings_to_categoricals=False)
        given = ad.read_h5ad("cells.h5ad")
        assert given.obs["condition"].dtype == given.obs_names.dtype == "string"
        assert predict("cells.h5ad", *HIDE, "--plots", "plots", output=output) == 0
        found = ad.read_zarr(output) if output == "out.zarr" else ad.read_h5ad(output)
        assert found.obs.pop("spaperb_hidden").sum() == 20
        pd.testing.assert_frame_equal(found.obs, given.obs)
        pd.testing.assert_frame_equal(found.var, given.var)

        four_types().write_h5ad("plain.h5ad")
        assert predict("plain.h5ad", *HIDE, output="plain_out.h5ad") == 0
        np.testing.assert_array_equal(
            found.layers[LAYER], ad.read_h5ad("plain_out.h5ad").layers[LAYER]
        )

    def test_columns_of_text_stay_text(self, folder):
        adata = four_types()
        adata.obs["plate"] = pd.Series(["a", "b"] * 80, index=adata.obs_names, dtype=object)
        with ad.settings.override(allow_write_nullable_strings=True):
            adata.write_h5ad("cells.h5ad", convert_strings_to_categoricals=False)
        assert predict("cells.h5ad") == 0
        found = ad.read_h5ad("out.h5ad").obs["plate"]
        assert found.dtype != "category"
        assert found.to_list() == ["a", "b"] * 80

    def test_types_missing_in_nullable_strings(self, folder, capsys):
        adata = four_types()
        adata.obs["cell_type"] = adata.obs["cell_type"].astype("string")
        adata.obs.loc[adata.obs_names[:7], "cell_type"] = pd.NA
        with ad.settings.override(allow_write_nullable_strings=True):
            adata.write_h5ad("cells.h5ad", convert_strings_to_categoricals=False)
        assert predict("cells.h5ad", *HIDE) == 1
        error = capsys.readouterr().err
        assert "adata.obs['cell_type'] (`labels_key`) has no value for 7 of 160 cells" in error


class TestNothingIsLost:
    """What fails after training leaves its result."""

    @pytest.fixture
    def expected(self, file):
        assert predict(file, output="expected.h5ad") == 0
        return ad.read_h5ad("expected.h5ad")

    @pytest.mark.parametrize("beside", [True, False])
    @pytest.mark.parametrize("error", [TypeError("no such type"), OSError("disk full")])
    def test_failed_writing(
        self, file, folder, expected, monkeypatch, tmp_path_factory, capsys, error, beside
    ):
        def fail(*args, **kwargs):
            if not beside:
                monkeypatch.setattr("spaperb._files.Path.mkdir", refuse)
            raise error

        def refuse(path, *args, **kwargs):
            if path == Path("results"):
                raise PermissionError(13, "Permission denied")

        temporary = tmp_path_factory.mktemp("temporary")
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        monkeypatch.setattr("spaperb.cli.write_cells", fail)
        assert predict(file, output="results/out.h5ad") == 1
        err = capsys.readouterr().err
        assert f"{error}. The prediction" in err
        (path,) = (Path("results") if beside else temporary).glob("out_*.npz")
        assert str(path) in err
        with np.load(path) as left:
            np.testing.assert_array_equal(left[LAYER], expected.layers[LAYER])
            np.testing.assert_array_equal(left["cells"], expected.obs_names.astype(str))
            np.testing.assert_array_equal(left["genes"], expected.var_names.astype(str))

    def test_failed_prediction(self, file, expected, monkeypatch, capsys):
        def fail(*args, **kwargs):
            raise MemoryError("too many cells")

        with monkeypatch.context() as patch:
            patch.setattr("spaperb.cli.SpaPerbModel.predict_stimulated", fail)
            assert predict(file) == 1
        (path,) = Path().glob("out_*_model")
        err = capsys.readouterr().err
        assert f"MemoryError: too many cells. The trained model is in {path}." in err
        adata = ad.read_h5ad(file)
        model = SpaPerbModel.load(str(path), adata=False)
        np.testing.assert_allclose(
            model.predict_stimulated(adata, inplace=False), expected.layers[LAYER], rtol=1e-5
        )


@pytest.mark.filterwarnings("ignore:Expression holds negative values:UserWarning")
class TestMostVariableGenes:
    """Of scaled cells, by the log-normalised expression in raw."""

    def chosen(self, adata, *arguments) -> list[str]:
        adata.write_h5ad("cells.h5ad")
        arguments = ("cells.h5ad", *HIDE, "--n-top-genes", "20", "--overwrite", *arguments)
        assert predict(*arguments) == 0
        return list(ad.read_h5ad("out.h5ad").var_names)

    def scaled(self, raw: ad.AnnData, n_genes: int = 50) -> ad.AnnData:
        """Scaled cells of the first genes, in another order than in raw."""
        adata = raw[:, :n_genes][:, ::-1].copy()
        adata.raw = raw
        sc.pp.scale(adata)
        return adata

    def test_raw_with_more_genes(self, folder, capsys):
        raw = four_types()
        expected = self.chosen(raw[:, :50][:, ::-1].copy())
        capsys.readouterr()
        found = self.chosen(self.scaled(raw))
        assert found == expected
        assert "the genes are chosen by raw" in capsys.readouterr().out
        by_scaled = sc.pp.highly_variable_genes(
            self.scaled(raw), flavor="seurat", n_top_genes=20, inplace=False
        )
        assert set(by_scaled.index[by_scaled["highly_variable"]]) != set(found)

    def test_hidden_cells_choose_nothing(self, folder):
        raw = four_types()
        expected = self.chosen(self.scaled(raw))
        hidden = (raw.obs["cell_type"] == "type_1") & (raw.obs["condition"] == "stimulated")
        x = raw.X.toarray() if sparse.issparse(raw.X) else raw.X.copy()
        x[hidden] = x[hidden][:, ::-1]
        spoilt = self.scaled(raw)
        spoilt.raw = ad.AnnData(x, obs=raw.obs, var=raw.var)
        assert self.chosen(spoilt) == expected

    @pytest.mark.parametrize(
        ("raw", "found"),
        [
            ("none", "there is no raw"),
            ("counts", "raw is not log-normalised"),
            ("scaled", "raw is not log-normalised"),
            ("not logged", "raw is not log-normalised"),
            ("few genes", "raw does not have all its genes"),
            ("repeated genes", "raw does not have all its genes"),
        ],
    )
    def test_refused(self, folder, monkeypatch, capsys, raw, found):
        cells = four_types()
        adata = self.scaled(cells)
        logged = cells.X.toarray() if sparse.issparse(cells.X) else cells.X
        x = {"counts": np.round(logged), "scaled": logged - 1, "not logged": np.expm1(logged)}
        other = ad.AnnData(x.get(raw, logged), obs=cells.obs, var=cells.var[[]])
        if raw == "few genes":
            other = other[:, 1:].copy()
        if raw == "repeated genes":
            other.var_names = [*other.var_names[:-1], other.var_names[0]]
        adata.raw = None if raw == "none" else other
        adata.write_h5ad("cells.h5ad")
        monkeypatch.setattr("spaperb.cli.SpaPerbModel.train", None)
        assert predict("cells.h5ad", "--n-top-genes", "20") == 1
        error = capsys.readouterr().err
        assert "--n-top-genes chooses genes by log-normalised expression" in error
        assert found in error

    def test_scaled_cells_of_a_benchmark(self, folder, capsys):
        self.scaled(four_types()).write_h5ad("cells.h5ad")
        arguments = ("cells.h5ad", *TestBenchmark.ARGUMENTS, "--output", "bench")
        assert main(["benchmark", *arguments, "--n-top-genes", "20"]) == 1
        assert "`n_top_genes` chooses genes by log-normalised" in capsys.readouterr().err


# So few cells are far from any type.
@pytest.mark.filterwarnings("ignore:The control cells of these cell types are farther:UserWarning")
class TestFewHiddenCells:
    @pytest.mark.parametrize("n_stimulated", [1, 2, 3])
    @pytest.mark.parametrize("n_control", [1, 3, 20])
    def test_all_that_can_be_drawn_is(self, folder, n_control, n_stimulated):
        adata = four_types()
        of_type, condition = adata.obs["cell_type"] == "type_1", adata.obs["condition"]
        kept = ~of_type.to_numpy()
        for name, n in (("control", n_control), ("stimulated", n_stimulated)):
            kept[np.flatnonzero(of_type & (condition == name))[:n]] = True
        adata[kept].write_h5ad("cells.h5ad")
        assert predict("cells.h5ad", *HIDE, "--plots", "plots") == 0
        assert ad.read_h5ad("out.h5ad").obs["spaperb_hidden"].sum() == n_stimulated
        drawn = {path.name for path in Path("plots").iterdir()}
        assert drawn == {"umap.png", "mean_expression.png"}

    def test_what_cannot_be_drawn_is_said(self, folder, capsys):
        """One gene has no principal components."""
        four_types()[:, :1].write_h5ad("cells.h5ad")
        assert predict("cells.h5ad", "--plots", "plots", "--objective", "published") == 0
        out = capsys.readouterr().out
        assert "umap.png could not be drawn: " in out
        assert "Saved plots/mean_expression.png" in out
        assert ad.read_h5ad("out.h5ad").n_vars == 1


class TestBenchmark:
    ARGUMENTS = ("--methods", "mean_shift", "no_change", "--seeds", "0", "--min-cells", "20")

    def test_table_files_and_figures(self, file, folder, capsys):
        assert main(["benchmark", file, *self.ARGUMENTS, "--output", "bench"]) == 0
        out = capsys.readouterr().out
        for word in ("mean_shift", "pearson_delta", "bench"):
            assert word in out
        written = {path.name for path in (folder / "bench").iterdir()}
        assert written == {
            "folds", "results.csv", "summary.csv", "pearson_delta.png", "energy_distance.png",
        }  # fmt: skip
        results = pd.read_csv("bench/results.csv")
        assert set(results["context"]) == {"type_0", "type_1", "type_2", "type_3"}

    def test_the_model_and_a_failure(self, file, folder, capsys, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("out of ideas")

        monkeypatch.setattr("spaperb.SpaPerbModel.predict_stimulated", fail)
        code = main(
            ["benchmark", file, "--methods", "spaperb_in_context", "no_change", "--seeds", "0", "--min-cells",
             "20", "--max-epochs", "1", "--held-out", "cell_type", "--output", "bench"]
        )  # fmt: skip
        assert code == 0
        out = capsys.readouterr().out
        assert "Failed: spaperb_in_context on type_0, seed 0: RuntimeError: out of ideas" in out

    def test_contexts_too_small(self, file, folder, capsys):
        assert main(["benchmark", file, "--output", "bench"]) == 1
        assert "at least 50 control and 50 stimulated" in capsys.readouterr().err


class TestErrors:
    """Each ends with exit code 1, one line on stderr, and no output file."""

    @pytest.fixture(autouse=True)
    def _no_output(self, folder):
        yield
        assert not (folder / "out.h5ad").exists()

    def refused(self, capsys, match, *arguments):
        assert predict(*arguments) == 1
        err = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(err) == 1
        assert err[0].startswith("spaperb: error: ")
        assert match in err[0]

    def test_no_file(self, folder, capsys):
        self.refused(capsys, "no file missing.h5ad", "missing.h5ad")

    def test_not_an_h5ad_file(self, folder, capsys):
        (folder / "cells.h5ad").write_text("text")
        self.refused(capsys, "cells.h5ad could not be read as an AnnData: OSError", "cells.h5ad")

    @pytest.mark.parametrize(
        ("name", "advice"),
        [
            ("cells.csv", "`import scanpy as sc; sc.read('cells.csv').write_h5ad('cells.h5ad')`"),
            ("cells.tsv.gz", "sc.read('cells.tsv.gz').write_h5ad("),
            ("cells.loom", "sc.read('cells.loom').write_h5ad("),
            ("cells.h5", "sc.read_10x_h5('cells.h5').write_h5ad("),
            ("matrix.mtx.gz", "sc.read_10x_mtx('.').write_h5ad("),
            ("cells.h5ad.gz", "`gunzip cells.h5ad.gz`"),
            ("cells.zarr", "no group at its top"),
            ("10x/", "sc.read_10x_mtx('10x').write_h5ad("),
            ("10x.h5ad/", "sc.read_10x_mtx('10x.h5ad').write_h5ad("),
            ("10x.zarr/", "no group at its top"),
        ],
    )
    def test_what_is_not_read(self, folder, capsys, name, advice):
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("text")
        match = f"{name.rstrip('/')} is neither an .h5ad file nor a .zarr store"
        self.refused(capsys, match, name)
        predict(name)
        assert advice in capsys.readouterr().err

    def test_a_store_of_something_else(self, folder, capsys):
        zarr.open_group("cells.zarr", mode="w").create_array("a", shape=3, dtype=float)
        self.refused(capsys, "cells.zarr could not be read as an AnnData", "cells.zarr")

    def test_what_cannot_be_written_is_found_before_training(self, file, capsys, monkeypatch):
        """HDF5 holds arrays of arrays, which AnnData reads and does not write."""
        with h5py.File(file, "a") as cells:
            ragged = cells.create_dataset("uns/ragged", 2, h5py.vlen_dtype(int))
            ragged[0], ragged[1] = [1], [2, 3]
            ragged.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        monkeypatch.setattr("spaperb.cli.SpaPerbModel.train", None)
        self.refused(capsys, "because uns holds something that a .h5ad file cannot", file)
        assert predict(file, output="out.zarr") == 1
        assert "key 'ragged'" in capsys.readouterr().err

    @pytest.mark.parametrize("output", ["out.csv", "out", "out.h5ad.gz"])
    def test_output_of_another_kind(self, capsys, output):
        with pytest.raises(SystemExit) as exit_:
            predict("missing.h5ad", output=output)
        assert exit_.value.code == 2
        assert f"must end in .h5ad or .zarr, not '{output}'" in capsys.readouterr().err

    def test_raw_counts_without_normalize(self, counts_file, capsys):
        self.refused(capsys, "Pass --normalize", counts_file)

    def test_normalize_of_normalised_cells(self, file, capsys):
        self.refused(capsys, "--normalize is for raw counts", file, "--normalize")

    def test_no_condition_column(self, file, capsys):
        self.refused(capsys, "no column 'stim'", file, "--condition-key", "stim")

    def test_absent_control(self, file, capsys):
        self.refused(capsys, "No cell has 'ctrl'", file, "--control", "ctrl")

    def test_type_to_hide_is_absent(self, file, capsys):
        self.refused(capsys, "--hide 'type_9': 0 control", file, "--hide", "type_9")

    def test_no_column_of_types(self, file, capsys):
        self.refused(capsys, "no column 'type' in", file, *HIDE, "--labels-key", "type")


def test_loss_that_becomes_nan(file, monkeypatch, capsys):
    def diverge(*args, **kwargs):
        raise FloatingPointError("The loss became NaN")

    monkeypatch.setattr("spaperb.cli.SpaPerbModel.train", diverge)
    assert predict(file) == 1
    assert "spaperb: error: The loss became NaN" in capsys.readouterr().err


def test_interrupt(file, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("spaperb.cli.SpaPerbModel.train", interrupt)
    assert predict(file) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["predict"], ["demo", "--max-epochs", "-1"], ["other"]])
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_it_is_a_module_and_a_script():
    for command in ([sys.executable, "-m", "spaperb"], [f"{sys.prefix}/bin/spaperb"]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert "demo" in done.stdout
