"""What both sides of the Stereoscope benchmark share: data, genes, and one function of fit.

It runs unchanged in pyrosc's environment and in the peer's, and imports neither tool.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _common as common
import anndata
import numpy as np
import scipy.sparse as sp
from scipy.special import gammaln

REFERENCE, SPOTS = "breast_reference", "her2st_H1"
N_GENES = 2000


def load(labels: str, data_dir: str | Path | None = None) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Single cells and spots with the same genes: the reference's most variable ones that spots have too."""
    folder = Path(data_dir or common.data_folder())
    reference = anndata.read_h5ad(folder / f"{REFERENCE}.h5ad")
    spots = anndata.read_h5ad(folder / f"{SPOTS}.h5ad")
    shared = [g for g in reference.var_names if g in set(spots.var_names)]
    genes = common.variable_genes(REFERENCE, reference[:, shared], None, N_GENES)
    reference, spots = reference[:, genes].copy(), spots[:, genes].copy()
    for adata in (reference, spots):
        adata.X = sp.csr_matrix(adata.X, dtype=np.float32)
    reference.obs[labels] = reference.obs[labels].astype(str).astype("category")
    return reference, spots


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x)."""
    return np.logaddexp(0.0, np.asarray(x, dtype=np.float64))


def log_likelihood(x: sp.csr_matrix, total: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Log-probability of each row of counts under NB(total, logits), in float64.

    log p(x) = log Γ(x + t) − log Γ(t) − log x! + x log σ(o) − t log(1 + e^o); all but the last term vanish at
    zero counts.
    """
    x = sp.csr_matrix(x)
    total = np.maximum(np.asarray(total, dtype=np.float64), 1e-30)
    zeros = -total @ softplus(logits)
    rows = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    count, t, o = x.data.astype(np.float64), total[rows, x.indices], logits[x.indices]
    positive = gammaln(count + t) - gammaln(t) - gammaln(count + 1) - count * softplus(-o)
    return zeros + np.bincount(rows, positive, x.shape[0])


def cells(x: sp.csr_matrix, codes: np.ndarray, W: np.ndarray, o: np.ndarray) -> float:
    """Mean log-likelihood of the single cells; W (types, genes) and o (genes,) as in the model."""
    library = np.asarray(x.sum(1), dtype=np.float64)
    return float(log_likelihood(x, library * softplus(W)[codes], o.astype(np.float64)).mean())


def spots(
    x: sp.csr_matrix, v: np.ndarray, W: np.ndarray, o: np.ndarray, beta: np.ndarray, eta: np.ndarray
) -> dict[str, float]:
    """Fit of the spots, nats per spot: log-likelihood, and with the prior of η what MAP maximises.

    v (spots, types + 1) are the amounts of types and noise; W, o, β and η as in the model.
    """
    total = v[:, :-1] @ (softplus(beta) * softplus(W)) + np.outer(v[:, -1], softplus(eta))
    value = float(log_likelihood(x, total, o.astype(np.float64)).mean())
    prior = float((-0.5 * eta.astype(np.float64) ** 2 - 0.5 * np.log(2 * np.pi)).sum())
    return {"log_likelihood": value, "objective": value + prior / x.shape[0]}


def provenance(labels: str, reference: anndata.AnnData, spots: anndata.AnnData) -> dict[str, Any]:
    """What was fitted, for the JSON file."""
    return {
        "data": f"{REFERENCE} → {SPOTS}",
        "labels": labels,
        "cells": reference.n_obs,
        "spots": spots.n_obs,
        "genes": reference.n_vars,
        "types": int(reference.obs[labels].nunique()),
    }
