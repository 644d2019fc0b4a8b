"""Predictive checks against brute force, and calibrated where the model is right."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from solvable import GammaPoisson
from toy import make_adata
from toy_models import Cells, Factors, Mixture, Proteins, Rates, TwoSources

from pyrosc import SCVI, pl, simulate
from pyrosc.criticism import predictive_checks
from pyrosc.criticism.tally import leave_one_out_weights


@pytest.fixture(scope="module")
def adata():
    return make_adata(120, 30)


@pytest.fixture(scope="module")
def model(adata):
    return SCVI.from_anndata(adata, batch_key="batch", n_hidden=16, n_latent=2).fit(
        4, progress=False, callbacks=[]
    )


def cv(x, axis):
    return x.std(axis, ddof=1) / x.mean(axis)


# -- tables ----------------------------------------------------------------------------------------------


def test_tables_hold_what_brute_force_finds(model, adata):
    found = predictive_checks(model, n_samples=7, calibration=False, seed=3)
    rows = model.validation_indices
    assert (found.n_cells, found.n_samples, found.held_out) == (len(rows), 7, True)
    x = adata.X.toarray()[rows].astype(float)
    draws = model.posterior_predictive_sample(indices=rows, n_samples=7, seed=3)
    y = np.stack([d.toarray().astype(float) for d in draws])
    functions = {
        ("genes", "mean"): lambda a: a.mean(-2),
        ("genes", "variance"): lambda a: a.var(-2, ddof=1),
        ("genes", "zeros"): lambda a: (a == 0).mean(-2),
        ("cells", "library"): lambda a: a.sum(-1),
        ("cells", "zeros"): lambda a: (a == 0).mean(-1),
        ("cells", "cv"): lambda a: cv(a, -1),
    }
    for (of, name), f in functions.items():
        table = found.statistic(name, of)
        replicated = f(y)
        np.testing.assert_allclose(table["observed"], f(x), rtol=1e-9)
        np.testing.assert_allclose(table["replicated"], replicated.mean(0), rtol=1e-9)
        low, high = np.quantile(replicated, [0.05, 0.95], axis=0)
        np.testing.assert_allclose(table["low"], low, rtol=1e-9)
        np.testing.assert_allclose(table["high"], high, rtol=1e-9)
        if name in ("variance", "cv"):
            continue  # ties are those of sums, which rounding in another order would break
        above = (replicated > f(x)).sum(0) + 0.5 * (replicated == f(x)).sum(0)
        np.testing.assert_allclose(table["p_value"], (above + 0.5) / 8)
    assert list(found.statistic("mean").index) == list(adata.var_names)
    assert list(found.statistic("cv", "cells").index) == list(adata.obs_names[rows])
    with pytest.raises(KeyError, match="no 'library' of genes"):
        found.statistic("library")


def test_summary_is_of_logarithms_but_for_zeros(model):
    found = predictive_checks(model, n_samples=7, calibration=False)
    for of, name in found.summary.index:
        table = found.statistic(name, of)
        x, y = table["observed"].to_numpy(), table["replicated"].to_numpy()
        if name != "zeros":
            keep = (x > 0) & (y > 0)
            x, y = np.log(x[keep]), np.log(y[keep])
        scores = found.scores(name, of)
        assert scores["error"] == pytest.approx(np.abs(y - x).mean())
        assert scores["bias"] == pytest.approx((y - x).mean())
        assert scores["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert scores["n"] == len(x)


def test_the_expected_error_is_that_of_a_replicate(adata):
    model = GammaPoisson.from_anndata(adata)
    right = simulate.from_model(model, seed=1)
    found = predictive_checks(model, right, n_samples=40)
    for name in ("mean", "variance", "zeros"):
        scores = found.scores(name)
        assert scores["error"] == pytest.approx(scores["expected"], rel=0.5)
    wrong = right.copy()
    wrong.X = sp.csr_matrix(wrong.X.toarray() * 2)
    scores = predictive_checks(model, wrong, n_samples=40).scores("variance")
    assert scores["error"] > 1.5 * scores["expected"]


# -- calibration -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_genes():
    """2000 cells of three genes, drawn from the model itself, and that model."""
    shell = ad.AnnData(sp.csr_matrix(np.ones((2000, 3), np.float32)))
    model = GammaPoisson.from_anndata(shell)
    return model, simulate.from_model(model, seed=4)


def test_intervals_of_the_right_model_hold_what_they_promise(few_genes):
    model, adata = few_genes
    found = predictive_checks(model, adata, n_samples=400)  # of three genes, each made much of its interval
    assert found.leave_one_out
    table = found.calibration[found.calibration["genes"] == "all"].set_index("level")
    for level, row in table.iterrows():
        assert row["coverage"] == pytest.approx(level, abs=3.5 * row["se"])
    assert found.pit_deviation < 0.025  # of 6000 values, in groups of three
    assert found.pit.sum() == 6000
    level, inside = found.curve()
    assert inside[[0, -1]] == pytest.approx([0, 1])
    np.testing.assert_allclose(inside[np.isclose(level, 0.9)], table.loc[0.9, "coverage"])


def test_a_few_replicates_are_enough_to_be_uniform():
    """Exactly so where draws do not depend on the data: here the rate is known."""
    shell = ad.AnnData(sp.csr_matrix(np.ones((2000, 3), np.float32)))
    model = GammaPoisson.from_anndata(shell, a=1e6, b=1e6)
    found = predictive_checks(model, simulate.from_model(model, seed=4), n_samples=3)
    assert found.pit_deviation < 0.025


def test_a_count_that_made_its_own_interval_would_fit_too_well(few_genes, monkeypatch):
    """What the leave-one-out weights are for: with equal weights the right model fails."""
    model, adata = few_genes
    monkeypatch.setattr(
        "pyrosc.criticism.tally.leave_one_out_weights", lambda d: torch.full_like(d, 1 / len(d))
    )
    found = predictive_checks(model, adata)
    assert found.pit_deviation > 0.025
    coverage = found.calibration.set_index(["genes", "level"])["coverage"]["all"]
    assert coverage[0.8] > 0.83


def test_too_many_counts_outside_where_data_vary_more_than_the_model(few_genes):
    model, adata = few_genes
    rng = np.random.default_rng(0)
    noisy = adata.copy()
    counts = rng.poisson(adata.X.toarray() * rng.gamma(1.0, 1.0, adata.shape))
    noisy.X = sp.csr_matrix(counts.astype(np.float32))
    found = predictive_checks(model, noisy)
    assert found.calibration.set_index(["genes", "level"])["coverage"]["all", 0.9] < 0.85
    assert found.pit_deviation > 0.05


def test_groups_of_genes_are_by_their_mean(model, adata):
    found = predictive_checks(model, n_samples=5)
    mean = found.statistic("mean")["observed"]
    sizes = found.calibration.groupby("genes", sort=False)["values"].first()
    assert sizes["all"] == found.n_cells * 30 == sizes.iloc[1:].sum()
    assert sizes["mean 1 and more"] == found.n_cells * (mean >= 1).sum()
    with pytest.raises(KeyError, match="no group of genes 'none'"):
        found.histogram("none")


def test_leave_one_out_weights():
    weight = leave_one_out_weights(torch.tensor([[0.0], [-1.0], [-300.0], [-302.0]]))
    assert weight.sum().item() == pytest.approx(1)
    assert (weight[3] / weight[2]).item() == pytest.approx(np.exp(2.0), rel=1e-5)
    assert weight[0].item() == 0


# -- any model, any data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Factors, Rates, Cells, Mixture])
def test_toys(adata, make):
    keys = {"continuous_covariate_keys": ["stress"], "standardize": False} if make is Rates else {}
    keys |= {"batch_key": "batch"} if make in (Factors, Mixture) else {}
    found = predictive_checks(make.from_anndata(adata, **keys), n_samples=3)
    assert found.n_cells == 120
    assert not found.held_out
    assert found.leave_one_out
    assert np.isfinite(found.statistic("mean")["replicated"]).all()


def test_a_replicate_has_one_draw_of_global_sites(adata):
    """Rates are drawn per replicate, not per minibatch: replicated means differ as much as the rates do."""
    model = Rates.from_anndata(adata, continuous_covariate_keys=["stress"], standardize=False)
    whole = predictive_checks(model, n_samples=30, calibration=False, batch_size=120)
    parts = predictive_checks(model, n_samples=30, calibration=False, batch_size=5)
    width = [np.mean(c.statistic("mean")["high"] - c.statistic("mean")["low"]) for c in (whole, parts)]
    assert width[1] == pytest.approx(width[0], rel=0.3)


def test_values_that_were_not_measured_are_left_out(adata):
    adata = adata.copy()
    rng = np.random.default_rng(0)
    protein = rng.poisson(4.0, (120, 5)).astype(float)
    protein[:60, 1] = np.nan
    adata.obsm["protein"] = protein
    model = Proteins.from_anndata(adata, protein_key="protein")
    found = predictive_checks(model, n_samples=4, site="y")
    observed = found.statistic("mean")["observed"]
    np.testing.assert_allclose(observed, np.nanmean(protein, axis=0), rtol=1e-6)
    assert found.pit.sum(1).tolist() == [120, 60, 120, 120, 120]


def test_one_of_two_sources(adata):
    model = TwoSources.from_anndatas({"seq": adata, "spatial": make_adata(30, 8, seed=1)})
    found = predictive_checks(model, source="spatial", n_samples=3)
    assert found.site == "spatial"
    assert list(found.statistic("mean").index) == [f"gene_{i}" for i in range(8)]
    assert found.n_cells == 30


def test_memory_does_not_grow_with_replicates(adata, monkeypatch):
    """No minibatch holds more replicated values than the budget."""
    seen = []
    whole = SCVI.batches

    def watched(self, dataset, rows, batch_size=512, source="main"):
        seen.append(batch_size)
        return whole(self, dataset, rows, batch_size, source)

    monkeypatch.setattr("pyrosc.criticism.predictive._BUDGET", 3000)
    monkeypatch.setattr(SCVI, "batches", watched)
    model = SCVI.from_anndata(adata, n_hidden=4)
    predictive_checks(model, n_samples=10)
    assert seen == [10]


def test_cells_seeds_and_generators(model, adata):
    state = torch.get_rng_state()
    one, same, other = (predictive_checks(model, n_samples=2, seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(one.pit, same.pit)
    assert (one.pit != other.pit).any()
    assert not predictive_checks(model, indices=[0, 1, 2, 3], n_samples=1).held_out or set(
        [0, 1, 2, 3]
    ) <= set(model.validation_indices)
    assert predictive_checks(model, adata[:9].copy(), n_samples=1, max_cells=5).n_cells == 5


def test_what_cannot_be_checked_is_refused(model):
    with pytest.raises(ValueError, match="at least two cells; there are 1"):
        predictive_checks(model, indices=[0])
    with pytest.raises(ValueError, match="at least 1; not 0"):
        predictive_checks(model, n_samples=0)
    with pytest.raises(KeyError, match="no observed site 'w'; it has 'x'"):
        predictive_checks(model, site="w")


def test_pictures_of_checks(model):
    from matplotlib.figure import Figure

    checks = predictive_checks(model, n_samples=3)
    ax = Figure().subplots(2, 4)
    assert pl.statistic(checks, "cv", ax=ax[0, 0]) is ax[0, 0]
    table = checks.statistic("cv").dropna()
    drawn = np.asarray(ax[0, 0].collections[0].get_offsets())
    np.testing.assert_allclose(drawn, table[["observed", "replicated"]])
    assert (ax[0, 0].get_xscale(), ax[0, 0].get_yscale()) == ("log", "log")
    pl.statistic(checks, "zeros", "cells", ax=ax[0, 1])
    assert ax[0, 1].get_xscale() == "linear"
    pl.pit(checks, ax[0, 2])
    pl.intervals(checks, ax[0, 3])
    assert ax[0, 3].get_legend().get_texts()[0].get_text() == "all genes"
    pl.mean_variance(checks, ax[1, 0])
    left, right = pl.predictive_check(checks, axes=ax[1, 2:])
    assert (left, right) == (ax[1, 2], ax[1, 3])
    with pytest.raises(KeyError, match="no 'library' of genes"):
        pl.statistic(checks, "library", ax=ax[0, 0])
