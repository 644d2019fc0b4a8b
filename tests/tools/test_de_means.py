"""Group means against dense arithmetic, posteriors against exact ones, donors against their variance."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats
from toy import make_adata
from toy_expression import Level, Rates, Smooth, dense_rho, quiet

from pyrosc import DataWarning, differential_expression
from pyrosc.tools.de import core, means, sides
from pyrosc.tools.de.groups import donors_of, from_column
from pyrosc.tools.de.means import PRIOR_COUNTS, Pass

# --- the pass over the cells -----------------------------------------------------------------------------


def naive_means(model, groups, plan, size, rho):
    """What `CellMeans` computes, from dense matrices and the same generators."""
    x = model.home().X.toarray().astype(np.float64)
    expected = x.sum(1, keepdims=True) * dense_rho(model)
    rng = np.random.default_rng([plan.seed, 1])
    out, totals = [], []
    for unit, g in enumerate(groups.used()):
        rows = groups.rows(g)
        rng.integers(2**31)
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        w = np.concatenate([rng.standard_exponential((plan.n_draws, len(p)), np.float32) for p in parts], 1)
        prior = np.random.default_rng([plan.seed, 2, unit]).standard_gamma(
            PRIOR_COUNTS, (plan.n_draws, x.shape[1]), np.float32
        )
        ratio = (w @ x[rows] + prior) / (w @ expected[rows] + PRIOR_COUNTS) if plan.counts else 1.0
        out.append(w @ rho[rows] / w.sum(1, keepdims=True) * ratio)
        totals.append(w.sum(1))
    return np.stack(out), np.stack(totals)


@pytest.mark.parametrize("counts", ["x", None])
@pytest.mark.parametrize("limit", [2**23, 3 * 40 * 17])
def test_group_means_are_those_of_dense_matrices(smooth, monkeypatch, counts, limit):
    monkeypatch.setattr(means, "_BATCH", limit)
    size = min(limit // (3 * 40), 512)
    dataset = smooth.dataset()
    groups = from_column(dataset.data, "label", None, None, None, np.ones(200, bool))
    plan = Pass("rho", "x", counts, 3, 5, seed=4)
    found = sides.CellMeans(smooth, dataset, groups, plan, None)
    expected, weight = naive_means(smooth, groups, plan, size, dense_rho(smooth))
    for c in groups.comparisons:
        (own,), others = c.first, list(c.second)
        rest = (expected[others] * weight[others][..., None]).sum(0) / weight[others].sum(0)[:, None]
        for genes, pair in found.blocks():
            one, two = pair(c)
            np.testing.assert_allclose(one, expected[own][:, genes], rtol=2e-5)
            np.testing.assert_allclose(two, rest[:, genes], rtol=1e-4)
        scales = found.scales(c)
        np.testing.assert_allclose(scales[0], expected[own].mean(0), rtol=1e-5)


def test_the_table_is_what_its_definition_says(smooth):
    table = quiet(smooth, groupby="label", group1="B", group2="T", shrink=False, n_samples=2, n_bootstrap=60)
    dataset = smooth.dataset()
    groups = from_column(dataset.data, "label", "B", "T", None, np.ones(200, bool))
    means_, _ = naive_means(smooth, groups, Pass("rho", "x", "x", 2, 60), 512, dense_rho(smooth))
    pooled = means_.mean(1).mean(0)
    epsilon = 0.01 * np.quantile(pooled, 0.05)
    lfc = np.log2(means_[0] + epsilon) - np.log2(means_[1] + epsilon)
    table = table.loc[list(smooth.registry.var_names())]
    larger, smaller = (lfc >= 0.25).mean(0), (lfc <= -0.25).mean(0)
    np.testing.assert_allclose(table["lfc_mean"], lfc.mean(0), atol=1e-4)
    np.testing.assert_allclose(table["lfc_unshrunken"], np.median(lfc, 0), atol=1e-4)
    np.testing.assert_allclose(table["lfc_lower"], np.quantile(lfc, 0.025, axis=0), atol=1e-4)
    np.testing.assert_allclose(table["proba_de"], np.maximum(larger, smaller), atol=0.02)
    np.testing.assert_allclose(table["scale1"], means_[0].mean(0), rtol=1e-4)
    adata = dataset.data
    x = adata.X.toarray()
    for i, name in ((1, "B"), (2, "T")):
        own = x[(adata.obs["label"] == name).to_numpy()]
        np.testing.assert_allclose(table[f"raw_mean{i}"], own.mean(0), rtol=1e-6)
        np.testing.assert_allclose(table[f"non_zeros_proportion{i}"], (own > 0).mean(0), rtol=1e-6)
        assert (table[f"n_cells{i}"] == len(own)).all()
    notes = table.attrs["differential_expression"]
    assert notes["comparisons"]["B vs T"] == {"delta": 0.25, "pseudocount": pytest.approx(epsilon, rel=1e-4)}


def test_blocks_of_genes_and_a_file_change_nothing(scvi, monkeypatch):
    whole = quiet(scvi, groupby="label")
    monkeypatch.setattr(means, "_BLOCK", 250 * 3 * 7)
    blocks = quiet(scvi, groupby="label")
    monkeypatch.setattr(means, "_IN_MEMORY", 1)
    file = quiet(scvi, groupby="label")
    pd.testing.assert_frame_equal(blocks, whole)
    pd.testing.assert_frame_equal(file, whole)
    donors = quiet(scvi, groupby="label", donor_key="donor", n_samples=2)
    monkeypatch.setattr(means, "_IN_MEMORY", 2**29)
    np.testing.assert_allclose(
        quiet(scvi, groupby="label", donor_key="donor", n_samples=2)["lfc_mean"], donors["lfc_mean"]
    )


def test_a_sample_of_the_cells_stands_for_its_group(smooth, adata):
    full = quiet(smooth, groupby="label", calibrate=False)
    part = quiet(smooth, groupby="label", calibrate=False, max_cells=30)
    assert part.attrs["differential_expression"]["cells_decoded"] == 90
    assert full.attrs["differential_expression"]["cells_decoded"] == 200
    np.testing.assert_array_equal(full.sort_values(["comparison", "gene"])["n_cells2"].unique(), [133, 134])


def test_a_sample_keeps_the_proportions_of_the_rest(smooth, adata):
    some = adata.copy()
    code = (adata.obs["batch"] == "batch_1").to_numpy()
    kind = np.full(200, "other", object)
    kind[np.flatnonzero(~code)[:20]] = "few"
    kind[np.flatnonzero(code)[:80]] = "many"
    some.obs["kind"] = kind
    table = quiet(smooth, some, groupby="kind", group1="other", calibrate=False, max_cells=20)
    names = list(smooth.registry.var_names())
    found = (table["scale1"] * 2.0 ** -table["lfc_unshrunken"]).loc[names]  # of the draws
    rho = dense_rho(smooth)
    few, many = rho[kind == "few"].mean(0), rho[kind == "many"].mean(0)
    right, wrong = (20 * few + 80 * many) / 100, (few + many) / 2
    for value in (found, table.loc[names, "scale2"]):
        assert np.abs(value - right).sum() < 0.4 * np.abs(value - wrong).sum()


# --- the posterior ---------------------------------------------------------------------------------------


def test_draws_of_a_global_site_give_its_exact_posterior():
    rng = np.random.default_rng(0)
    adata = make_adata(60, 12)
    rates = rng.gamma(2.0, 1.0, (2, 12))
    codes = (adata.obs["batch"] == "batch_1").to_numpy().astype(int)
    adata.X = sp.csr_matrix(rng.poisson(rates[codes]).astype(np.float32))
    adata.X[
        adata.X.sum(1).A1 == 0 if hasattr(adata.X.sum(1), "A1") else np.asarray(adata.X.sum(1)).ravel() == 0,
        0,
    ] = 1
    model = Rates.from_anndata(adata, batch_key="batch")
    options = {"groupby": "batch", "group1": "batch_1", "group2": "batch_0", "shrink": False}
    table = quiet(model, **options, calibrate=False, n_samples=3000, n_bootstrap=1)
    epsilon = table.attrs["differential_expression"]["comparisons"]["batch_1 vs batch_0"]["pseudocount"]
    shape, rate = 2 + model.counts.numpy(), 1 + model.exposure.numpy()
    exact = stats.gamma.rvs(shape, scale=1 / rate, size=(20_000, 2, 12), random_state=1)
    lfc = np.log2(exact[:, 1] + epsilon) - np.log2(exact[:, 0] + epsilon)
    names = list(model.registry.var_names())
    table = table.loc[names]
    np.testing.assert_allclose(table["lfc_mean"], lfc.mean(0), atol=0.05)
    np.testing.assert_allclose(table["lfc_std"], lfc.std(0), rtol=0.06)
    np.testing.assert_allclose(table["lfc_upper"], np.quantile(lfc, 0.975, axis=0), atol=0.12)
    np.testing.assert_allclose(table["proba_larger"], (lfc >= 0.25).mean(0), atol=0.03)
    # a draw is one for all cells: where groups share the rates there is no change in any
    one = Rates.from_anndata(adata)
    same = quiet(one, groupby="batch", group1="batch_1", shrink=False, calibrate=False)
    assert same["lfc_std"].max() < 1e-5
    assert same["lfc_mean"].abs().max() < 1e-6
    # counts say the same as the posterior over all rates that there are
    by_counts = quiet(model, **options, n_samples=20, n_bootstrap=100).loc[names]
    assert np.median(by_counts["lfc_std"] / lfc.std(0)) == pytest.approx(1, abs=0.15)
    assert np.abs(by_counts["lfc_mean"] - lfc.mean(0)).max() < lfc.std(0).max()


def test_importance_weights_mend_a_wrong_guide():
    rng = np.random.default_rng(0)
    u = np.repeat([-0.8, 0.8], 40)
    adata = make_adata(80, 12)
    adata.X = sp.csr_matrix(rng.poisson(np.exp(u)[:, None] * np.ones(12)) + 0.0).astype(np.float32)
    adata.X[adata.X.getnnz(1) == 0, 0] = 1
    adata.obs["group"] = np.where(u > 0, "high", "low")
    model = Level.from_anndata(adata)
    grid = np.linspace(-5, 5, 4001)
    totals = adata.X.toarray().sum(1)
    weight = np.exp(-(grid**2) / 2 + totals[:, None] * grid - 12 * np.exp(grid))
    exact = (weight * np.exp(grid)).sum(1) / weight.sum(1)  # posterior mean of each cell's rate
    means_ = [exact[u > 0].mean(), exact[u < 0].mean()]
    options = {"groupby": "group", "group1": "high", "group2": "low", "calibrate": False, "shrink": False}
    guide = quiet(model, **options, n_samples=300, n_bootstrap=1)
    importance = quiet(model, **options, n_samples=300, n_bootstrap=1, weights="importance")
    assert guide["lfc_mean"].abs().max() < 0.2  # the guide tells no cell from another
    np.testing.assert_allclose(importance["scale1"], means_[0], rtol=0.05)
    np.testing.assert_allclose(importance["scale2"], means_[1], rtol=0.1)
    assert importance["lfc_mean"].iloc[0] == pytest.approx(np.log2(means_[0] / means_[1]), abs=0.15)
    pairs = quiet(
        model, groupby="group", group1="high", group2="low", pairs=True, weights="importance", n_samples=200
    )
    assert pairs["scale1"].iloc[0] == pytest.approx(means_[0], rel=0.15)


def test_batch_correction_is_an_average_over_batches(smooth):
    average = (dense_rho(smooth, 0) + dense_rho(smooth, 1)) / 2
    names = list(smooth.registry.var_names())
    options = {"groupby": "label", "group1": "B", "group2": "T", "calibrate": False}
    dataset = smooth.dataset()
    groups = from_column(dataset.data, "label", "B", "T", None, np.ones(200, bool))
    plan = Pass("rho", "x", None, 10, 25)

    def expected(rho):
        return naive_means(smooth, groups, plan, 512, rho)[0].mean(1)

    both = quiet(smooth, **options, batch_correction=True).loc[names]
    np.testing.assert_allclose(both[["scale1", "scale2"]].T, expected(average), rtol=1e-4)
    one = quiet(smooth, **options, batch_correction=True, batches=["batch_1"]).loc[names]
    np.testing.assert_allclose(one[["scale1", "scale2"]].T, expected(dense_rho(smooth, 1)), rtol=1e-4)
    do = quiet(smooth, **options, do={"batch": "batch_1"}).loc[names]
    pd.testing.assert_frame_equal(do, one)
    as_is = quiet(smooth, **options).loc[names]
    assert np.abs(as_is["scale1"] / one["scale1"] - 1).max() > 0.2
    # with counts: the ratio of observed to expected ones is that of the cells as they are
    counted = quiet(smooth, **{**options, "calibrate": True}, batch_correction=True).loc[names]
    ratio = quiet(smooth, **{**options, "calibrate": True}).loc[names, "scale1"] / as_is["scale1"]
    np.testing.assert_allclose(counted["scale1"] / both["scale1"], ratio, rtol=0.02)


# --- donors ----------------------------------------------------------------------------------------------


def test_donor_means_are_those_of_dense_matrices(smooth):
    dataset = smooth.dataset()
    groups = from_column(dataset.data, "label", "B", "T", None, np.ones(200, bool))
    donors = donors_of(dataset.data, "donor", groups)
    plan = Pass("rho", "x", "x", 2, 40, seed=3)
    found = sides.DonorMeans(smooth, dataset, groups, donors, plan, None)
    (c,) = groups.comparisons
    assert found.freedom(c) == 2  # three donors, in both groups
    w = np.random.default_rng([3, 3, 0]).standard_gamma(1 / 3, (2, 40, 3)).reshape(80, 3)[:, donors.codes]
    prior = np.random.default_rng([3, 4, 0, 0])
    x, rho = dataset.data.X.toarray(), dense_rho(smooth)
    expected = x.sum(1, keepdims=True) * rho
    ((_, pair),) = list(found.blocks())
    for group, value in zip(c.first + c.second, pair(c), strict=True):
        rows = groups.rows(group)
        own = w[:, rows]
        gamma = prior.standard_gamma(PRIOR_COUNTS, (80, 40), np.float32)
        ratio = (own @ x[rows] + gamma) / (own @ expected[rows] + PRIOR_COUNTS)
        np.testing.assert_allclose(value, own @ rho[rows] / own.sum(1, keepdims=True) * ratio, rtol=1e-4)


def test_donors_widen_what_only_donors_know():
    """Genes whose level differs between donors, not between conditions."""
    rng = np.random.default_rng(0)
    n, g = 600, 30
    adata = make_adata(n, g)
    donor = np.arange(n) % 8
    level = np.exp(rng.normal(0, 0.5, (8, g)) * (np.arange(g) < 15))
    adata.X = sp.csr_matrix(rng.poisson(5 * level[donor]).astype(np.float32))
    adata.obs["donor"] = [f"d{i}" for i in donor]
    adata.obs["condition"] = np.where(donor < 4, "a", "b")  # donors of their own
    adata.obs["treated"] = rng.permutation(n) < n / 2  # within donors
    model = Smooth.from_anndata(adata)
    options = {"groupby": "condition", "group1": "a", "group2": "b"}
    with pytest.warns(DataWarning, match="no category of obs\\['donor'\\] has cells in both groups"):
        cells = differential_expression(model, **options)
    donors = differential_expression(model, **options, donor_key="donor")
    noisy = [f"gene_{i}" for i in range(15)]
    assert cells.loc[noisy, "is_de_fdr"].mean() > 0.4
    assert donors.loc[noisy, "is_de_fdr"].sum() == 0
    flat = [
        differential_expression(model, **options, donor_key="donor", shrink=False),
        quiet(model, **options, shrink=False),
    ]
    wider, narrow = (t.loc[noisy, "lfc_std"] for t in flat)
    assert wider.median() > 2 * narrow.median()
    # in a paired design what donors have in common cancels
    paired = differential_expression(model, groupby="treated", group1="True", donor_key="donor", shrink=False)
    assert paired.loc[noisy, "lfc_std"].median() < 0.2
    assert donors.attrs["differential_expression"]["donor_key"] == "donor"


def test_variances_of_donors_are_moderated(smooth, monkeypatch):
    seen = []

    def moderated(estimate, error, freedom, noise, typical):
        seen.append((freedom, float(noise.max()), int(typical.sum())))
        return 1000 * error

    options = {"groupby": "label", "group1": "B", "donor_key": "donor"}
    as_is = quiet(smooth, **options)
    monkeypatch.setattr(core.eff, "moderated", moderated)
    table = quiet(smooth, **options)
    counts = [
        smooth.home().X[(smooth.home().obs["label"] == "B").to_numpy() == k].sum(0) for k in (True, False)
    ]
    noise = sum(1 / (np.asarray(c).ravel() + 0.5) for c in counts)
    assert seen == [(2, pytest.approx(noise.max()), int(table["is_expressed"].sum()))]
    assert as_is["proba_de"].max() > table["proba_de"].max()
    assert not table["is_de_fdr"].any()


def test_when_cells_are_taken_for_replicates(smooth, adata):
    def told(**options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            differential_expression(smooth, **options)
        return [str(w.message) for w in caught if issubclass(w.category, DataWarning)]

    assert not told(groupby="label")  # markers: all donors have all labels
    (text,) = told(groupby="label", group1="B", group2="T")
    assert "cells of obs['donor'] (3 categories) are taken for independent" in text
    assert told(groupby="batch", within="label")
    assert not told(groupby="label", group1="B", group2="T", donor_key="donor")
    assert not told(groupby="label", group1="B", group2="T", pairs=True)
    one = adata.obs["donor"] == "d0"
    (text,) = told(idx1=one.to_numpy())
    assert "no category of obs['donor'] has cells in both groups" in text
    assert not told(groupby="donor")  # donors are what is compared
