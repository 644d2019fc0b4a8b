"""Cells in two dimensions."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData


def lay_out(cells: AnnData, basis: str, *, n_neighbors: int = 15, seed: int = 0) -> None:
    """Neighbours of an embedding in obsm and their UMAP, written into the AnnData as scanpy does."""
    import scanpy as sc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages warn about is theirs, not the user's
        neighbors = min(n_neighbors, cells.n_obs - 1)
        sc.pp.neighbors(cells, n_neighbors=neighbors, use_rep=basis, random_state=seed)
        sc.tl.umap(cells, random_state=seed)


def umap(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """UMAP of an embedding (n, k): (n, 2) float32."""
    import anndata

    cells = anndata.AnnData(obsm={"X": np.ascontiguousarray(values)}, shape=(len(values), 0))
    lay_out(cells, "X", seed=seed)
    return np.asarray(cells.obsm["X_umap"])
