"""Droplets of which a known share hold two cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyrosc.data import DataError
from pyrosc.simulate._scvi import scvi

if TYPE_CHECKING:
    from anndata import AnnData


def doublets(
    adata: AnnData | None = None,
    rate: float = 0.1,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    capture: float | tuple[float, float] = 1.0,
    seed: int = 0,
    **options: Any,
) -> AnnData:
    """Put a share of the cells into droplets two by two, as a loaded lane does.

    A doublet's counts are those of its two cells together, and neither cell is left over as a singlet; so
    of n cells n / (1 + `rate`) droplets remain, `rate` of which hold two.

    Parameters
    ----------
    adata
        Cells that are singlets as far as known; never changed. None draws them by `pyrosc.simulate.scvi`.
    rate
        Share of the droplets that hold two cells, in [0, 1).
    layer
        Layer with the counts; default ``X``.
    batch_key
        Column of ``obs`` within which cells pair; default all with all.
    capture
        Share of the two cells' molecules that is kept in a doublet, drawn binomially: a number in (0, 1], or
        the ends of a range from which each doublet draws its own. Below 1 as where a droplet's reagents run
        short.
    seed
        Of everything.
    **options
        Of `pyrosc.simulate.scvi` (``n_cells=``, ``n_types=``, …), where `adata` is None; ``n_cells`` counts
        the cells before they pair.

    Returns
    -------
    AnnData
        Droplets in random order with counts in ``X`` (CSR float32). ``obs``: columns of the first cell of
        each droplet, and ``doublet`` (bool), ``cell_1`` and ``cell_2`` (names of the cells inside;
        ``cell_2`` is empty for singlets).

    Raises
    ------
    ValueError
        For a rate or capture out of range.
    """
    import anndata as ad

    if not 0 <= rate < 1:
        raise ValueError(f"rate is the share of droplets with two cells, in [0, 1); not {rate}")
    low, high = (capture, capture) if isinstance(capture, (int, float)) else capture
    if not 0 < low <= high <= 1:
        raise ValueError(f"capture is a share in (0, 1], or two of them in order; not {capture}")
    if adata is None:
        adata = scvi(seed=seed, **options).adata
    elif options:
        raise TypeError(f"{sorted(options)} are options of simulate.scvi, for which adata is None")
    rng = np.random.default_rng(seed)
    counts = adata.X if layer is None else adata.layers[layer]
    if counts is None:
        raise DataError("X is empty; name the layer with the counts")
    x = sp.csr_matrix(counts, dtype=np.float32)
    n = adata.n_obs
    groups = np.zeros(n, np.int64) if batch_key is None else pd.factorize(adata.obs[batch_key])[0]
    first, second = _partners(groups, round(rate * n / (1 + rate)), rng)
    alone = np.setdiff1d(np.arange(n), np.concatenate([first, second]))
    order = rng.permutation(len(alone) + len(first))
    both = (x[first] + x[second]).tocsr()
    if low < 1:
        kept = np.repeat(rng.uniform(low, high, len(first)), np.diff(both.indptr))
        both.data = rng.binomial(both.data.astype(np.int64), kept).astype(np.float32)
        both.eliminate_zeros()
    names = adata.obs_names.to_numpy()
    obs = adata.obs.iloc[np.concatenate([alone, first])].copy()
    obs["doublet"] = np.repeat([False, True], [len(alone), len(first)])
    obs["cell_1"] = names[np.concatenate([alone, first])]
    obs["cell_2"] = np.concatenate([np.full(len(alone), "", dtype=object), names[second]])
    droplets = ad.AnnData(sp.vstack([x[alone], both], format="csr")[order], obs.iloc[order], adata.var.copy())
    droplets.obs_names = [f"droplet{i}" for i in range(droplets.n_obs)]
    return droplets


def _partners(groups: np.ndarray, n_pairs: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint pairs within groups, each group's share of them by its size; two arrays of row numbers."""
    order = rng.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    # neighbours in this order, of one group and at an even place in it, are pairs drawn without replacement
    ordered = groups[order]
    starts = np.searchsorted(ordered, ordered)
    even = (np.arange(len(order)) - starts) % 2 == 0
    at = np.flatnonzero(even[:-1] & (ordered[:-1] == ordered[1:]))
    if n_pairs > len(at):
        raise ValueError(f"only {len(at):,} pairs can be made within the groups, not {n_pairs:,}")
    at = rng.choice(at, n_pairs, replace=False)
    return order[at], order[at + 1]
