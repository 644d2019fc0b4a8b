"""Totals over all genes for models that read few of them, and reading few columns of a wide matrix."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from toy import make_adata

from pyrosc.data import DataError, Dataset, DataWarning, Registry, schema
from pyrosc.data.matrix import Matrix
from pyrosc.data.preflight import preflight
from pyrosc.data.schema import Counts, Total

GENES = ["gene_3", "gene_1"]


def few(x: Counts, total: Total): ...


def registered(adata: ad.AnnData, **keys) -> Dataset:
    return Dataset(adata, Registry.from_data(adata, schema(few), keys).restrict(GENES), "few")


def test_a_total_sums_all_genes_of_the_same_matrix():
    adata = make_adata()
    adata.layers["counts"] = adata.X * 2
    for keys, matrix in (({}, adata.X), ({"layer": "counts"}, adata.layers["counts"])):
        batch = registered(adata, **keys)[np.array([5, 2])]
        np.testing.assert_allclose(batch["total"], np.asarray(matrix.sum(1)).ravel()[[5, 2]])
        np.testing.assert_allclose(batch["x"], matrix[[5, 2]].toarray()[:, [3, 1]])


def test_the_state_of_a_total_survives_json():
    registry = registered(make_adata(), layer="counts").registry
    assert Registry.from_json(registry.to_json()) == registry
    assert registry.fields["total"].n_summed == 40
    assert registry.fields["total"].where == "layers['counts']"


def test_a_total_must_know_its_counts():
    def two(x: Counts, y: Counts(keyword="y_layer"), total: Total): ...

    def tied(x: Counts, y: Counts(keyword="y_layer"), total: Total(of="y")): ...

    with pytest.raises(TypeError, match=r"must say which counts it sums.*Total\(of='x'\)"):
        schema(two)
    assert schema(tied)["total"].of == "y"


def test_cells_without_any_counts_are_an_error_and_fewer_genes_a_warning():
    adata = make_adata()
    dataset = registered(adata)
    preflight(dataset, {"x": "panel"})
    with pytest.warns(DataWarning, match="10 genes, few was made with 40"):
        preflight(Dataset(adata[:, :10].copy(), dataset.registry, "few"), {"x": "panel"}, query=True)
    x = adata.X.toarray()
    x[7] = 0
    empty = ad.AnnData(sp.csr_matrix(x), adata.obs, adata.var)
    with pytest.raises(DataError, match=r"1 cells have no counts in X \(first: 'cell_7'\)"):
        preflight(registered(empty), {"x": "panel"})


def test_a_panel_may_miss_cells():
    adata = make_adata()
    x = adata.X.toarray()
    x[7, [1, 3]] = 0
    adata.X = sp.csr_matrix(x)
    preflight(registered(adata), {"x": "panel"})
    with pytest.raises(DataError, match="no counts"):
        preflight(registered(adata))


@pytest.mark.parametrize("make", [sp.csr_matrix, sp.csc_matrix, sp.coo_matrix, np.asarray, sp.csr_array])
def test_few_columns_are_read_alike_from_any_format(make):
    rng = np.random.default_rng(0)
    dense = rng.poisson(0.5, (30, 50)).astype(np.float32)
    take, index = np.array([40, 3, 7]), np.array([4, 29, 0, 4])
    matrix = Matrix(make(dense), take)
    before = matrix.fingerprint()
    np.testing.assert_array_equal(matrix.rows(index), dense[index][:, take])
    matrix.narrow()
    np.testing.assert_array_equal(matrix.rows(index), dense[index][:, take])
    np.testing.assert_array_equal(matrix.sparse_rows(index).toarray(), dense[index][:, take])
    np.testing.assert_allclose(matrix.row_sums(), dense[:, take].sum(1))
    assert matrix.fingerprint() == before
    assert matrix.rows(index).dtype == np.float32


def test_a_changed_matrix_is_noticed_after_narrowing():
    adata = make_adata()
    dataset = registered(adata)
    dataset.verify()
    adata.X.data[:] *= 2
    with pytest.raises(DataError, match="X has changed"):
        dataset.verify()
