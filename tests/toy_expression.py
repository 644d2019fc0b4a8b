"""Models whose differential expression is known, and the function under test without its warnings."""

import warnings
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyrosc import DataWarning, Model, differential_expression
from pyrosc.data import Batch, Counts


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


def dense_rho(model, batch=None):
    """Expression of all cells, (n, g)."""
    x = torch.as_tensor(model.home().X.toarray())
    codes = torch.as_tensor(model.dataset().codes("batch")) if batch is None else torch.full((len(x),), batch)
    return model.rho(x, codes).numpy().astype(np.float64)
