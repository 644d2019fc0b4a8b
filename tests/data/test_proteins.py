"""Protein fields: where they are read from, what was measured, what is announced before training."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from toy import make_adata

from pyrosc import DataError, DataWarning
from pyrosc.data import Batch, Counts, Dataset, Protein, ProteinMask, Registry, preflight
from pyrosc.data.proteins import panels

NAMES = ["CD3", "CD4", "CD8a", "CD14", "CD19", "CD56"]
FIELDS = {"x": Counts, "y": Protein, "measured": ProteinMask(of="y"), "batch": Batch}
KEYS = {"protein_key": "adt", "batch_key": "batch"}


def cells(n=60, names=NAMES, seed=0):
    adata = make_adata(n)
    values = 1.0 + np.random.default_rng(seed).poisson(5.0, (n, len(names)))
    adata.obsm["adt"] = pd.DataFrame(values, index=adata.obs_names, columns=list(names))
    return adata


def registered(adata, fields=FIELDS, **keys):
    return Registry.from_data(adata, fields, KEYS | keys)


def checked(adata, fields=FIELDS, **keys):
    dataset = Dataset(adata, registered(adata, fields, **keys))
    preflight(dataset)
    return dataset


def test_panels_of_zeros_are_missing_in_their_batch_alone():
    adata = cells()
    first = (adata.obs["batch"] == adata.obs["batch"].iloc[0]).to_numpy()
    adata.obsm["adt"].loc[first, ["CD14", "CD56"]] = 0.0
    adata.obsm["adt"].loc[~first, "CD14"] = np.nan  # known not to be measured: nothing is announced
    with pytest.warns(
        DataWarning, match=r"obsm\['adt'\] is zero in all cells of .* for 2 of 6 proteins"
    ) as found:
        registry = registered(adata)
    assert len(found) == 1
    assert registry.fields["y"].silent == registry.fields["measured"].silent
    assert registry.fields["y"].silent[0][1:] == ("CD14", "CD56")
    assert Registry.from_json(registry.to_json()) == registry
    dataset = Dataset(adata, registry)
    measured = dataset.codes("measured")
    assert not measured[:, 3].any()
    np.testing.assert_array_equal(measured[:, 5], ~first)
    assert measured[:, [0, 1, 2, 4]].all()
    # other cells of that batch, in whatever order, are read in the same way, though not all zero there
    other = adata[np.flatnonzero(first)[::-1]].copy()
    other.obsm["adt"]["CD56"] = 3.0
    again = Dataset(other, registry)
    assert not again.codes("measured")[:, 5].any()
    with pytest.warns(DataWarning, match="measured in no cell: 'CD14'"):
        preflight(dataset)


def test_without_batches_zeros_throughout_are_missing():
    adata = cells()
    adata.obsm["adt"]["CD19"] = 0.0
    with pytest.warns(DataWarning, match=r"zero in all cells for 1 of 6 proteins \('CD19'\)"):
        registry = Registry.from_data(adata, FIELDS, {"protein_key": "adt"})
    assert registry.fields["y"].by is None
    assert not Dataset(adata, registry).codes("measured")[:, 4].any()


def test_a_query_s_new_batches_have_panels_of_their_own():
    adata = cells()
    registry = registered(adata)
    query = cells(seed=1)
    query.obs["batch"] = np.where(np.arange(60) < 30, "new", adata.obs["batch"].astype(str))
    query.obsm["adt"].iloc[:, 2] = 0.0
    with pytest.warns(DataWarning, match=r"all cells of 'new' \(obs\['batch'\]\) for 1 of 6") as found:
        extended = registry.extend(query)
    assert len(found) == 1  # the panels of batches that are known do not change
    assert extended.fields["y"].silent == (("new", "CD8a"),)
    assert extended.fields["measured"].silent == extended.fields["y"].silent
    del query.obsm["adt"]
    assert panels(query, registry.fields, registry.fields)["y"] == registry.fields["y"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda y: y.__setitem__("CD4", np.inf), r"is infinite: inf in cell 'cell_0', protein 'CD4'"),
        (lambda y: y.__setitem__("CD4", -1.0), r"does not hold counts: -1 in cell 'cell_0', protein 'CD4'"),
        (lambda y: y.__setitem__("CD8a", 0.5), r"does not hold counts: 0.5 in cell 'cell_0', protein 'CD8a'"),
        (lambda y: y.__setitem__(NAMES, np.nan), r"no protein was measured in any cell"),
        (lambda y: y.insert(1, "CD3 ", "text"), r"must be numbers; the columns 'CD3 ' are not"),
    ],
)
def test_what_is_no_table_of_protein_counts(change, error):
    adata = cells()
    change(adata.obsm["adt"])
    with pytest.raises(DataError, match=error):
        checked(adata)


def test_proteins_named_twice():
    adata = cells(names=["CD3", "CD4", "CD3", "CD8", "CD19"])
    with pytest.raises(DataError, match=r"obsm\['adt'\] names some proteins twice: 'CD3'"):
        registered(adata)


def test_missing_values_need_a_mask():
    adata = cells()
    adata.obsm["adt"].iloc[7, 1] = np.nan
    with pytest.raises(DataError, match=r"NaN in 1 cells \(first: 'cell_7'\).*ProteinMask"):
        checked(adata, {"x": Counts, "y": Protein, "batch": Batch})
    assert not checked(adata).codes("measured")[7, 1]


def test_few_proteins_and_isotype_controls_are_noted():
    with pytest.warns(DataWarning, match="has 4 proteins; with fewer than 5"):
        checked(cells(names=NAMES[:4]))
    controls = ["IgG1_control_TotalSeqB", "Mouse IgG2a", "rat-IgG1", "isotype.K", "IgG2b ctrl"]
    with pytest.warns(DataWarning, match="isotype controls") as found:
        checked(cells(names=[*NAMES, *controls, "IgD", "CD16", "IGHM"]))
    text = str(found[0].message)
    assert all(f"'{c}'" in text for c in controls)
    assert not any(f"'{c}'" in text for c in ("IgD", "CD16", "IGHM", *NAMES))


def test_columns_that_are_absent_later_were_not_measured():
    adata = cells()
    registry = registered(adata)
    other = cells(seed=2)
    other.obsm["adt"] = other.obsm["adt"][["CD19", "CD3"]]
    with pytest.warns(DataWarning, match=r"lacks 4 of the 6 proteins of the model \('CD4', 'CD8a'"):
        dataset = Dataset(other, registry)
    np.testing.assert_array_equal(dataset.codes("measured")[0], [True, False, False, False, True, False])
    np.testing.assert_array_equal(dataset.codes("y")[:, 4], other.obsm["adt"]["CD19"].astype(np.float32))
    assert (dataset.codes("y")[:, 1] == 0).all()


def multi(table, drop=0):
    md = pytest.importorskip("mudata")
    rna = make_adata(60)
    prot = ad.AnnData(
        table.to_numpy(np.float32)[drop:],
        obs=pd.DataFrame(index=table.index[drop:]),
        var=pd.DataFrame(index=table.columns),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return md.MuData({"rna": rna, "prot": prot})


def test_cells_that_the_modality_of_proteins_lacks():
    table = cells().obsm["adt"]
    data = multi(table, drop=20)
    registry = Registry.from_data(
        data, FIELDS, {"batch_key": "batch"}, modalities={"x": "rna", "y": "prot", "batch": "rna"}
    )
    assert registry.fields["y"].where == "mod['prot'].X"
    dataset = Dataset(data, registry)
    order = data.obs_names.get_indexer(table.index)
    np.testing.assert_array_equal(dataset.codes("measured").any(1)[order], np.arange(60) >= 20)
    np.testing.assert_array_equal(dataset.codes("y")[order][20:], table.to_numpy()[20:].astype(np.float32))


def test_a_layer_of_the_modality_or_what_is_wrong_with_it():
    table = cells().obsm["adt"]
    data = multi(table)
    data["prot"].layers["raw"] = data["prot"].X + 1
    places = {"x": "rna", "y": "prot", "batch": "rna"}
    registry = Registry.from_data(
        data, FIELDS, {"protein_key": "raw", "batch_key": "batch"}, modalities=places
    )
    assert registry.fields["y"].where == "mod['prot'].layers['raw']"
    assert Dataset(data, registry).codes("y")[0, 0] == table.iloc[0, 0] + 1
    assert registry.keywords(FIELDS)["protein_key"] == "raw"
    with pytest.raises(DataError, match="obsm has no entry 'nope'"):
        Registry.from_data(data, FIELDS, {"protein_key": "nope"}, modalities=places)
    del data["prot"].layers["raw"]
    with pytest.raises(DataError, match="neither an obsm entry nor a layer 'raw'"):
        Dataset(data, registry)
