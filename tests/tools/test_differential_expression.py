"""Means against dense arithmetic, posteriors against exact ones, calls against truth."""

import warnings
from typing import ClassVar

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from scipy import stats
from toy import make_adata
from toy_models import Cells, Factors, TwoSources

from pyrosc import SCVI, DataError, DataWarning, Model, differential_expression, rank_genes_groups
from pyrosc.data import Batch, Counts
from pyrosc.tools.de import core, means, sides
from pyrosc.tools.de.groups import donors_of, from_column
from pyrosc.tools.de.means import PRIOR_COUNTS, Pass


class Smooth(Model):
    """Expression is a known function of a cell's counts and batch: nothing is drawn."""

    vectorized = True

    def __init__(self, registry):
        super().__init__(registry)
        genes = registry.n_vars()
        mix = (
            torch.eye(genes) * 2 + torch.rand(genes, genes, generator=torch.Generator().manual_seed(0)) * 0.2
        )
        self.register_buffer("mix", mix)
        self.register_buffer("effect", torch.linspace(-1, 1, genes))

    def rho(self, x, batch):
        return ((x.log1p() / 5) @ self.mix + batch.unsqueeze(-1) * self.effect).softmax(-1)

    def model(self, x: Counts, batch: Batch):
        with self.cells(x):
            rho = pyro.deterministic("rho", self.rho(x, batch), event_dim=1)
            pyro.sample("x", dist.Poisson(x.sum(-1, keepdim=True) * rho).to_event(1), obs=x)

    def guide(self, x: Counts, batch: Batch):
        pass


class Rates(Model):
    """Poisson rates per batch and gene with Gamma priors; the guide is the exact posterior."""

    vectorized = True
    shape: ClassVar = 2.0

    def __init__(self, registry):
        super().__init__(registry)
        size = (registry.n_categories("batch"), registry.n_vars())
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("exposure", torch.ones(size[0], 1))

    def initialize(self, data):
        codes, x = data.codes("batch"), np.asarray(data[np.arange(len(data))]["x"])
        for c in range(len(self.exposure)):
            self.counts[c] = torch.as_tensor(x[codes == c].sum(0))
            self.exposure[c] = float((codes == c).sum())

    def model(self, x: Counts, batch: Batch):
        prior = dist.Gamma(torch.full_like(self.counts, self.shape), 1.0).to_event(2)
        rate = pyro.sample("rate", prior)
        with self.cells(x):
            here = rate[..., 0, :, :] if rate.dim() > 3 else rate.squeeze(-3) if rate.dim() == 3 else rate
            rho = pyro.deterministic("rho", here[..., batch, :], event_dim=1)
            pyro.sample("x", dist.Poisson(rho).to_event(1), obs=x)

    def guide(self, x: Counts, batch: Batch):
        posterior = dist.Gamma(self.shape + self.counts, 1 + self.exposure).to_event(2)
        pyro.sample("rate", posterior)


class Level(Model):
    """One latent number per cell, with a guide that has learned nothing: the prior."""

    vectorized = True

    def model(self, x: Counts):
        with self.cells(x):
            u = pyro.sample("u", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            rho = pyro.deterministic("rho", u.exp() * torch.ones(x.shape[-1]), event_dim=1)
            pyro.sample("x", dist.Poisson(rho).to_event(1), obs=x)

    def guide(self, x: Counts):
        with self.cells(x):
            pyro.sample("u", dist.Normal(x.new_zeros(1), 1.0).to_event(1))


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return differential_expression(*args, **options)


@pytest.fixture(scope="module")
def adata():
    return make_adata(200, 40)


@pytest.fixture(scope="module")
def smooth(adata):
    return Smooth.from_anndata(adata, batch_key="batch")


@pytest.fixture(scope="module")
def scvi(adata):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return SCVI.from_anndata(adata, batch_key="batch", n_hidden=16).fit(15, progress=False)


# --- the pass over the cells -----------------------------------------------------------------------------


def dense_rho(model, batch=None):
    """Expression of all cells, (n, g)."""
    x = torch.as_tensor(model.home().X.toarray())
    codes = torch.as_tensor(model.dataset().codes("batch")) if batch is None else torch.full((len(x),), batch)
    return model.rho(x, codes).numpy().astype(np.float64)


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
    plan = Pass("rho", counts, 3, 5, seed=4)
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
    means_, _ = naive_means(smooth, groups, Pass("rho", "x", 2, 60), 512, dense_rho(smooth))
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
    plan = Pass("rho", None, 10, 25)

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
    plan = Pass("rho", "x", 2, 40, seed=3)
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
