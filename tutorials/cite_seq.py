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
# # RNA and surface proteins
#
# CITE-seq counts the RNA of a cell and, by antibodies with barcodes, proteins on its surface. Two things are in the way
# of the proteins. Antibodies leave counts in every cell, also in those without the protein. And panels differ: what one
# experiment was stained for, the next was not. **totalVI** models both modalities together, takes the background out, and
# says what the missing proteins would have been.
#
# The data are blood cells of two experiments (10x Genomics, as filtered by Gayoso et al. 2021).

# %% tags=["remove-stderr"]
# needs: pbmc_cite.h5ad
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.cluster import KMeans

import pyrosc
from pyrosc import pl

# %% [markdown]
# Some cells of the second experiment come without proteins; we leave these out, and take 2,500 of the others and the
# thousand most variable genes, so that this notebook runs in about a minute. A model of all cells would be better.

# %%
adata = sc.read_h5ad(Path(os.environ.get("PYROSC_TEST_DATA", ".")) / "pbmc_cite.h5ad")
protein = adata.obsm["protein"]
adata.obsm["protein"] = protein.rename(columns=lambda name: name.removesuffix("_TotalSeqB"))
stained = np.flatnonzero(protein.notna().any(axis=1))
chosen = np.random.default_rng(0).choice(stained, 2500, replace=False)
adata = adata[np.sort(chosen)].copy()
adata.layers["counts"] = adata.X.copy()
sc.pp.normalize_total(adata)
sc.pp.log1p(adata)
sc.pp.highly_variable_genes(adata, n_top_genes=1000, batch_key="batch")
markers = ["CD3D", "CD4", "CD8A", "CD14", "CD19", "FCGR3A"]  # genes of proteins below
adata = adata[:, adata.var["highly_variable"] | adata.var_names.isin(markers)].copy()
adata

# %% [markdown]
# ## The panels
#
# A protein that a cell was not stained for is NaN, not zero. The first experiment has 14 proteins, the second 31:

# %%
measured = adata.obsm["protein"].notna().groupby(adata.obs["batch"].to_numpy()).any().T
{batch: list(measured.index[measured[batch]]) for batch in measured}

# %% [markdown]
# So that there is something to test imputation against, we hide CD16 of the second experiment.

# %%
second = (adata.obs["batch"] == "pbmc5k").to_numpy()
hidden = adata.obsm["protein"].loc[second, "CD16"].copy()
adata.obsm["protein"].loc[second, "CD16"] = np.nan

# %% [markdown]
# ## The model
#
# By default 1,500 steps are planned. On these few cells 400 do: the curve of the held-out cells is level at the end. A warning
# names three antibodies against nothing, of which we will hear again.

# %%
model = pyrosc.TOTALVI.from_anndata(adata, layer="counts", batch_key="batch", protein_key="protein")
model.fit(max_steps=400, progress=False)
ax = pl.training_curve(model)

# %% [markdown]
# ## Clusters of both modalities
#
# The latent space is used as that of scVI. Any clustering will do; k-means needs nothing that is not installed.

# %%
model.annotate(adata)
sc.pp.neighbors(adata, use_rep="X_totalVI", random_state=0)
sc.tl.umap(adata, random_state=0)
codes = KMeans(10, n_init=10, random_state=0).fit_predict(adata.obsm["X_totalVI"])
adata.obs["cluster"] = pd.Categorical(codes.astype(str))
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
pl.latent(adata, "batch", ax=axes[0], title="Experiment")
pl.latent(adata, "cluster", ax=axes[1], title="Cluster")
plt.show()

# %% [markdown]
# ## Which cells have which protein
#
# For each cell and protein the model gives the probability that its counts are foreground: that they are more than
# the background of that protein in that cell. Its mean in a cluster is the share of cells that have the protein.

# %%
probability = model.get_protein_foreground_probability()
panel = ["CD3", "CD4", "CD8a", "CD14", "CD16", "CD19", "CD56"]
share = probability[panel].groupby(adata.obs["cluster"], observed=True).mean()


def name_of(p: pd.Series) -> str:
    """A cell type by what most cells of a cluster have."""
    if p["CD19"] > 0.5:
        return "B"
    if p["CD3"] > 0.5:
        return "CD8 T" if p["CD8a"] > p["CD4"] else "CD4 T"
    if p["CD14"] > 0.5:
        return "CD14 monocyte"
    return "NK" if p["CD56"] > 0.5 else "other"


adata.obs["type"] = pd.Categorical(adata.obs["cluster"].map(share.apply(name_of, axis=1)).astype(str))
share.index = [f"{c}: {name_of(p)}" for c, p in share.iterrows()]
share = share.loc[sorted(share.index, key=lambda c: c.split(": ")[1])]
figure, ax = plt.subplots(figsize=(5.2, 4), layout="constrained")
image = ax.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
ax.set_xticks(range(len(panel)), panel)
ax.set_yticks(range(len(share)), share.index)
figure.colorbar(image, ax=ax, label="share of cells with the protein")
plt.show()

# %% [markdown]
# That is the biology of blood: T cells have CD3, and CD4 or CD8; monocytes CD14, and some CD4; B cells CD19; NK cells CD56
# and CD16. In numbers, with what would make this notebook fail:

# %%
by_type = probability[panel].groupby(adata.obs["type"], observed=True).mean()
assert (by_type.loc[["CD4 T", "CD8 T"], "CD3"] > 0.7).all()
assert by_type.loc["CD4 T", "CD4"] > 0.6 > 0.4 > by_type.loc["CD8 T", "CD4"]
assert by_type.loc["CD8 T", "CD8a"] > 0.6 > 0.4 > by_type.loc["CD4 T", "CD8a"]
assert by_type["CD14"].idxmax() == "CD14 monocyte"
assert by_type["CD19"].idxmax() == "B"
by_type.round(2).assign(cells=adata.obs["type"].value_counts())

# %% [markdown]
# The antibodies against nothing should be background. Two of them are, in the experiment that has them. Of the third the
# model takes a part for foreground: where counts have one hump, how it is made up of two components is not in the
# data. So look at the histogram of a protein before its probabilities are believed.

# %%
controls = [name for name in probability if name.startswith("IgG")]
probability.loc[second, controls].mean().round(3)

# %% [markdown]
# ## Proteins without background
#
# Mean foreground times its probability. Proteins that a cell's experiment lacks are imputed, of which more below. Each
# cell is decoded as of its own experiment, and antibodies give more counts in one than in the other; to compare cells
# of both, decode all as of one.

# %%
denoised = model.get_normalized_protein(transform_batch="pbmc10k")
shown = ["CD3", "CD4", "CD8a", "CD14", "CD19", "CD16"]
figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
for name, ax in zip(shown, axes.flat, strict=True):
    pl.latent(adata, denoised[name].to_numpy(), ax=ax, scale="log1p", vmin=0, title=f"protein {name}")
plt.show()

# %% [markdown]
# What the model does to the counts of one protein, in the first experiment. B cells do not have CD4: their counts, ten or
# twenty each, are background, and gone on the right. Monocytes have some, CD4 T cells a lot. A few cells called CD8 T by
# their cluster have CD4, and keep it: proteins are of cells, not of clusters. Where the model is not sure, the mean lies in between.

# %%
counts = adata.obsm["protein"]["CD4"]
first = ~second
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
kinds = ["CD4 T", "CD14 monocyte", "CD8 T", "B"]
for ax, values, title in zip(axes, [counts, denoised["CD4"]], ["counts", "without background"], strict=True):
    bins = np.linspace(0, np.log1p(max(counts.max(), denoised["CD4"].max())), 60)
    groups = [np.log1p(values[first & (adata.obs["type"] == kind)]) for kind in kinds]
    ax.hist(groups, bins=bins, histtype="step", label=kinds, linewidth=1.5)
    ticks = [0, 1, 10, 100, 1000]
    ax.set_xticks(np.log1p(ticks), [f"{t:,}" for t in ticks])
    ax.set(xlabel=f"CD4, {title}", ylabel="cells")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Proteins that were not measured
#
# CD16 of the second experiment was hidden. It is imputed as in cells of the first; here next to the counts that the model
# has not seen.

# %%
imputed = model.get_normalized_protein(indices=second, protein_list=["CD16"])["CD16"]
rank = imputed.corr(hidden, method="spearman")
high = hidden > 100
auc = (imputed.rank()[high].sum() - high.sum() * (high.sum() + 1) / 2) / (high.sum() * (~high).sum())
print(
    f"Spearman {rank:.2f}; a cell with CD16 has the larger value than one without in {auc:.0%} of the pairs"
)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
part = adata[second]
for ax, values, title in zip(axes, [imputed, hidden], ["CD16, imputed", "CD16, hidden counts"], strict=True):
    pl.latent(part, values.to_numpy(), ax=ax, scale="log1p", vmin=0, title=title)
plt.show()

# %% [markdown]
# The order is right, and the scale that of the first experiment. (The hidden counts hold background.) An imputed value is
# what cells like this one have in experiments that measured it. Where there are no cells like this one, it is a
# guess, and nothing says so. The second experiment alone was stained for CD20, and has no B cells:

# %%
of_b = adata.obs["type"] == "B"
print(f"B cells: {(of_b & first).sum()} in the first experiment, {(of_b & second).sum()} in the second")
cd20 = model.get_normalized_protein(protein_list=["CD20"])["CD20"]
cd20.groupby(adata.obs["type"], observed=True).mean().round(1)

# %% [markdown]
# B cells are known for their CD20, and get no more of it than other cells: the model could not know. Do not test hypotheses on imputed values.
#
# ## Differential expression of both modalities
#
# One table; the column `field` tells genes (`x`) from proteins (`y`). Proteins count only in cells where they were measured:
# `n_cells1` and `n_cells2` say in how many. Both groups have cells of both experiments.

# %%
table = model.differential_expression(groupby="type", group1="CD8 T", group2="CD4 T")
columns = ["field", "is_de_fdr", "proba_de", "lfc_mean", "lfc_lower", "lfc_upper", "n_cells1"]
table[columns].groupby("field").head(6).round(2)

# %%
proteins = table[table["field"] == "y"]
assert (proteins[["n_cells1", "n_cells2"]] > 0).all(axis=None)
for name, sign in {"CD8a": 1, "CD4": -1}.items():
    assert proteins.at[name, "is_de_fdr"]
    assert sign * proteins.at[name, "lfc_mean"] > 1
table.groupby("field")["is_de_fdr"].agg(["sum", "size"])

# %% [markdown]
# ## RNA against protein
#
# Correlations over cells of a gene and of the protein that it codes for, without the noise of counting. All cells are
# decoded as of the first experiment, which has all of these proteins.

# Names that a gene and a protein share are followed by their field.

# %%
pairs = {
    "CD3D": "CD3",
    "CD4 (x)": "CD4 (y)",
    "CD8A": "CD8a",
    "CD14 (x)": "CD14 (y)",
    "CD19 (x)": "CD19 (y)",
    "FCGR3A": "CD16",
}
correlation = model.get_feature_correlation_matrix(
    features=[*pairs, *pairs.values()], transform_batch="pbmc10k", n_samples=5
)
cross = correlation.loc[list(pairs), list(pairs.values())]
raw = sc.get.obs_df(adata, ["CD4", "CD14", "CD19"], layer="counts").corrwith(
    adata.obsm["protein"][["CD4", "CD14", "CD19"]], method="spearman"
)
figure, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
image = ax.imshow(cross, vmin=-1, vmax=1, cmap="RdBu_r")
ax.set_xticks(range(len(pairs)), [p.split(" (")[0] for p in cross.columns])
ax.set_yticks(range(len(pairs)), [g.split(" (")[0] for g in cross.index])
ax.set(xlabel="protein", ylabel="gene")
figure.colorbar(image, ax=ax, label="Spearman's correlation")
plt.show()

# %% [markdown]
# On the diagonal a gene meets its own protein. Correlations of the counts as they are can be smaller or larger: these
# hold the noise of counting, and also what depth, background and the two experiments have in common.

# %%
pd.DataFrame(
    {"model": [cross.at[f"{g} (x)", f"{g} (y)"] for g in raw.index], "counts": raw.to_numpy()},
    index=raw.index,
).round(2)

# %% [markdown]
# ## What to keep in mind
#
# - A protein that all cells have, or none, has one hump of counts, and its probability of foreground says little.
# - Before an imputed protein is believed, see that the experiments that have it hold the cells in question.
# - These are 2,500 cells and 400 steps. With more of both, rare types come out, and probabilities get surer.
# - Cells that come later, with another panel or with RNA alone, are mapped by `pyrosc.surgery(model, query)`; their
#   missing proteins are then imputed from these.
