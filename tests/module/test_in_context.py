import numpy as np
import pytest
import torch

from spaperb import datasets
from spaperb.data._episodes import Episodes, stacked
from spaperb.evidence import Evidence, draw
from spaperb.module import HeldOut, InContextModule
from spaperb.module._in_context import Predicted, predict
from spaperb.nn import Constants

SIZES = {"n_latent": 3, "n_hidden": 8, "n_networks": 2}
G = 40


@pytest.fixture(scope="module")
def evidence():
    cells = datasets.simulated(n_cell_types=5, n_cells=30, n_genes=G, seed=1)
    arms = (cells.obs["condition"] == "stimulated").to_numpy().astype(int)
    labels = cells.obs["cell_type"].cat.codes.to_numpy().astype(int)
    return Evidence.of(cells.X, arms, labels, list(cells.obs["cell_type"].cat.categories))


def make(evidence, seed=0, **kwargs):
    """A module with weights as training may leave them: no layer is zero."""
    torch.manual_seed(seed)
    module = InContextModule(**SIZES, **kwargs)
    rng = np.random.default_rng(seed)
    module.standardise_by(Constants.of([draw(evidence, rng).description for _ in range(8)]))
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
        module.choose_share(held_out)
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

    def test_from_scratch_there_is_nothing_to_mix(self, module):
        module.choose_share([])
        assert module.share == 1


def test_prediction_in_blocks_is_that_of_all_genes(module, evidence, monkeypatch):
    description = draw(evidence, np.random.default_rng(0)).description
    whole = module.predict(description)
    monkeypatch.setattr("spaperb.module._in_context.BLOCK", 17)
    for a, b in zip(module.predict(description), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
