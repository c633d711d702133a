import pytest
import torch
from torch import nn

from spaperb.nn import Decoder, DeltaEncoder, Encoder
from spaperb.nn._cells import Dropout


def kinds(module: nn.Module) -> list[str]:
    return [type(m).__name__ for m in module.modules() if not list(m.children())]


def test_encoder_is_the_authors_stack():
    encoder = Encoder(30, 5, n_hidden=800, n_layers=2, dropout_rate=0.2)
    block = ["Linear", "BatchNorm1d", "ELU", "Dropout"]
    assert kinds(encoder) == 2 * block + ["Linear", "Linear"]
    assert [m.p for m in encoder.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.2]
    assert [m.momentum for m in encoder.modules() if isinstance(m, nn.BatchNorm1d)] == [0.1, 0.1]


def test_encoder_gives_a_posterior():
    q = Encoder(30, 5, 16, 2, 0.2)(torch.rand(7, 30))
    assert q.loc.shape == q.scale.shape == (7, 5)
    assert (q.scale > 0).all()


def test_posterior_of_cells_unlike_any_in_training():
    encoder = Encoder(30, 50, 16, 2, 0.2).eval()
    q = encoder(1e6 * torch.rand(7, 30))
    assert (q.scale > 0).all()
    assert q.scale.isfinite().all()
    assert (q.scale > 1e6).any()
    assert (q.scale < 1e-6).any()


def test_decoder_ends_in_a_linear_layer():
    decoder = Decoder(5, 30, 16, 2, 0.2)
    assert decoder(torch.rand(7, 5)).shape == (7, 30)
    assert kinds(decoder)[-1] == "Linear"


@pytest.mark.parametrize(
    ("n_hidden", "expected"),
    [(None, ["Linear"]), (8, ["Linear", "BatchNorm1d", "ELU", "Dropout", "Linear"])],
)
def test_delta_encoder_is_linear_or_has_one_hidden_layer(n_hidden, expected):
    delta_encoder = DeltaEncoder(30, 5, n_hidden, 0.2)
    assert kinds(delta_encoder) == expected
    assert delta_encoder(torch.rand(7, 30)).shape == (7, 5)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(4001, 25), (3, 1)])
def test_dropout_drops_the_share_that_it_says_and_keeps_the_mean(p, shape):
    torch.manual_seed(0)
    x = torch.ones(shape, requires_grad=True)
    y = Dropout(p)(x)
    (dropped,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, dropped)
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p) if p < 1 else 0.0))
    if len(x) > 3:
        # Five standard errors of a share of 100,025 units.
        assert abs((y == 0).float().mean() - p) <= 5 * (p * (1 - p) / y.numel()) ** 0.5


def test_dropout_of_one_unit_says_nothing_of_the_next():
    torch.manual_seed(0)
    is_dropped = (Dropout(0.2)(torch.ones(20_000, 8)) == 0).float()
    correlation = torch.corrcoef(is_dropped.T) - torch.eye(8)
    assert correlation.abs().max() < 5 / 20_000**0.5


def test_dropout_does_nothing_in_prediction_and_follows_the_seed_in_training():
    x, dropout = torch.randn(50, 3), Dropout(0.5)
    masks = [torch.manual_seed(seed) and dropout(x) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(dropout.eval()(x), x)
