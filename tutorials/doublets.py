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
# # Doublets
#
# A droplet with two cells looks like a cell between two types. **Solo** makes doublets by adding the counts of two droplets
# and learns to tell them from what was measured. Here on 2,000 droplets of four cell lines, marked by twelve antibodies
# before they were pooled (Stoeckius et al. 2018), so that doublets between two marks are known. Solo does not see the marks.

# %% tags=["remove-stderr"]
# needs: hashing_doublets.h5ad
import os
from pathlib import Path

import scanpy as sc
from sklearn.metrics import average_precision_score, roc_auc_score

import pyrosc
from pyrosc import pl

adata = sc.read_h5ad(Path(os.environ.get("PYROSC_TEST_DATA", ".")) / "hashing_doublets.h5ad")
sc.pp.filter_genes(adata, min_cells=1)
adata.obs["doublet_true_labels"].value_counts()

# %% tags=["remove-stderr"]
scvi = pyrosc.SCVI.from_anndata(adata).fit(progress=False)
solo = pyrosc.Solo.from_model(scvi).fit(progress=False)
rate = solo.get_doublet_rate()
print(f"estimated rate {rate.estimate:.3f} (90 %: {rate.lower:.3f} to {rate.upper:.3f})")

# %% [markdown]
# The rate was not given. The scores of all droplets, and where doublets are expected:

# %%
ax = pl.doublets(solo)

# %%
solo.annotate(adata)
known = adata.obs["doublet_true_labels"].isin(["Singlet", "Doublet"])
truth = (adata.obs["doublet_true_labels"] == "Doublet")[known]
found = adata.obs["solo_doublet_probability"][known]
print(
    f"AUROC {roc_auc_score(truth, found):.3f}, average precision {average_precision_score(truth, found):.3f}"
)
adata[known].obs.groupby("doublet_true_labels", observed=True)["solo_doublet_probability"].describe().round(2)

# %% [markdown]
# Half of the marked doublets have a probability that is low: two cells of one line look like a large cell of that line, and
# many of the others have no counts of a second one. Those that show are found with few false alarms. Remove them, and
# go on:

# %%
singlets = adata[adata.obs["solo_prediction"] == "singlet"].copy()
singlets
