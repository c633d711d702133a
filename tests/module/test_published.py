"""The module against METHOD's equations, recomputed in plain NumPy."""

import numpy as np
import pytest
import torch
from scvi import REGISTRY_KEYS
from torch import nn

from spaperb.module import PublishedModule

N, G, L = 6, 9, 4


def module(**kwargs) -> PublishedModule:
    torch.manual_seed(0)
    return PublishedModule(G, **{"n_latent": L, "n_hidden": 8, "dropout_rate": 0.0, **kwargs})


def pairs() -> dict[str, torch.Tensor]:
    return {REGISTRY_KEYS.X_KEY: 3 * torch.rand(2 * N, G)}


def forward(m: PublishedModule, tensors: dict[str, torch.Tensor], seed: int = 1):
    """One paired pass whose noise a test can draw again."""
    torch.manual_seed(seed)
    return m(tensors, generative_kwargs={"paired": True}, loss_kwargs={"paired": True})


class Reference:
    """Networks and losses in NumPy, from the weights of a module in training mode."""

    @staticmethod
    def stack(network: nn.Module, h: np.ndarray) -> np.ndarray:
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                w, b = (p.detach().numpy() for p in (layer.weight, layer.bias))
                h = h @ w.T + b
            elif isinstance(layer, nn.BatchNorm1d):
                gamma, beta = (p.detach().numpy() for p in (layer.weight, layer.bias))
                h = (h - h.mean(0)) / np.sqrt(h.var(0) + layer.eps) * gamma + beta
            elif isinstance(layer, nn.ELU):
                h = np.where(h > 0, h, np.exp(np.minimum(h, 0)) - 1)
        return h

    @staticmethod
    def smooth_l1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        d = np.abs(a - b)
        return np.where(d < 1, 0.5 * d**2, d - 0.5)

    @classmethod
    def terms(cls, m: PublishedModule, x, eps, v_delta) -> dict[str, np.ndarray]:
        h = cls.stack(m.encoder.hidden, x)
        mu = cls.stack(m.encoder.mu, h)
        sigma = np.exp(0.5 * cls.stack(m.encoder.log_var, h))
        z = mu + sigma * eps
        z_ctrl, z_stim = z[:N], z[N:]
        z_delta = cls.stack(m.delta_encoder, v_delta)
        x_stim = cls.stack(m.decoder, z_ctrl + z_delta)
        return {
            "latent": cls.smooth_l1(z_delta, z_stim - z_ctrl).mean(),
            "reconstruction": cls.smooth_l1(x_stim, x[N:]).mean(),
            "kl": (0.5 * (mu**2 + sigma**2 - 1) - np.log(sigma)).mean(1),
        }


@pytest.mark.parametrize("n_hidden_delta", [None, 5])
@pytest.mark.parametrize("delta_noise", ["fresh", "fixed"])
@pytest.mark.parametrize("kl_on", ["both", "control"])
def test_loss_is_the_published_one(delta_noise, kl_on, n_hidden_delta):
    m = module(delta_noise=delta_noise, kl_on=kl_on, n_hidden_delta=n_hidden_delta)
    tensors = pairs()
    _, _, out = forward(m, tensors)

    # The module draws eps first and V_delta second.
    torch.manual_seed(1)
    eps = torch.normal(torch.zeros(2 * N, L), torch.ones(2 * N, L)).numpy()
    v_delta = (torch.rand(N, G) if delta_noise == "fresh" else m.v_delta.expand(N, -1)).numpy()
    terms = Reference.terms(m, tensors["X"].numpy(), eps, v_delta)

    l_kl = terms["kl"].mean() if kl_on == "both" else terms["kl"][:N].mean()
    np.testing.assert_allclose(out.extra_metrics["latent_loss"].item(), terms["latent"], rtol=1e-5)
    np.testing.assert_allclose(
        out.reconstruction_loss["reconstruction_loss"].mean().item(),
        terms["reconstruction"],
        rtol=1e-5,
    )
    np.testing.assert_allclose(out.kl_local["kl_local"].mean().item(), l_kl, rtol=1e-5)
    expected = 100 * terms["latent"] + 100 * terms["reconstruction"] + 0.5 * l_kl
    np.testing.assert_allclose(out.loss.item(), expected, rtol=1e-5)


def test_weights_are_arguments():
    tensors = pairs()
    losses = {
        name: forward(module(**weights), tensors)[2].loss.item()
        for name, weights in {
            "all": {"latent_weight": 1.0, "reconstruction_weight": 2.0, "kl_weight": 3.0},
            "latent": {"latent_weight": 1.0, "reconstruction_weight": 0.0, "kl_weight": 0.0},
            "reconstruction": {
                "latent_weight": 0.0,
                "reconstruction_weight": 2.0,
                "kl_weight": 0.0,
            },
            "kl": {"latent_weight": 0.0, "reconstruction_weight": 0.0, "kl_weight": 3.0},
        }.items()
    }
    parts = losses["latent"] + losses["reconstruction"] + losses["kl"]
    np.testing.assert_allclose(losses["all"], parts, rtol=1e-5)
    assert min(losses.values()) > 0


def test_terms_are_per_pair():
    _, _, out = forward(module(), pairs())
    assert out.reconstruction_loss["reconstruction_loss"].shape == (N,)
    assert out.kl_local["kl_local"].shape == (N,)
    assert out.n_obs_minibatch == N


def test_gradient_reaches_all_networks():
    m = module()
    forward(m, pairs())[2].loss.backward()
    for network in (m.encoder, m.delta_encoder, m.decoder):
        for name, parameter in network.named_parameters():
            # A bias before batch normalisation cancels out.
            if not name.endswith("0.bias"):
                assert parameter.grad.abs().max() > 1e-8, name


def test_gradient_of_the_latent_term_flows_into_the_encoder():
    m = module(reconstruction_weight=0.0, kl_weight=0.0)
    forward(m, pairs())[2].loss.backward()
    assert m.encoder.mu.weight.grad.abs().max() > 1e-8
    assert m.decoder.output.weight.grad.abs().max() == 0


def test_unpaired_cells_are_reconstructed_from_their_own_latent_vector():
    m = module().eval()
    tensors = pairs()
    inference, generative, out = m(tensors)
    assert generative["px"].shape == (2 * N, G)
    torch.testing.assert_close(generative["px"], m.decoder(inference["z"]))
    assert out.reconstruction_loss["reconstruction_loss"].shape == (2 * N,)
    assert out.extra_metrics == {}


def test_fresh_noise_differs_between_cells_and_draws():
    m = module(delta_noise="fresh")
    first, second = m.draw_v_delta(3), m.draw_v_delta(3)
    assert m.v_delta is None
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert 0 <= first.min()
    assert first.max() < 1


def test_fixed_noise_is_one_saved_draw():
    m = module(delta_noise="fixed")
    assert "v_delta" in m.state_dict()
    assert torch.equal(m.draw_v_delta(3), m.v_delta.expand(3, -1))


def test_prediction_is_the_decoded_shifted_posterior():
    m = module().eval()
    x = pairs()["X"]
    v, eps = torch.rand(2 * N, G), torch.randn(2 * N, L)
    qz, z_delta = m.encoder(x), m.delta_encoder(v)
    for noise, z in ((None, qz.loc), (eps, qz.loc + qz.scale * eps)):
        predicted = m.predict(x, v, noise)
        torch.testing.assert_close(predicted["px_stim"], m.decoder(z + z_delta))
        torch.testing.assert_close(predicted["z_stim"], z + z_delta)
        torch.testing.assert_close(predicted["z_delta"], z_delta)


def test_criterion():
    m = module(criterion="mse")
    tensors = pairs()
    _, generative, out = forward(m, tensors)
    expected = ((generative["px"] - tensors["X"][N:]) ** 2).mean(1)
    torch.testing.assert_close(out.reconstruction_loss["reconstruction_loss"], expected)


@pytest.mark.parametrize("argument", ["kl_on", "delta_noise", "criterion"])
def test_unknown_choice_is_refused(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be one of .*not 'other'"):
        module(**{argument: "other"})
