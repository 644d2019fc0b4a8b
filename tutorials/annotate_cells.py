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
# # From raw counts to cell types: CellAssign, then SCANVI
#
# A few marker genes say what some cells are; a latent space says which cells are alike. This notebook uses both:
# CellAssign reads the markers, and the cells that it is sure of teach SCANVI, which names the others.
#
# The data are 2,700 blood cells of one donor (10x Genomics, "3k PBMCs"), as they come from the instrument.

# %% tags=["remove-stderr"]
# needs: pbmc3k.h5ad
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import scanpy as sc

import pyrosc
from pyrosc import pl

# %%
here = Path(os.environ.get("PYROSC_TEST_DATA", ".")) / "pbmc3k.h5ad"
adata = sc.read_h5ad(here) if here.exists() else sc.datasets.pbmc3k()  # a download of 6 MB
adata.var_names_make_unique()
sc.pp.filter_genes(adata, min_cells=3)
adata.var["mt"] = adata.var_names.str.startswith("MT-")
sc.pp.calculate_qc_metrics(adata, qc_vars=["mt"], percent_top=None, log1p=False, inplace=True)
adata = adata[(adata.obs["pct_counts_mt"] < 5) & (adata.obs["n_genes_by_counts"] < 2500)].copy()
adata

# %% [markdown]
# ## What the markers say
#
# One list per type; a gene may be in several. A name that the data lack would be left out, with a warning.

# %%
markers = {
    "B": ["CD79A", "CD79B", "MS4A1", "CD19"],
    "CD4 T": ["CD3D", "CD3E", "IL7R", "CD4", "LDHB"],
    "CD8 T": ["CD3D", "CD3E", "CD8A", "CD8B", "GZMK"],
    "NK": ["GNLY", "NKG7", "KLRD1", "GZMB"],
    "CD14 monocyte": ["CD14", "LYZ", "S100A8", "S100A9"],
    "FCGR3A monocyte": ["FCGR3A", "MS4A7", "LST1", "AIF1"],
    "dendritic": ["FCER1A", "CLEC10A", "CD1C"],
    "platelet": ["PPBP", "PF4"],
}
cellassign = pyrosc.CellAssign.from_anndata(adata, markers=markers, other="other")
cellassign.fit(progress=False)
probabilities = cellassign.predict(soft=True)
cellassign.predict().value_counts()

# %% [markdown]
# The probabilities are exact under the model: each is the share of a type in the marginal likelihood of a cell's
# counts. How much each type raises its markers (natural logarithm of the fold change):

# %%
cellassign.get_marker_effects().round(1).dropna(how="all").head(12)

# %% [markdown]
# ## The cells that are sure teach the others
#
# We keep labels of probability above 0.95, and let SCANVI have the rest of the genes: the two thousand that vary
# most, where CellAssign saw thirty.

# %%
sure = (probabilities.max(axis=1) > 0.95) & (cellassign.predict() != "other")
adata.obs["label"] = cellassign.predict().astype(str).where(sure, "unknown")
counts = adata.obs["label"].value_counts()
adata.obs.loc[adata.obs["label"].isin(counts.index[counts < 5]), "label"] = "unknown"
normalised = sc.pp.log1p(sc.pp.normalize_total(adata, target_sum=1e4, copy=True), copy=True)
sc.pp.highly_variable_genes(normalised, n_top_genes=2000)
variable = adata[:, normalised.var["highly_variable"].to_numpy()].copy()
sc.pp.filter_cells(variable, min_counts=1)

model = pyrosc.SCANVI.from_anndata(variable, labels_key="label", unlabeled_category="unknown")
model.fit(max_epochs=40, progress=False)
model.annotate(variable)
variable.obs[["label", "scanvi_label", "scanvi_label_probability"]].head()

# %% [markdown]
# Where the two disagree is where to look first.

# %%
pd.crosstab(cellassign.predict()[variable.obs_names].astype(str), variable.obs["scanvi_label"])

# %% [markdown]
# ## Pictures

# %%
sc.pp.neighbors(variable, use_rep="X_scANVI", random_state=0)
sc.tl.umap(variable, random_state=0)
figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
pl.latent(variable, "label", ax=axes[0], title="Sure by markers")
pl.latent(variable, "scanvi_label", ax=axes[1], title="SCANVI")
plt.show()

# %% [markdown]
# ## What to keep in mind
#
# - A type that has no marker list is found under another name, or as `other`. CellAssign's class `other` is for cells
#   that raise no marker; it does not know other types.
# - SCANVI calls every cell by one of the names that it was taught.
# - Labels made this way describe these cells; they are not a test of the markers.
