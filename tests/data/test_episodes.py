"""Minibatches of episodes.

A function of seed, epoch and step, and nothing held out is learned from.
"""

import pickle
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from helpers import small_cells

from spaperb import SpaPerbModel, datasets
from spaperb.data._episodes import (
    Episodes,
    EpisodeSampler,
    EpisodeSplitter,
    HeldOutEpisodes,
    measure,
    stacked,
)
from spaperb.evidence import Evidence, draw, leave_out, make_episode, make_folds

N_TYPES, N_FOLDS = 5, 3


def manager_of(n_cell_types=N_TYPES, names=None):
    adata = small_cells(n_cell_types=n_cell_types)
    if names is not None:
        of_cell = adata.obs["condition"].astype(object).to_numpy(copy=True)
        stimulated = np.flatnonzero(of_cell == "stimulated")
        of_cell[stimulated] = np.resize(names, len(stimulated))
        adata.obs["condition"] = pd.Categorical(of_cell)
    SpaPerbModel.setup_anndata(adata)
    return SpaPerbModel(adata).adata_manager


def evidence_of(**kwargs):
    manager = manager_of(**kwargs)
    return measure(manager, np.arange(manager.adata.n_obs))


@pytest.fixture(scope="module")
def manager():
    return manager_of()


@pytest.fixture(scope="module")
def evidence(manager):
    return measure(manager, np.arange(manager.adata.n_obs))


def same(a, b):
    return all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


class TestEpisodes:
    def test_seed_epoch_and_step_say_all(self, evidence):
        one, again, other = (Episodes([[evidence]] * 2, 3, 20, seed) for seed in (0, 0, 1))
        first = one[1, 2]
        one[5, 5]
        assert same(first, one[1, 2])
        assert same(first, again[1, 2])
        # As a loader's new process would have it.
        assert same(first, pickle.loads(pickle.dumps(one))[1, 2])
        for batch in (other[1, 2], one[1, 3], one[2, 2], one[2, 1]):
            assert not same(first, batch)

    def test_networks_learn_from_episodes_of_their_own(self, evidence):
        batch = Episodes([[evidence]] * 2, 3, 20, 0)[0, 0]
        assert batch["target"].shape == (2, 3, 20)
        assert not torch.equal(batch["target"][0], batch["target"][1])

    def test_the_first_networks_do_not_depend_on_the_others(self, evidence):
        few, many = (Episodes([[evidence]] * n, 3, 20, 0)[0, 0] for n in (1, 4))
        assert torch.equal(few["target"][0], many["target"][0])

    def test_units_are_of_the_data_set(self, evidence):
        half = evidence.keep(evidence.context < 2)
        batch = Episodes([[evidence, half]], 40, 20, 0)[0, 0]
        units = torch.tensor([evidence.mean_square, half.mean_square]).float()
        assert torch.equal(batch["unit"].unique(), units.unique())

    def test_padding_is_beyond_attention(self, evidence):
        rng = np.random.default_rng(0)
        episodes = [(draw(evidence, rng), 1.0) for _ in range(12)]
        batch = stacked(episodes, 3)
        sizes = [len(e.description.shifts) for e, _ in episodes]
        assert len(set(sizes)) > 1
        is_piece = torch.isfinite(batch["log_prior"])
        assert is_piece.sum(-1).flatten().tolist() == sizes
        for name in ("pieces", "relations", "shifts"):
            assert (batch[name][~is_piece] == 0).all()
        # The order is that of the networks, then of their episodes.
        for i, (episode, _) in enumerate(episodes):
            target = torch.from_numpy(episode.target).float()
            assert torch.equal(batch["target"][i // 4, i % 4], target)


class TestSampler:
    def test_epochs_follow_each_other(self):
        sampler = EpisodeSampler(2)
        assert [*sampler, *sampler] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        sampler.set_epoch(7)
        assert list(sampler) == [(7, 0), (7, 1)]
        assert len(sampler) == 2

    def test_validation_is_the_same_each_time(self):
        sampler = EpisodeSampler(2, fixed=True)
        sampler.set_epoch(3)
        assert [*sampler, *sampler] == [(0, 0), (0, 1)] * 2


class TestFolds:
    @pytest.mark.parametrize("names", [None, ["A", "B"]])
    def test_nothing_held_out_is_learned_from(self, names):
        """Neither the whole change, nor its thirds."""
        evidence = evidence_of(names=names)
        changes, whole = evidence.changes, evidence.whole
        folds = make_folds(evidence, N_FOLDS)
        assert len(folds) == N_FOLDS
        # Thirds of the context are there, so they are what could leak.
        assert len(changes.n) > len(whole)
        held = []
        for fold in folds:
            learned = fold.evidence.changes
            of_learned = set(
                zip(fold.evidence.context.tolist(), learned.perturbation.tolist(), strict=True)
            )
            for plan in fold.held_out:
                k, p = evidence.context[plan.change], changes.perturbation[plan.change]
                assert (k, p) not in of_learned
                if names is None:
                    assert k not in fold.evidence.context
                assert not (learned.shift == changes.shift[plan.change]).all(axis=1).any()
                held.append(plan.change)
            # All else is learned from.
            gone = {(evidence.context[t], changes.perturbation[t]) for t in held_in(fold)}
            assert len(learned.n) == sum(
                (k, p) not in gone
                for k, p in zip(evidence.context, changes.perturbation, strict=True)
            )
        assert sorted(held) == whole.tolist()

    def test_a_held_out_change_is_described_by_what_is_not_its_own(self, evidence):
        for fold in make_folds(evidence, N_FOLDS):
            for plan in fold.held_out:
                assert plan.change not in plan.kept
                assert set(plan.kept) < set(evidence.whole)
                assert plan.query.context == evidence.context[plan.change]

    def test_one_fold_learns_from_a_part_too(self, evidence):
        (fold,) = make_folds(evidence, 1)
        held = {evidence.context[plan.change] for plan in fold.held_out}
        learned = set(fold.evidence.context)
        assert len(held) == 3
        assert len(learned) == 2
        assert not held & learned

    @pytest.mark.parametrize("n_folds", [1, 2, 3])
    def test_of_three_contexts_two_are_learned_from(self, n_folds):
        for fold in make_folds(evidence_of(n_cell_types=3), n_folds):
            assert len(set(fold.evidence.context)) == 2
            assert len(fold.held_out) == 1

    def test_more_folds_than_contexts_begin_again(self, evidence):
        folds = make_folds(evidence, N_TYPES + 2)
        held = [held_in(fold) for fold in folds]
        assert sorted(t for of in held[:N_TYPES] for t in of) == evidence.whole.tolist()
        assert held[N_TYPES:] == held[:2]

    def test_too_few_contexts_are_all_learned_from(self):
        assert make_folds(evidence_of(n_cell_types=2), N_FOLDS) == []
        assert len(make_folds(evidence_of(n_cell_types=3), N_FOLDS)) == N_FOLDS


def held_in(fold):
    return [plan.change for plan in fold.held_out]


@pytest.fixture(scope="module")
def plans(evidence):
    return [*(fold.held_out for fold in make_folds(evidence, N_FOLDS))]


class TestHeldOut:
    def test_weights_are_those_of_the_changes(self, evidence, plans):
        batch = HeldOutEpisodes(evidence, plans, 2, 20, 0).batches[0]
        assert batch["target"].shape == (N_FOLDS, 2, 20)
        n = np.array([evidence.changes.n[plan.target].sum() for plan in plans[0][:2]])
        np.testing.assert_allclose(batch["weight"][0], n / (n + 30), rtol=1e-6)

    def test_each_change_is_there(self, evidence, plans):
        held_out = HeldOutEpisodes(evidence, plans, 2, None, 0)
        for f, of in enumerate(plans):
            seen = torch.cat([batch["target"][f] for batch in held_out.batches])
            for plan in of:
                target = torch.from_numpy(make_episode(evidence, plan).target).float()
                assert (seen == target).all(dim=1).any()

    def test_the_same_each_time(self, evidence, plans):
        one, again = (HeldOutEpisodes(evidence, plans, 2, 20, 0) for _ in range(2))
        assert same(one[0, 0], again[0, 0])
        assert same(one[0, 0], one[3, 0])


class TestSplitter:
    def splitter(self, manager, **kwargs):
        splitter = EpisodeSplitter(manager, batch_size=2, **kwargs)
        progress = SimpleNamespace(current=SimpleNamespace(processed=0))
        fit_loop = SimpleNamespace(max_epochs=9, epoch_progress=progress)
        splitter.trainer = SimpleNamespace(fit_loop=fit_loop, max_epochs=9)
        splitter.setup()
        return splitter

    def test_each_network_learns_from_its_fold(self, manager):
        splitter = self.splitter(manager, n_networks=2)
        sets = splitter.episodes.evidence
        assert [len(of) for of in sets] == [1, 1]
        for of, fold in zip(sets, splitter.folds, strict=True):
            assert of[0][0] is fold.evidence
        assert list(splitter.val_dataloader())

    def test_constants_are_of_its_episodes(self, manager):
        splitter = self.splitter(manager)
        first, again = splitter.constants(), splitter.constants()
        for of_network, others, fold in zip(first, again, splitter.folds, strict=True):
            for (mean, deviation), other in zip(of_network, others, strict=True):
                np.testing.assert_array_equal(mean, other[0])
                np.testing.assert_array_equal(deviation, other[1])
                assert np.isfinite(mean).all()
                assert (deviation >= 0.05).all()
            # Of what it learns from, without what is held out of it.
            rng = np.random.default_rng(0)
            states = [draw(fold.evidence, rng, 512).description.state for _ in range(64)]
            np.testing.assert_allclose(of_network.state[0], np.concatenate(states).mean(axis=0))
        assert not np.allclose(first[0].state[0], first[1].state[0])

    def test_without_folds_pretrained_networks_stay_as_they_are(self):
        with pytest.warns(UserWarning, match="too few to train on"):
            splitter = self.splitter(manager_of(n_cell_types=2), pretrained=True)
        assert splitter.folds == []
        assert splitter.trainer.fit_loop.max_epochs == 0
        assert len(list(splitter.val_dataloader())) == 1

    def test_one_measured_change(self):
        manager = manager_of(n_cell_types=1)
        with pytest.raises(ValueError, match="at least 2, and there is 1"):
            self.splitter(manager)
        with pytest.warns(UserWarning, match="in 1 context"):
            self.splitter(manager, pretrained=True)

    def test_batch_size(self, manager):
        with pytest.raises(ValueError, match="`batch_size` counts episodes"):
            EpisodeSplitter(manager, batch_size=0)

    def test_loaders_give_minibatches_of_each_network(self, manager):
        splitter = self.splitter(manager, n_networks=3)
        batches = list(splitter.train_dataloader())
        assert len(batches) == splitter.n_batches
        for batch in [*batches, *splitter.val_dataloader()]:
            assert {t.shape[:2] for t in batch.values()} == {(3, 2)}

    def test_training_episodes_are_fresh_and_held_out_ones_fixed(self, manager):
        splitter = self.splitter(manager)
        train, held_out = splitter.train_dataloader(), splitter.val_dataloader()
        passes = [list(train), list(train)]
        assert not any(same(*batches) for batches in zip(*passes, strict=True))
        train.sampler.set_epoch(1)
        assert all(same(*batches) for batches in zip(train, passes[1], strict=True))
        assert all(same(*batches) for batches in zip(held_out, held_out, strict=True))

    def test_the_loader_begins_with_the_epoch_that_is_due(self, manager):
        splitter = self.splitter(manager)
        later = splitter.train_dataloader()
        later.sampler.set_epoch(4)
        splitter.trainer.fit_loop.epoch_progress.current.processed = 4
        for batches in zip(later, splitter.train_dataloader(), strict=True):
            assert same(*batches)

    def test_loader_processes_change_nothing(self, manager):
        alone, helped = (
            [list(loader) for loader in (s.train_dataloader(), s.val_dataloader())]
            for s in (self.splitter(manager), self.splitter(manager, num_workers=2))
        )
        for mine, theirs in zip(alone, helped, strict=True):
            assert all(same(*batches) for batches in zip(mine, theirs, strict=True))

    def test_validation_is_of_some_of_many_held_out_changes(self, manager, monkeypatch):
        monkeypatch.setattr("spaperb.data._episodes.MAX_HELD_OUT", 1)
        splitter = self.splitter(manager, n_networks=2)
        (batch,) = splitter.val_dataloader()
        # Two episodes of each network, both of the first change that it does not learn from.
        for f, fold in enumerate(splitter.folds):
            episode = make_episode(splitter.evidence, fold.held_out[0])
            shift = episode.target.astype(np.float32)
            for i in range(2):
                assert set(batch["target"][f, i].tolist()) <= set(shift.tolist())

    def test_all_follows_the_seed(self, manager):
        def first(seed):
            scvi.settings.seed = seed
            return next(iter(self.splitter(manager).train_dataloader()))

        assert same(first(0), first(0))
        assert not same(first(0), first(1))

    def test_a_checkpoint_brings_split_seed_and_measurements(self, manager):
        scvi.settings.seed = 1
        saved = self.splitter(manager, train_size=0.5, validation_size=0.25)
        scvi.settings.seed = 2
        restored = self.splitter(manager, train_size=0.5, validation_size=0.25)
        assert not same(restored.episodes[0, 0], saved.episodes[0, 0])
        restored.load_state_dict(saved.state_dict())
        assert same(restored.episodes[0, 0], saved.episodes[0, 0])
        for batches in zip(restored.val_dataloader(), saved.val_dataloader(), strict=True):
            assert same(*batches)

    def test_given_cells_are_measured(self, manager):
        cells = np.arange(manager.adata.n_obs)
        splitter = self.splitter(manager, external_indexing=[cells[::2], cells[1::4], cells[3::4]])
        alone = measure(manager, np.concatenate([cells[::2], cells[1::4]]))
        np.testing.assert_array_equal(splitter.evidence.changes.shift, alone.changes.shift)
        assert splitter.test_dataloader() is None

    def test_a_type_in_one_arm_only_is_named_once(self):
        adata = small_cells()
        is_lost = (adata.obs["cell_type"] == "type_1") & (adata.obs["condition"] == "stimulated")
        adata = adata[~is_lost].copy()
        SpaPerbModel.setup_anndata(adata)
        with pytest.warns(UserWarning, match="take no part in training: type_1") as record:
            self.splitter(SpaPerbModel(adata).adata_manager)
        assert len(record) == 1

    def test_test_cells_are_not_measured(self, manager):
        splitter = self.splitter(manager, train_size=0.5, validation_size=0.25)
        used = np.concatenate([splitter.train_idx, splitter.val_idx])
        assert len(used) < manager.adata.n_obs
        alone = measure(manager, used)
        np.testing.assert_array_equal(splitter.evidence.changes.shift, alone.changes.shift)


def test_leaving_out_alone_keeps_the_other_perturbations():
    evidence = evidence_of(names=["A", "B"])
    target = int(evidence.whole[0])
    alone, with_context = (leave_out(evidence, target, with_it) for with_it in (False, True))
    # What is measured there is measured in the cells of the query: those of one third.
    is_here = evidence.context[alone.kept] == evidence.context[target]
    assert set(alone.kept[~is_here]) == set(with_context.kept)
    changes = evidence.changes
    assert changes.perturbation[alone.kept[is_here]].tolist() == [1]
    assert set(evidence.populations.third[changes.population[alone.kept[is_here]]]) == {1}
    assert evidence.context[target] not in evidence.context[with_context.kept]


def doses_of(n_cell_types, n_perturbations):
    """Evidence of perturbations at doses of 1 and 10 in each context."""
    cells = datasets.simulated(
        n_cell_types=n_cell_types, n_cells=240, n_genes=30, doses=(1.0, 10.0), seed=0
    )
    arms = (cells.obs["condition"] == "stimulated").to_numpy().astype(int)
    arms[arms == 1] += np.arange((arms == 1).sum()) // 2 % n_perturbations
    labels = cells.obs["cell_type"].cat.codes.to_numpy().astype(int)
    names = list(cells.obs["cell_type"].cat.categories)
    return Evidence.of(cells.X, arms, labels, names, doses=cells.obs["dose"].to_numpy())


def test_leaving_a_perturbation_out_takes_all_of_its_doses():
    evidence = doses_of(3, 2)
    changes = evidence.changes
    for fold in make_folds(evidence, N_FOLDS):
        assert fold.held_out
        for plan in fold.held_out:
            s, kept = plan.change, plan.kept
            is_here = evidence.context[kept] == evidence.context[s]
            is_same = changes.perturbation[kept] == changes.perturbation[s]
            assert is_here.any()
            assert is_same.any()
            assert not (is_here & is_same).any()


def test_a_perturbation_that_nothing_else_tells_of_is_not_held_out():
    """Each was measured in one context alone.

    Nobody could ask for it elsewhere and be answered.
    """
    evidence = doses_of(1, 4)
    assert len(evidence.whole) == 8
    assert all(leave_out(evidence, int(s), False) is None for s in evidence.whole)
    assert make_folds(evidence, N_FOLDS) == []


def test_leaving_out_the_only_change_is_none():
    evidence = evidence_of(n_cell_types=1)
    assert leave_out(evidence, 0, True) is None
    assert leave_out(evidence, 0, False) is None
