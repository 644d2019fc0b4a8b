"""What a registry remembers: names, categories, scales; the same whatever the order of the rows."""

import dataclasses
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from toy import make_adata

from pyrosc.data import (
    Batch,
    Categorical,
    CategoricalCovariates,
    Continuous,
    ContinuousCovariates,
    Counts,
    DataError,
    Dataset,
    Index,
    Labels,
    Protein,
    ProteinMask,
    Registry,
    SizeFactor,
    Values,
)

FIELDS = {
    "x": Counts,
    "batch": Batch,
    "labels": Labels,
    "covariates": CategoricalCovariates,
    "numbers": ContinuousCovariates,
    "size": SizeFactor,
}
KEYS = {
    "layer": "counts",
    "batch_key": "batch",
    "labels_key": "label",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age", "stress"],
}


def register(adata, fields=FIELDS, unlabeled=None, standardize=True, **keys):
    named = {
        n: f if f.keyword or f.kind in ("index", "mask") else f(keyword=f"{n}_key") for n, f in fields.items()
    }
    return Registry.from_data(adata, named, keys, unlabeled=unlabeled, standardize=standardize, owner="Toy")


def with_column(values):
    return ad.AnnData(
        np.ones((len(values), 2), np.float32), obs=pd.DataFrame({"c": values}, index=names(values))
    )


def names(values):
    return [f"cell_{i}" for i in range(len(values))]


def categories(values):
    return register(with_column(values), {"c": Categorical}, c_key="c").categories("c")


@pytest.mark.parametrize(
    "values",
    [
        ["1", "2", "1"],
        [1, 2, 1],
        [1.0, 2.0, 1.0],
        pd.Categorical([1, 2, 1]),
        pd.array([1, 2, 1], dtype="Int64"),
        pd.Series(["1", 2, 1.0], dtype=object).to_numpy(),
    ],
    ids=["text", "int", "float", "categorical", "nullable", "mixed"],
)
def test_one_is_one_is_one(values):
    assert categories(values) == ("1", "2")
    registry = register(with_column([1, 2, 1]), {"c": Categorical}, c_key="c")
    np.testing.assert_array_equal(Dataset(with_column(values), registry).codes("c"), [0, 1, 0])


def test_booleans_are_categories():
    assert categories([True, False, True]) == ("False", "True")


@pytest.mark.parametrize(
    "values",
    [
        ["b", "a", "c"],
        [10, 9, 2],
        ["10", "9", "x"],
        ["nan", "2", "10", "1", "b"],
        ["nan", "inf", "-inf", "0"],
    ],
    ids=["text", "numbers", "both", "nan", "infinite"],
)
def test_order_of_categories_does_not_depend_on_the_rows(values):
    rng = np.random.default_rng(0)
    orders = {categories([values[i] for i in rng.permutation(len(values))]) for _ in range(20)}
    assert len(orders) == 1


def test_numbers_are_sorted_by_value_before_text():
    assert categories(["10", "9", "x", "nan"]) == ("9", "10", "nan", "x")


def test_order_of_a_categorical_is_kept_and_unused_ones_are_dropped():
    values = pd.Categorical(["low", "high", "low"], categories=["low", "never", "high"])
    assert categories(values) == ("low", "high")


def test_missing_values_are_no_category():
    assert categories(["a", None, "b"]) == ("a", "b")
    assert categories([1.0, np.nan, 2.0]) == ("1", "2")


def test_json_round_trip():
    adata = make_adata()
    dataset = Dataset(adata, register(adata, **KEYS))
    registry = dataclasses.replace(dataset.registry, fingerprints=dataset.fingerprints())
    again = Registry.from_json(registry.to_json())
    assert again == registry
    assert Registry.from_dict(json.loads(json.dumps(registry.to_dict()))) == registry
    assert again.fields["covariates"].categories == (("d0", "d1", "d2"),)


def test_json_round_trip_of_cell_names():
    adata = make_adata(20)
    registry = register(adata, {"x": Counts, "cell": Index})
    assert registry.obs_names == tuple(adata.obs_names)
    assert Registry.from_json(registry.to_json()) == registry


def test_frozen():
    registry = register(make_adata(20))
    with pytest.raises(dataclasses.FrozenInstanceError):
        registry.n_obs = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        registry.fields["x"].keys = ("other",)


def test_what_models_ask():
    registry = register(make_adata(), **KEYS)
    assert registry.n_obs == 200
    assert registry.n_vars() == registry.n_vars("x") == 40
    assert registry.categories("batch") == ("batch_0", "batch_1")
    assert registry.n_categories("labels") == 3
    assert registry.categories("covariates", "donor") == ("d0", "d1", "d2")
    assert registry.keys("numbers") == ("age", "stress")
    assert not registry.given("size")
    assert registry.keys("size") == ()
    assert registry.fields["x"].where == "layers['counts']"


def test_absent_fields():
    registry = register(make_adata())
    assert registry.categories("batch") == ("all",)
    assert registry.n_categories("labels") == 0
    assert registry.keys("covariates") == ()
    assert registry.fields["x"].where == "X"


def test_extending_appends_and_keeps_codes():
    adata = make_adata()
    registry = register(adata, **KEYS)
    query = make_adata(50, seed=1)
    query.obs["batch"] = np.array(["a_new", "batch_1"])[np.arange(50) % 2]
    grown = registry.extend(query)
    assert grown.categories("batch") == ("batch_0", "batch_1", "a_new")
    assert grown.categories("labels") == registry.categories("labels")
    assert grown.fields["numbers"] == registry.fields["numbers"]
    assert grown.n_obs == 50
    np.testing.assert_array_equal(
        Dataset(adata, grown).codes("batch"), Dataset(adata, registry).codes("batch")
    )
    assert set(Dataset(query, grown).codes("batch")) == {1, 2}


def test_labels_are_not_extended():
    registry = register(make_adata(), **KEYS)
    query = make_adata(50, seed=1)
    query.obs["label"] = "unheard of"
    grown = registry.extend(query)
    assert grown.categories("labels") == ("B", "NK", "T")
    assert (Dataset(query, grown).codes("labels") == -1).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"batch_key": "nope"},
            r"obs has no column 'nope'; it has 'batch', 'label', 'donor', 'age', 'stress'",
        ),
        ({"continuous_covariate_keys": ["nope"]}, "obs has no column 'nope'"),
        ({"layer": "nope"}, r"there is no layer 'nope'; layers are 'counts'"),
        ({"y_key": "nope"}, r"obsm has no entry 'nope'; it has 'truth'"),
        ({"continuous_covariate_keys": ["batch"]}, r"obs\['batch'\] must be numbers but holds 'batch_\d'"),
        ({"categorical_covariate_keys": ["donor", "donor"]}, "names a column twice: 'donor', 'donor'"),
    ],
)
def test_what_is_missing_is_said_with_what_there_is(keys, message):
    with pytest.raises(DataError, match=message):
        register(make_adata(20), FIELDS | {"y": Values(optional=True, keyword="y_key")}, **keys)


def test_an_empty_x_asks_for_a_layer():
    adata = make_adata(20)
    adata.X = None
    with pytest.raises(DataError, match="name a layer"):
        register(adata)
    assert register(adata, layer="counts").n_vars() == 40


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batchkey": "batch"}, "Toy takes .*'batch_key'.*it does not know 'batchkey'"),
        ({"categorical_covariate_keys": "donor"}, r"takes a list of column names; write \['donor'\]"),
        ({"continuous_covariate_keys": "age"}, r"write \['age'\]"),
        ({"batch_key": ["batch"]}, r"batch_key takes one name, not \['batch'\]"),
    ],
)
def test_wrong_keywords(keys, message):
    with pytest.raises(TypeError, match=message):
        register(make_adata(20), **keys)


def test_a_required_field_left_out():
    with pytest.raises(TypeError, match=r"Toy needs age_key= \(its argument 'age', a continuous field\)"):
        register(make_adata(20), {"age": Continuous})


def test_scale_of_covariates_is_kept_for_other_data():
    adata, other = make_adata(), make_adata(60, seed=1)
    other.obs["age"] = other.obs["age"] * 7 + 100
    registry = register(adata, **KEYS)
    own = Dataset(adata, registry).codes("numbers")
    np.testing.assert_allclose(own.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(own.std(0), 1, atol=1e-6)
    age = adata.obs["age"].to_numpy(np.float64)
    expected = (other.obs["age"] - age.mean()) / age.std()
    np.testing.assert_allclose(Dataset(other, registry).codes("numbers")[:, 0], expected, rtol=1e-5)


def test_covariates_as_they_are():
    adata = make_adata(30)
    registry = register(adata, {"age": Continuous}, age_key="age", standardize=False)
    np.testing.assert_array_equal(Dataset(adata, registry).codes("age"), adata.obs["age"])


def test_a_constant_covariate_becomes_zero():
    adata = make_adata(30)
    adata.obs["age"] = 5.0
    registry = register(adata, {"age": Continuous}, age_key="age")
    np.testing.assert_array_equal(Dataset(adata, registry).codes("age"), 0)


@pytest.mark.parametrize("dtype", ["Int64", "Float32", "category", "float16"])
def test_numbers_of_any_dtype(dtype):
    adata = make_adata(30)
    adata.obs["age"] = pd.Series(np.arange(30), index=adata.obs_names).astype(dtype)
    registry = register(adata, {"age": Continuous}, age_key="age")
    assert registry.fields["age"].loc == (14.5,)


def test_a_nullable_number_that_is_missing_is_not_a_number():
    adata = make_adata(30)
    adata.obs["age"] = pd.Series([*range(29), None], index=adata.obs_names, dtype="Int64")
    registry = register(adata, {"age": Continuous}, age_key="age")
    assert registry.fields["age"].loc == (14.0,)
    assert np.isnan(Dataset(adata, registry).codes("age")[-1])


def test_labels_with_an_unlabelled_category():
    adata = make_adata(30)
    labels = adata.obs["label"].astype(object).to_numpy()
    labels[:4], labels[4:6] = "unknown", np.nan
    adata.obs["label"] = labels
    registry = register(adata, {"l": Labels}, labels_key="label", unlabeled="unknown")
    assert registry.categories("l") == ("B", "NK", "T")
    codes = Dataset(adata, registry).codes("l")
    assert (codes[:6] == -1).all()
    assert (codes[6:] >= 0).all()
    assert Registry.from_json(registry.to_json()).fields["l"].unlabeled == "unknown"


def test_a_mask_takes_the_keys_of_its_protein():
    adata = make_adata(30)
    adata.obsm["adt"] = pd.DataFrame(np.ones((30, 2)), columns=["CD3", "CD4"], index=adata.obs_names)
    registry = register(adata, {"y": Protein, "m": ProteinMask(of="y")}, protein_key="adt")
    assert registry.fields["m"].keys == ("adt",)
    assert registry.var_names("m") == registry.var_names("y") == ("CD3", "CD4")


def test_names_of_an_obsm_array_come_from_uns():
    adata = make_adata(30)
    adata.obsm["adt"] = np.ones((30, 2))
    assert register(adata, {"y": Protein}, protein_key="adt").var_names("y") == ("0", "1")
    adata.uns["adt_names"] = ["CD3", "CD4"]
    assert register(adata, {"y": Protein}, protein_key="adt").var_names("y") == ("CD3", "CD4")


def test_single_cells_need_names_of_their_own():
    adata = make_adata(20)
    adata.obs_names = ["same"] * 20
    with pytest.warns(UserWarning, match="not unique"):
        copy = adata.copy()
    with pytest.raises(DataError, match=r"obs_names are not unique \('same'.*obs_names_make_unique"):
        register(copy, {"x": Counts, "cell": Index})
