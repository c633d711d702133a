"""Files of pretrained networks: read as written, or refused with a clear error."""

import csv
import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_cells
from safetensors import safe_open
from safetensors.torch import save

from spaperb import SpaPerbModel
from spaperb.nn import (
    Constants,
    InContextNetwork,
    _weights,
    data_sets_of,
    read_weights,
    shipped_weights,
    write_weights,
)

ROOT = Path(__file__).parents[2]
PRETRAINING = ROOT / "pretraining"
JUDGED = ROOT / "benchmarks" / "accuracy" / "common.py"
in_repository = pytest.mark.skipif(
    not (PRETRAINING / "data_sets.csv").exists() or not JUDGED.exists(),
    reason="pretraining/ and benchmarks/ are in the repository, not in a wheel",
)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    networks = [InContextNetwork(Constants.none(), 4, 8) for _ in range(2)]
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
            network.of_state.mean += 0.1
    return networks


@pytest.fixture
def path(networks, tmp_path):
    path = tmp_path / "weights.safetensors"
    write_weights(networks, path, ["one", "two"])
    return path


def rewritten(path, tensors=None, without=None, **content):
    """Change what a file says, with the checksum that belongs to it."""
    with safe_open(path, framework="pt") as file:
        content = {**json.loads(file.metadata()["spaperb"]), **content}
        text = json.dumps({name: said for name, said in content.items() if name != without})
        if tensors is None:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    path.write_bytes(save(tensors, {"spaperb": text, "sha256": _weights._checksum(text, tensors)}))


class TestFile:
    def test_read_as_written_to_the_last_bit(self, networks, path):
        again = read_weights(path)
        assert len(again) == 2
        for mine, theirs in zip(networks, again, strict=True):
            assert (theirs.n_latent, theirs.n_hidden, theirs.training) == (4, 8, False)
            assert mine.state_dict().keys() == theirs.state_dict().keys()
            for name, tensor in mine.state_dict().items():
                assert torch.equal(tensor, theirs.state_dict()[name]), name
        assert data_sets_of(path) == ["one", "two"]

    def test_the_same_networks_give_the_same_bytes(self, networks, path, tmp_path):
        write_weights(networks, tmp_path / "again", ["one", "two"])
        assert (tmp_path / "again").read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5, 0.99])
    def test_a_damaged_byte(self, path, share):
        content = bytearray(path.read_bytes())
        content[int(share * len(content))] ^= 0x01
        path.write_bytes(content)
        with pytest.raises(ValueError, match="could not be read as pretrained weights"):
            read_weights(path)

    def test_a_damaged_weight(self, networks, path):
        content = bytearray(path.read_bytes())
        weight = networks[1].encoder[0].weight.detach().numpy().tobytes()
        content[content.index(weight)] ^= 0x01
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checksum is not that of its content"):
            read_weights(path)

    @pytest.mark.parametrize("n", [0, 4, 100, -1])
    def test_truncated(self, path, n):
        path.write_bytes(path.read_bytes()[:n])
        with pytest.raises(ValueError, match="truncated or damaged, copy it again"):
            read_weights(path)

    def test_no_such_file_at_all(self, tmp_path):
        for nothing in (tmp_path / "none", tmp_path):
            with pytest.raises(FileNotFoundError, match=r"There is no file .*pretrained=True"):
                read_weights(nothing)

    def test_other_kinds_of_files(self, path, tmp_path):
        path.write_text("not weights")
        with pytest.raises(ValueError, match="could not be read"):
            read_weights(path)
        path.write_bytes(save({"x": torch.zeros(2)}))
        with pytest.raises(ValueError, match="could not be read"):
            read_weights(path)

    def test_a_later_format(self, path):
        rewritten(path, format=_weights.FORMAT + 1)
        with pytest.raises(ValueError, match="of format 2; a newer spaperb reads it"):
            read_weights(path)

    @pytest.mark.parametrize("kind", ["state", "evidence", "relations"])
    def test_other_inputs(self, path, kind):
        others = {**_weights.INPUTS, kind: _weights.INPUTS[kind][::-1]}
        rewritten(path, inputs=others)
        with pytest.raises(ValueError, match="other inputs, of another version of spaperb"):
            read_weights(path)

    @pytest.mark.parametrize("wrong", [{"n_networks": 3}, {"n_latent": 5}, {"n_hidden": "8"}])
    def test_sizes_that_are_not_those_of_its_weights(self, path, wrong):
        rewritten(path, **wrong)
        with pytest.raises(ValueError, match="does not hold the weights that it says"):
            read_weights(path)

    @pytest.mark.parametrize("name", sorted(_weights.SAID))
    def test_a_file_that_does_not_say_all(self, path, name):
        rewritten(path, without=name)
        for read in (read_weights, data_sets_of):
            with pytest.raises(ValueError, match=rf"could not be read .*\b{name}\b"):
                read(path)

    @pytest.mark.parametrize("n_networks", [0, -1])
    def test_no_network(self, path, n_networks):
        rewritten(path, n_networks=n_networks)
        with pytest.raises(ValueError, match="holds no network"):
            read_weights(path)

    def test_a_file_without_a_weight(self, networks, path):
        tensors = dict(networks[0].state_dict().items())
        rewritten(path, {f"0.{name}": t for name, t in list(tensors.items())[1:]}, n_networks=1)
        with pytest.raises(ValueError, match="does not hold the weights that it says"):
            read_weights(path)


class TestModel:
    @pytest.fixture
    def adata(self):
        adata = small_cells()
        SpaPerbModel.setup_anndata(adata)
        return adata

    @pytest.mark.parametrize("sizes", [{"n_hidden": 64}, {"n_latent": 3}, {"n_networks": 5}])
    def test_other_sizes_than_those_of_the_file(self, adata, sizes):
        with pytest.raises(ValueError, match=r"other sizes.*pretrained=False"):
            SpaPerbModel(adata, **sizes)
        SpaPerbModel(adata, pretrained=False, **sizes)

    @pytest.mark.parametrize("pretrained", [None, 1, b"weights"])
    def test_no_file_and_no_choice(self, adata, pretrained):
        with pytest.raises(TypeError, match=r"`pretrained` must be True .*; it is"):
            SpaPerbModel(adata, pretrained=pretrained)

    def test_the_published_objective_has_none(self, adata, path):
        with pytest.raises(ValueError, match="takes no file of `pretrained` weights"):
            SpaPerbModel(adata, objective="published", pretrained=path)

    def test_a_file_of_ones_own(self, adata, networks, path):
        for given in (path, str(path)):
            model = SpaPerbModel(adata, pretrained=given, n_hidden=8)
            assert len(model.module.networks) == 2
            for mine, theirs in zip(model.module.pretrained, networks, strict=True):
                assert torch.equal(mine.encoder[0].weight, theirs.encoder[0].weight)

    @pytest.mark.parametrize("with_data", [True, False])
    def test_a_saved_model_needs_the_file_no_more(self, adata, path, tmp_path, with_data):
        model = SpaPerbModel(adata, pretrained=path)
        model.train(0, enable_progress_bar=False, accelerator="cpu")
        model.save(tmp_path / "model")
        path.unlink()
        loaded = SpaPerbModel.load(tmp_path / "model", adata if with_data else False)
        np.testing.assert_array_equal(
            loaded.predict_stimulated(adata, inplace=False),
            model.predict_stimulated(adata, inplace=False),
        )

    def test_wrong_files(self, adata, path):
        for none in (path.parent / "none.safetensors", "saved"):
            with pytest.raises(FileNotFoundError, match="There is no file"):
                SpaPerbModel(adata, pretrained=none)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match="could not be read as pretrained weights"):
            SpaPerbModel(adata, pretrained=path)


def names():
    with (PRETRAINING / "data_sets.csv").open() as file:
        return [row["name"] for row in csv.DictReader(file)]


def judged():
    """Load the module that picks weights for a benchmark."""
    spec = importlib.util.spec_from_file_location("judged", JUDGED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_shipped_file_is_small_and_reads():
    assert shipped_weights().stat().st_size < 1_000_000
    networks = read_weights(shipped_weights())
    assert all(bool((network.of_state.deviation != 1).any()) for network in networks)
    for network in networks:
        assert all(bool(torch.isfinite(t).all()) for t in network.state_dict().values())


@in_repository
class TestWhatTheySaw:
    def test_the_shipped_file_saw_all(self):
        assert len(names()) > 1
        assert set(data_sets_of(shipped_weights())) == set(names())

    def test_the_others_saw_all_but_one(self):
        files = sorted((PRETRAINING / "weights").iterdir())
        assert [f.name for f in files] == sorted(f"without_{n}.safetensors" for n in names())
        for name in names():
            path = PRETRAINING / "weights" / f"without_{name}.safetensors"
            assert set(data_sets_of(path)) == set(names()) - {name}
            assert len(read_weights(path)) == len(read_weights(shipped_weights()))

    def test_they_are_not_the_same_weights(self):
        files = [shipped_weights(), *(PRETRAINING / "weights").iterdir()]
        firsts = [read_weights(f)[0].state_dict()["encoder.0.weight"].numpy() for f in files]
        assert len({first.tobytes() for first in firsts}) == len(files)
        np.testing.assert_equal({first.shape for first in firsts}, {firsts[0].shape})

    def test_benchmarks_take_those_that_never_saw_the_set(self, networks, tmp_path):
        module = judged()
        for name in names():
            path = module.without(name)
            assert path == PRETRAINING / "weights" / f"without_{name}.safetensors"
            assert name not in data_sets_of(path)
        module.WEIGHTS = tmp_path
        write_weights(networks, tmp_path / "without_one.safetensors", ["one", "two"])
        with pytest.raises(ValueError, match="were trained on one"):
            module.without("one")
        with pytest.raises(FileNotFoundError):
            module.without("three")


def test_the_log_tells_of_the_committed_files():
    """Each file of weights is the one whose training is logged, and each has its line."""
    root = Path(__file__).parents[2] / "pretraining"
    with (root / "log.csv").open(newline="") as file:
        logged = {row["file"]: row["sha256"] for row in csv.DictReader(file)}
    files = [*(root / "weights").glob("*.safetensors"), shipped_weights()]
    found = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert found == logged
