"""Differential expression: calls against truth, ways to name groups, what is refused, and manners."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from toy import make_adata
from toy_expression import Rates, Smooth, dense_rho, quiet
from toy_models import Cells, Factors, TwoSources

from pyrosc import SCVI, DataError, DataWarning, differential_expression, rank_genes_groups

# --- calls -----------------------------------------------------------------------------------------------


def test_known_genes_are_found_and_silent_ones_never(adata):
    rng = np.random.default_rng(3)
    adata = adata.copy()
    x = adata.X.toarray()
    one = (adata.obs["label"] == "B").to_numpy()
    rate = np.exp(rng.normal(1, 0.5, 40)) * np.ones((200, 1))
    rate[np.ix_(one, range(5))] *= 4
    x = rng.poisson(rate * rng.gamma(10, 0.1, (200, 1))).astype(np.float32)
    x[:, 30:] = 0
    x[one, 20] = 0
    x[~one, 20] = 0
    x[0, 20] = 1  # a single count
    adata.X = sp.csr_matrix(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = SCVI.from_anndata(adata, n_hidden=16).fit(10, progress=False)
    table = quiet(model, groupby="label", group1="B")
    called = set(table.index[table["is_de_fdr"]])
    assert called >= {f"gene_{i}" for i in range(5)}
    silent = [f"gene_{i}" for i in [20, *range(30, 40)]]
    assert not called & set(silent)
    assert not table.loc[silent, "is_expressed"].any()
    assert set(table.index[-11:]) == set(silent)  # last in the table
    assert set(table.index[:5]) == {f"gene_{i}" for i in range(5)}  # what is surest first
    open_gate = quiet(model, groupby="label", group1="B", min_fraction=0, min_cells=0)
    assert open_gate.loc["gene_20", "is_expressed"]
    assert not open_gate.loc[silent[1:], "is_expressed"].any()
    assert not open_gate.loc[silent[1:], "is_de_fdr"].any()
    strict = quiet(model, groupby="label", group1="B", min_cells=10_000)
    assert not strict["is_de_fdr"].any()


def test_permuted_labels_give_nothing(scvi, adata):
    shuffled = adata.copy()
    n_called = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        shuffled.obs["label"] = rng.permutation(adata.obs["label"].astype(str))
        n_called += quiet(scvi, shuffled, groupby="label", seed=seed)["is_de_fdr"].sum()
    assert n_called <= 2  # of 360


def test_pairs_of_cells_are_the_old_way(smooth, adata):
    table = quiet(smooth, groupby="label", group1="B", group2="T", pairs=True, n_samples=4000)
    assert "is_de_fdr" not in table
    rho = dense_rho(smooth)
    epsilon = table.attrs["differential_expression"]["comparisons"]["B vs T"]["pseudocount"]
    one, two = (np.log2(rho[(adata.obs["label"] == k).to_numpy()] + epsilon) for k in ("B", "T"))
    lfc = one[:, None] - two[None]
    names = list(smooth.registry.var_names())
    np.testing.assert_allclose(table.loc[names, "proba_de"], (np.abs(lfc) >= 0.25).mean((0, 1)), atol=0.04)
    np.testing.assert_allclose(table.loc[names, "lfc_mean"], lfc.mean((0, 1)), atol=0.1)
    # and why it is not calibrated: cells of one population differ
    null = quiet(smooth, idx1=np.arange(0, 200, 2), pairs=True)
    assert null["proba_de"].mean() > 0.5
    vanilla = quiet(
        smooth, groupby="label", group1="B", group2="T", pairs=True, mode="vanilla", n_samples=4000
    )
    larger = (lfc > 0).mean((0, 1))
    np.testing.assert_allclose(vanilla.loc[names, "proba_de"], np.maximum(larger, 1 - larger), atol=0.04)


def test_modes_and_thresholds(scvi):
    vanilla = quiet(scvi, groupby="label", group1="B", mode="vanilla")
    change = quiet(scvi, groupby="label", group1="B").loc[vanilla.index]
    assert (vanilla["proba_de"] >= change["proba_de"] - 1e-3).all()
    np.testing.assert_allclose(vanilla["proba_larger"] + vanilla["proba_smaller"], 1, atol=1e-9)
    own = quiet(scvi, groupby="label", group1="B", delta=None)
    delta = own.attrs["differential_expression"]["comparisons"]["B vs rest"]["delta"]
    low, high = np.quantile(own["lfc_unshrunken"][own["is_expressed"]], [0.16, 0.84])
    assert delta == pytest.approx(high - low)
    assert own["is_de_fdr"].sum() <= change["is_de_fdr"].sum()
    assert (quiet(scvi, groupby="label", fdr=0.2)["is_de_fdr"].sum()) >= quiet(scvi, groupby="label")[
        "is_de_fdr"
    ].sum()


# --- groups ----------------------------------------------------------------------------------------------


def test_ways_to_name_the_same_groups(scvi, adata):
    label = adata.obs["label"]
    columns = ["proba_de", "lfc_mean", "lfc_lower", "scale2", "raw_mean2", "is_de_fdr"]
    rest = quiet(scvi, groupby="label", group1="B")
    pd.testing.assert_frame_equal(
        quiet(scvi, groupby="label", group1="B", group2=["NK", "T"])[columns], rest[columns]
    )
    every = quiet(scvi, groupby="label")
    pd.testing.assert_frame_equal(every[every["group1"] == "B"][columns], rest[columns])
    pair = quiet(scvi, groupby="label", group1="B", group2="T")
    masks = quiet(scvi, idx1=(label == "B").to_numpy(), idx2=np.flatnonzero(label == "T"))
    pd.testing.assert_frame_equal(masks[columns], pair[columns])
    one = quiet(scvi, idx1=(label == "B").to_numpy())
    np.testing.assert_allclose(one.loc[rest.index, "lfc_mean"], rest["lfc_mean"], atol=0.25)
    assert set(one["comparison"]) == {"group1 vs rest"}
    other = quiet(scvi, adata[::-1].copy(), groupby="label", group1="B", group2="T")
    np.testing.assert_allclose(other.loc[pair.index, "lfc_mean"], pair["lfc_mean"], atol=0.4)
    inside = quiet(scvi, groupby="batch", group1="batch_0", within="label")
    assert list(inside["within"].unique()) == ["B", "NK", "T"]
    assert inside["comparison"].iloc[0] == "batch_0 vs rest in B"
    stratum = quiet(scvi, indices=(label == "NK").to_numpy(), groupby="batch", group1="batch_0")
    both = inside[inside["within"] == "NK"]
    np.testing.assert_allclose(stratum.loc[both.index, "raw_mean1"], both["raw_mean1"])


def test_cells_without_a_group_take_no_part(scvi, adata):
    some = adata.copy()
    some.obs["label"] = some.obs["label"].astype(object)
    some.obs.iloc[:20, some.obs.columns.get_loc("label")] = None
    table = quiet(scvi, some, groupby="label", group1="B")
    assert table["n_cells1"].iloc[0] + table["n_cells2"].iloc[0] == 180
    some.obs["label"] = np.where(np.arange(200) < 2, "few", adata.obs["label"].astype(str))
    with pytest.warns(DataWarning, match="left out, since a group has fewer than 3 cells: 'few vs rest'"):
        table = differential_expression(scvi, some, groupby="label")
    assert "few" not in set(table["group1"])
    assert table["n_cells1"].iloc[0] + table["n_cells2"].iloc[0] == 200  # they are in the rest


def test_what_cannot_be_compared_is_refused(scvi, adata):
    def refused(kind, message, model=scvi, **options):
        with pytest.raises(kind, match=message):
            quiet(model, **options)

    label = (adata.obs["label"] == "B").to_numpy()
    refused(ValueError, "name the groups by groupby=")
    refused(ValueError, "name the groups by groupby=", groupby="label", idx1=label)
    refused(ValueError, "go with groupby=", idx1=label, group2="B")
    refused(ValueError, "second group is group2=", groupby="label", idx2=label)
    refused(DataError, "no column 'kind'", groupby="kind")
    refused(
        DataError, "no group 'C' among the cells taken; it has 'B', 'NK', 'T'", groupby="label", group1="C"
    )
    refused(DataError, "'B' is in group1 and in group2", groupby="label", group1="B", group2=["B", "T"])
    refused(DataError, "67 cells are in idx1 and in idx2", idx1=label, idx2=label)
    refused(DataError, "idx1 has 2 cells", idx1=[0, 1])
    refused(DataError, "the rest has 0 cells", idx1=np.ones(200, bool))
    refused(DataError, "one group only", indices=label, groupby="label")
    refused(
        DataError,
        "fewer than 3 cells",
        indices=[*np.flatnonzero(label)[:2], *np.flatnonzero(~label)],
        groupby="label",
        group1="B",
    )
    refused(DataError, "200 different numbers", groupby="age")
    refused(ValueError, "both 'label'", groupby="label", within="label")
    refused(ValueError, "mode is one of", groupby="label", mode="both")
    refused(ValueError, "takes no delta=", groupby="label", mode="vanilla", delta=0.5)
    refused(ValueError, "delta is a log2-fold change", groupby="label", delta=0)
    refused(ValueError, r"fdr is in \(0, 1\)", groupby="label", fdr=1)
    refused(ValueError, "min_fraction is a share", groupby="label", min_fraction=3)
    refused(ValueError, "max_cells at least 3", groupby="label", max_cells=1)
    refused(ValueError, "n_samples is at least 1", groupby="label", n_samples=0)
    refused(ValueError, "take two or more", groupby="label", n_samples=1, n_bootstrap=1)
    refused(ValueError, "goes with batch_correction=True", groupby="label", batches=["batch_0"])
    refused(DataError, "no batches 'b9'", groupby="label", batch_correction=True, batches=["b9"])
    refused(
        ValueError,
        "and so does batch_correction",
        groupby="label",
        batch_correction=True,
        do={"batch": "batch_0"},
    )
    refused(
        ValueError, "made without batches", Smooth.from_anndata(adata), groupby="label", batch_correction=True
    )
    refused(ValueError, "pairs=True compares single cells", groupby="label", pairs=True, donor_key="donor")
    refused(KeyError, "no site 'rho' for differential expression", Cells.from_anndata(adata), groupby="label")
    two = TwoSources.from_anndatas({"seq": adata, "spatial": make_adata(40, 30)})
    refused(ValueError, "reads several data sets", two, groupby="label")
    refused(DataError, "no column 'person'", groupby="label", donor_key="person")
    few = adata.obs["donor"].isin(["d0", "d1"]).to_numpy()
    refused(
        DataError, "'B' has cells of 2 donors", indices=few, groupby="label", group1="B", donor_key="donor"
    )
    bayesian = Rates.from_anndata(adata, batch_key="batch")
    refused(ValueError, "draws those too \\(rate\\)", bayesian, groupby="label", weights="importance")
    normal = SCVI.from_anndata(adata, gene_likelihood="normal", n_hidden=8)
    refused(ValueError, "likelihood is one of real numbers", normal, groupby="label", calibrate=True)


def test_models_without_counts_in_their_law_go_by_their_means(adata):
    normal = SCVI.from_anndata(adata, gene_likelihood="normal", n_hidden=8)
    table = quiet(normal, groupby="label")
    assert not table.attrs["differential_expression"]["calibrate"]
    assert np.isfinite(table["lfc_mean"]).all()


# --- manners ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [SCVI, Factors])
def test_nothing_else_is_touched(model_class, adata):
    own = adata.copy()
    before = own.copy()
    model = model_class.from_anndata(own, batch_key="batch")
    model.train()
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002  # the global generator is what is watched
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = model.differential_expression(groupby="label")
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert model.training
    second = model.differential_expression(groupby="label")
    pd.testing.assert_frame_equal(first, second)
    assert not first["lfc_mean"].equals(model.differential_expression(groupby="label", seed=1)["lfc_mean"])
    pd.testing.assert_frame_equal(own.obs, before.obs)
    assert not own.uns
    assert set(own.layers) == set(before.layers)
    assert (own.X != before.X).nnz == 0


def test_scanpy_reads_the_table(scvi, adata):
    sc = pytest.importorskip("scanpy")
    de = quiet(scvi, groupby="label")
    own = adata.copy()
    assert rank_genes_groups(own, de, key_added="de") is own
    reference = adata.copy()
    sc.pp.log1p(reference)
    sc.tl.rank_genes_groups(reference, "label", method="wilcoxon", pts=True)
    assert set(own.uns["de"]) == set(reference.uns["rank_genes_groups"])
    for group in ("B", "NK", "T"):
        found = sc.get.rank_genes_groups_df(own, group, key="de").set_index("names")
        mine = de[de["group1"] == group].loc[found.index]
        np.testing.assert_allclose(found["pvals"], 1 - mine["proba_de"])
        np.testing.assert_allclose(found["logfoldchanges"], mine["lfc_mean"], rtol=1e-6)
        np.testing.assert_array_equal(found["pvals_adj"] <= 0.05, mine["is_de_fdr"])
        np.testing.assert_allclose(found["pct_nz_group"], mine["non_zeros_proportion1"])
        assert found["scores"].is_monotonic_decreasing
    up = sc.get.rank_genes_groups_df(own, "B", key="de")
    assert (up["logfoldchanges"].head(3) > 0).all()
    import matplotlib.pyplot as plt

    sc.pl.rank_genes_groups(own, key="de", n_genes=5, show=False)
    sc.pl.rank_genes_groups_dotplot(own, key="de", n_genes=3, show=False, dendrogram=False)
    plt.close("all")
    with pytest.raises(DataError, match="several comparisons of one group"):
        rank_genes_groups(own, quiet(scvi, groupby="batch", group1="batch_0", within="label"))
    with pytest.raises(DataError, match="adata has no genes"):
        rank_genes_groups(adata[:, 5:].copy(), de)


def test_a_saved_table_and_model_work_as_well(scvi, adata, tmp_path):
    import pyrosc

    scvi.save(tmp_path / "model")
    again = pyrosc.load(tmp_path / "model", adata)
    pd.testing.assert_frame_equal(quiet(again, groupby="label"), quiet(scvi, groupby="label"))


@pytest.mark.gpu
def test_on_a_gpu(adata, smooth):
    there = Smooth.from_anndata(adata, batch_key="batch").to("cuda")
    options = {"groupby": "label", "batch_correction": True}
    found, expected = quiet(there, **options), quiet(smooth, **options)
    pd.testing.assert_frame_equal(found.sort_index(), expected.sort_index(), rtol=1e-3, atol=1e-3)


def test_any_model_with_the_site_will_do(adata):
    """Labels summed out by the guide, draws one after the other, latent libraries, Bayesian loadings."""
    import pyrosc

    models = [
        pyrosc.SCANVI.from_anndata(adata, labels_key="label", n_hidden=8),
        pyrosc.LinearSCVI.from_anndata(adata, bayesian=True, n_hidden=8),
        pyrosc.AUTOZI.from_anndata(adata, n_hidden=8),
        SCVI.from_anndata(adata, latent_distribution="ln", use_observed_lib_size=False, n_hidden=8),
        Factors.from_anndata(adata, batch_key="batch"),
    ]
    truth = adata.obsm["truth"]
    one, two = (truth[(adata.obs["label"] == k).to_numpy()].mean(0) for k in ("B", "T"))
    change = pd.Series(np.log2(one / two), adata.var_names)
    for model in models:
        weights = ["uniform"] if model.latent_sites(local=False) else ["uniform", "importance"]
        for w in weights:
            table = quiet(model, groupby="label", group1="B", group2="T", weights=w)
            # counts correct what an untrained decoder says
            error = table["lfc_mean"] - change[table.index]
            assert error[table["is_de_fdr"]].abs().median() < 0.5, type(model)
            assert np.corrcoef(table["lfc_mean"], change[table.index])[0, 1] > 0.9, type(model)
