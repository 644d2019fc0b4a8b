# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own model
#
# A model in pyrosc is a class with two methods in plain [Pyro](https://pyro.ai): `model`, the generative process, and
# `guide`, the approximate posterior. Data handling, training, held-out evaluation, posteriors, writing into AnnData,
# saving and loading come with it. We write a Poisson factor model three times, each time with less code, and then a
# mixture with a discrete latent variable.

# %% tags=["remove-stderr"]
from typing import ClassVar

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyrosc
from pyrosc import datasets, pl
from pyrosc.data import Counts
from pyrosc.distributions import Poisson
from pyrosc.nn import NormalEncoder

adata = datasets.pbmc68k()

# %% [markdown]
# ## Model and guide
#
# Cell $n$ has $k$ factors $z_n \sim \mathrm{Normal}(0, I)$; the shares of the genes in its transcripts are
# $\rho_n = \mathrm{softmax}(W z_n + b)$; counts are $x_{ng} \sim \mathrm{Poisson}(\ell_n \rho_{ng})$ with the observed
# total $\ell_n$.
#
# - The **signature is the schema**: `x: Counts` says that the model reads a count matrix, and that users name it by
#   `layer=`. A batch would be one more argument, `batch: Batch`, and users would write `batch_key=`.
# - `self.cells(x)` is the plate over the minibatch. It knows how many cells train, so that the loss is scaled right.
# - Parameters are `nn.Parameter`s of ordinary PyTorch modules; there is no `pyro.param`.
# - Options of `__init__` are numbers and text. They are saved with the model.
# - `slots` says where `annotate` writes a site. The site names `z` and `rho` are those that the latent space and
#   normalised expression are looked for under; `latent = "…"` and `expression = "…"` change that.


# %%
class PoissonFactors(pyrosc.Model):
    """Poisson counts around a low-rank matrix of shares."""

    slots: ClassVar = {"z": "obsm/X_factors"}
    plan = pyrosc.Plan(steps=400)  # training defaults; every one can be overridden in fit()

    def __init__(self, registry, n_latent: int = 10, n_hidden: int = 64):
        super().__init__(registry)
        self.n_latent = n_latent
        self.loadings = nn.Linear(n_latent, registry.n_vars())
        self.encoder = NormalEncoder(registry.n_vars(), n_latent, n_hidden)

    def model(self, x: Counts):
        with self.cells(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.n_latent), 1.0).to_event(1))
            log_rho = self.loadings(z).log_softmax(-1)
            pyro.deterministic("rho", log_rho.exp(), event_dim=1)
            log_total = x.sum(-1, keepdim=True).log()
            pyro.sample("x", Poisson(log_mean=log_total + log_rho).to_event(1), obs=x)

    def guide(self, x: Counts):
        with self.cells(x):
            loc, scale = self.encoder(x.log1p())
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


# %% [markdown]
# That is all of it. `describe` shows what Pyro sees:

# %%
factors = PoissonFactors.from_anndata(adata)
print(factors.describe())

# %% [markdown]
# ## Everything else is there already

# %%
factors.fit(progress=False)
factors

# %%
factors.annotate(adata)
z = adata.obsm["X_factors"]
widest = z.var(0).argsort()[-2:]  # the two factors in which cells differ most
_ = pl.latent(z[:, widest], adata.obs["bulk_labels"])

# %% [markdown]
# Saving needs nothing more either. Loading a class that is not pyrosc's own takes the class as an argument: no code
# named in a file is ever imported.

# %%
factors.save("factors")
again = pyrosc.load("factors", adata, cls=PoissonFactors)
again

# %% [markdown]
# `posterior` gives any site of the model, latent or deterministic; here the share of *NKG7* in the first three cells,
# with the quantiles of 200 draws:

# %%
draws = again.posterior("rho", indices=[0, 1, 2], n_samples=200, reduce=[0.05, 0.5, 0.95])["rho"]
pd.DataFrame(draws[:, :, adata.var_names.get_loc("NKG7")].T, adata.obs_names[:3], ["5 %", "50 %", "95 %"])

# %% [markdown]
# ## Check it
#
# `check_model` runs the contract that every model of pyrosc keeps, on made-up data: among others that the same seed
# gives the same weights, that a loaded model gives the results of the saved one, that results do not depend on the
# order of the cells, that the minibatch loss is unbiased, and that no global state is touched.

# %%
pyrosc.check_model(PoissonFactors)

# %% [markdown]
# ## Without a guide
#
# A class without a `guide` gets one made from its model: `pyrosc.Amortized` gives every latent site inside the plate
# over cells an encoder network, and every global one a Normal factor.


# %%
class GuideFree(pyrosc.Model):
    """The same model; its guide is derived."""

    plan = PoissonFactors.plan

    def __init__(self, registry, n_latent: int = 10):
        super().__init__(registry)
        self.n_latent = n_latent
        self.loadings = nn.Linear(n_latent, registry.n_vars())

    model = PoissonFactors.model


guide_free = GuideFree.from_anndata(adata).fit(progress=False)

# %% [markdown]
# ## Only a function
#
# For a first try a function will do. It has no parameters of its own, so all that is to be learned is a latent site
# with a prior, the loadings too: a Bayesian factor model. `pyrosc.cells(x)` is the plate. `pyrosc.auto` makes a class
# of it, with a guide of your choice: `pyrosc.Amortized`, or any of Pyro's AutoGuides.


# %%
def bayesian_factors(x: Counts):
    """Poisson factors with a prior on the loadings."""
    k, g = 10, x.shape[-1]
    loadings = pyro.sample("loadings", dist.Normal(x.new_zeros(k, g), 1.0).to_event(2))
    intercept = pyro.sample("intercept", dist.Normal(x.new_zeros(g), 3.0).to_event(1))
    with pyrosc.cells(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(k), 1.0).to_event(1))
        log_rho = (intercept + z @ loadings).log_softmax(-1)
        log_total = x.sum(-1, keepdim=True).log()
        pyro.sample("x", Poisson(log_mean=log_total + log_rho).to_event(1), obs=x)


plan = PoissonFactors.plan
encoded = pyrosc.auto(bayesian_factors, pyrosc.Amortized, plan=plan).from_anndata(adata)
encoded.fit(progress=False)
per_cell = pyrosc.auto(bayesian_factors, AutoNormal, plan=plan).from_anndata(adata)
_ = per_cell.fit(progress=False)

# %% [markdown]
# `AutoNormal` gives each cell a mean and a standard deviation of its own. Such a guide knows nothing of cells that it
# was not trained on: all cells train, and there is no held-out ELBO.
#
# ## Compare
#
# ELBOs in nats per cell, higher is better, the first three on the same held-out cells:

# %%
held_out = factors.split["main"][1]
rows = {
    "model and guide": factors,
    "model, derived guide": guide_free,
    "function, Amortized": encoded,
    "function, AutoNormal": per_cell,
}
table = pd.DataFrame(
    {
        name: {
            "held-out ELBO": m.get_elbo(indices=held_out, n_samples=10) if m is not per_cell else None,
            "all cells": m.get_elbo(n_samples=10),
            "log p(x | z), all cells": -m.get_reconstruction_error(n_samples=10),
        }
        for name, m in rows.items()
    }
).T
table.round(1)

# %% [markdown]
# The derived guide does as well as the one written by hand. The Bayesian version fits less closely: its 8,415 loadings
# and intercepts are uncertain, drawn towards zero by their prior, and their KL counts, shared by 630 cells; and its
# per-cell guide learns slowly, since a cell's own numbers move only in the steps that contain it. What one gets for it
# is a standard deviation with every loading:

# %%
loadings = encoded.posterior("loadings", n_samples=100, reduce=None, indices=[0])["loadings"]
factor = loadings.mean(0).std(1).argmax()
top = pd.DataFrame({"mean": loadings[:, factor].mean(0), "sd": loadings[:, factor].std(0)}, adata.var_names)
top.sort_values("mean").iloc[[0, 1, 2, -3, -2, -1]].round(2)

# %% [markdown]
# ## A discrete latent variable
#
# A mixture of Poisson laws: each cell is of one of six kinds. The kind is summed out exactly by Pyro's enumeration,
# so that nothing has to be approximated: mark the site, choose the objective `TraceEnum_ELBO`, and `posterior` gives
# the exact probabilities of the kinds.
#
# `initialize` is called once with the data, to start from something sensible: here the mean profile, and noise that
# tells the kinds apart.


# %%
class PoissonMixture(pyrosc.Model):
    """Each cell has one of `n_kinds` expression profiles."""

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    latent = "kind"
    slots: ClassVar = {"kind": "obsm/kind_probabilities"}
    plan = pyrosc.Plan(steps=300, lr=0.05)

    def __init__(self, registry, n_kinds: int = 6):
        super().__init__(registry)
        self.logits = nn.Parameter(torch.zeros(n_kinds))
        self.profiles = nn.Parameter(0.5 * torch.randn(n_kinds, registry.n_vars()))

    def initialize(self, data):
        shares = torch.as_tensor(data.summary("x").gene_sums + 1.0)
        self.profiles.data += (shares / shares.sum()).log().float()

    def model(self, x: Counts):
        profiles = self.profiles.log_softmax(-1)
        with self.cells(x):
            kind = pyro.sample("kind", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            log_total = x.sum(-1, keepdim=True).log()
            pyro.sample("x", Poisson(log_mean=log_total + profiles[kind]).to_event(1), obs=x)


mixture = PoissonMixture.from_anndata(adata).fit(progress=False)
probabilities = mixture.posterior("kind")["kind"]
probabilities.shape, probabilities[:2].round(3)

# %%
pd.crosstab(adata.obs["bulk_labels"], probabilities.argmax(1)).rename_axis(columns="kind")

# %% [markdown]
# ## Common mistakes, and what they say
#
# Most are caught when the model is made or in its first step, before any time is lost.


# %%
def attempt(cls, **options):
    """Make a model, and print the error."""
    try:
        cls.from_anndata(adata, **options)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


# %% [markdown]
# An argument without an annotation: nothing says what it is.


# %%
class NoAnnotation(pyrosc.Model):
    def model(self, x): ...


attempt(NoAnnotation)

# %% [markdown]
# A latent site that the guide forgot:


# %%
class NoGuideSite(PoissonFactors):
    def guide(self, x: Counts): ...


attempt(NoGuideSite)

# %% [markdown]
# A discrete site under the default objective, which differentiates through its draws:


# %%
class DiscreteDraw(PoissonMixture):
    elbo = pyrosc.PathwiseELBO()

    def guide(self, x: Counts):
        with self.cells(x):
            pyro.sample("kind", dist.Categorical(logits=self.logits))


attempt(DiscreteDraw)

# %% [markdown]
# A parameter in Pyro's global store, where two models would meet:


# %%
class GlobalParameter(pyrosc.Model):
    def model(self, x: Counts):
        rate = pyro.param("rate", x.new_ones(x.shape[-1]))
        with self.cells(x):
            pyro.sample("x", Poisson(mean=rate).to_event(1), obs=x)


attempt(GlobalParameter)

# %% [markdown]
# An option that does not exist:

# %%
attempt(PoissonFactors, n_latnet=20)

# %% [markdown]
# And what only the contract finds: a plate that does not know how many cells there are. It trains, but the terms of a
# minibatch are not scaled up to the data: ELBOs are wrong, and a site outside of the plate would count once per
# minibatch.


# %%
class PlainPlate(PoissonFactors):
    def model(self, x: Counts):
        with pyro.plate("cells", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.n_latent), 1.0).to_event(1))
            log_rho = self.loadings(z).log_softmax(-1)
            pyro.sample("x", Poisson(log_mean=log_rho + x.sum(-1, keepdim=True).log()).to_event(1), obs=x)

    def guide(self, x: Counts):
        with pyro.plate("cells", len(x), dim=-1):
            pyro.sample("z", dist.Normal(*self.encoder(x.log1p())).to_event(1))


try:
    pyrosc.check_model(PlainPlate)
except pyrosc.ContractError as error:
    print(str(error).splitlines()[1].removesuffix(" AssertionError: "))
