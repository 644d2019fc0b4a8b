"""Rows come out right: any storage, any order of cells and genes, and never of changed data."""

import warnings

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch
from toy import make_adata
from toy_models import Factors, Proteins

from pyrosc.data import (
    Batch,
    Categorical,
    CategoricalCovariates,
    ContinuousCovariates,
    Counts,
    DataError,
    Dataset,
    Field,
    Index,
    Labels,
    Protein,
    ProteinMask,
    Registry,
    SizeFactor,
    Values,
)
from pyrosc.data.inputs import _dense_on

ORDERS = {
    "all": np.arange(60),
    "unsorted": np.array([7, 2, 59, 0, 30]),
    "repeated": np.array([5, 5, 2, 40, 2]),
    "consecutive": np.arange(10, 20),
    "backwards": np.arange(20, 10, -1),
    "one": np.array([33]),
    "none": np.zeros(0, np.int64),
}


def make(adata, fields=None, modalities=None, **keys):
    fields = {"x": Counts} if fields is None else fields
    named = {
        n: f if f.keyword or f.kind in ("index", "mask") else f(keyword=f"{n}_key") for n, f in fields.items()
    }
    return Dataset(adata, Registry.from_data(adata, named, keys, modalities=modalities), "Toy")


# -- storage ------------------------------------------------------------------------------------------


MEMORY = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "dense": lambda x: x,
    "fortran": np.asfortranarray,
}


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64, np.uint16])
def test_rows_in_memory(kind, dtype):
    adata = make_adata(60)
    expected = adata.X.toarray()
    adata.X = MEMORY[kind](expected.astype(dtype))
    dataset = make(adata)
    assert not dataset.on_disk
    for index in ORDERS.values():
        found = dataset[index]["x"]
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), expected[index])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same 60 cells in h5ad files and zarr folders: CSR, CSC and dense."""
    folder = tmp_path_factory.mktemp("stored")
    found = {}
    for name, convert in {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda x: x}.items():
        adata = make_adata(60)
        adata.X = convert(adata.X.toarray())
        adata.write_h5ad(folder / f"{name}.h5ad")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata announces changes of its own defaults
            adata.write_zarr(folder / f"{name}.zarr")
        found[name] = folder / name
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_rows_of_a_backed_file(files, kind, order):
    expected, index = make_adata(60).X.toarray(), ORDERS[order]
    adata = ad.read_h5ad(files[kind].with_suffix(".h5ad"), backed="r")
    dataset = make(adata)
    assert dataset.on_disk
    np.testing.assert_array_equal(dataset[index]["x"].numpy(), expected[index])
    np.testing.assert_array_equal(dataset.matrices["x"].sparse_rows(index).toarray(), expected[index])
    np.testing.assert_allclose(dataset.summary().gene_sums, expected.sum(0))
    dataset.verify()
    adata.file.close()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_rows_of_a_zarr_store(files, kind, order):
    zarr = pytest.importorskip("zarr")
    expected, index = make_adata(60).X.toarray(), ORDERS[order]
    stored = zarr.open(files[kind].with_suffix(".zarr"), mode="r")["X"]
    x = ad.io.sparse_dataset(stored) if kind != "dense" else stored
    full = make_adata(60)
    dataset = make(ad.AnnData(x, obs=full.obs, var=full.var))
    np.testing.assert_array_equal(dataset[index]["x"].numpy(), expected[index])


@pytest.mark.parametrize("order", ["unsorted", "repeated", "none"])
@pytest.mark.parametrize("kind", MEMORY)
def test_sparse_rows_made_dense_on_a_device(kind, order):
    adata, index = make_adata(60), ORDERS[order]
    expected = adata.X.toarray()
    adata.X = MEMORY[kind](expected.astype(np.float64))
    found = _dense_on(make(adata).matrices["x"].sparse_rows(index), torch.device("cpu"))
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected[index])


def test_a_view(toy_adata):
    chosen = np.array([50, 3, 20, 21, 7])
    view = toy_adata[chosen, np.arange(0, 40, 2)]
    dataset = make(view, {"x": Counts, "batch": Batch}, batch_key="batch")
    batch = dataset[np.array([4, 0])]
    np.testing.assert_array_equal(batch["x"].numpy(), toy_adata.X.toarray()[[7, 50]][:, ::2])
    expected = toy_adata.obs["batch"].cat.codes.to_numpy()[[7, 50]]
    np.testing.assert_array_equal(batch["batch"].numpy(), expected)
    assert view.is_view


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_a_view_of_a_backed_file(files, kind):
    adata = ad.read_h5ad(files[kind].with_suffix(".h5ad"), backed="r")
    keep = np.arange(60) % 3 == 0
    dataset = make(adata[keep])
    expected = make_adata(60).X.toarray()[keep]
    np.testing.assert_array_equal(dataset[np.array([9, 1, 1])]["x"].numpy(), expected[[9, 1, 1]])
    adata.file.close()


def test_a_layer(toy_adata):
    toy_adata.X = toy_adata.X * 0.5
    found = make(toy_adata, layer="counts")[np.arange(3)]["x"]
    np.testing.assert_array_equal(found.numpy(), toy_adata.layers["counts"][:3].toarray())


def test_all_fields_come_in_the_order_of_the_model(toy_adata):
    toy_adata.obs["size"] = np.linspace(0.5, 2, 200)
    fields = {
        "batch": Batch,
        "numbers": ContinuousCovariates,
        "x": Counts,
        "labels": Labels,
        "covariates": CategoricalCovariates,
        "size": SizeFactor,
        "truth": Values,
        "cell": Index,
    }
    dataset = make(
        toy_adata,
        fields,
        batch_key="batch",
        labels_key="label",
        categorical_covariate_keys=["donor", "batch"],
        continuous_covariate_keys=["age"],
        size_factor_key="size",
        truth_key="truth",
    )
    batch = dataset[np.array([10, 4])]
    assert list(batch) == list(fields)
    shapes = {n: tuple(v.shape) for n, v in batch.items()}
    assert shapes == {
        "batch": (2,),
        "numbers": (2, 1),
        "x": (2, 40),
        "labels": (2,),
        "covariates": (2, 2),
        "size": (2,),
        "truth": (2, 40),
        "cell": (2,),
    }
    dtypes = {n: v.dtype for n, v in batch.items()}
    whole = {"batch", "labels", "covariates", "cell"}
    assert dtypes == {n: torch.int64 if n in whole else torch.float32 for n in fields}
    np.testing.assert_allclose(batch["size"], toy_adata.obs["size"].iloc[[10, 4]], rtol=1e-6)
    np.testing.assert_array_equal(batch["truth"], toy_adata.obsm["truth"][[10, 4]])
    np.testing.assert_array_equal(batch["cell"], [10, 4])
    np.testing.assert_array_equal(
        batch["covariates"],
        np.stack([toy_adata.obs[c].cat.codes.iloc[[10, 4]] for c in ("donor", "batch")], 1),
    )


def test_absent_fields_have_their_documented_shapes(toy_adata):
    fields = {
        "batch": Batch,
        "labels": Labels,
        "covariates": CategoricalCovariates,
        "numbers": ContinuousCovariates,
        "size": SizeFactor,
        "number": Field("continuous", optional=True),
        "y": Field("protein", "protein_key", optional=True),
        "m": ProteinMask(of="y"),
    }
    batch = make(toy_adata, fields)[np.arange(3)]
    assert batch["batch"].tolist() == [0, 0, 0]
    assert batch["labels"].tolist() == [-1, -1, -1]
    assert batch["covariates"].shape == batch["numbers"].shape == (3, 0)
    assert batch["size"].tolist() == [1, 1, 1]
    assert batch["number"].tolist() == [0, 0, 0]
    assert batch["y"].shape == batch["m"].shape == (3, 0)
    assert batch["y"].dtype == torch.float32
    assert batch["m"].dtype == torch.bool


# -- genes and categories of other data -----------------------------------------------------------------


def test_genes_are_matched_by_name(toy_adata):
    registry = make(toy_adata).registry
    order = np.random.default_rng(0).permutation(40)
    other = toy_adata[:, order].copy()
    extra = ad.AnnData(
        np.full((200, 3), 7.0, np.float32), obs=other.obs, var=pd.DataFrame(index=["u", "v", "w"])
    )
    wide = ad.concat([extra, other], axis=1, merge="same")
    wide.X = sp.csr_matrix(wide.X)
    for adata in (other, wide):
        dataset = Dataset(adata, registry)
        np.testing.assert_array_equal(dataset[np.arange(9)]["x"].numpy(), toy_adata.X[:9].toarray())
        np.testing.assert_array_equal(
            dataset.matrices["x"].sparse_rows(np.arange(9)).toarray(), toy_adata.X[:9].toarray()
        )
        np.testing.assert_allclose(dataset.summary().gene_sums, np.asarray(toy_adata.X.sum(0)).ravel())


def test_missing_genes_are_named(toy_adata):
    registry = make(toy_adata).registry
    few = toy_adata[:, 3:].copy()
    message = r"lack 3 of the 40 genes of the model: 'gene_0', 'gene_1', 'gene_2'.*symbols or Ensembl"
    with pytest.raises(DataError, match=message):
        Dataset(few, registry)


def test_genes_named_twice_are_an_error(toy_adata):
    registry = make(toy_adata).registry
    toy_adata.var_names = ["gene_0"] + [f"gene_{i}" for i in range(39)]
    with pytest.raises(
        DataError, match=r"var_names are not unique \('gene_0'\); call adata.var_names_make_unique"
    ):
        Dataset(toy_adata, registry)


def test_unseen_categories_are_named_with_their_cells(toy_adata):
    registry = make(toy_adata, {"batch": Batch}, batch_key="batch").registry
    other = toy_adata[:10].copy()
    other.obs["batch"] = ["new"] * 2 + ["batch_0"] * 8
    message = (
        r"obs\['batch'\] has categories that Toy was not made with: 'new', in 2 cells \(first: 'cell_0', "
        r"'cell_1'\). It knows 'batch_0', 'batch_1'"
    )
    with pytest.raises(DataError, match=message):
        Dataset(other, registry, "Toy")


def test_missing_categories_are_named_with_their_cells(toy_adata):
    toy_adata.obs.loc["cell_4", "batch"] = None
    with pytest.raises(
        DataError, match=r"obs\['batch'\] is missing for 1 cells \(first: 'cell_4'\); fill it in"
    ):
        make(toy_adata, {"batch": Categorical}, batch_key="batch")


def test_query_data_need_no_labels(toy_adata):
    registry = make(toy_adata, {"labels": Labels}, labels_key="label").registry
    query = toy_adata[:5].copy()
    del query.obs["label"]
    assert Dataset(query, registry)[np.arange(5)]["labels"].tolist() == [-1] * 5


# -- protein, MuData, single cells ----------------------------------------------------------------------


def proteins(n=60):
    values = np.random.default_rng(1).poisson(5.0, (n, 5)).astype(np.float64)
    values[: n // 3, 1] = np.nan
    return pd.DataFrame(
        values, columns=["CD3", "CD4", "CD8", "CD19", "CD56"], index=[f"cell_{i}" for i in range(n)]
    )


@pytest.mark.parametrize("frame", [True, False])
def test_unmeasured_proteins_are_masked(frame):
    adata, table = make_adata(60), proteins()
    adata.obsm["adt"] = table if frame else table.to_numpy()
    adata.uns["adt_names"] = list(table.columns)
    dataset = make(adata, {"y": Protein, "m": ProteinMask(of="y")}, protein_key="adt")
    index = np.array([50, 3])
    batch = dataset[index]
    np.testing.assert_array_equal(batch["m"].numpy(), ~np.isnan(table.to_numpy()[index]))
    np.testing.assert_array_equal(batch["y"].numpy(), np.nan_to_num(table.to_numpy()[index]))
    assert dataset.registry.var_names("y") == ("CD3", "CD4", "CD8", "CD19", "CD56")


def test_proteins_are_matched_by_name():
    adata, table = make_adata(60), proteins()
    adata.obsm["adt"] = table
    dataset = make(adata, {"y": Protein}, protein_key="adt")
    other = make_adata(60)
    other.obsm["adt"] = table[["CD56", "CD19", "CD8", "CD4", "CD3"]]
    again = Dataset(other, dataset.registry)
    np.testing.assert_array_equal(again.codes("y"), dataset.codes("y"))
    other.obsm["adt"] = table[["CD19", "CD8"]]
    with pytest.raises(DataError, match=r"obsm\['adt'\] lacks the columns 'CD3', 'CD4', 'CD56'"):
        Dataset(other, dataset.registry)


def multi(shuffled=False, n_adt=60):
    rna, table = make_adata(60), proteins().fillna(0).iloc[:n_adt]
    adt = ad.AnnData(
        table.to_numpy(np.float32), obs=pd.DataFrame(index=table.index), var=pd.DataFrame(index=table.columns)
    )
    if shuffled:
        adt = adt[::-1].copy()
    data = md.MuData({"rna": rna, "adt": adt})
    data.obs["site"] = np.array(["s0", "s1"])[np.arange(60) % 2]
    return data


TWO = {"x": Counts(modality="rna"), "y": Counts(keyword="protein_layer", modality="adt"), "batch": Batch}


def test_fields_of_a_mudata():
    data = multi()
    dataset = make(data, TWO, modalities={"batch": "rna"}, layer="counts", batch_key="batch")
    batch = dataset[np.array([9, 2])]
    np.testing.assert_array_equal(batch["x"].numpy(), data["rna"].X.toarray()[[9, 2]])
    np.testing.assert_array_equal(batch["y"].numpy(), data["adt"].X[[9, 2]])
    np.testing.assert_array_equal(batch["batch"].numpy(), data["rna"].obs["batch"].cat.codes.iloc[[9, 2]])
    assert dataset.registry.fields["x"].where == "mod['rna'].layers['counts']"
    assert Registry.from_json(dataset.registry.to_json()) == dataset.registry


def test_a_field_without_modality_is_mudata_s_own_column():
    dataset = make(multi(), TWO, batch_key="site")
    assert dataset.registry.categories("batch") == ("s0", "s1")
    np.testing.assert_array_equal(dataset.codes("batch"), np.arange(60) % 2)


def test_counts_of_a_mudata_need_a_modality():
    with pytest.raises(DataError, match=r"'x' .*modalities=\{'x': 'rna'\}"):
        make(multi(), {"x": Counts})


def test_a_modality_that_is_not_there():
    with pytest.raises(DataError, match=r"no modality 'atac'; it has 'rna', 'adt'"):
        make(multi(), {"x": Counts(modality="atac")})
    with pytest.raises(TypeError, match="modalities names 'nope'"):
        make(multi(), TWO, modalities={"nope": "rna"})


def test_a_modality_named_for_an_anndata(toy_adata):
    with pytest.raises(DataError, match="the data are an AnnData, not a MuData"):
        make(toy_adata, {"x": Counts}, modalities={"x": "rna"})


@pytest.mark.parametrize(
    "data", [multi(shuffled=True), multi(n_adt=50)], ids=["another order", "fewer cells"]
)
def test_modalities_must_hold_the_same_cells_in_the_same_order(data):
    with pytest.raises(DataError, match=r"modality 'adt' .*other cells, or .* another order.*adt.*obs_names"):
        make(data, TWO)


def test_a_model_of_a_mudata_from_end_to_end():
    data = multi()
    data["rna"].obsm["adt"] = proteins()
    model = Proteins.from_anndata(data, modalities={"x": "rna", "y": "rna"}, protein_key="adt")
    model.fit(max_epochs=2, progress=False)
    z = model.get_latent_representation()
    assert z.shape == (60, 2)
    alone = Proteins.from_anndata(data["rna"], protein_key="adt").fit(max_epochs=2, progress=False)
    np.testing.assert_array_equal(z, alone.get_latent_representation())
    assert np.isfinite(model.history["elbo_validation"]).all()


def test_single_cells_are_aligned_by_name(toy_adata):
    registry = make(toy_adata, {"x": Counts, "cell": Index}).registry
    chosen = np.array([9, 4, 150])
    assert Dataset(toy_adata[chosen], registry)[np.arange(3)]["cell"].tolist() == chosen.tolist()


def test_single_cells_that_are_not_known(toy_adata):
    registry = make(toy_adata, {"x": Counts, "cell": Index}).registry
    other = toy_adata[:3].copy()
    other.obs_names = ["cell_0", "stranger", "cell_2"]
    with pytest.raises(DataError, match=r"it knows nothing of 'stranger'\. Make a new model"):
        Dataset(other, registry)


# -- data that change -----------------------------------------------------------------------------------


def _normalize(adata):
    sc.pp.normalize_total(adata, target_sum=1e4)


def _log(adata):
    sc.pp.log1p(adata)


def _scale_a_few(adata):
    if sp.issparse(adata.X):
        adata.X.data[:40] *= 2
    else:
        adata.X[0] *= 2


def _drop_cells(adata):
    adata._inplace_subset_obs(np.arange(50))


@pytest.mark.parametrize("change", [_normalize, _log, _scale_a_few, _drop_cells])
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_a_matrix_that_was_changed(toy_adata, change, kind):
    toy_adata.X = MEMORY[kind](toy_adata.X.toarray())
    dataset = make(toy_adata)
    dataset.verify()
    change(toy_adata)
    with pytest.raises(
        DataError, match=r"X has changed since Toy was made .*normalize_total.*layers\['counts'\]"
    ):
        dataset.verify()


def test_a_matrix_of_the_same_values_has_not_changed(toy_adata):
    dataset = make(toy_adata)
    toy_adata.X = toy_adata.X.toarray()
    dataset.verify()


def test_fit_and_posterior_notice_the_change(toy_adata):
    model = Factors.from_anndata(toy_adata, batch_key="batch")
    sc.pp.normalize_total(toy_adata)
    for action in (model.fit, model.get_latent_representation, model.annotate):
        with pytest.raises(DataError, match=r"X has changed since Factors was made"):
            action()


def test_a_registered_layer_does_not_mind(toy_adata):
    model = Factors.from_anndata(toy_adata, layer="counts", batch_key="batch")
    sc.pp.normalize_total(toy_adata)
    model.fit(max_epochs=1, progress=False)


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_the_user_s_data_are_never_changed(toy_adata, kind):
    toy_adata.X = MEMORY[kind](toy_adata.X.toarray().astype(np.int64))
    toy_adata.obs["text"] = np.array(["b", "a"], object)[np.arange(200) % 2]
    before = toy_adata.copy()
    model = Factors.from_anndata(toy_adata, batch_key="text").fit(max_epochs=1, progress=False)
    model.posterior(["z", "rho"], n_samples=2, do={"text": "a"})
    model.get_elbo(adata=toy_adata[:20])
    assert type(toy_adata.X) is type(before.X)
    assert toy_adata.X.dtype == before.X.dtype
    assert toy_adata.obs["text"].dtype == object
    pd.testing.assert_frame_equal(toy_adata.obs, before.obs)
    pd.testing.assert_frame_equal(toy_adata.var, before.var)
    for one, other in ((toy_adata.X, before.X), (toy_adata.layers["counts"], before.layers["counts"])):
        np.testing.assert_array_equal(
            np.asarray(sp.csr_matrix(one).todense()), sp.csr_matrix(other).toarray()
        )
    np.testing.assert_array_equal(toy_adata.obsm["truth"], before.obsm["truth"])
    assert set(toy_adata.obsm) == set(before.obsm)
    assert set(toy_adata.layers) == set(before.layers)
    assert toy_adata.uns == before.uns


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_training_from_a_backed_file_equals_training_in_memory(files, kind):
    path = files[kind].with_suffix(".h5ad")
    backed = ad.read_h5ad(path, backed="r")
    found = [
        Factors.from_anndata(adata, batch_key="batch")
        .fit(max_epochs=2, progress=False)
        .get_latent_representation()
        for adata in (backed, ad.read_h5ad(path))
    ]
    np.testing.assert_array_equal(*found)
    backed.file.close()
