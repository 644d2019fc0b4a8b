"""Cells of known types, some of them with a label."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyrosc.simulate._scvi import scvi
from pyrosc.simulate.core import Simulated


def scanvi(
    n_cells: int = 1000,
    n_genes: int = 200,
    *,
    n_types: int = 4,
    labelled: float | str = 0.5,
    unlabeled_category: str = "unknown",
    seed: int = 0,
    **options: Any,
) -> Simulated:
    """Cells of known types, drawn as by `simulate.scvi`, of which some have a label.

    Parameters
    ----------
    n_cells, n_genes, n_types
        Sizes.
    labelled
        Share of the cells, drawn at random, that keep their label; or the name of a batch (``"batch0"``)
        whose cells alone do.
    unlabeled_category
        Label of the others.
    seed
        Of everything.
    **options
        Of `simulate.scvi`.

    Returns
    -------
    Simulated
        ``adata.obs["cell_type"]`` is the truth, ``adata.obs["label"]`` what `SCANVI` is told; the model is
        the SCVI that the counts come from.
    """
    found = scvi(n_cells, n_genes, n_types=n_types, seed=seed, **options)
    obs = found.adata.obs
    if isinstance(labelled, str):
        known = (obs["batch"] == labelled).to_numpy()
        if not known.any():
            raise ValueError(f"there is no batch {labelled!r}; there are {sorted(set(obs['batch']))}")
    elif 0 < labelled <= 1:
        known = np.random.default_rng(seed).permutation(n_cells) < round(labelled * n_cells)
    else:
        raise ValueError(f"labelled is a share in (0, 1] or the name of a batch, not {labelled!r}")
    obs["label"] = np.where(known, obs["cell_type"], unlabeled_category)
    return found
