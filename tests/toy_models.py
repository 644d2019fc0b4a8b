"""Small models for tests, one of each shape that the package has to carry."""

from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn

from pyrosc import Model, PathwiseELBO, Plan
from pyrosc.data import Batch, ContinuousCovariates, Counts, Index, Protein, ProteinMask
from pyrosc.nn import CategoryTable, CellTable, NormalEncoder

QUICK = Plan(steps=40, min_epochs=3, batch_size=32, lr=1e-2)


class Factors(Model):
    """Poisson factors: x ~ Poisson(l softmax(W z + E[batch])), with a hand-written guide."""

    elbo = PathwiseELBO(analytic_kl=True)
    plan = QUICK
    expression = "rho"
    slots: ClassVar = {"z": "obsm/X_factors", "library": "obs/factors_library", "rho": "layers/factors_rho"}

    def __init__(self, registry, n_latent: int = 3, widths: tuple[int, ...] = (16,)):
        super().__init__(registry)
        genes = registry.n_vars()
        self.n_latent = n_latent
        self.encoder = NormalEncoder(genes, n_latent, n_hidden=widths[0], dropout=0.1)
        self.loadings = nn.Linear(n_latent, genes)
        self.effect = CategoryTable("batch", registry.n_categories("batch"), (genes,))

    def model(self, x: Counts, batch: Batch):
        with self.cells(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.n_latent), 1.0).to_event(1))
            library = pyro.deterministic("library", x.sum(-1), event_dim=0)
            rho = (self.loadings(z) + self.effect(batch)).softmax(-1)
            pyro.deterministic("rho", rho, event_dim=1)
            pyro.sample("x", dist.Poisson(library.unsqueeze(-1) * rho + 1e-6).to_event(1), obs=x)

    def guide(self, x: Counts, batch: Batch):
        with self.cells(x):
            pyro.sample("z", dist.Normal(*self.encoder(x.log1p())).to_event(1))


class Rates(Model):
    """One rate per gene, raised by the square root of a covariate: NaN where that is negative."""

    plan = QUICK

    def model(self, x: Counts, numbers: ContinuousCovariates):
        with pyro.plate("genes", x.shape[-1]):
            rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with self.cells(x):
            factor = 1 + numbers.sum(-1, keepdim=True).sqrt()
            pyro.sample("x", dist.Poisson(rate * factor).to_event(1), obs=x)


class Cells(Model):
    """Free parameters for each cell: x ~ Poisson(exp(W u[cell] + b))."""

    plan = QUICK

    def __init__(self, registry, n_factors: int = 2):
        super().__init__(registry)
        self.table = CellTable(registry.n_obs, (n_factors,), scale=0.1)
        self.loadings = nn.Linear(n_factors, registry.n_vars())

    def model(self, x: Counts, cell: Index):
        with self.cells(x):
            u = pyro.deterministic("u", self.table(cell), event_dim=1)
            pyro.sample("x", dist.Poisson(self.loadings(u).exp()).to_event(1), obs=x)


class TwoSources(Model):
    """Two data sets with cells of their own and one latent space, in the shape of gimVI."""

    plan = QUICK

    def __init__(self, registry, n_latent: int = 3):
        super().__init__(registry)
        self.n_latent = n_latent
        sizes = {"seq": registry["seq"].n_vars(), "spatial": registry["spatial"].n_vars()}
        self.encoders = nn.ModuleDict({s: NormalEncoder(g, n_latent, 16) for s, g in sizes.items()})
        self.decoders = nn.ModuleDict({s: nn.Linear(n_latent, g) for s, g in sizes.items()})

    def model(self, x: Counts(source="seq"), y: Counts(source="spatial")):
        for source, counts in {"seq": x, "spatial": y}.items():
            with self.cells(counts, source=source):
                z = pyro.sample(f"z_{source}", dist.Normal(x.new_zeros(self.n_latent), 1.0).to_event(1))
                mean = self.decoders[source](z).softmax(-1) * counts.sum(-1, keepdim=True) + 1e-6
                pyro.sample(source, dist.Poisson(mean).to_event(1), obs=counts)

    def guide(self, x: Counts(source="seq"), y: Counts(source="spatial")):
        for source, counts in {"seq": x, "spatial": y}.items():
            with self.cells(counts, source=source):
                pyro.sample(f"z_{source}", dist.Normal(*self.encoders[source](counts.log1p())).to_event(1))


class Adversary(Factors):
    """Factors with a classifier of batches on z: it learns to tell them, the encoder to fool it."""

    owners: ClassVar = {"classify": "classifier"}

    def __init__(self, registry, n_latent: int = 3):
        super().__init__(registry, n_latent)
        self.classifier = nn.Linear(n_latent, registry.n_categories("batch"))

    def auxiliary(self, batch, sites, step, kl_weight):
        z = sites["z"]
        own = nn.functional.cross_entropy(self.classifier(z.detach()), batch["batch"])
        return {"classify": own, "fool": -nn.functional.cross_entropy(self.classifier(z), batch["batch"])}


class Mixture(Model):
    """A mixture of two Poisson laws, enumerated, with a latent number per cell and an adversary on it."""

    plan = QUICK
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    owners: ClassVar = {"classify": "classifier"}

    def __init__(self, registry):
        super().__init__(registry)
        genes = registry.n_vars()
        self.encoder = NormalEncoder(genes, 1, 8)
        self.logits = nn.Parameter(torch.zeros(2))
        self.profiles = nn.Parameter(torch.randn(2, genes))
        self.classifier = nn.Linear(1, 2)

    def model(self, x: Counts, batch: Batch):
        with self.cells(x):
            size = pyro.sample("size", dist.Normal(0.0, 1.0))
            kind = pyro.sample("kind", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            mean = self.profiles[kind].exp() * size.exp().unsqueeze(-1)
            pyro.sample("x", dist.Poisson(mean).to_event(1), obs=x)

    def guide(self, x: Counts, batch: Batch):
        loc, scale = self.encoder(x.log1p())
        with self.cells(x):
            pyro.sample("size", dist.Normal(loc.squeeze(-1), scale.squeeze(-1)))

    def auxiliary(self, batch, sites, step, kl_weight):
        size = sites["size"].unsqueeze(-1)
        own = nn.functional.cross_entropy(self.classifier(size.detach()), batch["batch"])
        return {"classify": own, "fool": -nn.functional.cross_entropy(self.classifier(size), batch["batch"])}


class Proteins(Model):
    """RNA and protein of the same cells, from obsm or from a MuData; proteins may be missing."""

    plan = QUICK

    def __init__(self, registry):
        super().__init__(registry)
        self.rna, self.adt = nn.Linear(2, registry.n_vars("x")), nn.Linear(2, registry.n_vars("y"))

    def model(self, x: Counts, y: Protein, measured: ProteinMask):
        with self.cells(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(self.rna(z).exp()).to_event(1), obs=x)
            law = dist.Poisson(self.adt(z).exp()).mask(measured)
            pyro.sample("y", law.to_event(1), obs=y)
