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
# # Differential expression
#
# Blood cells of eight donors, half of them stimulated with interferon β (Kang et al. 2018). Two questions: which genes
# mark each cell type, and which genes interferon changes in each of them, also in other donors than these.

# %% tags=["remove-stderr"]
# needs: kang_ifnb.h5ad
import os
from pathlib import Path

import scanpy as sc

import pyrosc
from pyrosc import pl

adata = sc.read_h5ad(Path(os.environ.get("PYROSC_TEST_DATA", ".")) / "kang_ifnb.h5ad")
sc.pp.filter_genes(adata, min_cells=60)
adata.obs["donor"] = adata.obs["donor"].astype(str)
adata

# %% tags=["remove-stderr"]
model = pyrosc.SCVI.from_anndata(adata, batch_key="condition").fit(progress=False)

# %% [markdown]
# ## Markers of each type
#
# Each type against the rest, in one pass over the cells. The surest large changes come first.

# %%
markers = model.differential_expression(groupby="cell_type")
columns = [
    "comparison",
    "is_de_fdr",
    "proba_de",
    "lfc_mean",
    "lfc_lower",
    "lfc_upper",
    "non_zeros_proportion1",
]
markers[columns].groupby("comparison").head(3).round(3)

# %%
ax = pl.heatmap(markers, n_genes=4)

# %% [markdown]
# The same table as scanpy keeps its own, so that its plots work:

# %%
pyrosc.rank_genes_groups(adata, markers)
log = adata.copy()
sc.pp.normalize_total(log)
sc.pp.log1p(log)
sc.pl.rank_genes_groups_dotplot(log, n_genes=3, standard_scale="var", dendrogram=False)

# %% [markdown]
# ## What interferon does
#
# Stimulated against control in each type. Cells of one donor are alike, so that donors, not cells, are the replicates:
# `donor_key` says so. Each donor has cells in both conditions, and what donors differ in cancels.

# %%
interferon = model.differential_expression(
    groupby="condition", group1="stimulated", group2="control", within="cell_type", donor_key="donor"
)
interferon.groupby("within")["is_de_fdr"].sum()

# %%
known = ["ISG15", "IFI6", "IFIT1", "IFIT3", "ISG20"]
axes = pl.volcano(
    interferon, ["stimulated vs control in CD4T", "stimulated vs control in CD14+Mono"], genes=known
)

# %% [markdown]
# Genes that rise in every type, and genes that rise in some:

# %%
ax = pl.heatmap(interferon, n_genes=4, values="log2")

# %% [markdown]
# Taking cells for replicates would call more genes, some because two or three donors differ:

# %% tags=["remove-stderr"]
cells = model.differential_expression(
    groupby="condition", group1="stimulated", group2="control", within="cell_type"
)
calls = {"donors": interferon, "cells": cells}
{name: int(table["is_de_fdr"].sum()) for name, table in calls.items()}
