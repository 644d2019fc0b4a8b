"""Models whose posterior is known exactly, with guides that are right, too narrow, or shifted."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn

from pyrosc import Model
from pyrosc.data import Counts


class GammaPoisson(Model):
    """A rate per cell: u ~ Gamma(a, b), x_g ~ Poisson(u r_g), so that u | x ~ Gamma(a + Σx, b + Σr).

    The guide is that posterior; with `narrow` c its variance is divided by c, with `shift` its mean is
    multiplied.
    """

    vectorized = True
    latent = "u"

    def __init__(self, registry, a: float = 2.0, b: float = 1.0, narrow: float = 1.0, shift: float = 1.0):
        super().__init__(registry)
        self.a, self.b, self.narrow, self.shift = a, b, narrow, shift
        self.rates = {}
        self.rate = nn.Parameter(torch.linspace(0.5, 1.5, registry.n_vars()))

    def support(self):
        return {"x": "panel"}  # a cell may have no count

    def model(self, x: Counts):
        with self.cells(x):
            u = pyro.sample("u", dist.Gamma(self.a, self.b))
            pyro.sample("x", dist.Poisson(u.unsqueeze(-1) * self.rate).to_event(1), obs=x)

    def guide(self, x: Counts):
        shape, rate = self.a + x.sum(-1), (self.b + self.rate.sum()) / self.shift
        with self.cells(x):
            pyro.sample("u", dist.Gamma(self.narrow * shape, self.narrow * rate.expand_as(shape)))


class Kinds(Model):
    """A kind per cell, summed out: no guide is needed, and its posterior is exact."""

    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def __init__(self, registry):
        super().__init__(registry)
        self.logits = nn.Parameter(torch.tensor([0.0, 0.5, -0.5]))
        level = torch.tensor([1.0, 2.0, 3.0]).unsqueeze(-1)
        self.mean = nn.Parameter(level * torch.linspace(0.5, 1.5, registry.n_vars()))

    def model(self, x: Counts):
        with self.cells(x):
            kind = pyro.sample("kind", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Poisson(self.mean[kind]).to_event(1), obs=x)

    def guide(self, x: Counts):
        pass
