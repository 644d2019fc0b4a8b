"""Simulated data with known differential expression, and how a table of calls is judged.

The module runs unchanged in pyrosc's environment and in the peer's, so that both tools meet the same counts,
the same truth and the same arithmetic.  It imports neither tool.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _common as common
import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

SEEDS = tuple(range(24))
DELTA = 0.25
N_GENES = 800
PROGRAMS = 6
_CELLS_OF_TRUTH = 20_000


def simulate(seed: int) -> tuple[anndata.AnnData, np.ndarray]:
    """Counts of three cell types, and the true log2-fold change of the first type against the second.

    Expression is a softmax over genes of a log-normal base level, a change per type, and programs of genes
    whose use in a cell is gamma distributed, of type-dependent mean. Counts are negative binomial with
    dispersions of their own for each gene; library sizes are log-normal. No part of it is a network. Even
    seeds change 15 % of the genes (spike and slab), odd seeds all of them (Laplace). 400 to 800 cells, of
    types of unequal size.

    Returns
    -------
    tuple
        AnnData with ``obs["type"]`` (a, b, c); and (g,) log2 ratios of the types' expected expression, by
        20,000 cells of each.
    """
    rng = np.random.default_rng([17, seed])
    n = int(rng.integers(400, 801))
    base = rng.normal(0.0, 1.5, N_GENES)
    if seed % 2 == 0:
        changed = rng.random((3, N_GENES)) < 0.15
        change = changed * rng.normal(0.0, 1.0, (3, N_GENES))
    else:
        change = rng.laplace(0.0, 0.3, (3, N_GENES))
    members = rng.random((PROGRAMS, N_GENES)) < 0.06
    loading = members * rng.normal(0.0, 0.5, (PROGRAMS, N_GENES))
    use = rng.uniform(0.5, 1.5, (3, PROGRAMS))

    def expression(kinds: np.ndarray) -> np.ndarray:
        activity = rng.gamma(2.0, use[kinds] / 2.0)
        logits = base + change[kinds] * np.log(2) + activity @ loading
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    means = np.zeros((2, N_GENES))
    for kind in (0, 1):
        for _ in range(_CELLS_OF_TRUTH // 2000):
            means[kind] += expression(np.full(2000, kind)).mean(0)
    truth = np.log2(means[0] / means[1])

    kinds = rng.permutation(np.repeat([0, 1, 2], np.round(n * np.array([0.4, 0.25, 0.35])).astype(int)))
    library = rng.lognormal(np.log(1000.0), 0.4, len(kinds))
    inverse_dispersion = rng.lognormal(np.log(2.0), 0.7, N_GENES)
    mean = library[:, None] * expression(kinds)
    counts = rng.poisson(rng.gamma(inverse_dispersion, mean / inverse_dispersion)).astype(np.float32)
    obs = pd.DataFrame(
        {"type": pd.Categorical.from_codes(kinds, ["a", "b", "c"])},
        index=[f"cell_{i}" for i in range(len(kinds))],
    )
    var = pd.DataFrame(index=[f"gene_{j}" for j in range(N_GENES)])
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=var), truth


def simulate_donors(seed: int, n_donors: int, paired: bool) -> tuple[anndata.AnnData, np.ndarray]:
    """Counts of one cell type under two conditions, with donors that differ from each other in every gene.

    Log expression of a donor varies by .2 to .6 (log2) around the condition's, and by a third of that
    between its two samples where donors are paired. 15 % of the genes change. 20 to 60 cells per donor and
    condition.

    Parameters
    ----------
    seed
        Of everything.
    n_donors
        Donors: of the whole (paired), or of each condition.
    paired
        Whether donors have cells under both conditions.

    Returns
    -------
    tuple
        AnnData with ``obs`` columns ``condition`` (control, treated) and ``donor``; and (g,) log2-fold
        changes of the population of donors.
    """
    rng = np.random.default_rng([23, seed, n_donors, paired])
    base = rng.normal(0.0, 1.5, N_GENES) / np.log(2)
    change = (rng.random(N_GENES) < 0.15) * rng.normal(0.0, 1.0, N_GENES)
    spread = rng.uniform(0.2, 0.6, N_GENES)
    own = rng.normal(0.0, spread, (n_donors if paired else 2 * n_donors, N_GENES))
    profiles, names = [], []
    for i in range(2 * n_donors):
        condition, donor = divmod(i, n_donors)
        donor = donor if paired else i
        logits = base + condition * change + own[donor] + paired * rng.normal(0.0, spread / 3)
        n_cells = int(rng.integers(20, 61))
        profiles += [logits] * n_cells
        names += [(("control", "treated")[condition], f"d{donor}")] * n_cells
    usage = rng.gamma(2.0, 0.5, (len(names), PROGRAMS))
    loading = (rng.random((PROGRAMS, N_GENES)) < 0.06) * rng.normal(0.0, 0.7, (PROGRAMS, N_GENES))
    rate = np.exp2(np.stack(profiles) + usage @ loading)
    rate /= rate.sum(1, keepdims=True)
    library = rng.lognormal(np.log(1000.0), 0.4, len(names))
    inverse_dispersion = rng.lognormal(np.log(2.0), 0.7, N_GENES)
    mean = library[:, None] * rate
    counts = rng.poisson(rng.gamma(inverse_dispersion, mean / inverse_dispersion)).astype(np.float32)
    obs = pd.DataFrame(names, columns=["condition", "donor"], index=[f"cell_{i}" for i in range(len(names))])
    # what all shares lose to the genes that rise
    total = np.log2(np.exp2(base + change).sum() / np.exp2(base).sum())
    var = pd.DataFrame(index=[f"gene_{j}" for j in range(N_GENES)])
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=var), change - total


def kang(data_dir: str | Path | None = None, n_genes: int | None = None) -> anndata.AnnData:
    """kang_ifnb: all genes that three cells or more have, or the most variable of them."""
    adata = anndata.read_h5ad(Path(data_dir or common.data_folder()) / "kang_ifnb.h5ad")
    adata = adata[:, np.asarray((adata.X > 0).sum(0)).ravel() >= 3].copy()
    for key in ("condition", "cell_type", "donor"):
        adata.obs[key] = adata.obs[key].astype(str).astype("category")
    if n_genes is not None:
        names = common.variable_genes(f"kang_ifnb_{n_genes}", adata, "condition", n_genes)
        adata = adata[:, names].copy()
    return adata


def kept(path: Path) -> dict[str, Any]:
    """Simulations that a result file already holds."""
    return json.loads(path.read_text())["simulations"] if path.exists() else {}


def judge(truth: np.ndarray, lfc: np.ndarray, called: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    """How right calls and ranking are.

    A true positive is a gene with a true |LFC| of δ or more, found with the right sign.

    Returns
    -------
    dict
        ``fdr``, ``power``, ``calls`` of the calls; ``power_ranked``: power of the longest head of the
        ranking by `score` whose realised FDR is at most .05.
    """
    positive = np.abs(truth) >= DELTA
    right = positive & (np.sign(truth) == np.sign(lfc))
    order = np.argsort(-score, kind="stable")
    found = np.cumsum(right[order])
    share = 1 - found / np.arange(1, len(found) + 1)
    inside = np.flatnonzero(share <= 0.05)
    n_called = int(called.sum())
    return {
        "calls": n_called,
        "positives": int(positive.sum()),
        "fdr": float(1 - right[called].mean()) if n_called else 0.0,
        "power": float(right[called].sum() / positive.sum()),
        "power_ranked": float(found[inside[-1]] / positive.sum()) if len(inside) else 0.0,
    }


def power_at(truth: np.ndarray, lfc: np.ndarray, score: np.ndarray, fdr: float) -> float:
    """Power of the longest head of a ranking whose realised FDR is at most `fdr`."""
    positive = np.abs(truth) >= DELTA
    right = positive & (np.sign(truth) == np.sign(lfc))
    order = np.argsort(-score, kind="stable")
    found = np.cumsum(right[order])
    inside = np.flatnonzero(1 - found / np.arange(1, len(found) + 1) <= fdr)
    return float(found[inside[-1]] / positive.sum()) if len(inside) else 0.0
