"""What the scripts about accessibility share: data, one held-out estimator, agreement of clusters.

The module runs unchanged in pyrosc's environment and in the peer's, and imports neither tool.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common as common
import anndata
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

CELLS, BATCH_KEY, LABELS_KEY = 4000, "Group", "BioClassification"
RESOLUTIONS = (0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.4, 2.0)

Encode = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Decode = Callable[[Tensor], Tensor]


def load(n_cells: int | None = CELLS, min_cells: int = 20, sample: int = 0) -> anndata.AnnData:
    """hemato_atac, or a fixed sample of its cells, with the peaks that are open in `min_cells` of them.

    Samples of other numbers than 0 are of the cells that are not in that one.
    """
    adata = anndata.read_h5ad(common.data_folder() / "hemato_atac.h5ad")
    if n_cells is not None:
        rows = np.random.default_rng(0).choice(adata.n_obs, n_cells, replace=False)
        if sample:
            others = np.setdiff1d(np.arange(adata.n_obs), rows)
            rows = np.random.default_rng(sample).choice(others, n_cells, replace=False)
        adata = adata[np.sort(rows)].copy()
    x = sp.csr_matrix(adata.X)
    kept = np.asarray((x > 0).sum(0)).ravel() >= min_cells
    adata = adata[:, kept].copy()
    for key in (BATCH_KEY, LABELS_KEY):
        adata.obs[key] = adata.obs[key].astype(str).astype("category")
    return adata


@torch.no_grad()
def heldout(
    encode: Encode, decode: Decode, x: sp.csr_matrix, *, draws: int = 25, importance: int = 100, seed: int = 0
) -> dict[str, Any]:
    """Held-out likelihood of 1[x > 0] with z ~ q(z | x): ELBO at weight 1 and importance-weighted.

    Parameters
    ----------
    encode
        Counts (n, g) to mean and standard deviation of q(z | x), each (n, k), and the log of what the
        probabilities are multiplied by, (n, g) or broadcastable: cell and region factors.
    decode
        z (m, k) to logits of the accessibility probabilities, (m, g).
    x
        Counts of the held-out cells.
    draws, importance
        Draws per cell of the ELBO, whose KL is exact, and of the importance-weighted likelihood.

    Returns
    -------
    dict
        Nats per cell with standard errors over cells.
    """
    generator = torch.Generator().manual_seed(seed)
    elbos, iwlls = [], []
    for start in range(0, x.shape[0], 8):
        counts = torch.from_numpy(x[start : start + 8].toarray().astype(np.float32))
        loc, scale, log_factor = encode(counts)
        n, k = loc.shape
        noise = torch.randn(n, importance, k, generator=generator)
        z = loc[:, None] + scale[:, None] * noise
        log_p = logsigmoid(decode(z.flatten(0, 1)).double()).view(n, importance, -1)
        log_p = log_p + log_factor.double().unsqueeze(1)
        log_zero = torch.log1p(-log_p.exp().clamp(max=1 - 1e-12))
        log_px = torch.where(counts.unsqueeze(1) > 0, log_p, log_zero).sum(-1)
        kl = (0.5 * (loc**2 + scale**2 - 1) - scale.log()).sum(-1).double()
        log_ratio = (scale.log().unsqueeze(1) + 0.5 * noise**2 - 0.5 * z**2).sum(-1).double()
        elbos.append(log_px[:, :draws].mean(1) - kl)
        iwlls.append((log_px + log_ratio).logsumexp(1) - math.log(importance))
    elbo, iwll = torch.cat(elbos), torch.cat(iwlls)
    root = math.sqrt(len(elbo))
    return {
        "elbo": float(elbo.mean()),
        "elbo_se": float(elbo.std() / root),
        "iwll": float(iwll.mean()),
        "iwll_se": float(iwll.std() / root),
    }


def agreement(latent: np.ndarray, labels: Any, seeds: int = 3) -> dict[str, dict[str, float]]:
    """NMI, ARI and number of Leiden clusters by resolution, means over seeds of Leiden; 15 neighbours."""
    import scanpy as sc
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    cells = anndata.AnnData(sp.csr_matrix((len(latent), 1), dtype=np.float32))
    cells.obsm["latent"] = np.ascontiguousarray(latent, np.float32)
    many = {"transformer": "sklearn"} if len(latent) > 4096 else {}  # exact, as those of fewer cells are
    sc.pp.neighbors(cells, use_rep="latent", random_state=0, **many)
    found = {}
    for resolution in RESOLUTIONS:
        scores = []
        for seed in range(seeds):
            sc.tl.leiden(
                cells,
                resolution=resolution,
                random_state=seed,
                flavor="igraph",
                n_iterations=2,
                directed=False,
            )
            clusters = cells.obs["leiden"]
            scores.append(
                (
                    normalized_mutual_info_score(labels, clusters),
                    adjusted_rand_score(labels, clusters),
                    clusters.nunique(),
                )
            )
        nmi, ari, n = np.mean(scores, axis=0)
        found[f"{resolution:g}"] = {"nmi": float(nmi), "ari": float(ari), "clusters": float(n)}
    return found


def best_resolution(scores: dict[str, dict[str, float]]) -> str:
    """The resolution at which clusters agree best with the labels (NMI)."""
    return max(scores, key=lambda r: scores[r]["nmi"])


def main() -> None:
    """Print clusters' agreement and integration scores of saved latent spaces: ``python _atac.py FILE.npz``.

    In the peer's environment, which has igraph and scib-metrics; the file holds arrays (cells, k) by name.
    """
    parser = argparse.ArgumentParser(description="Scores of saved latent spaces.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--all-cells", action="store_true", help="the latent spaces are of all cells")
    parser.add_argument("--sample", type=int, default=0, help="of the cells, where not of all")
    parser.add_argument("--scib", action="store_true", help="scib-metrics too")
    args = parser.parse_args()
    adata = load(None if args.all_cells else CELLS, sample=args.sample)
    found: dict[str, Any] = {}
    latents = dict(np.load(args.file))
    for name, latent in latents.items():
        found[name] = {"clusters": agreement(latent, adata.obs[LABELS_KEY])}
    if args.scib:
        for name, scores in common.scib(adata, latents, BATCH_KEY, LABELS_KEY).items():
            found[name]["scib"] = scores
    print(json.dumps(found))


if __name__ == "__main__":
    main()
