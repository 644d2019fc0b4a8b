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
# # Cell types in spatial spots
#
# A spot of a spatial array holds several cells. **Stereoscope** learns a profile of each type from single cells, and how much of
# each profile is in each spot. Single cells of a breast cancer (Wu et al. 2021), spots of another (Andersson et al. 2021).

# %% tags=["remove-stderr"]
# needs: breast_reference.h5ad
# needs: her2st_H1.h5ad
import os
import warnings
from pathlib import Path

import scanpy as sc

import pyrosc
from pyrosc import pl

folder = Path(os.environ.get("PYROSC_TEST_DATA", "."))
reference = sc.read_h5ad(folder / "breast_reference.h5ad")
spots = sc.read_h5ad(folder / "her2st_H1.h5ad")
work = reference[:, reference.var_names.isin(spots.var_names)].copy()
sc.pp.filter_genes(work, min_cells=20)
sc.pp.normalize_total(work)
sc.pp.log1p(work)
sc.pp.highly_variable_genes(work, n_top_genes=600)
genes = work.var_names[work.var["highly_variable"]]
reference.obs["celltype_major"].value_counts()

# %% [markdown]
# First the profiles, then the spots. The types' most typical genes show whether the profiles make sense:

# %% tags=["remove-stderr"]
rna = pyrosc.RNAStereoscope.from_anndata(reference, labels_key="celltype_major", genes=list(genes))
rna.fit(progress=False)
profiles = rna.get_profiles()
ratio = profiles / profiles.mean()
{kind: list(ratio.loc[kind].nlargest(4).index) for kind in profiles.index}

# %% tags=["remove-stderr"]
with warnings.catch_warnings():
    warnings.simplefilter("ignore", pyrosc.DataWarning)  # genes that no spot has
    model = pyrosc.SpatialStereoscope.from_rna_model(spots, rna)
model.fit(progress=False)
proportions = model.get_proportions()
proportions.mean().sort_values(ascending=False).round(3)

# %% [markdown]
# Where they are:

# %%
common = list(proportions.mean().nlargest(4).index)
model.annotate(spots)
axes = pl.proportions(spots, common)

# %% [markdown]
# The numbers are what fits best, without a word on how sure they are; `proportions="posterior"` gives intervals (see
# [three guides for one model](three_guides)). A share of a spot that no profile explains goes to a noise term:

# %%
spots.obs["stereoscope_noise_share"].describe().round(3)
