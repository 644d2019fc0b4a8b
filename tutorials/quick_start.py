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
# # Quick start: scVI on blood cells
#
# From a count matrix to a latent space, a UMAP, denoised expression and a saved model, in about a minute on a
# laptop and without a download.
#
# The data are 700 peripheral blood mononuclear cells (PBMCs) of one donor
# ([Zheng et al. 2017](https://doi.org/10.1038/ncomms14049)), 765 genes, with cell types by correlation with
# sorted populations. They come with scanpy; pyrosc rebuilds their integer counts.

# %% tags=["remove-stderr"]
import numpy as np
import scanpy as sc

import pyrosc
from pyrosc import datasets, pl

# %%
adata = datasets.pbmc68k()
adata

# %% [markdown]
# ## Make a model
#
# scVI wants raw counts. Here they are in `adata.X`; had they been in a layer, we would add `layer="counts"`, and
# for several batches `batch_key="batch"`. Data that do not fit are refused before any training, with a message that
# says where the problem is:

# %%
scaled = adata.copy()
sc.pp.normalize_total(scaled)
try:
    pyrosc.SCVI.from_anndata(scaled)
except pyrosc.DataError as error:
    print(error)

# %% [markdown]
# We keep 50 cells aside. The model will not see them until the end, where they play the part of new data.

# %%
rng = np.random.default_rng(0)
is_new = np.isin(np.arange(adata.n_obs), rng.choice(adata.n_obs, 50, replace=False))
new_cells, adata = adata[is_new].copy(), adata[~is_new].copy()

model = pyrosc.SCVI.from_anndata(adata)
model

# %% [markdown]
# ## Train
#
# One call. A tenth of the cells is held out, and the weights kept are those of the epoch with the best held-out
# ELBO. (`progress=False` only keeps this page tidy: by default a bar shows epoch, train and held-out ELBO.)

# %%
model.fit(progress=False)
model

# %% [markdown]
# `history` has a row per epoch. ELBOs are in nats per cell, higher is better, and always those of the full bound:
# the weight of the KL term, which rises during the first epochs of training, does not enter them.

# %%
model.history.tail(3).round(3)

# %%
_ = pl.training_curve(model)

# %% [markdown]
# The gap between the two curves is what the network has learned about the training cells alone; with 585 of them it
# is wide, and it is why the kept weights are an earlier epoch's.
#
# ## The latent space
#
# Ten numbers per cell, in the order of the rows of `adata`. `annotate` writes them into the AnnData, along with what
# the model is and how it was trained; from there on it is scanpy as usual.

# %%
model.annotate(adata)
adata.obsm["X_scVI"].shape, dict(adata.uns["pyrosc"]["SCVI"])

# %%
sc.pp.neighbors(adata, use_rep="X_scVI", random_state=0)
sc.tl.umap(adata, random_state=0)
_ = pl.latent(adata, "bulk_labels")

# %% [markdown]
# The same numbers are returned, without touching the AnnData, by a method:

# %%
z = model.get_latent_representation()
np.array_equal(z, adata.obsm["X_scVI"])

# %% [markdown]
# ## Expression without counting noise
#
# The decoder gives each gene's share of a cell's transcripts. Scaled to 10,000 counts per cell, four markers: *CD79A*
# of B cells, *NKG7* of NK and cytotoxic T cells, *LYZ* of monocytes and dendritic cells, *CD3D* of T cells.

# %%
markers = ["CD79A", "NKG7", "LYZ", "CD3D"]
denoised = model.get_normalized_expression(gene_list=markers, library_size=1e4)
denoised.groupby(adata.obs["bulk_labels"], observed=True).median().round(1)

# %%
_ = pl.expression(model, markers, columns=2)

# %% [markdown]
# ## Does the model fit?
#
# Counts are drawn from the trained model for the same cells and compared with the observed ones, gene by gene:
# variance against mean, and the share of zeros. Where the model fits, the two clouds coincide and the genes of the
# right panel lie on the diagonal.

# %%
_ = pl.predictive_check(model)

# %% [markdown]
# A number for the same question is the held-out ELBO, or the tighter importance-weighted log-likelihood, in nats per
# cell. Compare models on the same cells only.

# %%
held_out = model.split["main"][1]
{
    "ELBO": round(model.get_elbo(indices=held_out, n_samples=10), 1),
    "log-likelihood": round(model.get_marginal_ll(indices=held_out, n_samples=100), 1),
}

# %% [markdown]
# `pyrosc.report` puts all of this on one HTML page, with further checks, a verdict in plain words on each, and what to
# try where one fails. Some parts take longer than others and can be left out:

# %%
pyrosc.report(
    model,
    path="pbmc68k_report.html",
    labels_key="bulk_labels",
    leave_out=["Posterior of the cells", "Simulated cells"],
)

# %% [markdown]
# ## Save, load, and look at new cells
#
# The AnnData is an ordinary one. The model goes into a folder of its own: weights as safetensors, everything else as
# JSON, no pickle.

# %%
adata.write_h5ad("pbmc68k_scvi.h5ad")
model.save("pbmc68k_scvi_model")
again = pyrosc.load("pbmc68k_scvi_model", sc.read_h5ad("pbmc68k_scvi.h5ad"))
np.allclose(again.get_latent_representation(), z, atol=1e-5)

# %% [markdown]
# To ask about other cells the training data are not needed. Genes are matched by name, whatever their order. Here the
# 50 cells that were kept aside get a place in the latent space, and from it the label of the nearest training cell:

# %%
model = pyrosc.load("pbmc68k_scvi_model")
z_new = model.get_latent_representation(new_cells)
nearest = ((z_new[:, None] - z) ** 2).sum(-1).argmin(1)
label = adata.obs["bulk_labels"].to_numpy()[nearest]
print(f"{(label == new_cells.obs['bulk_labels'].to_numpy()).mean():.0%} of the new cells get their own label")

# %% [markdown]
# The ten labels include CD4 and CD8 subsets that are hard to tell apart at this depth. Every method takes `adata=`
# and `indices=` in this way; rows come out in the order asked for.
#
# ## Next
#
# - Your own file, from the command line: `python -m pyrosc demo --data your.h5ad --batch-key batch --out results`.
# - All options of scVI and what they change: the user guide.
# - Models of your own: the tutorial *Write your own model*.
