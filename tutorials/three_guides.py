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
# # Three guides for one model
#
# A model says how data come about; a guide says how much we are ready to compute to learn about what is not seen. The
# two are apart in Pyro, so one model can have several guides. Here CellAssign gets three: a point, independent normals,
# and a Markov chain that is exact in the limit, to check them by. Then we do the same for the proportions of
# cell types in spatial spots, and for a model that we write ourselves.

# %% tags=["remove-stderr"]
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoNormal, init_to_value

import pyrosc
from pyrosc.data import Counts

adata = pyrosc.datasets.pbmc68k()
some = adata[np.random.default_rng(0).permutation(adata.n_obs)[:200]].copy()
markers = {
    "B": ["CD79A", "CD79B", "MS4A1"],
    "T": ["CD3D", "CD3E", "IL32", "IL7R"],
    "NK": ["GNLY", "NKG7", "GZMB", "PRF1"],
    "myeloid": ["LYZ", "CST3", "TYROBP", "FCER1A"],
}
options = {"markers": markers, "dispersion": "gene"}
all_at_once = {"max_steps": 600, "train_size": 1.0, "batch_size": 200, "progress": False}

# %% [markdown]
# ## A point
#
# This is what `CellAssign` does by itself: the global sites get a guide of point masses (Pyro's `AutoDelta`), the type of
# each cell is summed out exactly (`TraceEnum_ELBO`), and gradient ascent on the sum is EM. The result is a maximum a
# posteriori estimate: fold changes δ (here as natural logarithms), without a word on how sure they are. We take 200 cells, so
# that there is something to be unsure of.

# %% tags=["remove-stderr"]
point = pyrosc.CellAssign.from_anndata(some, **options).fit(**all_at_once)
point.get_marker_effects().round(2).dropna(how="all")

# %% [markdown]
# ## Independent normals
#
# `pyrosc.auto` gives the same class another guide, any of `pyro.infer.autoguide`. All else stays: how types are summed
# out, the schema, fitting, `predict`, saving.

# %% tags=["remove-stderr"]
Bayesian = pyrosc.auto(pyrosc.CellAssign, AutoNormal)
normal = Bayesian.from_anndata(some, **options).fit(**all_at_once)
low, high = (normal.get_marker_effects(n_samples=500, quantile=q).stack() for q in (0.05, 0.95))
table = pd.DataFrame({"point": point.get_marker_effects().stack(), "low": low, "high": high})
table.round(2)

# %% [markdown]
# ## A Markov chain
#
# The model is a Pyro program, so Pyro's NUTS runs on it too. All global sites have proper priors, which it needs:
# `effect_loc` Normal(0, 1), `effect_scale` half-Normal(1), `effect` Normal(0, 1) for each pair of marker and type,
# `log_odds` a Dirichlet in disguise. What are parameters of the model (levels of genes, dispersions) are held at the values that
# the fit above found. The type of a cell is again summed out. The chain starts in the middle of the second guide.

# %% tags=["remove-stderr"]
_, batch = next(normal.batches(normal.dataset(), np.arange(200)))
with pyro.settings.context(module_local_params=True):
    start = {name: value.detach() for name, value in normal.auto_guide.inner.median().items()}
with torch.random.fork_rng():
    torch.manual_seed(0)
    kernel = NUTS(
        normal.model, max_plate_nesting=1, max_tree_depth=4, init_strategy=init_to_value(values=start)
    )
    chain = MCMC(kernel, num_samples=80, warmup_steps=60, disable_progbar=True)
    with normal.minibatch(batch):
        chain.run(**normal.inputs(batch))
    draws = chain.get_samples()
    delta = Predictive(normal.model, draws, return_sites=["delta"])(**normal.inputs(batch))["delta"]
exact = delta.reshape(len(delta), -1).numpy()
{name: tuple(value.shape) for name, value in draws.items()}

# %% [markdown]
# How do the guides compare?

# %%
names = [
    (normal.registry.var_names()[g], normal.types[c])
    for g, c in zip(normal.pairs.genes, normal.pairs.types, strict=True)
]
chain_low, chain_high = np.quantile(exact, [0.05, 0.95], axis=0)
table = table.join(
    pd.DataFrame({"nuts_low": chain_low, "nuts_high": chain_high}, index=pd.MultiIndex.from_tuples(names))
)

fig, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
y = np.arange(len(table))
ax.hlines(y - 0.12, table["nuts_low"], table["nuts_high"], color="black", lw=3, label="NUTS, 90 %")
ax.hlines(y + 0.12, table["low"], table["high"], color="tab:orange", lw=3, label="AutoNormal, 90 %")
ax.plot(table["point"], y, "o", color="tab:blue", ms=4, label="AutoDelta")
ax.set(yticks=y, yticklabels=[f"{gene} ({kind})" for gene, kind in table.index], xlabel="log fold change δ")
ax.invert_yaxis()
fig.legend(loc="outside upper center", ncols=3)

# %% [markdown]
# Where counts are many, the three agree. Where a marker is rare in these cells the chain's interval is wide, and the point
# says nothing of it. The normals are cheap (seconds) and near to the chain. Their widths, `high − low`, against the chain's:

# %%
ratio = (table["high"] - table["low"]) / (table["nuts_high"] - table["nuts_low"])
ratio.describe()[["min", "50%", "max"]].round(2)

# %% [markdown]
# ## Proportions in spots, with intervals
#
# Stereoscope estimates how much of each cell type is in a spot. The published method gives one number;
# `proportions="posterior"` gives each spot a distribution. On spots that were drawn from the model we can ask how often a
# 90 % interval holds the truth.

# %% tags=["remove-stderr"]
reference, spots = pyrosc.simulate.stereoscope(400, 100, n_genes=120, n_types=4, seed=1)
rna = pyrosc.RNAStereoscope.from_anndata(reference, labels_key="cell_type").fit(progress=False)
spatial = pyrosc.SpatialStereoscope.from_rna_model(spots, rna, proportions="posterior").fit(progress=False)
bands = spatial.get_proportions(quantiles=(0.05, 0.95))
low, high = (bands.xs(q, axis=1, level="quantile") for q in (0.05, 0.95))
truth = spots.obsm["true_proportions"]
print(f"mean width {(high - low).to_numpy().mean():.3f}")
print(f"share of true proportions inside: {((truth >= low) & (truth <= high)).to_numpy().mean():.2f}")

# %% [markdown]
# It is less than .9. What the guide cannot say is not in the intervals: the profiles and the factors of genes between technologies
# are points, which matters for so few spots; and the amount of a type that is absent has a posterior like an exponential
# distribution, where the guide has a log-normal one. Three guides for this model, too, would be worth the while.

# %% [markdown]
# ## A model that we write, and no guide at all
#
# A function with annotated arguments is a model. `pyrosc.Amortized` looks at its sites: those of cells get an
# encoder, those of genes a normal (or a point).


# %%
def factors(x: Counts):
    """Negative binomial factor analysis; loadings have a prior."""
    n_genes, k = x.shape[-1], 5
    with pyro.plate("genes", n_genes):
        level = pyro.sample("level", dist.Normal(-7.0, 2.0))
        loading = pyro.sample("loading", dist.Normal(torch.zeros(k), 0.5).to_event(1))
    with pyrosc.cells(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(k), 1.0).to_event(1))
        rho = pyro.deterministic("rho", (level + z @ loading.mT).softmax(-1), event_dim=1)
        rate = x.sum(-1, keepdim=True) * rho
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


# %% [markdown]
# One model, three guides again: a posterior for each cell by itself (`AutoNormal`), an encoder (`Amortized`), and an encoder
# with loadings as points. Only the encoder knows cells that it has not seen, so that only there some can be held out.

# %% tags=["remove-stderr"]
guides = {
    "AutoNormal": AutoNormal,
    "Amortized": pyrosc.Amortized,
    "Amortized, points": partial(pyrosc.Amortized, global_guide="delta"),
}
rows = {}
for name, guide in guides.items():
    model = pyrosc.auto(factors, guide).from_anndata(adata).fit(progress=False)
    rows[name] = {
        "ELBO per cell": model.get_elbo(),
        "seconds": model.history["seconds"].iloc[-1],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
pd.DataFrame(rows).T.round(1)

# %% [markdown]
# The ELBO of points leaves out what a distribution over loadings costs and gains, and is not comparable to the others.
# The rest of pyrosc does not mind which guide it was: `posterior`, `annotate`, `save` work with all of them.
