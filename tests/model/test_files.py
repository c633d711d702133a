import json
import os
import pickle
import shutil
import struct

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    IN_CONTEXT,
    QUIET,
    Trap,
    drop_layers,
    flip_byte_of_weight,
    small_cells,
    snapshot,
    train_small,
)
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import sparse
from scvi.model.base import BaseModelClass

from spaperb import SpaPerbModel, datasets
from spaperb.model import _files as saving


def rewrite(path, change):
    """Change what an exported file says, with a checksum that fits."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        content = json.loads(file.metadata()["spaperb"])
    change(content, tensors)
    text = json.dumps(content)
    save_file(tensors, path, {"spaperb": text, "sha256": saving._checksum(text, tensors)})


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    trained.export(path)
    return path


@pytest.fixture
def copy(exported, tmp_path):
    path = tmp_path / "copy.safetensors"
    path.write_bytes(exported.read_bytes())
    return path


def test_each_reader_names_the_other(trained, exported, tmp_path):
    trained.save(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"is a file.*`SpaPerbModel\.load_exported\('.*tensors'\)`"
    ):
        SpaPerbModel.load(exported, adata=False)
    with pytest.raises(ValueError, match=r"is a folder.*`SpaPerbModel\.load\('.*model', adata\)`"):
        SpaPerbModel.load_exported(tmp_path / "model")


class TestExport:
    @pytest.mark.parametrize("objective", ["published", "in_context"])
    def test_predictions_are_the_same_to_the_last_bit(self, objective, tmp_path):
        adata = small_cells()
        model = train_small(adata, objective=objective)
        model.export(tmp_path / "model.safetensors")
        query = adata[adata.obs["condition"] == "control"].copy()
        loaded = SpaPerbModel.load_exported(tmp_path / "model.safetensors")
        expected = model.predict_stimulated(query, inplace=False)
        assert np.array_equal(loaded.predict_stimulated(query, inplace=False), expected)
        assert loaded.is_trained
        for name, of_epochs in model.history.items():
            pd.testing.assert_frame_equal(loaded.history[name], of_epochs, check_dtype=False)

    def test_pretrained_networks_come_along(self, tmp_path, monkeypatch):
        adata = small_cells(n_cell_types=4)
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata)
        model.train(max_epochs=1, batch_size=1, **QUIET)
        model.export(tmp_path / "model.safetensors")
        model.save(tmp_path / "model")
        expected = model.predict_response(adata)
        monkeypatch.setattr("spaperb.model._model.shipped_weights", lambda: tmp_path / "no file")
        for loaded in (
            SpaPerbModel.load_exported(tmp_path / "model.safetensors"),
            SpaPerbModel.load(tmp_path / "model", adata=False),
            SpaPerbModel.load(tmp_path / "model", adata),
        ):
            assert loaded.module.share == model.module.share
            assert 0 < loaded.module.share < 1
            pd.testing.assert_frame_equal(loaded.predict_response(adata), expected)

    def test_intervals_doses_and_batches_come_along(self, tmp_path):
        adata = datasets.simulated(
            n_cell_types=4, n_cells=30, n_genes=30, doses=(0.1, 1.0, 10.0), seed=1
        )
        drop_layers(adata)
        adata.obs["batch"] = pd.Categorical(np.where(np.arange(adata.n_obs) % 4 < 2, "a", "b"))
        SpaPerbModel.setup_anndata(adata, dose_key="dose", batch_key="batch")
        model = SpaPerbModel(adata, **IN_CONTEXT)
        model.train(2, batch_size=16, enable_progress_bar=False)
        model.export(tmp_path / "model.safetensors")
        loaded = SpaPerbModel.load_exported(tmp_path / "model.safetensors")
        query = adata[adata.obs["condition"] == "control"].copy()
        for dose in (1.0, 3.0):
            expected = model.predict_response(query, dose=dose)
            pd.testing.assert_frame_equal(loaded.predict_response(query, dose=dose), expected)

    def test_it_is_there_to_be_looked_at(self, exported):
        with safe_open(exported, framework="numpy") as file:
            content = json.loads(file.metadata()["spaperb"])
            shape = file.get_slice("weights.encoder.mu.weight").get_shape()
        assert content["format"] == saving.FORMAT
        assert shape == [4, 16]

    def test_of_cells_it_holds_components_alone(self, tmp_path):
        adata = small_cells(n_cells=25, n_genes=40)
        model = train_small(adata, objective="in_context")
        model.export(tmp_path / "model.safetensors")
        with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            text = file.metadata()["spaperb"]
        of_cells = {
            name
            for name, shape in shapes.items()
            if len(shape) == 2 and shape[0] >= 25 and "weights" not in name
        }
        components = {name for name in of_cells if ".populations.cells." in name}
        assert [shapes[name] for name in components] == 3 * [[25, 30]]
        # The components' own; all else is of contexts.
        assert [shapes[name] for name in of_cells - components] == [[30, 40]]
        assert not [name for name in adata.obs_names if f'"{name}"' in text]

    def test_others_may_read_it_as_any_file(self, exported, tmp_path):
        (tmp_path / "any").touch()
        assert exported.stat().st_mode == (tmp_path / "any").stat().st_mode

    def test_a_file_that_is_there_is_kept_unless_told(self, trained, copy):
        before = copy.read_bytes()
        with pytest.raises(FileExistsError, match="exists; pass overwrite=True to replace it"):
            trained.export(copy)
        assert copy.read_bytes() == before
        trained.export(copy, overwrite=True)
        assert os.listdir(copy.parent) == [copy.name]

    def test_what_a_file_cannot_hold_is_named(self, trained, tmp_path, monkeypatch):
        monkeypatch.setattr(trained, "own_", {"when": pd.Timestamp("2026-01-01")}, raising=False)
        for write in (trained.export, trained.save):
            with pytest.raises(TypeError, match=r"own_\.when is a Timestamp"):
                write(tmp_path / "model")
        assert not os.listdir(tmp_path)

    def test_names_of_arrays_do_not_meet(self, trained, tmp_path, monkeypatch):
        own = {"a.b": np.zeros(2), "a": {"b": np.ones(2)}, "array": "10x"}
        monkeypatch.setattr(trained, "own_", own, raising=False)
        trained.export(tmp_path / "model")
        found = SpaPerbModel.load_exported(tmp_path / "model").own_
        np.testing.assert_array_equal(found["a.b"], 0)
        np.testing.assert_array_equal(found["a"]["b"], 1)
        assert found["array"] == "10x"

    def test_keys_are_text(self, trained, tmp_path, monkeypatch):
        monkeypatch.setattr(trained, "own_", {0: "B cell"}, raising=False)
        for write in (trained.export, trained.save):
            with pytest.raises(TypeError, match="own_ has the key 0"):
                write(tmp_path / "model")


class TestLoadExported:
    def test_no_pickle_is_read(self, exported, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("unpickled")

        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, name, refuse)
        monkeypatch.setattr(torch, "load", refuse)
        assert SpaPerbModel.load_exported(exported).is_trained

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            SpaPerbModel.load_exported(tmp_path / "absent.safetensors")

    def test_a_flipped_byte_anywhere_is_refused(self, copy):
        content = copy.read_bytes()
        rng = np.random.default_rng(0)
        for place in rng.choice(len(content), 60, replace=False):
            torn = bytearray(content)
            torn[place] ^= 0x11
            copy.write_bytes(bytes(torn))
            with pytest.raises(ValueError, match="could not be read as an exported model"):
                SpaPerbModel.load_exported(copy)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_truncated(self, copy, share):
        content = copy.read_bytes()
        copy.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match="truncated or damaged"):
            SpaPerbModel.load_exported(copy)

    def test_a_header_as_long_as_it_likes_to_be(self, copy):
        copy.write_bytes(struct.pack("<Q", 2**62) + copy.read_bytes()[8:])
        with pytest.raises(ValueError, match="could not be read"):
            SpaPerbModel.load_exported(copy)

    def test_sizes_that_the_weights_do_not_have_take_no_memory(self, copy):
        def grow(content, tensors):
            settings = content["init_params"]["kwargs"]["module_kwargs"]
            assert settings["n_hidden"] == 16
            settings["n_hidden"] = 40000000

        rewrite(copy, grow)
        with pytest.raises(ValueError, match="size mismatch"):
            SpaPerbModel.load_exported(copy)

    def test_a_tensor_that_is_missing(self, copy):
        rewrite(copy, lambda content, tensors: tensors.pop("weights.encoder.mu.weight"))
        with pytest.raises(ValueError, match=r"encoder\.mu\.weight"):
            SpaPerbModel.load_exported(copy)

    def test_a_later_format(self, copy):
        rewrite(copy, lambda content, tensors: content.update(format=2, version="9.1.0"))
        with pytest.raises(
            ValueError, match=r"format 2, written by spaperb 9\.1\.0.*newer spaperb"
        ):
            SpaPerbModel.load_exported(copy)

    def test_another_class(self, copy):
        def rename(content, tensors):
            text = json.dumps(content["registry"]).replace('"SpaPerbModel"', '"SCVI"')
            content["registry"] = json.loads(text)

        rewrite(copy, rename)
        with pytest.raises(ValueError, match="holds a SCVI"):
            SpaPerbModel.load_exported(copy)

    @pytest.mark.parametrize(
        "state",
        [
            {"exec": "import os"},
            {"scale": {"counts": True}},
            {"array": "absent"},
            [],
            None,
        ],
    )
    def test_what_no_model_says(self, copy, state):
        rewrite(copy, lambda content, tensors: content.update(state=state))
        with pytest.raises(ValueError, match=r"could not be read|does not describe"):
            SpaPerbModel.load_exported(copy)

    def test_methods_are_not_replaced(self, copy):
        def add(content, tensors):
            content["attributes"].update(dict.fromkeys(["__class__", "module", "train"], "x"))

        rewrite(copy, add)
        model = SpaPerbModel.load_exported(copy)
        assert type(model) is SpaPerbModel
        assert callable(model.train)
        assert isinstance(model.module, torch.nn.Module)

    def test_nested_deeper_than_python_reads(self, copy):
        rewrite(copy, lambda content, tensors: None)
        with safe_open(copy, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        text = '{"format": 1, "version": "", "attributes": ' + "[" * 100_000 + "]" * 100_000 + "}"
        save_file(tensors, copy, {"spaperb": text, "sha256": saving._checksum(text, tensors)})
        with pytest.raises(ValueError, match="could not be read"):
            SpaPerbModel.load_exported(copy)

    def test_another_safetensors_file(self, tmp_path):
        save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="could not be read as an exported model"):
            SpaPerbModel.load_exported(tmp_path / "other.safetensors")


def values(tree):
    """All that a nested value is made of."""
    yield tree
    if isinstance(tree, dict):
        tree = [*tree, *tree.values()]
    for value in tree if isinstance(tree, list | tuple) else ():
        yield from values(value)


def assert_same(tree, other):
    """Check that two nested values have the same types and values."""
    for value, same in zip(values(tree), values(other), strict=True):
        assert type(value) is type(same)
        if isinstance(value, np.ndarray):
            assert value.dtype == same.dtype
            np.testing.assert_array_equal(value, same)
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, same, rtol=0, atol=0, equal_nan=True)
        elif not isinstance(value, dict | list | tuple):
            assert value == same or value != value


class TestSave:
    @pytest.fixture
    def model(self):
        """A model with arrays, tables, tuples and numbers of every kind in its attributes."""
        adata = datasets.simulated(n_cell_types=4, n_cells=30, n_genes=30, doses=(0.1, 1.0))
        drop_layers(adata)
        adata.obs["batch"] = np.arange(adata.n_obs) % 2
        # What pandas makes of text by itself from its third version on, with pyarrow.
        adata.obs["cell_type"] = adata.obs["cell_type"].astype("string[python]")
        SpaPerbModel.setup_anndata(adata, dose_key="dose", batch_key="batch", control="control")
        model = SpaPerbModel(adata, **IN_CONTEXT)
        model.train(2, batch_size=16, train_size=0.6, validation_size=0.2, **QUIET)
        return model

    def test_pytorch_alone_finds_nothing_to_call(self, model, tmp_path):
        model.save(tmp_path / "model")
        file = tmp_path / "model" / "model.pt"
        assert not torch.serialization.get_unsafe_globals_in_checkpoint(file)
        content = torch.load(file, weights_only=True)
        assert content["var_names"] == list(model.adata.var_names)
        kinds = {type(value) for value in values({**content, "model_state_dict": None})}
        assert kinds == {dict, list, str, int, float, bool, type(None), torch.Tensor}

    def test_everything_comes_back_as_it_was(self, model, tmp_path):
        model.save(tmp_path / "model")
        for adata in (False, model.adata):
            loaded = SpaPerbModel.load(tmp_path / "model", adata)
            saved = filter(saving.is_saved, vars(model))
            for name in set(saved) - {"registry_", "history_"}:
                assert_same(getattr(loaded, name), getattr(model, name))
            assert loaded.history.keys() == model.history.keys()
            for name, of_epochs in model.history.items():
                pd.testing.assert_frame_equal(loaded.history[name], of_epochs, check_dtype=False)
            assert loaded.perturbations == model.perturbations
            assert list(loaded.get_var_names()) == list(model.get_var_names())
            expected = model.predict_response(model.adata, dose=0.5)
            pd.testing.assert_frame_equal(loaded.predict_response(model.adata, dose=0.5), expected)

    def test_a_later_format(self, model, tmp_path):
        model.save(tmp_path / "model")
        file = tmp_path / "model" / "model.pt"
        content = torch.load(file, weights_only=True)
        content["attr_dict"][saving.CONTENT]["format"] = 99
        torch.save(content, file)
        with pytest.raises(ValueError, match="another format than 1"):
            SpaPerbModel.load(tmp_path / "model", adata=False)
        del content["attr_dict"]
        torch.save(content, file)
        with pytest.raises(ValueError, match="holds no model"):
            SpaPerbModel.load(tmp_path / "model", adata=False)

    def test_saved_with_cells_whose_x_is_empty(self, tmp_path):
        adata = datasets.simulated(n_cell_types=3, n_cells=20, n_genes=20)
        drop_layers(adata)
        adata.layers["log"] = adata.X.copy()
        SpaPerbModel.setup_anndata(adata, layer="log")
        model = SpaPerbModel(adata, **IN_CONTEXT)
        model.train(1, **QUIET)
        adata.X = sparse.csr_matrix(adata.shape)
        model.save(tmp_path / "model", save_anndata=True)
        with pytest.raises(ValueError, match="nothing but zeros"):
            SpaPerbModel.load(tmp_path / "model")

    def test_saving_changes_nothing(self, model, tmp_path):
        before = dict(vars(model))
        model.save(tmp_path / "model")
        assert vars(model).keys() == before.keys()
        assert all(vars(model)[name] is value for name, value in before.items())

    def test_scvi_tools_reads_the_set_up(self, model, tmp_path, capsys):
        model.save(tmp_path / "model")
        BaseModelClass.view_setup_args(str(tmp_path / "model"))
        assert "dose_key" in capsys.readouterr().out

    def test_loaded_models_are_saved_again(self, model, tmp_path):
        model.save(tmp_path / "first")
        SpaPerbModel.load(tmp_path / "first", adata=False).save(tmp_path / "second")
        assert_same(
            *(
                torch.load(tmp_path / name / "model.pt", weights_only=True)
                for name in ("first", "second")
            )
        )


class TestGenesOfLoadedCells:
    """The networks know genes by their place."""

    def refused(self, path, adata, found):
        with (
            pytest.warns(
                UserWarning, match="var_names"
            ),  # scvi-tools', which goes on all the same
            pytest.raises(ValueError, match=f"genes of the AnnData are not those.*{found}"),
        ):
            SpaPerbModel.load(path, adata)

    def test_another_order(self, trained, tmp_path):
        trained.save(tmp_path / "model")
        adata = small_cells()[:, ::-1].copy()
        before = snapshot(adata)
        self.refused(tmp_path / "model", adata, "their order differs")
        assert snapshot(adata) == before
        names = SpaPerbModel.load(tmp_path / "model", adata=False).get_var_names()
        loaded = SpaPerbModel.load(tmp_path / "model", adata[:, names].copy())
        expected = trained.predict_stimulated(small_cells(), inplace=False)
        np.testing.assert_array_equal(loaded.predict_stimulated(inplace=False), expected)
        np.testing.assert_array_equal(
            loaded.predict_stimulated(adata, inplace=False), expected[:, ::-1]
        )

    def test_as_many_others(self, trained, tmp_path):
        trained.save(tmp_path / "model")
        adata = small_cells()
        adata.var_names = [*adata.var_names[:-1], "other"]
        self.refused(tmp_path / "model", adata, "missing are: gene_29")

    def test_more(self, trained, tmp_path):
        trained.save(tmp_path / "model")
        self.refused(tmp_path / "model", small_cells(n_genes=32), "it has 2 more")

    def test_given_after_loading(self, trained, tmp_path):
        trained.save(tmp_path / "model")
        loaded = SpaPerbModel.load(tmp_path / "model", adata=False)
        with pytest.raises(ValueError, match="their order differs"):
            loaded.get_elbo(small_cells()[:, ::-1].copy())


class TestPickles:
    @pytest.mark.parametrize("place", ["attr_dict", "var_names", "model_state_dict"])
    def test_a_trap_is_refused_and_does_not_go_off(self, trained, tmp_path, place):
        trained.save(tmp_path / "model")
        file = tmp_path / "model" / "model.pt"
        content = torch.load(file, weights_only=False)
        mark = tmp_path / "mark"
        content[place] = (
            {**content[place], "x_": Trap(mark)} if place != "var_names" else Trap(mark)
        )
        torch.save(content, file)
        with pytest.raises(ValueError, match=r"holds more than data.*mkdir"):
            SpaPerbModel.load(tmp_path / "model", adata=False)
        assert not mark.exists()
        with pytest.raises(FileExistsError):  # the trap works: what loads it blindly runs it
            mark.mkdir() or torch.load(file, weights_only=False)

    def test_a_trap_that_is_a_bare_pickle(self, tmp_path):
        mark = tmp_path / "mark"
        (tmp_path / "model.pt").write_bytes(pickle.dumps(Trap(mark)))
        with pytest.raises(ValueError, match="could not be read"):
            SpaPerbModel.load(tmp_path, adata=False)
        assert not mark.exists()

    def test_a_flipped_byte_of_a_weight(self, trained, tmp_path):
        trained.save(tmp_path / "model")
        file = tmp_path / "model" / "model.pt"
        flip_byte_of_weight(file, trained)
        with pytest.raises(ValueError, match=r"could not be read: .* is not what was written"):
            SpaPerbModel.load(tmp_path / "model", adata=False)

    def test_the_registry_alone_is_looked_through_too(self, trained, tmp_path):
        trained.save(tmp_path / "model")
        file = tmp_path / "model" / "model.pt"
        content = torch.load(file, weights_only=False)
        content["attr_dict"]["x_"] = Trap(tmp_path / "mark")
        torch.save(content, file)
        with pytest.raises(ValueError, match="holds more than data"):
            SpaPerbModel.load_registry(str(tmp_path / "model"))
        assert not (tmp_path / "mark").exists()

    def test_nothing_is_fetched_to_be_unpickled(self, tmp_path):
        with pytest.raises(ValueError, match="Download it"):
            SpaPerbModel.load(tmp_path / "model", adata=False, backup_url="https://example.org")

    def test_categories_of_every_kind_load(self, tmp_path):
        for cell_types in (["a", "b", "c"], [1, 2, 3], [0.5, 1.5, 2.5], [True, False, True]):
            adata = small_cells()
            codes = adata.obs["cell_type"].cat.codes.to_numpy()
            adata.obs["cell_type"] = pd.Series(cell_types)[codes].to_numpy()
            model = train_small(adata, objective="in_context")
            model.save(tmp_path / "model", overwrite=True)
            loaded = SpaPerbModel.load(tmp_path / "model", adata=False)
            expected = model.predict_stimulated(adata, inplace=False)
            assert np.array_equal(loaded.predict_stimulated(adata, inplace=False), expected)


def test_hub_by_a_folder(trained, query, tmp_path):
    """scvi-tools' hub uploads and downloads a folder with the model, metadata and a card."""
    hub = pytest.importorskip("huggingface_hub", reason="scvi-tools' hub needs huggingface_hub")
    from scvi.hub import HubMetadata, HubModel

    here, there = tmp_path / "here", tmp_path / "there"
    trained.save(here)
    of_model = {"anndata_version": ad.__version__, "model_parent_module": "spaperb"}
    metadata = HubMetadata.from_dir(str(here), **of_model)
    card = hub.ModelCard("---\nlicense: bsd-3-clause\n---\nResponse to a stimulus, simulated.")
    HubModel(str(here), metadata=metadata, model_card=card).save(overwrite=True)
    shutil.copytree(here, there)
    downloaded = HubModel(str(there))
    downloaded.load_model(adata=trained.adata)
    assert isinstance(downloaded.model, SpaPerbModel)
    expected = trained.predict_stimulated(query, inplace=False)
    assert np.array_equal(downloaded.model.predict_stimulated(query, inplace=False), expected)


def test_cells_that_have_sparse_components_can_be_saved(tmp_path):
    """From some size on components are ARPACK's, whose rows come in reverse."""
    cells = small_cells(n_cell_types=3, n_cells=400, n_genes=900)
    SpaPerbModel.setup_anndata(cells)
    model = SpaPerbModel(cells)
    model.train(max_epochs=0, **QUIET)
    expected = model.predict_stimulated(cells[:20], inplace=False)
    model.save(tmp_path / "model")
    model.export(tmp_path / "model.safetensors")
    for loaded in (
        SpaPerbModel.load(tmp_path / "model"),
        SpaPerbModel.load_exported(tmp_path / "model.safetensors"),
    ):
        np.testing.assert_array_equal(
            loaded.predict_stimulated(cells[:20], inplace=False), expected
        )
