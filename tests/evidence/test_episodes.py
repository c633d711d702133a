from dataclasses import replace

import numpy as np
import pytest

from spaperb import datasets
from spaperb.evidence import Evidence, draw
from spaperb.evidence._episodes import draw_plan, make_episode


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
    unseen = np.setdiff1d(np.arange(len(populations.half)), changes.population[plan.kept])

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
        assert plan.target not in plan.kept
        episode = make_episode(evidence, plan)
        blind = make_episode(spoiled(evidence, plan), plan._replace(query=query))
        for seen, unseen in zip(episode.description, blind.description, strict=True):
            np.testing.assert_array_equal(seen, unseen)
        np.testing.assert_array_equal(episode.target, evidence.changes.shift[plan.target])


def test_cells_of_the_target_are_in_no_piece_of_evidence():
    """Left out with its context, or as one half whose only relative is the other half."""
    evidence = measured()
    context = evidence.populations.context[evidence.changes.population]
    half = evidence.populations.half[evidence.changes.population]
    rng = np.random.default_rng(0)
    plans = [draw_plan(evidence, rng) for _ in range(300)]
    twins = [plan for plan in plans if half[plan.target]]
    assert 0.2 < len(twins) / len(plans) < 0.4
    for plan in plans:
        of_context = plan.kept[context[plan.kept] == context[plan.target]]
        assert (half[of_context] == 3 - half[plan.target]).all()
        assert len(of_context) == (1 if half[plan.target] else 0)
    told = [plan.query.context is not None for plan in twins]
    assert 0.1 < np.mean(told) < 0.45
    sizes = {len(plan.kept) for plan in plans}
    assert sizes == {1, 2, 3, 4}


def test_with_two_perturbations_a_change_is_left_out_alone_too():
    evidence = measured(n_perturbations=2, n_cells=48)
    changes, whole = evidence.changes, set(evidence.whole.tolist())
    rng = np.random.default_rng(0)
    here, elsewhere = set(), set()
    for _ in range(200):
        _, kept, target = draw_plan(evidence, rng)
        if target not in whole:
            continue
        is_here = changes.population[kept] == changes.population[target]
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
    mean = evidence.changes.mean[plan.target]
    np.testing.assert_allclose(episode.after[:, 0], np.log(mean + 0.05))
    np.testing.assert_array_equal(episode.after[:, 1], evidence.changes.detection[plan.target])
    np.testing.assert_array_equal(episode.after[:, 3:], episode.description.state[:, 3:])


def test_one_context_learns_from_its_halves_alone():
    evidence = measured(n_types=1)
    for seed in range(5):
        plan = draw_plan(evidence, np.random.default_rng(seed))
        assert evidence.populations.half[evidence.changes.population[plan.target]] in (1, 2)


def test_one_small_context_teaches_nothing():
    evidence = measured(n_types=1, n_cells=4)
    halves = evidence.changes.population[evidence.changes.population > 0]
    evidence = replace(
        evidence, changes=type(evidence.changes)(*(m[:1] for m in evidence.changes))
    )
    assert len(halves) in (0, 2)
    with pytest.raises(ValueError, match="nothing to learn from"):
        draw(evidence, np.random.default_rng(0))
