"""posterior() and the everyday results: shapes, order, what-if values, agreement with first principles."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from toy import make_adata

import pyrosc
from pyrosc import SCVI, DataError, Model
from pyrosc.data import Counts
from pyrosc.infer import posterior as module


@pytest.fixture(scope="module")
def adata():
    return make_adata()


@pytest.fixture(scope="module")
def model(adata):
    made = SCVI.from_anndata(
        adata,
        batch_key="batch",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=[c for c in adata.obs if c.startswith("cov")] or None,
        n_hidden=16,
        n_latent=3,
    )
    return made.fit(3, progress=False, early_stopping=False, lr=1e-3)


class Shared(Model):
    """A global and a local site, both broadcasting over draws."""

    vectorized = True

    def __init__(self, registry):
        super().__init__(registry)

    def model(self, x: Counts):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with self.cells(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            rate = pyro.deterministic("rate", (z.sum(-1) + w).exp()[..., None] * torch.ones(5), event_dim=1)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


@pytest.mark.parametrize("budget", [2**7, 2**24])
def test_draws_of_global_sites_are_shared_by_all_minibatches(monkeypatch, budget):
    monkeypatch.setattr(module, "_BUDGET", budget)
    shared = Shared.from_anndata(make_adata(n=20, g=5))
    found = shared.posterior(["z", "w", "rate"], n_samples=50, reduce=None, batch_size=16)
    assert found["z"].shape == (50, 20, 2)
    assert found["w"].shape == (50,)
    assert found["rate"].shape == (50, 20, 5)
    expected = np.exp(found["z"].sum(-1) + found["w"][:, None])[..., None].repeat(5, -1)
    np.testing.assert_allclose(found["rate"], expected, rtol=1e-4)


def test_drawing_one_by_one_agrees_with_drawing_at_once():
    both = [
        type("M", (Shared,), {"vectorized": v}).from_anndata(make_adata(n=20, g=5)) for v in (True, False)
    ]
    a, b = (m.posterior("rate", n_samples=4000)["rate"] for m in both)
    np.testing.assert_allclose(np.log(a), np.log(b), atol=0.5)
    for method in ("get_elbo", "get_marginal_ll"):
        x, y = (getattr(m, method)(n_samples=400) for m in both)
        assert x == pytest.approx(y, rel=0.1)


def test_quantiles_and_draws(model, adata):
    draws = model.posterior("z", n_samples=64, reduce=None, seed=4)["z"]
    bands = model.posterior("z", n_samples=64, reduce=[0.1, 0.9], seed=4)["z"]
    mean = model.posterior("z", n_samples=64, seed=4)["z"]
    assert draws.shape == (64, adata.n_obs, 3)
    np.testing.assert_allclose(bands, np.quantile(draws, [0.1, 0.9], axis=0), atol=1e-5)
    np.testing.assert_allclose(mean, draws.mean(0), atol=1e-5)
    loc, scale = model.get_latent_representation(return_dist=True)
    np.testing.assert_allclose(draws.mean(0), loc, atol=0.8)
    assert abs(draws.std(0) / scale - 1).mean() < 0.15
    with pytest.raises(ValueError, match="n_samples"):
        model.posterior("z", reduce=None)


def test_rows_come_in_the_order_asked_for(model, adata):
    everything = model.get_latent_representation()
    rows = [5, 0, 77, 5]
    np.testing.assert_allclose(model.get_latent_representation(indices=rows), everything[rows], atol=1e-5)
    mask = np.zeros(adata.n_obs, bool)
    mask[[3, 9]] = True
    np.testing.assert_allclose(model.get_latent_representation(indices=mask), everything[[3, 9]], atol=1e-5)
    shuffled = adata[::-1].copy()[:, ::-1].copy()
    np.testing.assert_allclose(model.get_latent_representation(shuffled), everything[::-1], atol=1e-5)
    with pytest.raises(IndexError):
        model.get_latent_representation(indices=[adata.n_obs])
    with pytest.raises(TypeError, match="obs_names"):
        model.get_latent_representation(indices=["cell1"])
    assert model.get_latent_representation(indices=[]).shape[0] == 0


def test_what_if_values_change_the_model_not_the_guide(model, adata):
    first, second = model.registry.categories("batch")[:2]
    a = model.posterior(["z", "rho"], do={"batch": first})
    b = model.posterior(["z", "rho"], do={"batch": second})
    np.testing.assert_array_equal(a["z"], b["z"])
    assert np.abs(a["rho"] - b["rho"]).max() > 1e-6
    here = (adata.obs["batch"].astype(str) == first).to_numpy()
    as_is = model.posterior("rho")["rho"]
    np.testing.assert_allclose(a["rho"][here], as_is[here], rtol=1e-5)
    own = model.posterior("rho", do={"batch": adata.obs["batch"].to_numpy()})["rho"]
    np.testing.assert_allclose(own, as_is, rtol=1e-5)
    donor = model.registry.categories("categorical_covariates", "donor")[0]
    assert np.abs(model.posterior("rho", do={"donor": donor})["rho"] - as_is).max() > 1e-7
    with pytest.raises(DataError, match="no category 'nowhere'"):
        model.posterior("rho", do={"batch": "nowhere"})
    with pytest.raises(KeyError, match="no field or column 'colour'"):
        model.posterior("rho", do={"colour": 1})


def test_normalized_expression(model, adata):
    frame = model.get_normalized_expression()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.columns) == list(adata.var_names)
    assert list(frame.index) == list(adata.obs_names)
    np.testing.assert_allclose(frame.sum(axis=1), 1, rtol=1e-4)
    genes = [adata.var_names[3], adata.var_names[0]]
    np.testing.assert_allclose(model.get_normalized_expression(gene_list=genes), frame[genes], rtol=1e-5)
    latent = model.get_normalized_expression(library_size="latent")
    np.testing.assert_allclose(latent.sum(axis=1), np.asarray(adata.X.sum(1)).ravel(), rtol=1e-4)
    np.testing.assert_allclose(model.get_normalized_expression(library_size=1e4), frame * 1e4, rtol=1e-5)
    batches = list(model.registry.categories("batch"))
    parts = [model.get_normalized_expression(transform_batch=b, as_numpy=True) for b in batches]
    both = model.get_normalized_expression(transform_batch=batches, as_numpy=True)
    np.testing.assert_allclose(both, np.mean(parts, axis=0), rtol=1e-4)
    draws = model.get_normalized_expression(n_samples=7, return_mean=False, gene_list=genes)
    assert draws.shape == (7, adata.n_obs, 2)
    np.testing.assert_allclose(
        draws.mean(0), model.get_normalized_expression(n_samples=7, gene_list=genes), rtol=1e-4
    )
    with pytest.raises(KeyError, match="no genes 'none'"):
        model.get_normalized_expression(gene_list=["none"])


def test_elbo_agrees_with_the_runner_and_bounds_the_likelihood(model):
    held_out = model.split["main"][1]
    elbo = model.get_elbo(indices=held_out, n_samples=50)
    last = model.history["elbo_validation"].max()
    assert elbo == pytest.approx(last, abs=0.5)
    per_cell = model.get_elbo(indices=held_out, n_samples=50, per_cell=True)
    assert per_cell.mean() == pytest.approx(elbo, rel=1e-5)
    likelihood = model.get_marginal_ll(indices=held_out, n_samples=400)
    assert elbo < likelihood


def test_replicates_have_the_laws_moments(model, adata):
    replicates = model.posterior_predictive_sample(n_samples=30)
    assert len(replicates) == 30
    assert all(sp.issparse(r) and r.shape == adata.shape for r in replicates)
    totals = np.mean([np.asarray(r.sum(1)).ravel() for r in replicates], axis=0)
    assert np.corrcoef(totals, np.asarray(adata.X.sum(1)).ravel())[0, 1] > 0.8
    one = model.posterior_predictive_sample(gene_list=[adata.var_names[2]], indices=[4, 1])
    assert one.shape == (2, 1)
    assert sp.issparse(one)


def test_likelihood_parameters(model, adata):
    found = model.get_likelihood_parameters()
    assert {"mean", "inverse_dispersion", "zi_logits"} <= set(found)
    assert found["mean"].shape == adata.shape
    assert found["zi_logits"].shape == adata.shape
    np.testing.assert_allclose(found["inverse_dispersion"], model.log_theta().exp().detach(), rtol=1e-5)
    expected = model.get_normalized_expression(library_size="latent")
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-3)


def test_a_missing_site_is_named():
    class NoLatent(Shared):
        latent = "missing"

    made = NoLatent.from_anndata(make_adata(n=20, g=5))
    with pytest.raises(KeyError, match=r"no site 'missing' for the latent space.*'z'"):
        made.get_latent_representation()
    with pytest.raises(KeyError, match="no site 'rho'"):
        made.get_normalized_expression()
    with pytest.raises(KeyError, match="no site 'nothing'"):
        made.posterior("nothing")


def test_seeded_draws(model):
    a, b = (model.get_latent_representation(give_mean=False, seed=s) for s in (1, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - model.get_latent_representation(give_mean=False, seed=2)).max() > 0


def test_simulated_truth_is_from_the_model():
    found = pyrosc.simulate.scvi(400, 30, zero_inflation=0.1, mean_library=3000, sd_log_library=0.1, seed=2)
    adata, truth = found
    mean = adata.layers["true_rho"] * adata.obs["true_library"].to_numpy()[:, None]
    zero = 1 / (1 + np.exp(-truth.zi_head.bias.detach().numpy()))
    expected = (mean * (1 - zero)).mean(0)
    np.testing.assert_allclose(np.asarray(adata.X.mean(0)).ravel(), expected, rtol=0.35)
    again = pyrosc.simulate.scvi(400, 30, zero_inflation=0.1, mean_library=3000, sd_log_library=0.1, seed=2)
    assert (again.adata.X != adata.X).nnz == 0


def test_an_objective_of_several_draws_changes_no_result(adata):
    """Pyro counts the plate of an objective's draws among the model's; results have draws of their own."""
    from pyrosc.infer import PathwiseELBO

    class Several(SCVI):
        elbo = PathwiseELBO(num_particles=3)

    plain, several = (
        c.from_anndata(adata, n_latent=2, n_hidden=8).fit(1, progress=False) for c in (SCVI, Several)
    )
    several.load_state_dict(plain.state_dict())
    for options in ({}, {"n_samples": 4, "reduce": None}, {"n_samples": 5, "reduce": [0.1, 0.9]}):
        one, two = (m.posterior(["z", "rho"], indices=[3, 1], **options) for m in (plain, several))
        for site, value in one.items():
            np.testing.assert_array_equal(value, two[site])
