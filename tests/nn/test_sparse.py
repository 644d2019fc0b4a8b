"""Inputs by their non-zero values: what a dense product gives, and where they come from."""

import warnings

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from pyrosc import PEAKVI
from pyrosc.data.inputs import load_batch
from pyrosc.data.matrix import Matrix, rows_of
from pyrosc.nn.layers import MLP
from pyrosc.nn.sparse import SparseLinear, SparseRows


def some(n: int = 20, g: int = 300, density: float = 0.05, seed: int = 0) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    return sp.csr_matrix(rng.poisson(2.0, (n, g)) * (rng.random((n, g)) < density), dtype=np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_gives_the_same_of_sparse_rows(dtype: torch.dtype):
    dense = some().toarray()
    dense[3] = 0  # a cell without any
    matrix = sp.csr_matrix(dense)
    layer = SparseLinear(300, 8).to(dtype)
    plain = nn.Linear(300, 8).to(dtype)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    dense = torch.from_numpy(matrix.toarray()).to(dtype)
    upstream = torch.randn(20, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    outs = [layer(SparseRows(matrix)), layer(dense), plain(dense)]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for out in outs:
        assert out.dtype == dtype
        torch.testing.assert_close(out, outs[2], **tolerance)
    grads = [
        torch.autograd.grad(out, [layer.rows, layer.bias] if i < 2 else [plain.weight, plain.bias], upstream)
        for i, out in enumerate(outs)
    ]
    for rows, bias in grads[:2]:
        torch.testing.assert_close(rows.t(), grads[2][0], **tolerance)
        torch.testing.assert_close(bias, grads[2][1], **tolerance)


def test_weights_start_as_those_of_a_linear_map():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        a = nn.Linear(7, 4)
        torch.manual_seed(3)
        b = SparseLinear(7, 4)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.bias, b.bias)
    assert all(p.is_contiguous() for p in b.parameters())  # torch's fused Adam would copy others, each step


def test_networks_take_both():
    network = MLP(300, 8, 2, norm="layer", sparse=True)
    matrix = some()
    torch.testing.assert_close(network(SparseRows(matrix)), network(torch.from_numpy(matrix.toarray())))
    assert isinstance(network.layers[1].linear, nn.Linear)


def test_values_are_mapped_and_summed():
    matrix = some()
    rows = SparseRows(matrix)
    dense = torch.from_numpy(matrix.toarray())
    assert torch.equal(rows.map(lambda v: np.minimum(v, 1)).sum(-1), dense.clamp(max=1).sum(-1))
    torch.testing.assert_close(rows.map(np.log1p).sum(), dense.log1p().sum(-1))
    with pytest.raises(ValueError, match="last dim"):
        rows.sum(0)


def test_rows_come_from_sparse_matrices_in_memory(tmp_path):
    matrix, index = some(), np.array([4, 1, 7])
    x = Matrix(matrix).tensor(index)
    assert np.array_equal(x.numpy(), matrix[index].toarray())
    found = rows_of(x)
    assert np.array_equal(found.toarray(), x.numpy())
    assert rows_of(x.clamp(max=1)) is None
    assert rows_of(x.clone()) is None
    assert rows_of(Matrix(matrix.toarray()).tensor(index)) is None
    some_columns = Matrix(matrix, take=np.array([5, -1, 3])).tensor(index)
    assert np.array_equal(rows_of(some_columns).toarray(), some_columns.numpy())
    reads = Matrix(matrix, halve=True).tensor(index)
    assert np.array_equal(rows_of(reads).toarray(), np.ceil(matrix[index].toarray() / 2))
    adata = ad.AnnData(matrix)
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    assert np.array_equal(Matrix(backed.X).tensor(index).numpy(), x.numpy())
    backed.file.close()


def test_repeated_entries_count_once():
    """A CSR matrix may hold an entry in parts; a function of the value is of their sum."""
    parts = sp.csr_matrix((np.ones(3, np.float32), np.array([1, 1, 40]), np.array([0, 2, 3])), (2, 60))
    x = Matrix(parts).tensor(np.arange(2))
    rows = SparseRows.of(x)
    assert x[0, 1] == 2
    torch.testing.assert_close(rows.map(np.log1p).sum(), x.log1p().sum(-1))
    assert parts.nnz == 3  # the user's matrix is as it was


def test_only_where_it_pays_or_may():
    x = Matrix(some()).tensor(np.arange(20))
    assert SparseRows.of(x) is not None
    assert SparseRows.of(Matrix(some(density=0.5)).tensor(np.arange(20))) is None
    assert SparseRows.of(x.requires_grad_()) is None


def some_of_each() -> np.ndarray:
    """Counts of 200 cells in 400 regions, each seen in a few."""
    dense = some(200, 400, density=0.03).toarray()
    dense[np.arange(400) % 200, np.arange(400)] += 1
    return dense


@pytest.mark.parametrize("options", [{}, {"encoder_input": "log"}, {"likelihood": "poisson"}])
def test_the_loss_does_not_depend_on_the_format(options: dict):
    dense = some_of_each()
    losses = []
    for x in (sp.csr_matrix(dense), dense):
        adata = ad.AnnData(x)
        adata.obs["b"] = ["u", "v"] * 100
        model = PEAKVI.from_anndata(adata, batch_key="b", counts="fragments", dropout_rate=0.0, **options)
        batch = load_batch(model.datasets, {"main": np.arange(200)}, model.device)
        assert (SparseRows.of(batch["x"]) is None) == isinstance(x, np.ndarray)
        model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            loss = model(batch)
        gradient = torch.autograd.grad(loss, model.encoder.network.layers[0].linear.rows)[0]
        losses.append((loss.detach(), gradient))
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_nor_does_training(tmp_path):
    """The same draws, so that only the rounding of sums differs; from a file too."""
    dense = some_of_each()
    adata = ad.AnnData(sp.csr_matrix(dense))
    adata.obs["b"] = ["u", "v"] * 100
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    spaces = []
    for one in (adata, ad.AnnData(dense, obs=adata.obs), backed):
        model = PEAKVI.from_anndata(one, batch_key="b", counts="fragments")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spaces.append(model.fit(2, progress=False, device="cpu").get_latent_representation())
    backed.file.close()
    for other in spaces[1:]:
        np.testing.assert_allclose(other, spaces[0], rtol=1e-3, atol=1e-3)


def test_a_tensor_that_was_written_to_has_no_rows():
    x = Matrix(some()).tensor(np.arange(20))
    assert SparseRows.of(x) is not None
    x[:, :100] = 0
    assert SparseRows.of(x) is None


def test_explicit_zeros_are_no_values():
    parts = sp.csr_matrix((np.array([1, 0], np.float32), np.array([1, 40]), np.array([0, 1, 2])), (2, 60))
    assert SparseRows.of(Matrix(parts).tensor(np.arange(2))).matrix.nnz == 1


def test_weights_of_a_linear_map_can_be_loaded():
    """Models that were saved before have the weight as ``nn.Linear`` has it."""
    plain, layer = nn.Linear(7, 4), SparseLinear(7, 4)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight)
    assert layer.rows.is_contiguous()
    with pytest.raises(RuntimeError, match="rows"):
        layer.load_state_dict({"bias": plain.bias})


def test_second_derivatives_are_refused():
    layer = SparseLinear(300, 8)
    out = layer(SparseRows(some())).square().sum()
    first = torch.autograd.grad(out, layer.rows, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_network_for_tensors_says_so():
    with pytest.raises(TypeError, match="sparse=True"):
        MLP(300, 8)(SparseRows(some()))
