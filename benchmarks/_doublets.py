"""Data sets with known doublets, as both tools see them, and the scores that both get.

Runs in pyrosc's environment and in the peer's; imports neither tool.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common as common
import anndata
import numpy as np

SETS = ("hashing_doublets", "kang_ifnb")


@dataclass(frozen=True)
class Droplets:
    """Counts, and which droplets are known to hold two cells.

    Attributes
    ----------
    adata
        Counts in ``X``; the truth is not in it.
    doublet
        (n,) bool.
    known
        (n,) bool, whether the truth is known at all: hashing sees nothing in droplets without a hashtag.
    batch_key
        Column of ``obs`` with the lane, or None.
    """

    adata: anndata.AnnData
    doublet: np.ndarray
    known: np.ndarray
    batch_key: str | None


def load(name: str, data_dir: str | Path | None = None) -> Droplets:
    """Read a set; kang_ifnb comes with its 2000 variable genes only."""
    adata = anndata.read_h5ad(Path(data_dir or common.data_folder()) / f"{name}.h5ad")
    if name == "hashing_doublets":
        label = adata.obs["doublet_true_labels"].astype(str)
        doublet, known = (label == "Doublet").to_numpy(), (label != "Negative").to_numpy()
        batch_key = None
    else:
        adata = adata[:, common.variable_genes(name, adata, "condition")].copy()
        doublet = (adata.obs["doublet"].astype(str) == "True").to_numpy()
        known = np.ones(len(doublet), bool)
        batch_key = "condition"
    adata.obs = adata.obs[[batch_key] if batch_key else []].copy()
    return Droplets(adata, doublet, known, batch_key)


def score(droplets: Droplets, probability: np.ndarray) -> dict[str, Any]:
    """AUROC and average precision over droplets with a known truth; how many are called, and how rightly."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    known = droplets.known
    truth, found = droplets.doublet[known], probability[known]
    called = found > 0.5
    return {
        "auroc": float(roc_auc_score(truth, found)),
        "average_precision": float(average_precision_score(truth, found)),
        "true_rate": float(truth.mean()),
        "called": float(called.mean()),
        "precision_of_calls": float(truth[called].mean()) if called.any() else None,
    }
