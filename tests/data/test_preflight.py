"""What is wrong with data is said before training, with the column, the cells and the remedy."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from toy import make_adata
from toy_models import Factors

from pyrosc.data import (
    Batch,
    CategoricalCovariates,
    ContinuousCovariates,
    Counts,
    DataError,
    Dataset,
    DataWarning,
    Labels,
    Protein,
    Registry,
    SizeFactor,
    Values,
    preflight,
)

FIELDS = {
    "x": Counts,
    "batch": Batch,
    "labels": Labels,
    "covariates": CategoricalCovariates,
    "numbers": ContinuousCovariates,
    "size": SizeFactor,
}


def check(adata, fields=FIELDS, *, support=None, query=False, unlabeled=None, standardize=True, **keys):
    registry = Registry.from_data(
        adata, fields, keys, unlabeled=unlabeled, standardize=standardize, owner="Toy"
    )
    preflight(Dataset(adata, registry, "Toy"), support, query=query)


def test_good_data_pass_in_silence(toy_adata):
    check(
        toy_adata,
        batch_key="batch",
        labels_key="label",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age", "stress"],
    )


# -- counts ---------------------------------------------------------------------------------------------


def dense(adata, changes):
    x = sp.csr_matrix(adata.X).toarray()
    for where, value in changes:
        x[where] = value
    return x


@pytest.mark.parametrize("convert", [sp.csr_matrix, sp.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
@pytest.mark.parametrize(("value", "kind"), [(-3.0, "negative"), (0.5, "fractional"), (-0.5, "negative")])
def test_values_that_are_not_counts(toy_adata, value, kind, convert):
    toy_adata.layers.clear()
    toy_adata.X = convert(dense(toy_adata, [((5, 7), value), ((6, 8), value)]))
    share = 2 / np.count_nonzero(dense(toy_adata, []))
    message = (
        rf"X does not hold counts: {share:.1%} of its non-zero values are {kind} "
        rf"\(for example {value:g} in cell 'cell_\d+', gene 'gene_\d+'\)\. Raw counts are needed"
    )
    with pytest.raises(DataError, match=message) as error:
        check(toy_adata)
    assert "'cell_5', gene 'gene_7'" in str(error.value) or "'cell_6', gene 'gene_8'" in str(error.value)


@pytest.mark.parametrize("convert", [sp.csr_matrix, np.asarray], ids=["csr", "dense"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("support", ["counts", "real"])
def test_values_that_are_not_finite(toy_adata, value, convert, support):
    toy_adata.X = convert(dense(toy_adata, [((5, 7), value)]))
    message = (
        r"X holds 1 values that are NaN or infinite \(for example -?(nan|inf) in cell 'cell_5', gene 'gene_7'"
    )
    with pytest.raises(DataError, match=message):
        check(toy_adata, support={"x": support})


def test_a_likelihood_of_real_numbers_takes_them(toy_adata):
    toy_adata.X = dense(toy_adata, [((5, 7), -0.5)])
    check(toy_adata, support={"x": "real"})


def test_the_example_is_found_past_the_first_block():
    adata = ad.AnnData(sp.csr_matrix(np.ones((5000, 3), np.float32)))
    adata.X.data[4500 * 3 + 1] = 0.5
    with pytest.raises(DataError, match=r"0\.5 in cell '4500', gene '1'"):
        check(adata)


def test_the_layer_with_counts_is_pointed_at(toy_adata):
    toy_adata.X = toy_adata.X * 0.5
    toy_adata.layers["half"] = toy_adata.X.copy()
    with pytest.raises(DataError, match=r"Counts seem to be in layer='counts'$"):
        check(toy_adata)


def test_x_is_pointed_at_when_a_layer_was_named(toy_adata):
    toy_adata.layers["logs"] = toy_adata.X.log1p()
    del toy_adata.layers["counts"]
    with pytest.raises(
        DataError, match=r"layers\['logs'\] does not hold counts.*Counts seem to be in layer=None \(X\)"
    ):
        check(toy_adata, layer="logs")


def test_raw_is_pointed_at(toy_adata):
    del toy_adata.layers["counts"]
    toy_adata.raw = toy_adata
    toy_adata = toy_adata[:, :30].copy()
    toy_adata.X = toy_adata.X.log1p()
    remedy = "adata.layers['counts'] = adata.raw[:, adata.var_names].X"
    with pytest.raises(DataError, match=r"Counts seem to be in adata\.raw") as error:
        check(toy_adata)
    assert remedy in str(error.value)
    toy_adata.layers["counts"] = toy_adata.raw[:, toy_adata.var_names].X
    check(toy_adata, layer="counts")


@pytest.mark.parametrize("query", [True, False])
def test_empty_cells(toy_adata, query):
    toy_adata.X = sp.csr_matrix(dense(toy_adata, [(([3, 9, 11, 12], slice(None)), 0)]))
    message = (
        r"4 cells have no counts in X \(first: 'cell_3', 'cell_9', 'cell_11' and 1 more\); .*filter_cells"
    )
    with pytest.raises(DataError, match=message):
        check(toy_adata, query=query)


def test_genes_without_counts(toy_adata):
    toy_adata.X = sp.csr_matrix(dense(toy_adata, [((slice(None), [0, 39]), 0)]))
    message = r"2 of 40 genes have no counts in X \(first: 'gene_0', 'gene_39'\).*filter_genes"
    with pytest.warns(DataWarning, match=message):
        check(toy_adata)
    check(toy_adata, query=True)


def test_genes_named_twice(toy_adata):
    toy_adata.var_names = ["gene_1"] + [f"gene_{i}" for i in range(1, 40)]
    with pytest.raises(
        DataError, match=r"var_names are not unique \('gene_1'\); call adata.var_names_make_unique"
    ):
        check(toy_adata)


def test_very_many_genes():
    adata = ad.AnnData(sp.csr_matrix(np.ones((3, 12_000), np.float32)))
    with pytest.warns(DataWarning, match=r"12,000 genes: .*2,000-4,000 variable genes.*about 3 times"):
        check(adata)


# -- covariates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("key", ["continuous_covariate_keys", "size_factor_key"])
@pytest.mark.parametrize("query", [True, False])
def test_numbers_that_are_missing(toy_adata, value, key, query):
    toy_adata.obs["age"] = np.linspace(1, 2, 200)
    toy_adata.obs.loc[["cell_2", "cell_5"], "age"] = value
    message = r"obs\['age'\] is NaN or infinite for 2 cells \(first: 'cell_2', 'cell_5'\); fill it in"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of infinite numbers
        with pytest.raises(DataError, match=message):
            check(toy_adata, query=query, **{key: ["age"] if "keys" in key else "age"})


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_size_factors_are_positive(toy_adata, value):
    toy_adata.obs["size"] = 1.0
    toy_adata.obs.loc["cell_7", "size"] = value
    with pytest.raises(
        DataError, match=r"obs\['size'\] must be positive; it is not for 1 cells \(first: 'cell_7'\)"
    ):
        check(toy_adata, size_factor_key="size")


def test_a_constant_number(toy_adata):
    toy_adata.obs["age"] = 3.0
    with pytest.warns(DataWarning, match=r"obs\['age'\] is 3 for every cell"):
        check(toy_adata, continuous_covariate_keys=["age"])


@pytest.mark.parametrize(("standardize", "n"), [(True, 2000), (False, 200)])
def test_a_number_of_wild_scale(standardize, n):
    adata = make_adata(n, 5)
    adata.obs.loc["cell_9", "age"] = 1e6
    message = r"obs\['age'\] has a wild scale: 1e\+06 in cell 'cell_9' .*take logarithms, clip it"
    with pytest.warns(DataWarning, match=message):
        check(adata, standardize=standardize, continuous_covariate_keys=["age"])


def test_a_constant_batch(toy_adata):
    toy_adata.obs["batch"] = "one"
    with pytest.warns(
        DataWarning, match=r"obs\['batch'\] is 'one' for every cell; as a covariate it does nothing"
    ):
        check(toy_adata, batch_key="batch")


@pytest.mark.parametrize("key", ["batch_key", "categorical_covariate_keys"])
def test_a_category_with_one_cell(toy_adata, key):
    donors = toy_adata.obs["donor"].astype(str).to_numpy()
    donors[4] = "alone"
    toy_adata.obs["donor"] = donors
    message = r"obs\['donor'\] has 1 categories with a single cell \('alone'\).*merge or remove"
    with pytest.warns(DataWarning, match=message):
        check(toy_adata, **{key: ["donor"] if "keys" in key else "donor"})


def test_a_category_for_every_cell(toy_adata):
    toy_adata.obs["batch"] = toy_adata.obs_names
    with pytest.raises(DataError, match=r"obs\['batch'\] has a category of its own for every cell"):
        check(toy_adata, batch_key="batch")


# -- labels ---------------------------------------------------------------------------------------------


def test_unlabelled_cells_are_announced(toy_adata):
    toy_adata.obs.loc[toy_adata.obs_names[:5], "label"] = None
    message = r"5 of 200 cells have no label in obs\['label'\] and are taken as unlabelled"
    with pytest.warns(DataWarning, match=message):
        check(toy_adata, labels_key="label")


def test_an_unlabelled_category_that_was_named_is_not_announced(toy_adata):
    check(toy_adata, labels_key="label", unlabeled="T")


def test_missing_labels_are_announced_beside_a_named_category(toy_adata):
    toy_adata.obs.loc[toy_adata.obs_names[:5], "label"] = None
    with pytest.warns(DataWarning, match="5 of 200 cells have no label"):
        check(toy_adata, labels_key="label", unlabeled="T")


def test_no_cell_is_labelled(toy_adata):
    toy_adata.obs["label"] = "T"
    with pytest.raises(DataError, match=r"obs\['label'\] labels no cell"):
        check(toy_adata, labels_key="label", unlabeled="T")


# -- obsm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_proteins_that_are_not_counts(toy_adata, value):
    toy_adata.obsm["adt"] = pd.DataFrame(1.0, index=toy_adata.obs_names, columns=["CD3", "CD4"])
    toy_adata.obsm["adt"].iloc[8, 1] = value
    with pytest.raises(
        DataError, match=rf"obsm\['adt'\] does not hold counts: {value:g} in cell 'cell_8', protein 'CD4'"
    ):
        check(toy_adata, {"y": Protein}, protein_key="adt")


def test_values_that_are_missing(toy_adata):
    toy_adata.obsm["truth"][4, 2] = np.nan
    with pytest.raises(
        DataError, match=r"obsm\['truth'\] is NaN or infinite for 1 cells \(first: 'cell_4'\)"
    ):
        check(toy_adata, {"y": Values(keyword="truth_key")}, truth_key="truth")


def test_a_table_of_text_is_an_error(toy_adata):
    toy_adata.obsm["adt"] = pd.DataFrame({"CD3": "high"}, index=toy_adata.obs_names)
    with pytest.raises(DataError, match=r"obsm\['adt'\] must be numbers; .*'CD3'"):
        check(toy_adata, {"y": Protein}, protein_key="adt")


# -- when -----------------------------------------------------------------------------------------------


def test_query_data_are_not_warned_about(toy_adata):
    registry = Registry.from_data(
        toy_adata,
        FIELDS,
        {"batch_key": "batch", "labels_key": "label", "continuous_covariate_keys": ["age"]},
    )
    query = toy_adata[[3]].copy()  # a single cell: constant batch, constant age, silent genes
    query.obs.loc[:, "label"] = None
    preflight(Dataset(query, registry), query=True)
    preflight(Dataset(toy_adata[[]].copy(), registry), query=True)


def test_a_model_warns_once(toy_adata):
    toy_adata.obs["batch"] = "one"
    with pytest.warns(DataWarning, match="for every cell") as found:
        model = Factors.from_anndata(toy_adata, batch_key="batch")
    assert len(found) == 1
    model.fit(max_epochs=1, progress=False)
    model.get_latent_representation()
    model.get_latent_representation(toy_adata[:3])


def test_the_warning_points_at_the_user_s_line(toy_adata):
    toy_adata.obs["batch"] = "one"
    with pytest.warns(DataWarning) as found:
        Factors.from_anndata(toy_adata, batch_key="batch")
    assert found[0].filename == __file__


def test_a_query_that_is_not_counts_is_refused(toy_adata):
    model = Factors.from_anndata(toy_adata, batch_key="batch")
    query = toy_adata[:20].copy()
    query.X = query.X * 0.3
    with pytest.raises(DataError, match=r"Counts seem to be in layer='counts'"):
        model.get_latent_representation(query)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "kang_ifnb",
            {"batch_key": "condition", "labels_key": "cell_type", "categorical_covariate_keys": ["donor"]},
        ),
        ("pbmc_3tech", {"batch_key": "donor", "labels_key": "cell_type"}),
    ],
)
def test_good_real_data_pass_in_silence(data_dir, name, keys):
    adata = ad.read_h5ad(data_dir / f"{name}.h5ad")
    check(adata[:, adata.X.getnnz(axis=0) > 0], **keys)


def test_real_data_with_all_genes_get_their_hints(data_dir):
    adata = ad.read_h5ad(data_dir / "pbmc3k.h5ad")
    with pytest.warns(DataWarning) as found:
        check(adata)
    assert len(found) == 2
    assert "have no counts in X" in str(found[0].message)
    assert "32,738 genes" in str(found[1].message)
