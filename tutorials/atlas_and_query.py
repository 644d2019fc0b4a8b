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
# # An atlas, and cells that come later
#
# A model is trained once on a reference. New cells, measured with another technology, are then mapped into its latent
# space in seconds, their labels are carried over, and the reference does not move.
#
# The data are blood cells measured with three technologies of 10x Genomics (3' v1, 3' v2, 5'; Korsunsky et al. 2019).
# The first two are the reference.

# %% tags=["remove-stderr"]
# needs: pbmc_3tech.h5ad
import os
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scanpy as sc

import pyrosc
from pyrosc import pl

# %%
adata = ad.read_h5ad(Path(os.environ.get("PYROSC_TEST_DATA", ".")) / "pbmc_3tech.h5ad")
adata.obs["technology"] = adata.obs["donor"].astype(str)
technologies = sorted(adata.obs["technology"].unique())
is_query = (adata.obs["technology"] == technologies[-1]).to_numpy()
reference, query = adata[~is_query].copy(), adata[is_query].copy()
truth = query.obs.pop("cell_type")  # for the end
technologies, reference.shape, query.shape

# %% [markdown]
# ## The atlas
#
# Two choices are for the sake of what comes later: the batch is given, and the encoder sees it
# (`encode_covariates=True`). Without the second there is nothing about the encoder that a query could adapt.

# %%
atlas = pyrosc.SCVI.from_anndata(reference, batch_key="technology", encode_covariates=True, n_layers=2)
atlas.fit(progress=False)
atlas.save("atlas")
before = atlas.get_latent_representation()
atlas

# %% [markdown]
# ## The query
#
# The saved model is all that is needed: not the reference's counts. The query has its genes in another order, and lacks
# some of them.

# %%
order = np.random.default_rng(0).permutation(query.n_vars)[100:]
query = query[:, order].copy()
model = pyrosc.SCVI.from_reference("atlas", query)
model.fit(progress=False)
model.annotate(query)
model

# %% [markdown]
# Only rows of the new technology have moved. The reference is what it was, to the last bit:

# %%
assert np.array_equal(model.get_latent_representation(reference), before)
sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())

# %% [markdown]
# ## Labels, and how sure they are

# %%
found = pyrosc.transfer_labels(model, reference, "cell_type", query)
query.obs[["label", "uncertainty"]] = found
right = (found["label"].astype(str) == truth.astype(str)).rename("right")
print(f"{right.mean():.1%} of the labels are right")
found.groupby(pd.cut(found["uncertainty"], [-0.01, 0.1, 0.3, 0.5, 1]), observed=True).apply(
    lambda part: pd.Series({"cells": len(part), "right": right[part.index].mean()}), include_groups=False
)

# %% [markdown]
# ## In one picture
#
# The normalised expression of the query is that of *its* technology; `do=` decodes it as if of another.

# %%
both = ad.AnnData(
    obs=pd.DataFrame(
        {
            "technology": [*reference.obs["technology"], *query.obs["technology"]],
            "cell type": [*reference.obs["cell_type"].astype(str), *query.obs["label"].astype(str)],
        },
        index=[*reference.obs_names, *query.obs_names],
    ),
    obsm={"X_scVI": np.concatenate([before, query.obsm["X_scVI"]])},
)
sc.pp.neighbors(both, use_rep="X_scVI", random_state=0)
sc.tl.umap(both, random_state=0)
figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
pl.latent(both, "technology", ax=axes[0], title="Technology")
pl.latent(both, "cell type", ax=axes[1], title="Cell type: annotated, and carried over")
plt.show()

# %%
as_reference = model.get_normalized_expression(gene_list=["LYZ", "CD3D"], do={"technology": technologies[0]})
as_measured = model.get_normalized_expression(gene_list=["LYZ", "CD3D"])
(as_measured.mean() / as_reference.mean()).rename(f"{technologies[-1]} over {technologies[0]}")

# %% [markdown]
# ## What to keep in mind
#
# - A state that the reference has never seen is mapped to the nearest one that it knows. Low `get_elbo(per_cell=True)` shows
#   cells that the model explains badly.
# - A shift per batch takes out what is common to the query's cells, be it technology or disease.
# - Next query: `pyrosc.surgery(model, next_query)`; the first query then stays, too.
