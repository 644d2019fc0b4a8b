"""Cells drawn from a LinearSCVI with known loadings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyrosc.models import LinearSCVI
from pyrosc.simulate._scvi import draw, normal, set_effects, set_genes, set_zeros
from pyrosc.simulate.core import Simulated


def linear_scvi(
    n_cells: int = 1000,
    n_genes: int = 200,
    *,
    signal: float = 1.0,
    effect: float = 0.5,
    zero_inflation: float = 0.05,
    sparsity: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> Simulated:
    """Cells drawn from a LinearSCVI with random loadings.

    Parameters
    ----------
    n_cells, n_genes
        Sizes.
    signal
        Standard deviation of a gene's log expression over cells, about.
    effect
        Standard deviation of covariate effects on a gene's log expression.
    zero_inflation
        Mean probability of a technical zero; used by the ZINB likelihood.
    sparsity
        Share of the loadings that are zero, in [0, 1); the others are larger by as much.
    seed
        Of everything.
    **options
        Of `pyrosc.simulate.scvi` (``n_latent=``, ``n_types=``, ``n_batches=``, ``mean_library=``, …) and of
        `LinearSCVI`.

    Returns
    -------
    Simulated
        ``adata.varm["true_loadings"]``, (g, k), holds the loadings, ``adata.obsm["true_z"]`` the factors.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is a share in [0, 1); got {sparsity}")

    def truth(model: LinearSCVI, rng: np.random.Generator) -> dict[str, np.ndarray]:
        with torch.no_grad():
            weight = model.scale_head.weight
            scale = signal * (weight.shape[1] * (1 - sparsity)) ** -0.5
            kept = torch.as_tensor(rng.random(tuple(weight.shape)) >= sparsity)
            weight.copy_(normal(rng, weight, scale) * kept)
            set_effects(model.scale_head.effects, rng, effect)
            set_genes(model, rng)
            if model.zi_head is not None:
                model.zi_head.weight.zero_()
                set_effects(model.zi_head.effects, rng, 0.0)
                set_zeros(model, rng, zero_inflation)
            return {"loadings": weight.numpy().copy()} if model.bayesian else {}

    simulated = draw(LinearSCVI, truth, n_cells, n_genes, seed=seed, **options)
    model: Any = simulated.model
    simulated.adata.varm["true_loadings"] = model.get_loadings().to_numpy()
    return simulated
