import numpy as np
import pytest
import torch

from spaperb import datasets
from spaperb.evidence import ContextQuery, Evidence, describe, draw
from spaperb.nn import Constants, InContextNetwork
from spaperb.nn._genes import Standardise, tensors


@pytest.fixture(scope="module")
def evidence():
    cells = datasets.simulated(n_cell_types=5, n_cells=30, n_genes=40, seed=1)
    arms = (cells.obs["condition"] == "stimulated").to_numpy().astype(int)
    labels = cells.obs["cell_type"].cat.codes.to_numpy().astype(int)
    return Evidence.of(cells.X, arms, labels, list(cells.obs["cell_type"].cat.categories))


def constants(evidence, seed=0):
    rng = np.random.default_rng(seed)
    return Constants.of([draw(evidence, rng).description for _ in range(8)])


@pytest.fixture
def network(evidence):
    torch.manual_seed(0)
    return InContextNetwork(constants(evidence))


@pytest.fixture
def trained(network):
    """Weights as training may leave them: no layer is zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


@pytest.fixture
def description(evidence):
    return describe(evidence, ContextQuery.of_population(evidence, 0, 0), np.arange(1, 5))


def test_an_untrained_network_is_the_prior_weighted_mean(network, description):
    mean = network(*tensors(description)).mean.detach().numpy()
    expected = np.exp(description.log_prior) @ description.shifts
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)


def test_shapes(trained, description):
    answer = trained(*tensors(description))
    assert answer.mean.shape == answer.sigma.shape == (40,)
    assert answer.z_ctrl.shape == answer.z_delta.shape == (40, 16)
    assert answer.attention.shape == (4, 40)
    torch.testing.assert_close(answer.attention.sum(dim=0), torch.ones(40))
    assert (answer.sigma > 0).all()
    assert sum(p.numel() for p in trained.parameters()) < 15_000


def test_order_of_evidence_order_of_genes_and_padding_change_nothing(trained, description):
    whole = trained(*tensors(description)).mean
    assert not torch.allclose(
        whole, torch.from_numpy(np.exp(description.log_prior) @ description.shifts).float()
    )
    state, pieces, relations, log_prior, shifts, scale = tensors(description)
    order, genes = torch.tensor([2, 0, 3, 1]), torch.randperm(40)
    permuted = trained(
        state, pieces[order], relations[order], log_prior[order], shifts[order], scale
    )
    torch.testing.assert_close(permuted.mean, whole)
    of_genes = trained(
        state[genes], pieces[:, genes], relations, log_prior, shifts[:, genes], scale[genes]
    )
    torch.testing.assert_close(of_genes.mean, whole[genes])

    def padded(x, value):
        return torch.cat([x, torch.full((3, *x.shape[1:]), value)])

    padding = trained(
        state,
        padded(pieces, 7.0),
        padded(relations, 7.0),
        padded(log_prior, -torch.inf),
        padded(shifts, 7.0),
        scale,
    )
    torch.testing.assert_close(padding.mean, whole)


def test_copies_of_a_piece_of_evidence_say_what_it_says_once(trained, description):
    """Shares of the prior are what counts, not the number of pieces."""
    state, pieces, relations, log_prior, shifts, scale = tensors(description)
    twice = [torch.cat([x, x]) for x in (pieces, relations)]
    again = trained(
        state,
        *twice,
        torch.cat([log_prior, log_prior]) - np.log(2),
        torch.cat([shifts, shifts]),
        scale,
    )
    torch.testing.assert_close(again.mean, trained(*tensors(description)).mean)


def test_inputs_unlike_any_in_training_stay_finite(trained, description):
    wild = [1e6 * x if x.ndim > 1 else x for x in tensors(description)]
    assert torch.isfinite(trained(*wild).mean).all()


def test_constants_are_saved_with_the_weights(network, evidence):
    other = InContextNetwork(Constants.none())
    other.load_state_dict(network.state_dict())
    for mine, theirs in zip(
        network.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_inputs_of_the_constants_have_mean_0_and_deviation_1(network, evidence):
    rng = np.random.default_rng(0)
    states = np.concatenate([draw(evidence, rng).description.state for _ in range(8)])
    mean, deviation = constants(evidence).state
    np.testing.assert_allclose(states.mean(axis=0), mean)
    standardised = (states - mean) / deviation
    np.testing.assert_allclose(standardised.mean(axis=0), 0, atol=1e-9)
    assert standardised.std(axis=0).max() == pytest.approx(1)
    network.standardise_by(constants(evidence, 1))
    assert not np.allclose(network.of_state.mean, mean)


def test_constants_are_of_all_inputs(evidence):
    rng = np.random.default_rng(0)
    descriptions = [draw(evidence, rng).description for _ in range(3)]
    _, pieces, relations = Constants.of(descriptions)
    rows = np.concatenate([d.pieces.reshape(-1, d.pieces.shape[-1]) for d in descriptions])
    np.testing.assert_allclose(pieces[0], rows.mean(axis=0))
    np.testing.assert_allclose(pieces[1], np.maximum(rows.std(axis=0), 0.05))
    rows = np.concatenate([d.relations for d in descriptions])
    np.testing.assert_allclose(relations[0], rows.mean(axis=0))
    # The perturbation is the same in all, and their deviation is not 0.
    assert relations[1].min() == 0.05


def test_standardised_inputs_are_clipped():
    standardise = Standardise(np.array([1.0, 0.0]), np.array([2.0, 0.05]))
    inputs = torch.tensor([[3.0, 0.1], [-99.0, 99.0]])
    torch.testing.assert_close(standardise(inputs), torch.tensor([[1.0, 2.0], [-5.0, 5.0]]))


def test_stacked_descriptions_are_predicted_as_each_alone(trained, evidence):
    queries = [ContextQuery.of_population(evidence, k, 0) for k in (0, 1)]
    described = [tensors(describe(evidence, query, np.arange(2, 5))) for query in queries]
    stacked = trained(*(torch.stack(of_two) for of_two in zip(*described, strict=True)))
    for k, of_one in enumerate(described):
        torch.testing.assert_close(stacked.mean[k], trained(*of_one).mean)
        torch.testing.assert_close(stacked.sigma[k], trained(*of_one).sigma)
