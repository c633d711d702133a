from dataclasses import replace

import numpy as np
import pytest

from spaperb import datasets
from spaperb.evidence import Evidence, Settings, draw, leave_out, make_folds
from spaperb.evidence._episodes import _left_out, draw_plan, make_episode


def measured(n_types=4, n_cells=24, n_perturbations=1):
    cells = datasets.simulated(n_cell_types=n_types, n_cells=n_cells, n_genes=30, seed=2)
    arms = (cells.obs["condition"] == "stimulated").to_numpy().astype(int)
    arms[arms == 1] += np.arange((arms == 1).sum()) % n_perturbations
    labels = cells.obs["cell_type"].cat.codes.to_numpy().astype(int)
    return Evidence.of(cells.X, arms, labels, list(cells.obs["cell_type"].cat.categories))


def spoiled(evidence, plan):
    """Put NaN in all that an episode may not see: other changes, cells of other contexts."""
    changes, populations = evidence.changes, evidence.populations
    hidden = np.setdiff1d(np.arange(len(changes.n)), plan.kept)
    unseen = np.setdiff1d(np.arange(len(populations.third)), changes.population[plan.kept])

    def spoil(moments, rows):
        moments = moments.copy()
        moments[rows] = np.nan
        return moments

    measured = ("shift", "error", "mean", "detection", "mean_error")
    return replace(
        evidence,
        changes=changes._replace(**{k: spoil(getattr(changes, k), hidden) for k in measured}),
        populations=populations._replace(
            **{k: spoil(getattr(populations, k), unseen) for k in ("mean", "detection", "error")},
            cells=[c * np.nan if i in unseen else c for i, c in enumerate(populations.cells)],
        ),
    )


@pytest.mark.parametrize("n_perturbations", [1, 2])
def test_an_episode_never_sees_what_it_left_out(n_perturbations):
    evidence = measured(n_perturbations=n_perturbations, n_cells=24 * n_perturbations)
    rng = np.random.default_rng(0)
    for _ in range(60):
        plan = draw_plan(evidence, rng)
        query = plan.query._replace(
            correlation=np.where(
                np.isin(
                    np.arange(len(plan.query.correlation)), evidence.changes.population[plan.kept]
                ),
                plan.query.correlation,
                np.nan,
            )
        )
        assert not np.isin([plan.change, *plan.target], plan.kept).any()
        episode = make_episode(evidence, plan)
        blind = make_episode(spoiled(evidence, plan), plan._replace(query=query))
        for seen, unseen in zip(episode.description, blind.description, strict=True):
            np.testing.assert_array_equal(seen, unseen)
        shifts = evidence.changes.shift[plan.target]
        n = evidence.changes.n[plan.target]
        np.testing.assert_allclose(episode.target, n @ shifts / n.sum())


def thirds_in(evidence, plan):
    """Thirds of the context that the query, the evidence and the target are made of."""
    populations, changes = evidence.populations, evidence.changes
    (of_query,) = (
        p
        for p in np.flatnonzero(populations.context == evidence.context[plan.change])
        if (populations.mean[p] == plan.query.mean).all()
    )
    is_here = evidence.context[plan.kept] == evidence.context[plan.change]
    parts = [of_query], changes.population[plan.kept[is_here]], changes.population[plan.target]
    return [set(populations.third[np.asarray(p, dtype=int)].tolist()) for p in parts]


def test_no_cell_that_a_change_is_measured_with_is_in_the_query_or_the_evidence():
    evidence = measured()
    rng = np.random.default_rng(0)
    plans = [draw_plan(evidence, rng) for _ in range(300)]
    twins = []
    for plan in plans:
        of_query, of_evidence, of_target = thirds_in(evidence, plan)
        assert not of_target & (of_query | of_evidence)
        assert 0 not in of_target | of_query | of_evidence
        if of_evidence:
            twins.append(plan)
            # What was measured is told to be so, and else it is a relative with cells of its own.
            assert (plan.query.context is not None) == (of_query == of_evidence)
        else:
            assert len(of_target) == 2
    assert 0.2 < len(twins) / len(plans) < 0.4
    told = [plan.query.context is not None for plan in twins]
    assert 0.1 < np.mean(told) < 0.45
    assert {len(plan.kept) for plan in plans} == {1, 2, 3, 4}


def test_what_else_was_measured_in_the_context_is_of_the_cells_of_the_query():
    evidence = measured(n_perturbations=3, n_cells=72)
    rng = np.random.default_rng(0)
    n_here = 0
    for _ in range(200):
        plan = draw_plan(evidence, rng)
        of_query, of_evidence, of_target = thirds_in(evidence, plan)
        assert not of_target & (of_query | of_evidence)
        if plan.query.context is not None:
            assert of_evidence in (set(), of_query)
            n_here += len(of_evidence)
    assert n_here > 20


def test_errors_of_a_target_are_those_of_a_mean():
    evidence = measured()
    plan = leave_out(evidence, 0, with_context=True)
    assert len(plan.target) == 2
    episode = make_episode(evidence, plan)
    errors, n = evidence.changes.error[plan.target], evidence.changes.n[plan.target]
    np.testing.assert_allclose(episode.error, np.hypot(*(n[:, None] * errors)) / n.sum())
    assert episode.weight == pytest.approx(n.sum() / (n.sum() + 30))


def test_a_target_of_unequal_thirds_is_as_sure_as_its_error_says():
    """By simulation: a third of three cells does not spoil one of twenty."""
    ratios = []
    # A batch has one control cell, in the third that its number tells; 63 have a stimulated one.
    stimulated = np.concatenate([i + 3 * np.arange(n) for i, n in enumerate((40, 3, 20))])
    batches = np.r_[np.arange(120), stimulated]
    arms = np.repeat([0, 1], [120, 63])
    n = len(arms)
    for seed in range(200):
        x = np.random.default_rng(seed).poisson(2.0, (2 * n, 12)).astype(float)
        evidence = Evidence.of(
            x, np.tile(arms, 2), np.repeat([0, 1], n), ["a", "b"], np.tile(batches, 2)
        )
        plan = leave_out(evidence, 0, with_context=True)
        assert evidence.changes.n[plan.target].tolist() == [3, 20]
        episode = make_episode(evidence, plan)
        ratios.append(episode.target / episode.error)
    assert 0.9 < np.std(ratios) < 1.1
    unweighted = np.sqrt((evidence.changes.error[plan.target] ** 2).sum(axis=0)) / 2
    assert episode.error.mean() < 0.8 * unweighted.mean()


def test_a_context_without_thirds_is_asked_for_as_a_whole():
    """Each of its batches has one cell in each condition, and all paired ones are in one third."""
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (40, 12)).astype(float)
    arms, labels = np.tile([0, 1], 20), np.repeat([0, 1], 20)
    # The stimulated cells of the first context are in every third of its batches.
    batches = np.r_[np.repeat(np.arange(10), 2), np.zeros(20, dtype=int)]
    is_kept = (labels == 1) | (arms == 0) | (batches % 3 == 0)
    x, arms, labels, batches = (of_cells[is_kept] for of_cells in (x, arms, labels, batches))
    evidence = Evidence.of(x, arms, labels, ["a", "b"], batches, settings=Settings(min_cells=4))
    assert (evidence.thirds[evidence.whole] >= 0).sum(axis=1).tolist() == [1, 3]
    plan = leave_out(evidence, 0, with_context=True)
    assert plan.target.tolist() == [0]
    np.testing.assert_array_equal(plan.query.mean, evidence.populations.mean[0])
    for seed in range(20):
        draw(evidence, np.random.default_rng(seed))


def test_with_two_perturbations_a_change_is_left_out_alone_too():
    evidence = measured(n_perturbations=2, n_cells=48)
    changes = evidence.changes
    rng = np.random.default_rng(0)
    here, elsewhere = set(), set()
    for _ in range(1000):
        plan = _left_out(evidence, rng)
        kept, target = plan.kept, plan.change
        assert not np.isin(evidence.thirds[target], kept).any()
        is_here = evidence.context[kept] == evidence.context[target]
        here.add(bool(is_here.any()))
        elsewhere.add(bool((~is_here).any()))
        assert (changes.perturbation[kept[is_here]] != changes.perturbation[target]).all()
    assert here == elsewhere == {True, False}


def test_the_same_seed_draws_the_same_episode():
    evidence = measured()
    first, again, other = (draw(evidence, np.random.default_rng(s), 10) for s in (5, 5, 6))
    np.testing.assert_array_equal(first.description.pieces, again.description.pieces)
    np.testing.assert_array_equal(first.target, again.target)
    assert first.target.shape == other.target.shape == (10,)
    assert first.after.shape == first.description.state.shape
    assert not np.array_equal(first.target, other.target)


def test_state_after_is_that_of_the_stimulated_cells():
    evidence = measured()
    plan = draw_plan(evidence, np.random.default_rng(1))
    episode = make_episode(evidence, plan)
    n = evidence.changes.n[plan.target]
    mean = n @ evidence.changes.mean[plan.target] / n.sum()
    np.testing.assert_allclose(episode.after[:, 0], np.log(mean + 0.05))
    detection = n @ evidence.changes.detection[plan.target] / n.sum()
    np.testing.assert_allclose(episode.after[:, 1], detection)
    np.testing.assert_array_equal(episode.after[:, 3:], episode.description.state[:, 3:])


def test_one_context_learns_from_its_thirds_alone():
    evidence = measured(n_types=1)
    for seed in range(5):
        plan = draw_plan(evidence, np.random.default_rng(seed))
        assert (evidence.populations.third[evidence.changes.population[plan.kept]] > 0).all()


def test_one_small_context_teaches_nothing():
    """Two cells in each condition make two thirds, so there are no twins."""
    evidence = measured(n_types=1, n_cells=2)
    assert (evidence.thirds[evidence.whole] >= 0).sum(axis=1).tolist() == [2]
    with pytest.raises(ValueError, match="nothing to learn from"):
        draw(evidence, np.random.default_rng(0))


def donors_of(n_contexts, n_perturbations, seed):
    """Few cells of many donors: many thirds lack some perturbations."""
    rng = np.random.default_rng(seed)
    arms = np.r_[np.zeros(80, int), np.repeat(1 + np.arange(n_perturbations), 6)]
    labels = np.repeat(np.arange(n_contexts), len(arms))
    batches = rng.integers(0, 12, len(labels))
    x = rng.poisson(1.0, (len(labels), 8)).astype(float)
    names = [f"context_{k}" for k in range(n_contexts)]
    return Evidence.of(x, np.tile(arms, n_contexts), labels, names, batches)


@pytest.mark.parametrize(("n_contexts", "n_perturbations"), [(2, 2), (3, 2), (2, 3)])
def test_few_cells_of_many_donors_teach_all_the_same(n_contexts, n_perturbations):
    for seed in range(10):
        evidence = donors_of(n_contexts, n_perturbations, seed)
        for fold in [evidence, *(fold.evidence for fold in make_folds(evidence, 3))]:
            rng = np.random.default_rng(0)
            for _ in range(50):
                draw(fold, rng)


def test_a_held_out_change_is_told_of_by_what_is_left():
    """Thirds may lack the parts of a combination; another third of the query may have them."""
    n = 24
    batches = np.tile(np.arange(n), 4)
    arms = np.repeat([0, 1, 2, 3], n)
    kept = (arms == 0) | (arms == 3) | (batches % 3 == 1)
    x = np.random.default_rng(0).poisson(1.0, (kept.sum(), 8)).astype(float)
    labels, parts = np.zeros(kept.sum(), dtype=int), [(0,), (1,), (0, 1)]
    evidence = Evidence.of(x, arms[kept], labels, ["a"], batches[kept], parts=parts)
    (combined,) = evidence.whole[evidence.changes.perturbation[evidence.whole] == 2]
    plan = leave_out(evidence, int(combined), with_context=False)
    assert sorted(evidence.changes.perturbation[plan.kept]) == [0, 1]
    make_episode(evidence, plan)
    # Without the parts, in any third, nothing tells of the combination.
    rest = evidence.keep(evidence.changes.perturbation == 2)
    assert leave_out(rest, int(rest.whole[0]), with_context=False) is None


def test_where_no_third_tells_of_another_change_one_is_asked_for_as_a_whole():
    """One context, whose two changes lie in different thirds."""
    batches = np.tile(np.arange(12), 3)
    arms = np.repeat([0, 1, 2], 12)
    kept = (arms == 0) | ((arms == 1) & (batches % 3 == 0)) | ((arms == 2) & (batches % 3 == 1))
    x = np.random.default_rng(0).poisson(1.0, (kept.sum(), 8)).astype(float)
    labels = np.zeros(kept.sum(), dtype=int)
    evidence = Evidence.of(x, arms[kept], labels, ["a"], batches[kept])
    assert (evidence.thirds[evidence.whole] >= 0).sum(axis=1).tolist() == [1, 1]
    for seed in range(10):
        plan = draw_plan(evidence, np.random.default_rng(seed))
        assert plan.target.tolist() == [plan.change]
        assert plan.kept.tolist() == [1 - plan.change]
        make_episode(evidence, plan)


def test_without_a_measured_change_nothing_is_held_out():
    evidence = measured()
    empty = evidence.keep(np.zeros(len(evidence.changes.n), dtype=bool))
    assert make_folds(empty, 3) == []
    with pytest.raises(ValueError, match="nothing to learn from"):
        draw(empty, np.random.default_rng(0))


def test_silent_genes_are_not_drawn():
    evidence = measured()
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (80, 10)).astype(float)
    arms, labels = np.tile([0, 1], 40), np.repeat([0, 1], 40)
    few = Evidence.of(x, arms, labels, ["a", "b"])
    many = Evidence.of(np.c_[x, np.zeros((80, 90))], arms, labels, ["a", "b"])
    assert many.mean_square == pytest.approx(few.mean_square)
    one, other = (draw(e, np.random.default_rng(3), 20) for e in (few, many))
    np.testing.assert_allclose(one.target, other.target)
    assert len(evidence.shown) == evidence.n_genes
