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
# # Chromatin accessibility
#
# **PeakVI** finds what is open in each cell, apart from how deeply the cell was sequenced. Here on 2,000 cells of bone marrow
# from two samples (Granja et al. 2019), with the 1,500 peaks that are seen most often.

# %% tags=["remove-stderr"]
# needs: hemato_atac.h5ad
import os
import warnings
from pathlib import Path

import numpy as np
import scanpy as sc

import pyrosc
from pyrosc import pl

adata = sc.read_h5ad(Path(os.environ.get("PYROSC_TEST_DATA", ".")) / "hemato_atac.h5ad")
seen = np.asarray((adata.X > 0).sum(0)).ravel()
rows = np.sort(np.random.default_rng(0).choice(adata.n_obs, 2000, replace=False))
adata = adata[rows, np.sort(np.argsort(-seen)[:1500])].copy()
adata.obs["type"] = adata.obs["BioClassification"].astype(str)
adata

# %% [markdown]
# The matrix counts insertions, two per fragment: even values outnumber odd ones. That is recognised, and fragments are
# taken:

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pyrosc.PEAKVI.from_anndata(adata, batch_key="Group")
print(caught[0].message)

# %% tags=["remove-stderr"]
model = pyrosc.PEAKVI.from_anndata(adata, batch_key="Group", counts="reads").fit(progress=False)
_ = pl.training_curve(model)

# %% tags=["remove-stderr"]
model.annotate(adata)
sc.pp.neighbors(adata, use_rep="X_PeakVI")
sc.tl.umap(adata, random_state=0)
_ = pl.latent(adata, "type")

# %% [markdown]
# How deeply a cell was sequenced is what its cell factor is for:

# %%
open_regions = np.asarray((adata.X > 0).sum(1)).ravel()
factors = model.get_library_size_factors()
correlation = np.corrcoef(factors, open_regions)[0, 1]
print(f"correlation of the cell factor with the number of open regions: {correlation:.2f}")

# %% [markdown]
# Which regions are open in B cells and not in monocytes? The effect is the difference of two probabilities, and a region is
# called where it is .05 or more:

# %%
table = model.differential_accessibility(groupby="type", group1="17_B", group2="11_CD14.Mono.1")
print(f"{int(table['is_da_fdr'].sum())} of {len(table)} regions differ")
table[["is_da_fdr", "proba_da", "effect_mean", "est_prob1", "est_prob2", "emp_prob1", "emp_prob2"]].head(8)

# %% [markdown]
# Accessibility itself, as a sparse matrix of what is above a threshold, and one region on the embedding:

# %%
accessible = model.get_normalized_accessibility(threshold=0.3)
print(f"{accessible.nnz / np.prod(accessible.shape):.1%} of the values are kept")
region = table.index[0]
adata.obs["accessibility"] = model.get_normalized_accessibility(region_list=[region]).to_numpy()[:, 0]
_ = pl.latent(adata, "accessibility", title=str(region))
