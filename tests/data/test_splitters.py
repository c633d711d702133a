import numpy as np
import pytest
import scvi
import torch
from helpers import small_cells

from spaperb import SpaPerbModel
from spaperb._types import CONTROL, NEITHER, STIMULATED
from spaperb.data._pairs import Stratum
from spaperb.data._registry import condition_arms, stratum_labels
from spaperb.data._splitters import PairedBatchSampler, PairedDataSplitter, stratified_split


def strata(*sizes: tuple[int, int]) -> list[Stratum]:
    start, result = 0, []
    for n_control, n_stimulated in sizes:
        middle, end = start + n_control, start + n_control + n_stimulated
        result.append(Stratum(np.arange(start, middle), np.arange(middle, end)))
        start = end
    return result


def splitter(adata, **kwargs) -> PairedDataSplitter:
    model = SpaPerbModel(adata, objective="published", n_latent=2, n_hidden=4)
    result = PairedDataSplitter(model.adata_manager, **kwargs)
    result.setup()
    return result


@pytest.fixture
def registered(adata):
    SpaPerbModel.setup_anndata(adata)
    return adata


class TestSampler:
    def test_minibatches_are_flat_and_in_pair_order(self):
        sampler = PairedBatchSampler(strata((5, 8), (9, 3)), 4, seed=0)
        label = np.repeat([0, 0, 1, 1], [5, 8, 9, 3])
        is_control = np.repeat([True, False, True, False], [5, 8, 9, 3])
        batches = list(sampler)
        assert len(batches) == len(sampler)
        for batch in batches:
            control, stimulated = np.split(batch, 2)
            assert is_control[control].all()
            assert not is_control[stimulated].any()
            assert (label[control] == label[stimulated]).all()
        assert sum(map(len, batches)) == 2 * (8 + 9)

    @pytest.mark.parametrize("n_pairs", range(2, 30))
    @pytest.mark.parametrize("batch_size", [2, 3, 8])
    def test_no_minibatch_has_a_single_pair(self, n_pairs, batch_size):
        sizes = [
            len(batch) // 2 for batch in PairedBatchSampler(strata((n_pairs, 1)), batch_size, 0)
        ]
        assert sum(sizes) == n_pairs
        assert min(sizes) >= 2
        assert max(sizes) <= batch_size + 1

    def test_epochs_differ_and_repeat_from_the_seed(self):
        def epochs(seed, n=3):
            sampler = PairedBatchSampler(strata((20, 20)), 8, seed)
            return [np.concatenate(list(sampler)).tolist() for _ in range(n)]

        first = epochs(0)
        assert first[0] != first[1] != first[2]
        assert first == epochs(0)
        assert first != epochs(1)

    def test_an_epoch_can_be_chosen(self):
        sampler = PairedBatchSampler(strata((20, 20)), 8, 0)
        passes = [np.concatenate(list(sampler)) for _ in range(3)]
        sampler.set_epoch(1)
        assert np.array_equal(np.concatenate(list(sampler)), passes[1])

    def test_fixed_pairs_stay(self):
        sampler = PairedBatchSampler(strata((20, 20)), 8, 0, fixed=True)
        first = np.concatenate(list(sampler))
        sampler.set_epoch(7)
        assert np.array_equal(first, np.concatenate(list(sampler)))


class TestSplit:
    def test_parts_are_stratified_and_cover_all_cells(self):
        labels = np.repeat([0, 1, 2], [100, 10, 1])
        parts = stratified_split(labels, 0.8, 0.1, np.random.default_rng(0))
        assert sorted(np.concatenate(parts)) == list(range(111))
        sizes = [[int((labels[part] == label).sum()) for part in parts] for label in (0, 1, 2)]
        assert sizes == [[80, 10, 10], [8, 1, 1], [1, 0, 0]]

    def test_many_small_labels_give_their_share(self):
        labels = np.repeat(np.arange(100), 4)
        train, val, test = stratified_split(labels, 0.9, None, np.random.default_rng(0))
        assert len(val) == pytest.approx(40, abs=2)
        assert len(test) == 0
        assert len(np.unique(labels[train])) == 100

    def test_in_order_without_shuffling(self):
        train, val, test = stratified_split(np.zeros(10), 0.6, 0.2, None)
        assert (train.tolist(), val.tolist(), test.tolist()) == (
            [0, 1, 2, 3, 4, 5],
            [6, 7],
            [8, 9],
        )

    @pytest.mark.parametrize(
        ("train", "validation"), [(0.0, None), (1.1, None), (0.9, 0.2), (0.5, -0.1)]
    )
    def test_impossible_fractions_are_refused(self, train, validation):
        with pytest.raises(ValueError, match="`train_size` must be in"):
            stratified_split(np.zeros(10), train, validation, None)


class TestArms:
    def test_all_others_are_stimulated_by_default(self, registered):
        arms = condition_arms(SpaPerbModel(registered).adata_manager)
        expected = np.where(registered.obs["condition"] == "control", CONTROL, STIMULATED)
        assert np.array_equal(arms, expected)

    def test_other_conditions_take_no_part(self, adata):
        adata.obs["condition"] = ["control", "stimulated", "other"] * (adata.n_obs // 3)
        SpaPerbModel.setup_anndata(adata, stimulated="stimulated")
        arms = condition_arms(SpaPerbModel(adata).adata_manager)
        assert arms[:3].tolist() == [CONTROL, STIMULATED, NEITHER]

    def test_numeric_conditions(self, adata):
        adata.obs["condition"] = (adata.obs["condition"] == "stimulated").astype(int)
        SpaPerbModel.setup_anndata(adata, control=0, stimulated=1)
        arms = condition_arms(SpaPerbModel(adata).adata_manager)
        assert np.array_equal(arms, adata.obs["condition"])

    def test_strata_are_types_within_batches(self, adata):
        SpaPerbModel.setup_anndata(adata, batch_key="donor")
        labels = stratum_labels(SpaPerbModel(adata).adata_manager)
        columns = adata.obs["cell_type"].astype(str) + adata.obs["donor"].astype(str)
        assert len(np.unique(labels)) == columns.nunique()
        assert len(set(zip(labels, columns, strict=True))) == columns.nunique()


class TestSplitter:
    def test_minibatches_carry_the_registered_rows_in_pair_order(self, registered):
        loader = splitter(registered, batch_size=16).train_dataloader()
        x = registered.X.toarray()
        for indices, batch in zip(iter(loader.sampler), self.epoch(loader, 0), strict=True):
            assert batch["X"].shape == (len(indices), registered.n_vars)
            np.testing.assert_array_equal(batch["X"].numpy(), x[indices])
            control, stimulated = batch["labels"].chunk(2)
            assert torch.equal(control, stimulated)

    @staticmethod
    def epoch(loader, number):
        loader.sampler.set_epoch(number)
        batches = list(loader)
        loader.sampler.set_epoch(number)
        return batches

    def test_parts_do_not_overlap_and_keep_every_type_and_condition(self, registered):
        s = splitter(registered, train_size=0.6, validation_size=0.2)
        groups = registered.obs["cell_type"].astype(str) + registered.obs["condition"].astype(str)
        assert sorted(np.concatenate([s.train_idx, s.val_idx, s.test_idx])) == list(
            range(registered.n_obs)
        )
        for part, n in ((s.train_idx, 12), (s.val_idx, 4), (s.test_idx, 4)):
            assert (groups.iloc[part].value_counts() == n).all()
        assert (s.n_train, s.n_val) == (72, 24)
        assert len(list(s.test_dataloader())) == 1

    def test_split_follows_the_seed(self, registered):
        def train_cells(seed):
            scvi.settings.seed = seed
            return splitter(registered).train_idx.tolist()

        assert train_cells(0) == train_cells(0)
        assert train_cells(0) != train_cells(1)

    def test_validation_pairs_are_fixed_and_training_pairs_fresh(self, registered):
        s = splitter(registered, train_size=0.6)
        val, train = s.val_dataloader(), s.train_dataloader()
        twice = [torch.cat([b["X"] for b in loader]) for loader in (val, val, train, train)]
        assert torch.equal(twice[0], twice[1])
        assert not torch.equal(twice[2], twice[3])

    def test_without_a_seed_each_splitter_has_its_own(self, registered):
        scvi.settings.seed = None
        seeds = {splitter(registered).seed for _ in range(3)}
        assert len(seeds) == 3

    def test_external_indexing_is_used(self, registered):
        everything = np.arange(registered.n_obs)
        parts = [everything[::2], everything[1::2], np.array([], dtype=int)]
        s = splitter(registered, external_indexing=parts)
        assert np.array_equal(s.train_idx, parts[0])
        assert s.test_dataloader() is None

    def test_sparse_rows_can_be_loaded_as_sparse_tensors(self, registered):
        s = splitter(registered, load_sparse_tensor=True)
        batch = next(iter(s.train_dataloader()))
        assert batch["X"].layout is torch.sparse_csr
        assert s.on_after_batch_transfer(batch, 0)["X"].layout is torch.strided

    def test_loader_workers_give_the_same_minibatches(self, registered):
        alone, helped = (
            list(splitter(registered, num_workers=n).train_dataloader()) for n in (0, 2)
        )
        for a, b in zip(alone, helped, strict=True):
            assert torch.equal(a["X"], b["X"])

    def test_a_type_in_one_arm_only_is_named_once(self, adata):
        hidden = (adata.obs["cell_type"] == "type_1") & (adata.obs["condition"] == "stimulated")
        adata = adata[~hidden].copy()
        SpaPerbModel.setup_anndata(adata)
        with pytest.warns(UserWarning, match="take no part in training: type_1") as record:
            splitter(adata)
        assert len(record) == 1

    def test_minibatches_of_one_pair_are_refused(self, registered):
        with pytest.raises(ValueError, match="`batch_size` counts pairs and must be at least 2"):
            splitter(registered, batch_size=1)

    def test_too_few_pairs_are_refused(self):
        adata = small_cells(n_cell_types=1, n_cells=1)
        with pytest.warns(UserWarning, match="fewer than 3 cells"):
            SpaPerbModel.setup_anndata(adata)
        with pytest.raises(ValueError, match="training cells give 1 pairs"):
            splitter(adata)
