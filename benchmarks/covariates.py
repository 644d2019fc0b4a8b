"""Unwanted variation removed by covariates of SCVI, against scanpy's regress_out with Harmony or bbknn.

The experiment of Gayoso et al. (2022), section 2.2, on data at hand::

    python benchmarks/covariates.py kang --seeds 0 1 2
    python benchmarks/covariates.py fucci --seeds 0 1 2
    python benchmarks/covariates.py time
    python benchmarks/covariates.py figure

``kang``: condition and ribosomal fraction are nuisances, cell types are to be kept.  Geary's C (scanpy's, on
each workflow's neighbour graph) of interferon and ribosomal genes is to rise to 1, that of cell-type markers
to stay.  ``fucci``: the angle of the cell cycle, as cosine and sine, is the nuisance; the share of its
variance that a ridge regression finds in the latent space is to fall, the individuals (``chip_id``) are to
stay neighbours.  ``time``: seconds of both workflows by the number of cells.  Figures go to
``benchmarks/results/covariates.json``; ``figure`` draws them.  Needs harmonypy and bbknn (extra ``bench``).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import _common as common
import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

import pyrosc

INTERFERON = ["ISG15", "IFI6", "IFIT1", "IFIT2", "IFIT3", "ISG20", "IRF7", "CXCL10"]
MARKERS = [
    "CD3D",
    "CD3E",
    "IL7R",
    "CCR7",
    "CD8A",
    "CD8B",
    "CCL5",
    "NKG7",
    "GNLY",
    "KLRD1",
    "PRF1",
    "MS4A1",
    "CD79A",
    "CD79B",
    "CD14",
    "LYZ",
    "S100A8",
    "S100A9",
    "FCGR3A",
    "MS4A7",
    "VMO1",
    "FCER1A",
    "CST3",
    "HLA-DQA1",
    "HLA-DRA",
]
EPOCHS = 400
RESULT = common.RESULTS / "covariates.json"
SIZES = (1000, 2500, 5000, 10000)


def logs(adata: ad.AnnData) -> ad.AnnData:
    """Log counts at the median total, as the paper's workflow has them."""
    out = adata.copy()
    sc.pp.normalize_total(out)
    sc.pp.log1p(out)
    return out


def regressed(adata: ad.AnnData, continuous: list[str]) -> ad.AnnData:
    """Principal components of log counts with the continuous covariates regressed out."""
    out = logs(adata)
    sc.pp.regress_out(out, continuous)
    sc.pp.scale(out, max_value=10)
    sc.pp.pca(out, n_comps=min(50, out.n_vars - 1), random_state=0)
    return out


def scvi(adata: ad.AnnData, seed: int, **options: Any) -> np.ndarray:
    """Latent space of SCVI after as many epochs as in the paper."""
    model = pyrosc.SCVI.from_anndata(adata, seed=seed, **options)
    return model.fit(EPOCHS, seed=seed, progress=False).get_latent_representation()


def harmony(linear: ad.AnnData, batch: str, seed: int) -> np.ndarray:
    """Principal components corrected by Harmony; scanpy's wrapper does not know harmonypy 2."""
    import harmonypy

    found = harmonypy.run_harmony(
        linear.obsm["X_pca"], linear.obs, [batch], verbose=False, random_state=seed
    ).Z_corr
    return np.asarray(found if len(found) == linear.n_obs else found.T)


def graphs(adata: ad.AnnData, batch: str | None, continuous: list[str], seed: int) -> dict[str, Any]:
    """Neighbour graph and, where there is one, embedding of each workflow."""
    out = {}
    every: dict[str, Any] = {"batch_key": batch, "continuous_covariate_keys": continuous}
    spaces = {
        "scVI, no covariates": scvi(adata, seed),
        "scVI, batch": None if batch is None else scvi(adata, seed, batch_key=batch),
        "scVI, all covariates": scvi(adata, seed, **every),
        "scVI, also in encoder": scvi(adata, seed, encode_covariates=True, **every),
    }
    linear = regressed(adata, continuous)
    if batch is None:
        spaces["regress_out"] = linear.obsm["X_pca"]
    else:
        spaces["regress_out, Harmony"] = harmony(linear, batch, seed)
        sc.external.pp.bbknn(linear, batch_key=batch)
        out["regress_out, bbknn"] = (linear.obsp["connectivities"], None)
    for name, space in spaces.items():
        if space is not None:
            work = ad.AnnData(obs=adata.obs[[]], obsm={"X": np.asarray(space)})
            sc.pp.neighbors(work, use_rep="X", n_neighbors=15, random_state=0)
            out[name] = (work.obsp["connectivities"], np.asarray(space))
    return out


def geary(graph: Any, expression: ad.AnnData, genes: list[str]) -> dict[str, float]:
    """Geary's C of each gene's log expression on a graph: 0 follows it wholly, 1 not at all."""
    values = expression[:, genes].X
    dense = np.asarray(values.todense() if hasattr(values, "todense") else values).T
    return dict(zip(genes, map(float, sc.metrics.gearys_c(graph.tocsr(), dense)), strict=True))


def purity(graph: Any, labels: pd.Series) -> float:
    """Share of each cell's neighbours, by weight, that have its label; mean over cells."""
    codes = labels.astype("category").cat.codes.to_numpy()
    rows, columns = graph.nonzero()
    weights = np.asarray(graph[rows, columns]).ravel()
    same = np.bincount(rows, weights * (codes[rows] == codes[columns]), minlength=len(codes))
    return float((same / np.maximum(np.bincount(rows, weights, minlength=len(codes)), 1e-12)).mean())


def explained(space: np.ndarray, target: np.ndarray) -> float:
    """Share of the variance of the covariates that a ridge regression on the space finds, cross-validated."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import cross_val_predict

    z = (space - space.mean(0)) / (space.std(0) + 1e-9)
    found = cross_val_predict(RidgeCV(np.logspace(-2, 4, 13)), z, target, cv=5)
    return float(1 - ((target - found) ** 2).sum() / ((target - target.mean(0)) ** 2).sum())


def kang(seed: int) -> dict[str, Any]:
    """Condition and ribosomal fraction."""
    whole = ad.read_h5ad(common.data_folder() / "kang_ifnb.h5ad")
    ribosomal = whole.var_names.str.startswith(("RPS", "RPL"))
    counts = np.asarray(whole.X.sum(1)).ravel()
    whole.obs["ribosomal"] = np.asarray(whole[:, ribosomal].X.sum(1)).ravel() / counts
    chosen = set(common.variable_genes("kang_ifnb", whole, "condition")) - set(whole.var_names[ribosomal])
    adata = whole[:, [g in chosen for g in whole.var_names]].copy()
    expression = logs(whole)
    sets = {
        "interferon": [g for g in INTERFERON if g in whole.var_names],
        "ribosomal": list(whole.var_names[ribosomal]),
        "markers": [g for g in MARKERS if g in whole.var_names],
    }
    found = {}
    for name, (graph, _) in graphs(adata, "condition", ["ribosomal"], seed).items():
        found[name] = {
            "geary": {kind: geary(graph, expression, genes) for kind, genes in sets.items()},
            "purity_cell_type": purity(graph, whole.obs["cell_type"]),
            "purity_condition": purity(graph, whole.obs["condition"]),
        }
    return found


def fucci(seed: int) -> dict[str, Any]:
    """The angle of the cell cycle."""
    adata = ad.read_h5ad(common.data_folder() / "fucci_cellcycle.h5ad")
    adata.obs["cos"], adata.obs["sin"] = np.cos(adata.obs["theta"]), np.sin(adata.obs["theta"])
    target = adata.obs[["cos", "sin"]].to_numpy()
    found = {}
    for name, (graph, space) in graphs(adata, None, ["cos", "sin"], seed).items():
        found[name] = {
            "variance_explained": explained(space, target),
            "purity_chip_id": purity(graph, adata.obs["chip_id"]),
        }
    return found


def run_time() -> list[dict[str, Any]]:
    """Seconds by the number of cells: a batch and a continuous covariate, 4000 genes."""
    adata = common.load("pbmc_cite").adata
    totals = np.asarray(adata.X.sum(1)).ravel()
    adata.obs["depth"] = np.log(totals)
    order = np.random.default_rng(0).permutation(adata.n_obs)

    def ours(part: ad.AnnData) -> None:
        keys: dict[str, Any] = {"batch_key": "batch", "continuous_covariate_keys": ["depth"]}
        pyrosc.SCVI.from_anndata(part, **keys).fit(progress=False)

    def linear(part: ad.AnnData) -> None:
        harmony(regressed(part, ["depth"]), "batch", 0)

    def bbknn(part: ad.AnnData) -> None:
        sc.external.pp.bbknn(regressed(part, ["depth"]), batch_key="batch")

    workflows: dict[str, Callable[[ad.AnnData], None]] = {
        "scVI, all covariates": ours,
        "regress_out, Harmony": linear,
        "regress_out, bbknn": bbknn,
    }
    found = []
    for n in SIZES:
        part = adata[np.sort(order[:n])].copy()
        for name, workflow in workflows.items():
            with common.Meter() as meter:
                workflow(part)
            found.append({"cells": n, "workflow": name, **meter.as_dict()})
            print({k: v for k, v in found[-1].items() if k != "load"}, flush=True)
    return found


def figure(kept: dict[str, Any], path: str) -> None:
    """Box plots of Geary's C, the cell cycle, and seconds."""
    import matplotlib.pyplot as plt

    colors = {"scVI, no covariates": "#9aa0a6", "scVI, batch": "#7fb3d5", "scVI, all covariates": "#1f5f99"}
    colors |= {
        "scVI, also in encoder": "#123a63",
        "regress_out, Harmony": "#d98c3f",
        "regress_out, bbknn": "#b5563c",
        "regress_out": "#d98c3f",
    }
    n = 4 if "time" in kept else 3
    _, axes = plt.subplots(1, n, figsize=(3.9 * n, 3.8), layout="constrained")
    first = {name: kept["kang"]["0"][name] for name in colors if name in kept["kang"]["0"]}
    for ax, kinds, title in zip(
        axes[:2],
        (("interferon", "ribosomal"), ("markers",)),
        ("nuisance genes (kang_ifnb)", "cell-type markers (kang_ifnb)"),
        strict=True,
    ):
        values = [[v for k in kinds for v in run["geary"][k].values()] for run in first.values()]
        boxes = ax.boxplot(values, patch_artist=True, medianprops={"color": "black"})
        for box, name in zip(boxes["boxes"], first, strict=True):
            box.set_facecolor(colors[name])
        ax.set_xticks(range(1, len(first) + 1), list(first), fontsize=8, rotation=30, ha="right")
        ax.set(title=title, ylabel="Geary's C")
    ax = axes[2]
    means = {n: _means(kept["fucci"], n) for n in kept["fucci"]["0"]}
    for i, (name, (variance, kept_purity)) in enumerate(means.items()):
        ax.bar([i - 0.2, i + 0.2], [variance, kept_purity], 0.38, color=[colors[name], "#5aa469"])
    ax.set_xticks(range(len(means)), list(means), fontsize=8, rotation=30, ha="right")
    ax.set(title="cell cycle (fucci_cellcycle)", ylabel="share")
    ax.text(0.98, 0.97, "left: of the angle's variance\nright: of neighbours of one individual", fontsize=7,
            transform=ax.transAxes, ha="right", va="top")  # fmt: skip
    ax.set_ylim(0, 0.6)
    if "time" in kept:
        for name, own in pd.DataFrame(kept["time"]).groupby("workflow"):
            axes[3].plot(own["cells"], own["seconds"], "o-", color=colors[str(name)], label=name)
        axes[3].set(
            title="run time (pbmc_cite, 4,000 genes)", xlabel="cells", ylabel="seconds", ylim=(0, None)
        )
        axes[3].legend(frameon=False, fontsize=8)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    plt.savefig(path, dpi=110)


def _means(runs: dict[str, Any], name: str) -> tuple[float, float]:
    own = [r[name] for r in runs.values()]
    return (
        float(np.mean([r["variance_explained"] for r in own])),
        float(np.mean([r["purity_chip_id"] for r in own])),
    )


def table(kept: dict[str, Any]) -> None:
    """Medians over genes and means over seeds."""
    for name in kept.get("kang", {}).get("0", {}):
        runs = [r[name] for r in kept["kang"].values()]
        parts = [
            f"{kind} {np.mean([np.median(list(r['geary'][kind].values())) for r in runs]):.3f}"
            for kind in ("interferon", "ribosomal", "markers")
        ]
        purities = [np.mean([r[f"purity_{k}"] for r in runs]) for k in ("cell_type", "condition")]
        print(f"kang  {name:22s} C: {', '.join(parts)}; purity {purities[0]:.3f} / {purities[1]:.3f}")
    for name in kept.get("fucci", {}).get("0", {}):
        print(f"fucci {name:22s} variance {_means(kept['fucci'], name)[0]:.3f}, "
              f"purity {_means(kept['fucci'], name)[1]:.3f}")  # fmt: skip


def main() -> None:
    """Run a part and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["kang", "fucci", "time", "figure", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", default=str(common.ROOT / "docs" / "_static" / "covariates.png"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if args.part == "figure":
        return figure(kept, args.out)
    if args.part == "time":
        kept["time"] = run_time()
    elif args.part != "table":
        for seed in args.seeds:
            kept.setdefault(args.part, {})[str(seed)] = {"kang": kang, "fucci": fucci}[args.part](seed)
    if args.part != "table":
        kept |= {"machine": common.machine(), "versions": common.versions("pyrosc", "torch", "scanpy")}
        common.save_json(RESULT, kept)
    return table(kept)


if __name__ == "__main__":
    main()
