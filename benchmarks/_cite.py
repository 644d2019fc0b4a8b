"""What the CITE-seq benchmarks share: cells with hidden proteins, queries to map, one set of scores.

The module imports neither tool.  ``pbmc_cite`` holds two batches: pbmc10k with 14 proteins, and pbmc5k with
31 of them in 2515 cells.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import _common as common
import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.stats import spearmanr
from torch import Tensor

PROTEIN = "protein"
BATCH = "batch"
GIVEN, HIDDEN = "pbmc10k", "pbmc5k"
DRAWS = 25  # per imputed cell


# --- the data -----------------------------------------------------------------------------------------------


def load(data_dir: str | Path | None = None) -> anndata.AnnData:
    """All cells; proteins as a DataFrame with NaN where not measured, named without their suffix."""
    adata = common.load("pbmc_cite", data_dir).adata
    adata.obsm[PROTEIN] = adata.obsm[PROTEIN].rename(columns=lambda name: name.split("_TotalSeq")[0])
    return adata


def measured(adata: anndata.AnnData) -> np.ndarray:
    """Whether any protein of a cell was measured."""
    return adata.obsm[PROTEIN].notna().any(axis=1).to_numpy()


def shared_proteins(adata: anndata.AnnData) -> list[str]:
    """Proteins measured in both batches."""
    found = adata.obsm[PROTEIN].notna().groupby(adata.obs[BATCH].to_numpy()).any()
    return list(found.columns[found.all()])


def filled(adata: anndata.AnnData) -> anndata.AnnData:
    """A copy with 0 for the proteins that were not measured, as the peer wants them."""
    adata = adata.copy()
    adata.obsm[PROTEIN] = adata.obsm[PROTEIN].fillna(0.0)
    return adata


# --- imputation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imputation:
    """Cells whose proteins are hidden, and the truth.

    ``adata`` has NaN for them; ``rows`` are their positions; ``truth`` holds their counts (rows × 14).
    """

    adata: anndata.AnnData
    rows: np.ndarray
    truth: pd.DataFrame


def imputation_case(full: bool = False, data_dir: str | Path | None = None) -> Imputation:
    """pbmc10k with its 14 proteins, and the pbmc5k cells that have proteins, with these hidden.

    Parameters
    ----------
    full
        Keep also the pbmc5k cells without proteins (10,849 cells in place of 9370).
    """
    adata = load(data_dir)
    shared = shared_proteins(adata)
    if not full:
        adata = adata[measured(adata)].copy()
    target = measured(adata) & (adata.obs[BATCH] == HIDDEN).to_numpy()
    protein = adata.obsm[PROTEIN][shared]
    truth = protein[target].copy()
    adata.obsm[PROTEIN] = protein.mask(np.broadcast_to(target[:, None], protein.shape))
    return Imputation(adata, np.flatnonzero(target), truth)


def score(truth: pd.DataFrame, imputed: pd.DataFrame) -> dict[str, Any]:
    """Spearman correlation and root mean squared error of log1p, of each protein and their means.

    ``sd_log1p`` is the error's standard deviation: what is left when a protein's mean error, which is mostly
    the different depth of the two batches, is known.
    """
    imputed = imputed.loc[truth.index, truth.columns]
    error = np.log1p(imputed.to_numpy()) - np.log1p(truth.to_numpy())
    found = {
        "spearman": [float(spearmanr(truth[name], imputed[name]).statistic) for name in truth],
        "rmse_log1p": np.sqrt((error**2).mean(0)).tolist(),
        "sd_log1p": error.std(0).tolist(),
    }
    means = {f"{name}_mean": float(np.mean(values)) for name, values in found.items()}
    return means | {name: dict(zip(truth, values, strict=True)) for name, values in found.items()}


# --- held-out fit -------------------------------------------------------------------------------------------

# (x, y, batch) -> loc, scale of q(z | x, y)
Encode = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# (z, batch, library) -> the parameters named in `heldout`
Decode = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


@torch.no_grad()
def heldout(
    encode: Encode,
    decode: Decode,
    adata: anndata.AnnData,
    batch: np.ndarray,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    rows: int = 1024,
) -> dict[str, float]:
    """Held-out bound of a totalVI model in nats per cell, in parts, higher is better.

    log p(x | z) + log p(y | z, b) − KL(log b) − KL(z), proteins where they were measured, all weights 1, in
    float64 and with the same noise for every tool.  Priors of parameters are left out.

    Parameters
    ----------
    encode
        ``(x, y, batch) -> (loc, scale)`` of q(z | x, y), with y 0 where not measured.
    decode
        ``(z, batch, library) -> parameters``; ``library`` is the log of the total counts, shape (rows, 1).
        Of genes ``log_mean``, ``inverse_dispersion`` and maybe ``zi_logits``, as in `_common.heldout`; of
        proteins, (rows, proteins) or what broadcasts to it: ``back_loc``, ``back_scale`` of q(log b | z),
        ``prior_loc``, ``prior_scale`` of its prior, ``log_increase`` (log of the foreground's mean over the
        background's), ``log_efficiency``, ``mixing`` (logit of background), ``protein_inverse_dispersion``.
    adata, batch
        Held-out cells and their batch codes.
    """
    codes = torch.as_tensor(np.asarray(batch), dtype=torch.long)
    x = sp.csr_matrix(adata.X)
    table = adata.obsm[PROTEIN]
    mask = torch.from_numpy(table.notna().to_numpy())
    y = torch.from_numpy(table.fillna(0.0).to_numpy(np.float64))
    n = x.shape[0]
    generator = torch.Generator().manual_seed(seed)
    terms = {name: torch.zeros(n, dtype=torch.float64) for name in ("gene", "protein", "kl_back", "kl_z")}
    step = max(1, rows // draws)
    for start in range(0, n, step):
        cells = slice(start, min(start + step, n))
        counts = torch.from_numpy(x[cells].toarray().astype(np.float64))
        loc, scale = (p.double() for p in encode(counts.float(), y[cells].float(), codes[cells]))
        terms["kl_z"][cells] = 0.5 * (loc**2 + scale**2 - 1).sum(-1) - scale.log().sum(-1)
        noise = torch.randn(len(loc), draws, loc.shape[1], generator=generator, dtype=torch.float64)
        noise_back = torch.randn(len(loc), draws, y.shape[1], generator=generator, dtype=torch.float64)
        z = loc[:, None] + scale[:, None] * noise
        library = counts.sum(1).log()[:, None].repeat_interleave(draws, 0)
        out = decode(z.flatten(0, 1).float(), codes[cells].repeat_interleave(draws), library.float())
        gene = (out["log_mean"], out["inverse_dispersion"], out.get("zi_logits"))
        terms["gene"][cells] = common.count_log_prob(counts, draws, *gene).mean(1)

        shape = (len(loc), draws, y.shape[1])
        p = {k: out[k].double().expand(len(loc) * draws, -1).reshape(shape) for k in PROTEIN_PARAMETERS}
        log_back = p["back_loc"] + p["back_scale"] * noise_back
        low = negative_binomial(
            y[cells, None], log_back + p["log_efficiency"], p["protein_inverse_dispersion"]
        )
        high = log_back + p["log_increase"] + p["log_efficiency"]
        high = negative_binomial(y[cells, None], high, p["protein_inverse_dispersion"])
        log_sigmoid = torch.nn.functional.logsigmoid
        both = torch.logaddexp(log_sigmoid(p["mixing"]) + low, log_sigmoid(-p["mixing"]) + high)
        ratio = p["back_scale"] / p["prior_scale"]
        shift = (p["back_loc"] - p["prior_loc"]) / p["prior_scale"]
        kl = 0.5 * (ratio**2 + shift**2 - 1) - ratio.log()
        seen = mask[cells, None]
        terms["protein"][cells] = (both * seen).sum(-1).mean(1)
        terms["kl_back"][cells] = (kl * seen).sum(-1).mean(1)
    elbo = terms["gene"] + terms["protein"] - terms["kl_back"] - terms["kl_z"]
    found = {"elbo": float(elbo.mean()), "elbo_se": float(elbo.std() / math.sqrt(n))}
    return found | {name: float(values.mean()) for name, values in terms.items()}


PROTEIN_PARAMETERS = (
    "back_loc",
    "back_scale",
    "prior_loc",
    "prior_scale",
    "log_increase",
    "log_efficiency",
    "mixing",
    "protein_inverse_dispersion",
)


def negative_binomial(k: Tensor, log_mean: Tensor, theta: Tensor) -> Tensor:
    """Log-probability of counts by log mean and inverse dispersion."""
    log_zero = torch.log1p(log_mean.exp() / theta)
    choose = (k + theta).lgamma() - theta.lgamma() - (k + 1).lgamma()
    return choose - theta * log_zero + k * (log_mean - theta.log() - log_zero)


# --- surgery ------------------------------------------------------------------------------------------------


def surgery_cases(data_dir: str | Path | None = None) -> dict[str, tuple[anndata.AnnData, anndata.AnnData]]:
    """Name → reference and query, cells with proteins only, each with the proteins of its own panel.

    ``query_10k``: the query has 14 of the 31 proteins of the reference, which is pbmc5k.  ``query_5k``: the
    other way round; the reference does not know 17 of the query's proteins.
    """
    adata = load(data_dir)
    adata = adata[measured(adata)].copy()
    adata.obs["cluster"] = clusters(adata)
    shared = shared_proteins(adata)
    large = adata[(adata.obs[BATCH] == GIVEN).to_numpy()].copy()
    small = adata[(adata.obs[BATCH] == HIDDEN).to_numpy()].copy()
    large.obsm[PROTEIN] = large.obsm[PROTEIN][shared]
    for part in (large, small):
        part.obs[BATCH] = part.obs[BATCH].cat.remove_unused_categories()
    return {"query_10k": (small, large), "query_5k": (large, small)}


def clusters(adata: anndata.AnnData) -> pd.Categorical:
    """Cluster of each cell that has proteins, found once without either tool and kept.

    Leiden (modularity, resolution 1) on the graph of 15 nearest neighbours among 30 principal components of
    the log-normalised RNA and 10 of the CLR-transformed 14 shared proteins, features scaled within batches,
    both sets of components brought to the same total variance, batches aligned by Harmony.
    """
    path = common.RESULTS / "clusters_pbmc_cite.json"
    if path.exists():
        kept = json.loads(path.read_text())
        codes = [kept["letters"].index(letter) for letter in "".join(kept["cells"])]
        assert len(codes) == adata.n_obs, f"{path.name} is of other cells"
        return pd.Categorical([str(code) for code in codes])
    import harmonypy
    import igraph
    from sklearn.decomposition import PCA
    from sklearn.neighbors import kneighbors_graph

    batch = adata.obs[BATCH].to_numpy()
    x = adata.X.toarray()
    rna = _scaled(np.log1p(1e4 * x / x.sum(1, keepdims=True)), batch)
    counts = np.log1p(adata.obsm[PROTEIN][shared_proteins(adata)].to_numpy())
    protein = _scaled(counts - counts.mean(1, keepdims=True), batch)
    parts = []
    for values, n in ((rna, 30), (protein, 10)):
        components = PCA(n, svd_solver="randomized", random_state=0).fit_transform(values)
        parts.append(components / np.sqrt(components.var(0).sum()))
    harmony = harmonypy.run_harmony(np.hstack(parts), adata.obs, BATCH, random_state=0, verbose=False)
    aligned = np.asarray(harmony.Z_corr)
    aligned = aligned if len(aligned) == adata.n_obs else aligned.T
    graph = kneighbors_graph(aligned, 15)
    graph = igraph.Graph(adata.n_obs, np.stack(sp.triu(graph.maximum(graph.T)).nonzero(), 1).tolist())
    igraph.set_random_number_generator(random.Random(0))
    codes = graph.community_leiden("modularity", resolution=1.0, n_iterations=-1).membership
    order = {int(code): i for i, code in enumerate(pd.Series(codes).value_counts().index)}
    letters = "".join(chr(ord("A") + i) for i in range(len(order)))
    text = "".join(letters[order[code]] for code in codes)
    how = " ".join((clusters.__doc__ or "").split("\n\n")[1].split())
    packages = ("scikit-learn", "harmonypy", "igraph")
    content = {"how": how, "versions": {p: metadata.version(p) for p in packages}, "letters": letters}
    lines = [text[i : i + 100] for i in range(0, len(text), 100)]
    common.save_json(path, content | {"cells": lines})
    return clusters(adata)


def _scaled(values: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Features centred and divided by their standard deviation in each batch, within ±10."""
    out = np.empty_like(values, dtype=np.float32)
    for level in np.unique(batch):
        rows = batch == level
        scale = values[rows].std(0)
        out[rows] = (values[rows] - values[rows].mean(0)) / np.where(scale > 0, scale, 1.0)
    return out.clip(-10, 10)


def transfer(
    reference: np.ndarray, labels: Any, query: np.ndarray, truth: Any, seed: int = 0
) -> dict[str, Any]:
    """Labels carried from the reference's latent space to the query's by a random forest (500 trees).

    Scored are the query cells whose label at least 10 cells of the reference have.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import f1_score

    labels, truth = (np.asarray(v).astype(str) for v in (labels, truth))
    start = time.perf_counter()
    forest = RandomForestClassifier(500, class_weight="balanced_subsample", random_state=seed)
    found = forest.fit(reference, labels).predict(query)
    seconds = time.perf_counter() - start
    levels, counts = np.unique(labels, return_counts=True)
    known = levels[counts >= 10]
    scored = np.isin(truth, known)
    f1 = f1_score(truth[scored], found[scored], labels=known, average="macro", zero_division=0.0)
    return {
        "accuracy": float((found == truth)[scored].mean()),
        "macro_f1": float(f1),
        "cells_scored": int(scored.sum()),
        "clusters_scored": len(known),
        "seconds_transfer": seconds,
    }
