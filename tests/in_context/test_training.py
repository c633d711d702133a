import dataclasses

import numpy as np
import pytest
import torch
from spaperb.in_context import Settings, loss_of, predict, train

from spaperb import datasets
from spaperb.evidence import Evidence, Query, describe, draw

FEW = Settings(n_steps=8, n_genes=100, n_episodes=2)


def measured(seed, **settings):
    cells = datasets.simulated(
        n_cells=60, n_genes=300, shared_response=0.5, lineage_response=0.4, seed=seed, **settings
    )
    arms = (cells.obs["condition"] == "stimulated").to_numpy().astype(int)
    labels = cells.obs["cell_type"].cat.codes.to_numpy().astype(int)
    return Evidence.of(cells.X, arms, labels, list(cells.obs["cell_type"].cat.categories))


@pytest.fixture(scope="module")
def evidence():
    return measured(0)


def weights(network):
    return torch.cat([p.detach().ravel() for p in network.parameters()])


def test_the_same_seed_gives_the_same_weights_to_the_last_bit(evidence):
    before = torch.random.get_rng_state()
    first, again, other = (weights(train([evidence], FEW, seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_goes_on_from_weights_that_stay_as_they_are(evidence):
    start = train([evidence], FEW, 0)
    before = weights(start)
    gentle = dataclasses.replace(FEW, learning_rate=1e-3)
    tuned = train([measured(1)], gentle, 0, start)
    assert torch.equal(weights(start), before)
    for mine, theirs in zip(tuned.constants, start.constants, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    held = train([measured(1)], dataclasses.replace(gentle, penalty=1e4), 0, start)
    moved, kept = (float((weights(n) - before).norm()) for n in (tuned, held))
    assert 0 < kept < 0.5 * moved


def test_the_loss_of_an_episode_by_hand(evidence):
    settings = dataclasses.replace(FEW, latent_weight=0.0, sigma_weight=0.0)
    network = train([evidence], FEW, 0)
    episode = draw(evidence, np.random.default_rng(0))
    mean, sigma = predict(network, episode.description)
    squares = (mean - episode.target) ** 2
    loss = loss_of(network, episode, 2.0, settings).item()
    assert loss == pytest.approx(episode.weight * squares.mean() / 2, rel=1e-4)
    settings = dataclasses.replace(settings, sigma_weight=1.0)
    variance = sigma**2 + episode.error**2
    likelihood = 0.5 * np.mean(np.log(variance) + squares / variance)
    more = loss_of(network, episode, 2.0, settings).item() - loss
    assert more == pytest.approx(episode.weight * likelihood, rel=1e-3)


def test_prediction_in_blocks_is_that_of_all_genes(evidence, monkeypatch):
    network = train([evidence], FEW, 0)
    description = draw(evidence, np.random.default_rng(0)).description
    whole = predict(network, description)
    monkeypatch.setattr("spaperb.in_context._training.BLOCK", 70)
    for a, b in zip(predict(network, description), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def pretrained():
    return train([measured(s) for s in range(1, 7)], Settings(n_steps=250, n_genes=300), 0)


def errors(network, evidence):
    """Errors of the network and of its prior for each context, with the network's error scale."""
    rows = []
    for s in evidence.whole:
        kept = evidence.whole[evidence.whole != s]
        description = describe(evidence, Query.of_population(evidence, int(s), 0), kept)
        mean, sigma = predict(network, description)
        prior = np.exp(description.log_prior) @ description.shifts
        shift = evidence.changes.shift[s]
        scale = np.sqrt(sigma**2 + evidence.changes.error[s] ** 2)
        rows.append((mean - shift, prior - shift, scale))
    return (np.array(x) for x in zip(*rows, strict=True))


def test_it_beats_its_prior_on_a_simulated_set_that_it_never_saw(pretrained):
    for seed in (11, 12):
        error, of_prior, _ = errors(pretrained, measured(seed))
        assert (error**2).mean() < 0.9 * (of_prior**2).mean()


def test_its_error_scale_covers_the_errors_there(pretrained):
    error, _, scale = errors(pretrained, measured(11))
    assert np.mean(np.abs(error) < 1.645 * scale) == pytest.approx(0.9, abs=0.05)
