"""The in-context module: its loss, its networks side by side, and what they predict together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scanpy as sc
import torch
from helpers import context_arrays, real_cells

from spaperb import datasets
from spaperb.data._episodes import Episodes, stacked
from spaperb.evidence import Evidence, draw, leave_out, make_episode
from spaperb.module import HeldOut, InContextModule
from spaperb.module._in_context import Predicted, predict
from spaperb.nn import Constants, read_weights

SIZES: dict[str, Any] = {"n_latent": 3, "n_hidden": 8, "n_networks": 2}
G = 40
SIMULATION: dict[str, Any] = {
    "n_cell_types": 8,
    "n_cells": 60,
    "n_genes": 300,
    "shared_response": 0.5,
    "lineage_response": 0.4,
}


def measured(**simulation):
    return Evidence.of(*context_arrays(datasets.simulated(**simulation)))


@pytest.fixture(scope="module")
def evidence():
    return measured(n_cell_types=5, n_cells=30, n_genes=G, seed=1)


def make(evidence, seed=0, **kwargs):
    """A module with weights as training may leave them: no layer is zero."""
    torch.manual_seed(seed)
    module = InContextModule(**SIZES, **kwargs)
    rng = np.random.default_rng(seed)
    constants = Constants.of([draw(evidence, rng).description for _ in range(8)])
    module.standardise_by([constants] * len(module.networks))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


@pytest.fixture
def module(evidence):
    return make(evidence)


@pytest.fixture
def batch(evidence):
    """Three episodes of each of two networks."""
    return Episodes([[evidence]] * 2, 3, G, seed=0)[0, 0]


def elu(x):
    return np.where(x > 0, x, np.expm1(x))


def linear(layer, x):
    bias = 0 if layer.bias is None else layer.bias.detach().double().numpy()
    return x @ layer.weight.detach().double().numpy().T + bias


def standardised(part, x):
    mean, deviation = part.mean.double().numpy(), part.deviation.double().numpy()
    return np.clip((x - mean) / deviation, -5, 5)


def reference(network, of):
    """Change, sigma, Z_ctrl, Z_delta and Z after of one episode, in plain NumPy."""

    def encode(u):
        first, _, last = network.encoder
        return linear(last, elu(linear(first, standardised(network.of_state, u))))

    def decode(z):
        first, _, last = network.decoder
        return linear(last, elu(linear(first, z)))[..., 0]

    z_ctrl = encode(of["state"])
    h_encoder, e_delta = network.evidence_encoder, network.delta_encoder
    first = linear(h_encoder.of_pieces, standardised(network.of_pieces, of["pieces"]))
    relations = standardised(network.of_relations, of["relations"])
    first = first + linear(h_encoder.of_relations, relations)[:, None]
    first = first + linear(h_encoder.of_latent, z_ctrl)
    h = elu(linear(h_encoder.last[1], elu(first)))
    score = linear(network.score, h)[..., 0] + of["log_prior"][:, None]
    attention = np.exp(score) / np.exp(score).sum(axis=0)
    context = (attention[..., None] * h).sum(axis=0)
    hidden = elu(linear(e_delta.hidden[0], np.concatenate([context, z_ctrl], axis=-1)))
    z_delta = linear(e_delta.latent, hidden)
    gate = linear(e_delta.gate, hidden)[..., 0]
    sigma = of["scale"] * 0.1 * np.exp(linear(e_delta.log_sigma, hidden)[..., 0])
    change = (attention * of["shifts"]).sum(axis=0) * (1 + gate)
    change = change + of["scale"] * (decode(z_ctrl + z_delta) - decode(z_ctrl))
    return change, sigma, z_ctrl, z_delta, encode(of["after"])


def smooth_l1(a, b):
    d = np.abs(a - b)
    return np.where(d < 1, 0.5 * d**2, d - 0.5).mean()


def test_the_loss_is_that_of_the_equations(module, batch):
    losses = []
    for f, network in enumerate(module.networks):
        for b in range(3):
            of = {name: x[f, b].double().numpy() for name, x in batch.items()}
            change, sigma, z_ctrl, z_delta, z_after = reference(network, of)
            squares = (change - of["target"]) ** 2
            variance = sigma**2 + of["error"] ** 2
            loss = (
                100 * smooth_l1(z_delta, z_after - z_ctrl)
                + 100 * squares.mean() / of["unit"]
                + 0.5 * (np.log(variance) + squares / variance).mean()
            )
            losses.append(of["weight"] * loss)
    *_, out = module(batch)
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_weights_of_the_terms_are_arguments(evidence, batch):
    names = ("latent_weight", "reconstruction_weight", "noise_weight")

    def loss(*weights):
        return make(evidence, **dict(zip(names, weights, strict=True)))(batch)[2].loss.item()

    alone = [loss(1, 0, 0), loss(0, 1, 0), loss(0, 0, 1)]
    assert 0 not in alone
    assert loss(2, 3, 5) == pytest.approx(np.dot(alone, [2, 3, 5]), rel=1e-5)


def test_logged_terms_are_unweighted_means(module, batch):
    out = module(batch)[2]
    _, generative, _ = module(batch)
    errors = ((generative["change"] - batch["target"]) ** 2).mean(-1) / batch["unit"]
    torch.testing.assert_close(out.reconstruction_loss["reconstruction_loss"], errors.flatten())
    heavy = {**batch, "weight": 7 * batch["weight"]}
    again = module(heavy)[2]
    torch.testing.assert_close(again.loss, 7 * out.loss)
    torch.testing.assert_close(
        again.extra_metrics["latent_loss"], out.extra_metrics["latent_loss"]
    )


def test_gradient_reaches_all_of_each_network(module, batch):
    module(batch)[2].loss.backward()
    for name, parameter in module.named_parameters():
        # Biases of the score and of the decoded change cancel out.
        if not name.endswith(("score.bias", "decoder.2.bias")):
            assert parameter.grad.abs().max() > 1e-8, name


def test_gradient_of_the_latent_term_flows_into_the_encoder(evidence, batch):
    module = make(evidence, reconstruction_weight=0.0, noise_weight=0.0)
    module(batch)[2].loss.backward()
    for network in module.networks:
        for layer in (network.encoder[0], network.delta_encoder.latent, network.score):
            assert layer.weight.grad.abs().max() > 1e-8
        for layer in (network.decoder[0], network.delta_encoder.gate):
            assert layer.weight.grad is None or layer.weight.grad.abs().max() == 0


def test_the_loss_of_one_network_moves_no_other(module, batch):
    batch["weight"][1] = 0
    module(batch)[2].loss.backward()
    one, other = ([p.grad.abs().max() for p in n.parameters()] for n in module.networks)
    assert max(one) > 1e-8
    assert max(other) == 0


def test_each_network_sees_its_own_episodes_alone(module, batch):
    _, generative, _ = module(batch)
    for f, network in enumerate(module.networks):
        inputs = ("state", "pieces", "relations", "log_prior", "shifts", "scale")
        answer = network(*(batch[name][f] for name in inputs))
        torch.testing.assert_close(generative["change"][f], answer.mean)
        torch.testing.assert_close(generative["sigma"][f], answer.sigma)


def test_the_loss_of_sigma_leaves_the_mean_alone(evidence, batch):
    module = make(evidence, latent_weight=0.0, reconstruction_weight=0.0)
    module(batch)[2].loss.backward()
    network = module.networks[0]
    assert network.delta_encoder.log_sigma.weight.grad.abs().max() > 1e-8
    for layer in (network.delta_encoder.gate, network.decoder[0], network.decoder[2]):
        assert layer.weight.grad is None or layer.weight.grad.abs().max() == 0


def test_padding_changes_nothing(module, evidence):
    rng = np.random.default_rng(0)
    episodes = [(draw(evidence, rng), 1.0) for _ in range(4)]
    sizes = {len(e.description.shifts) for e, _ in episodes}
    assert len(sizes) > 1
    _, generative, _ = module(stacked(episodes, 2))
    for i, (episode, _) in enumerate(episodes):
        f, b = divmod(i, 2)
        alone = predict(module.networks[f], episode.description)
        np.testing.assert_allclose(
            generative["change"][f, b].detach(), alone.mean, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("filling", [0.0, 7.0])
def test_more_padding_changes_neither_loss_nor_gradient(evidence, batch, filling):
    padded = dict(batch)
    for name in ("pieces", "relations", "shifts", "log_prior"):
        shape = (*batch[name].shape[:2], 3, *batch[name].shape[3:])
        more = torch.full(shape, -torch.inf if name == "log_prior" else filling)
        padded[name] = torch.cat([batch[name], more], dim=2)
    modules = [make(evidence) for _ in range(2)]
    losses = [m(b)[2].loss for m, b in zip(modules, (batch, padded), strict=True)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for mine, theirs in zip(*(m.parameters() for m in modules), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_pretrained_networks_are_shared_out(evidence):
    """More networks than there are pretrained ones start from the first again."""
    source = list(make(evidence).networks)
    module = InContextModule(**{**SIZES, "n_networks": 3}).start_from(source)
    assert len(module.pretrained) == 2
    for i, network in enumerate(module.networks):
        for name, weight in network.state_dict().items():
            assert torch.equal(weight, source[i % 2].state_dict()[name])


def test_pretrained_networks_do_not_train(evidence, batch):
    source = make(evidence)
    module = InContextModule(**SIZES).start_from(list(source.networks))
    before = [p.clone() for p in module.pretrained.parameters()]
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.networks.parameters(), source.networks.parameters(), strict=True)
    )
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    module(batch)[2].loss.backward()
    optimiser.step()
    assert all(
        torch.equal(a, b) for a, b in zip(module.pretrained.parameters(), before, strict=True)
    )
    assert not torch.equal(next(module.networks.parameters()), before[0])


def test_prediction_mixes_trained_and_pretrained_networks(evidence):
    module = make(evidence, 1)
    description = draw(evidence, np.random.default_rng(0)).description
    trained = [predict(network, description) for network in module.networks]
    alone = module.predict(description)
    np.testing.assert_allclose(alone.mean, (trained[0].mean + trained[1].mean) / 2)
    np.testing.assert_allclose(alone.sigma**2, (trained[0].sigma ** 2 + trained[1].sigma ** 2) / 2)
    pretrained = make(evidence, 2)
    weights = {name: weight.clone() for name, weight in module.state_dict().items()}
    module.start_from(list(pretrained.networks))
    module.load_state_dict(weights, strict=False)
    module.share.fill_(0.25)
    of_pretrained = pretrained.predict(description)
    mixed = module.predict(description)
    np.testing.assert_allclose(mixed.mean, 0.75 * of_pretrained.mean + 0.25 * alone.mean)
    np.testing.assert_allclose(
        mixed.sigma**2, 0.75 * of_pretrained.sigma**2 + 0.25 * alone.sigma**2
    )


def test_one_network_alone_predicts_what_was_held_out_of_it(module, evidence):
    description = draw(evidence, np.random.default_rng(0)).description
    for f, network in enumerate(module.networks):
        for found, expected in zip(
            module.predict_trained(description, f), predict(network, description), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


class TestShare:
    """How far the trained networks have the say, by least squares on held-out changes."""

    @staticmethod
    def share(evidence, n, trained, pretrained):
        module = InContextModule(**SIZES).start_from(list(make(evidence).networks))
        episode = draw(evidence, np.random.default_rng(0))
        sigma = np.ones(G)
        held_out = [
            HeldOut(
                episode,
                Predicted(trained * episode.target, sigma),
                Predicted(pretrained * episode.target, sigma),
            )
        ] * n
        module.choose_share(held_out, pull=6.0)
        return float(module.share)

    def test_without_held_out_changes_it_is_a_half(self, evidence):
        assert self.share(evidence, 0, 1.0, 0.0) == 0.5

    def test_six_changes_weigh_as_much_as_the_half(self, evidence):
        assert self.share(evidence, 6, 1.0, 0.0) == pytest.approx(0.75)
        assert self.share(evidence, 6, 0.0, 1.0) == pytest.approx(0.25)

    def test_many_changes_decide(self, evidence):
        assert self.share(evidence, 600, 1.0, 0.0) == pytest.approx(1, abs=0.01)
        assert self.share(evidence, 600, 0.0, 1.0) == pytest.approx(0, abs=0.01)
        assert self.share(evidence, 600, 1.5, 0.5) == pytest.approx(0.5, abs=0.01)

    def test_it_stays_in_0_to_1(self, evidence):
        assert self.share(evidence, 600, 0.5, 0.0) == 1
        assert self.share(evidence, 600, 2.0, 1.5) == 0

    def test_networks_that_did_not_move(self, evidence):
        assert 0 <= self.share(evidence, 5, 0.5, 0.5) <= 1

    def test_it_has_the_least_squares_of_all_shares(self, evidence):
        rng = np.random.default_rng(0)
        episodes = [draw(evidence, rng) for _ in range(8)]

        def said(episode, part):
            noise = rng.normal(0, 0.3 * episode.target.std(), G)
            return Predicted(part * episode.target + noise, np.ones(G))

        held_out = [HeldOut(e, said(e, 0.7), said(e, 0.5)) for e in episodes]

        def squares(share):
            return sum(
                e.weight
                * (((1 - share) * p.mean + share * t.mean - e.target) ** 2).mean()
                / (e.target**2).mean()
                for e, t, p in held_out
            )

        shares = np.linspace(0, 1, 1001)
        best = shares[np.argmin([squares(share) for share in shares])]
        assert 0.05 < best < 0.95
        module = InContextModule(**SIZES).start_from(list(make(evidence).networks))
        module.choose_share(held_out, pull=0.0)
        assert float(module.share) == pytest.approx(best, abs=1e-3)

    def test_from_scratch_there_is_nothing_to_mix(self, module, evidence):
        episode = draw(evidence, np.random.default_rng(0))
        said = Predicted(episode.target, np.ones(G))
        for held_out in ([], [HeldOut(episode, said, None)]):
            module.choose_share(held_out, pull=6.0)
            assert module.share == 1


def test_prediction_in_blocks_is_that_of_all_genes(module, evidence, monkeypatch):
    description = draw(evidence, np.random.default_rng(0)).description
    whole = module.predict(description)
    monkeypatch.setattr("spaperb.module._in_context.BLOCK", 17)
    for a, b in zip(module.predict(description), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_no_network_is_refused():
    with pytest.raises(ValueError, match="`n_networks` must be at least 1; it is 0"):
        InContextModule(n_networks=0)


class TestAccuracy:
    """Data sets that the networks never saw."""

    @staticmethod
    def errors(module, evidence):
        """Squared errors of the networks and of their prior; errors over expected ones."""
        rows = []
        for s in evidence.whole.tolist():
            episode = make_episode(evidence, leave_out(evidence, s, with_context=True))
            description = episode.description
            mean, sigma = module.predict(description)
            prior = np.exp(description.log_prior) @ description.shifts
            errors = [x - episode.target for x in (mean, prior)]
            # Beyond the noise of the truth.
            excess = [(error**2 - episode.error**2).mean() for error in errors]
            rows.append((*excess, np.abs(errors[0]) / np.sqrt(sigma**2 + episode.error**2)))
        return (np.array(x) for x in zip(*rows, strict=True))

    @pytest.fixture(scope="class")
    @staticmethod
    def learned():
        """A network that learned from scratch, from six other sets."""
        torch.manual_seed(0)
        module = InContextModule(n_networks=1)
        sets = [measured(seed=seed, **SIMULATION) for seed in range(6)]
        rng = np.random.default_rng(0)
        constants = Constants.of([draw(e, rng, 300).description for e in sets])
        module.standardise_by([constants] * len(module.networks))
        optimiser = torch.optim.AdamW(module.parameters(), lr=5e-3)
        n_steps = 250
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, n_steps)
        episodes = Episodes([sets], 4, 300, seed=0)
        for step in range(n_steps):
            optimiser.zero_grad()
            module(episodes[0, step])[2].loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 100.0)
            optimiser.step()
            schedule.step()
        return module

    @pytest.mark.slow
    def test_learning_from_scratch_beats_the_prior_and_knows_its_errors(self, learned):
        evidence = measured(seed=911, **SIMULATION)
        of_networks, of_prior, ratio = self.errors(learned, evidence)
        assert of_networks.mean() < 0.9 * of_prior.mean()
        assert (ratio < 1.645).mean() == pytest.approx(0.9, abs=0.05)

    def test_pretrained_networks_beat_the_prior_on_real_cells_that_they_never_saw(self):
        weights = Path(__file__).parents[2] / "pretraining" / "weights"
        networks = read_weights(weights / "without_kang_pbmc_ifnb.safetensors")
        sizes = networks[0].n_latent, networks[0].n_hidden
        module = InContextModule(*sizes, len(networks)).start_from(networks)
        cells = real_cells("kang_pbmc_ifnb")
        sc.pp.normalize_total(cells, target_sum=1e4)
        sc.pp.log1p(cells)
        sc.pp.highly_variable_genes(cells, n_top_genes=1000, subset=True)
        arms = (cells.obs["condition"] != "control").to_numpy().astype(int)
        names, labels = np.unique(cells.obs["cell_type"].astype(str), return_inverse=True)
        evidence = Evidence.of(cells.X, arms, labels, list(names))
        of_networks, of_prior, _ = self.errors(module, evidence)
        assert of_networks.mean() < 0.9 * of_prior.mean()
