"""Cells with RNA and proteins, drawn from a TOTALVI with known parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyrosc.models import TOTALVI
from pyrosc.simulate._scvi import draw, normal, set_decoder
from pyrosc.simulate.core import Simulated


def totalvi(
    n_cells: int = 1000,
    n_genes: int = 100,
    n_proteins: int = 12,
    *,
    n_latent: int = 5,
    n_types: int = 4,
    n_batches: int = 2,
    panels: Mapping[str, Sequence[int]] | None = None,
    background: float = 2.0,
    sd_background: float = 0.3,
    rise: tuple[float, float] = (6.0, 20.0),
    contrast: float = 3.0,
    sd_efficiency: float = 0.2,
    effect: float = 0.3,
    signal: float = 1.0,
    mean_library: float = 2000.0,
    seed: int = 0,
    **options: Any,
) -> Simulated:
    """Cells drawn from a TOTALVI with random decoder weights, linear in z for the proteins.

    Parameters
    ----------
    n_cells, n_genes, n_proteins, n_latent
        Sizes.
    n_types
        Cell types, as clusters of z; 0 draws z from the prior.
    n_batches
        Levels of ``obs["batch"]``.
    panels
        Positions of the proteins that a batch is stained for, ``{"batch1": [0, 1, 2]}``; default all.
    background, sd_background
        Log mean of background counts, on average over proteins, and its standard deviation over cells.
    rise
        Range of the foreground's mean over the background's, less 1.
    contrast
        Standard deviation over cells of the logits of foreground.
    sd_efficiency
        Standard deviation of the batches' log efficiencies.
    effect, signal, mean_library
        Of the genes, as in `scvi`.
    seed
        Of everything.
    **options
        Of `TOTALVI`.

    Returns
    -------
    Simulated
        ``adata.obsm["protein"]`` holds the counts (DataFrame, NaN where not stained for), ``obsm`` the truth:
        ``"true_y"`` (also of proteins not stained for), ``"true_foreground_probability"``, ``"true_protein"``
        (mean without background), ``"true_log_background"``; the model has the true parameters.
    """
    names = [f"protein{t}" for t in range(n_proteins)]

    def design(blank: Any) -> dict[str, Any]:
        y = pd.DataFrame(1.0, index=blank.obs_names, columns=names)
        for batch, stained in (panels or {}).items():
            lacking = [n for t, n in enumerate(names) if t not in set(stained)]
            y.loc[(blank.obs["batch"] == batch).to_numpy(), lacking] = np.nan
        blank.obsm["protein"] = y
        return {"protein_key": "protein"}

    def truth(model: TOTALVI, rng: np.random.Generator) -> dict[str, np.ndarray]:
        set_decoder(model, rng, effect, signal, 0.05)
        with torch.no_grad():
            for head in (model.mixing_head, model.foreground_head):
                head.weight.zero_()
                for parameter in head.effects.parameters():
                    parameter.zero_()
            on_z = model.mixing_head.weight[:, -n_latent:]
            on_z.copy_(normal(rng, on_z, contrast * n_latent**-0.5))
            model.mixing_head.bias.copy_(normal(rng, model.mixing_head.bias, 1.0))
            model.foreground_head.bias.copy_(torch.as_tensor(rng.uniform(*rise, n_proteins)))
            of_protein = normal(rng, model.prior_loc.rows[0], 0.5) + background
            model.prior_loc.rows.copy_(of_protein + normal(rng, model.prior_loc.rows, 0.2))
            model.prior_log_scale.rows.fill_(float(np.log(sd_background)))
            for parameter in model.log_phi.parameters():
                parameter.fill_(2.0)
            rows = normal(rng, model.log_efficiency.rows, sd_efficiency)
            model.log_efficiency.rows.copy_(rows)
        return {"log_efficiency": rows.numpy()}

    found = draw(
        TOTALVI,
        truth,
        n_cells,
        n_genes,
        n_latent=n_latent,
        n_types=n_types,
        n_batches=n_batches,
        mean_library=mean_library,
        seed=seed,
        design=design,
        **({"background_prior": "none"} | options),
    )
    adata, stained = found.adata, found.model.home().obsm["protein"].notna()
    y = pd.DataFrame(adata.obsm["true_y"], index=adata.obs_names, columns=names)
    adata.obsm["protein"] = y.where(stained)
    return found
