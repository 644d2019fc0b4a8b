"""Building blocks act on the last dim, whatever is on the left of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import make_adata

from pyrosc.data import Batch, CategoricalCovariates, ContinuousCovariates, Counts, Registry
from pyrosc.nn import (
    MLP,
    CategoryTable,
    CellTable,
    CovariateEffects,
    Covariates,
    CovariateSpec,
    FlatBatchNorm,
    Layer,
    NormalEncoder,
)

SPEC = CovariateSpec((("batch", None, 2), ("donors", "donor", 3)), 2)


def covariates(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = tuple(torch.randint(0, k, (n,), generator=g) for _, _, k in SPEC.categorical)
    return Covariates(codes, torch.randn(n, 2, generator=g))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("lead", [(12,), (3, 4), (2, 3, 2)])
def test_leading_dims_equal_flattened_ones(norm, lead, training):
    torch.manual_seed(0)
    network = MLP(5, 7, n_layers=2, norm=norm).train(training)
    x = torch.randn(12, 5)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    flat = network(x)
    network.load_state_dict(state)
    found = network(x.reshape(*lead, 5))
    assert found.shape == (*lead, 7)
    torch.testing.assert_close(found.reshape(12, 7), flat)


@pytest.mark.parametrize("lead", [(8,), (3, 8)])
def test_a_normal_encoder_gives_positive_scales(lead):
    torch.manual_seed(0)
    encoder = NormalEncoder(5, 3, n_hidden=7, covariates=SPEC, floor=1e-2).eval()
    loc, scale = encoder(100 * torch.randn(*lead, 5), covariates(8))
    assert loc.shape == scale.shape == (*lead, 3)
    assert (scale >= 0.1).all()


def test_batch_norm_normalises_each_feature_over_draws_and_cells():
    torch.manual_seed(0)
    h = torch.randn(4, 16, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 10.0, -3.0])
    norm = FlatBatchNorm(3)
    found = norm(h)
    torch.testing.assert_close(found.mean((0, 1)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var((0, 1), unbiased=False), torch.ones(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * h.mean((0, 1)))
    # the layer of torch takes dim 1 for the features: here it would fail, at 3 cells be silently wrong
    with pytest.raises(RuntimeError):
        nn.BatchNorm1d(3)(h)


def test_batch_norm_in_evaluation_treats_cells_alone():
    torch.manual_seed(0)
    norm = FlatBatchNorm(3)
    norm(torch.randn(2, 16, 3) + 5)
    norm.eval()
    h = torch.randn(2, 16, 3)
    torch.testing.assert_close(norm(h)[:, :1], norm(h[:, :1]))


def one_hot(c):
    parts = [F.one_hot(codes, k) for codes, (_, _, k) in zip(c.codes, SPEC.categorical, strict=True)]
    return torch.cat([*parts, c.values], -1).float()


def test_covariate_rows_equal_one_hot_columns():
    torch.manual_seed(0)
    c, h = covariates(50), torch.randn(50, 6)
    layer = Layer(6, 4, SPEC, norm="none", activation=nn.Identity())
    peer = nn.Linear(6 + 2 + 3 + 2, 4)
    with torch.no_grad():
        peer.bias.copy_(layer.linear.bias)
        tables = [t.rows.T for t in layer.effects.tables]
        peer.weight.copy_(torch.cat([layer.linear.weight, *tables, layer.effects.values.T], 1))
    expected = peer(torch.cat([h, one_hot(c)], -1))
    torch.testing.assert_close(layer(h, c), expected, atol=1e-6, rtol=1e-6)

    upstream = torch.randn(50, 4)
    (layer(h, c) * upstream).sum().backward()
    (expected * upstream).sum().backward()
    found = [
        layer.linear.weight.grad,
        *(t.rows.grad.T for t in layer.effects.tables),
        layer.effects.values.grad.T,
    ]
    torch.testing.assert_close(torch.cat(found, 1), peer.weight.grad, atol=1e-5, rtol=1e-5)


def test_covariates_are_the_same_for_each_draw():
    torch.manual_seed(0)
    layer = Layer(6, 4, SPEC, norm="none")
    h, c = torch.randn(3, 8, 6), covariates(8)
    torch.testing.assert_close(layer(h, c), torch.stack([layer(h[i], c) for i in range(3)]))


def test_no_covariates_add_nothing():
    effects = CovariateEffects(CovariateSpec((), 0), 4, 6)
    assert effects(Covariates((), torch.zeros(5, 0))) == 0
    assert not list(effects.parameters())


@pytest.mark.parametrize("inject", [True, False])
def test_where_covariates_enter(inject):
    torch.manual_seed(0)
    network = MLP(6, 5, n_layers=3, covariates=SPEC, inject=inject, norm="none", activation=nn.Identity())
    assert [len(layer.effects.tables) for layer in network.layers] == ([2, 2, 2] if inject else [2, 0, 0])
    h, c = torch.randn(8, 6), covariates(8)
    start = network(h, c)
    with torch.no_grad():
        for table in network.layers[-1].effects.tables:
            table.rows += 1
    torch.testing.assert_close(network(h, c), start + (2 if inject else 0))
    assert not torch.allclose(network(h, covariates(8, seed=1)), network(h, c))


@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
@pytest.mark.parametrize("lead", [(7,), (2, 7)])
def test_a_category_table_picks_rows(shape, lead):
    torch.manual_seed(0)
    table = CategoryTable("batch", 3, shape, init=nn.init.normal_)
    codes = torch.randint(0, 3, lead)
    found = table(codes)
    assert found.shape == (*lead, *shape)
    torch.testing.assert_close(found, table.rows[codes])


def test_a_category_table_starts_at_zero():
    table = CategoryTable("batch", 3, (4,))
    assert (table.rows == 0).all()
    assert table.n_categories == 3
    assert "batch, 3 categories" in repr(table)


def test_a_cell_table_has_sparse_gradients():
    torch.manual_seed(0)
    table = CellTable(10, (2, 3))
    index = torch.tensor([4, 7, 4])
    found = table(index)
    assert found.shape == (3, 2, 3)
    torch.testing.assert_close(found, table.rows.reshape(10, 2, 3)[index])
    found.sum().backward()
    gradient = table.rows.grad
    assert gradient.is_sparse
    assert gradient.coalesce().indices()[0].tolist() == [4, 7]
    assert gradient.to_dense()[4].tolist() == [2] * 6


def test_what_covariates_there_are_comes_from_the_registry(toy_adata):
    fields = {"x": Counts, "batch": Batch, "donors": CategoricalCovariates, "numbers": ContinuousCovariates}
    keys = {
        "batch_key": "batch",
        "categorical_covariate_keys": ["donor", "label"],
        "continuous_covariate_keys": ["age", "stress"],
    }
    registry = Registry.from_data(toy_adata, fields, keys)
    spec = CovariateSpec.from_registry(registry, "batch", "donors", "numbers", extra_continuous=3)
    assert spec.categorical == (("batch", None, 2), ("donors", "donor", 3), ("donors", "label", 3))
    assert spec.n_continuous == 5
    absent = CovariateSpec.from_registry(Registry.from_data(toy_adata, fields, {}), "donors", "numbers")
    assert absent == CovariateSpec((), 0)


def test_an_absent_batch_has_no_rows():
    registry = Registry.from_data(make_adata(20), {"x": Counts, "batch": Batch}, {})
    assert CovariateSpec.from_registry(registry, "batch") == CovariateSpec((), 0)


def test_covariates_are_packed_in_the_order_of_the_spec():
    spec = CovariateSpec((("donors", "donor", 3), ("batch", None, 2), ("donors", "label", 4)), 3)
    tensors = {
        "batch": torch.tensor([1, 0]),
        "donors": torch.tensor([[2, 3], [0, 1]]),
        "age": torch.tensor([0.5, -0.5]),
        "numbers": torch.tensor([[1.0], [2.0]]),
    }
    packed = spec.pack(tensors, torch.tensor([[7.0], [8.0]]))
    assert [c.tolist() for c in packed.codes] == [[2, 0], [1, 0], [3, 1]]
    assert packed.values.tolist() == [[0.5, 1, 7], [-0.5, 2, 8]]


def test_no_values_are_an_empty_matrix():
    packed = CovariateSpec((("batch", None, 2),), 0).pack({"batch": torch.tensor([1, 0, 1])})
    assert packed.values.shape == (3, 0)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="norm is 'batch', 'layer' or 'none', not 'group'"):
        Layer(2, 2, norm="group")
    with pytest.raises(ValueError, match="n_layers must be at least 1"):
        MLP(2, 2, n_layers=0)
