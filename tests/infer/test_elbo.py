"""PathwiseELBO against Pyro's, exact evidences, annealing, enumeration."""

from __future__ import annotations

import math

import anndata as ad
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from scipy import stats
from toy import make_adata

import pyrosc
from pyrosc import SCVI, Model, PathwiseELBO
from pyrosc.data import Counts, Labels, Values
from pyrosc.data.inputs import load_batch
from pyrosc.infer.handlers import Anneal, Record


def whole(model: Model, rows=None):
    index = np.arange(model.registry.n_obs) if rows is None else rows
    return load_batch(model.datasets, {"main": index}, model.device)


def latent_library_model() -> SCVI:
    options = {"use_observed_lib_size": False, "n_hidden": 16}
    return SCVI.from_anndata(make_adata(), batch_key="batch", **options)


def value_and_gradient(model: Model, elbo, batch, weight: float = 1.0):
    model.zero_grad()
    torch.manual_seed(3)
    with model.minibatch(batch), Anneal(weight, model.annealed_sites):
        loss = elbo.differentiable_loss(model.model, model.guide, **model.inputs(batch))
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("analytic", "peer"), [(False, Trace_ELBO), (True, TraceMeanField_ELBO)])
def test_value_and_gradient_equal_pyros(analytic, peer, weight):
    model = latent_library_model()
    assert model.annealed_sites == ("z",)
    model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in whole(model, np.arange(30)).items()}
    with torch.random.fork_rng():
        ours = value_and_gradient(model, PathwiseELBO(analytic_kl=analytic), batch, weight)
        theirs = value_and_gradient(model, peer(max_plate_nesting=1), batch, weight)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-10)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-8, atol=1e-8, msg=name)


def test_several_particles_average():
    model = SCVI.from_anndata(make_adata(), batch_key="batch", n_hidden=16).eval()
    batch = whole(model, np.arange(40))
    with torch.random.fork_rng(), torch.no_grad(), model.minibatch(batch):
        torch.manual_seed(0)
        one = [PathwiseELBO().loss(model.model, model.guide, **model.inputs(batch)) for _ in range(200)]
        many = PathwiseELBO(num_particles=200).loss(model.model, model.guide, **model.inputs(batch))
    assert many == pytest.approx(np.mean(one), abs=4 * np.std(one) / math.sqrt(200) * 1.5)


def test_a_discrete_guide_site_is_refused():
    class Coin(Model):
        def __init__(self, registry):
            super().__init__(registry)
            self.logit = torch.nn.Parameter(torch.zeros(()))

        def model(self, x: Counts):
            with self.cells(x):
                y = pyro.sample("y", dist.Bernoulli(0.5))
                pyro.sample("x", dist.Poisson(1 + y).expand_by([]).mask(True), obs=x[:, 0])

        def guide(self, x: Counts):
            with self.cells(x):
                pyro.sample("y", dist.Bernoulli(logits=self.logit))

    with pytest.raises(ValueError, match=r"site 'y' of the guide.*'enumerate': 'parallel'"):
        Coin.from_anndata(make_adata()).fit(1, progress=False)


# -- exact answers ------------------------------------------------------------------------------------


def values_adata(y: np.ndarray) -> ad.AnnData:
    adata = ad.AnnData(sp.csr_matrix(np.ones((len(y), 1), np.float32)))
    adata.obsm["y"] = y.astype(np.float32)
    adata.obs_names = [f"c{i}" for i in range(len(y))]
    return adata


class LinearGaussian(Model):
    """y = W z + noise with W known: the posterior and the evidence are Gaussian."""

    elbo = PathwiseELBO(analytic_kl=True)
    W = torch.tensor([[1.0, 0.0], [0.5, 1.0], [-1.0, 0.7]])
    sigma = 0.5

    def __init__(self, registry):
        super().__init__(registry)
        self.loc = torch.nn.Linear(3, 2)
        self.log_scale = torch.nn.Parameter(torch.zeros(2))

    def model(self, y: Values):
        with self.cells(y):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z @ self.W.T, self.sigma).to_event(1), obs=y)

    def guide(self, y: Values):
        with self.cells(y):
            pyro.sample("z", dist.Normal(self.loc(y), self.log_scale.exp()).to_event(1))


def test_the_runner_finds_a_gaussian_posterior():
    rng = np.random.default_rng(0)
    W = LinearGaussian.W.numpy()
    y = rng.normal(size=(600, 2)) @ W.T + LinearGaussian.sigma * rng.normal(size=(600, 3))
    model = LinearGaussian.from_anndata(values_adata(y), y_key="y")
    model.fit(120, lr=0.02, train_size=1.0, batch_size=100, progress=False)
    precision = np.eye(2) + W.T @ W / LinearGaussian.sigma**2
    mean = y @ W @ np.linalg.inv(precision) / LinearGaussian.sigma**2
    np.testing.assert_allclose(model.get_latent_representation(), mean, atol=0.06)
    # the mean-field optimum has the precision's diagonal
    scale = model.get_latent_representation(return_dist=True)[1][0]
    np.testing.assert_allclose(scale, np.diag(precision) ** -0.5, rtol=0.06)
    evidence = stats.multivariate_normal(np.zeros(3), W @ W.T + LinearGaussian.sigma**2 * np.eye(3)).logpdf(y)
    assert model.get_marginal_ll(n_samples=200) == pytest.approx(evidence.mean(), abs=0.02)
    gap = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    assert model.get_elbo(n_samples=100) == pytest.approx(evidence.mean() - gap, abs=0.03)


def test_the_runner_finds_a_gamma_posterior():
    """Poisson counts with a Gamma rate per gene: a global site, conjugate."""

    class Rates(Model):
        def __init__(self, registry):
            super().__init__(registry)
            g = registry.n_vars()
            self.log_shape = torch.nn.Parameter(torch.full((g,), 4.0))
            self.log_mean = torch.nn.Parameter(torch.zeros(g))

        def model(self, x: Counts):
            rate = pyro.sample("rate", dist.Gamma(x.new_full(x.shape[-1:], 2.0), 1.0).to_event(1))
            with self.cells(x):
                pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

        def guide(self, x: Counts):
            shape = self.log_shape.exp()
            pyro.sample("rate", dist.Gamma(shape, shape / self.log_mean.exp()).to_event(1))

    rng = np.random.default_rng(1)
    counts = rng.poisson(rng.gamma(2.0, 1.0, 5), (150, 5)).astype(np.float32)
    adata = ad.AnnData(sp.csr_matrix(counts))
    adata.obs_names = [f"c{i}" for i in range(150)]
    model = Rates.from_anndata(adata)
    model.fit(800, lr=0.1, train_size=1.0, batch_size=150, warmup=0, progress=False)
    shape, rate = 2 + counts.sum(0), 1 + 150
    np.testing.assert_allclose(model.log_shape.exp().detach(), shape, rtol=0.25)
    np.testing.assert_allclose(model.log_mean.exp().detach(), shape / rate, rtol=0.02)
    evidence = 0.0  # the negative binomial of a gene's counts, in sequence
    for g in range(5):
        total = 2.0
        for i, x in enumerate(counts[:, g]):
            evidence += stats.nbinom.logpmf(x, total, (1 + i) / (2 + i))
            total += x
    elbo = model.get_elbo(n_samples=200) * 150
    assert elbo == pytest.approx(evidence, abs=1.0)
    assert elbo < evidence + 0.5


class Mixture(Model):
    """Two kinds of cells with known rates; the kind is summed out in the model."""

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    annealed = ()

    def __init__(self, registry):
        super().__init__(registry)
        self.logits = torch.nn.Parameter(torch.tensor([0.3, -0.2]))
        g = registry.n_vars()
        self.log_rate = torch.nn.Parameter(torch.stack([torch.zeros(g), torch.linspace(0, 1, g)]))

    def model(self, x: Counts):
        with self.cells(x):
            kind = pyro.sample("kind", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Poisson(self.log_rate.exp()[kind]).to_event(1), obs=x)

    def guide(self, x: Counts):
        pass


def test_enumeration_is_exact():
    model = Mixture.from_anndata(make_adata(n=50, g=6))
    x = model.datasets["main"][np.arange(50)]["x"].numpy()
    log_pi = torch.log_softmax(model.logits, 0).detach().numpy()
    rates = model.log_rate.exp().detach().numpy()
    joint = log_pi + stats.poisson.logpmf(x[:, None], rates).sum(-1)
    log_evidence = np.logaddexp(*joint.T)
    assert model(whole(model)).item() == pytest.approx(-log_evidence.mean(), rel=1e-5)
    responsibilities = model.posterior("kind")["kind"]
    np.testing.assert_allclose(responsibilities, np.exp(joint - log_evidence[:, None]), atol=1e-5)


def test_annealing_scales_only_the_named_sites():
    model = latent_library_model()
    batch = whole(model, np.arange(30))
    assert model.annealed_sites == ("z",)

    def loss(weight):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            return model(batch, weight).item()

    parts = pyrosc.infer.evaluate.parts_per_cell
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert parts(model, batch, 1)
    assert loss(0.5) == pytest.approx((loss(0.0) + loss(1.0)) / 2, rel=1e-6)
    assert loss(1.0) > loss(0.0)


# -- sites that the guide enumerates ------------------------------------------------------------------


class Kinds(Model):
    """Kinds of cells with known rates, observed for some; the guide classifies the others."""

    def __init__(self, registry):
        super().__init__(registry)
        g, k = registry.n_vars(), registry.n_categories("labels")
        self.classifier = torch.nn.Linear(g, k)
        self.log_rate = torch.nn.Parameter(torch.linspace(-1, 1, g) * torch.arange(k)[:, None])
        self.shift = torch.nn.Linear(g, 1)

    def model(self, x: Counts, labels: Labels):
        with self.cells(x):
            prior = dist.Categorical(logits=x.new_zeros(self.classifier.out_features))
            kind = pyro.sample("kind", prior, obs=labels.clamp(min=0), obs_mask=labels >= 0)
            shift = pyro.sample("shift", dist.Normal(0.3 * kind, 1.0))
            rate = (self.log_rate[kind] + shift.unsqueeze(-1)).exp()
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    def guide(self, x: Counts, labels: Labels):
        with self.cells(x):
            with poutine.mask(mask=labels < 0):
                q = dist.Categorical(logits=self.classifier(x.log1p()))
                kind = pyro.sample("kind_unobserved", q, infer={"enumerate": "parallel"})
            kind = torch.where(labels < 0, kind, labels)
            pyro.sample("shift", dist.Normal(self.shift(x).squeeze(-1) * 0.1 - kind, 0.5))


def kinds_model(n=60):
    adata = make_adata(n=n, g=6)
    adata.obs["kind"] = [("a", "b", "c", "?")[i % 4] for i in range(n)]
    return Kinds.from_anndata(adata, labels_key="kind", unlabeled_category="?").double()


def in_double(model, rows):
    return {k: v.double() if v.is_floating_point() else v for k, v in whole(model, rows).items()}


@pytest.mark.parametrize("analytic", [False, True])
def test_an_enumerated_guide_site_is_summed_by_hand(analytic):
    model = kinds_model()
    rows = np.arange(24)
    batch = in_double(model, rows)
    x, labels = batch["x"], batch["labels"]
    elbo = PathwiseELBO(analytic_kl=analytic)
    with torch.random.fork_rng(), torch.no_grad(), model.minibatch(batch), Record() as record:
        torch.manual_seed(5)
        found = elbo.differentiable_loss(model.model, model.guide, **model.inputs(batch)) / 60
        shift = record.sites["shift"]  # (3, n): one draw for each kind
    q = model.classifier(x.log1p()).softmax(-1).detach()
    total = torch.zeros(())
    for i in range(len(rows)):
        for k in range(3):
            kind = k if labels[i] < 0 else int(labels[i])
            weight = q[i, k] if labels[i] < 0 else 1 / 3
            loc = model.shift(x[i]).squeeze() * 0.1 - kind
            guide, prior = dist.Normal(loc, 0.5), dist.Normal(0.3 * kind, 1.0)
            rate = (model.log_rate[kind] + shift[k, i]).exp()
            term = dist.Poisson(rate).log_prob(x[i]).sum() - math.log(3)
            if analytic:
                term = term - torch.distributions.kl_divergence(guide, prior)
            else:
                term = term + prior.log_prob(shift[k, i]) - guide.log_prob(shift[k, i])
            if labels[i] < 0:
                term = term - q[i, k].log()
            total = total + weight * term.detach()
    assert found.item() == pytest.approx(-total.item() / 24, rel=1e-10)


def test_an_enumerated_guide_site_as_in_pyro():
    model = kinds_model().float()  # Pyro's own sums weights of one dtype only
    batch = whole(model, np.arange(3, 60, 4))  # unlabelled cells
    assert (batch["labels"] < 0).all()
    with torch.random.fork_rng():
        ours = value_and_gradient(model, PathwiseELBO(), batch)
        theirs = value_and_gradient(model, TraceEnum_ELBO(max_plate_nesting=1), batch)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-3, msg=name)


def test_a_masked_site_stands_for_nothing():
    """The classifier gets no gradient from cells whose kind is observed."""
    model = kinds_model()
    batch = in_double(model, np.arange(0, 60, 4))
    with torch.random.fork_rng():
        _, gradient = value_and_gradient(model, PathwiseELBO(), batch)
    assert gradient["classifier.weight"].abs().max() == 0
    assert gradient["log_rate"].abs().max() > 0


def test_closed_forms_only_where_predecessors_are_drawn_before():
    """A site that the model draws last and the guide first has no inner expectation in closed form."""

    class Chain(Model):
        def __init__(self, registry):
            super().__init__(registry)
            self.loc = torch.nn.Parameter(torch.tensor(0.2))

        def model(self, x: Counts):
            with self.cells(x):
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
                a = pyro.sample("a", dist.Normal(2 * b, 0.5))
                pyro.sample("x", dist.Poisson(a.exp()), obs=x[:, 0])

        def guide(self, x: Counts):
            with self.cells(x):
                a = pyro.sample("a", dist.Normal(self.loc, 0.3))
                pyro.sample("b", dist.Normal(0.4 * a, 0.2))

    model = Chain.from_anndata(make_adata())
    batch = whole(model)
    with torch.random.fork_rng(), torch.no_grad(), model.minibatch(batch):
        torch.manual_seed(0)
        means = []
        for analytic in (False, True):
            elbo = PathwiseELBO(analytic_kl=analytic, num_particles=4000)
            means.append(elbo.loss(model.model, model.guide, **model.inputs(batch)) / len(batch["x"]))
    assert means[0] == pytest.approx(means[1], rel=5e-3)
