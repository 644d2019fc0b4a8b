"""Results in an AnnData: under their documented keys, with where they came from."""

import json
import warnings
from typing import ClassVar

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from toy import make_adata
from toy_models import Factors, Rates, TwoSources

import pyrosc


@pytest.fixture
def model(toy_adata):
    model = Factors.from_anndata(toy_adata, layer="counts", batch_key="batch", n_latent=4)
    return model.fit(2, early_stopping=False, progress=False)


def test_the_standard_results(model, toy_adata):
    assert model.annotate() is toy_adata
    np.testing.assert_array_equal(toy_adata.obsm["X_factors"], model.get_latent_representation())
    np.testing.assert_allclose(toy_adata.obs["factors_library"], toy_adata.layers["counts"].sum(1).A1)
    assert set(toy_adata.layers) == {"counts"}


def test_the_function_and_the_method_are_one(model, toy_adata):
    other = toy_adata.copy()
    assert pyrosc.annotate(model, other) is other
    np.testing.assert_array_equal(other.obsm["X_factors"], model.annotate().obsm["X_factors"])


def test_nothing_else_changes(model, toy_adata):
    before = toy_adata.copy()
    model.annotate()
    assert set(toy_adata.obsm) - set(before.obsm) == {"X_factors"}
    assert set(toy_adata.uns) - set(before.uns) == {"pyrosc"}
    pd.testing.assert_frame_equal(toy_adata.obs.drop(columns="factors_library"), before.obs)
    pd.testing.assert_frame_equal(toy_adata.var, before.var)
    assert (toy_adata.X != before.X).nnz == 0
    assert (toy_adata.layers["counts"] != before.layers["counts"]).nnz == 0
    np.testing.assert_array_equal(toy_adata.obsm["truth"], before.obsm["truth"])
    assert not toy_adata.varm
    assert not toy_adata.obsp


def test_where_results_came_from(model, toy_adata):
    record = model.annotate().uns["pyrosc"]["Factors"]
    assert record["model"] == "Factors"
    assert json.loads(record["options"]) == {"n_latent": 4, "widths": [16]}
    assert json.loads(record["fields"]) == {"x": ["layers['counts']"], "batch": ["obs['batch']"]}
    assert record["written"].tolist() == ["obsm/X_factors", "obs/factors_library"]
    assert record["epochs"] == 2
    assert record["elbo_validation"] == pytest.approx(model.history["elbo_validation"].iloc[-1])
    assert {"pyrosc", "torch", "pyro-ppl"} <= set(record["versions"])


@pytest.mark.parametrize("stored", ["h5ad", "zarr"])
def test_results_survive_files(model, toy_adata, stored, tmp_path):
    model.annotate(layers=True)
    model.annotate(key_added="again")
    path = tmp_path / f"data.{stored}"
    if stored == "h5ad":
        toy_adata.write_h5ad(path)
        found = ad.read_h5ad(path)
    else:
        pytest.importorskip("zarr")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata announces changes of its own defaults
            toy_adata.write_zarr(path)
            found = ad.read_zarr(path)
    for key in ("X_factors", "X_again"):
        np.testing.assert_array_equal(found.obsm[key], toy_adata.obsm[key])
    np.testing.assert_array_equal(found.obs["factors_library"], toy_adata.obs["factors_library"])
    np.testing.assert_array_equal(found.layers["factors_rho"], toy_adata.layers["factors_rho"])
    assert set(found.uns["pyrosc"]) == {"Factors", "again"}
    for name, record in toy_adata.uns["pyrosc"].items():
        again = found.uns["pyrosc"][name]
        assert set(again) == set(record)
        assert list(again["written"]) == list(record["written"])
        assert again["versions"] == record["versions"]
        assert json.loads(again["options"]) == json.loads(record["options"])
    model.annotate(found)  # and can be written over


def test_results_of_an_untrained_model_survive_files(toy_adata, tmp_path):
    Factors.from_anndata(toy_adata, batch_key="batch").annotate().write_h5ad(tmp_path / "data.h5ad")
    assert ad.read_h5ad(tmp_path / "data.h5ad").uns["pyrosc"]["Factors"]["epochs"] == 0


def test_scanpy_takes_the_latent_space(model, toy_adata):
    model.annotate()
    sc.pp.neighbors(toy_adata, use_rep="X_factors", n_neighbors=10)
    assert toy_adata.obsp["connectivities"].shape == (200, 200)


def test_another_name(model, toy_adata):
    model.annotate(key_added="run2", layers=True)
    assert "X_run2" in toy_adata.obsm
    assert "run2_library" in toy_adata.obs
    assert "run2_rho" in toy_adata.layers
    assert "X_factors" not in toy_adata.obsm
    assert set(toy_adata.uns["pyrosc"]) == {"run2"}
    model.annotate()
    assert set(toy_adata.uns["pyrosc"]) == {"run2", "Factors"}


def test_layers_follow_the_genes_of_the_data(model, toy_adata):
    order = np.random.default_rng(0).permutation(40)
    other = toy_adata[:30, order].copy()
    model.annotate(other, layers=True)
    expected = model.posterior("rho", indices=np.arange(30))["rho"][:, order]
    np.testing.assert_allclose(other.layers["factors_rho"], expected, rtol=1e-5)
    frame = model.get_normalized_expression(other)
    np.testing.assert_allclose(other.layers["factors_rho"], frame[list(other.var_names)], rtol=1e-6)


def test_layers_need_the_genes_of_the_model(model, toy_adata):
    extra = ad.AnnData(np.ones((200, 1), np.float32), obs=toy_adata.obs[[]], var=pd.DataFrame(index=["more"]))
    extra.layers["counts"] = extra.X.copy()
    wide = ad.concat([toy_adata, extra], axis=1, merge="first")
    with pytest.raises(ValueError, match="adata has 41 genes, the model 40"):
        model.annotate(wide, layers=True)
    assert "X_factors" not in wide.obsm
    model.annotate(wide)
    assert wide.obsm["X_factors"].shape == (200, 4)


@pytest.mark.parametrize("sites", ["rho", ["rho"]])
def test_chosen_sites(model, toy_adata, sites):
    model.annotate(sites=sites)
    assert "factors_rho" in toy_adata.layers
    assert "X_factors" not in toy_adata.obsm


def test_a_site_without_a_slot(model):
    with pytest.raises(KeyError, match=r"Factors.slots has no site 'x'; it has 'z', 'library', 'rho'"):
        model.annotate(sites=["x"])


def test_a_model_without_slots(toy_adata):
    with pytest.raises(ValueError, match="Rates has no slots"):
        Rates.from_anndata(toy_adata).annotate()


def test_a_view_becomes_data_of_its_own(model, toy_adata):
    view = toy_adata[:20]
    with pytest.warns(ad.ImplicitModificationWarning):
        model.annotate(view)
    assert view.obsm["X_factors"].shape == (20, 4)
    assert "X_factors" not in toy_adata.obsm


def test_results_of_one_of_several_data_sets():
    class Joint(TwoSources):
        slots: ClassVar = {"z_seq": "obsm/X_joint", "z_spatial": "obsm/X_joint"}

    two = {"seq": make_adata(40, 10), "spatial": make_adata(30, 10, seed=1)}
    model = Joint.from_anndatas(two).fit(1, progress=False)
    for source, adata in two.items():
        assert model.annotate(source=source) is adata
        expected = model.posterior(f"z_{source}", source=source)[f"z_{source}"]
        np.testing.assert_array_equal(adata.obsm["X_joint"], expected)
        assert list(adata.uns["pyrosc"]["Joint"]["written"]) == ["obsm/X_joint"]
    other = two["spatial"][:5].copy()
    other.obsm.clear()
    model.annotate(other, source="spatial")
    np.testing.assert_allclose(other.obsm["X_joint"], two["spatial"].obsm["X_joint"][:5], atol=1e-6)
    with pytest.raises(ValueError, match=r"name the data source: source= one of \['seq', 'spatial'\]"):
        model.annotate()
