"""Discrete sites that the model sums out: exact results per cell, against sums by hand."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from toy import make_adata
from toy_models import QUICK

import pyrosc
from pyrosc import Model
from pyrosc.data import Counts
from pyrosc.data.inputs import load_batch
from pyrosc.infer.posterior import traces


class TwoSites(Model):
    """Two discrete sites per cell, the second given the first, and a latent number given the second."""

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    plan = QUICK
    slots = {"kind": "obs/two_kind"}  # noqa: RUF012
    label = "kind"

    def __init__(self, registry):
        super().__init__(registry)
        generator = torch.Generator().manual_seed(0)
        self.profiles = torch.nn.Parameter(0.5 * torch.randn(3, 2, registry.n_vars(), generator=generator))
        self.odds = torch.nn.Parameter(torch.randn(3, generator=generator))
        self.inner = torch.nn.Parameter(torch.randn(3, 2, generator=generator))
        self.shift = torch.nn.Parameter(torch.tensor([-0.5, 0.5]))
        self.loc = torch.nn.Parameter(torch.zeros(()))

    def model(self, x: Counts):
        with self.cells(x):
            kind = pyro.sample("kind", dist.Categorical(logits=self.odds), infer={"enumerate": "parallel"})
            state = pyro.sample(
                "state", dist.Categorical(logits=self.inner[kind]), infer={"enumerate": "parallel"}
            )
            size = pyro.sample("size", dist.Normal(self.shift[state], 1.0))
            mean = pyro.deterministic(
                "mean", (self.profiles[kind, state] + size.unsqueeze(-1)).exp(), event_dim=1
            )
            pyro.sample("x", dist.Poisson(mean).to_event(1), obs=x)

    def guide(self, x: Counts):
        with self.cells(x):
            pyro.sample("size", dist.Normal(self.loc + x.mean(-1).log(), 0.3))

    def label_names(self):
        return ["a", "b", "c"]


@pytest.fixture(scope="module")
def model():
    return TwoSites.from_anndata(make_adata(20, 6))


def joint(model: TwoSites, size: torch.Tensor) -> torch.Tensor:
    """log p(kind, state, size, x) of each cell, (n, 3, 2)."""
    x = torch.from_numpy(model.dataset().matrices["x"].rows(np.arange(20)))
    with torch.no_grad():
        mean = (model.profiles + size[:, None, None, None]).exp()
        prior = model.odds.log_softmax(0)[:, None] + model.inner.log_softmax(1)
        likelihood = dist.Poisson(mean).log_prob(x[:, None, None]).sum(-1)
        return likelihood + prior + dist.Normal(model.shift, 1.0).log_prob(size[:, None])[:, None, :]


def centre(model: TwoSites) -> torch.Tensor:
    x = torch.from_numpy(model.dataset().matrices["x"].rows(np.arange(20)))
    return (model.loc + x.mean(-1).log()).detach()


def test_probabilities_are_those_of_bayes_rule(model):
    probabilities = joint(model, centre(model)).flatten(1).softmax(1).reshape(20, 3, 2)
    found = model.posterior(["kind", "state"])
    np.testing.assert_allclose(found["kind"], probabilities.sum(2), atol=1e-5)
    np.testing.assert_allclose(found["state"], probabilities.sum(1), atol=1e-5)
    soft = model.predict(soft=True, indices=[7])
    np.testing.assert_allclose(soft, probabilities.sum(2)[[7]], atol=1e-5)


def test_other_sites_are_those_of_the_likeliest_values_together(model):
    best = joint(model, centre(model)).flatten(1).argmax(1)
    kind, state = best // 2, best % 2
    with torch.no_grad():
        expected = (model.profiles[kind, state] + centre(model)[:, None]).exp()
    np.testing.assert_allclose(model.posterior("mean")["mean"], expected, rtol=1e-5)


def test_draws_follow_the_posterior_given_the_data(model):
    batch = load_batch(model.datasets, {"main": np.arange(20)}, torch.device("cpu"))
    fixed = {"size": centre(model)}
    counts = torch.zeros(20, 3, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(600):
            trace = traces(model, batch, 1, fixed=fixed)[1]
            counts[torch.arange(20), trace.nodes["kind"]["value"], trace.nodes["state"]["value"]] += 1
    probabilities = joint(model, centre(model)).flatten(1).softmax(1).reshape(20, 3, 2)
    assert (counts / 600 - probabilities).abs().max() < 0.08


def test_what_if_changes_the_model_and_not_what_is_known(model):
    batch = load_batch(model.datasets, {"main": np.arange(20)}, torch.device("cpu"))
    here = traces(model, batch)[1].nodes["kind"]["value"]
    there = traces(model, batch, do={"x": torch.zeros_like(batch["x"])})[1].nodes["kind"]["value"]
    assert torch.equal(here, there)


def test_elbo_per_cell_is_that_of_the_objective(model):
    batch = load_batch(model.datasets, {"main": np.arange(20)}, torch.device("cpu"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = [-float(model(batch).detach()) for _ in range(300)]
    found = model.get_elbo(n_samples=300)
    assert found == pytest.approx(np.mean(values), abs=0.1)
    # q is Normal(centre, 0.3): its entropy, and the joint with the discrete sites summed out
    generator = torch.Generator().manual_seed(1)
    entropy = float(dist.Normal(0.0, 0.3).entropy())
    draws = [centre(model) + 0.3 * torch.randn(20, generator=generator) for _ in range(300)]
    by_hand = np.mean([float(joint(model, d).flatten(1).logsumexp(1).mean()) for d in draws]) + entropy
    assert found == pytest.approx(by_hand, abs=0.1)


def test_marginal_likelihood_sums_the_discrete_sites_out(model):
    grid = torch.linspace(-6, 6, 2001)
    log_p = [joint(model, g.expand(20)).flatten(1).logsumexp(1) for g in grid]
    expected = (torch.stack(log_p).logsumexp(0) + (grid[1] - grid[0]).log()).mean()
    assert model.get_marginal_ll(n_samples=400) == pytest.approx(float(expected), abs=0.05)


def test_an_autoguide_leaves_enumerated_sites_alone():
    def mixture(self, x: Counts):
        weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
        rates = pyro.sample("rates", dist.Gamma(2.0, 0.5).expand([2, x.shape[-1]]).to_event(2))
        with pyrosc.cells(x):
            kind = pyro.sample("kind", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Poisson(rates[kind.long()]).to_event(1), obs=x)

    Mixture = pyrosc.auto(mixture, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    model = Mixture.from_anndata(make_adata(20, 6))
    assert not model.per_cell_guide
    assert set(model.auto_guide.inner.locs._pyro_params) | set(
        n for n, _ in model.auto_guide.inner.locs.named_parameters()
    ) >= {"weight", "rates"}
    model.fit(2, progress=False)
    assert model.posterior("kind")["kind"].shape == (20, 2)
    model.n_train = {"main": 20}
    batch = load_batch(model.datasets, {"main": np.arange(20)}, torch.device("cpu"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = [-float(model(batch).detach()) for _ in range(300)]
    error = np.std(values) / 300**0.5
    assert model.get_elbo(n_samples=300) == pytest.approx(np.mean(values), abs=6 * error)
