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
# # Factors, and genes with too many zeros
#
# Two models that differ from scVI in one place each. **LinearSCVI** decodes linearly, so that each latent dimension is a factor
# with a loading per gene. **AUTOZI** asks of each gene whether it has more zeros than a negative binomial explains. Both
# on the 700 blood cells that come with the installation.

# %% tags=["remove-stderr"]
import pandas as pd

import pyrosc
from pyrosc import pl

adata = pyrosc.datasets.pbmc68k()
adata

# %% [markdown]
# ## Factors with loadings
#
# With `bayesian=True` each loading has a posterior, and factors that the data do not need are switched off.

# %% tags=["remove-stderr"]
linear = pyrosc.LinearSCVI.from_anndata(adata, n_latent=6, bayesian=True)
linear.fit(progress=False)
linear.get_loadings().std().round(2)  # how much each factor does

# %%
axes = pl.loadings(linear, n_genes=8)

# %% [markdown]
# The bars are 90 % credible intervals: genes whose interval is far from zero belong to the factor. As a table, here the genes
# that the strongest factor raises or lowers most surely:

# %%
table = linear.get_loadings(credible_interval=0.9)
strongest = linear.get_loadings().std().idxmax()
sure = table[(table["factor"] == strongest) & table["excludes_zero"]]
sure.reindex(sure["loading"].abs().sort_values(ascending=False).index).head(8).round(2)

# %% [markdown]
# Which cells have it? The factors are columns of the latent space.

# %%
linear.annotate(adata)
scores = pd.DataFrame(adata.obsm["X_LDVAE"], index=adata.obs_names, columns=linear.get_loadings().columns)
scores.groupby(adata.obs["bulk_labels"], observed=True).mean().round(1)

# %% [markdown]
# ## Genes with too many zeros
#
# AUTOZI gives each gene a probability that it is zero-inflated. With molecular barcodes that is seldom a matter of the
# instrument: such genes are off in some cells that look, by all other genes, like those where they are on.

# %% tags=["remove-stderr"]
zeros = pyrosc.AUTOZI.from_anndata(adata)
zeros.fit(progress=False)
inflated = zeros.get_zero_inflation().set_index("gene")["probability"].sort_values(ascending=False)
print(f"{(inflated > 0.5).sum()} of {len(inflated)} genes are more likely inflated than not")
inflated.head(8).round(2)

# %% [markdown]
# The prior matters for genes with few counts: they cannot tell. How the answer goes with a gene's mean:

# %%
mean = pd.Series(adata.X.mean(0).A1, index=adata.var_names, name="mean count")
groups = pd.qcut(mean, 4, labels=["lowest quarter", "second", "third", "highest"])
inflated.groupby(groups, observed=True).describe()[["count", "mean", "max"]].round(2)
