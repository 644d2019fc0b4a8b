"""Guides made from a model: which sites they cover, exact answers, isolation."""

from __future__ import annotations

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoNormal
from toy import make_adata

import pyrosc
from pyrosc import SCVI, Amortized, Model
from pyrosc.data import Batch, Counts, Index


class Factors(Model):
    """Poisson factors with Gamma loadings: a positive local and a positive global site."""

    latent = "z"

    def __init__(self, registry, n_factors: int = 3):
        super().__init__(registry)
        self.n_factors = n_factors

    def model(self, x: Counts, batch: Batch):
        with pyro.plate("factors", self.n_factors, dim=-1):
            w = pyro.sample("w", dist.Gamma(torch.ones(x.shape[-1]), 1.0).to_event(1))
        with self.cells(x):
            z = pyro.sample("z", dist.Gamma(torch.ones(self.n_factors), 1.0).to_event(1))
            s = pyro.sample("s", dist.LogNormal(0.0, 0.1))
            p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
            rate = (z * s[..., None] * (p[..., :1] + 0.5)) @ w
            pyro.sample("x", dist.Poisson(rate + 1e-6).to_event(1), obs=x)


def trained(model: Model, epochs: int = 3, **options) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # short runs end while the ELBO still rises
        return model.fit(epochs, **({"progress": False, "early_stopping": False} | options))


def test_every_continuous_site_is_guided_on_its_support():
    model = trained(Factors.from_anndata(make_adata(), batch_key="batch"))
    assert isinstance(model.auto_guide, Amortized)
    found = model.posterior(["z", "s", "p", "w"], n_samples=5)
    assert (found["z"] > 0).all()
    assert found["z"].shape[1] == 3
    assert found["s"].ndim == 1
    np.testing.assert_allclose(found["p"].sum(-1), 1, rtol=1e-4)
    assert found["w"].shape == (3, model.registry.n_vars())
    assert (found["w"] > 0).all()


def test_global_draws_are_the_same_for_all_minibatches():
    model = trained(Factors.from_anndata(make_adata(), batch_key="batch"))
    one = model.posterior("w", n_samples=3, reduce=None, batch_size=1000)["w"]
    assert one.shape == (3, 3, model.registry.n_vars())
    assert not np.allclose(one[0], one[1])


def test_normal_sites_get_plain_normals_so_that_their_kl_is_closed():
    adata = make_adata()
    guided = pyrosc.auto(SCVI, Amortized).from_anndata(adata, batch_key="batch", n_hidden=16)
    own = SCVI.from_anndata(adata, batch_key="batch", n_hidden=16)
    trace = pyro.poutine.trace(guided.guide).get_trace(
        **guided.inputs(pyrosc.data.inputs.dummy_batch(guided.registries, guided.device))
    )
    assert isinstance(trace.nodes["z"]["fn"].base_dist, dist.Normal)
    assert guided.elbo is own.elbo


def test_amortized_reaches_the_hand_written_guide_on_simulated_data():
    adata = pyrosc.simulate.scvi(600, 60, n_types=3, mean_library=800, seed=1).adata
    own = trained(SCVI.from_anndata(adata, batch_key="batch", n_latent=4), 60)
    guided = trained(pyrosc.auto(SCVI, Amortized).from_anndata(adata, batch_key="batch", n_latent=4), 60)
    held_out = own.split["main"][1]
    gap = own.get_elbo(indices=held_out, n_samples=25) - guided.get_elbo(indices=held_out, n_samples=25)
    assert abs(gap) < 2


def rates(x: Counts):
    with pyro.plate("genes", x.shape[-1], dim=-1):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyrosc.cells(x):
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


@pytest.mark.parametrize(
    "guide",
    [AutoNormal, AutoDelta, lambda m: AutoLowRankMultivariateNormal(m, rank=2)],
    ids=["normal", "delta", "lowrank"],
)
def test_auto_finds_a_conjugate_posterior(guide):
    adata = make_adata(n=120, g=8)
    counts = adata.X.toarray()
    model = pyrosc.auto(rates, guide).from_anndata(adata)
    trained(model, 150, lr=0.05, warmup=0, train_size=1.0, batch_size=120)
    exact = (2 + counts.sum(0)) / (1 + len(counts))
    found = model.posterior("rate", n_samples=0 if guide is AutoDelta else 200)["rate"]
    np.testing.assert_allclose(found, exact, rtol=0.1)
    assert len(pyro.get_param_store()) == 0


def test_two_auto_models_do_not_share_parameters():
    first = trained(pyrosc.auto(rates).from_anndata(make_adata()))
    before = {k: v.clone() for k, v in first.state_dict().items()}
    trained(pyrosc.auto(rates).from_anndata(make_adata(seed=5)), seed=3)
    assert all(torch.equal(v, first.state_dict()[k]) for k, v in before.items())
    assert before


def test_an_autoguide_over_cells_moves_only_the_minibatch():
    def local(x: Counts, index: Index):
        with pyrosc.cells(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(z.exp().sum(-1, keepdim=True).expand_as(x)).to_event(1), obs=x)

    model = pyrosc.auto(local).from_anndata(make_adata(n=60, g=5))
    found = dict(model.auto_guide.named_parameters())
    locs = next(v for k, v in found.items() if "locs" in k)
    assert locs.shape == (60, 2)
    model.fit(1, max_steps=1, batch_size=10, progress=False)
    before = locs.detach().clone()
    model.fit(1, max_steps=1, batch_size=10, progress=False)
    moved = (locs.detach() != before).any(1).sum().item()
    assert 0 < moved <= 10


def test_amortized_with_delta_globals_and_covariates():
    class Delta(Factors):
        def setup(self):
            if not hasattr(self, "auto_guide"):
                self.auto_guide = Amortized(self, encode_covariates=True, global_guide="delta", n_hidden=8)
            return super().setup()

    model = trained(Delta.from_anndata(make_adata(), batch_key="batch"))
    draws = model.posterior("w", n_samples=2, reduce=None)["w"]
    assert np.array_equal(draws[0], draws[1])
    names = [n for n, _ in model.named_parameters()]
    assert any("effects.tables" in n for n in names)
