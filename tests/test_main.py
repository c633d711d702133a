"""The command line, as a person meets it."""

import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers import drop_layers, small_cells

from spaperb.__main__ import main

HIDE = ["--hide", "type_1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def file(folder):
    small_cells(n_genes=60).write_h5ad(folder / "cells.h5ad")
    return "cells.h5ad"


@pytest.fixture
def counts_file(folder):
    from spaperb import datasets

    adata = datasets.simulated(n_cell_types=3, n_cells=20, n_genes=60)
    adata.X = adata.layers["counts"].copy()
    drop_layers(adata)
    adata.obs = adata.obs.rename(columns={"condition": "stim", "cell_type": "cell"})
    adata.obs["stim"] = (adata.obs["stim"] == "stimulated").astype(int)
    adata.write_h5ad(folder / "counts.h5ad")
    return "counts.h5ad"


def predict(*arguments, output="out.h5ad"):
    return main(["predict", *arguments, "--output", output, "--max-epochs", "2"])


@pytest.mark.filterwarnings("ignore:These cell types have no control:UserWarning")
class TestRuns:
    def test_demo(self, folder, capsys):
        assert main(["demo", "--max-epochs", "2"]) == 0
        out = capsys.readouterr().out
        for word in ("not real cells", "SpaPerb", "no change", "mean shift", "pearson_delta"):
            assert word in out
        written = {path.name for path in (folder / "spaperb_demo").iterdir()}
        assert written == {"predicted.h5ad", "umap.png", "mean_expression.png"}

    def test_predict(self, file, folder, capsys):
        assert predict(file, *HIDE, "--n-top-genes", "40", "--plots", "plots") == 0
        out = capsys.readouterr().out
        assert "Hiding the 20 stimulated cells of type_1" in out
        assert "Epoch 2/2" in out
        result = ad.read_h5ad("out.h5ad")
        assert result.shape == (120, 40)
        assert np.isfinite(result.layers["spaperb_stimulated"]).all()
        hidden = result.obs["spaperb_hidden"]
        assert hidden.sum() == 20
        assert set(result.obs.loc[hidden, "cell_type"]) == {"type_1"}
        assert sorted(p.name for p in folder.iterdir()) == ["cells.h5ad", "out.h5ad", "plots"]

    def test_hidden_cells_change_nothing(self, folder):
        """Genes, training and prediction are the same whatever the hidden cells are."""
        adata = small_cells(n_genes=60)
        hidden = (adata.obs["cell_type"] == "type_1") & (adata.obs["condition"] == "stimulated")
        for name, factor in (("plain", 1.0), ("spoilt", 1.5)):
            copy = adata.copy()
            x = copy.X.toarray()
            x[hidden] = x[hidden][:, ::-1] * factor
            copy.X = x
            copy.write_h5ad(f"{name}.h5ad")
            assert predict(f"{name}.h5ad", *HIDE, "--n-top-genes", "40", output=f"{name}_out") == 0
        plain, spoilt = ad.read_h5ad("plain_out"), ad.read_h5ad("spoilt_out")
        assert plain.var_names.equals(spoilt.var_names)
        np.testing.assert_array_equal(
            plain[~hidden].layers["spaperb_stimulated"],
            spoilt[~hidden].layers["spaperb_stimulated"],
        )

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
        for output, seed in (("a", "0"), ("b", "0"), ("c", "1")):
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
        assert ad.read_h5ad("out.h5ad").n_obs == 120

    def test_output_made_meanwhile_is_kept(self, file, folder, monkeypatch, capsys):
        def make_output(*args, **kwargs):
            (folder / "out.h5ad").write_text("precious")

        monkeypatch.setattr("spaperb.__main__.SpaPerbModel.train", make_output)
        monkeypatch.setattr("spaperb.__main__.SpaPerbModel.predict_stimulated", make_output)
        assert predict(file) == 1
        assert (folder / "out.h5ad").read_text() == "precious"
        assert sorted(p.name for p in folder.iterdir()) == ["cells.h5ad", "out.h5ad"]

    def test_full_disk(self, file, folder):
        """In a process of its own, which HDF5 must not crash."""
        pytest.importorskip("resource")
        (folder / "out.h5ad").write_text("precious")
        code = (
            "import resource, sys; from spaperb.__main__ import main\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        arguments = ["predict", file, "--output", "out.h5ad", "--max-epochs", "2", "--overwrite"]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 1
        (error,) = (line for line in done.stderr.splitlines() if "rror" in line)
        assert error == (
            "spaperb: error: out.h5ad could not be written, and is as it was: "
            "[Errno 27] File too large"
        )
        assert (folder / "out.h5ad").read_text() == "precious"
        assert sorted(p.name for p in folder.iterdir()) == ["cells.h5ad", "out.h5ad"]

    @pytest.mark.parametrize("option", ["--output", "--plots"])
    def test_nothing_is_trained_for_a_folder_that_cannot_be_made(
        self, file, folder, monkeypatch, capsys, option
    ):
        monkeypatch.setattr("spaperb.__main__.SpaPerbModel.train", None)
        arguments = ["predict", file, "--output", "out.h5ad", option, f"{file}/out"]
        assert main(arguments) == 1
        assert "no file can be made in" in capsys.readouterr().err
        assert [p.name for p in folder.iterdir()] == ["cells.h5ad"]


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
        assert set(results["context"]) == {"type_0", "type_1", "type_2"}

    def test_the_model_and_a_failure(self, file, folder, capsys, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("out of ideas")

        monkeypatch.setattr("spaperb.SpaPerbModel.predict_stimulated", fail)
        code = main(
            ["benchmark", file, "--methods", "spaperb_residual", "no_change", "--seeds", "0", "--min-cells",
             "20", "--max-epochs", "1", "--held-out", "cell_type", "--output", "bench"]
        )  # fmt: skip
        assert code == 0
        out = capsys.readouterr().out
        assert "Failed: spaperb_residual on type_0, seed 0: RuntimeError: out of ideas" in out

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
        (folder / "cells.txt").write_text("text")
        self.refused(capsys, "", "cells.txt")

    def test_raw_counts_without_normalize(self, counts_file, capsys):
        self.refused(capsys, "Pass --normalize", counts_file)

    def test_normalize_of_normalised_cells(self, file, capsys):
        self.refused(capsys, "--normalize is for raw counts", file, "--normalize")

    def test_no_condition_column(self, file, capsys):
        self.refused(capsys, "no column 'stim'", file, "--condition-key", "stim")

    def test_absent_control(self, file, capsys):
        self.refused(capsys, "No cell has 'ctrl'", file, "--control", "ctrl")

    @pytest.mark.parametrize("extra", [[], ["--labels-key", "type"]])
    def test_type_to_hide_is_absent(self, file, capsys, extra):
        self.refused(capsys, "--hide 'type_9': 0 control", file, "--hide", "type_9", *extra)


def test_loss_that_becomes_nan(file, monkeypatch, capsys):
    def diverge(*args, **kwargs):
        raise FloatingPointError("The loss became NaN")

    monkeypatch.setattr("spaperb.__main__.SpaPerbModel.train", diverge)
    assert predict(file) == 1
    assert "spaperb: error: The loss became NaN" in capsys.readouterr().err


def test_interrupt(file, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("spaperb.__main__.SpaPerbModel.train", interrupt)
    assert predict(file) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["predict"], ["demo", "--max-epochs", "0"], ["other"]])
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_it_is_a_module_and_a_script():
    for command in ([sys.executable, "-m", "spaperb"], [f"{sys.prefix}/bin/spaperb"]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert "demo" in done.stdout
