import pytest
import torch
from torch import nn

from spaperb.nn import Decoder, DeltaEncoder, Encoder


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
